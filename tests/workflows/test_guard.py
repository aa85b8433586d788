"""A trained model, its rule and its guarantee in one file."""

import json
import zipfile

import keras
import numpy as np
import pytest
from digits import known_and_unknown
from helpers import to_numpy
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_halo
from keras_halo import HALODense, HALOLoss, rejection
from keras_halo.rejection import bounds

pytestmark = pytest.mark.slow

BATCH = 64


@pytest.fixture(scope="module")
def trained():
    """A small network of the digits 0 to 4, and data to calibrate and try."""
    keras.utils.set_random_seed(0)
    x, y, x_unknown = known_and_unknown()
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Flatten(),
            keras.layers.Dense(32, activation="relu"),
            HALODense(5),
        ]
    )
    model.compile(keras.optimizers.Adam(5e-3), HALOLoss())
    model.fit(x[:-400], y[:-400], batch_size=BATCH, epochs=8, verbose=0)
    new = np.concatenate([x[-200:], x_unknown[:200]])
    return model, (x[-400:-200], y[-400:-200]), new


def rules(model, calibration):
    x, y = calibration
    scores = model.predict(x, verbose=0)
    return {
        "coverage": rejection.CoverageRule(0.9).fit(scores, y),
        "with confidence": rejection.CoverageRule(0.8, delta=0.1).fit(scores),
        "conformal": rejection.ConformalRule(0.1, "joint").fit(scores),
        "risk": rejection.SelectiveRiskRule(0.2).fit(scores, y),
        "outliers": rejection.FalsePositiveRateRule(0.2).fit(
            # Half-way between two inputs, where some known ones are, too.
            model.predict((x + x[::-1]) / 2, verbose=0)
        ),
    }


def assert_as_the_rule(answers, rule, scores):
    expected = rule.predict(scores)
    np.testing.assert_array_equal(answers["label"], expected.labels)
    # A difference of logits, each of which has the rounding of its own size.
    np.testing.assert_allclose(
        answers["score"], expected.scores, rtol=1e-4, atol=2e-6
    )
    predictions = keras_halo.decode_predictions(scores)
    np.testing.assert_allclose(
        answers["probabilities"], predictions.probabilities, atol=1e-5
    )


@pytest.mark.parametrize(
    "name",
    ["coverage", "with confidence", "conformal", "risk", "outliers"],
)
def test_a_guarded_model_answers_as_its_rule(name, trained, tmp_path):
    model, calibration, new = trained
    rule = rules(model, calibration)[name]
    guarded = keras_halo.guard(model, rule)
    path = tmp_path / "guarded.keras"
    guarded.save(path)
    loaded = keras.models.load_model(path)
    scores = model.predict(new, verbose=0)
    for source in (guarded, loaded):
        answers = source.predict(new, verbose=0)
        assert_as_the_rule(answers, rule, scores)
        assert ("p_value" in answers) == (name != "outliers")
    assert 0 < np.mean(rule.predict(scores).labels == -1) < 1
    if name == "conformal":
        p = rule.p_values(scores)
        low = p < 0.3
        assert low.sum() > 0
        np.testing.assert_allclose(answers["p_value"][low], p[low], rtol=1e-6)
        assert (answers["p_value"] >= p - 1e-6).all()
        # The label and the p-value never contradict each other.
        rejected = answers["label"] == -1
        np.testing.assert_array_equal(rejected, answers["p_value"] <= 0.1)


def test_the_certificate_is_read_without_running_anything(trained, tmp_path):
    model, calibration, _ = trained
    rule = rules(model, calibration)["coverage"]
    guarded = keras_halo.guard(model, rule)
    path = tmp_path / "guarded.keras"
    guarded.save(path)
    rule.save(tmp_path / "rule.json")
    document = json.loads((tmp_path / "rule.json").read_text("utf-8"))
    for source in (guarded, path, str(path), keras.models.load_model(path)):
        certificate = keras_halo.read_certificate(source)
        assert certificate == document == rule.certificate()
    assert certificate["guarantee"] == rule.guarantee
    assert "unknown" in certificate["limits"]
    assert certificate["calibration"]["samples"] == 200

    # An edited certificate is noticed.
    edited = tmp_path / "edited.keras"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(edited, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "config.json":
                assert b"90 %" in content
                content = content.replace(b"90 %", b"99 %")
            new.writestr(name, content)
    with pytest.raises(ValueError, match="damaged or edited"):
        keras_halo.read_certificate(edited)


def test_the_given_model_stays_as_it_is(trained):
    model, calibration, _ = trained
    before = [to_numpy(weight).copy() for weight in model.weights]
    rule = rules(model, calibration)["coverage"]
    guarded = keras_halo.guard(model, rule)
    assert model.compiled and not guarded.compiled
    assert len(guarded.weights) == len(model.weights)
    for weight, old in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(to_numpy(weight), old)
    # Twice, for a stricter rule of the same model.
    assert keras_halo.guard(model, rule) is not guarded


def test_fitted_gaussians_are_guarded_alike(trained, tmp_path):
    model, (x, y), new = trained
    fitted = keras_halo.fit_class_gaussians(model, x, y, verbose=0)
    rule = rejection.CoverageRule(0.9, "fitted").fit(
        fitted.predict(x, verbose=0)
    )
    guarded = keras_halo.guard(fitted, rule)
    guarded.save(tmp_path / "guarded.keras")
    loaded = keras.models.load_model(tmp_path / "guarded.keras")
    output = fitted.predict(new, verbose=0)
    for source in (guarded, loaded):
        answers = source.predict(new, verbose=0)
        np.testing.assert_array_equal(
            answers["label"], rule.predict(output).labels
        )
        np.testing.assert_allclose(answers["score"], output["ood"], rtol=1e-4)


def test_every_token_gets_an_answer():
    model = keras.Sequential(
        [keras.Input((None, 6)), keras.layers.Dense(8), HALODense(3)]
    )
    x = np.random.default_rng(0).normal(size=(20, 7, 6))
    scores = model.predict(x, verbose=0)
    rule = rejection.CoverageRule(0.9).fit(scores)
    answers = keras_halo.guard(model, rule).predict(x, verbose=0)
    assert answers["label"].shape == answers["p_value"].shape == (20, 7)
    assert answers["probabilities"].shape == (20, 7, 3)
    assert_as_the_rule(answers, rule, scores)


def test_nothing_is_accepted_where_the_model_says_nan():
    model = keras.Sequential([keras.Input((4,)), HALODense(3)])
    x = np.random.default_rng(0).normal(size=(100, 4))
    rule = rejection.CoverageRule(0.9).fit(model.predict(x, verbose=0))
    x[3] = np.nan
    answers = keras_halo.guard(model, rule).predict(x[:10], verbose=0)
    assert answers["label"][3] == -1
    assert answers["p_value"][3] == pytest.approx(1 / 101)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_keeps_what_was_decided(policy):
    keras.config.set_dtype_policy(policy)
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(8), HALODense(3)]
    )
    x = np.random.default_rng(0).normal(size=(200, 4))
    scores = model.predict(x, verbose=0)
    rule = rejection.CoverageRule(0.8).fit(scores)
    answers = keras_halo.guard(model, rule).predict(x, verbose=0)
    assert answers["score"].dtype == "float32"
    assert_as_the_rule(answers, rule, scores)


def test_what_cannot_be_guarded_is_refused(trained):
    model, calibration, _ = trained
    scores = model.predict(calibration[0], verbose=0)
    plain = rejection.CoverageRule(0.9, method=None).fit(np.arange(50.0))
    batches = rejection.ConformalRule(0.1, fdr=True).fit(scores)
    other = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten()])
    other.add(HALODense(5))
    of_other = rejection.CoverageRule(0.9).fit(
        other.predict(calibration[0], verbose=0)
    )
    for rule, message in (
        (rejection.CoverageRule(0.9), "has not been fitted"),
        (plain, "method=None"),
        (batches, "the others in the batch"),
        (of_other, "from another model"),
        ("coverage", "must be a rule"),
    ):
        with pytest.raises(ValueError, match=message):
            keras_halo.guard(model, rule)
    rule = rejection.CoverageRule(0.9).fit(scores)
    softmax = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    with pytest.raises(ValueError, match="exactly one"):
        keras_halo.guard(softmax, rule)
    with pytest.raises(ValueError, match="0 guards"):
        keras_halo.read_certificate(model)


def test_a_file_that_is_no_guarded_model_is_refused(trained, tmp_path):
    model, _, _ = trained
    model.save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match="0 guards"):
        keras_halo.read_certificate(tmp_path / "model.keras")
    (tmp_path / "text.keras").write_text("no model")
    with pytest.raises(ValueError, match="no `.keras` file"):
        keras_halo.read_certificate(tmp_path / "text.keras")
    with pytest.raises(FileNotFoundError, match="no file"):
        keras_halo.read_certificate(tmp_path / "absent.keras")
    with pytest.raises(ValueError, match="must be a model or the path"):
        keras_halo.read_certificate(3)


@pytest.mark.any_backend
@settings(max_examples=60, deadline=None)
@given(
    scores=st.lists(
        st.one_of(st.integers(-5, 5).map(float), st.floats(-1e6, 1e6)),
        min_size=1,
        max_size=900,
    ),
    new=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50),
)
def test_a_table_of_ranks_never_makes_a_p_value_smaller(scores, new):
    scores = np.sort(scores)
    entries, counts = bounds.table_of_ranks(scores)
    assert counts.sum() == len(scores) and (counts > 0).all()
    assert len(entries) <= 256
    new = np.concatenate([new, scores])
    exact = bounds.conformal_p_values(new, scores)
    as_high = (entries >= new[:, None]) @ counts
    found = (1 + as_high) / (len(scores) + 1)
    assert (found >= exact).all()
    np.testing.assert_array_equal(found[exact <= 0.1], exact[exact <= 0.1])
    assert (found - exact).max() < 0.01


def guarded_model(trained):
    model, calibration, _ = trained
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    rule = rejection.CoverageRule(0.9)
    rule.fit(copy.predict(calibration[0], verbose=0), calibration[1])
    return copy, keras_halo.guard(copy, rule), rule


def test_a_head_that_has_changed_has_no_certificate(trained):
    calibration = trained[1]
    model, guarded, rule = guarded_model(trained)
    assert keras_halo.read_certificate(guarded) == rule.certificate()
    change = keras_halo.calibrate(model, *calibration, verbose=0)
    for read in (keras_halo.read_certificate, keras_halo.model_card):
        with pytest.raises(ValueError, match="has changed since its rule"):
            read(guarded)
    change.undo()
    assert keras_halo.read_certificate(guarded) == rule.certificate()


def test_a_guarded_model_is_no_model_to_train(trained):
    _, guarded, _ = guarded_model(trained)
    with pytest.raises(ValueError, match="training=True"):
        guarded(trained[2][:8], training=True)


def test_a_head_that_was_trained_without_statistics_is_noticed(trained):
    _, (x, y), new = trained
    model, _, rule = guarded_model(trained)
    head = model.layers[-1]
    # What a loop that leaves out `training=True` makes of it.
    head.evidence_count.assign(0.0)
    with pytest.warns(UserWarning, match="with `training=True`"):
        keras_halo.guard(model, rule)
    with pytest.warns(UserWarning, match="with `training=True`"):
        keras_halo.evaluate_ood(model, (x, y), {"new": new}, verbose=0)
