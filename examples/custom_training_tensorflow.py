"""
Title: HALO in a custom training loop in TensorFlow
Author: The keras_halo authors
Date created: 2026/11/24
Last modified: 2026/11/24
Description: Packed scores, loss and metrics with GradientTape and tf.function.
Accelerator: None
"""

"""
## Introduction

A classifier trained with cross-entropy has to name a class, also for an input
that shows none. HALO replaces the last layer by distances to one centroid a
class, and leaves the origin of the embedding space to the answer "I don't
know". `model.fit` trains it like any Keras model; this example shows that a
loop of your own does, too. In TensorFlow the
step records a `GradientTape` and is compiled by `tf.function`; data come from
`tf.data`.

The small model below learns the handwritten digits 0 to 7, and is then shown
the digits 8 and 9, which it has never seen.

## Setup
"""

import keras
import numpy as np
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits

import keras_halo

NUM_KNOWN = 8
EPOCHS = 30
BATCH_SIZE = 50

RUNS_HERE = keras.backend.backend() == "tensorflow"
if RUNS_HERE:
    import tensorflow as tf
else:
    print(
        "This example is about TensorFlow. Received: Keras with the backend "
        f"{keras.backend.backend()!r}. Set KERAS_BACKEND=tensorflow to run it; "
        "there is nothing to do here."
    )

keras.utils.set_random_seed(0)

"""
## Load the data

1,797 digits of 8 x 8 pixels ship with scikit-learn.
"""

digits = load_digits()
x = (digits.images[..., None] / 16.0).astype("float32")
y = digits.target.astype("int32")
rng = np.random.default_rng(0)
known = rng.permutation(np.flatnonzero(y < NUM_KNOWN))
x_train, y_train = x[known[:1000]], y[known[:1000]]
x_test, y_test = x[known[1000:]], y[known[1000:]]
x_unknown = x[y >= NUM_KNOWN]

"""
## Build a model

`HALODense` is the last layer. It emits *packed scores*: a column for every
class, one for "I don't know", and five more with the geometry that the loss
needs. Nothing but the loss and the functions of `keras_halo` has to know.
"""

model = keras.Sequential(
    [
        keras.Input((8, 8, 1)),
        keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
        keras.layers.MaxPooling2D(),
        keras.layers.Conv2D(64, 3, padding="same", activation="relu"),
        keras.layers.Flatten(),
        keras.layers.Dropout(0.2),
        keras_halo.HALODense(NUM_KNOWN),
    ]
)
loss_fn = keras_halo.HALOLoss()
optimizer = keras.optimizers.Adam(1e-3)
accuracy = keras.metrics.SparseCategoricalAccuracy()
abstention = keras_halo.metrics.AbstentionRate()

"""
## Train

Centroids and temperature of the head are among `model.trainable_weights`.
"""


def train_step(x, y):
    with tf.GradientTape() as tape:
        scores = model(x, training=True)
        loss = loss_fn(y, scores)
    gradients = tape.gradient(loss, model.trainable_weights)
    optimizer.apply(gradients, model.trainable_weights)
    accuracy.update_state(y, scores)
    abstention.update_state(y, scores)
    return loss


def report(epoch, loss, accuracy, abstention):
    if (epoch + 1) % 5 == 0:
        print(
            f"Epoch {epoch + 1}/{EPOCHS}: loss {loss:.3f}, "
            f"accuracy {accuracy:.3f}, abstained {abstention:.3f}"
        )


def train():
    dataset = tf.data.Dataset.from_tensor_slices((x_train, y_train))
    dataset = dataset.shuffle(len(x_train)).batch(BATCH_SIZE)
    optimizer.build(model.trainable_weights)
    # Compiled once for every shape of batch.
    step = tf.function(train_step)
    for epoch in range(EPOCHS):
        accuracy.reset_state()
        abstention.reset_state()
        losses = [float(step(x, y)) for x, y in dataset]
        report(
            epoch,
            np.mean(losses),
            float(accuracy.result()),
            float(abstention.result()),
        )


if RUNS_HERE:
    train()

"""
## Evaluate

What the loop trained is an ordinary Keras model. Scores are larger for inputs
that the model does not know; AUROC is the chance that an unknown digit scores
above a known one. Without any threshold the model also abstains by itself,
where "I don't know" is its most probable answer.
"""


def evaluate():
    scores = model.predict(x_test, verbose=0)
    unknown_scores = model.predict(x_unknown, verbose=0)
    predictions = keras_halo.decode_predictions(scores)
    classes = predictions.best_class
    outliers = keras_halo.ood_score(unknown_scores)
    inliers = keras_halo.ood_score(scores)
    auroc = keras_halo.metrics.auroc(inliers, outliers)
    refused = keras_halo.decode_predictions(unknown_scores).abstained
    print(
        f"Accuracy on digits 0 to 7: {100 * np.mean(classes == y_test):.1f} %"
    )
    print(f"AUROC against 8 and 9: {100 * auroc:.1f} %")
    print(f"Abstained on 0 to 7: {100 * predictions.abstained.mean():.1f} %")
    print(f"Abstained on 8 and 9: {100 * refused.mean():.1f} %")
    draw(inliers, outliers)


def draw(inliers, outliers):
    figure, ax = plt.subplots(figsize=(8, 4.5), layout="constrained")
    keras_halo.plots.score_histograms(
        inliers,
        {"unknown: 8 and 9": outliers},
        threshold=np.quantile(inliers, 0.95),
        ax=ax,
    )
    ax.set_title("95 % of the known digits lie left of the line")
    figure.savefig("custom_training_tensorflow.png", dpi=90)
    print("The figure is in custom_training_tensorflow.png.")


if RUNS_HERE:
    evaluate()

"""
## Conclusion

Nothing in the step is special to HALO: a head, a loss, two metrics. What is
built on `tf.function` and `GradientTape`, such as `MirroredStrategy`, works
with them.
"""
