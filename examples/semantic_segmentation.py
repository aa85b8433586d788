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

The pictures here are aerial views, made on the spot: water, forest, fields and
towns. Those for testing hold solar farms as well, which no training picture
shows: their pixels should be refused.

## Setup
"""

import keras
import numpy as np
from keras import layers
from matplotlib import pyplot as plt

import keras_halo
from keras_halo import HALODense, HALOLoss
from keras_halo.metrics import AbstentionRate, ProbabilityMetric, auroc

CLASSES = ("water", "forest", "field", "town")
SOLAR = len(CLASSES)
VOID = 255
PIXELS = 32
EPOCHS = 8

keras.utils.set_random_seed(0)
rng = np.random.default_rng(0)

"""
## Load the data

Every picture is divided into areas of one colour and texture. As in Pascal VOC,
the pixels along a border are void: whoever draws labels cannot say where they
belong, and they shall neither train nor count.
"""

COLORS = {
    "water": (0.25, 0.45, 0.65),
    "forest": (0.2, 0.4, 0.25),
    "field": (0.6, 0.6, 0.3),
    "town": (0.55, 0.5, 0.5),
    "solar": (0.35, 0.4, 0.55),
}


def texture(kind):
    """Brightness of an area that fills the whole picture."""
    x, y = np.meshgrid(np.arange(PIXELS), np.arange(PIXELS))
    angle, phase = rng.uniform(0.0, np.pi), rng.uniform(0.0, 6.0)
    along = np.cos(angle) * x + np.sin(angle) * y + phase
    across = np.cos(angle) * y - np.sin(angle) * x + phase
    if kind == "water":
        return 0.05 * np.sin(along / 1.5)
    if kind == "forest":
        return rng.uniform(-0.2, 0.2, x.shape)
    if kind == "field":
        return 0.12 * np.sign(np.sin(along * 1.6))
    if kind == "town":
        return 0.2 * np.sign(np.sin(along) * np.sin(across))
    # Panels in rows, with paths between them.
    return np.where((along % 4.0 < 1.2) | (across % 7.0 < 1.2), 0.25, -0.15)


def draw(num_pictures, kinds, areas=5):
    size = (num_pictures, PIXELS, PIXELS)
    pictures = np.empty((*size, 3), "float32")
    labels = np.empty(size, "int32")
    pixels = np.stack(np.meshgrid(*2 * [np.arange(PIXELS)]), axis=-1)
    for picture, label in zip(pictures, labels, strict=True):
        centers = rng.uniform(0.0, PIXELS, (areas, 1, 1, 2))
        distances = np.linalg.norm(pixels - centers, axis=-1)
        nearest = distances.argmin(axis=0)
        for area, kind in enumerate(rng.choice(kinds, areas)):
            color = COLORS[kind] + rng.normal(0.0, 0.06, 3)
            inside = nearest == area
            picture[inside] = (color + texture(kind)[..., None])[inside]
            label[inside] = CLASSES.index(kind) if kind in CLASSES else SOLAR
        first, second = np.sort(distances, axis=0)[:2]
        label[second - first < 1.5] = VOID
    pictures += rng.normal(0.0, 0.05, pictures.shape)
    return pictures, labels


x_train, y_train = draw(1000, CLASSES)
x_val, y_val = draw(200, CLASSES)
x_test, y_test = draw(500, (*CLASSES, "solar"))

"""
## Build a model

A small U-Net. Two lines differ from the usual one: `HALODense` in the place of
the last 1 x 1 convolution with its softmax, and the loss, which skips void
pixels with `ignore_class`.

Metrics that only look for the largest column, such as `"accuracy"`, can read
the output of `HALODense` as it is. `MeanIoU` counts columns, of which there are
more than classes: "I don't know", and five with the geometry that the loss
needs. `ProbabilityMetric` hands it what a softmax would have.
"""


def convolve(filters, x, **kwargs):
    x = layers.Conv2D(filters, 3, padding="same", use_bias=False, **kwargs)(x)
    return layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))


def merge(x, skipped):
    return layers.Concatenate()([layers.UpSampling2D()(x), skipped])


inputs = keras.Input((PIXELS, PIXELS, 3))
full = convolve(12, inputs)
half = convolve(24, full, strides=2)
quarter = convolve(32, convolve(32, half, strides=2))
x = convolve(24, merge(quarter, half))
x = convolve(16, merge(x, full))
embeddings = layers.Conv2D(16, 1, name="embedding")(x)
model = keras.Model(inputs, HALODense(len(CLASSES), None)(embeddings))

model.compile(
    keras.optimizers.Adam(3e-3),
    HALOLoss(distill=False, ignore_class=VOID),
    metrics=[
        ProbabilityMetric(
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
## Measure what is familiar

The loss makes every class a ball around its centroid. Where a few features are
enough to tell the classes apart, the embeddings of a class fill much less than
that ball, and what is new can hide in the rest of it. `ClassGaussians` measures
the room that they really take, in one pass over training data, and becomes a
part of the model. Void pixels have no class and are left out. (Where no label
is void, `keras_halo.fit_class_gaussians` does all of this in one call.)
"""

gaussians = keras_halo.layers.ClassGaussians(len(CLASSES))
fitted = keras.Model(
    inputs,
    {"scores": model.output, "ood": gaussians(embeddings, model.output)},
)
embedder = keras.Model(inputs, embeddings)
has_class = y_train != VOID
gaussians.adapt(
    embedder.predict(x_train, verbose=0)[has_class], y_train[has_class]
)

"""
## Evaluate

Every pixel has a score, which is larger the less the model knows it. Refused is
what scores above a threshold: `CoverageRule` fits the one that lets 95 % of the
pixels of validation pictures pass.
"""


def read(x):
    """Classes of pixels, and two scores: of the head, of the Gaussians."""
    outputs = fitted.predict(x, verbose=0)
    scores = outputs["scores"]
    best_class = keras_halo.decode_predictions(scores).best_class
    return best_class, keras_halo.ood_score(scores), outputs["ood"]


_, _, familiar = read(x_val)
rule = keras_halo.rejection.CoverageRule(0.95, method=None)
rule.fit(familiar[y_val != VOID])

classes, odds, unfamiliar = read(x_test)
answers = np.where(rule.predict(unfamiliar).accepted, classes, -1)
is_solar = y_test == SOLAR
is_known = y_test < SOLAR

for number, name in enumerate((*CLASSES, "solar farm")):
    pixels = y_test == number
    print(
        f"{name:12}{100 * np.mean(answers[pixels] == number):5.1f} % right, "
        f"{100 * np.mean(answers[pixels] < 0):5.1f} % refused"
    )

"""
AUROC, the chance that a pixel of a solar farm has a larger score than a pixel
of another area, for the score of the Gaussians and for the log-odds of the
head, which needs no pass over training data:
"""

for name, score in (
    ("Gaussians", unfamiliar),
    ("log-odds", odds),
):
    print(f"{name:12}{100 * auroc(score[is_known], score[is_solar]):5.1f} %")

"""
A map of the score shows more than the answers do: which area is doubtful, and
that borders are.
"""

figure, axes = plt.subplots(4, 5, figsize=(10, 8.6), layout="constrained")
names = ("I don't know", *CLASSES, "solar farm (unknown)", "void")
colors = ("black", "#3f90da", "#1b7a3a", "#e8d26a", "#a96b59", "#e76300", "w")
palette = plt.matplotlib.colors.ListedColormap(colors)
with_solar = np.flatnonzero(is_solar.sum(axis=(1, 2)) > 150)[:5]
for column, index in zip(axes.T, with_solar, strict=True):
    # One colour on either side of the classes: abstained, void.
    truth = np.minimum(y_test[index], SOLAR + 1)
    column[0].imshow(np.clip(x_test[index], 0.0, 1.0))
    for ax, labels in ((column[1], truth), (column[2], answers[index])):
        ax.imshow(labels, palette, vmin=-1, vmax=SOLAR + 1)
    image = column[3].imshow(
        unfamiliar[index],
        cmap="magma",
        vmin=unfamiliar.min(),
        vmax=np.quantile(unfamiliar, 0.95),
    )
rows = ("picture", "truth", "answer", "score")
for ax, name in zip(axes[:, 0], rows, strict=True):
    ax.set_ylabel(name, fontsize=12)
for ax in axes.flat:
    ax.set(xticks=[], yticks=[])
handles = [
    plt.Rectangle((0, 0), 1, 1, facecolor=color, edgecolor="grey")
    for color in colors
]
figure.legend(handles, names, loc="outside lower center", ncols=7)
figure.colorbar(image, ax=axes[3], label="unknown →", ticks=[])
figure.savefig("semantic_segmentation.png", dpi=90)
print("The figure is in semantic_segmentation.png.")

"""
## Conclusion

The head is the same as for one answer a picture, and so are loss, metrics and
scores. Void pixels are skipped by `ignore_class`, in the loss as in the
metrics. A threshold on the score of a pixel marks what the model cannot name.
"""
