"""Trains the two models of the page to play with, and exports them to ONNX.

    KERAS_BACKEND=tensorflow python docs/play/train.py --data mnist10k.npz

Without `--data` it takes `keras.datasets.mnist`. Needs the extra `tools`,
onnx and tf2onnx. `--compare` trains the candidates among the settings instead
and prints by what one of them was chosen: validation digits against outliers
that are made here. No outlier takes part in a training.
"""

import argparse
import json
import pathlib
import sys
import tempfile

import keras
import numpy as np
from keras import layers, ops
from scipy import ndimage

import keras_halo
from keras_halo import HALODense, HALOLoss, HALOSoftmax
from keras_halo.layers import OODScore
from keras_halo.metrics import auroc
from keras_halo.rejection import CoverageRule

HERE = pathlib.Path(__file__).parent
sys.path.append(str(HERE.parents[1] / "benchmarks"))

import drawings  # noqa: E402
import images  # noqa: E402

CROSS_ENTROPY, HALO = "cross-entropy", "halo"
NUM_CLASSES = 10
COPIES = 8
COVERAGE = 0.95
VALIDATION, TEST = 1500, 1500

# Name: size of the embedding, normalized before the head or not, `distill`.
CANDIDATES = {
    "16, normalized": (16, True, False),
    "16, normalized, distilled": (16, True, True),
    "16": (16, False, False),
    "2": (2, False, False),
}
CHOSEN = "16, normalized"
# Whether the score is that of `fit_class_gaussians`.
FITTED = True
LABEL_SMOOTHING = 0.1


def load_data(path, seed):
    """Digits for training, validation and testing, disjoint, in [0, 1]."""
    if path:
        with np.load(path) as file:
            x, y = file["x"], file["y"]
    else:
        (x, y), _ = keras.datasets.mnist.load_data()
    x = (x / 255.0).astype("float32")
    y = y.astype("int32")
    order = np.random.default_rng(seed).permutation(len(x))
    parts = np.split(order, [VALIDATION, VALIDATION + TEST])
    names = ("validation", "test", "train")
    return {
        name: (x[part], y[part])
        for name, part in zip(names, parts, strict=True)
    }


def vary(x, rng):
    """Each digit turned, sheared, scaled, shifted, thinned or thickened."""
    varied = np.empty_like(x)
    middle = np.array([13.5, 13.5])
    for index, image in enumerate(x):
        angle = np.deg2rad(rng.uniform(-15, 15))
        turn = np.array(
            [
                [np.cos(angle), -np.sin(angle)],
                [np.sin(angle), np.cos(angle)],
            ]
        )
        shear = np.array([[1.0, 0.0], [rng.uniform(-0.2, 0.2), 1.0]])
        scale = np.diag(rng.uniform(0.9, 1.2, 2))
        matrix = turn @ shear @ scale
        offset = middle - matrix @ (middle + rng.uniform(-1.2, 1.2, 2))
        varied[index] = ndimage.affine_transform(image, matrix, offset, order=1)
    thick = ndimage.grey_dilation(varied, size=(1, 2, 2))
    thin = ndimage.grey_erosion(varied, size=(1, 2, 2))
    change = rng.uniform(-0.7, 0.7, (len(x), 1, 1)).astype("float32")
    target = np.where(change > 0, thick, thin)
    varied += np.abs(change) * (target - varied)
    # As bright as before: thinning would make pale lines of thin ones.
    brightest = varied.max(axis=(1, 2), keepdims=True)
    return varied / np.maximum(brightest, 1e-3)


def build(kind, dim, normalized):
    """The network: the same for both but for the last layer."""
    x = inputs = keras.Input((28, 28, 1), name="image")
    for filters in (16, 32, 64):
        x = layers.Conv2D(filters, 3, padding="same", activation="relu")(x)
        x = layers.MaxPooling2D()(x)
    x = layers.Dense(64, activation="relu")(layers.Flatten()(x))
    x = layers.Dense(dim, use_bias=not normalized)(x)
    if normalized:
        x = layers.BatchNormalization(scale=False, momentum=0.9)(x)
    if kind == HALO:
        head = HALODense.reference(NUM_CLASSES, LABEL_SMOOTHING, name="head")
    else:
        head = layers.Dense(NUM_CLASSES, name="head")
    return keras.Model(inputs, head(x))


def train(kind, candidate, data, seed, epochs):
    dim, normalized, distill = CANDIDATES[candidate]
    keras.utils.set_random_seed(seed)
    model = build(kind, dim, normalized)
    rate = keras.optimizers.schedules.CosineDecay(
        2e-3, epochs * -(-len(data["varied"][0]) // 128)
    )
    if kind == HALO:
        loss = HALOLoss(LABEL_SMOOTHING, distill=distill)
    else:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate), loss, metrics=["accuracy"])
    x, y = data["varied"]
    model.fit(x[..., None], y, batch_size=128, epochs=epochs, verbose=2)
    return model


def ring():
    """Ten places on a circle, 0 at the top, onwards as on a clock."""
    angles = 2 * np.pi * np.arange(NUM_CLASSES) / NUM_CLASSES
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1)


def to_ring(centroids):
    """The linear map to the plane that puts the centroids on the ring.

    There are more numbers in an embedding than centroids, so such maps exist;
    this is the one that stretches least. It leaves the origin at the origin.
    """
    centroids = centroids - centroids.mean(axis=0)
    return (np.linalg.pinv(centroids) @ ring()).astype("float32")


def readable(kind, model, data, fitted):
    """The model that the page runs, but for the decision."""
    embedding = model.layers[-1].input
    scores = model.output
    outputs = {}
    if kind == CROSS_ENTROPY:
        outputs["probabilities"] = layers.Softmax()(scores)
        outputs["score"] = -ops.log(ops.max(outputs["probabilities"], axis=-1))
    else:
        centroids = ops.convert_to_numpy(model.layers[-1].centroids)
        outputs["map"] = ops.matmul(embedding, to_ring(centroids))
        outputs["probabilities"] = HALOSoftmax()(scores)
        if fitted:
            x, y = data["train"]
            x = vary(x, np.random.default_rng(1))
            gaussians = keras_halo.fit_class_gaussians(
                model, x[..., None], y, batch_size=250, verbose=0
            )
            outputs["score"] = gaussians.output["ood"]
        else:
            outputs["score"] = OODScore()(scores)
    return keras.Model(model.inputs, outputs)


def with_decision(reader, threshold):
    """Adds the label: the best class, or -1 where the score is too high."""
    outputs = dict(reader.output)
    classes = outputs["probabilities"][..., :NUM_CLASSES]
    # Not `ops.argmax`, which tf2onnx cannot translate.
    best = ops.cast(ops.top_k(classes, 1)[1][..., 0], "int32")
    outputs["label"] = ops.where(outputs["score"] <= threshold, best, -1)
    return keras.Model(reader.inputs, outputs)


def predict(model, x):
    return model.predict(x.reshape(-1, 28, 28, 1), batch_size=250, verbose=0)


def fit_rule(reader, data, seed):
    """Keeps 95 % of digits, judged on validation digits varied once each."""
    x, y = data["validation"]
    outputs = predict(reader, vary(x, np.random.default_rng(seed)))
    best = outputs["probabilities"][:, :NUM_CLASSES].argmax(-1)
    rule = CoverageRule(COVERAGE, method=None)
    return rule.fit(outputs["score"], errors=best != y)


def compare(data, arguments):
    """Validation digits against made outliers, for each candidate."""
    rng = np.random.default_rng(arguments.seed)
    x, y = data["validation"]
    x = vary(x, rng)
    made = images.synthetic_images(x[..., None], rng)
    made["scribbles"] = drawings.scribbles(1000, rng)
    print(f"{'':24}{'score':>8}{'accuracy':>10}", *made, "mean", sep="  ")
    runs = [(HALO, name) for name in CANDIDATES]
    for kind, name in [(CROSS_ENTROPY, CHOSEN), *runs]:
        model = train(kind, name, data, arguments.seed, arguments.epochs)
        for fitted in (False, True) if kind == HALO else (False,):
            reader = readable(kind, model, data, fitted)
            known = predict(reader, x)
            best = known["probabilities"][:, :NUM_CLASSES].argmax(-1)
            figures = [
                auroc(known["score"], predict(reader, unknown)["score"])
                for unknown in made.values()
            ]
            cells = [f"{100 * f:.1f}" for f in (*figures, np.mean(figures))]
            which = "fitted" if fitted else "own"
            print(
                f"{kind + ' ' + name:24}{which:>8}{np.mean(best == y):10.4f}",
                *cells,
                sep="  ",
                flush=True,
            )


def export(model, path):
    """Writes the model as ONNX, and checks that its decisions are the same."""
    import onnx
    import onnxruntime

    # Keras exports only what has been called.
    model([np.zeros((1, 28, 28, 1), "float32")])
    with tempfile.TemporaryDirectory() as folder:
        raw = str(pathlib.Path(folder) / "model.onnx")
        model.export(raw, format="onnx", verbose=False)
        graph = onnx.load(raw)
    # Names of their own: what is traced here is nobody's business.
    graph.doc_string, graph.producer_name = "", "keras_halo"
    onnx.checker.check_model(graph)
    path.parent.mkdir(exist_ok=True)
    onnx.save(graph, path)
    session = onnxruntime.InferenceSession(str(path))
    outputs = [output.name for output in session.get_outputs()]
    return lambda x: dict(
        zip(
            outputs,
            session.run(
                None, {session.get_inputs()[0].name: x.reshape(-1, 28, 28, 1)}
            ),
            strict=True,
        )
    )


def describe(kind, candidate, fitted, data, arguments):
    """Trains, exports and measures one model; returns what the page shows."""
    model = train(kind, candidate, data, arguments.seed, arguments.epochs)
    reader = readable(kind, model, data, fitted)
    rule = fit_rule(reader, data, arguments.seed + 1)
    print(rule.summary())
    model = with_decision(reader, rule.threshold)
    run = export(model, arguments.output / f"{kind}.onnx")
    x, y = data["test"]
    rng = np.random.default_rng(arguments.seed + 2)
    unknown = drawings.scribbles(1000, rng)
    for images_ in (x, unknown):
        ours, exported = predict(model, images_), run(images_)
        np.testing.assert_array_equal(ours["label"], exported["label"])
        for name in set(ours) - {"label"}:
            np.testing.assert_allclose(
                ours[name], exported[name], rtol=1e-3, atol=1e-4
            )
    known, strange = run(x), run(unknown)
    best = known["probabilities"][:, :NUM_CLASSES].argmax(-1)
    accepted = known["label"] >= 0
    figures = {
        "threshold": rule.threshold,
        "median_score": float(np.median(known["score"])),
        "test_accuracy": float(np.mean(best == y)),
        "test_refused": float(np.mean(~accepted)),
        "test_wrong_of_accepted": float(np.mean((best != y)[accepted])),
        "scribbles_refused": float(np.mean(strange["label"] < 0)),
        "scribbles_confident": float(
            np.mean(strange["probabilities"][:, :NUM_CLASSES].max(-1) > 0.9)
        ),
    }
    print(json.dumps({kind: figures}, indent=2), flush=True)
    return figures


parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--data", help="npz file with `x` (N, 28, 28) and `y`")
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--compare", action="store_true")
parser.add_argument("--output", type=pathlib.Path, default=HERE / "models")

if __name__ == "__main__":
    arguments = parser.parse_args()
    data = load_data(arguments.data, arguments.seed)
    rng = np.random.default_rng(arguments.seed)
    x, y = data["train"]
    varied = [x, *(vary(x, rng) for _ in range(COPIES - 1))]
    data["varied"] = np.concatenate(varied), np.tile(y, COPIES)
    if arguments.compare:
        compare(data, arguments)
        sys.exit()
    description = {
        "coverage": COVERAGE,
        "ring": ring().round(6).tolist(),
        HALO: describe(HALO, CHOSEN, FITTED, data, arguments),
        CROSS_ENTROPY: describe(CROSS_ENTROPY, CHOSEN, False, data, arguments),
    }
    path = arguments.output / "models.json"
    path.write_text(json.dumps(description, indent=2) + "\n")
