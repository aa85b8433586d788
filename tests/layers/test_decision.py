"""Decision turns packed scores into labels, with -1 for rejected."""

import keras
import numpy as np
import pytest
from helpers import float64, packed, to_numpy
from keras import ops
from keras.src import testing

import keras_halo
from keras_halo.layers import (
    ClassGaussians,
    Decision,
    Guard,
    LabelSet,
    OODScore,
)
from keras_halo.layers.decision import rounded_down
from keras_halo.ops.ood_scores import OOD_METHODS, ood_score
from keras_halo.rejection import (
    CoverageRule,
    FalsePositiveRateRule,
    GroupwiseRule,
    LabelSetRule,
    bounds,
)

POLICIES = {
    "float32": "float32",
    "mixed_float16": "float32",
    "mixed_bfloat16": "float32",
    "float64": "float64",
}


def some_scores(*shape, seed=0, classes=5, spread=2.0):
    """Packed scores of which the model abstains from some."""
    rng = np.random.default_rng(seed)
    return packed(
        spread * rng.normal(size=(*shape, 6)) * rng.random((*shape, 1)),
        spread * np.random.default_rng(99).normal(size=(classes, 6)),
    )


class DecisionLayerTest(testing.TestCase):
    def test_keras_layer_checks(self):
        for policy, dtype in POLICIES.items():
            for shape in ((4,), (2, 3)):
                with self.subTest(policy=policy, shape=shape), float64():
                    self.run_layer_test(
                        Decision,
                        init_kwargs={"threshold": 2.5, "dtype": policy},
                        input_data=some_scores(*shape).astype(dtype),
                        expected_output_shape=shape,
                        expected_output_dtype="int32",
                        expected_num_trainable_weights=0,
                        expected_num_non_trainable_weights=0,
                        supports_masking=True,
                        run_training_check=False,
                    )

    def test_keras_layer_checks_of_sets(self):
        for policy, dtype in POLICIES.items():
            with self.subTest(policy=policy), float64():
                self.run_layer_test(
                    LabelSet,
                    init_kwargs={"threshold": 2.5, "dtype": policy},
                    input_data=some_scores(2, 3).astype(dtype),
                    expected_output_shape=(2, 3, 5),
                    expected_output_dtype="bool",
                    expected_num_trainable_weights=0,
                    expected_num_non_trainable_weights=0,
                    supports_masking=True,
                    run_training_check=False,
                )


@pytest.mark.parametrize("shape", [(1000,), (4, 50), (2, 3, 4)])
def test_without_a_threshold_the_model_decides_by_itself(shape):
    scores = some_scores(*shape)
    labels = to_numpy(Decision()(scores))
    expected = keras_halo.decode_predictions(scores).labels
    np.testing.assert_array_equal(labels, expected)
    assert 0.0 < np.mean(labels == -1) < 1.0
    assert len(np.unique(labels)) == 6 or labels.size < 100


@pytest.mark.parametrize("method", OOD_METHODS)
def test_a_threshold_takes_the_place_of_the_models_own(method):
    scores = some_scores(1000, seed=1)
    judged = ood_score(scores, method)
    # As rules place it: other lengths of arrays may be rounded otherwise.
    threshold = bounds.threshold_above(float(np.sort(judged)[700]), judged)
    labels = to_numpy(Decision(threshold, method)(scores))
    expected = np.where(
        judged <= threshold, np.argmax(scores[:, :5], axis=-1), -1
    )
    np.testing.assert_array_equal(labels, expected)
    assert (labels >= 0).sum() == 701
    own = keras_halo.decode_predictions(scores).labels
    assert (labels[own == -1] >= 0).any()


def test_a_threshold_between_two_numbers_of_float32_is_kept():
    # Rounded to the nearest, these thresholds would accept one score more, or
    # reach infinity.
    ones = np.ones(3, "float32")
    below, at, above = np.nextafter(ones, [-9, 1, 9], dtype="float32")
    scores = some_scores(3)
    ood = ops.convert_to_tensor([below, at, above])
    for threshold, accepted in (
        (float(at), [True, True, False]),
        (np.nextafter(float(at), -np.inf), [True, False, False]),
        (np.nextafter(float(above), -np.inf), [True, True, False]),
        (1e300, [True, True, True]),
        (-1e300, [False, False, False]),
    ):
        layer = Decision(threshold, method=None)
        labels = to_numpy(layer(scores, ood))
        assert (labels >= 0).tolist() == accepted, threshold
        again = Decision.from_config(layer.get_config())
        assert again.threshold == threshold
    assert rounded_down(1e300, "float32") == np.finfo("float32").max
    assert rounded_down(0.1, "float64") == 0.1


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_a_mixed_precision_model_decides_in_float32(policy):
    scores = some_scores(200)
    threshold = float(np.median(ood_score(scores)))
    expected = to_numpy(Decision(threshold)(scores))
    keras.config.set_dtype_policy(policy)
    layer = Decision(threshold)
    assert layer.head_dtype == "float32"
    np.testing.assert_array_equal(to_numpy(layer(scores)), expected)


def test_masks_are_passed_on():
    tokens = np.array([[1, 2, 0], [3, 0, 0]])
    inputs = keras.Input((None,), dtype="int32")
    embedded = keras.layers.Embedding(9, 8, mask_zero=True)(inputs)
    scores = keras_halo.HALODense(3)(embedded)
    outputs = [
        Decision(4.0)(scores),
        Decision(4.0, method=None)(scores, OODScore()(scores)),
    ]
    for labels in keras.Model(inputs, outputs)(tokens):
        mask = to_numpy(labels._keras_mask)
        np.testing.assert_array_equal(mask, tokens != 0)


def test_nan_is_rejected():
    scores = some_scores(8, spread=3.0)
    accepted = to_numpy(Decision(1e9)(scores))
    assert (accepted >= 0).all()
    scores[3] = np.nan
    for layer in (Decision(1e9), Decision()):
        assert to_numpy(layer(scores))[3] == -1
    judged = np.array([0.0, np.nan] * 4, "float32")
    labels = to_numpy(Decision(1.0, method=None)(scores, judged))
    assert (labels[1::2] == -1).all() and (labels[:2:8] >= 0).all()


RULES = {
    "coverage": lambda: CoverageRule(0.95),
    "nearest": lambda: CoverageRule(0.95, "nearest"),
    "outliers": lambda: FalsePositiveRateRule(0.9),
    "by class": lambda: GroupwiseRule(CoverageRule(0.8)),
    "sets": lambda: LabelSetRule(0.95),
    "fitted": lambda: CoverageRule(0.95, "fitted"),
}


@pytest.mark.filterwarnings("ignore:.*rows hold NaN or infinite")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", RULES)
def test_rows_that_are_not_finite_are_rejected_alike_everywhere(name, value):
    scores = some_scores(200, spread=3.0)
    rule = RULES[name]()
    labels = {"labels": scores[:, :5].argmax(-1)} if name == "sets" else {}

    def output(scores, ood):
        return {"scores": scores, "ood": ood} if name == "fitted" else scores

    ood = np.linspace(0.0, 1.0, 200, dtype="float32")
    rule.fit(output(scores, ood), **labels)
    kept = rule.predict(output(scores, ood)).accepted
    row = np.flatnonzero(kept & (to_numpy(Decision()(scores)) >= 0))[0]
    columns = scores.shape[-1]
    for column in range(columns + (name == "fitted")):
        bad, bad_ood = scores.copy(), ood.copy()
        if column < columns:
            bad[row, column] = value
            plain = Decision(1e9, method=None)(bad, np.zeros(200, "float32"))
            for found in (Decision()(bad), plain):
                assert to_numpy(found)[row] == -1
            assert keras_halo.decode_predictions(bad).labels[row] == -1
        else:
            bad_ood[row] = value
        bad = output(bad, bad_ood)
        expected = rule.predict(bad)
        assert expected.labels[row] == -1
        found = to_numpy(rule.to_layer()(bad))
        answers = Guard(rule.certificate())(bad)
        answers = {key: to_numpy(v) for key, v in answers.items()}
        if name == "sets":
            assert not found[row].any()
            np.testing.assert_array_equal(found, expected.members)
            np.testing.assert_array_equal(found, answers["label_set"])
        else:
            np.testing.assert_array_equal(found, expected.labels)
        np.testing.assert_array_equal(answers["label"], expected.labels)
        np.testing.assert_array_equal(
            np.isnan(answers["score"]), np.isnan(expected.scores)
        )
        if "p_value" in answers:
            lowest = 1.0 / (rule.learned.calibration.samples + 1.0)
            assert answers["p_value"][row] == pytest.approx(lowest)


@pytest.mark.slow
def test_in_a_model_that_is_saved_and_loaded(tmp_path):
    rng = np.random.default_rng(3)
    inputs = keras.Input((6,))
    embeddings = keras.layers.Dense(8)(inputs)
    scores = keras_halo.HALODense(4)(embeddings)
    gaussians = ClassGaussians(4)
    ood = gaussians(embeddings, scores)
    x = rng.normal(size=(300, 6)).astype("float32")
    y = rng.integers(0, 4, 300)
    gaussians.adapt(
        keras.Model(inputs, embeddings).predict(x, verbose=0), labels=y
    )
    model = keras.Model(inputs, {"scores": scores, "ood": ood})
    before = model.predict(x, verbose=0)
    threshold = float(np.median(before["ood"])) + 1e-3
    deployed = keras.Model(
        inputs,
        {
            "own": Decision()(scores),
            "label": Decision(threshold, None)(scores, ood),
        },
    )
    expected = np.where(
        before["ood"] <= threshold, np.argmax(before["scores"][:, :4], -1), -1
    )
    deployed.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for model in (deployed, loaded):
        labels = model.predict(x, verbose=0)
        assert labels["label"].dtype == "int32"
        np.testing.assert_array_equal(labels["label"], expected)
        np.testing.assert_array_equal(
            labels["own"],
            keras_halo.decode_predictions(before["scores"]).labels,
        )


@pytest.mark.parametrize("threshold", [np.nan, np.inf, "0.5", True, [1.0]])
def test_thresholds_that_are_no_numbers_are_refused(threshold):
    with pytest.raises(ValueError, match="`threshold` must be a finite"):
        Decision(threshold)


@pytest.mark.parametrize("value", [np.nan, np.inf, "0.5", True, None, 10**400])
def test_a_list_of_thresholds_says_which_is_none(value):
    with pytest.raises(ValueError, match=r"`threshold\[1\]` must be a finite"):
        Decision([0.5, value])


def test_what_does_not_fit_is_refused():
    scores = some_scores(4)
    with pytest.raises(ValueError, match="`method` must be one of"):
        Decision(1.0, "softmax")
    with pytest.raises(ValueError, match="threshold=None. Give one"):
        Decision(method=None)
    with pytest.raises(ValueError, match="at least 8 columns"):
        Decision()(np.zeros((2, 5), "float32"))
    with pytest.raises(ValueError, match=r"no score.*decision\(scores, ood\)"):
        Decision(1.0, None)(scores)
    with pytest.raises(ValueError, match="and a score. Leave one"):
        Decision(1.0)(scores, np.zeros(4, "float32"))
    with pytest.raises(ValueError, match=r"Expected the shape \(4,\)"):
        Decision(1.0, None)(scores, np.zeros((4, 1), "float32"))
    with pytest.raises(ValueError, match=r"Expected the shape \(4,\)"):
        Decision(1.0, None)(scores, np.zeros(5, "float32"))
    with pytest.raises(ValueError, match=r"Expected the shape"):
        Decision(1.0, None)(
            keras.KerasTensor((None, 9)), keras.KerasTensor((None, 1))
        )


@pytest.fixture(scope="module")
def fitted_model():
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    y = np.arange(300) % 3
    x = (3.0 * np.eye(3)[y] + rng.normal(size=(300, 3))).astype("float32")
    model = keras.Sequential([keras.Input((3,)), keras_halo.HALODense(3)])
    model.compile("adam", keras_halo.HALOLoss())
    model.fit(x, y, epochs=2, verbose=0)
    return keras_halo.fit_class_gaussians(model, x, y, verbose=0), x, y


def test_the_output_of_a_fitted_model_is_taken_everywhere(
    fitted_model, tmp_path
):
    model, x, y = fitted_model
    output = model.predict(x, verbose=0)
    np.testing.assert_array_equal(
        keras_halo.decode_predictions(output).labels,
        keras_halo.decode_predictions(output["scores"]).labels,
    )
    np.testing.assert_array_equal(
        keras_halo.ood_score(output, "fitted"), output["ood"]
    )
    np.testing.assert_array_equal(
        keras_halo.ood_score(output), keras_halo.ood_score(output["scores"])
    )
    with pytest.raises(ValueError, match="'fitted' needs a dictionary"):
        keras_halo.ood_score(output["scores"], "fitted")
    by_fitted = keras_halo.rejection.CoverageRule(0.9, "fitted").fit(output, y)
    assert by_fitted.threshold >= np.quantile(output["ood"], 0.9)
    decisions = by_fitted.predict(output)
    # The labels of the classes are not lost.
    np.testing.assert_array_equal(
        decisions.labels[decisions.accepted],
        output["scores"][:, :3].argmax(axis=-1)[decisions.accepted],
    )
    by_fitted.save(tmp_path / "rule.json")
    loaded = keras_halo.rejection.load_rule(tmp_path / "rule.json")
    assert loaded.method == "fitted"
    by_scores = keras_halo.rejection.CoverageRule(0.9).fit(output, y)
    assert by_scores.threshold == (
        keras_halo.rejection.CoverageRule(0.9)
        .fit(output["scores"], y)
        .threshold
    )


@pytest.mark.slow
def test_a_rule_on_the_fitted_score_is_deployed_with_the_model(
    fitted_model, tmp_path
):
    model, x, _ = fitted_model
    rule = keras_halo.rejection.CoverageRule(0.9, "fitted")
    rule.fit(model.predict(x, verbose=0))
    deployed = keras.Model(model.inputs, rule.to_layer()(model.output))
    deployed.save(tmp_path / "deployed.keras")
    deployed = keras.saving.load_model(tmp_path / "deployed.keras")
    far = np.concatenate([x, 50.0 * np.eye(3, dtype="float32")])
    labels = rule.predict(model.predict(far, verbose=0)).labels
    np.testing.assert_array_equal(deployed.predict(far, verbose=0), labels)


def test_a_layer_on_the_fitted_score_asks_for_its_dictionary(fitted_model):
    model, x, _ = fitted_model
    output = model.predict(x, verbose=0)
    layer = keras_halo.layers.Decision(1.0, "fitted")
    with pytest.raises(ValueError, match="takes a dictionary"):
        layer(output["scores"])


def dictionary_readers():
    layers = keras_halo.layers
    return {
        "own decision": layers.Decision(),
        "decision": layers.Decision(1.0, "nearest"),
        "score": layers.OODScore(),
        "softmax": keras_halo.HALOSoftmax(),
    }


@pytest.mark.parametrize("name", sorted(dictionary_readers()))
def test_layers_of_packed_scores_read_the_dictionary_of_a_fitted_model(
    fitted_model, name
):
    model, x, _ = fitted_model
    output = model.predict(x, verbose=0)
    layer = dictionary_readers()[name]
    from_dictionary = ops.convert_to_numpy(layer(output))
    np.testing.assert_array_equal(
        from_dictionary, ops.convert_to_numpy(layer(output["scores"]))
    )
    joined = keras.Model(model.inputs, dictionary_readers()[name](model.output))
    np.testing.assert_allclose(
        joined.predict(x, verbose=0), from_dictionary, atol=1e-4
    )


def test_the_fitted_score_alone_is_an_output_of_a_model(fitted_model, tmp_path):
    model, x, _ = fitted_model
    layer = keras_halo.layers.OODScore("fitted")
    alone = keras.Model(model.inputs, layer(model.output))
    alone.save(tmp_path / "score.keras")
    loaded = keras.saving.load_model(tmp_path / "score.keras")
    output = model.predict(x, verbose=0)
    np.testing.assert_allclose(
        loaded.predict(x, verbose=0), output["ood"], rtol=1e-5, atol=1e-4
    )
    for other in (output["scores"], {"scores": output["scores"]}):
        with pytest.raises(ValueError, match="'fitted' needs a dictionary"):
            keras_halo.layers.OODScore("fitted")(other)


def test_a_rule_on_a_score_of_the_head_guards_a_fitted_model(
    fitted_model, tmp_path
):
    model, x, _ = fitted_model
    output = model.predict(x, verbose=0)
    rule = keras_halo.rejection.CoverageRule(0.9).fit(output)
    guarded = keras_halo.guard(model, rule)
    guarded.save(tmp_path / "guarded.keras")
    guarded = keras.saving.load_model(tmp_path / "guarded.keras")
    np.testing.assert_array_equal(
        guarded.predict(x, verbose=0)["label"], rule.predict(output).labels
    )


@pytest.mark.parametrize(
    "metric",
    ["AbstentionRate", "SelectiveAccuracy", "ExpectedCalibrationError"],
)
def test_metrics_and_losses_read_the_dictionary_of_a_fitted_model(
    fitted_model, metric
):
    model, x, y = fitted_model
    output = model.predict(x, verbose=0)
    tensors = {k: ops.convert_to_tensor(v) for k, v in output.items()}
    found = []
    for y_pred in (output["scores"], output, tensors):
        reader = getattr(keras_halo.metrics, metric)()
        reader.update_state(y, y_pred)
        loss = float(keras_halo.HALOLoss()(y, y_pred))
        found.append((float(reader.result()), loss))
    np.testing.assert_allclose(found, [found[0]] * 3, rtol=1e-6)
    with pytest.raises(ValueError, match="packed scores"):
        getattr(keras_halo.metrics, metric)().update_state(y, {"ood": x})
