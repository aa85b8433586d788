"""Real training: against NumPy, through save and load, and to an accuracy."""

import warnings

import keras
import numpy as np
import pytest
from helpers import float64, naive_softmax, to_numpy
from keras import ops

import keras_halo
from keras_halo import HALODense, HALOLoss, HALOSoftmax
from keras_halo.ops import geometry


def _sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


class NumpyReference:
    """A linear embedding with a HALO head, trained in float64 by hand.

    Forward and backward are written from the design, with gradients derived
    on paper, and share no line with the package.
    """

    def __init__(self, kernel, centroids, raw_gamma, bias, smoothing, distill):
        self.kernel = kernel.astype("float64")
        self.centroids = centroids.astype("float64")
        self.raw_gamma = float(raw_gamma)
        self.bias = float(bias)
        self.smoothing = smoothing
        self.distill = distill

    def step(self, x, labels, learning_rate):
        x = x.astype("float64")
        batch, (num_classes, size) = len(x), self.centroids.shape
        gamma = np.logaddexp(self.raw_gamma, 0.0)
        c = self.centroids - self.centroids.mean(axis=0)
        e = x @ self.kernel
        difference = e[:, None] - c[None]
        radii = (difference**2).mean(axis=-1)
        norm = (e**2).mean(axis=-1, keepdims=True)
        z = np.append(
            gamma * (norm - radii), np.full((batch, 1), self.bias), axis=-1
        )
        p = naive_softmax(z)
        one_hot = np.eye(num_classes)[labels]
        if self.distill:
            t = np.where(one_hot > 0, 0.0, -gamma * radii / self.smoothing)
            q = naive_softmax(t)
        else:
            q = (1 - self.smoothing) * one_hot + self.smoothing / num_classes
        own = radii[np.arange(batch), labels]
        volume = 0.5 - 1.0 / size
        log_own = np.where(
            own > 1e-3, np.log(np.maximum(own, 1e-3)), own / 1e-3 - 7.907755279
        )
        loss = np.mean(
            -(q * np.log(p[:, :-1])).sum(axis=-1) + own / 2 - volume * log_own
        )
        # dH/dz = p - q with zero target for abstaining; the shift of the
        # logits by the norm is part of z, so both terms of s get a share.
        by_s = (p[:, :-1] - q) / batch
        by_own = (0.5 - volume / np.maximum(own, 1e-3)) / batch
        by_radii = -gamma * by_s + one_hot * by_own[:, None]
        by_norm = gamma * by_s.sum(axis=-1, keepdims=True)
        by_difference = by_radii[..., None] * 2.0 * difference / size
        by_e = by_difference.sum(axis=1) + by_norm * 2.0 * e / size
        by_c = -by_difference.sum(axis=0)
        by_gamma = (by_s * (norm - radii)).sum()
        self.kernel -= learning_rate * (x.T @ by_e)
        self.centroids -= learning_rate * (by_c - by_c.mean(axis=0))
        self.raw_gamma -= learning_rate * by_gamma * _sigmoid(self.raw_gamma)
        return loss


@pytest.mark.slow
@pytest.mark.parametrize("distill", [True, False])
def test_five_epochs_of_full_batch_sgd_follow_the_same_losses(distill):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 12)).astype("float32")
    y = rng.integers(0, 4, size=40)
    model = keras.Sequential(
        [
            keras.layers.Input((12,)),
            keras.layers.Dense(6, use_bias=False),
            HALODense.reference(4),
        ]
    )
    kernel = rng.normal(size=(12, 6)).astype("float32") / np.sqrt(12)
    centroids = rng.normal(size=(4, 6)).astype("float32")
    dense, head = model.layers
    dense.kernel.assign(kernel)
    head.centroids.assign(centroids)
    reference = NumpyReference(
        kernel,
        centroids,
        geometry.inverse_softplus(geometry.initial_temperature(6)),
        geometry.abstain_bias(6, 4, 0.1),
        smoothing=0.1,
        distill=distill,
    )
    model.compile(keras.optimizers.SGD(0.05), HALOLoss(distill=distill))
    history = model.fit(x, y, batch_size=40, epochs=5, shuffle=False, verbose=0)
    expected = [reference.step(x, y, 0.05) for _ in range(5)]
    assert expected[4] < expected[0]
    np.testing.assert_allclose(history.history["loss"], expected, rtol=1e-4)
    np.testing.assert_allclose(
        to_numpy(head.centroids), reference.centroids, rtol=1e-3, atol=1e-4
    )
    np.testing.assert_allclose(
        to_numpy(head.temperature),
        np.logaddexp(0.0, reference.raw_gamma),
        rtol=1e-4,
    )


@pytest.fixture(scope="module")
def digits():
    datasets = pytest.importorskip("sklearn.datasets")
    data = datasets.load_digits()
    return data.data.astype("float32") / 16.0, data.target


def _classifier(units=10, **kwargs):
    return keras.Sequential(
        [
            keras.layers.Input((64,)),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(16),
            HALODense(units, **kwargs),
        ]
    )


def test_learns_the_digits_and_puts_them_on_the_shells(digits):
    x, y = digits
    model = _classifier()
    model.compile(
        keras.optimizers.Adam(3e-3),
        HALOLoss(),
        metrics=[
            "accuracy",
            keras.metrics.SparseTopKCategoricalAccuracy(k=3, name="top3"),
        ],
    )
    model.fit(x[:1400], y[:1400], batch_size=64, epochs=20, verbose=0)
    _, accuracy, top3 = model.evaluate(x[1400:], y[1400:], verbose=0)
    assert accuracy > 0.85
    assert accuracy <= top3 <= 1.0

    known = keras_halo.decode_predictions(model.predict(x[1400:], verbose=0))
    # "accuracy" counts an abstention as a mistake; so does the decoder.
    assert accuracy == pytest.approx(np.mean(known.labels == y[1400:]))
    # Members sit on the shell that the radial term prescribes.
    shell = geometry.shell(16)
    own = known.squared_radius[np.arange(len(known)), y[1400:]]
    assert 0.5 * shell < np.median(own) < 2 * shell


@pytest.mark.slow
@pytest.mark.parametrize("labels", ["integer", "column", "one_hot"])
def test_metrics_named_accuracy_equal_those_on_the_answer_columns(
    digits, labels
):
    x, y = digits
    given = {"integer": y, "column": y[:, None], "one_hot": np.eye(10)[y]}
    model = _classifier()
    model.compile("adam", HALOLoss(), metrics=["accuracy"])
    model.fit(x[:512], given[labels][:512], epochs=2, verbose=0)
    accuracy = model.evaluate(x, given[labels], verbose=0)[1]
    answers = model.predict(x, verbose=0)[:, :11].argmax(axis=-1)
    assert accuracy == pytest.approx(np.mean(answers == y), abs=1e-6)


def _compiled(**kwargs):
    model = _classifier(**kwargs)
    model.compile(keras.optimizers.Adam(1e-3), HALOLoss())
    return model


def _train(model, x, y, epochs):
    history = model.fit(
        x[:256], y[:256], batch_size=64, epochs=epochs, shuffle=False, verbose=0
    )
    return history.history["loss"]


@pytest.mark.parametrize("learn_gamma", [True, False])
def test_saved_and_loaded_training_continues_as_if_nothing_happened(
    digits, tmp_path, learn_gamma
):
    x, y = digits
    model = _compiled(learn_gamma=learn_gamma)
    _train(model, x, y, epochs=3)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")

    assert isinstance(loaded.loss, HALOLoss)
    np.testing.assert_array_equal(
        loaded.predict(x, verbose=0), model.predict(x, verbose=0)
    )
    np.testing.assert_allclose(
        _train(loaded, x, y, epochs=3),
        _train(model, x, y, epochs=3),
        rtol=1e-6,
    )
    for ours, theirs in zip(loaded.weights, model.weights, strict=True):
        np.testing.assert_allclose(
            to_numpy(ours), to_numpy(theirs), rtol=1e-5, atol=1e-6
        )
    # The weight starts at zero, and stays there exactly unless it is trained.
    moved = float(to_numpy(loaded.layers[-1].raw_gamma))
    assert (moved != 0.0) == learn_gamma


@pytest.mark.slow
def test_weights_file_round_trip(digits, tmp_path):
    x, y = digits
    model = _compiled()
    _train(model, x, y, epochs=1)
    model.save_weights(tmp_path / "model.weights.h5")
    fresh = _classifier()
    fresh.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(
        fresh.predict(x, verbose=0), model.predict(x, verbose=0)
    )


def test_a_whole_model_in_an_h5_file_answers_the_same(digits, tmp_path):
    x, y = digits
    model = _compiled()
    _train(model, x, y, epochs=1)
    with warnings.catch_warnings():
        # Keras calls the format a legacy.
        warnings.simplefilter("ignore")
        model.save(tmp_path / "model.h5")
        loaded = keras.saving.load_model(tmp_path / "model.h5", compile=False)
    np.testing.assert_array_equal(
        loaded.predict(x[:50], verbose=0), model.predict(x[:50], verbose=0)
    )


def test_clone_and_config_round_trip(digits):
    x, _ = digits
    model = _classifier(abstain_rate=None, label_smoothing=0.02)
    for copy in (
        keras.models.clone_model(model),
        keras.Sequential.from_config(model.get_config()),
    ):
        copy.set_weights(model.get_weights())
        np.testing.assert_array_equal(
            copy.predict(x[:8], verbose=0), model.predict(x[:8], verbose=0)
        )


def test_a_float64_model_saves_and_loads(tmp_path):
    with float64():
        model = keras.Sequential(
            [
                keras.layers.Input((4,), dtype="float64"),
                HALODense(3, dtype="float64"),
                HALOSoftmax(dtype="float64"),
            ]
        )
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        x = ops.convert_to_tensor(np.random.default_rng(0).normal(size=(5, 4)))
        expected = to_numpy(model(x))
        assert expected.dtype == "float64"
        np.testing.assert_array_equal(to_numpy(loaded(x)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("run_eagerly", [True, False])
def test_eager_and_compiled_steps_give_the_same_losses(digits, run_eagerly):
    x, y = digits
    losses = {}
    for eager in (run_eagerly, not run_eagerly):
        keras.utils.set_random_seed(1)
        model = _classifier()
        model.compile(keras.optimizers.SGD(1e-2), HALOLoss(), run_eagerly=eager)
        losses[eager] = _train(model, x, y, epochs=1)
    np.testing.assert_allclose(losses[True], losses[False], rtol=1e-5)


def test_token_head_with_masks_and_pixel_head_with_ignored_labels():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 20, size=(32, 7))
    tokens[:, 5:] = 0
    labels = np.where(tokens > 0, tokens % 3, -1)
    model = keras.Sequential(
        [
            keras.layers.Input((7,), dtype="int32"),
            keras.layers.Embedding(20, 8, mask_zero=True),
            HALODense(3),
        ]
    )
    model.compile(keras.optimizers.Adam(0.05), HALOLoss())
    history = model.fit(tokens, labels, epochs=30, verbose=0).history
    assert np.all(np.isfinite(history["loss"]))
    answers = model.predict(tokens, verbose=0).argmax(axis=-1)
    assert np.mean((answers == labels)[tokens > 0]) > 0.95

    pixels = rng.normal(size=(16, 4, 4, 2)).astype("float32")
    classes = (pixels[..., 0] > 0).astype("int32") + 2 * (pixels[..., 1] > 0)
    classes[:, 0] = 255
    model = keras.Sequential(
        [
            keras.layers.Input((4, 4, 2)),
            keras.layers.Conv2D(16, 1, activation="relu"),
            keras.layers.Conv2D(8, 1),
            HALODense(4),
        ]
    )
    model.compile(keras.optimizers.Adam(0.02), HALOLoss(ignore_class=255))
    model.fit(pixels, classes, epochs=40, verbose=0)
    answers = model.predict(pixels, verbose=0).argmax(axis=-1)
    assert np.mean(answers[:, 1:] == classes[:, 1:]) > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("num_features", [64, 4096])
def test_sgd_in_large_steps_learns(digits, num_features):
    x, y = digits
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.layers.Input((64,)),
            keras.layers.Dense(num_features, activation="relu"),
            HALODense(10),
        ]
    )
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), HALOLoss())
    model.fit(x[:1500], y[:1500], batch_size=64, epochs=6, verbose=0)
    scores = model.predict(x[1500:], verbose=0)
    assert (scores[:, :10].argmax(axis=-1) == y[1500:]).mean() > 0.85


@pytest.mark.slow
def test_callbacks_on_val_accuracy_work_as_with_cross_entropy(digits, tmp_path):
    """Keras's own mnist_convnet with two lines swapped, on smaller digits."""
    x, y = digits
    x = np.pad(x.reshape(-1, 8, 8, 1), ((0, 0), (2, 2), (2, 2), (0, 0)))
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((12, 12, 1)),
            keras.layers.Conv2D(32, kernel_size=3, activation="relu"),
            keras.layers.MaxPooling2D(pool_size=2),
            keras.layers.Conv2D(64, kernel_size=3, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.5),
            HALODense(10),
        ]
    )
    model.compile("adam", HALOLoss(), metrics=["accuracy"])
    stop = keras.callbacks.EarlyStopping(
        monitor="val_accuracy", patience=2, restore_best_weights=True
    )
    slower = keras.callbacks.ReduceLROnPlateau(
        monitor="val_accuracy", patience=2
    )
    path = tmp_path / "best-{epoch}.keras"
    kept = keras.callbacks.ModelCheckpoint(
        path, monitor="val_accuracy", save_best_only=True
    )
    history = model.fit(
        x[:1400],
        y[:1400],
        batch_size=64,
        epochs=6,
        validation_data=(x[1400:], y[1400:]),
        callbacks=[stop, slower, kept],
        verbose=0,
    ).history
    # Where everything abstained at first, the first epoch had 0.0.
    assert history["val_accuracy"][0] > 0.5
    assert len(history["val_accuracy"]) >= 5
    assert history["learning_rate"][3] == pytest.approx(1e-3)
    best = int(np.argmax(history["val_accuracy"]))
    assert best >= 2
    assert (tmp_path / f"best-{best + 1}.keras").exists()
    _, accuracy = model.evaluate(x[1400:], y[1400:], verbose=0)
    assert accuracy == pytest.approx(max(history["val_accuracy"]))
    assert accuracy > 0.9
