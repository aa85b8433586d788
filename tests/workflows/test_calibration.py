"""Temperature and bias come back to what the data say, and back again."""

import keras
import numpy as np
import pytest
from helpers import to_numpy

import keras_halo
from keras_halo.ops import geometry
from keras_halo.workflows.calibrate import calibrate
from keras_halo.workflows.fit_class_gaussians import fit_class_gaussians

pytestmark = pytest.mark.slow

special = pytest.importorskip("scipy.special")


def model_of(gamma=3.0, bias=-1.0, num_classes=3, dim=4):
    head = keras_halo.HALODense.reference(num_classes)
    model = keras.Sequential([keras.Input((dim,)), head])
    head.assign_temperature(gamma)
    head.abstain_bias.assign(bias)
    return model, head


def sample(model, n=4000, seed=0):
    """Inputs, and labels drawn from what the model says of them."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, model.input_shape[-1])).astype("float32")
    logits = model.predict(x, verbose=0)[:, :-6]
    gumbel = rng.gumbel(size=logits.shape)
    return x, (logits + gumbel).argmax(axis=-1)


def state(head):
    return float(to_numpy(head.temperature)), float(to_numpy(head.abstain_bias))


@pytest.mark.parametrize("factor", [0.05, 0.4, 1.0, 5.0, 30.0])
def test_a_wrong_temperature_is_found_out(factor):
    model, head = model_of(gamma=3.0)
    x, y = sample(model)
    head.assign_temperature(3.0 * factor)
    calibration = calibrate(model, x, y, verbose=0)
    assert calibration.old_temperature == pytest.approx(3.0 * factor, rel=1e-4)
    assert calibration.temperature == pytest.approx(3.0, rel=0.1)
    assert state(head)[0] == pytest.approx(calibration.temperature, rel=1e-5)
    assert calibration.nll <= calibration.old_nll + 1e-9
    if factor in (0.05, 30.0):
        assert calibration.ece < calibration.old_ece / 3
    assert calibration.ece < 0.03


def test_temperature_has_the_largest_likelihood_of_a_grid():
    model, head = model_of(gamma=8.0)
    x, y = sample(model, n=500)
    y = np.where(np.arange(500) % 5 == 0, 0, y)
    found = calibrate(model, x, y, bias="keep", verbose=0)

    def nll(gamma):
        head.assign_temperature(gamma)
        log_p = special.log_softmax(
            model.predict(x, verbose=0)[:, :3].astype("float64"), axis=-1
        )
        return -log_p[np.arange(500), y].mean()

    best = nll(found.temperature)
    assert best == pytest.approx(found.nll, rel=1e-5)
    for factor in (0.8, 0.95, 1.05, 1.25):
        assert nll(factor * found.temperature) > best


def test_abstaining_is_as_probable_as_a_mistake():
    model, _ = model_of(bias=-6.0)
    x, y = sample(model)
    calibration = calibrate(model, x, y, verbose=0)
    predictions = keras_halo.decode_predictions(model.predict(x, verbose=0))
    wrong = np.mean(predictions.probabilities.argmax(axis=-1) != y)
    assert calibration.error_rate == wrong
    assert wrong > 0.1
    assert predictions.abstain_probability.mean() == pytest.approx(
        wrong, abs=1e-3
    )
    assert calibration.abstain_probability == pytest.approx(wrong, abs=1e-3)
    assert calibration.old_abstain_probability < 0.1


def test_unknown_inputs_raise_the_bias_to_their_share():
    model, _ = model_of(bias=-6.0)
    x, y = sample(model, n=1000)
    unknown = 0.1 * np.random.default_rng(1).normal(size=(1000, 4))
    without = calibrate(model, x, y, verbose=0)
    calibration = calibrate(model, x, y, unknown=unknown, verbose=0)
    assert calibration.abstain_bias > without.abstain_bias
    assert calibration.temperature == pytest.approx(without.temperature)
    abstain = keras_halo.decode_predictions(
        model.predict(np.concatenate([x, unknown]), verbose=0)
    ).abstain_probability
    assert abstain.mean() == pytest.approx(
        (calibration.error_rate + 1.0) / 2, abs=2e-3
    )
    assert abstain[1000:].mean() > abstain[:1000].mean()


def test_bias_of_known_data_alone_has_no_likelihood_maximum():
    # Why `calibrate` does not maximise it: every step down is a gain.
    model, head = model_of()
    x, y = sample(model, n=500)

    def nll(bias):
        head.abstain_bias.assign(bias)
        p = keras_halo.decode_predictions(model.predict(x, verbose=0))
        return -np.log(p.probabilities[np.arange(500), y]).mean()

    assert nll(2.0) > nll(0.0) > nll(-3.0) > nll(-6.0)


def test_margin_keeps_the_relation_of_bias_and_temperature():
    model, head = model_of()
    dim, initial = 4, geometry.initial_temperature(4)
    x, y = sample(model)
    head.assign_temperature(initial)
    calibration = calibrate(model, x, y, bias="margin", verbose=0)
    margin = calibration.abstain_bias - calibration.temperature * (
        1.0 - geometry.shell(dim)
    )
    untouched = geometry.abstain_bias(dim, 3, 0.1) - initial * (
        1.0 - geometry.shell(dim)
    )
    assert margin == pytest.approx(untouched, abs=1e-6)


def test_decisions_between_classes_stay():
    model, _ = model_of(gamma=0.5)
    x, y = sample(model, seed=3)
    before = model.predict(x, verbose=0)[:, :3].argmax(axis=-1)
    calibrate(model, x, np.where(y == 0, before, y), verbose=0)
    after = model.predict(x, verbose=0)[:, :3].argmax(axis=-1)
    assert np.mean(before == after) > 0.999


@pytest.mark.parametrize("bias", ["mistakes", "margin", "keep"])
def test_undo_is_exact(bias):
    model, head = model_of(gamma=1.2345678, bias=-0.7654321)
    x, y = sample(model)
    y[:400] = 0
    weights = [weight.numpy() for weight in head.weights]
    scores = model.predict(x[:50], verbose=0)
    calibration = calibrate(model, x, y, bias=bias, verbose=0)
    assert not np.array_equal(model.predict(x[:50], verbose=0), scores)
    calibration.undo()
    for weight, old in zip(head.weights, weights, strict=True):
        np.testing.assert_array_equal(weight.numpy(), old)
    np.testing.assert_array_equal(model.predict(x[:50], verbose=0), scores)


def test_calibrated_model_is_saved_and_loaded(tmp_path):
    model, head = model_of(gamma=0.5)
    x, y = sample(model)
    calibrate(model, x, np.where(y == 0, 1, y), verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert state(loaded.layers[-1]) == state(head)


def test_fitted_models_and_one_hot_labels_are_taken():
    model, head = model_of()
    x, y = sample(model)
    fitted = fit_class_gaussians(model, x, y, verbose=0)
    head.assign_temperature(30.0)
    calibration = calibrate(fitted, x, np.eye(3)[y], verbose=0)
    assert calibration.temperature == pytest.approx(3.0, rel=0.1)


def test_padding_does_not_count():
    model, head = model_of(gamma=3.0)
    x, y = sample(model, n=300)
    head.assign_temperature(1.0)
    expected = calibrate(model, x, y, verbose=0)
    expected.undo()
    padded_x = np.concatenate([x, 9.0 * x[:50]])
    padded_y = np.concatenate([y, np.full(50, -1)])
    weight = np.concatenate([np.ones(300), np.zeros(50)])
    calibration = calibrate(
        model, padded_x, padded_y, verbose=0, sample_weight=weight
    )
    for name in ("temperature", "abstain_bias", "nll", "ece", "error_rate"):
        assert getattr(calibration, name) == pytest.approx(
            getattr(expected, name), rel=1e-4
        )
    with pytest.raises(ValueError, match="weight other than zero"):
        calibrate(model, x, y, verbose=0, sample_weight=np.zeros(300))


def test_a_perfect_abstention_rate_stays_finite():
    model, _ = model_of()
    x, _ = sample(model)
    always_right = model.predict(x, verbose=0)[:, :3].argmax(axis=-1)
    # One wrong in the labels for the temperature, none of it in `unknown`.
    always_right[0] = (always_right[0] + 1) % 3
    calibration = calibrate(model, x, always_right, verbose=0)
    assert np.isfinite(calibration.abstain_bias)
    assert 0 < calibration.abstain_probability < 1e-3


def test_table_of_before_and_after():
    model, _ = model_of()
    x, y = sample(model)
    text = str(calibrate(model, x, y, verbose=0))
    assert [line.split()[0] for line in text.splitlines()] == [
        "before",
        "temperature",
        "abstain",
        "NLL",
        "ECE",
        "P(abstain)",
    ]


def test_failures_leave_the_weights_untouched():
    model, head = model_of()
    x, y = sample(model, n=200)
    before = state(head)
    worst = model.predict(x, verbose=0)[:, :3].argmin(axis=-1)
    bad = np.where(x > 0, np.nan, x)
    cases = [
        ("no more probable than by chance", (x, worst), {}),
        ("must be finite", (bad, y), {}),
        ("must be finite", (x, y), {"unknown": bad}),
        ("one label for every input", (x, y[:-1]), {}),
        ("Labels must be integers", (x, y + 1), {}),
        ("`bias` must be one of", (x, y), {"bias": "likelihood"}),
        ("`unknown` only serves", (x, y), {"bias": "keep", "unknown": x}),
    ]
    for message, arguments, options in cases:
        with pytest.raises(ValueError, match=message):
            calibrate(model, *arguments, verbose=0, **options)
        assert state(head) == before
    headless = keras.Sequential([keras.Input((4,)), keras.layers.Dense(7)])
    with pytest.raises(ValueError, match="exactly one"):
        calibrate(headless, x, y)
    softmaxed = keras.Sequential([model, keras_halo.HALOSoftmax()])
    with pytest.raises(ValueError, match="packed"):
        calibrate(softmaxed, x, y, verbose=0)
    assert state(head) == before


# A head whose biases follow the evidence -------------------------------------


@pytest.fixture(scope="module")
def following():
    """A trained model with the default head, and new data with errors."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 900)
    x = rng.normal(size=(900, 6)).astype("float32")
    x[np.arange(900), y] += 2.0
    model = keras.Sequential(
        [keras.Input((6,)), keras_halo.HALODense(3, embedding_dim=16)]
    )
    model.compile(keras.optimizers.Adam(0.01), keras_halo.HALOLoss())
    model.fit(x[:600], y[:600], epochs=10, verbose=0)
    return model, x[600:], y[600:]


def abstain_probability(model, x):
    scores = model.predict(x, verbose=0)
    return keras_halo.decode_predictions(scores).abstain_probability


@pytest.mark.parametrize("with_unknown", [False, True])
def test_biases_that_follow_the_evidence_move_together(following, with_unknown):
    model, x, y = following
    head = model.layers[-1]
    before = [to_numpy(weight) for weight in head.weights]
    unknown = 5.0 * np.random.default_rng(1).normal(size=(100, 6))
    unknown = unknown.astype("float32") if with_unknown else None
    calibration = calibrate(model, x, y, unknown, verbose=0)
    mean = [abstain_probability(model, x)]
    mistakes = calibration.error_rate * len(x)
    if with_unknown:
        mean.append(abstain_probability(model, unknown))
        mistakes += len(unknown)
    mean = np.concatenate(mean)
    expected = (mistakes + 0.5) / (len(mean) + 1.0)
    assert mean.mean() == pytest.approx(expected, rel=1e-3)
    assert calibration.nll <= calibration.old_nll + 1e-9
    calibration.undo()
    for old, new in zip(before, head.weights, strict=True):
        np.testing.assert_array_equal(old, to_numpy(new))


def test_kept_biases_keep_every_decision(following):
    model, x, y = following
    answers = keras_halo.decode_predictions(model.predict(x, verbose=0)).labels
    calibration = calibrate(model, x, y, bias="keep", verbose=0)
    assert calibration.temperature != calibration.old_temperature
    after = keras_halo.decode_predictions(model.predict(x, verbose=0)).labels
    # Two backgrounds add up to a little more where they are equal.
    assert np.mean(answers == after) > 0.99
    calibration.undo()


def test_a_margin_is_for_the_published_head(following):
    model, x, y = following
    with pytest.raises(ValueError, match="fixed margin.*abstain_rate=0.01"):
        calibrate(model, x, y, bias="margin", verbose=0)


def test_a_rule_notices_that_the_biases_have_moved(following):
    model, x, y = following
    rule = keras_halo.rejection.CoverageRule(0.9)
    rule.fit(model.predict(x, verbose=0))
    calibration = calibrate(model, x, y, verbose=0)
    with pytest.raises(ValueError, match="another model"):
        rule.predict(model.predict(x, verbose=0))
    calibration.undo()
    assert rule.predict(model.predict(x, verbose=0)).coverage >= 0.9


class Shuffled(keras.utils.PyDataset):
    """Batches in another order than that of the arrays they come from."""

    def __init__(self, x, y):
        super().__init__()
        order = np.random.default_rng(7).permutation(len(x))
        self.x, self.y = x[order], y[order]

    def __len__(self):
        return -(-len(self.x) // 32)

    def __getitem__(self, index):
        part = slice(32 * index, 32 * (index + 1))
        return self.x[part], self.y[part]


def validation_data():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, size=200)
    x = (np.eye(3, 4)[y] + 0.6 * rng.normal(size=(200, 4))).astype("float32")
    return x, y


def aligned_model():
    model, head = model_of()
    head.centroids.assign(2.0 * np.eye(3, 4))
    return model


TOOLS = {
    "calibrate": calibrate,
    "fit_class_gaussians": fit_class_gaussians,
    "convert_head": keras_halo.convert_head,
}


@pytest.mark.parametrize("kind", ["dataset", "generator", "list of batches"])
@pytest.mark.parametrize("tool", TOOLS)
def test_labels_beside_a_dataset_are_refused(tool, kind):
    x, y = validation_data()
    data = Shuffled(x, y)
    if kind != "dataset":
        data = [data[i] for i in range(len(data))]
    if kind == "generator":
        data = (batch for batch in data)
    with pytest.raises(ValueError, match="`y` belongs to arrays"):
        TOOLS[tool](aligned_model(), data, y)


@pytest.mark.parametrize("kind", ["dataset", "generator", "list of batches"])
def test_a_dataset_calibrates_as_its_arrays_do(kind):
    x, y = validation_data()
    expected = calibrate(aligned_model(), x, y, verbose=0)
    data = Shuffled(x, y)
    if kind != "dataset":
        data = [data[i] for i in range(len(data))]
    if kind == "generator":
        data = (batch for batch in data)
    result = calibrate(aligned_model(), data, verbose=0)
    assert result.temperature == pytest.approx(expected.temperature, rel=1e-4)
    assert result.abstain_bias == pytest.approx(expected.abstain_bias, rel=1e-3)


@pytest.mark.parametrize("kind", ["tuple", "list of batches", "lists"])
def test_unknown_data_of_every_kind_give_the_same_bias(kind):
    x, y = validation_data()
    unknown = (-x[:50], y[:50])
    expected = calibrate(
        aligned_model(), x, y, unknown=unknown[0], verbose=0
    ).abstain_bias
    if kind != "tuple":
        cls = tuple if kind == "list of batches" else list
        parts = [np.array_split(array, 3) for array in unknown]
        unknown = [cls(batch) for batch in zip(*parts, strict=True)]
    found = calibrate(aligned_model(), x, y, unknown=unknown, verbose=0)
    assert found.abstain_bias == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(7, int), "one label for every input"),
        (np.array(["cat"] * 200), "Encode them"),
        (None, "Labels are missing"),
    ],
)
def test_bad_labels_are_refused_before_anything_is_predicted(
    tool, labels, message, monkeypatch
):
    x, _ = validation_data()

    def predict(*args, **kwargs):
        raise AssertionError("predicted before the labels were looked at")

    monkeypatch.setattr(keras.Model, "predict", predict)
    monkeypatch.setattr(keras.Model, "predict_on_batch", predict)
    with pytest.raises(ValueError, match=message):
        TOOLS[tool](aligned_model(), x, labels)


def _evaluate(model, x, y, sample_weight=None, **kwargs):
    known = (x, y) if sample_weight is None else (x, y, sample_weight)
    return keras_halo.evaluate_ood(model, known, {"far": 9 * x}, **kwargs)


READERS_OF_LABELS = {
    **TOOLS,
    "collect_statistics": keras_halo.collect_statistics,
    "evaluate_ood": _evaluate,
}

ONES = np.ones(200)

BAD_ARRAYS = {
    "one too large": (lambda y: (y + 97 * (y == 1), None), "integers in"),
    "negative": (lambda y: (y - 1, None), "integers in"),
    "from one": (lambda y: (y + 1, None), "subtract 1"),
    "fractions": (lambda y: (y + 0.5, None), "integers in"),
    "several at once": (
        lambda y: (np.ones((200, 3)), None),
        "one-hot|distributions",
    ),
    "of other classes": (lambda y: (np.eye(5)[y], None), "Labels do not fit"),
    "two columns": (lambda y: (np.stack([y, y], 1), None), "do not fit"),
    "rows of zeros": (lambda y: (np.zeros((200, 3)), None), "one-hot|zeros"),
    "weights of positions": (lambda y: (y, np.ones((200, 4))), "weights"),
    "no weight": (lambda y: (y, 0.0 * ONES), "other than zero|Every class"),
    "negative weights": (lambda y: (y, -ONES), "not negative"),
}


@pytest.mark.parametrize("bad", BAD_ARRAYS)
@pytest.mark.parametrize("tool", READERS_OF_LABELS)
def test_bad_values_are_refused_before_anything_is_predicted(
    tool, bad, monkeypatch
):
    x, y = validation_data()
    make, message = BAD_ARRAYS[bad]
    labels, weights = make(y)
    if (tool, bad) == ("collect_statistics", "no weight"):
        pytest.skip("a part of the data may have no sample that counts")

    def predict(*args, **kwargs):
        raise AssertionError("predicted before the labels were looked at")

    monkeypatch.setattr(keras.Model, "predict", predict)
    monkeypatch.setattr(keras.Model, "predict_on_batch", predict)
    model = aligned_model()
    with pytest.raises(ValueError, match=message):
        READERS_OF_LABELS[tool](
            model, x, labels, sample_weight=weights, verbose=0
        )


@pytest.mark.parametrize("shape", [(40, 4), (40,), (40, 5, 4), (40, 4, 3)])
@pytest.mark.parametrize("tool", READERS_OF_LABELS)
def test_labels_of_other_positions_are_refused_before_anything_is_predicted(
    tool, shape, monkeypatch
):
    def predict(*args, **kwargs):
        raise AssertionError("predicted before the labels were looked at")

    monkeypatch.setattr(keras.Model, "predict", predict)
    monkeypatch.setattr(keras.Model, "predict_on_batch", predict)
    model = keras.Sequential([keras.Input((5, 4)), keras_halo.HALODense(3)])
    with pytest.raises(ValueError, match=r"Labels do not fit.*\(40, 5\)"):
        READERS_OF_LABELS[tool](
            model, np.ones((40, 5, 4), "float32"), np.zeros(shape), verbose=0
        )


def test_soft_and_ignored_labels_are_taken_where_they_have_a_meaning():
    x, y = validation_data()
    soft = 0.9 * np.eye(3)[y] + 0.1 / 3.0
    ignored = np.where(np.arange(200) < 50, 255, y)
    model = aligned_model()
    assert _evaluate(model, x, soft, verbose=0).known.count == 200
    report = _evaluate(model, x, ignored, verbose=0, ignore_class=255)
    assert report.known.count == 150
    with pytest.raises(ValueError, match="needs integer labels"):
        _evaluate(model, x, soft, verbose=0, ignore_class=255)


def test_labels_that_begin_at_one_are_named():
    x, y = validation_data()
    with pytest.raises(ValueError, match="from zero: subtract 1"):
        calibrate(aligned_model(), x, y + 1, verbose=0)


@pytest.mark.parametrize("far_scale", [0.5, 2.0])
def test_the_unit_of_the_far_evidence_takes_part(far_scale):
    x, y = validation_data()
    head = keras_halo.HALODense(3, embedding_dim=None)
    model = keras.Sequential([keras.Input((4,)), head])
    head.centroids.assign(2.0 * np.eye(3, 4))
    head.abstain_bias.assign(-1.0)
    head.far_bias.assign(-3.0)
    head.far_scale.assign(far_scale)
    result = calibrate(model, x, y, verbose=0)
    found = keras_halo.decode_predictions(model.predict(x, verbose=0))
    assert found.abstain_probability.mean() == pytest.approx(
        result.abstain_probability, rel=1e-4
    )
    wrong = (found.probabilities.argmax(axis=-1) != y).sum()
    assert found.abstain_probability.mean() == pytest.approx(
        (wrong + 0.5) / 201, rel=1e-3
    )


def test_without_a_mistake_the_temperature_stays():
    model = aligned_model()
    x, _ = validation_data()
    right = model.predict(x, verbose=0)[:, :3].argmax(axis=-1)
    with pytest.warns(UserWarning, match="grows with it without end"):
        result = calibrate(model, x, right, verbose=0)
    assert result.temperature == result.old_temperature
    # Half a mistake is counted, so that a few are rejected.
    assert result.abstain_probability == pytest.approx(0.5 / 201, rel=1e-2)
