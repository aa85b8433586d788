"""
Title: A vision transformer for letters that knows what is no letter
Author: The keras_halo authors
Date created: 2026/11/24
Last modified: 2026/11/24
Description: Patches, attention, top-5 accuracy, checkpoints, "I don't know".
Accelerator: GPU
"""

"""
## Introduction

A vision transformer cuts an image into patches and lets them attend to each
other. Here a small one reads the letters of the alphabet. Its last layer and
its loss are those of HALO: each letter has a learned centre in the space of
embeddings, what falls near no centre but near the origin is answered with "I
don't know", and the distances tell how strange an image is. So we can show it
digits, Greek letters and noise afterwards, none of which it has trained on.

Everything else is what Keras users are used to: top-5 accuracy, a checkpoint of
the best epoch, `load_weights`, and an `evaluate` that gives three values.

## Setup
"""

import string

import keras
import numpy as np
from keras import layers
from matplotlib import font_manager
from matplotlib import pyplot as plt
from PIL import Image, ImageDraw, ImageFont

import keras_halo

keras.utils.set_random_seed(0)

"""
## Load the data

We draw it: the fonts that come with matplotlib, each letter a little turned,
shifted and scaled. 52 classes, capitals and small letters; some, such as c and
C, can hardly be told apart, which is where top-5 accuracy is of use. The test
letters come from turns, shifts and sizes of their own, in the same fonts.
"""

LETTERS = string.ascii_letters
SIZE = 32
FONTS = [
    font_manager.findfont(
        font_manager.FontProperties(family=family, weight=weight),
        fallback_to_default=False,
    )
    for family in ("DejaVu Sans", "DejaVu Serif", "DejaVu Sans Mono")
    for weight in ("normal", "bold")
]


def draw(characters, rng):
    """Images of shape (N, 32, 32, 1), ink is 1."""
    images = []
    for character in characters:
        font = ImageFont.truetype(rng.choice(FONTS), int(rng.integers(20, 28)))
        image = Image.new("L", (SIZE, SIZE))
        place = SIZE / 2 + rng.uniform(-2, 2, 2)
        ImageDraw.Draw(image).text(place, character, 255, font, anchor="mm")
        image = image.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR)
        images.append(np.asarray(image))
    return np.stack(images)[..., None].astype("float32") / 255.0


def draw_letters(count, rng):
    labels = rng.integers(0, len(LETTERS), (count, 1))
    return draw([LETTERS[label] for label in labels[:, 0]], rng), labels


rng = np.random.default_rng(0)
x_train, y_train = draw_letters(8000, rng)
x_val, y_val = draw_letters(1000, rng)
x_test, y_test = draw_letters(2000, rng)
unknown = {
    "digits": draw(rng.choice(list("23456789"), 1000), rng),
    "Greek letters": draw(rng.choice(list("ΓΔΘΛΞΠΣΦΨΩβδλξπφψ"), 1000), rng),
    "noise": rng.random((1000, SIZE, SIZE, 1), "float32"),
}
print(f"{x_train.shape = }, {y_train.shape = }")

"""
## Build a model

Patches of 4 x 8 pixels are cut out by a convolution whose stride is as large as
its kernel. Then come two transformer blocks, and the average of all patches.
"""

WIDTH = 64


class AddPosition(layers.Layer):
    """Adds to each patch a learned vector for its place."""

    def build(self, input_shape):
        self.position = self.add_weight(
            shape=input_shape[1:], initializer="random_normal"
        )

    def call(self, patches):
        return patches + self.position


def build_model():
    inputs = keras.Input((SIZE, SIZE, 1))
    x = layers.Conv2D(WIDTH, (4, 8), strides=(4, 8))(inputs)
    x = AddPosition()(layers.Reshape((-1, WIDTH))(x))
    for _ in range(2):
        y = layers.LayerNormalization(epsilon=1e-6)(x)
        x += layers.MultiHeadAttention(4, WIDTH // 4, dropout=0.1)(y, y)
        y = layers.LayerNormalization(epsilon=1e-6)(x)
        y = layers.Dense(2 * WIDTH, activation="gelu")(y)
        x += layers.Dense(WIDTH)(y)
    x = layers.LayerNormalization(epsilon=1e-6)(x)
    x = layers.GlobalAveragePooling1D()(x)
    # was: outputs = layers.Dense(len(LETTERS))(x)
    outputs = keras_halo.HALODense(len(LETTERS))(x)
    return keras.Model(inputs, outputs)


model = build_model()
model.compile(
    keras.optimizers.AdamW(2e-3, weight_decay=1e-4),
    # was: loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    loss=keras_halo.HALOLoss(),
    metrics=[
        keras.metrics.SparseCategoricalAccuracy(name="accuracy"),
        # was: keras.metrics.SparseTopKCategoricalAccuracy(5, ...)
        keras_halo.metrics.BestClassTopKAccuracy(5, name="top-5-accuracy"),
    ],
)
print(f"{model.count_params():,} parameters")

"""
## Train
"""

checkpoint = keras.callbacks.ModelCheckpoint(
    "vision_transformer.weights.h5",
    monitor="val_accuracy",
    save_best_only=True,
    save_weights_only=True,
)
model.fit(
    x_train,
    y_train,
    batch_size=64,
    epochs=12,
    validation_data=(x_val, y_val),
    callbacks=[checkpoint],
    verbose=2,
)

"""
## Evaluate

Accuracy counts "I don't know" as an error. Top-5 accuracy asks whether the
letter is among the first five, whatever the model thinks of abstaining; Keras's
own would count "I don't know" as one of the five.
"""

model.load_weights("vision_transformer.weights.h5")
_, accuracy, top_5_accuracy = model.evaluate(x_test, y_test, verbose=0)
print(f"Test accuracy: {accuracy:.1%}")
print(f"Test top-5 accuracy: {top_5_accuracy:.1%}")

"""
Now to what is no letter. `abstained` is the share that the model answers with
"I don't know". The score is larger the stranger an image is: `fitted` measures
how far each letter extends in the space of embeddings, in one pass over the
training data, and refuses what lies outside of all. AUROC is the chance that
an unknown image scores above a known one; with `passed`, the threshold is such
that 95 % of the known ones pass.
"""

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
        f"   passed {result.fpr95_known_positive:6.1%}"
    )

"""
The five most probable answers to the first images of each set; a red title is
what the score refuses.
"""

threshold = np.quantile(fitted.predict(x_val, 500, verbose=0)["ood"], 0.95)
names = [*LETTERS, "I don't know"]
shown = {"letters": x_test, **unknown}
figure, axes = plt.subplots(
    4, 6, figsize=(14, 8), height_ratios=(3, 2) * 2, layout="constrained"
)
columns = [
    (axes[2 * (i // 2) : 2 * (i // 2) + 2, 3 * (i % 2) + j], name, images[j])
    for i, (name, images) in enumerate(shown.items())
    for j in range(3)
]
for (top, bottom), name, image in columns:
    answer = fitted.predict_on_batch(image[None])
    predictions = keras_halo.decode_predictions(answer["scores"])
    shares = [
        *predictions.probabilities[0],
        predictions.abstain_probability[0],
    ]
    refused = answer["ood"][0] > threshold
    top.imshow(image[..., 0], cmap="gray_r")
    top.set_title(
        f"{name}\n" + ("refused" if refused else "passes"),
        color="tab:red" if refused else "black",
    )
    top.set(xticks=[], yticks=[])
    best = np.argsort(shares)[:-6:-1]
    colors = ["tab:red" if i == len(LETTERS) else "tab:blue" for i in best]
    bottom.barh(range(5), [shares[i] for i in best], color=colors)
    bottom.set_yticks(range(5), [names[i] for i in best], fontsize=8)
    bottom.set(xlim=(0, 1), ylim=(4.6, -0.6), xticks=[0, 0.5, 1])
figure.savefig("vision_transformer.png", dpi=90)

"""
## Conclusion

Accuracy, checkpoints and `evaluate` work on the output of `HALODense`
unchanged: to them it looks like logits with one class more. A digit or a Greek
letter is made of the same strokes as ours and often sits right where a letter
sits, so by itself the model seldom abstains. The score sees more than that,
though it cannot see what is not there: a Greek letter that looks like a Latin
one is a Latin one to this model.
"""
