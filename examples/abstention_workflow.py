"""
Title: From training to monitoring: a classifier that may refuse
Author: The keras_halo authors
Date created: 2026/11/24
Last modified: 2026/11/24
Description: Train, calibrate, choose a threshold that holds, deploy, monitor.
Accelerator: None
"""

"""
## Introduction

A camera above a conveyor belt sorts small metal parts. Some pictures are too
noisy to tell, and now and then a part arrives that the machine has never seen.
Sorting it anyway is expensive; putting it aside for a person is cheap. So the
machine may answer "I don't know", and we want to give its owner a guarantee:

> Of the parts that it sorts, at most 3 % are sorted wrongly.

HALO gives every class a centroid in the space of embeddings and leaves the
origin to "I don't know". The distances tell how far an input is from what the
model knows. This example goes the whole way from there to that guarantee, into
production, and on to the day when the guarantee no longer holds.

## Setup
"""

import pathlib
import tempfile

import keras
import numpy as np
from keras import layers
from matplotlib import pyplot as plt

import keras_halo
from keras_halo import HALODense, HALOLoss, HALOSoftmax
from keras_halo.rejection import SelectiveRiskRule, load_rule

RISK = 0.03
EPOCHS = 20
PIXELS = 20

keras.utils.set_random_seed(0)
rng = np.random.default_rng(0)

"""
## Load the data

The parts are drawn here, so that there are as many as we like and the guarantee
can be checked: in real life data for a check are never left over. Five kinds
are known. Gears and crosses are foreign and appear in no training.
"""

KNOWN = ("washer", "hex nut", "square nut", "bolt", "pin")
FOREIGN = ("gear", "cross")


def box(x, y, width, height):
    return np.maximum(abs(x) / width, abs(y) / height)


def outline(kind, x, y):
    """A function of the plane that is below one inside of a part."""
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    corners = [x * np.cos(a) + y * np.sin(a) for a in np.pi / 3 * np.arange(3)]
    shapes = {
        "washer": radius / 0.62,
        "hex nut": np.max(np.abs(corners), axis=0) / 0.6,
        "square nut": box(x, y, 0.55, 0.55),
        "bolt": np.minimum(
            box(x, y + 0.45, 0.45, 0.2), box(x, y - 0.15, 0.17, 0.6)
        ),
        "pin": box(x, y, 0.17, 0.75),
        "gear": radius / (0.6 + 0.14 * np.sign(np.cos(6 * angle))),
        "cross": np.minimum(box(x, y, 0.2, 0.7), box(x, y, 0.7, 0.2)),
    }
    hole = 0.0 if kind in ("bolt", "pin", "cross") else 0.3
    return np.maximum(shapes[kind], 2.0 - radius / max(hole, 1e-3))


def photograph(kinds, light=1.0):
    """One noisy picture of a part of each of the kinds."""
    axis = np.linspace(-1.0, 1.0, PIXELS)
    pictures = np.empty((len(kinds), PIXELS, PIXELS, 1), "float32")
    for picture, kind in zip(pictures, kinds, strict=True):
        x, y = np.meshgrid(*(axis + rng.uniform(-0.15, 0.15, (2, 1))))
        turn, size = rng.uniform(0.0, 2.0 * np.pi), rng.uniform(0.9, 1.1)
        x, y = (
            (np.cos(turn) * x + np.sin(turn) * y) / size,
            (np.cos(turn) * y - np.sin(turn) * x) / size,
        )
        part = np.clip(10.0 * (1.0 - outline(kind, x, y)) + 0.5, 0.0, 1.0)
        brightness = light * rng.uniform(0.35, 1.0)
        noise = rng.normal(0.0, 0.15, part.shape)
        picture[..., 0] = brightness * part + noise
    return pictures


def make_parts(count, light=1.0):
    labels = rng.integers(0, len(KNOWN), count)
    return photograph([KNOWN[label] for label in labels], light), labels


x_train, y_train = make_parts(10000)
x_val, y_val = make_parts(1000)
x_test, y_test = make_parts(10000)
x_foreign = photograph(rng.choice(FOREIGN, 1000))

"""
## Build a model

An ordinary convnet, but for its last layer and its loss.
"""

model = keras.Sequential(
    [
        keras.Input((PIXELS, PIXELS, 1)),
        layers.Conv2D(16, 3, strides=2, padding="same", activation="relu"),
        layers.Conv2D(32, 3, strides=2, padding="same", activation="relu"),
        layers.Conv2D(64, 3, strides=2, padding="same", activation="relu"),
        layers.Flatten(),
        HALODense(len(KNOWN)),
    ]
)
model.compile(
    keras.optimizers.Adam(2e-3), HALOLoss(distill=False), metrics=["accuracy"]
)

"""
## Train
"""

model.fit(
    x_train,
    y_train,
    batch_size=64,
    epochs=EPOCHS,
    validation_data=(x_val, y_val),
    verbose=2,
)

"""
## Calibrate

`calibrate` refits two numbers of the head on data that training has not seen:
the temperature, such that the probabilities are right, and the bias of the
abstain class, such that P(abstain) is the probability that naming a class would
be a mistake. No decision between classes changes.
"""

print(keras_halo.calibrate(model, x_val, y_val, verbose=0))

"""
## Choose a threshold that keeps its guarantee

The score of an input is larger the less the model knows it. Inputs above a
threshold are refused. `SelectiveRiskRule` takes the largest threshold for which
a binomial test on calibration data *proves* the guarantee, with 95 %
confidence. It must see data that had no part in anything before.

Not every model can keep every guarantee. Then `fit` raises an error that says
how close it came. To ask for less on the same data would be to try until it
works, so every new guarantee gets fresh data.
"""

for risk in (RISK, 0.1, 0.3, 0.9):
    x_cal, y_cal = make_parts(5000)
    try:
        rule = SelectiveRiskRule(risk, delta=0.05)
        rule.fit(model.predict(x_cal, verbose=0), y_cal)
        break
    except ValueError as error:
        print(error)
print(rule.summary())

"""
## Evaluate

Does it hold on 10,000 parts that nobody has looked at? And what happens to
foreign parts, about which nothing was guaranteed?
"""


def error_rate(decisions, labels):
    wrong = decisions.labels != labels
    return wrong[decisions.accepted].mean() if decisions.coverage else 0.0


test = rule.predict(model.predict(x_test, verbose=0))
foreign = rule.predict(model.predict(x_foreign, verbose=0))
print(f"Known parts: {100 * test.coverage:.1f} % sorted, of these")
print(f"{100 * error_rate(test, y_test):.2f} % wrongly.")
print(f"Foreign parts: {100 * foreign.coverage:.1f} % sorted (all wrongly).")

"""
## Deploy

Model and rule are saved next to each other. The rule knows the head it was
fitted on and refuses the scores of another; its file carries a checksum.
"""

folder = pathlib.Path(tempfile.mkdtemp())
model.save(folder / "parts.keras")
rule.save(folder / "parts.json")

model = keras.saving.load_model(folder / "parts.keras")
rule = load_rule(folder / "parts.json")
again = rule.predict(model.predict(x_test, verbose=0))
assert np.array_equal(again.labels, test.labels)
print("Loaded:", rule.guarantee)

"""
Where there is no `keras_halo`, on a phone or in another language, the decision
can be a part of the model: plain probabilities of the classes, and by how much
the score exceeds the threshold. Refuse what is above zero. Such a model can be
exported like any other.
"""

scores = model.outputs[0]
score = keras_halo.layers.OODScore(rule.method)(scores)
deployed = keras.Model(
    model.inputs,
    {
        "probabilities": HALOSoftmax(abstain=False)(scores),
        "excess": layers.Rescaling(1.0, offset=-rule.threshold)(score),
    },
)
answers = deployed.predict(x_test, verbose=0)
same = (answers["excess"] <= 0.0) == test.accepted
print(f"Same decisions in the graph: {100 * same.mean():.2f} %.")

"""
## Monitor

The guarantee is about parts like those of the calibration. Nobody tells us the
true labels in production, but the share of refused parts costs nothing to
watch: on data like those of the calibration it stays within three standard
deviations of what it was there. When it leaves that band the world has changed,
and the guarantee is off until somebody has looked.

Forty days of 500 parts each. From day 16 on a supplier mixes in foreign parts,
more every day; from day 31 on, with the supplier gone, the lamp grows dim.
"""

PER_DAY, DAYS = 500, 40
calibrated = rule.predict(model.predict(x_cal, verbose=0))
expected = 1.0 - calibrated.coverage
spread = (expected * (1.0 - expected) * (1 / PER_DAY + 1 / len(x_cal))) ** 0.5
limits = expected - 3.0 * spread, expected + 3.0 * spread

refused, risks = [], []
for day in range(1, DAYS + 1):
    share_foreign = 0.02 * (day - 15) if 16 <= day <= 30 else 0.0
    light = 1.0 - 0.05 * (day - 30) if day > 30 else 1.0
    x_day, y_day = make_parts(PER_DAY, light)
    is_foreign = rng.random(PER_DAY) < share_foreign
    x_day[is_foreign] = photograph(rng.choice(FOREIGN, is_foreign.sum()))
    y_day[is_foreign] = len(KNOWN)
    decisions = rule.predict(model.predict(x_day, verbose=0))
    refused.append(1.0 - decisions.coverage)
    risks.append(error_rate(decisions, y_day))
refused, risks = np.array(refused), np.array(risks)
alarm = (refused < limits[0]) | (refused > limits[1])
for period in (range(1, 16), range(16, 31), range(31, 41)):
    days = [day for day in period if alarm[day - 1]]
    print(f"Days {period[0]} to {period[-1]}: alarm on {days or 'none'}")

"""
Above, what was refused and what was sorted; below, what the monitor saw, and
what it could not see.
"""

figure = plt.figure(figsize=(11, 8), layout="constrained")
top, middle, bottom = figure.subfigures(3, height_ratios=(1.1, 1.2, 1.0))
pictures = top.subplots(2, 10)
examples = np.concatenate([x_test[:14], x_foreign[:6]])
truth = [KNOWN[label] for label in y_test[:14]] + ["foreign"] * 6
decisions = rule.predict(model.predict(examples, verbose=0))
for ax, x, name, label in zip(
    pictures.flat, examples, truth, decisions.labels, strict=True
):
    ax.imshow(x[..., 0], cmap="gray", vmin=-0.3, vmax=1.2)
    answer = "refused" if label < 0 else KNOWN[label]
    color = {"refused": "tab:blue", name: "tab:green"}.get(answer, "tab:red")
    ax.set_title(answer, color=color, fontsize=10, fontweight="bold")
    ax.set_xlabel(name, fontsize=9)
    ax.set(xticks=[], yticks=[])
top.suptitle("The answer (above) and the truth (below)", fontsize=11)

days = np.arange(1, DAYS + 1)
for part, values in ((middle, refused), (bottom, risks)):
    ax = part.subplots()
    ax.axvspan(15.5, 30.5, color="tab:orange", alpha=0.12, lw=0)
    ax.axvspan(30.5, DAYS + 0.5, color="tab:purple", alpha=0.12, lw=0)
    ax.plot(days, 100 * values, "o-", color="tab:blue", ms=4)
    ax.set(xlim=(0.5, DAYS + 0.5), xlabel="day")
    if part is middle:
        ax.fill_between(
            (0.5, DAYS + 0.5),
            *(100 * limit for limit in limits),
            color="tab:green",
            alpha=0.25,
            lw=0,
            label="expected",
        )
        ax.plot(
            days[alarm],
            100 * values[alarm],
            "o",
            color="tab:red",
            label="alarm",
        )
        ax.set(ylabel="refused, %", title="What the monitor sees")
        ax.legend(loc="upper left")
        for start, name in ((16, "foreign parts"), (31, "dim lamp")):
            ax.text(start, ax.get_ylim()[0], f" {name}", va="bottom")
    else:
        ax.axhline(100 * rule.risk, color="black", ls="--", lw=1)
        ax.text(1, 100 * rule.risk, "guaranteed", va="bottom")
        ax.set(ylim=(0, None), ylabel="wrong among sorted, %")
        ax.set_title("What it cannot see")
figure.savefig("abstention_workflow.png", dpi=90)
print("The figure is in abstention_workflow.png.")

"""
## Conclusion

Three numbers came from data: temperature and bias of the head, and a threshold.
The threshold carries a guarantee that can be written into a contract, as long
as the world stays as it was, and the share of refusals tells when it does not.
Errors can rise before the alarm does: check labels of a few sorted parts
whenever it goes off.

Other guarantees are those of `CoverageRule` (how much is sorted),
`FalsePositiveRateRule` (how many foreign parts pass, from examples of them) and
`ConformalRule` (a p-value for every part). During training,
`keras_halo.OODMonitor` watches how well known and unknown inputs are told
apart.
"""
