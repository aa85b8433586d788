"""
Title: Emoji and their captions, in a style and a language never seen
Author: The keras_halo authors
Date created: 2026/11/29
Last modified: 2026/11/29
Description: Contrastive training on real pairs: what is found, what is refused.
Accelerator: None
"""

"""
## Introduction

Every vendor draws its own emoji, and every language has its own names for them.
One tower reads the pictures, another the captions, and training moves each
picture next to its captions. Then come a vendor and a language that training
has not seen, and emoji that nobody has shown the model at all: their captions
match no picture, and their pictures match no caption.

InfoNCE, the loss of CLIP, is a softmax over the captions of a batch, so that it
always chooses one. HALO adds "nothing matches" to that softmax. Both train the
same towers on the same batches here, and both are asked two questions: do you
find the match, and do you notice that there is none?

## Setup
"""

import argparse
import gzip
import json
import math
import os
import pathlib
import sys
import textwrap
import zlib

import keras
import numpy as np
from keras import layers, ops
from matplotlib import pyplot as plt

import keras_halo
from keras_halo.metrics import aurc, auroc, risk_coverage_curve
from keras_halo.rejection import CoverageRule

DATA_FILES = ("emoji.npz", "emoji.json.gz")
SEEDS = (0, 1, 2, 3, 4)
EPOCHS = 80
BATCH_SIZE = 128
EMBEDDING_DIM = 64
# "validation" is what the settings below were chosen on.
EVALUATED_ON = "test"
INFO_NCE, HALO = "InfoNCE", "HALO"

parser = argparse.ArgumentParser(
    description="Trains two towers on emoji and captions, with two losses."
)
parser.add_argument(
    "--data",
    default=os.environ.get("KERAS_HALO_DATA") or ".",
    help=f"folder that holds {' and '.join(DATA_FILES)}; default: "
    "$KERAS_HALO_DATA",
)
# A notebook is started with arguments of its own.
arguments, _ = parser.parse_known_args()
folder = pathlib.Path(arguments.data)
files = [min(folder.rglob(name), default=None) for name in DATA_FILES]
if None in files:
    missing = [n for n, file in zip(DATA_FILES, files, strict=True) if not file]
    sys.exit(
        f"The folder {folder} holds no {' and no '.join(missing)}.\n"
        "This example needs pictures and captions of emoji. emoji.npz holds "
        "`vendors`, (noto, twemoji,\nopenmoji), and `x`, uint8 of shape (N, 3, "
        "32, 32, 3). emoji.json.gz holds a list of N\nobjects with `name`, "
        "`tags` (a list), `de`, `es` and `fr`. Pictures are those of\n"
        "https://github.com/googlefonts/noto-emoji, "
        "https://github.com/jdecked/twemoji and\nhttps://openmoji.org, "
        "captions those of https://cldr.unicode.org. Pass their folder:\n"
        "    python emoji_two_towers.py --data FOLDER\n"
        "or set KERAS_HALO_DATA to it."
    )

"""
## Load the data

1,699 emoji by three vendors: Noto (Apache 2.0), Twemoji (CC BY 4.0) and
OpenMoji (CC BY-SA 4.0). English captions are a name and keywords, the others a
name, all from Unicode's CLDR.

The test takes OpenMoji and French away from training; both styles and all other
languages are in. The settings were chosen without looking at either: training
on Noto in English and German, judged on Twemoji and Spanish. A fifth of the
emoji is held out entirely, another fifth for the choice than for the test.
"""

SPLITS = {
    "validation": {
        "vendors": ("noto",),
        "new vendor": "twemoji",
        "languages": ("en", "de"),
        "new language": "es",
    },
    "test": {
        "vendors": ("noto", "twemoji"),
        "new vendor": "openmoji",
        "languages": ("en", "de", "es"),
        "new language": "fr",
    },
}
split = SPLITS[EVALUATED_ON]

with np.load(files[0]) as data:
    vendors = data["vendors"].tolist()
    pictures = dict(zip(vendors, data["x"].swapaxes(0, 1), strict=True))
with gzip.open(files[1], "rt", encoding="utf-8") as file:
    emoji = json.load(file)
captions = {
    code: [entry[code] for entry in emoji] for code in ("de", "es", "fr")
}
captions["en"] = [" ".join([e["name"], *e["tags"]]) for e in emoji]


def hold_out(seed):
    """Emoji that the training sees, and those that it does not."""
    order = np.random.default_rng(seed).permutation(len(emoji))
    fifth = len(emoji) // 5
    if EVALUATED_ON == "validation":
        return order[fifth:], order[:fifth]
    return order[:-fifth], order[-fifth:]


"""
Words of different languages have pieces in common, names of countries most of
all. So a caption is the set of its words and of their pieces of three to five
letters, hashed to 2,048 numbers.
"""

NUM_FEATURES = 2048


def pieces(text):
    for word in text.lower().replace(":", " ").split():
        word = f"<{word}>"
        yield word
        for size in (3, 4, 5):
            yield from (word[i : i + size] for i in range(len(word) - size))
            yield word[-size:]


def to_features(texts):
    features = np.zeros((len(texts), NUM_FEATURES), "float32")
    for row, text in zip(features, texts, strict=True):
        # The hash of Python changes from run to run.
        row[[zlib.crc32(p.encode()) % NUM_FEATURES for p in pieces(text)]] = 1.0
        row /= np.linalg.norm(row)
    return features


features = {code: to_features(texts) for code, texts in captions.items()}

"""
An epoch shows every emoji once, by a random vendor and in a random language.
Pictures are shifted and their colours changed, captions lose a fifth of their
pieces: there are few of either, and a new style is to be read.
"""


class Pairs(keras.utils.PyDataset):
    def __init__(self, ids, seed):
        super().__init__()
        self.ids = ids
        self.rng = np.random.default_rng(seed)
        self.on_epoch_end()

    def on_epoch_end(self):
        self.order = self.rng.permutation(self.ids)

    def __len__(self):
        return len(self.ids) // BATCH_SIZE

    def __getitem__(self, index):
        ids = self.order[index * BATCH_SIZE :][:BATCH_SIZE]
        drawn = [
            (pictures[vendor][i], features[code][i])
            for i, vendor, code in zip(
                ids,
                self.rng.choice(split["vendors"], BATCH_SIZE),
                self.rng.choice(split["languages"], BATCH_SIZE),
                strict=True,
            )
        ]
        images, texts = (np.stack(part) for part in zip(*drawn, strict=True))
        images = self.vary(images.astype("float32"))
        texts = texts * (self.rng.random(texts.shape) < 0.8)
        return (images, texts.astype("float32")), ids.astype("int32")

    def vary(self, images):
        padded = np.pad(images, ((0, 0), (3, 3), (3, 3), (0, 0)), mode="edge")
        shifts = self.rng.integers(0, 7, (len(images), 2))
        images = np.stack(
            [
                image[row : row + 32, column : column + 32]
                for image, (row, column) in zip(padded, shifts, strict=True)
            ]
        )
        shape = (len(images), 1, 1)
        images = images * self.rng.uniform(0.8, 1.2, (*shape, 3))
        images += self.rng.uniform(-25.0, 25.0, (*shape, 1))
        grey = images.mean(axis=-1, keepdims=True)
        images += self.rng.uniform(0.0, 0.6, (*shape, 1)) * (grey - images)
        return images.astype("float32")


"""
## Build a model

Both towers end on a sphere, as the cosine of InfoNCE implies. `HALOSimilarity`
compares the pictures of a batch with its captions, in both directions, and
`HALOContrastiveLoss` gets the ids of the emoji. On a sphere the radial term of
the loss has no work to do, so its weight is zero.

InfoNCE has a learned temperature that starts at CLIP's, and the label smoothing
that HALO has: on validation its recall was three points better with it, its
rejection no worse. For HALO, plain smoothed targets on a mean square of 0.5
(`distill=False`) rejected captions better there than distilled ones on 0.3.
Network, optimizer, epochs and batches are alike.
"""

LEARNING_RATE = 2e-3
LABEL_SMOOTHING = 0.1
MEAN_SQUARE = 0.5


class ScaledCosine(layers.Layer):
    """Cosine similarities of a batch, both ways, times a learned scale."""

    def build(self, input_shape):
        self.log_scale = self.add_weight(
            name="log_scale",
            shape=(),
            initializer=keras.initializers.Constant(math.log(1.0 / 0.07)),
        )

    def scale(self):
        return ops.exp(ops.minimum(self.log_scale, math.log(100.0)))

    def call(self, inputs):
        images, texts = inputs
        logits = self.scale() * ops.matmul(images, ops.transpose(texts))
        return ops.stack([logits, ops.transpose(logits)], axis=1)


def info_nce(ids, logits):
    labels = keras_halo.pair_labels(ops.cast(ids, "int32"))
    labels = (1.0 - LABEL_SMOOTHING) * labels + LABEL_SMOOTHING / BATCH_SIZE
    return -ops.sum(labels[:, None] * ops.log_softmax(logits), axis=-1)


def build_model(kind, steps):
    images = keras.Input((32, 32, 3))
    x = layers.Rescaling(1.0 / 255.0)(images)
    for filters in (32, 64, 128):
        x = layers.Conv2D(
            filters, 3, strides=2, padding="same", use_bias=False
        )(x)
        x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))
    x = layers.Dropout(0.2)(layers.Flatten()(x))
    x = layers.Dense(256, activation="relu")(x)
    image = layers.Dense(EMBEDDING_DIM)(x)

    texts = keras.Input((NUM_FEATURES,))
    x = layers.Dense(256, activation="relu")(texts)
    text = layers.Dense(EMBEDDING_DIM)(layers.Dropout(0.2)(x))

    towers = [layers.UnitNormalization()(x) for x in (image, text)]
    if kind == HALO:
        scale = layers.Rescaling((MEAN_SQUARE * EMBEDDING_DIM) ** 0.5)
        towers = [scale(x) for x in towers]
        join = keras_halo.HALOSimilarity(
            label_smoothing=LABEL_SMOOTHING, bidirectional=True, name="join"
        )
        loss = keras_halo.HALOContrastiveLoss(
            label_smoothing=LABEL_SMOOTHING, distill=False, radial_weight=0.0
        )
    else:
        join, loss = ScaledCosine(name="join"), info_nce
    model = keras.Model([images, texts], join(towers))
    schedule = keras.optimizers.schedules.CosineDecay(LEARNING_RATE, steps)
    model.compile(keras.optimizers.AdamW(schedule, weight_decay=1e-2), loss)
    return model


"""
## Train
"""


def train(kind, seed, ids):
    keras.utils.set_random_seed(seed)
    pairs = Pairs(ids, seed)
    model = build_model(kind, EPOCHS * len(pairs))
    history = model.fit(pairs, epochs=EPOCHS, verbose=0)
    print(
        f"{kind}, seed {seed}: loss {history.history['loss'][-1]:.3f}",
        flush=True,
    )
    return model


"""
## Evaluate

Recall@k is the share of queries whose match is among the k best of the 1,360
candidates. The second question has the same candidates, and queries of the held
out emoji among those that have a match. It is asked once more with every other
candidate taken away, of emoji that training has seen. Scores of a query, larger
if nothing matches:

- best fit: minus the largest cosine, and for HALO minus the largest of
  `pair_log_odds`, by how much a pair beats "nothing matches";
- margin: minus the lead of the best candidate over the second;
- energy: minus the log-sum-exp of all candidates, for HALO the log-odds of
  "nothing matches".

AUROC is the chance that a query without a match has a larger score than one
with. AURC is the mean risk over all coverages, where a wrong candidate and any
answer to a query without a match are errors: smaller is better.
"""


def embed(model, vendor, code):
    inputs = (pictures[vendor].astype("float32"), features[code])
    ends = zip(model.inputs, model.get_layer("join").input, strict=True)
    return [
        keras.Model(*end).predict(x, batch_size=512, verbose=0)
        for end, x in zip(ends, inputs, strict=True)
    ]


def compare(kind, model, queries, candidates):
    """How well every candidate fits every query, and the scores of queries."""
    join = model.get_layer("join")
    if kind == HALO:
        scores = ops.convert_to_numpy(join.to_head(candidates)(queries))
        fit = keras_halo.pair_log_odds(scores)
        energy = keras_halo.ood_score(scores, "abstain")
    else:
        fit = queries @ candidates.T
        logits = ops.convert_to_numpy(join.scale()) * fit
        energy = -ops.convert_to_numpy(ops.logsumexp(logits, axis=-1))
    second, best = np.partition(fit, -2, axis=-1)[:, -2:].T
    return fit, {"best fit": -best, "margin": second - best, "energy": energy}


def evaluate(kind, model, known, new):
    figures = {}
    for what, vendor, code in (
        ("new vendor", split["new vendor"], "en"),
        ("new language", split["vendors"][0], split["new language"]),
    ):
        images, texts = embed(model, vendor, code)
        for query, queries, candidates in (
            ("pictures", images, texts),
            ("captions", texts, images),
        ):
            fit, scores = compare(
                kind, model, queries[known], candidates[known]
            )
            rank = np.sum(fit > fit.diagonal()[:, None], axis=1)
            for k in (1, 5):
                figures[f"recall@{k}, {what}, {query}"] = np.mean(rank < k)
            _, unknown = compare(kind, model, queries[new], candidates[known])
            for name, score in scores.items():
                figures[f"AUROC, {what}, {query}, {name}"] = auroc(
                    score, unknown[name]
                )
            figures[f"AURC, {what}, {query}, best fit"] = aurc(
                rank > 0, scores["best fit"], unknown["best fit"]
            )
            half, gone = known[::2], known[1::2]
            score, taken_away = (
                compare(kind, model, queries[ids], candidates[half])[1][
                    "best fit"
                ]
                for ids in (half, gone)
            )
            figures[f"AUROC, {what}, {query}, taken away"] = auroc(
                score, taken_away
            )
    return figures


figures, models = {INFO_NCE: [], HALO: []}, {}
for seed in SEEDS:
    known, new = hold_out(seed)
    for kind, runs in figures.items():
        models[kind] = train(kind, seed, known)
        runs.append(evaluate(kind, models[kind], known, new))

print(f"\n{'%, mean ± std of ' + str(len(SEEDS)) + ' seeds':46}", end="")
print("".join(f"{kind:>14}" for kind in figures))
ORDER = ("recall@1", "recall@5", "AUROC", "AURC")
for name in sorted(
    figures[HALO][0], key=lambda name: ORDER.index(name.split(",")[0])
):
    print(f"{name:46}", end="")
    for runs in figures.values():
        values = 100.0 * np.array([run[name] for run in runs])
        cell = f"{values.mean():.1f} ± {values.std(ddof=1):.1f}"
        print(f"{cell:>14}", end="")
    print()

"""
## See it work

Pictures of the new vendor, drawn at random, and what the last of the HALO
models answers. Above: emoji that training has seen, in another style. Below:
emoji that it has not. The best caption stands in brackets where it was refused;
red is wrong. `CoverageRule` fits the threshold that accepts 80 % of the
pictures with a match, on one half of them; those shown are of the other half.

On the right, the share of wrong answers among those accepted, as more and more
pictures are answered, of both losses.
"""

figure = plt.figure(figsize=(14, 5.6), layout="constrained")
left, right = figure.subfigures(1, 2, width_ratios=(2.3, 1))
half, other = known[::2], known[1::2]

images, texts = embed(models[HALO], split["new vendor"], "en")
fit, scores = compare(HALO, models[HALO], images, texts[known])
score, best = scores["best fit"], known[fit.argmax(axis=-1)]
rule = CoverageRule(0.8, method=None).fit(score[half])
accepted = rule.predict(score).accepted
print(
    f"\nAccepted: {100 * accepted[other].mean():.1f} % of the pictures with a "
    f"match, {100 * accepted[new].mean():.1f} % of those without."
)
rows = zip(
    left.subplots(2, 6), (other, new), ("seen emoji", "new emoji"), strict=True
)
for row, ids, title in rows:
    row[0].set_ylabel(title, fontsize=13)
    for ax, index in zip(row, ids, strict=False):
        ax.imshow(pictures[split["new vendor"]][index])
        found = textwrap.fill(emoji[best[index]]["name"], 16)
        answer = found if accepted[index] else f"nothing fits\n({found}?)"
        right_answer = accepted[index] == (best[index] == index)
        ax.set_title(
            answer,
            color="tab:green" if right_answer else "tab:red",
            fontsize=9,
        )
        ax.set(xticks=[], yticks=[])
left.supxlabel(
    f"Pictures: {split['new vendor']} (openmoji.org, CC BY-SA 4.0)", fontsize=9
)
ax = right.subplots()
for kind, model in models.items():
    images, texts = embed(model, split["new vendor"], "en")
    fit, scores = compare(kind, model, images[known], texts[known])
    _, unknown = compare(kind, model, images[new], texts[known])
    curve = risk_coverage_curve(
        fit.argmax(axis=-1) != np.arange(len(known)),
        scores["best fit"],
        unknown["best fit"],
    )
    ax.plot(curve.coverage, curve.risk, label=kind)
ax.set(xlabel="share answered", ylabel="wrong among the answers", ylim=(0, 1))
ax.legend()
figure.savefig("emoji_two_towers.png", dpi=90)
print("The figure is in emoji_two_towers.png.")

"""
## Conclusion

On JAX the five seeds gave, in %, of InfoNCE the best of its three scores:

|                                          | InfoNCE    | HALO       |
|------------------------------------------|------------|------------|
| recall@1, new vendor, pictures           | 11.5 ± 0.9 | 11.2 ± 0.6 |
| recall@1, new vendor, captions           | 14.9 ± 1.0 | 13.9 ± 0.4 |
| recall@1, new language, pictures         | 8.2 ± 0.9  | 7.3 ± 0.8  |
| recall@1, new language, captions         | 7.0 ± 0.5  | 7.0 ± 0.5  |
| AUROC, new vendor, pictures              | 52.5 ± 1.4 | 52.6 ± 1.7 |
| AUROC, new vendor, captions              | 64.5 ± 1.7 | 74.9 ± 2.1 |
| AUROC, new language, pictures            | 52.9 ± 1.6 | 54.5 ± 1.0 |
| AUROC, new language, captions            | 53.2 ± 2.2 | 54.8 ± 1.9 |
| AURC, new vendor, captions               | 77.7 ± 1.7 | 79.2 ± 1.4 |

HALO gains in one place: a caption in a known language, of an emoji that is new
to the model, is told apart 10 points better than by the best score of InfoNCE.
Elsewhere recall and AUROC of the two are within two points of each other, and
in recall it is mostly InfoNCE that is ahead. So is its risk in two cases of
four: most errors are emoji whose match was not found, and HALO orders those no
better.

Neither is fit for use on these shifts. With a picture of the new vendor the
scores say next to nothing about whether its caption is there. Two vendors are
likely too few to learn what a style is: OpenMoji draws with black outlines, and
neither of the others does. Pieces of words carry little from one language to
the next. And where the partner of a seen emoji is taken away, no score notices.
"""
