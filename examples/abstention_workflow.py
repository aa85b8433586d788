"""
Title: From a trained classifier to decisions on record
Author: The keras_halo authors
Date created: 2026/11/24
Last modified: 2026/11/29
Description: Guard a plain Keras classifier, log its decisions, notice a change.
Accelerator: None
"""

"""
## Introduction

A machine reads handwritten digits from 0 to 7. Its classifier was trained with
cross-entropy, so it names one of these digits whatever it is shown. We want
more from it:

- It says "I don't know" where an input is none of its digits, and it answers at
  least 90 % of those that are, with a guarantee.
- Model, decision and guarantee are one file.
- Every decision is on record and can be made again.
- Somebody is told when the inputs change.

## Setup
"""

import tempfile

import keras
import numpy as np
from keras import layers
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits

import keras_halo
from keras_halo.rejection import CoverageRule, DecisionLog, StreamMonitor

folder = tempfile.mkdtemp()
keras.utils.set_random_seed(0)
rng = np.random.default_rng(0)

"""
## Load the data

1,797 digits of 8 x 8 pixels, from UCI's repository, ship with scikit-learn.
The digits 8 and 9 take no part in training or calibration. They come later.
"""

images, y = load_digits(return_X_y=True)
x = images.reshape(-1, 8, 8, 1).astype("float32") / 16.0
known = rng.permutation(np.flatnonzero(y < 8))
unknown = rng.permutation(np.flatnonzero(y >= 8))
train, calibration, new = np.split(known, [700, 1070])

"""
## A trained classifier

Any functional or sequential Keras classifier will do. This one is a small
convnet with a softmax.
"""

model = keras.Sequential(
    [
        keras.Input((8, 8, 1)),
        layers.Conv2D(32, 3, padding="same", activation="relu"),
        layers.Conv2D(64, 3, strides=2, padding="same", activation="relu"),
        layers.Flatten(),
        layers.Dense(64, activation="relu"),
        layers.Dense(8, activation="softmax"),
    ]
)
model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
model.fit(x[train], y[train], epochs=20, verbose=2)

"""
## The answer "I don't know"

`add_abstention` gives it a HALO head, which reads the features of all blocks of
the network. The head compares them with one centroid for each class. What is
far from all centroids is unknown. One pass over the training data and a few
short epochs of the head are enough; the classifier itself stays as it is.
"""

abstaining = keras_halo.add_abstention(model, x[train], y[train], verbose=2)

"""
## A guarantee, and one file

A rule turns scores into decisions. `CoverageRule` fits its threshold on
calibration data, which training has not seen: with 95 % confidence it keeps at
least 90 % of the known digits to come. It also says what it does not guarantee.

`guard` puts the rule into the model. The guarded model answers with a label
(-1 for rejected), probabilities, a score and a p-value. Its file carries the
guarantee in words.
"""

scores = abstaining.predict(x[calibration], verbose=0)
rule = CoverageRule(0.9, delta=0.05).fit(scores, y[calibration])
print(rule.summary())
guarded = keras_halo.guard(abstaining, rule)
guarded.save(f"{folder}/digits.keras")

"""
## A card

The card tells those who rely on the model what is known of it: what was
measured, the guarantee and its limits, and what we add in our own words. What
nobody gives, the card calls "not given".
"""

report = keras_halo.evaluate_ood(
    abstaining, (x[new], y[new]), {"8 and 9": x[unknown]}, verbose=0
)
card = keras_halo.model_card(
    guarded,
    report,
    name="Digits from 0 to 7",
    intended_use="Shows how keras_halo works. Not for real mail.",
    data={"training": "700 digits of UCI's repository, chosen at random"},
)
card.save(f"{folder}/digits.md")
print(card.to_markdown())

"""
## In operation

Now the model comes from its file. Every day brings 20 digits that are new to
it. From the 13th day on about half of them are an 8 or a 9.

Every decision goes into the log, with the row of its input. The monitor sees
the scores and needs no labels. Over the whole stream, however long, it gives a
false alarm with a probability of at most 1 %.
"""

guarded = keras.saving.load_model(f"{folder}/digits.keras")
certificate = keras_halo.read_certificate(f"{folder}/digits.keras")
monitor = StreamMonitor(rule, false_alarm=0.01).fit(scores)
mixed = rng.permutation(np.concatenate([new[240:360], unknown[:120]]))
days = np.split(np.concatenate([new[:240], mixed]), 24)
labels, statuses = [], []
with DecisionLog(f"{folder}/decisions.jsonl", certificate) as log:
    for rows in days:
        answers = guarded.predict(x[rows], verbose=0)
        log.append(answers, references=rows)
        labels.append(answers["label"])
        statuses.append(monitor.update(answers))
print(statuses[-1])

"""
## Replay

Months later somebody asks whether the machine really decided so. The log is
replayed with the file and the data that it refers to. In a shell:
`python -m keras_halo replay decisions.jsonl digits.keras data.npz`.
"""

print(keras_halo.replay(f"{folder}/decisions.jsonl", guarded, x))

"""
## What happened

Above are the answers of the last day: right ones in green, wrong ones in red,
rejected inputs in blue. In the middle is the share rejected on each day, and
below the evidence of the monitor that the inputs have changed.
"""

figure = plt.figure(figsize=(9, 8), layout="constrained")
top, bottom = figure.subfigures(2, height_ratios=(1, 2.2))
axes = top.subplots(2, 10).flat
for ax, row, label in zip(axes, rows, labels[-1], strict=True):
    ax.imshow(x[row, ..., 0], cmap="gray_r")
    color = {-1: "tab:blue", y[row]: "tab:green"}.get(label, "tab:red")
    ax.set_title("?" if label < 0 else label, color=color, fontweight="bold")
    ax.set(xticks=[], yticks=[])
top.suptitle("The last day: the answer above each input")

middle, below = bottom.subplots(2, 1)
rejected = [100 * np.mean(day < 0) for day in labels]
middle.bar(np.arange(1, 25), rejected)
middle.axvline(12.5, color="black", lw=1, ls=":")
middle.text(12.7, 90, "from here on with 8 and 9", va="top")
middle.set(xlabel="day", ylabel="rejected, %", ylim=(0, 100))
keras_halo.plots.stream_evidence(statuses, ax=below)
below.axvline(240, color="black", lw=1, ls=":")
figure.savefig("abstention_workflow.png", dpi=90)
print("The figure is in abstention_workflow.png.")

"""
## Conclusion

A classifier that already existed now rejects most of what it has never learned,
keeps a stated share of what it knows, and leaves a record. The guarantee holds
as long as inputs are drawn as the calibration data were. The monitor tells when
they no longer are, and the card says both.

`CoverageRule` does not guarantee that the accepted answers are right.
`SelectiveRiskRule` bounds their error rate, `FalsePositiveRateRule` the share
of accepted outliers of a kind that you have, and `ConformalRule` gives every
input a p-value. The page "For safety cases" of the documentation says what each
part contributes where a system has to be justified to others.
"""
