"""
Title: Time series classification, and a fault that nobody has seen before
Author: The keras_halo authors
Date created: 2026/11/24
Last modified: 2026/11/24
Description: Vibrations of a machine: healthy, worn, or "I don't know".
Accelerator: None
"""

"""
## Introduction

A sensor on a machine tells whether a bearing is healthy or worn. Sooner or
later it will record what neither word fits: another fault, or a broken cable.
A softmax has to pick one of the two. HALO gives each class a centre in the
space of embeddings and keeps the origin free for "I don't know"; the distances
to the centres tell how strange a recording is.

The convnet is the usual one for time series, with the usual three callbacks: it
keeps the best epoch on disk, lowers the learning rate and stops when nothing
improves. Then the model is loaded back from its file.

## Setup
"""

import keras
import numpy as np
from keras import layers
from matplotlib import pyplot as plt

import keras_halo

keras.utils.set_random_seed(0)

"""
## Load the data

We make it. A healthy machine hums at the speed it turns, in noise. A worn
bearing adds a short ring each time a ball rolls over the damage. Speed, phase,
loudness and noise differ from recording to recording.
"""

LENGTH = 256
CLASSES = ["healthy", "worn"]


def record(kind, count, rng):
    """Recordings of shape (N, 256, 1), each with mean 0 and deviation 1."""
    time = np.arange(LENGTH) / LENGTH

    def draw(low, high):
        return rng.uniform(low, high, (count, 1))

    turns, phase = draw(6.0, 10.0), draw(0.0, 1.0)
    hum = np.sin(2 * np.pi * (turns * time + phase))
    noise = draw(0.3, 0.6) * rng.normal(size=(count, LENGTH))
    if kind == "healthy":
        signal = hum + noise
    elif kind == "worn":
        since_hit = (1.6 * turns * time + phase) % 1.0
        ring = np.exp(-6.0 * since_hit) * np.sin(2 * np.pi * 3.0 * since_hit)
        signal = hum + draw(0.7, 1.5) * ring + noise
    elif kind == "loose foot":
        signal = np.sign(hum) * np.abs(hum) ** 0.2 + noise
    elif kind == "two machines":
        other = np.sin(2 * np.pi * (draw(14.0, 30.0) * time + draw(0.0, 1.0)))
        signal = hum + other + noise
    elif kind == "broken cable":
        signal = np.cumsum(rng.normal(size=(count, LENGTH)), axis=1)
    signal -= signal.mean(axis=1, keepdims=True)
    signal /= signal.std(axis=1, keepdims=True)
    return signal[..., None].astype("float32")


def record_known(count, rng):
    x = np.concatenate([record(kind, count // 2, rng) for kind in CLASSES])
    y = np.repeat([0, 1], count // 2)
    order = rng.permutation(count)
    return x[order], y[order]


rng = np.random.default_rng(0)
x_train, y_train = record_known(4000, rng)
x_val, y_val = record_known(500, rng)
x_test, y_test = record_known(1000, rng)
unknown = {
    kind: record(kind, 500, rng)
    for kind in ("loose foot", "two machines", "broken cable")
}

"""
## Build a model
"""


def build_model():
    inputs = keras.Input((LENGTH, 1))
    x = inputs
    for _ in range(3):
        x = layers.Conv1D(32, 5, strides=2, padding="same")(x)
        x = layers.BatchNormalization()(x)
        x = layers.ReLU()(x)
    x = layers.GlobalAveragePooling1D()(x)
    # was: outputs = layers.Dense(2, activation="softmax")(x)
    outputs = keras_halo.HALODense(2)(x)
    return keras.Model(inputs, outputs)


model = build_model()
model.compile(
    optimizer="adam",
    # was: loss="sparse_categorical_crossentropy"
    loss=keras_halo.HALOLoss(),
    metrics=["sparse_categorical_accuracy"],
)

"""
## Train
"""

callbacks = [
    keras.callbacks.ModelCheckpoint(
        "timeseries_classification.keras",
        save_best_only=True,
        monitor="val_loss",
    ),
    keras.callbacks.ReduceLROnPlateau(
        monitor="val_loss", factor=0.5, patience=4, min_lr=1e-4
    ),
    keras.callbacks.EarlyStopping(monitor="val_loss", patience=8, verbose=1),
]
model.fit(
    x_train,
    y_train,
    batch_size=64,
    epochs=25,
    callbacks=callbacks,
    validation_data=(x_val, y_val),
    verbose=2,
)

"""
## Evaluate

Whoever loads the file imports `keras_halo` first; then it is a model like any
other.
"""

model = keras.models.load_model("timeseries_classification.keras")
test_loss, test_accuracy = model.evaluate(x_test, y_test, verbose=0)
print("Test loss:", test_loss)
print("Test accuracy:", test_accuracy)

"""
And what it never heard. `fitted` measures how far each class extends, in one
pass over the training data, and scores what lies outside. AUROC is the chance
that an unknown recording scores above a known one, `passed` the share of them
that a threshold lets pass which 95 % of the known ones pass.
"""

fitted = keras_halo.fit_class_gaussians(
    model, x_train, y_train, batch_size=1000, verbose=0
)
report = keras_halo.evaluate_ood(
    fitted, (x_test, y_test), unknown, method="fitted", verbose=0
)
print(f"{'known':14} abstained {report.known.abstention_rate:6.1%}")
for result in report.unknown:
    print(
        f"{result.name:14} abstained {result.abstention_rate:6.1%}"
        f"   AUROC {result.auroc:6.1%}"
        f"   passed {result.fpr95_known_positive:6.1%}"
    )

"""
The first three recordings of each kind. A red one is refused, by the model
itself or by the threshold.
"""

threshold = np.quantile(fitted.predict_on_batch(x_val)["ood"], 0.95)
kinds = {
    **{name: x_test[y_test == k] for k, name in enumerate(CLASSES)},
    **unknown,
}
figure, axes = plt.subplots(5, 3, figsize=(12, 8), sharex=True, sharey=True)
for row, (kind, recordings) in zip(axes, kinds.items(), strict=True):
    answer = fitted.predict_on_batch(recordings[:3])
    predictions = keras_halo.decode_predictions(answer["scores"])
    row[0].set_ylabel(kind, fontweight="bold")
    for i, ax in enumerate(row):
        refused = predictions.abstained[i] or answer["ood"][i] > threshold
        color = "tab:red" if refused else "tab:blue"
        label = CLASSES[predictions.labels[i]]
        ax.plot(recordings[i, :, 0], color=color, linewidth=1)
        ax.set_title(
            "I don't know" if refused else f"answer: {label}", color=color
        )
        ax.set(xticks=[], yticks=[])
figure.tight_layout()
figure.savefig("timeseries_classification.png", dpi=90)

"""
## Conclusion

Checkpoints, schedules, early stopping and `load_model` carry over as they are.
Ask for both answers of the model: what it abstains from by itself lies between
the classes; a recording unlike any other lies elsewhere, and only its distance
gives it away. Neither answer finds the loose foot: its AUROC in the table is
little above one half. What a model embeds where its classes are, no score of
its embeddings can find.
"""
