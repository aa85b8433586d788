"""
Title: A digit classifier that can say "I don't know"
Author: The keras_halo authors
Date created: 2026/11/23
Last modified: 2026/11/28
Description: Two lines turn a cross-entropy classifier into one that abstains.
Accelerator: None
"""

"""
## Introduction

A classifier trained with cross-entropy has to name a class, also for an input
that shows none. Here the same small convnet is trained twice on handwritten
digits from 0 to 7: once with `Dense` and cross-entropy, once with `HALODense`
and `HALOLoss`. Then both are shown what they have never seen: the digits 8 and
9, and pure noise.

## Setup
"""

import argparse

import keras
import numpy as np
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits

from keras_halo import HALODense, HALOLoss, decode_predictions, ood_score
from keras_halo.metrics import auroc, expected_calibration_error, fpr_at_recall

NUM_KNOWN = 8
EPOCHS = 30
SEEDS = (0, 1, 2)
CROSS_ENTROPY, HALO = "cross-entropy", "HALO"

parser = argparse.ArgumentParser(
    description="Trains a small convnet both ways on scikit-learn's digits."
)
parser.add_argument(
    "--output", default="quickstart.png", help="where to save the figure"
)
# A notebook is started with arguments of its own.
arguments, _ = parser.parse_known_args()

"""
## Load the data

1,797 digits of 8 x 8 pixels, from UCI's repository, ship with scikit-learn.
"""


def load_data(seed):
    """Known digits for training and testing, and two kinds of unknown input."""
    data = load_digits()
    x = (data.images / 16.0).astype("float32")[..., None]
    y = data.target
    known = y < NUM_KNOWN
    rng = np.random.default_rng(seed)
    order = rng.permutation(np.flatnonzero(known))
    train, test = order[:1000], order[1000:]
    return {
        "train": (x[train], y[train]),
        "known": (x[test], y[test]),
        "unknown digits": x[~known],
        "noise": rng.random((500, 8, 8, 1)).astype("float32"),
    }


"""
## Build a model

The two lines that differ: the last layer and the loss. The head makes an
embedding of its own. For the picture at the end both networks get one of two
dimensions instead, which can be drawn.
"""


def build_model(kind, in_a_plane):
    model = keras.Sequential(
        [
            keras.layers.Input((8, 8, 1)),
            keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(64, 3, padding="same", activation="relu"),
            keras.layers.Flatten(),
        ]
    )
    if in_a_plane:
        model.add(keras.layers.Dense(2))
    if kind == HALO:
        # `None`: the input of the head is the embedding.
        size = {"embedding_dim": None} if in_a_plane else {}
        model.add(HALODense(NUM_KNOWN, **size))
        loss = HALOLoss()
    else:
        model.add(keras.layers.Dense(NUM_KNOWN))
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"])
    return model


"""
## Train
"""


def train(kind, seed, data, in_a_plane=False):
    keras.utils.set_random_seed(seed)
    model = build_model(kind, in_a_plane)
    title = f"{kind}{', in a plane' if in_a_plane else ''}, seed {seed}"

    def report(epoch, logs):
        if (epoch + 1) % 10 == 0:
            print(
                f"{title}: epoch {epoch + 1}/{EPOCHS}, "
                f"loss {logs['loss']:.3f}, accuracy {logs['accuracy']:.3f}",
                flush=True,
            )

    model.fit(
        *data["train"],
        batch_size=32,
        epochs=EPOCHS,
        verbose=0,
        callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=report)],
    )
    return model


"""
## Evaluate

A score that is larger for outliers comes with each model: one minus the
largest probability for cross-entropy, the log-odds of "I don't know" for
HALO.
AUROC is the chance that an unknown input scores above a
known one; FPR@95 is the share of unknown inputs that slip through when 95 % of
the known ones are let through. HALO also answers without any threshold: it
abstains where that is the most probable answer.
"""


def read(kind, model, x):
    """Class probabilities, outlier scores and abstentions for a batch."""
    scores = model.predict(x, batch_size=512, verbose=0)
    # The columns of the classes come first with both heads.
    probabilities = keras.ops.softmax(scores[:, :NUM_KNOWN])
    probabilities = keras.ops.convert_to_numpy(probabilities)
    if kind == HALO:
        abstained = decode_predictions(scores).abstained
        return probabilities, ood_score(scores), abstained
    return probabilities, 1.0 - probabilities.max(-1), np.zeros(len(x), bool)


def evaluate(kind, model, data):
    x, y = data["known"]
    probabilities, known, abstained = read(kind, model, x)
    figures = {
        "accuracy": np.mean(probabilities.argmax(-1) == y),
        "ECE": expected_calibration_error(y, probabilities),
    }
    shares = {"known": np.mean(abstained)}
    for name in ("unknown digits", "noise"):
        _, unknown, abstained = read(kind, model, data[name])
        figures[f"AUROC, {name}"] = auroc(known, unknown)
        figures[f"FPR@95, {name}"] = fpr_at_recall(known, unknown)
        shares[name] = np.mean(abstained)
    for name, share in shares.items():
        figures[f"abstained, {name}"] = share
    return figures


figures = {CROSS_ENTROPY: [], HALO: []}
for seed in SEEDS:
    data = load_data(seed)
    for kind, runs in figures.items():
        runs.append(evaluate(kind, train(kind, seed, data), data))

print(f"\n{'%, mean ± std of ' + str(len(SEEDS)) + ' seeds':28}", end="")
print("".join(f"{kind:>16}" for kind in figures))
for name in figures[HALO][0]:
    print(f"{name:28}", end="")
    for runs in figures.values():
        values = 100.0 * np.array([run[name] for run in runs])
        cell = f"{values.mean():.1f} ± {values.std(ddof=1):.1f}"
        print(f"{cell:>16}", end="")
    print()
print(
    "Accuracy and ECE are of the best class, also where the model abstains.\n"
    "FPR@95: known inputs are the positive class. Cross-entropy never abstains."
)

"""
## See the difference

An embedding of two dimensions can be drawn as it is: the plane below is all
that the last layer sees. It is white where the model is sure of a digit and
grey where it doubts. Cross-entropy is sure almost everywhere, and ever more so
away from the origin. HALO doubts at the origin and far out.
"""


def draw_map(ax, kind, model, data):
    backbone = keras.Sequential(model.layers[:-1])
    x, y = data["known"]
    embedded = {
        name: backbone.predict(values, batch_size=512, verbose=0)
        for name, values in {**data, "known": x}.items()
        if name != "train"
    }
    limit = 1.1 * max(np.abs(points).max() for points in embedded.values())
    axis = np.linspace(-limit, limit, 300, dtype="float32")
    plane = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    probabilities = keras.ops.softmax(model.layers[-1](plane))
    sure = keras.ops.convert_to_numpy(probabilities)[:, :NUM_KNOWN].max(-1)
    ax.imshow(
        sure.reshape(len(axis), len(axis)),
        extent=(-limit, limit, -limit, limit),
        origin="lower",
        cmap=plt.matplotlib.colors.LinearSegmentedColormap.from_list(
            "doubt", ["#8d99a6", "white"]
        ),
        vmin=0.0,
        vmax=1.0,
    )
    colors = plt.get_cmap("tab10")
    for digit in range(NUM_KNOWN):
        points = embedded["known"][y == digit]
        ax.scatter(*points.T, s=14, color=colors(digit), alpha=0.7, lw=0)
    ax.scatter(
        *embedded["unknown digits"].T, s=16, marker="x", color="black", lw=0.9
    )
    ax.scatter(*embedded["noise"].T, s=16, marker="+", color="#d01c1c", lw=0.7)
    if kind == HALO:
        centers = keras.ops.convert_to_numpy(model.layers[-1].centroids)
        centers = centers - centers.mean(axis=0)
    else:
        centers = [
            embedded["known"][y == digit].mean(axis=0)
            for digit in range(NUM_KNOWN)
        ]
    for digit, center in enumerate(centers):
        ax.text(
            *center,
            str(digit),
            ha="center",
            va="center",
            fontweight="bold",
            bbox={
                "boxstyle": "circle",
                "facecolor": "white",
                "edgecolor": colors(digit),
                "linewidth": 2,
            },
        )
    ax.plot(0, 0, "*", color="gold", markersize=16, markeredgecolor="black")
    ax.set(xticks=[], yticks=[])


figure, axes = plt.subplots(1, 2, figsize=(12, 7))
data = load_data(SEEDS[0])
titles = {
    CROSS_ENTROPY: "Cross-entropy: sure almost everywhere",
    HALO: "HALO: in doubt at the origin, and far out",
}
for ax, (kind, title) in zip(axes, titles.items(), strict=True):
    draw_map(ax, kind, train(kind, SEEDS[0], data, in_a_plane=True), data)
    ax.set_title(title, fontsize=14, pad=10)

handles = [
    plt.Line2D([], [], marker="o", ls="", color="tab:green"),
    plt.Line2D([], [], marker="x", ls="", color="black"),
    plt.Line2D([], [], marker="+", ls="", color="#d01c1c"),
    plt.Line2D(
        [], [], marker="*", ls="", color="gold", mec="black", markersize=12
    ),
    plt.Rectangle((0, 0), 1, 1, facecolor="#8d99a6"),
    plt.Rectangle((0, 0), 1, 1, facecolor="white", edgecolor="grey"),
]
names = [
    "known digits 0 to 7 (unseen test images)",
    "unknown: digits 8 and 9",
    "unknown: noise",
    "origin of the embedding space",
    "model in doubt",
    "model sure of a digit",
]
figure.legend(handles, names, loc="lower center", ncols=3, frameon=False)
figure.tight_layout(rect=(0, 0.08, 1, 1))
figure.savefig(arguments.output, dpi=90)
print(f"\nThe figure is in {arguments.output}.")
