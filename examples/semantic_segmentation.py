"""
Title: Semantic segmentation with pixels that may be unknown
Author: The keras_halo authors
Date created: 2026/11/24
Last modified: 2026/11/24
Description: A HALO head on every pixel, with void labels, IoU, unknown objects.
Accelerator: None
"""

"""
## Introduction

A segmentation network names a class for every pixel, also where the picture
shows something that it has never seen. HALO gives every class a centroid in the
space of embeddings and reads class probabilities off the distances to them; the
origin of that space belongs to the answer "I don't know". Nothing about that is
limited to one answer a picture: `HALODense` takes inputs of any rank, so that a
map of embeddings, one for every pixel, becomes a map of answers.

The pictures here hold circles, squares and triangles. Those for testing hold
stars as well, which no training picture shows: their pixels should be refused.

## Setup
"""

import keras
import numpy as np
from keras import layers
from matplotlib import pyplot as plt

from keras_halo import HALODense, HALOLoss, decode_predictions, ood_score
from keras_halo.metrics import AbstentionRate, OnProbabilities, auroc

CLASSES = ("background", "circle", "square", "triangle")
STAR = len(CLASSES)
VOID = 255
PIXELS = 32
EPOCHS = 15

keras.utils.set_random_seed(0)
rng = np.random.default_rng(0)

"""
## Load the data

Colours say nothing about the shape. As in Pascal VOC, the pixels on the outline
of an object are void: whoever draws labels cannot say where they belong, and
they shall neither train nor count.
"""


def distance_to(shape, x, y):
    """A function of the plane that is below one inside of a shape."""
    if shape == "circle":
        return np.hypot(x, y)
    if shape == "square":
        return np.maximum(abs(x), abs(y)) / 0.9
    if shape == "triangle":
        return np.maximum(2.0 * y, np.sqrt(3.0) * abs(x) - y) / 1.2
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    return radius / (0.85 + 0.4 * np.cos(5.0 * angle))


def draw(num_pictures, shapes, objects=2):
    axis = np.arange(PIXELS)
    x_axis, y_axis = np.meshgrid(axis, axis)
    size = (num_pictures, PIXELS, PIXELS)
    pictures = np.empty((*size, 3), "float32")
    labels = np.zeros(size, "int32")
    for picture, label in zip(pictures, labels, strict=True):
        picture[:] = rng.uniform(0.0, 1.0, 3)
        for _ in range(objects):
            shape = rng.choice(shapes)
            radius = rng.uniform(6.0, 8.0)
            x = x_axis - rng.uniform(radius, PIXELS - radius)
            y = y_axis - rng.uniform(radius, PIXELS - radius)
            turn = rng.uniform(0.0, 2.0 * np.pi)
            x, y = (
                np.cos(turn) * x + np.sin(turn) * y,
                np.cos(turn) * y - np.sin(turn) * x,
            )
            excess = radius * (distance_to(shape, x / radius, y / radius) - 1)
            number = CLASSES.index(shape) if shape in CLASSES else STAR
            picture[excess < 0.0] = rng.uniform(0.0, 1.0, 3)
            label[excess < 0.7] = VOID
            label[excess < -0.7] = number
    pictures += rng.normal(0.0, 0.06, pictures.shape)
    return pictures, labels


x_train, y_train = draw(3000, CLASSES[1:])
x_val, y_val = draw(200, CLASSES[1:])
x_test, y_test = draw(500, (*CLASSES[1:], "star"))

"""
## Build a model

A small U-Net. Two lines differ from the usual one: `HALODense` in the place of
the last 1 x 1 convolution with its softmax, and the loss, which skips void
pixels with `ignore_class`.

Metrics that only look for the largest column, such as `"accuracy"`, can read
the output of `HALODense` as it is. `MeanIoU` counts columns, of which there are
more than classes: "I don't know", and three with the geometry that the loss
needs. `OnProbabilities` hands it what a softmax would have.
"""


def convolve(filters, x, **kwargs):
    x = layers.Conv2D(filters, 3, padding="same", use_bias=False, **kwargs)(x)
    return layers.ReLU()(layers.BatchNormalization()(x))


def merge(x, skipped):
    return layers.Concatenate()([layers.UpSampling2D()(x), skipped])


inputs = keras.Input((PIXELS, PIXELS, 3))
half = convolve(32, inputs, strides=2)
quarter = convolve(64, half, strides=2)
eighth = convolve(96, convolve(96, quarter, strides=2))
x = convolve(64, merge(eighth, quarter))
x = convolve(48, merge(x, half))
embeddings = layers.Conv2DTranspose(16, 4, strides=2, padding="same")(x)
model = keras.Model(inputs, HALODense(len(CLASSES))(embeddings))

model.compile(
    keras.optimizers.Adam(3e-3),
    HALOLoss(distill=False, ignore_class=VOID),
    metrics=[
        OnProbabilities(
            keras.metrics.MeanIoU(len(CLASSES), sparse_y_pred=False),
            ignore_class=VOID,
            name="iou",
        ),
        AbstentionRate(ignore_class=VOID, name="abstained"),
    ],
)

"""
## Train
"""

model.fit(
    x_train,
    y_train,
    batch_size=32,
    epochs=EPOCHS,
    validation_data=(x_val, y_val),
    verbose=2,
)

"""
## Evaluate

Every pixel has an answer, class or -1, and a score, which is larger the less
the model knows it. AUROC is the chance that a pixel of a star has a larger
score than a pixel of another object; half would be guessing.
"""

scores = model.predict(x_test, verbose=0)
answers = decode_predictions(scores).labels
unfamiliar = ood_score(scores)
is_star = y_test == STAR
is_object = (y_test > 0) & (y_test < STAR)
is_background = y_test == 0

for name, pixels in (
    ("background", is_background),
    ("known objects", is_object),
    ("stars", is_star),
):
    print(
        f"{name}: {100 * np.mean(answers[pixels] < 0):.1f} % refused, "
        f"{100 * np.mean(answers[pixels] == y_test[pixels]):.1f} % right"
    )
print(
    "AUROC of stars against known objects: "
    f"{100 * auroc(unfamiliar[is_object], unfamiliar[is_star]):.1f} %"
)

"""
A map of the score shows more than answers do: which object is doubtful, and
that the outlines of all of them are.
"""

figure, axes = plt.subplots(4, 5, figsize=(10, 8.6), layout="constrained")
colors = plt.matplotlib.colors.ListedColormap(
    ["black", "#d9d9d9", "#3f90da", "#e76300", "#832db6", "gold", "white"]
)
with_stars = np.flatnonzero(is_star.sum(axis=(1, 2)) > 100)[:5]
for column, index in zip(axes.T, with_stars, strict=True):
    truth = np.where(y_test[index] == VOID, STAR + 1, y_test[index])
    column[0].imshow(np.clip(x_test[index], 0.0, 1.0))
    for ax, labels in ((column[1], truth), (column[2], answers[index])):
        # One colour more on each side of the classes: abstained, star, void.
        ax.imshow(
            labels, cmap=colors, vmin=-1, vmax=STAR + 1, interpolation="nearest"
        )
    image = column[3].imshow(
        unfamiliar[index],
        cmap="magma",
        vmin=np.quantile(unfamiliar, 0.02),
        vmax=np.quantile(unfamiliar, 0.98),
    )
for ax, name in zip(
    axes[:, 0], ("picture", "truth", "answer", "score"), strict=True
):
    ax.set_ylabel(name, fontsize=12)
for ax in axes.flat:
    ax.set(xticks=[], yticks=[])
names = ("I don't know", *CLASSES, "star (unknown)", "void")
handles = [
    plt.Rectangle((0, 0), 1, 1, facecolor=color, edgecolor="grey")
    for color in colors.colors
]
figure.legend(handles, names, loc="outside lower center", ncols=7)
figure.colorbar(image, ax=axes[3], label="unknown →", ticks=[])
figure.savefig("semantic_segmentation.png", dpi=90)
print("The figure is in semantic_segmentation.png.")

"""
## Conclusion

The head is the same as for one answer a picture, and so are loss, metrics and
scores. Void pixels are skipped by `ignore_class`, in the loss as in the
metrics. What the model cannot name, it marks.
"""
