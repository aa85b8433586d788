"""Saves models on one backend, or loads those that any backend has saved.

    KERAS_BACKEND=jax python tests/scripts/exchanged.py FOLDER save
    KERAS_BACKEND=torch python tests/scripts/exchanged.py FOLDER load jax

The first writes models, a rule and predictions to `FOLDER/jax`; the second
writes what torch predicts with them to `FOLDER/jax-on-torch.npz`.
"""

import pathlib
import sys

import keras
import numpy as np

import keras_halo
from keras_halo import (
    HALOContrastiveLoss,
    HALODense,
    HALOLoss,
    HALOSimilarity,
    HALOSoftmax,
)

BACKEND = keras.backend.backend()


def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(48, 4)).astype("float32")
    return x, np.argmax(x[:, :3], axis=-1)


def trained_classifier():
    model = keras.Sequential(
        [
            keras.layers.Input((4,)),
            keras.layers.Dense(6, activation="relu"),
            keras.layers.BatchNormalization(),
            HALODense.reference(
                3, label_smoothing=0.05, centroid_regularizer="l2"
            ),
        ]
    )
    model.compile("adam", HALOLoss(label_smoothing=0.05), metrics=["accuracy"])
    model.fit(*data(), epochs=2, verbose=0)
    return model


def trained_towers():
    towers = [keras.layers.Input((4,)) for _ in range(2)]
    scores = HALOSimilarity(bidirectional=True)(
        [keras.layers.Dense(6)(tower) for tower in towers]
    )
    model = keras.Model(towers, scores)
    model.compile("adam", HALOContrastiveLoss())
    x, _ = data()
    model.fit([x, 2.0 * x], np.arange(len(x)), epochs=2, verbose=0)
    return model


def probabilities_of(classifier):
    # Of its layers: a compiled model inside another takes its optimizer with
    # it, and `compile=False` leaves that out only of the outer one.
    return keras.Sequential([*classifier.layers, HALOSoftmax(abstain=True)])


def save(folder):
    folder = folder / BACKEND
    folder.mkdir()
    x, y = data()
    classifier = trained_classifier()
    models = {
        "classifier": classifier,
        "gaussians": keras_halo.fit_class_gaussians(
            classifier, x, y, verbose=0
        ),
        "probabilities": probabilities_of(classifier),
        "towers": trained_towers(),
    }
    for name, model in models.items():
        model.save(folder / f"{name}.keras")
    rule = keras_halo.rejection.CoverageRule(coverage=0.8)
    scores = classifier.predict(x, verbose=0)
    rule.fit(scores)
    rule.save(folder / "rule.json")
    predict(models, rule, folder / "predictions.npz", scores)


def load(folder, saved_by):
    saved = folder / saved_by
    # What `compile` was told is of the backend that was told.
    models = {
        path.stem: keras.saving.load_model(path, compile=saved_by == BACKEND)
        for path in saved.glob("*.keras")
    }
    rule = keras_halo.rejection.load_rule(saved / "rule.json")
    with np.load(saved / "predictions.npz") as arrays:
        scores = arrays["scores"]
    predict(models, rule, folder / f"{saved_by}-on-{BACKEND}.npz", scores)


def predict(models, rule, path, scores):
    x, _ = data()
    # In one batch: the keys of a query are those of its batch.
    inputs = {name: x for name in models} | {"towers": [x, 2.0 * x]}
    found = {
        name: model.predict(inputs[name], batch_size=len(x), verbose=0)
        for name, model in models.items()
    }
    np.savez(
        path,
        **{name: found[name] for name in found if name != "gaussians"},
        # A dictionary: scores, and how far out an input is.
        **{f"gaussians_{k}": v for k, v in found["gaussians"].items()},
        # The threshold is one of these scores: of others the last bit decides.
        scores=scores,
        accepted=rule.predict(scores).accepted,
    )


def main(folder, action, *saved_by):
    keras.utils.set_random_seed(0)
    {"save": save, "load": load}[action](pathlib.Path(folder), *saved_by)


if __name__ == "__main__":
    main(*sys.argv[1:])
