"""
Title: Fine-tuning a pretrained classifier into one that can abstain
Author: The keras_halo authors
Date created: 2026/11/24
Last modified: 2026/11/24
Description: Transfer learning as usual, then a head that keeps what was learnt.
Accelerator: None
"""

"""
## Introduction

Few models are trained from scratch. One takes a backbone that was trained on
other classes, puts a new softmax on it, trains that, and at last the whole with
a small learning rate. What comes out names one of the new classes for
everything, also for the classes that the backbone was pretrained on.

HALO replaces the softmax by distances to one centroid a class and leaves the
origin of the embedding space to the answer "I don't know". `convert_head` does
that to a classifier that is already trained: the new head starts from what the
old one knows, and a few epochs of fine-tuning do the rest. The way back to
plain probabilities is one layer.

Here a backbone that knows the digits 0 to 4 learns 5, 6 and 7 from 60 images
each. Then it is shown 0 to 4, which it once knew, and 8 and 9, which are new.

## Setup
"""

import keras
import numpy as np
from keras import layers
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits

import keras_halo
from keras_halo.metrics import auroc, fpr_at_recall

CLASSES = (5, 6, 7)
PER_CLASS = 60

keras.utils.set_random_seed(0)
rng = np.random.default_rng(0)

"""
## Load the data

1,797 digits of 8 x 8 pixels ship with scikit-learn. Labels of the new task
count from zero.
"""

digits = load_digits()
x = (digits.images[..., None] / 16.0).astype("float32")
y = digits.target

x_old, y_old = x[y < 5], y[y < 5]
chosen = [rng.permutation(np.flatnonzero(y == digit)) for digit in CLASSES]
train = np.concatenate([indices[:PER_CLASS] for indices in chosen])
test = np.concatenate([indices[PER_CLASS:] for indices in chosen])
x_train, y_train = x[train], y[train] - CLASSES[0]
x_test, y_test = x[test], y[test] - CLASSES[0]
unknown = {"0 to 4": x_old, "8 and 9": x[y > 7]}

"""
## Build a model

The pretrained one: a convnet with a softmax, trained on 0 to 4. In real life it
comes from `keras.applications` or a model hub.
"""

backbone = keras.Sequential(
    [
        keras.Input((8, 8, 1)),
        layers.Conv2D(32, 3, padding="same", activation="relu"),
        layers.MaxPooling2D(),
        layers.Conv2D(64, 3, padding="same", activation="relu"),
        layers.Flatten(),
        layers.Dense(32, activation="relu"),
    ],
    name="backbone",
)
pretrained = keras.Sequential([backbone, layers.Dense(5, activation="softmax")])
pretrained.compile(
    "adam", "sparse_categorical_crossentropy", metrics=["accuracy"]
)
pretrained.fit(x_old, y_old, epochs=10, verbose=2)

"""
## Train

Transfer learning as usual: the backbone frozen, a new softmax on top, then
everything with a small learning rate.
"""


def fit(model, loss, learning_rate, epochs):
    optimizer = keras.optimizers.Adam(learning_rate)
    model.compile(optimizer, loss, metrics=["accuracy"])
    model.fit(x_train, y_train, batch_size=16, epochs=epochs, verbose=2)


inputs = keras.Input((8, 8, 1))
outputs = layers.Dense(len(CLASSES), activation="softmax")(backbone(inputs))
classifier = keras.Model(inputs, outputs)
backbone.trainable = False
fit(classifier, "sparse_categorical_crossentropy", 3e-3, epochs=10)
backbone.trainable = True
fit(classifier, "sparse_categorical_crossentropy", 3e-4, epochs=10)

"""
Now the swap. One pass over the training images measures where the classes lie
in front of the last layer. A new `Dense` turns and scales that space such that
the classes become the unit Gaussians that HALO expects, around the origin, and
their means become the centroids. The converted model can abstain before it has
been trained at all.

It shares its layers with the classifier. To keep that, we convert a clone.
"""


def clone(model):
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    return copy


converted = keras_halo.convert_head(clone(classifier), x_train, y_train)

tuned = clone(converted)
fit(tuned, keras_halo.HALOLoss(distill=False), 3e-4, epochs=20)

"""
## Evaluate

A score that is larger for outliers comes with each model: one minus the largest
probability for the softmax, the log-odds of abstaining for
HALO. AUROC is the chance that an unknown digit scores above a known one; FPR@95
the share of unknown digits that pass when 95 % of the known ones do.
"""


def read(model, x):
    """Classes and outlier scores of a batch."""
    outputs = model.predict(x, verbose=0)
    if model is classifier:
        return outputs.argmax(axis=-1), 1.0 - outputs.max(axis=-1)
    best_class = keras_halo.decode_predictions(outputs).best_class
    return best_class, keras_halo.ood_score(outputs)


models = {"softmax": classifier, "converted": converted, "fine-tuned": tuned}
scores = {}
print(f"\n{'%':22}" + "".join(f"{name:>12}" for name in models))
figures = {"accuracy": []}
for name, model in models.items():
    classes, known = read(model, x_test)
    scores[name] = {"known": known}
    figures["accuracy"].append(np.mean(classes == y_test))
    for what, images in unknown.items():
        scores[name][what] = outliers = read(model, images)[1]
        for metric, value in (
            ("AUROC", auroc(known, outliers)),
            ("FPR@95", fpr_at_recall(known, outliers)),
        ):
            figures.setdefault(f"{metric}, {what}", []).append(value)
for name, values in figures.items():
    print(f"{name:22}" + "".join(f"{100 * value:12.1f}" for value in values))

"""
And back: `HALOSoftmax(abstain=False)` gives as many probabilities as the
classifier had, for code that expects them.
"""

probabilities = keras_halo.HALOSoftmax(abstain=False)(tuned.outputs[0])
plain = keras.Model(tuned.inputs, probabilities)
print("\nPlain probabilities of the first test images:")
print(plain.predict(x_test[:3], verbose=0).round(3))

"""
What the three models make of the same images. The line lets 95 % of the known
digits pass.
"""

figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
for ax, (name, sets) in zip(axes, scores.items(), strict=True):
    keras_halo.plots.score_histograms(
        sets["known"],
        {what: sets[what] for what in unknown},
        threshold=np.quantile(sets["known"], 0.95),
        ax=ax,
        num_bins=30,
    )
    ax.set_title(name)
figure.savefig("fine_tuning.png", dpi=90)
print("The figure is in fine_tuning.png.")

"""
## Conclusion

Everything of transfer learning stays as it is: frozen layers, small learning
rates, other people's backbones. `convert_head` comes at the end and costs one
pass over the data. Starting from scratch, put `HALODense` on the backbone
instead of `Dense` right away.
"""
