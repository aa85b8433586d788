"""
Title: Distilling "I don't know" into a small model
Author: The keras_halo authors
Date created: 2026/11/24
Last modified: 2026/11/24
Description: A HALO teacher, and students that learn from it when to abstain.
Accelerator: None
"""

"""
## Introduction

Knowledge distillation trains a small student on the probabilities of a large
teacher instead of on labels: how similar a 4 is to a 9 is worth knowing. A
teacher with a softmax has an opinion about everything, however, and passes that
on.

HALO gives every class a centroid in the space of embeddings, and the origin of
that space to one answer more, "I don't know". A teacher trained with it knows
K + 1 probabilities, and all of them can be taught, also on images that nobody
has labelled because they belong to no class. The student that learns them may
be any model, without HALO: a plain `Dense(K + 1)` that ends in a softmax.

## Setup
"""

import keras
import numpy as np
from keras import layers
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits

from keras_halo import HALODense, HALOLoss, HALOSoftmax
from keras_halo.metrics import auroc

NUM_KNOWN = 8
SEEDS = (0, 1, 2)
EPOCHS = 30

"""
## Load the data

1,797 digits of 8 x 8 pixels ship with scikit-learn. Known are 0 to 7. What is
taught on, beside the training images, needs no labels: images that blend two of
them, some of which show no digit at all.
"""


def load_data(seed):
    rng = np.random.default_rng(seed)
    digits = load_digits()
    x = (digits.images[..., None] / 16.0).astype("float32")
    y = digits.target
    known = rng.permutation(np.flatnonzero(y < NUM_KNOWN))
    train, test = known[:1000], known[1000:]
    share = rng.uniform(0.0, 1.0, (3000, 1, 1, 1)).astype("float32")
    first, second = (x[rng.choice(train, 3000)] for _ in range(2))
    return {
        "train": (x[train], y[train]),
        "test": (x[test], y[test]),
        "blends": share * first + (1.0 - share) * second,
        "unknown": x[y >= NUM_KNOWN],
    }


"""
## Build a model

The teacher is a convnet, the student a single hidden layer of 24 units.
"""


def build_teacher():
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, padding="same", activation="relu"),
            layers.Flatten(),
            HALODense(NUM_KNOWN),
        ]
    )


def build_student(*last):
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Flatten(),
            layers.Dense(24, activation="relu"),
            *last,
        ]
    )


def fit(name, model, loss, x, y, learning_rate=3e-3):
    print(name, flush=True)
    model.compile(keras.optimizers.Adam(learning_rate), loss)
    # As many steps for each, however many images there are.
    epochs = EPOCHS * 1000 // len(x)
    model.fit(x, y, batch_size=32, epochs=epochs, verbose=2)
    return model


"""
## Train

Three students of the same size. One learns from the labels, with a softmax, as
usual. One learns from the labels with HALO. The third has never seen a label:
it learns the teacher's K + 1 probabilities, on training images and on blends.

Keras's `CategoricalCrossentropy` against these probabilities is, up to a
constant, the Kullback-Leibler divergence from the teacher.
"""


def train(seed, data):
    keras.utils.set_random_seed(seed)
    x, y = data["train"]
    teacher = fit(
        "teacher", build_teacher(), HALOLoss(distill=False), x, y, 1e-3
    )
    models = {"teacher": keras.Sequential([teacher, HALOSoftmax()])}
    models["softmax"] = fit(
        "student, softmax",
        build_student(layers.Dense(NUM_KNOWN, activation="softmax")),
        "sparse_categorical_crossentropy",
        x,
        y,
    )
    student = fit(
        "student, HALO",
        build_student(HALODense(NUM_KNOWN)),
        HALOLoss(distill=False),
        x,
        y,
    )
    models["HALO"] = keras.Sequential([student, HALOSoftmax()])
    images = np.concatenate([x, data["blends"]])
    models["taught"] = fit(
        "student, taught",
        build_student(layers.Dense(NUM_KNOWN + 1, activation="softmax")),
        "categorical_crossentropy",
        images,
        models["teacher"].predict(images, verbose=0),
    )
    return models


"""
## Evaluate

Accuracy is that of the best class. AUROC is the chance that an 8 or a 9 scores
above a known digit. The score is P("I don't know"), and one minus the largest
probability for the softmax, which has no such answer. "Abstains" is how often
"I don't know" is the most probable of all answers.
"""


def read(model, x):
    probabilities = model.predict(x, verbose=0)
    classes = probabilities[:, :NUM_KNOWN]
    if probabilities.shape[-1] == NUM_KNOWN:
        score = 1.0 - classes.max(axis=-1)
        abstains = np.zeros(len(x), bool)
    else:
        score = probabilities[:, NUM_KNOWN]
        abstains = score > classes.max(axis=-1)
    return classes.argmax(axis=-1), score, abstains


def evaluate(model, data):
    x, y = data["test"]
    classes, known, on_known = read(model, x)
    _, unknown, on_unknown = read(model, data["unknown"])
    return {
        "weights": model.count_params(),
        "accuracy": np.mean(classes == y),
        "AUROC, 8 and 9": auroc(known, unknown),
        "abstains, 0 to 7": np.mean(on_known),
        "abstains, 8 and 9": np.mean(on_unknown),
    }


figures = {}
for seed in SEEDS:
    data = load_data(seed)
    models = train(seed, data)
    for name, model in models.items():
        figures.setdefault(name, []).append(evaluate(model, data))

print(f"\n{'%, mean ± std of ' + str(len(SEEDS)) + ' seeds':28}", end="")
print("".join(f"{name:>14}" for name in figures))
for name in figures["teacher"][0]:
    print(f"{name:28}", end="")
    for runs in figures.values():
        values = np.array([run[name] for run in runs])
        if name == "weights":
            cell = f"{values[0]:,}"
        else:
            values = 100.0 * values
            cell = f"{values.mean():.1f} ± {values.std(ddof=1):.1f}"
        print(f"{cell:>14}", end="")
    print()

"""
What the last teacher and its students say of a 3 that turns into a 5, step by
step. The images between are neither.
"""

x, y = data["test"]
start, end = x[y == 3][0], x[y == 5][0]
steps = np.linspace(0.0, 1.0, 41, dtype="float32")
path = np.stack([(1.0 - step) * start + step * end for step in steps])
figure = plt.figure(figsize=(13, 5), layout="constrained")
top, bottom = figure.subfigures(2, height_ratios=(1, 3.6))
for ax, image in zip(top.subplots(1, 9), path[::5], strict=True):
    ax.imshow(image[..., 0], cmap="gray_r", vmin=0, vmax=1)
    ax.set(xticks=[], yticks=[])
axes = bottom.subplots(1, 4, sharey=True)
for ax, (name, model) in zip(axes, models.items(), strict=True):
    probabilities = model.predict(path, verbose=0)
    others = np.delete(probabilities[:, :NUM_KNOWN], (3, 5), axis=1)
    for label, values, color in (
        ("3", probabilities[:, 3], "#3f90da"),
        ("5", probabilities[:, 5], "#e76300"),
        ("another digit", others.sum(axis=1), "#94a4a2"),
    ):
        ax.plot(steps, values, label=label, color=color, lw=2)
    if probabilities.shape[-1] > NUM_KNOWN:
        ax.fill_between(
            steps,
            probabilities[:, NUM_KNOWN],
            color="black",
            alpha=0.25,
            lw=0,
            label="I don't know",
        )
    ax.set(title=name, ylim=(0, 1), xlabel="share of the 5")
axes[0].set_ylabel("probability")
axes[0].legend()
figure.savefig("knowledge_distillation.png", dpi=80)
print("The figure is in knowledge_distillation.png.")

"""
## Conclusion

"I don't know" is one probability more, and can be taught like the others, to
any architecture. The teacher says where it applies: no unknown digit and no
label of "unknown" took part. What a student cannot learn this way is the
distance to centroids: its score is P("I don't know") alone.
"""
