"""What is done with a whole model, once on every backend.

Each step has tests of its own, which are marked `slow` and run on PyTorch
alone by default.
"""

import pathlib
import runpy

import keras
import numpy as np
import pytest
from digits import known_and_unknown

import keras_halo
from keras_halo import HALODense, HALOLoss, metrics

EXAMPLE = pathlib.Path(__file__).parents[1] / "examples/abstention_workflow.py"


@pytest.mark.skipif(not EXAMPLE.exists(), reason="the examples are not here")
def test_from_a_trained_classifier_to_decisions_on_record(
    tmp_path, monkeypatch
):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    monkeypatch.chdir(tmp_path)
    made = runpy.run_path(str(EXAMPLE))
    x, y, new = made["x"], made["y"], made["new"]

    # As accurate as the classifier that it was made of.
    before = made["model"].predict(x[new], verbose=0).argmax(axis=-1)
    scores = made["abstaining"].predict(x[new], verbose=0)
    given = np.mean(before == y[new])
    assert np.mean(scores[:, :8].argmax(axis=-1) == y[new]) >= given - 0.01
    assert given > 0.9

    # The guarantee holds, and what is unknown is found out.
    answers = made["guarded"].predict(x[new], verbose=0)
    assert np.mean(answers["label"] >= 0) >= 0.9
    unknown = made["guarded"].predict(x[made["unknown"]], verbose=0)
    assert metrics.auroc(answers["score"], unknown["score"]) > 0.9
    rejected = [np.mean(labels < 0) for labels in made["labels"]]
    assert np.mean(rejected[12:]) > np.mean(rejected[:12]) + 0.2
    assert not made["statuses"][11].alarm
    assert made["statuses"][-1].alarm
    assert (tmp_path / "abstention_workflow.png").stat().st_size > 10_000

    # The file answers for itself.
    folder = pathlib.Path(made["folder"])
    report = keras_halo.replay(
        folder / "decisions.jsonl",
        keras.saving.load_model(folder / "digits.keras"),
        x,
    )
    assert report.same
    assert report.decisions == sum(map(len, made["labels"]))
    certificate = keras_halo.read_certificate(folder / "digits.keras")
    assert certificate["guarantee"] in made["card"].to_markdown()


def make_model(**given):
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(32, activation="relu"),
            HALODense(5),
        ]
    )
    model.compile(keras.optimizers.Adam(5e-3), HALOLoss())
    return model


def test_a_head_trained_calibrated_converted_fitted_and_in_scikit_learn():
    x, y, x_unknown = known_and_unknown()
    x, x_unknown = (images.reshape(-1, 64) for images in (x, x_unknown))
    train, held, test = slice(500), slice(500, 700), slice(700, None)
    keras.utils.set_random_seed(0)
    classifier = keras_halo.SKLearnClassifier(
        make_model, fit_kwargs={"epochs": 15, "verbose": 0}
    ).fit(x[train], y[train])
    assert classifier.score(x[test], y[test]) > 0.9
    model = classifier.model_
    weights = model.get_weights()

    def report():
        return keras_halo.evaluate_ood(
            model, (x[test], y[test]), {"5 to 9": x_unknown}, verbose=0
        ).known

    first = report()
    calibration = keras_halo.calibrate(model, x[held], y[held], verbose=0)
    assert report().accuracy_forced == first.accuracy_forced
    assert report().nll_renormalized != first.nll_renormalized
    calibration.undo()
    assert report().nll_renormalized == first.nll_renormalized

    fitted = keras_halo.fit_class_gaussians(
        model, x[train], y[train], verbose=0
    )
    for source, method in ((model, "abstain"), (fitted, "fitted")):
        known, unknown = (
            keras_halo.ood_score(source.predict(data, verbose=0), method)
            for data in (x[test], x_unknown)
        )
        assert metrics.auroc(known, unknown) > 0.8

    converted = keras_halo.convert_head(model, x[train], y[train], verbose=0)
    labels = converted.predict(x[test], verbose=0)[:, :5].argmax(axis=-1)
    assert np.mean(labels == y[test]) > 0.9
    for before, after in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)
