"""
Title: Imbalanced classification with class weights and "I don't know"
Author: The keras_halo authors
Date created: 2026/11/24
Last modified: 2026/11/24
Description: A rare class in a table, and rows that should not be there at all.
Accelerator: None
"""

"""
## Introduction

Fraud is rare, and so are breakdowns: one row in fifty here. Class weights make
the rare class count. A yes-or-no network ends in `Dense(1)` with a sigmoid, and
answers yes or no whatever it is fed: also when a column arrives in cents in
place of euros, or a form was left empty. HALO gives both classes a centre and
keeps the origin for a third answer, "I don't know". Its distances also tell
how strange a row is.

## Setup
"""

import keras
import numpy as np
from keras import layers
from matplotlib import pyplot as plt
from sklearn.datasets import make_classification

import keras_halo
from keras_halo.metrics import ProbabilityMetric

keras.utils.set_random_seed(0)

"""
## Load the data

Made by scikit-learn, since real frauds are not given away: 20 columns, 2 % of
the 30,000 rows positive. Labels have the shape `(N, 1)`, as in a table.
"""

x, y = make_classification(
    n_samples=30000,
    n_features=20,
    n_informative=10,
    n_redundant=5,
    n_clusters_per_class=2,
    weights=[0.98],
    flip_y=0.0,
    class_sep=1.5,
    random_state=0,
)
x, y = x.astype("float32"), y.astype("uint8")[:, None]
x_train, x_val, x_test = np.split(x, [18000, 24000])
y_train, y_val, y_test = np.split(y, [18000, 24000])

counts = np.bincount(y_train[:, 0])
print(f"Positive: {counts[1]} of {len(y_train)} rows to train with.")
weight_for_0, weight_for_1 = len(y_train) / (2.0 * counts)

mean, std = x_train.mean(axis=0), x_train.std(axis=0)

"""
Three kinds of rows that no label fits: a form left empty, one column in the
wrong unit, and columns that were sorted apart, each plausible by itself.
"""

rng = np.random.default_rng(0)
wrong_unit, sorted_apart = x_test.copy(), x_test.copy()
wrong_unit[np.arange(len(x_test)), rng.integers(0, 20, len(x_test))] *= 100.0
unknown = {
    "empty": np.zeros((500, 20), "float32"),
    "wrong unit": wrong_unit,
    "sorted apart": rng.permuted(sorted_apart, axis=0),
}
x_train, x_val, x_test = ((x - mean) / std for x in (x_train, x_val, x_test))
unknown = {name: (x - mean) / std for name, x in unknown.items()}

"""
## Build a model

For a yes-or-no question HALO needs two classes, each with its centre, so the
one sigmoid becomes `HALODense(2)`. Precision and recall ask for the
probability of "yes", which `ProbabilityMetric` hands to them.
"""

model = keras.Sequential(
    [
        keras.Input((20,)),
        layers.Dense(128, activation="relu"),
        layers.Dense(128, activation="relu"),
        layers.Dropout(0.3),
        # was: layers.Dense(1, activation="sigmoid")
        keras_halo.HALODense(2),
    ]
)
model.compile(
    keras.optimizers.Adam(1e-3),
    # was: loss="binary_crossentropy"
    loss=keras_halo.HALOLoss(),
    metrics=[
        # was: keras.metrics.Precision(name="precision"), and so on
        ProbabilityMetric(
            keras.metrics.Precision(name="precision"), class_id=1
        ),
        ProbabilityMetric(keras.metrics.Recall(name="recall"), class_id=1),
        ProbabilityMetric(keras.metrics.TruePositives(name="tp"), class_id=1),
        ProbabilityMetric(keras.metrics.FalsePositives(name="fp"), class_id=1),
    ],
)

"""
## Train with class weights
"""

model.fit(
    x_train,
    y_train,
    batch_size=256,
    epochs=15,
    validation_data=(x_val, y_val),
    class_weight={0: weight_for_0, 1: weight_for_1},
    verbose=2,
)

"""
## Evaluate
"""

results = model.evaluate(
    x_test, y_test, batch_size=2048, verbose=0, return_dict=True
)
for name, value in results.items():
    print(f"{name:10}{value:10.3f}")

"""
The probability of "yes" for a single row, given that it is answered at all:
`HALOSoftmax(abstain=False)` makes two columns of the scores, the second of
which is what the sigmoid used to give.
"""

probabilities = keras_halo.layers.HALOSoftmax(abstain=False)(
    model.predict_on_batch(x_test[:1])
)
probability = float(keras.ops.convert_to_numpy(probabilities)[0, 1])
# was: probability = model.predict(x_test[:1])[0][0]
print(f"The first row is positive with probability {probability:.1%}.")

"""
Now the rows that should not be there. `fitted` scores how far a row lies from
all that was seen in training; AUROC is the chance that such a row scores above
an ordinary one, and `passed` the share that slips through a threshold which 95
% of the ordinary rows pass.
"""

fitted = keras_halo.fit_class_gaussians(
    model, x_train, y_train, batch_size=6000, verbose=0
)
report = keras_halo.evaluate_ood(
    fitted,
    (x_test, y_test),
    unknown,
    method="fitted",
    batch_size=2000,
    verbose=0,
)
print(f"{'ordinary':14} abstained {report.known.abstention_rate:6.1%}")
for result in report.unknown:
    print(
        f"{result.name:14} abstained {result.abstention_rate:6.1%}"
        f"   AUROC {result.auroc:6.1%}"
        f"   passed {result.fpr95_known_positive:6.1%}"
    )

"""
Every row has a place in this picture: to the right what is positive, upwards
what is strange. A sigmoid knows only the axis from left to right.
"""

figure, axes = plt.subplots(1, 4, figsize=(14, 4.2), sharex=True, sharey=True)
scores = {"ordinary": x_test, **unknown}
threshold = np.quantile(report.known.scores, 0.95)
for ax, (name, rows) in zip(axes, scores.items(), strict=True):
    answer = fitted.predict_on_batch(rows)
    predictions = keras_halo.decode_predictions(answer["scores"])
    share = predictions.probabilities[:, 1] / predictions.probabilities.sum(-1)
    colors = np.full(len(rows), "tab:gray", dtype=object)
    if name == "ordinary":
        colors[y_test[:, 0] == 1] = "tab:red"
        ax.plot([], [], ".", color="tab:gray", label="negative")
        ax.plot([], [], ".", color="tab:red", label="positive")
        ax.legend(loc="upper center")
    # The rare ones are drawn last, on top.
    order = np.argsort(colors == "tab:red", kind="stable")
    ax.scatter(share[order], answer["ood"][order], s=6, c=colors[order])
    ax.axhline(threshold, color="black", linestyle="--", linewidth=1)
    ax.set_yscale("symlog", linthresh=100.0)
    ax.set(title=name, xlabel="probability of “positive”")
axes[0].set_ylabel("strangeness (dashed: 95 % of ordinary rows)")
figure.tight_layout()
figure.savefig("imbalanced_classification.png", dpi=90)

"""
## Conclusion

Class weights, uint8 labels and the metrics of a yes-or-no question carry over;
two outputs and `ProbabilityMetric` are the price. In return each answer comes
with a second number that tells whether the row should have been asked about.
It does not see everything: zeros are ordinary values in this table, so an empty
form passes. What is plausible as a whole must be refused by other means.
"""
