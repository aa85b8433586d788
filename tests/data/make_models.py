"""Saves what later releases have to load: run once a release and a backend.

    KERAS_BACKEND=jax python make_models.py

writes, beside this script, models saved on that backend, a rule fitted on
their predictions, and what they predicted. Files of a release that is out are
never written again.
"""

import pathlib

import keras
import numpy as np

import keras_halo
from keras_halo import HALODense, HALOLoss

FOLDER = pathlib.Path(__file__).parent


def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(48, 4)).astype("float32")
    return x, np.argmax(x[:, :3], axis=-1)


def main():
    keras.utils.set_random_seed(0)
    x, y = data()
    classifier = keras.Sequential(
        [
            keras.layers.Input((4,)),
            keras.layers.Dense(3),
            HALODense(3, label_smoothing=0.05, centroid_regularizer="l2"),
        ]
    )
    classifier.compile(
        keras.optimizers.SGD(0.05, momentum=0.9),
        HALOLoss(label_smoothing=0.05),
        metrics=["accuracy"],
    )
    classifier.fit(x, y, batch_size=16, epochs=2, shuffle=False, verbose=0)
    fitted = keras_halo.fit_class_gaussians(classifier, x, y, verbose=0)
    scores = classifier.predict(x, verbose=0)
    rule = keras_halo.rejection.CoverageRule(coverage=0.8)
    rule.fit(scores)

    name = f"{keras_halo.__version__}-{keras.backend.backend()}"
    classifier.save(FOLDER / f"classifier-{name}.keras")
    fitted.save(FOLDER / f"gaussians-{name}.keras")
    rule.save(FOLDER / f"rule-{name}.json")
    np.savez_compressed(
        FOLDER / f"predictions-{name}.npz",
        scores=scores,
        ood=fitted.predict(x, verbose=0)["ood"],
        accepted=rule.predict(scores).accepted,
        next_losses=[
            float(classifier.train_on_batch(x, y)[0]) for _ in range(3)
        ],
    )


if __name__ == "__main__":
    main()
