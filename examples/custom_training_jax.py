"""
Title: HALO in a custom training loop in JAX
Author: The keras_halo authors
Date created: 2026/11/24
Last modified: 2026/11/24
Description: Packed scores, loss and metrics in a jitted, stateless train step.
Accelerator: None
"""

"""
## Introduction

A classifier trained with cross-entropy has to name a class, also for an input
that shows none. HALO replaces the last layer by distances to one centroid a
class, and leaves the origin of the embedding space to the answer "I don't
know". `model.fit` trains it like any Keras model; this example shows that a
loop of your own does, too. In JAX the step is a
pure function of the state, compiled as a whole: layers, losses and metrics have
stateless forms for it.

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

RUNS_HERE = keras.backend.backend() == "jax"
if RUNS_HERE:
    import jax
else:
    print(
        "This example is about JAX. Received: Keras with the backend "
        f"{keras.backend.backend()!r}. Set KERAS_BACKEND=jax to run it; "
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

`stateless_call` returns the output and what the layers updated, here the seed
of the dropout. Gradients are those of the trainable variables: centroids and
temperature of the head are among them.
"""


def loss_of(trainable, non_trainable, x, y):
    scores, non_trainable = model.stateless_call(
        trainable, non_trainable, x, training=True
    )
    return loss_fn(y, scores), (scores, non_trainable)


def train_step(state, x, y):
    trainable, non_trainable, optimizer_state, *metric_states = state
    gradient_of = jax.value_and_grad(loss_of, has_aux=True)
    (loss, (scores, non_trainable)), gradients = gradient_of(
        trainable, non_trainable, x, y
    )
    trainable, optimizer_state = optimizer.stateless_apply(
        optimizer_state, gradients, trainable
    )
    metric_states = [
        metric.stateless_update_state(variables, y, scores)
        for metric, variables in zip(metrics, metric_states, strict=True)
    ]
    return loss, (trainable, non_trainable, optimizer_state, *metric_states)


def values_of(variables):
    return [variable.value for variable in variables]


metrics = [accuracy, abstention]


def batches(x, y):
    order = rng.permutation(len(x))
    for start in range(0, len(x), BATCH_SIZE):
        chosen = order[start : start + BATCH_SIZE]
        yield x[chosen], y[chosen]


def report(epoch, loss, accuracy, abstention):
    if (epoch + 1) % 5 == 0:
        print(
            f"Epoch {epoch + 1}/{EPOCHS}: loss {loss:.3f}, "
            f"accuracy {accuracy:.3f}, abstained {abstention:.3f}"
        )


def train():
    optimizer.build(model.trainable_variables)
    # The compiled step may reuse the memory of the old state.
    step = jax.jit(train_step, donate_argnums=0)
    state = (
        values_of(model.trainable_variables),
        values_of(model.non_trainable_variables),
        values_of(optimizer.variables),
    )
    for epoch in range(EPOCHS):
        fresh = [metric.stateless_reset_state() for metric in metrics]
        state = (*state[:3], *fresh)
        losses = []
        for x, y in batches(x_train, y_train):
            loss, state = step(state, x, y)
            losses.append(loss)
        results = [
            float(metric.stateless_result(variables))
            for metric, variables in zip(metrics, state[3:], strict=True)
        ]
        report(epoch, np.mean(losses), *results)
    # The loop has worked on copies: put them back into the model.
    for variables, values in (
        (model.trainable_variables, state[0]),
        (model.non_trainable_variables, state[1]),
    ):
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)


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
    figure.savefig("custom_training_jax.png", dpi=90)
    print("The figure is in custom_training_jax.png.")


if RUNS_HERE:
    evaluate()

"""
## Conclusion

Nothing in the step is special to HALO: a head, a loss, two metrics. Whatever is
built on `jax.jit` and `jax.grad` works with them, also `jax.vmap` and sharding.
"""
