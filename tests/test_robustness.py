"""Training under settings nobody recommends; threads; the same run twice."""

import concurrent.futures
import dataclasses
import threading

import keras
import numpy as np
import pytest
from cases import THOROUGH, passed
from helpers import to_numpy

import keras_halo
from keras_halo import HALODense, HALOLoss

BACKEND = keras.backend.backend()
NUM_CLASSES = 4


@dataclasses.dataclass(frozen=True)
class Setting:
    optimizer: str = "Adam"
    learning_rate: float = 1e-2
    scale: float = 1.0
    noise: float = 0.0
    labels: str = "all"
    batch_size: int | None = None
    distill: bool = True

    @property
    def clipped(self):
        """Whether gradients have to be clipped: plain SGD in large steps.

        The radial term is a squared distance. Like any squared error it
        diverges where learning rate times curvature exceeds two; cross-entropy
        is linear far out and does not. Optimizers that normalize their steps
        need no clipping.
        """
        large_rate = 0.1 if self.batch_size == 1 else 1.0
        return self.optimizer == "SGD" and (
            self.learning_rate >= large_rate or self.scale >= 30.0
        )

    def __str__(self):
        told = [f"{self.optimizer} {self.learning_rate:g}"]
        if self.scale != 1.0:
            told.append(f"initial scale {self.scale:g}")
        if self.noise:
            told.append(f"noise {self.noise:.0%}")
        if self.labels != "all":
            told.append(f"{self.labels} class")
        if self.batch_size == 1:
            told.append("batch of one")
        if not self.distill:
            told.append("plain targets")
        if self.clipped:
            told.append("clipped")
        return ", ".join(told)


RATES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
OPTIMIZERS = ("SGD", "Adam", "AdamW", "Muon")

QUICK = [
    Setting("SGD", 1.0),
    Setting("Adam", 1.0),
    Setting("SGD", 1e-2, scale=100.0),
    Setting(noise=1.0),
    Setting(labels="rare"),
    Setting("SGD", 1.0, batch_size=1),
]

SETTINGS = QUICK
if THOROUGH:
    SETTINGS = [
        *(Setting(name, rate) for name in OPTIMIZERS for rate in RATES),
        *(
            Setting(name, scale=scale)
            for name in ("SGD", "Adam")
            for scale in (0.01, 0.1, 10.0, 30.0, 100.0)
        ),
        *(
            Setting(noise=noise, distill=distill)
            for noise in (0.0, 0.25, 0.5, 0.75, 1.0)
            for distill in (True, False)
            if noise or not distill
        ),
        *(
            Setting(name, labels=labels)
            for name in ("SGD", "Adam")
            for labels in ("missing", "rare")
        ),
        *(
            Setting(name, rate, batch_size=1)
            for name, rate in (
                *(("SGD", 0.1), ("SGD", 1.0), ("Adam", 0.01), ("Adam", 1.0)),
                *(("AdamW", 0.01), ("Muon", 0.01), ("Muon", 1.0)),
            )
        ),
    ]


def data(setting):
    """Inputs and labels that can be learned, but for what the setting says."""
    rng = np.random.default_rng(0)
    count = 20_001 if setting.labels == "rare" else 128
    x = rng.normal(size=(count, 8)).astype("float32")
    y = np.argmax(x[:, :NUM_CLASSES], axis=-1)
    if setting.labels != "all":
        y[y == NUM_CLASSES - 1] = 0
    if setting.labels == "rare":
        # Two classes of 10,000 samples, and one sample of the last.
        y = np.arange(count) % 2
        y[7] = NUM_CLASSES - 1
    wrong = rng.random(count) < setting.noise
    return x, np.where(wrong, rng.integers(0, NUM_CLASSES, count), y)


def train(setting, head, loss):
    """Losses of the steps, and weights at the end."""
    keras.utils.set_random_seed(0)
    x, y = data(setting)
    model = keras.Sequential(
        [
            keras.layers.Input((8,)),
            keras.layers.Dense(16, activation="relu"),
            keras.layers.Dense(6),
            head,
        ]
    )
    for variable in model.trainable_variables:
        if len(variable.shape) == 2:
            variable.assign(variable * setting.scale)
    optimizer = getattr(keras.optimizers, setting.optimizer)(
        learning_rate=setting.learning_rate,
        global_clipnorm=1.0 if setting.clipped else None,
    )
    model.compile(optimizer, loss)
    losses = []
    one_by_one = setting.batch_size == 1
    model.fit(
        x,
        y,
        batch_size=1 if one_by_one else len(x) // 4,
        epochs=1 if one_by_one else 5,
        verbose=0,
        callbacks=[
            keras.callbacks.LambdaCallback(
                on_train_batch_end=lambda _, logs: losses.append(logs["loss"])
            )
        ],
    )
    return losses, [to_numpy(variable) for variable in model.variables], model


def is_finite(losses, weights, _):
    return all(np.all(np.isfinite(array)) for array in [losses, *weights])


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_no_nan_where_cross_entropy_has_none(setting):
    if not hasattr(keras.optimizers, setting.optimizer):
        pytest.skip(f"this Keras has no {setting.optimizer}")
    result = train(
        setting, HALODense(NUM_CLASSES), HALOLoss(distill=setting.distill)
    )
    if not is_finite(*result):
        baseline = train(
            setting,
            keras.layers.Dense(NUM_CLASSES),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        assert not is_finite(*baseline), f"diverged: {setting}"
    else:
        if setting.clipped and setting.scale == 1.0 and not setting.batch_size:
            # Clipping does not only hide the trouble. The first loss of a
            # batch of one is that of a single sample and compares to nothing.
            assert result[0][-1] < result[0][0]
        # Its answers are answers still, and a threshold can be set on them.
        x, _ = data(setting)
        scores = result[2].predict(x[:64], verbose=0)
        assert np.all(np.isfinite(keras_halo.ood_score(scores)))
        assert np.all(
            np.isfinite(keras_halo.decode_predictions(scores).probabilities)
        )
    passed["trainings without a NaN of their own"] += 1


def small_model():
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            keras.layers.Input((8,)),
            keras.layers.Dense(16, activation="relu"),
            keras.layers.Dense(6),
            HALODense(NUM_CLASSES),
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize("way", ["call", "predict in turn", "predict"])
def test_answers_from_several_threads_are_those_of_one(way):
    if way == "predict" and BACKEND == "jax":
        pytest.skip(
            "on JAX Keras empties the model's weights while it predicts"
        )
    model = small_model()
    rng = np.random.default_rng(0)
    count = 64 if THOROUGH else 16
    batches = rng.normal(size=(count, 16, 8)).astype("float32")
    turn = threading.Lock()

    def answer(batch):
        if way == "call":
            return to_numpy(model(batch))
        if way == "predict":
            return model.predict(batch, verbose=0)
        with turn:
            return model.predict(batch, verbose=0)

    expected = [answer(batch) for batch in batches]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for _ in range(10 if THOROUGH else 1):
            found = pool.map(answer, batches)
            for one, other in zip(found, expected, strict=True):
                np.testing.assert_array_equal(one, other)
                passed["answers from eight threads"] += 1


@pytest.mark.slow
def test_scores_from_several_threads_are_those_of_one():
    model = small_model()
    rng = np.random.default_rng(1)
    scores = model.predict(rng.normal(size=(512, 8)), verbose=0)
    batches = np.split(scores, 32)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for method in keras_halo.OOD_METHODS:
            found = pool.map(
                lambda b, m=method: keras_halo.ood_score(b, m), batches
            )
            for one, batch in zip(found, batches, strict=True):
                np.testing.assert_array_equal(
                    one, keras_halo.ood_score(batch, method)
                )


@pytest.fixture
def determinism():
    """The switch of each backend for the same result every time."""
    if BACKEND == "tensorflow":
        import tensorflow as tf
        from tensorflow.python.framework import config

        tf.config.experimental.enable_op_determinism()
        yield
        # Only TensorFlow itself has a way back.
        config.disable_op_determinism()
    elif BACKEND == "torch":
        import torch

        torch.use_deterministic_algorithms(True)
        yield
        torch.use_deterministic_algorithms(False)
    else:
        # XLA on a CPU needs no switch.
        yield


@pytest.mark.slow
@pytest.mark.parametrize("labels", ["integer", "one-hot", "blocks"])
def test_the_same_seed_gives_the_same_training_twice(labels, determinism):
    results = []
    for _ in range(2):
        keras.utils.set_random_seed(7)
        # Shuffled, with random weights and dropout.
        model = keras.Sequential(
            [
                keras.layers.Input((8,)),
                keras.layers.Dense(16, activation="relu"),
                keras.layers.Dropout(0.3),
                keras.layers.Dense(6),
                HALODense(NUM_CLASSES),
            ]
        )
        x, y = data(Setting())
        if labels == "one-hot":
            y = np.eye(NUM_CLASSES)[y]
        model.compile(
            "adam", HALOLoss(block_size=3 if labels == "blocks" else None)
        )
        history = model.fit(x, y, epochs=2, verbose=0).history["loss"]
        results.append([history, *map(to_numpy, model.variables)])
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)
