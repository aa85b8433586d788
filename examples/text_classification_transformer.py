"""
Title: Text classification with a transformer that knows its topics
Author: The keras_halo authors
Date created: 2026/11/24
Last modified: 2026/11/24
Description: Which subject is a paragraph about? Perhaps none of those learned.
Accelerator: None
"""

"""
## Introduction

A transformer reads a paragraph of documentation and names its subject. Asked
about a subject that it never learned, a softmax names one all the same. HALO
gives each subject a learned centre in the space of embeddings and keeps the
origin, where no centre is, for one more answer: "I don't know".

## Setup
"""

import collections
import inspect
import pydoc_data.topics
import re

import keras
import numpy as np
import scipy.linalg
import scipy.optimize
import scipy.signal
import scipy.special
import scipy.stats
from keras import layers, ops
from matplotlib import axes as matplotlib_axes
from matplotlib import pyplot as plt

import keras_halo

keras.utils.set_random_seed(0)

"""
## Load the data

The text is on your disk: the documentation of SciPy, whose packages are the
subjects. Unknown are what matplotlib says about drawing, Python's own reference
about the language, and paragraphs of known words in random order. All
paragraphs of one function go either into training or into the test. What the
texts say depends on the versions installed, and so do the figures.
"""

MAX_WORDS, VOCABULARY = 48, 4000
MODULES = {
    "algebra": scipy.linalg,
    "optimization": scipy.optimize,
    "signals": scipy.signal,
    "functions": scipy.special,
    "statistics": scipy.stats,
}


def split_words(text):
    """The words of each paragraph that is long enough and is no code."""
    paragraphs = re.split(r"\n\s*\n", text)
    words = [
        re.findall(r"[a-z]+", paragraph.lower())
        for paragraph in paragraphs
        if ">>>" not in paragraph
    ]
    return [tuple(w[:MAX_WORDS]) for w in words if len(w) >= 12]


def read_documentation(module):
    """Paragraphs by function, each only once."""
    seen, found = set(), []
    for name in sorted(n for n in dir(module) if not n.startswith("_")):
        text = inspect.getdoc(getattr(module, name)) or ""
        new = [w for w in split_words(text) if w not in seen]
        seen.update(new)
        found.append(new)
    return found


rng = np.random.default_rng(0)
train, test = [], []
for label, module in enumerate(MODULES.values()):
    functions = read_documentation(module)
    for index, place in enumerate(rng.permutation(len(functions))):
        part = test if index < len(functions) // 4 else train
        part += [(words, label) for words in functions[place]]
rng.shuffle(train)
counts = collections.Counter(word for words, _ in train for word in words)
known_words = [word for word, _ in counts.most_common(VOCABULARY - 2)]
# 0 pads, 1 is a word that is not in the vocabulary.
index_of = {word: i + 2 for i, word in enumerate(known_words)}


def encode(paragraphs):
    tokens = np.zeros((len(paragraphs), MAX_WORDS), "int32")
    for row, words in zip(tokens, paragraphs, strict=True):
        row[: len(words)] = [index_of.get(word, 1) for word in words]
    return tokens


x_train, y_train = (
    encode([w for w, _ in train]),
    np.array([y for _, y in train]),
)
x_test, y_test = encode([w for w, _ in test]), np.array([y for _, y in test])
drawing = [w for part in read_documentation(matplotlib_axes.Axes) for w in part]
language = split_words("\n\n".join(pydoc_data.topics.topics.values()))
unknown = {
    "drawing": encode(drawing[:500]),
    "language": encode(language[:500]),
    "random words": rng.integers(2, len(index_of) + 2, (500, MAX_WORDS)),
}
print(len(x_train), "paragraphs to train with,", len(x_test), "to test with.")

"""
## Build a model

The transformer block of the textbooks.
"""

WIDTH = 32


class TokenAndPositionEmbedding(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.tokens = layers.Embedding(VOCABULARY, WIDTH)
        self.positions = layers.Embedding(MAX_WORDS, WIDTH)

    def call(self, x):
        return self.tokens(x) + self.positions(ops.arange(MAX_WORDS))


inputs = keras.Input((MAX_WORDS,), dtype="int32")
x = TokenAndPositionEmbedding()(inputs)
attended = layers.MultiHeadAttention(2, WIDTH, dropout=0.1)(x, x)
x = layers.LayerNormalization(epsilon=1e-6)(x + attended)
hidden = layers.Dense(WIDTH, activation="relu")(x)
x = layers.LayerNormalization(epsilon=1e-6)(x + layers.Dense(WIDTH)(hidden))
x = layers.GlobalAveragePooling1D()(x)
x = layers.Dropout(0.1)(x)
# was: outputs = layers.Dense(len(MODULES), activation="softmax")(x)
outputs = keras_halo.HALODense(len(MODULES))(x)
model = keras.Model(inputs, outputs)
model.compile(
    keras.optimizers.Adam(2e-3),
    # was: loss="sparse_categorical_crossentropy"
    loss=keras_halo.HALOLoss(),
    metrics=["accuracy"],
)

"""
## Train
"""

model.fit(x_train, y_train, batch_size=32, epochs=6, verbose=2)

"""
## Evaluate

`abstained` is the share answered with "I don't know". The score is larger the
stranger a paragraph is; AUROC is the chance that an unknown one scores above a
known one, where 50 % is guessing.
"""

loss, accuracy = model.evaluate(x_test, y_test, batch_size=500, verbose=0)
print(f"Test accuracy: {accuracy:.1%}")
fitted = keras_halo.fit_class_gaussians(
    model, x_train, y_train, batch_size=2000, verbose=0
)
report = keras_halo.evaluate_ood(
    fitted, (x_test, y_test), unknown, method="fitted", verbose=0
)
print(f"{'known':14} abstained {report.known.abstention_rate:6.1%}")
for result in report.unknown:
    print(
        f"{result.name:14} abstained {result.abstention_rate:6.1%}"
        f"   AUROC {result.auroc:6.1%}"
    )

"""
What the model answers to each kind of text, as shares of all its paragraphs.
"""

subjects = {name: x_test[y_test == i] for i, name in enumerate(MODULES)}
figure, ax = plt.subplots(figsize=(10, 5))
for row, tokens in enumerate({**subjects, **unknown}.values()):
    labels = keras_halo.decode_predictions(
        model.predict_on_batch(tokens)
    ).labels
    left = 0.0
    for answer in [*range(len(MODULES)), -1]:
        share = np.mean(labels == answer)
        color = "lightgray" if answer == -1 else f"C{answer}"
        ax.barh(row, share, left=left, color=color)
        left += share
for answer, name in enumerate(MODULES):
    ax.bar(0, 0, color=f"C{answer}", label=name)
ax.bar(0, 0, color="lightgray", label="I don't know")
ax.set_yticks(range(len(MODULES) + len(unknown)), [*subjects, *unknown])
ax.invert_yaxis()
ax.set(xlim=(0, 1), xlabel="share of the paragraphs")
ax.axhline(len(MODULES) - 0.5, color="black", linewidth=1)
ax.legend(ncols=6, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
figure.tight_layout()
figure.savefig("text_classification_transformer.png", dpi=90)

"""
## Conclusion

Known subjects are above the line in the picture, unknown ones below. Words that
are not in the vocabulary all look alike to the model, so what it can find
strange is how the known ones are used; the table shows how far that goes.
"""
