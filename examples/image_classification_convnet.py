"""
Title: Image classification with a convnet that can say "I don't know"
Author: The keras_halo authors
Date created: 2026/11/24
Last modified: 2026/11/24
Description: A simple convnet for clothes, which abstains on what it never saw.
Accelerator: None
"""

"""
## Introduction

This is the example that most people run first, a small convnet, with its last
layer and its loss exchanged. A network that ends in a softmax has to name one
of its classes, and does so with confidence for a picture of anything. HALO
keeps one more answer: each class has a learned centre, the network places an
image near one of them, and what falls near the origin instead, where no class
lives, is answered with "I don't know". No example of the unknown is needed for
training.

## Setup
"""

import keras
import numpy as np
from keras import layers
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits

import keras_halo

keras.utils.set_random_seed(0)

"""
## Load the data

Fashion-MNIST: 28 x 28 pixels in grey, ten kinds of clothing. The model learns
the first eight from 9,000 images; bags and ankle boots are left out, to have
something unknown at the end. Where the data set cannot be downloaded, the 1,797
digits that ship with scikit-learn take its place, enlarged to the same size,
with 8 and 9 left out; figures then differ.
"""

NUM_CLASSES = 8


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
    x.astype("float32")[..., None] / 255.0 for x in (x_train, x_test)
)
known = y_train < NUM_CLASSES
x_train, y_train = x_train[known][:10000], y_train[known][:10000]
(x_val, x_train), (y_val, y_train) = (
    np.split(values, [len(values) // 10]) for values in (x_train, y_train)
)
known = y_test < NUM_CLASSES
rng = np.random.default_rng(0)
unknown = {
    class_names[8]: x_test[y_test == 8],
    class_names[9]: x_test[y_test == 9],
    "noise": rng.random((1000, 28, 28, 1), "float32"),
}
x_test, y_test = x_test[known], y_test[known]
print(len(x_train), "images to train with,", len(x_test), "to test with.")

"""
## Build a model

Two lines differ from the usual convnet: the last layer and the loss.
"""

model = keras.Sequential(
    [
        keras.Input((28, 28, 1)),
        layers.Conv2D(32, 3, activation="relu"),
        layers.MaxPooling2D(),
        layers.Conv2D(64, 3, activation="relu"),
        layers.MaxPooling2D(),
        layers.Flatten(),
        layers.Dropout(0.5),
        # was: layers.Dense(NUM_CLASSES, activation="softmax")
        keras_halo.HALODense(NUM_CLASSES),
    ]
)
model.summary()
model.compile(
    optimizer="adam",
    # was: loss="sparse_categorical_crossentropy"
    loss=keras_halo.HALOLoss(),
    metrics=["accuracy"],
)

"""
## Train
"""

model.fit(
    x_train,
    y_train,
    batch_size=64,
    epochs=6,
    validation_data=(x_val, y_val),
    verbose=2,
)

"""
## Evaluate

As ever, `evaluate` gives loss and accuracy. An abstention counts as wrong.
"""

score = model.evaluate(x_test, y_test, verbose=0)
print("Test loss:", score[0])
print("Test accuracy:", score[1])

"""
Now the unknown images. The model abstains where that is the most probable
answer. It also has a score, larger the stranger an image is: the log-odds of
abstaining, read off a prediction alone. `fitted` has looked once more at the
training images, to learn how far each class extends in which direction.
AUROC is the chance that an
unknown image scores above a known one: 50 % is guessing.
"""

fitted = keras_halo.fit_class_gaussians(
    model, x_train, y_train, batch_size=2500, verbose=0
)
reports = {
    method: keras_halo.evaluate_ood(
        fitted,
        (x_test, y_test),
        unknown,
        method=method,
        batch_size=500,
        verbose=0,
    )
    for method in ("abstain", "fitted")
}
known_result = reports["abstain"].known
print(f"{'%':12}{'abstained':>10}{'AUROC':>13}{'AUROC fitted':>14}")
print(f"{'known':12}{100 * known_result.abstention_rate:10.1f}")
for name in unknown:
    odds, by_fit = (report[name] for report in reports.values())
    print(
        f"{name:12}{100 * odds.abstention_rate:10.1f}"
        f"{100 * odds.auroc:13.1f}{100 * by_fit.auroc:14.1f}"
    )

"""
A threshold makes a decision of the score. This one lets 95 % of the validation
images pass; what lies above it is refused, whatever class it resembles. In each
row are the first eight images of a set, none of them chosen.
"""

threshold = np.quantile(fitted.predict(x_val, 500, verbose=0)["ood"], 0.95)
rows = {"known": x_test, **unknown}
figure, axes = plt.subplots(len(rows), 8, figsize=(12, 7.4))
for row, (name, images) in zip(axes, rows.items(), strict=True):
    answer = fitted.predict_on_batch(images[:8])
    predictions = keras_halo.decode_predictions(answer["scores"])
    refused = predictions.abstained | (answer["ood"] > threshold)
    share = predictions.probabilities.max(axis=-1)
    row[0].set_ylabel(name, fontsize=12, fontweight="bold")
    for i, ax in enumerate(row):
        ax.imshow(images[i, ..., 0], cmap="gray_r")
        label = class_names[predictions.labels[i]]
        ax.set_title(
            "I don't know" if refused[i] else f"{label}\n{share[i]:.0%}",
            fontsize=10,
            color="tab:red" if refused[i] else "black",
        )
        ax.set(xticks=[], yticks=[])
figure.tight_layout()
figure.savefig("image_classification_convnet.png", dpi=90)

"""
## Conclusion

Training loop, labels and metrics stayed what they were. New are the two answers
to a strange image. The model may abstain by itself, which costs nothing: that
catches what lies between the classes and the origin, and misses what lands far
out. And its score tells how strange the image is; the fitted one needs a pass
over the training images and a threshold, and was the sharper here. Neither is
magic: an ankle boot that looks like a sneaker is still called one, and a nine
that looks like a three is a three.
"""
