"""
Title: Intent classification with out-of-scope queries
Author: The keras_halo authors
Date created: 2026/11/29
Last modified: 2026/11/29
Description: An assistant that asks back when it does not know what you want.
Accelerator: None
"""

"""
## Introduction

An assistant sorts queries into intents: book a flight, pay a bill, tell a joke.
Some queries ask for what it cannot do. A softmax names an intent all the
same, and the assistant does something that nobody wanted.

Here the same network is trained on the 150 intents of CLINC150, once with
`Dense` and cross-entropy and once with `HALODense` and `HALOLoss`. Both are
then shown 1,000 real queries that belong to none of the intents. No such query
is used in training. At the end the assistant answers "I don't know, did you
mean …?".

## Setup
"""

import argparse
import gzip
import json
import os
import pathlib
import sys

import keras
import numpy as np
from keras import layers
from matplotlib import pyplot as plt
from scipy.optimize import minimize_scalar
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import roc_curve
from sklearn.pipeline import make_pipeline, make_union

import keras_halo
from keras_halo import HALODense, HALOLoss
from keras_halo.metrics import (
    auroc,
    expected_calibration_error,
    negative_log_likelihood,
)
from keras_halo.rejection import CoverageRule

DATA_FILE = "clinc150.json.gz"
EPOCHS = 25
SEEDS = (0, 1, 2)
CROSS_ENTROPY, HALO = "cross-entropy", "HALO"

parser = argparse.ArgumentParser(
    description="Trains a classifier of intents both ways on CLINC150."
)
parser.add_argument(
    "--data",
    default=os.environ.get("KERAS_HALO_DATA") or DATA_FILE,
    help=f"{DATA_FILE} or a folder that holds it; default: $KERAS_HALO_DATA",
)
# A notebook is started with arguments of its own.
arguments, _ = parser.parse_known_args()
data_file = pathlib.Path(arguments.data)
if data_file.is_dir():
    data_file = min(data_file.rglob(DATA_FILE), default=data_file / DATA_FILE)
if not data_file.is_file():
    sys.exit(
        f"There is no file {data_file}.\n"
        "This example needs CLINC150 (Larson et al., 2019; CC BY 3.0). It is "
        "data_full.json in the\nfolder data of "
        "https://github.com/clinc/oos-eval. Pass its path:\n"
        "    python intent_classification.py --data data_full.json\n"
        f"or compress it to {DATA_FILE} and set KERAS_HALO_DATA to its folder."
    )

"""
## Load the data

The file holds lists of pairs of a query and its intent: 15,000 queries to train
with, 3,000 for validation, 4,500 to test with, and 1,000 out-of-scope queries.
"""

opener = gzip.open if data_file.suffix == ".gz" else open
with opener(data_file, "rt", encoding="utf-8") as file:
    queries = json.load(file)
missing = {"train", "val", "test", "oos_test"} - queries.keys()
if missing:
    sys.exit(
        f"{data_file} must hold the lists train, val, test and oos_test, as "
        f"CLINC150 does. Missing: {', '.join(sorted(missing))}."
    )
intents = sorted({intent for _, intent in queries["train"]})
texts = {name: [text for text, _ in pairs] for name, pairs in queries.items()}
labels = {
    name: np.array([intents.index(intent) for _, intent in queries[name]])
    for name in ("train", "val", "test")
}

"""
Words, pairs of words and pieces of words are counted, weighted by how rare they
are, and reduced to 300 numbers.
"""

features = make_pipeline(
    make_union(
        TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True),
        TfidfVectorizer(
            analyzer="char_wb", ngram_range=(2, 5), min_df=3, sublinear_tf=True
        ),
    ),
    TruncatedSVD(300, random_state=0),
)
features.fit(texts["train"])
# Components of unit vectors are small; a network expects about one.
x = {
    name: (10.0 * features.transform(texts[name])).astype("float32")
    for name in ("train", "val", "test", "oos_test")
}

"""
## Build a model

One hidden layer. The last layer and the loss are the two lines that differ.
"""


def build_model(kind):
    inputs = keras.Input((300,))
    hidden = layers.Dense(512, activation="relu")(inputs)
    hidden = layers.Dropout(0.5)(hidden)
    if kind == HALO:
        outputs = HALODense(len(intents))(hidden)
        loss = HALOLoss()
    else:
        outputs = layers.Dense(len(intents))(hidden)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model = keras.Model(inputs, outputs)
    steps = EPOCHS * -(-len(x["train"]) // 128)
    rate = keras.optimizers.schedules.CosineDecay(2e-3, steps)
    model.compile(keras.optimizers.Adam(rate), loss)
    return model


"""
## Train
"""


def train(kind, seed):
    keras.utils.set_random_seed(seed)
    model = build_model(kind)
    model.fit(
        x["train"], labels["train"], batch_size=128, epochs=EPOCHS, verbose=0
    )
    return model


"""
## Evaluate

Scores are larger for outliers. The default score of cross-entropy is one minus
the largest probability, that of HALO the log-odds of "I don't know". Other
scores cost as little, so the best of them is shown below each default. It is
chosen on the very queries that it is measured on, to its advantage. AUROC is
the chance that an out-of-scope query scores above one in scope.

A `CoverageRule` sets the threshold on validation queries so that 95 % of the
queries in scope are answered. ECE is the calibration error of the probabilities
of the intents, as they come and after one temperature was fitted to the
validation queries.
"""


def read_logits(logits):
    """Probabilities and outlier scores of a softmax, the default one first."""
    logits = logits.astype("float64")
    top = logits.max(axis=-1)
    exponentials = np.exp(logits - top[:, None])
    # One minus the largest probability would round to zero.
    others = np.sort(exponentials, axis=-1)[:, :-1].sum(axis=-1)
    p = exponentials / (1.0 + others)[:, None]
    return p, {
        "max softmax": others / (1.0 + others),
        "energy": -top - np.log1p(others),
        "max_logit": -top,
        "gen": np.sum((p * (1.0 - p)) ** 0.1, axis=-1),
    }


def read_packed(packed):
    """The same of a HALO model."""
    p = keras_halo.HALOSoftmax(abstain=False)(packed)
    names = ("abstain", "gap", "gen", "max_logit", "max_probability")
    return keras.ops.convert_to_numpy(p), {
        name: keras_halo.ood_score(packed, name) for name in names
    }


def scale(p, temperature):
    """Probabilities at another temperature of the logits."""
    scaled = p ** (1.0 / temperature)
    return scaled / scaled.sum(axis=-1, keepdims=True)


def fit_temperature(p, y):
    return minimize_scalar(
        lambda t: negative_log_likelihood(y, scale(p, t)),
        bounds=(0.2, 5.0),
        method="bounded",
    ).x


def evaluate(kind, model):
    """Figures of one model, and by outlier score those of unknown inputs."""
    read = read_packed if kind == HALO else read_logits
    p_val, validation = read(model.predict(x["val"], verbose=0))
    p, known = read(model.predict(x["test"], verbose=0))
    _, unknown = read(model.predict(x["oos_test"], verbose=0))
    refitted = scale(p, fit_temperature(p_val, labels["val"]))
    figures = {
        "accuracy": np.mean(p.argmax(axis=-1) == labels["test"]),
        "ECE": expected_calibration_error(labels["test"], p),
        "ECE, temperature refitted": expected_calibration_error(
            labels["test"], refitted
        ),
    }
    by_score = {}
    for name, scores in validation.items():
        rule = CoverageRule(0.95, method=None).fit(scores)
        by_score[name] = {
            "AUROC": auroc(known[name], unknown[name]),
            "rejected, in scope": rule.predict(known[name]).rejected.mean(),
            "rejected, out of scope": np.mean(
                rule.predict(unknown[name]).rejected
            ),
        }
    return figures, by_score


results = {CROSS_ENTROPY: [], HALO: []}
models = {}
for seed in SEEDS:
    for kind, runs in results.items():
        models[kind] = train(kind, seed)
        figures, by_score = evaluate(kind, models[kind])
        runs.append((figures, by_score))
        print(f"seed {seed}, {kind}: {figures['accuracy']:.1%}", flush=True)


def cell(values):
    values = 100.0 * np.array(values)
    return f"{values.mean():.1f} ± {values.std(ddof=1):.1f}"


def column(runs):
    """Pairs of a title and a cell."""
    figures, by_score = zip(*runs, strict=True)
    rows = [(name, cell([f[name] for f in figures])) for name in figures[0]]
    default, *others = by_score[0]
    best = max(others, key=lambda n: np.mean([s[n]["AUROC"] for s in by_score]))
    for title, score in (("default score", default), ("best other", best)):
        rows.append((title, score))
        rows += [
            (f"  {name}", cell([s[score][name] for s in by_score]))
            for name in by_score[0][score]
        ]
    return rows


print(f"\n{f'%, mean ± std of {len(SEEDS)} seeds':28}", end="")
print("".join(f"{kind:>16}" for kind in results))
for rows in zip(*map(column, results.values()), strict=True):
    print(f"{rows[0][0]:28}" + "".join(f"{text:>16}" for _, text in rows))

"""
The picture shows the last seed: the scores of HALO, where what lies to the
right of the line is rejected, and what other thresholds would do.
"""

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
for kind, score in (
    (CROSS_ENTROPY, "max softmax"),
    (CROSS_ENTROPY, "max_logit"),
    (HALO, "abstain"),
):
    read = read_packed if kind == HALO else read_logits
    validation, known, unknown = (
        read(models[kind].predict(x[name], verbose=0))[1][score]
        for name in ("val", "test", "oos_test")
    )
    is_unknown = np.repeat([0, 1], [len(known), len(unknown)])
    rejected, caught, _ = roc_curve(is_unknown, np.append(known, unknown))
    right.plot(100.0 * rejected, 100.0 * caught, label=f"{kind}, {score}")
keras_halo.plots.score_histograms(
    known,
    {"out of scope": unknown},
    CoverageRule(0.95, method=None).fit(validation).threshold,
    ax=left,
)
left.set_title("HALO: log-odds of abstaining")
right.axvline(5.0, color="gray", linestyle=":")
right.set(
    xlim=(0, 30),
    ylim=(0, 100),
    xlabel="rejected in scope, %",
    ylabel="rejected out of scope, %",
    title="Every threshold",
)
right.legend(loc="lower right", frameon=False)
figure.tight_layout()
figure.savefig("intent_classification.png", dpi=90)

"""
## Ask back

Rejecting is not the end of a conversation: the assistant can offer the two
intents that come next. The queries below come from fixed places of the test
lists.
"""

model = models[HALO]
rule = CoverageRule(0.95).fit(model.predict(x["val"], verbose=0))


def answer(texts):
    """The accepted intents, -1 for rejected, and the two likeliest intents."""
    inputs = (10.0 * features.transform(texts)).astype("float32")
    scores = model.predict(inputs, verbose=0)
    p, _ = read_packed(scores)
    return rule.predict(scores).labels, p.argsort(axis=-1)[:, :-3:-1]


def converse(texts):
    for text, label, likeliest in zip(texts, *answer(texts), strict=True):
        print(f"  {text}")
        first, second = (intents[i].replace("_", " ") for i in likeliest)
        if label >= 0:
            print(f"      OK: {first}.")
        else:
            print(f"      I don't know, did you mean {first} or {second}?")


accepted, offered = answer(texts["test"])
rejected = np.flatnonzero(accepted < 0)
meant = np.any(offered == labels["test"][:, None], axis=-1)[rejected]
print("\nIn scope")
converse(texts["test"][::900])
print(
    f"\nIn scope and rejected; {meant.mean():.0%} of {len(rejected)} such "
    "queries meant one of the two that are offered"
)
converse([texts["test"][i] for i in rejected[::40]])
print("\nOut of scope")
converse(texts["oos_test"][::100])

"""
## Conclusion

By its default score HALO rejects far more of the out-of-scope queries than
cross-entropy does, at the same share of answered queries in scope, and its
probabilities are calibrated as they come. Much of that is the score: read by
its largest logit, cross-entropy comes within a few points, and with a fitted
temperature it is as well calibrated. Accuracy is level. What is left is that
with HALO nothing had to be chosen.

A quarter of the out-of-scope queries is answered all the same, such as "please
spell check my resume". The two intents that are offered help where a query is
in scope. Out of scope they are whatever lies nearest.
"""
