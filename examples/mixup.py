"""
Title: Mixup with a head that can say "I don't know"
Author: The keras_halo authors
Date created: 2026/11/24
Last modified: 2026/11/24
Description: Train on blends of images with soft labels, then ask about blends.
Accelerator: None
"""

"""
## Introduction

Mixup trains a classifier on blends: two images are laid over each other, and
the label says how much of each there is, such as 70 % coat and 30 % sneaker.
It makes networks smoother between their classes. HALO gives each class a centre
and keeps the origin of the embedding space for one more answer, "I don't know".
What does a model that was taught to name blends say to things it never saw?

We train the same network with and without mixup and compare. `HALOLoss` takes
labels in any form: integers, one-hot, or soft as here.

## Setup
"""

import keras
import numpy as np
from keras import layers
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits

import keras_halo

NUM_CLASSES = 10

"""
## Load the data

Fashion-MNIST, 6,000 images of it. Where it cannot be downloaded, the digits
that ship with scikit-learn take its place, enlarged to the same size; figures
then differ. Unknown are images turned by a quarter, and noise.
"""


def load_data():
    try:
        train, test = keras.datasets.fashion_mnist.load_data()
        names = ["T-shirt", "trouser", "pullover", "dress", "coat"]
        names += ["sandal", "shirt", "sneaker", "bag", "ankle boot"]
        print("Data: Fashion-MNIST.")
        return train, test, names
    except Exception as error:
        print(f"Data: scikit-learn's digits, for want of a download: {error}")
        x, y = load_digits(return_X_y=True)
        x = np.kron(x.reshape(-1, 8, 8), np.ones((3, 3))) * (255 / 16)
        x = np.pad(x, ((0, 0), (2, 2), (2, 2)))
        names = [str(digit) for digit in range(10)]
        return (x[:1200], y[:1200]), (x[1200:], y[1200:]), names


(x_train, y_train), (x_test, y_test), class_names = load_data()
x_train, x_test = (
    x.astype("float32")[..., None] / 255.0
    for x in (x_train[:6000], x_test[:2000])
)
y_train, y_test = (
    keras.utils.to_categorical(y, NUM_CLASSES)
    for y in (y_train[:6000], y_test[:2000])
)
unknown = {
    "turned": np.rot90(x_test, axes=(1, 2)),
    "noise": np.random.default_rng(0).random((1000, 28, 28, 1), "float32"),
}

"""
A data set that blends each batch with a shuffled copy of itself. How much of
which image is drawn from a Beta distribution, anew for every image.
"""


class Mixup(keras.utils.PyDataset):
    def __init__(self, x, y, batch_size=64, alpha=0.2, **kwargs):
        super().__init__(**kwargs)
        self.x, self.y = x, y
        self.batch_size, self.alpha = batch_size, alpha
        self.rng = np.random.default_rng(0)
        self.on_epoch_end()

    def __len__(self):
        return -(-len(self.x) // self.batch_size)

    def on_epoch_end(self):
        self.order = self.rng.permutation(len(self.x))

    def __getitem__(self, index):
        start = index * self.batch_size
        first = self.order[start : start + self.batch_size]
        second = self.rng.permutation(first)
        share = self.rng.beta(self.alpha, self.alpha, len(first))
        return tuple(
            blend(values[first], values[second], share)
            for values in (self.x, self.y)
        )


def blend(first, second, share):
    """`share` of the first, the rest of the second, for each sample."""
    share = np.reshape(share, (-1,) + (1,) * (first.ndim - 1))
    return (share * first + (1.0 - share) * second).astype("float32")


"""
## Build a model

The loss is told the labels as they are; nothing else is needed for soft ones.
"""


def build_model():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(16, 5, strides=2, activation="relu"),
            layers.Conv2D(32, 5, strides=2, activation="relu"),
            layers.Flatten(),
            # was: layers.Dense(NUM_CLASSES, activation="softmax")
            keras_halo.HALODense(NUM_CLASSES),
        ]
    )
    model.compile(
        optimizer="adam",
        # was: loss="categorical_crossentropy"
        loss=keras_halo.HALOLoss(),
        metrics=["accuracy"],
    )
    return model


"""
## Train
"""

EPOCHS = 10

with_mixup = build_model()
with_mixup.fit(Mixup(x_train, y_train), epochs=EPOCHS, verbose=2)

without_mixup = build_model()
without_mixup.fit(x_train, y_train, batch_size=64, epochs=EPOCHS, verbose=2)

"""
## Evaluate

Abstaining counts as a wrong answer in the accuracy. `ECE` is the gap between
how sure the model is and how often it is right. AUROC is the chance that the
score of strangeness, `keras_halo.ood_score`, is larger for an unknown image
than for a known one: 50 % is guessing.
"""

models = {"with mixup": with_mixup, "without mixup": without_mixup}
reports = {
    name: keras_halo.evaluate_ood(
        model, (x_test, y_test), unknown, batch_size=500, verbose=0
    )
    for name, model in models.items()
}
print("%".ljust(20) + "".join(name.rjust(16) for name in reports))


def print_row(name, values):
    cells = "".join(f"{100 * value:16.1f}" for value in values)
    print(name.ljust(20) + cells)


known = [report.known for report in reports.values()]
print_row("accuracy", [result.accuracy for result in known])
print_row("ECE", [result.ece_renormalized for result in known])
print_row("abstained, known", [result.abstention_rate for result in known])
for name in unknown:
    results = [report[name] for report in reports.values()]
    print_row(f"abstained, {name}", [r.abstention_rate for r in results])
    print_row(f"AUROC, {name}", [result.auroc for result in results])

"""
And the blends themselves: 200 pairs of test images of different classes, from
all of the one to all of the other. The curves are means over the pairs.
"""

rng = np.random.default_rng(1)
first, second = rng.integers(0, len(x_test), (2, 1000))
labels = y_test.argmax(axis=-1)
differ = labels[first] != labels[second]
first, second = first[differ][:200], second[differ][:200]
shares = np.linspace(0.0, 1.0, 21)

figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
for ax, (title, model) in zip(axes, models.items(), strict=True):
    curves = {"first image": [], "second image": [], '"I don\'t know"': []}
    for share in shares:
        images = blend(x_test[first], x_test[second], np.full(200, share))
        answers = keras_halo.decode_predictions(model.predict_on_batch(images))
        pairs = np.arange(200)
        means = (
            answers.probabilities[pairs, labels[first]].mean(),
            answers.probabilities[pairs, labels[second]].mean(),
            answers.abstain_probability.mean(),
        )
        for curve, mean in zip(curves.values(), means, strict=True):
            curve.append(mean)
    colors = ("tab:blue", "tab:orange", "tab:red")
    for (name, curve), color in zip(curves.items(), colors, strict=True):
        ax.plot(shares, curve, color=color, label=name, linewidth=2)
    ax.plot([0, 1], [0, 1], ":", color="tab:blue", linewidth=1)
    ax.plot([0, 1], [1, 0], ":", color="tab:orange", linewidth=1)
    ax.set(title=title, xlabel="share of the first image")
    ax.set_ylim(-0.02, 1.02)
axes[0].set_ylabel("mean probability (dotted: the label)")
names = axes[0].get_legend_handles_labels()
figure.legend(*names, loc="upper center", ncols=3, frameon=False)
figure.tight_layout(rect=(0, 0, 1, 0.93))
figure.savefig("mixup.png", dpi=90)

"""
## Conclusion

Soft labels need no change to the loss. Whether mixup serves abstention is not
settled by one run: the table above tells what it did here. In the picture "I
don't know" is likeliest half way between two images. Training on blends does
not take that away: their soft labels pull such an embedding towards both
classes, and between two centroids is nearer to the origin than either.
"""
