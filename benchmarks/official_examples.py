"""
Title: Keras's own examples with the lines swapped
Description: Five official networks, each with its own head and with HALODense.

Networks, optimizers, batch sizes and callbacks are those of the five examples
that are read most on keras.io. The head and the loss are swapped, and the line
that reads a prediction. Epochs and data are cut, alike for both heads, so that
two cores train all of it; `SIZES` says how.

    python benchmarks/official_examples.py --mnist mnist10k.npz \\
        --cifar10 cifar10.npz --backbone backbone.keras \\
        --reviews movieReviewSnippets_GroundTruth.txt \\
        --series spoken_digits.npz

`mnist_convnet` and `image_classification_from_scratch` take their data from
`keras.datasets` where no file is given; an example whose data are missing is
left out, with the reason. `--mnist` is an `.npz` file with `x` and `y`,
`--cifar10` one with `x_train`, `y_train`, `x_test` and `y_test`. `--reviews`
has a review a line: a number, a rating that is negative or positive, and the
text, separated by tabs; the sdist of vaderSentiment has such files in the
archive of its `additional_resources`. `--series` is `FordA_TRAIN.tsv`, with
`FordA_TEST.tsv` beside it, or an `.npz` file with recordings of 8 kHz end to
end, `samples`, where each begins and the last one ends, `offsets`, and `y`.
`--backbone` is a Keras model from pictures of 96 x 96 pixels to a map of
features; `examples/transfer_learning.py --save-backbone` makes one with
ImageNet weights.

Every run is a file in the output folder, there as a whole or not at all: the
same command again makes what is missing. Needs `keras-halo[tools]`.
"""

import argparse
import json
import os
import pathlib
import re
import string
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import layers

import keras_halo
from keras_halo import HALODense, HALOLoss
from keras_halo.metrics import expected_calibration_error, renormalize

ORIGINAL, HALO = "original", "HALO"
KINDS = (ORIGINAL, HALO)
CAT, DOG = 3, 5
MAX_WORDS = 20_000
SAMPLE_RATE = 8000

# Samples to train with, before a part is split off for validation, and epochs.
SIZES = {
    "mnist_convnet": (6000, 5),
    "image_classification_from_scratch": (2000, 6),
    "text_classification_from_scratch": (8000, 3),
    "transfer_learning": (4000, 20),
    "timeseries_classification_from_scratch": (2400, 20),
}

# ---- data: x_train, y_train, x_test, y_test, the training part shuffled


def arrays(path, *names):
    with np.load(path) as file:
        missing = [name for name in names if name not in file]
        if missing:
            raise ValueError(
                f"{path} must hold {', '.join(names)}. Missing: "
                f"{', '.join(missing)}. `--help` says what each file holds."
            )
        return [file[name] for name in names]


def shuffled(x, y, rng):
    order = rng.permutation(len(x))
    return x[order], y[order]


def load_mnist(options, size):
    if options.mnist:
        x, y = arrays(options.mnist, "x", "y")
    else:
        (x, y), (more, labels) = keras.datasets.mnist.load_data()
        x, y = np.concatenate([x, more]), np.concatenate([y, labels])
    x, y = shuffled(x, y, np.random.default_rng(0))
    x = x.astype("float32")[..., None] / 255.0
    y = keras.utils.to_categorical(y, 10)
    return x[:size], y[:size], x[size:][:2000], y[size:][:2000]


def load_cats_and_dogs(options, size):
    """Cats, 0, and dogs, 1, of CIFAR-10."""
    if options.cifar10:
        names = ("x_train", "y_train", "x_test", "y_test")
        x, y, x_test, y_test = arrays(options.cifar10, *names)
    else:
        (x, y), (x_test, y_test) = keras.datasets.cifar10.load_data()
    rng = np.random.default_rng(0)
    parts = []
    for images, labels in ((x, y), (x_test, y_test)):
        chosen = np.isin(labels.ravel(), (CAT, DOG))
        images, labels = images[chosen], labels.ravel()[chosen] == DOG
        parts += shuffled(images.astype("float32"), labels.astype("int32"), rng)
    return parts[0][:size], parts[1][:size], parts[2], parts[3]


def load_features(options, size):
    """Cats and dogs as the frozen network sees them."""
    x, y, x_test, y_test = load_cats_and_dogs(options, size)
    backbone = keras.models.load_model(options.backbone, compile=False)
    inputs = keras.Input((32, 32, 3))
    maps = backbone(layers.Resizing(96, 96)(inputs), training=False)
    # A backbone may emit maps of several resolutions; the last one is meant.
    last = maps[-1] if isinstance(maps, (list, tuple)) else maps
    reader = keras.Model(inputs, layers.GlobalAveragePooling2D()(last))
    x, x_test = (reader.predict(part, verbose=0) for part in (x, x_test))
    return x, y, x_test, y_test


def words(text):
    text = text.lower().replace("<br />", " ")
    return re.sub(f"[{re.escape(string.punctuation)}]", "", text).split()


def load_reviews(options, size, length=64):
    """Word numbers of reviews, and whether the rating is positive."""
    texts, ratings = [], []
    lines = pathlib.Path(options.reviews).read_text("latin-1").splitlines()
    for line in filter(None, lines):
        try:
            _, rating, text = line.split("\t", 2)
            ratings.append(float(rating))
        except ValueError:
            raise ValueError(
                "A line of the reviews must hold a number, a rating and a "
                f"text, separated by tabs. Received: {line[:80]!r} in "
                f"{options.reviews}."
            ) from None
        texts.append(words(text))
    order = np.random.default_rng(0).permutation(len(texts))
    order = [i for i in order if ratings[i] != 0]
    counts = {}
    for i in order[:size]:
        for word in texts[i]:
            counts[word] = counts.get(word, 0) + 1
    frequent = sorted(counts, key=counts.get, reverse=True)[: MAX_WORDS - 2]
    # 0 is padding, 1 a word that is not in the vocabulary.
    index = {word: 2 + rank for rank, word in enumerate(frequent)}
    x = np.zeros((len(order), length), "int32")
    for row, i in enumerate(order):
        numbers = [index.get(word, 1) for word in texts[i][:length]]
        x[row, : len(numbers)] = numbers
    y = np.array([ratings[i] > 0 for i in order], "int32")
    return x[:size], y[:size], x[size:], y[size:]


def loudness(recordings):
    """Log-energy of the first 75 windows of 10 ms, standardized."""
    window = SAMPLE_RATE // 100
    waves = np.zeros((len(recordings), 75 * window))
    for wave, recording in zip(waves, recordings, strict=True):
        wave[: len(recording)] = recording[: len(wave)] / 32768.0
    energy = np.square(waves).reshape(len(waves), 75, window).mean(axis=-1)
    x = np.log(energy + 1e-7)
    x -= x.mean(axis=1, keepdims=True)
    return x / (x.std(axis=1, keepdims=True) + 1e-7)


def load_series(options, size):
    path = pathlib.Path(options.series)
    rng = np.random.default_rng(0)
    if path.suffix == ".tsv":
        other = path.with_name(path.name.replace("_TRAIN", "_TEST"))
        train, test = (
            np.loadtxt(part, delimiter="\t") for part in (path, other)
        )
        parts = [(part[:, 1:], part[:, 0] > 0) for part in (train, test)]
    else:
        samples, offsets, y = arrays(path, "samples", "offsets", "y")
        x, y = shuffled(loudness(np.split(samples, offsets[1:-1])), y, rng)
        parts = [(x[:size], y[:size]), (x[size:], y[size:])]
    (x, y), (x_test, y_test) = parts
    x, y = shuffled(x, y, rng)
    x, x_test = (part.astype("float32")[..., None] for part in (x, x_test))
    y, y_test = y.astype("int32"), y_test.astype("int32")
    return x[:size], y[:size], x_test, y_test


# ---- the two lines: the last layer, and the loss


def softmax_head(kind, units, loss):
    """`Dense(units, activation="softmax")` or `HALODense(units)`; the loss."""
    if kind == HALO:
        return HALODense(units), HALOLoss()
    return layers.Dense(units, activation="softmax"), loss


def sigmoid_head(kind):
    """One sigmoid unit, or two classes."""
    if kind == HALO:
        return HALODense(2), HALOLoss()
    return layers.Dense(1, activation="sigmoid"), "binary_crossentropy"


# ---- networks and how they are trained; each returns model and history


def mnist_convnet(kind, x, y, epochs):
    head, loss = softmax_head(kind, 10, "categorical_crossentropy")
    model = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(32, 3, activation="relu"),
            layers.MaxPooling2D(2),
            layers.Conv2D(64, 3, activation="relu"),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dropout(0.5),
            head,
        ]
    )
    model.compile("adam", loss, metrics=["accuracy"])
    history = model.fit(
        x, y, batch_size=128, epochs=epochs, validation_split=0.1, verbose=0
    )
    return model, history


def image_classification_from_scratch(kind, x, y, epochs):
    """The small Xception; flips and rotations are layers of the model."""

    def normalized(x):
        return layers.Activation("relu")(layers.BatchNormalization()(x))

    inputs = keras.Input(x.shape[1:])
    hidden = layers.RandomFlip("horizontal")(inputs)
    hidden = layers.RandomRotation(0.1)(hidden)
    hidden = layers.Rescaling(1.0 / 255)(hidden)
    hidden = normalized(layers.Conv2D(32, 3, strides=2, padding="same")(hidden))
    before = hidden = normalized(layers.Conv2D(64, 3, padding="same")(hidden))
    for filters in (128, 256, 512, 728):
        for _ in range(2):
            hidden = layers.Activation("relu")(hidden)
            hidden = layers.SeparableConv2D(filters, 3, padding="same")(hidden)
            hidden = layers.BatchNormalization()(hidden)
        hidden = layers.MaxPooling2D(3, strides=2, padding="same")(hidden)
        skipped = layers.Conv2D(filters, 1, strides=2, padding="same")(before)
        before = hidden = layers.add([hidden, skipped])
    hidden = normalized(layers.SeparableConv2D(1024, 3, padding="same")(hidden))
    hidden = layers.GlobalAveragePooling2D()(hidden)
    head, loss = sigmoid_head(kind)
    model = keras.Model(inputs, head(layers.Dropout(0.5)(hidden)))
    model.compile(keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"])
    history = model.fit(
        # The original's 128 would leave too few steps of so few pictures.
        *(x, y),
        batch_size=32,
        epochs=epochs,
        validation_split=0.2,
        verbose=0,
    )
    return model, history


def text_classification_from_scratch(kind, x, y, epochs):
    inputs = keras.Input((None,), dtype="int32")
    hidden = layers.Embedding(MAX_WORDS, 128)(inputs)
    hidden = layers.Dropout(0.5)(hidden)
    for _ in range(2):
        hidden = layers.Conv1D(128, 7, strides=3, activation="relu")(hidden)
    hidden = layers.GlobalMaxPooling1D()(hidden)
    hidden = layers.Dense(128, activation="relu")(hidden)
    head, loss = sigmoid_head(kind)
    model = keras.Model(inputs, head(layers.Dropout(0.5)(hidden)))
    model.compile("adam", loss, metrics=["accuracy"])
    history = model.fit(
        x, y, batch_size=32, epochs=epochs, validation_split=0.2, verbose=0
    )
    return model, history


def transfer_learning(kind, x, y, epochs):
    """The new top of the frozen network, on features computed once."""
    inputs = keras.Input(x.shape[1:])
    head, loss = sigmoid_head(kind)
    model = keras.Model(inputs, head(layers.Dropout(0.2)(inputs)))
    model.compile(keras.optimizers.Adam(), loss, metrics=["accuracy"])
    history = model.fit(
        x, y, batch_size=32, epochs=epochs, validation_split=0.2, verbose=0
    )
    return model, history


def timeseries_classification_from_scratch(kind, x, y, epochs):
    inputs = hidden = keras.Input(x.shape[1:])
    for _ in range(3):
        hidden = layers.Conv1D(64, 3, padding="same")(hidden)
        hidden = layers.ReLU()(layers.BatchNormalization()(hidden))
    hidden = layers.GlobalAveragePooling1D()(hidden)
    head, loss = softmax_head(
        kind, len(np.unique(y)), "sparse_categorical_crossentropy"
    )
    model = keras.Model(inputs, head(hidden))
    model.compile("adam", loss, metrics=["accuracy"])
    with tempfile.TemporaryDirectory() as folder:
        best = str(pathlib.Path(folder) / "best_model.keras")
        callbacks = [
            keras.callbacks.ModelCheckpoint(
                best, save_best_only=True, monitor="val_loss"
            ),
            keras.callbacks.ReduceLROnPlateau(
                monitor="val_loss", factor=0.5, patience=20, min_lr=1e-4
            ),
            keras.callbacks.EarlyStopping(monitor="val_loss", patience=50),
        ]
        history = model.fit(
            x,
            y,
            batch_size=32,
            epochs=epochs,
            callbacks=callbacks,
            validation_split=0.2,
            verbose=0,
        )
        return keras.models.load_model(best), history


# Name: loader, network, the options that it cannot do without.
EXAMPLES = {
    "mnist_convnet": (load_mnist, mnist_convnet, ()),
    "image_classification_from_scratch": (
        load_cats_and_dogs,
        image_classification_from_scratch,
        (),
    ),
    "text_classification_from_scratch": (
        load_reviews,
        text_classification_from_scratch,
        ("reviews",),
    ),
    "transfer_learning": (load_features, transfer_learning, ("backbone",)),
    "timeseries_classification_from_scratch": (
        load_series,
        timeseries_classification_from_scratch,
        ("series",),
    ),
}

# ---- the third place: what a prediction prints


def probabilities(kind, outputs):
    """Probabilities of the classes, and which inputs are abstained on."""
    if kind == HALO:
        predictions = keras_halo.decode_predictions(outputs)
        return renormalize(predictions.probabilities), predictions.abstained
    if outputs.shape[-1] == 1:
        outputs = np.concatenate([1.0 - outputs, outputs], axis=-1)
    return outputs, np.zeros(len(outputs), bool)


def run(name, kind, seed, data, epochs):
    x, y, x_test, y_test = data
    keras.utils.set_random_seed(seed)
    start = time.monotonic()
    model, history = EXAMPLES[name][1](kind, x, y, epochs)
    seconds = time.monotonic() - start
    results = model.evaluate(x_test, y_test, verbose=0, return_dict=True)
    p, abstained = probabilities(kind, model.predict(x_test, verbose=0))
    labels = y_test.argmax(-1) if y_test.ndim > 1 else y_test
    return {
        '"accuracy"': results["accuracy"],
        "best-class accuracy": float(np.mean(p.argmax(-1) == labels)),
        "ECE": float(expected_calibration_error(labels, p)),
        "abstained": float(abstained.mean()),
        "val_accuracy, first epoch": history.history["val_accuracy"][0],
        "seconds": seconds,
    }


def cell(values):
    values = 100.0 * np.array(values)
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{values.mean():.1f} ± {values.std(ddof=1):.1f}"


def table(results):
    """Markdown with a row an example and head."""
    figures = ('"accuracy"', "best-class accuracy", "ECE", "abstained")
    figures += ("val_accuracy, first epoch",)
    lines = ["| example | head | " + " | ".join(figures) + " |"]
    lines.append("|---" * (len(figures) + 2) + "|")
    for name in EXAMPLES:
        for kind in KINDS:
            runs = results.get((name, kind))
            if runs:
                cells = [cell([r[figure] for r in runs]) for figure in figures]
                lines.append(f"| {name} | {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[2].removeprefix("Description: ")
    )
    for option in ("mnist", "cifar10", "reviews", "series", "backbone"):
        parser.add_argument(f"--{option}", type=pathlib.Path)
    parser.add_argument("--only", nargs="+", choices=EXAMPLES, metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train", type=int, help="in the place of SIZES")
    parser.add_argument("--epochs", type=int, help="in the place of SIZES")
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("official-examples")
    )
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    results = {}
    for name, (load, _, needed) in EXAMPLES.items():
        if options.only and name not in options.only:
            continue
        size = options.train or SIZES[name][0]
        epochs = options.epochs or SIZES[name][1]
        missing = [f"--{n}" for n in needed if getattr(options, n) is None]
        if missing:
            print(f"{name}: left out without {', '.join(missing)}", flush=True)
            continue
        data = None
        for seed in options.seeds:
            for kind in KINDS:
                run_name = f"{name}-{size}-{epochs}-{kind}-{seed}"
                path = options.output / f"{run_name}.json"
                if not path.exists():
                    if data is None:
                        data = load(options, size)
                    figures = run(name, kind, seed, data, epochs)
                    part = path.with_suffix(".part")
                    part.write_text(json.dumps(figures, indent=2))
                    part.replace(path)
                    print(f"{path.stem}: {figures}", flush=True)
                runs = results.setdefault((name, kind), [])
                runs.append(json.loads(path.read_text()))
    text = table(results)
    print(f"\n%, mean ± std of {len(options.seeds)} seeds\n\n{text}")
    (options.output / "table.md").write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    sys.exit(main())
