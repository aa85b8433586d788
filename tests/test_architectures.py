"""`add_abstention` on ten architectures, one call each, without a hint.

`tox -e architectures-jax`, or `-torch` and `-tensorflow`, prints a table.
"""

import dataclasses
import time
from collections.abc import Callable

import keras
import numpy as np
import pytest
from cases import THOROUGH
from keras import layers

import keras_halo

if not THOROUGH:
    pytest.skip("`tox -e architectures-jax` runs it", allow_module_level=True)

# Of the accuracy, on held-out samples.
TOLERATED = 0.002

BATCH_SIZE = 64

VOCABULARY, STEPS, TOPICS = 300, 24, 5


def shifted_digits(size):
    """Digits and their shifts by a pixel, split by the digit they are of.

    Returns inputs and labels for training, and held-out ones.
    """
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    images = (images / 16.0).reshape(-1, 8, 8).astype("float32")
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    places = [(1, 1), (0, 1), (2, 1), (1, 0), (1, 2)]
    views = [padded[:, i : i + 8, j : j + 8] for i, j in places]
    views = np.stack(views, axis=1)
    if size == 8:
        views = views[..., None]
    else:
        views = views.repeat(size // 8, axis=2).repeat(size // 8, axis=3)
        views = np.stack([views] * 3, axis=-1)
    order = np.random.default_rng(0).permutation(len(images))
    return [
        part
        for kept in (order[:800], order[800:])
        for part in (np.concatenate(views[kept]), labels[kept].repeat(5))
    ]


def texts():
    """Texts of five topics that share most of their words."""
    rng = np.random.default_rng(0)
    # The words from 200 on are in no text.
    chances = rng.dirichlet(np.full(198, 0.2), TOPICS + 1)
    chances = 0.5 * chances[:TOPICS] + 0.5 * chances[TOPICS]
    labels = rng.integers(TOPICS, size=8000)
    tokens = np.stack([rng.choice(198, STEPS, p=chances[k]) for k in labels])
    mask = np.arange(STEPS) < rng.integers(8, STEPS + 1, size=(8000, 1))
    x = text(np.where(mask, tokens + 2, 0), mask)
    train = {name: value[:4000] for name, value in x.items()}
    held_out = {name: value[4000:] for name, value in x.items()}
    return train, labels[:4000], held_out, labels[4000:]


def text(tokens, mask):
    return {
        "token_ids": tokens.astype("int32"),
        "segment_ids": np.zeros_like(tokens, "int32"),
        "padding_mask": mask.astype("int32"),
    }


def far_images(shape):
    rng = np.random.default_rng(1)
    return rng.normal(0.0, 20.0, size=(300, *shape)).astype("float32")


def far_texts():
    """Words that no text of the training data has."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(200, VOCABULARY, size=(300, STEPS))
    return text(tokens, np.ones(tokens.shape, "bool"))


def perceptron():
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Flatten(),
            layers.Dense(128, activation="relu"),
            layers.Dropout(0.3),
            layers.Dense(64, activation="relu"),
            layers.Dense(10, activation="softmax"),
        ]
    )


def convnet():
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.GlobalAveragePooling2D(),
            layers.Dropout(0.2),
            layers.Dense(10, activation="softmax"),
        ]
    )


def lstm():
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Reshape((8, 8)),
            layers.LSTM(48, return_sequences=True),
            layers.LSTM(48),
            layers.Dense(10, activation="softmax"),
        ]
    )


class Positions(layers.Layer):
    """Adds a learned vector to every position."""

    def build(self, input_shape):
        self.table = self.add_weight(
            shape=input_shape[1:], initializer="random_normal", name="table"
        )

    def call(self, inputs):
        return inputs + self.table


keras.saving.register_keras_serializable("architectures")(Positions)


def vision_transformer():
    """Patches, and blocks of attention, as in the example of Keras."""
    inputs = keras.Input((8, 8, 1))
    x = layers.Conv2D(32, 2, strides=2)(inputs)
    x = Positions()(layers.Reshape((16, 32))(x))
    for _ in range(3):
        y = layers.LayerNormalization(epsilon=1e-6)(x)
        y = layers.MultiHeadAttention(4, 8, dropout=0.1)(y, y)
        x = layers.Add()([y, x])
        y = layers.LayerNormalization(epsilon=1e-6)(x)
        y = layers.Dense(64, activation="gelu")(y)
        x = layers.Add()([layers.Dense(32)(y), x])
    x = layers.LayerNormalization(epsilon=1e-6)(x)
    x = layers.Dense(64, activation="gelu")(layers.Flatten()(x))
    return keras.Model(inputs, layers.Dense(10)(layers.Dropout(0.3)(x)))


def bert():
    models = pytest.importorskip("keras_hub").models
    backbone = models.BertBackbone(
        vocabulary_size=VOCABULARY,
        num_layers=2,
        num_heads=2,
        hidden_dim=32,
        intermediate_dim=64,
        max_sequence_length=STEPS,
    )
    return models.BertTextClassifier(backbone, num_classes=TOPICS)


def application(name, **arguments):
    """A network of `keras.applications` without weights, for ten classes."""

    def build():
        model = getattr(keras.applications, name)(
            input_shape=(32, 32, 3), weights=None, classes=10, **arguments
        )
        for layer in model.layers:
            if isinstance(layer, layers.BatchNormalization):
                # Averages that follow a training of some hundred steps.
                layer.momentum = 0.9
        return model

    return build


@dataclasses.dataclass
class Architecture:
    """How a network is made, and how long it is trained.

    Args:
        build: Function that returns a model that is not trained.
        epochs: Integer, epochs of training; 0 for random weights.
        learning_rate: Float, that of Adam.
        size: Integer, the height and width of images; 0 for texts.
        samples: Integer, how many of the training samples are used.
        held_out: Integer, how many of the others.
    """

    build: Callable
    epochs: int = 0
    learning_rate: float = 3e-3
    size: int = 32
    samples: int = 4000
    held_out: int = 5000


def untrained(name, **arguments):
    """A large network with random weights, on few samples."""
    build = application(name, **arguments)
    return Architecture(build, samples=600, held_out=300)


ARCHITECTURES = {
    "MLP": Architecture(perceptron, 15, size=8),
    "small convnet": Architecture(convnet, 15, size=8),
    "LSTM": Architecture(lstm, 10, size=8),
    "ViT": Architecture(vision_transformer, 8, 2e-3, size=8),
    "BERT of KerasHub": Architecture(bert, 4, 2e-3, size=0),
    "MobileNetV3Small": Architecture(
        application("MobileNetV3Small", include_preprocessing=False), 8
    ),
    "EfficientNetV2B0": untrained(
        "EfficientNetV2B0", include_preprocessing=False
    ),
    "ResNet50V2": untrained("ResNet50V2"),
    "ConvNeXtTiny": untrained("ConvNeXtTiny"),
    "DenseNet121": untrained("DenseNet121"),
}


@pytest.fixture(scope="module", autouse=True)
def head_of_table():
    print(f"\n\n{keras.backend.backend()}")
    print(
        f"{'architecture':18}{'parameters':>12}{'features':>10}{'epochs':>8}"
        f"{'before':>8}{'after':>8}{'known':>7}{'far':>7}{'seconds':>9}"
    )


@pytest.mark.filterwarnings("ignore:.*preprocesses:UserWarning")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_any_architecture_learns_to_abstain(name, tmp_path):
    this = ARCHITECTURES[name]
    model = this.build()
    if this.size:
        x, y, x_new, y_new = shifted_digits(this.size)
        far = far_images(x.shape[1:])
        x, y = x[: this.samples], y[: this.samples]
        x_new, y_new = x_new[: this.held_out], y_new[: this.held_out]
    else:
        x, y, x_new, y_new = texts()
        far = far_texts()
    classes = int(y.max()) + 1
    logits = getattr(model.layers[-1].activation, "__name__", "") == "linear"
    steps = this.epochs * -(-len(y) // BATCH_SIZE)
    model.compile(
        keras.optimizers.Adam(
            keras.optimizers.schedules.CosineDecay(
                this.learning_rate, max(steps, 1)
            )
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=logits),
    )
    model.fit(x, y, batch_size=BATCH_SIZE, epochs=this.epochs, verbose=0)
    given = model.predict(x_new, batch_size=100, verbose=0)
    weights = [keras.ops.convert_to_numpy(w).copy() for w in model.weights]
    trainable = [layer.trainable for layer in model._flatten_layers()]
    compiled = (model.optimizer, model.compiled, model.loss)

    start = time.perf_counter()
    guarded = keras_halo.add_abstention(model, x, y, verbose=0)
    seconds = time.perf_counter() - start

    for before, after in zip(weights, model.weights, strict=True):
        np.testing.assert_array_equal(before, keras.ops.convert_to_numpy(after))
    assert trainable == [layer.trainable for layer in model._flatten_layers()]
    assert compiled == (model.optimizer, model.compiled, model.loss)
    scores = guarded.predict(x_new, batch_size=100, verbose=0)
    assert np.isfinite(scores).all()
    for weight in guarded.weights:
        assert np.isfinite(keras.ops.convert_to_numpy(weight)).all()
    before = np.mean(given.argmax(axis=-1) == y_new)
    after = np.mean(scores[:, :classes].argmax(axis=-1) == y_new)
    known = keras_halo.decode_predictions(scores)
    unknown = guarded.predict(far, batch_size=100, verbose=0)
    assert np.isfinite(unknown).all()
    unknown = keras_halo.decode_predictions(unknown)
    kept = guarded.layers[-2].units
    print(
        f"{name:18}{model.count_params():12,}{kept:10}{this.epochs:8}"
        f"{before:8.2%}{after:8.2%}{known.abstained.mean():7.1%}"
        f"{unknown.abstained.mean():7.1%}{seconds:9.1f}",
        flush=True,
    )
    if this.epochs:
        assert before > 0.8
        assert after >= before - max(TOLERATED, 1.0 / len(y_new))
    assert known.abstained.mean() < 0.5
    assert unknown.abstained.mean() > 0.95
    guarded.save(tmp_path / "guarded.keras")
    loaded = keras.saving.load_model(tmp_path / "guarded.keras")
    np.testing.assert_allclose(
        loaded.predict(x_new, batch_size=100, verbose=0),
        scores,
        rtol=1e-5,
        atol=1e-5,
    )
