"""
Title: The swap with its defaults, on data of any kind
Description: Dense + cross-entropy against HALODense + HALOLoss, nothing tuned.

Every method trains the same network with the same settings from the same seeds;
only the last layer and the loss differ. Scores that are read from logits or
packed scores alone are compared on classes that were held out, on unknown
inputs that the file brings, and on noise.

    python benchmarks/default_swap.py --data digits --hold-out 2
    python benchmarks/default_swap.py --data letters.npz --hold-out 6
    python benchmarks/default_swap.py --data shuttle.npz --hold-out-rarer 60
    python benchmarks/default_swap.py --data spoken_digits.npz --hold-out 3
    python benchmarks/default_swap.py --data clinc150.json.gz
    python benchmarks/default_swap.py --data images.npz --unknown digits.npz
    python benchmarks/default_swap.py --data images.npz --train 20000
    python benchmarks/default_swap.py --data images.npz --train 99 --epochs 100
    python benchmarks/default_swap.py --data images.npz --hold-out-classes 5 6 7
    python benchmarks/default_swap.py --data images.npz --network small_resnet
    python benchmarks/default_swap.py --data images.npz --people counts.npy

`--data digits` are the 1,797 digits of 8 x 8 pixels that scikit-learn brings. A
file of arrays (`.npz`) holds `x_train`, `y_train`, `x_test` and `y_test`, or
`x` and `y`, of which a fifth is kept for testing. Arrays called `unknown_NAME`
are inputs of no known class. Speech is an `.npz` file with recordings of 8 kHz
end to end, `samples`, where each begins and the last one ends, `offsets`, and
`y`. A file of texts (`.json`, `.json.gz`) holds lists
`train`, `test` and, optionally, `oos_test` of pairs of a text and its label.
A file of people's labels (`.npy`) holds how many people gave each test input
each label, as `cifar10h-counts.npy` of CIFAR-10H does.

Every run is a file in the output folder, there as a whole or not at all: the
same command again makes what is missing. `KERAS_BACKEND` says which backend
runs it. Needs `keras-halo[tools]`.
"""

import argparse
import gzip
import hashlib
import json
import os
import pathlib
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import baselines
import keras
import numpy as np
from baselines import cross_entropy
from images import ROTATED, corrupted_images, rotated_images
from keras import layers
from networks import NETWORKS, speech_convnet

import keras_halo
from keras_halo import metrics

# How text becomes numbers.
NUM_TEXT_FEATURES = 300

# Of recordings, in Hz.
SAMPLE_RATE = 8000

# Raised whenever a run comes out otherwise.
VERSION = 3

ABSTAIN = "abstain"

# Made for every kind of data; not part of means over unknown sets.
NOISE_SETS = ("AUROC noise", "AUROC far noise")

# Cross-entropy of class probabilities and what people say, in hundredths of a
# nat as all figures are.
PEOPLE = "NLL of people's labels"

# What needs no file.
DIGITS = "digits"


def log_mel(recordings):
    """Log-mel spectrograms `(frames, bands)` of the first 0.75 seconds."""
    length = SAMPLE_RATE * 3 // 4
    waves = np.zeros((len(recordings), length), "float32")
    for wave, recording in zip(waves, recordings, strict=True):
        wave[: len(recording)] = recording[:length] / 32768.0
    spectrogram = layers.MelSpectrogram(
        fft_length=256,
        sequence_stride=SAMPLE_RATE // 100,
        sampling_rate=SAMPLE_RATE,
        num_mel_bins=40,
        min_freq=60.0,
        max_freq=SAMPLE_RATE / 2,
    )
    parts = [
        keras.ops.convert_to_numpy(spectrogram(part))
        for part in np.array_split(waves, -(-len(waves) // 500))
    ]
    return np.concatenate(parts).transpose(0, 2, 1)


def read_arrays(path):
    """Train and test parts, and unknown inputs, of an npz file."""
    if path == DIGITS:
        from sklearn.datasets import load_digits

        digits = load_digits()
        arrays = {"x": digits.images / 16.0 * 255.0, "y": digits.target}
    else:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file}
    if {"samples", "offsets", "y"} <= arrays.keys():
        recordings = np.split(arrays["samples"], arrays["offsets"][1:-1])
        arrays = {"x": log_mel(recordings), "y": arrays["y"]}
    if {"x_train", "y_train", "x_test", "y_test"} <= arrays.keys():
        parts = [arrays[n] for n in ("x_train", "y_train", "x_test", "y_test")]
    elif {"x", "y"} <= arrays.keys():
        x, y = arrays["x"], arrays["y"]
        order = np.random.default_rng(0).permutation(len(x))
        num_test = len(x) // 5
        test, train = order[:num_test], order[num_test:]
        parts = [x[train], y[train], x[test], y[test]]
    else:
        raise ValueError(
            f"{path} must hold x_train, y_train, x_test and y_test, or x and "
            "y, or samples, offsets and y. Received: "
            f"{sorted(arrays)}."
        )
    unknown = {
        name.removeprefix("unknown_"): values
        for name, values in arrays.items()
        if name.startswith("unknown_")
    }
    return parts, unknown


def read_texts(path):
    """The same of a file of texts, as features that need no network."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline, make_union

    opener = gzip.open if str(path).endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8") as file:
        lists = json.load(file)
    if not {"train", "test"} <= lists.keys():
        raise ValueError(
            f"{path} must hold the lists train and test. Received: "
            f"{sorted(lists)}."
        )
    features = make_pipeline(
        make_union(
            TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True),
            TfidfVectorizer(
                analyzer="char_wb",
                ngram_range=(2, 5),
                min_df=3,
                sublinear_tf=True,
            ),
        ),
        TruncatedSVD(NUM_TEXT_FEATURES, random_state=0),
    )
    features.fit([text for text, _ in lists["train"]])

    def numbers(name):
        # Components of unit vectors are small; the networks expect about one.
        scaled = 10.0 * features.transform([text for text, _ in lists[name]])
        return scaled.astype("float32")

    def labels(name):
        return np.array([label for _, label in lists[name]])

    parts = [numbers("train"), labels("train"), numbers("test"), labels("test")]
    unknown = {}
    if lists.get("oos_test"):
        unknown["out of scope"] = numbers("oos_test")
    return parts, unknown


def read_people(path, num_test, classes, held_out):
    """Distributions of the labels that people gave the test inputs."""
    counts = np.load(path).astype("float64")
    if counts.shape != (num_test, len(classes)) or len(held_out):
        raise ValueError(
            f"{path} must hold a row for each of {num_test} test inputs and a "
            f"column for each of {len(classes)} classes, none held out. "
            f"Received: shape {counts.shape}, {len(held_out)} held out."
        )
    totals = counts.sum(axis=-1, keepdims=True)
    if not (np.all(counts >= 0.0) and np.all(totals > 0.0)):
        raise ValueError(
            f"{path} must hold counts of at least zero, and every test input "
            "at least one label."
        )
    return counts / totals


class Data:
    """Known inputs and sets of unknown ones, ready for a network.

    Args:
        path: Path of the file.
        more: Dictionary of name to path of npz files with an array `x` or
            `x_test` of unknown inputs.
        num_held_out: Integer, how many classes are held out.
        rarer: Integer, classes with fewer samples are held out, too.
        draw: Integer, which random draw of classes.
        num_train: Integer, how many of the training samples are used, drawn at
            random. `None` for all.
        held_out_classes: Labels that are held out, too.
        corrupted: Boolean, whether images that show none of their classes any
            more are unknown inputs, too.
        people: Path of an npy file of people's labels of the test inputs, or
            `None`.
    """

    def __init__(
        self,
        path,
        more,
        num_held_out,
        rarer,
        draw,
        num_train=None,
        held_out_classes=(),
        corrupted=False,
        people=None,
    ):
        is_text = str(path).endswith((".json", ".json.gz"))
        parts, unknown = (read_texts if is_text else read_arrays)(path)
        x, y, x_test, y_test = parts
        y, y_test = np.ravel(y), np.ravel(y_test)
        classes, counts = np.unique(
            np.concatenate([y, y_test]), return_counts=True
        )
        if not 0 <= num_held_out <= len(classes) - 2:
            raise ValueError(
                f"{path} has {len(classes)} classes, of which two have to be "
                f"left. Received: --hold-out {num_held_out}."
            )
        named = list(held_out_classes)
        if not np.isin(named, classes).all():
            raise ValueError(
                f"{path} has the classes {classes.tolist()}. Received: "
                f"--hold-out-classes {' '.join(map(str, named))}."
            )
        rng = np.random.default_rng(draw)
        held_out = np.union1d(
            rng.choice(classes, num_held_out, replace=False),
            classes[(counts < rarer) | np.isin(classes, named)],
        )
        classes = np.setdiff1d(classes, held_out)
        for name, file in more.items():
            with np.load(file) as arrays:
                key = "x_test" if "x_test" in arrays else "x"
                unknown[name] = arrays[key]
        if len(classes) < 2:
            raise ValueError(
                f"Two classes of {path} have to be left. Received: --hold-out "
                f"{num_held_out}, --hold-out-rarer {rarer}, "
                f"--hold-out-classes {' '.join(map(str, named))}."
            )
        if num_train is not None:
            if not len(classes) <= num_train <= len(y):
                raise ValueError(
                    f"{path} has {len(y)} training samples of {len(classes)} "
                    f"classes. Received: --train {num_train}."
                )
            order = np.random.default_rng(2).permutation(len(y))[:num_train]
            x, y = x[order], y[order]
        seen, asked = np.isin(y, classes), np.isin(y_test, classes)
        if rarer:
            # The few that there are: nothing is trained with them.
            unknown = {
                "rare": np.concatenate([x[~seen], x_test[~asked]]),
                **unknown,
            }
        elif len(held_out):
            unknown = {"held out": x_test[~asked], **unknown}
        self.num_classes = len(classes)
        self.kind = "text" if is_text else "table"
        if x.ndim > 2:
            is_image = np.issubdtype(x.dtype, np.integer) or path == DIGITS
            self.kind = "images" if is_image else "speech"
        prepare = self._preparation(x[seen])
        self.x, self.y = prepare(x[seen]), np.searchsorted(classes, y[seen])
        self.people = None
        if people is not None:
            self.people = read_people(people, len(x_test), classes, held_out)
        self.x_test = prepare(x_test[asked])
        self.y_test = np.searchsorted(classes, y_test[asked])
        self.unknown = {name: prepare(x) for name, x in unknown.items()}
        for name, inputs in self.unknown.items():
            if inputs.shape[1:] != self.x.shape[1:]:
                raise ValueError(
                    f"Unknown inputs must have the shape of those of {path}, "
                    f"{self.x.shape[1:]}. Received: {inputs.shape[1:]} of "
                    f"{name!r}."
                )
        if corrupted:
            if self.kind != "images":
                raise ValueError(
                    "--corrupted is for images. Received: "
                    f"{path}, which holds data of the kind {self.kind!r}."
                )
            self.unknown |= corrupted_images(
                self.x_test, np.random.default_rng(0)
            )
            self.unknown[ROTATED] = rotated_images(self.x_test)
        self._add_noise(np.random.default_rng(1))

    def _preparation(self, x):
        if self.kind == "images":

            def prepare(x):
                x = (x / 255.0).astype("float32")
                return x[..., None] if x.ndim == 3 else x

            return prepare
        if self.kind == "text":
            return lambda x: x
        # A column of a table, a band of a spectrogram.
        axes = tuple(range(x.ndim - 1))
        mean, deviation = x.mean(axis=axes), x.std(axis=axes)
        scale = 1.0 / np.where(deviation > 0.0, deviation, 1.0)
        return lambda x: ((x - mean) * scale).astype("float32")

    def _add_noise(self, rng):
        mean, deviation = self.x.mean(axis=0), self.x.std(axis=0)
        for name, factor in (("noise", 1.0), ("far noise", 10.0)):
            noise = rng.normal(size=(1000, *self.x.shape[1:]))
            noise = mean + factor * deviation * noise
            self.unknown[name] = noise.astype("float32")


def features_of(data, network="convnet"):
    """The network of the kind of data, and how many epochs it trains.

    Args:
        data: `Data`.
        network: String, a key of `NETWORKS`, for images. Defaults to
            `"convnet"`.
    """
    shape = data.x.shape[1:]
    if data.kind == "images":
        return NETWORKS[network](shape), 15
    if data.kind == "speech":
        return speech_convnet(shape), 30
    x = inputs = keras.Input(shape)
    if data.kind == "text":
        x = layers.Dropout(0.5)(layers.Dense(512, activation="relu")(x))
        return keras.Model(inputs, x), 25
    for _ in range(2):
        x = layers.Dense(256, activation="relu")(x)
    return keras.Model(inputs, x), 30


# The last layer and the loss: all that is swapped.
METHODS = {
    "cross-entropy": lambda k: (layers.Dense(k), cross_entropy()),
    "label smoothing": lambda k: (layers.Dense(k), cross_entropy(0.1)),
    "LogitNorm": lambda k: (layers.Dense(k), baselines.logit_norm()),
    "T2FNorm": lambda k: (baselines.T2FNormHead(k), cross_entropy()),
    # Training alone has the scale of 10; without it probabilities are flat.
    "IsoMax+": lambda k: (
        baselines.IsoMaxPlusHead(k),
        cross_entropy(scale=10.0),
    ),
    "HALO": lambda k: (keras_halo.HALODense(k), keras_halo.HALOLoss()),
    "HALO, published": lambda k: (
        keras_halo.HALODense.reference(k),
        keras_halo.HALOLoss(),
    ),
}


def softmax(logits):
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def cross_entropy_of(distributions, logits):
    """Mean cross-entropy, in nats, of class probabilities."""
    logits = logits.astype("float64")
    top = logits.max(axis=-1, keepdims=True)
    log_sum = top + np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))
    return np.sum(distributions * (log_sum - logits), axis=-1).mean()


def scores_of_logits(logits):
    p = softmax(logits.astype("float64"))
    top = logits.max(axis=-1)
    log_sum = np.log(np.exp(logits - top[:, None]).sum(axis=-1)) + top
    return {
        "max softmax": -p.max(axis=-1),
        "energy": -log_sum,
        "gen": np.sum((p * (1.0 - p)) ** 0.1, axis=-1),
        "max_logit": -top,
    }


def scores_of_packed(packed):
    names = (ABSTAIN, "gap", "gen", "max_logit", "max_probability", "joint")
    return {name: keras_halo.ood_score(packed, name) for name in names}


def largest_class_probability(outputs, num_classes):
    """Mean over inputs of the probability of the likeliest class.

    For packed scores of all outcomes, abstaining among them.
    """
    if outputs.shape[-1] > num_classes:
        probabilities = keras_halo.decode_predictions(outputs).probabilities
    else:
        probabilities = softmax(outputs.astype("float64"))
    return np.mean(probabilities[:, :num_classes].max(axis=-1))


def train_and_measure(data, method, seed, epochs=None, network=None):
    """Trains one network; returns a dictionary of figures in percent."""
    keras.utils.set_random_seed(seed)
    network, usual_epochs = features_of(data, network or "convnet")
    epochs = usual_epochs if epochs is None else epochs
    head, loss = METHODS[method](data.num_classes)
    model = keras.Model(network.input, head(network.output))
    steps = epochs * -(-len(data.x) // 128)
    rate = keras.optimizers.schedules.CosineDecay(2e-3, steps)
    model.compile(keras.optimizers.Adam(rate), loss)
    start = time.perf_counter()
    model.fit(data.x, data.y, batch_size=128, epochs=epochs, verbose=0)
    seconds = time.perf_counter() - start

    def predict(x):
        return model.predict(x, batch_size=500, verbose=0)

    is_halo = isinstance(head, keras_halo.HALODense)
    score = scores_of_packed if is_halo else scores_of_logits
    outputs = predict(data.x_test)
    logits = outputs[:, : data.num_classes]
    known = score(outputs)
    right = logits.argmax(axis=-1) == data.y_test
    figures = {
        "accuracy": 100.0 * right.mean(),
        "ECE": 100.0
        * metrics.expected_calibration_error(data.y_test, softmax(logits)),
        "AURC": 100.0
        * metrics.aurc(~right, -softmax(logits.astype("float64")).max(axis=-1)),
        "seconds": seconds,
    }
    if data.people is not None:
        figures[PEOPLE] = 100.0 * cross_entropy_of(data.people, logits)
    for name, x in (("known", data.x_test), ("noise", data.unknown["noise"])):
        for factor in (1, 10, 100, 1000):
            figures[f"largest class probability, {name} times {factor}"] = (
                100.0
                * largest_class_probability(
                    predict(np.float32(factor) * x), data.num_classes
                )
            )
    if is_halo:
        answered = ~keras_halo.decode_predictions(outputs).abstained
        figures["accuracy, abstaining wrong"] = 100.0 * np.mean(
            right & answered
        )
        figures["known answered"] = 100.0 * answered.mean()
    for name, x in data.unknown.items():
        outputs = predict(x)
        for detector, values in score(outputs).items():
            area = metrics.auroc(known[detector], values)
            figures[f"AUROC {name}|{detector}"] = 100.0 * area
        if is_halo:
            abstained = keras_halo.decode_predictions(outputs).abstained
            figures[f"refused {name}"] = 100.0 * abstained.mean()
    return {name: float(value) for name, value in figures.items()}


def run(folder, arguments, data, method, seed, draw):
    """The figures of one run, from its file where there is one."""
    settings = {
        "data": arguments.digest,
        "hold_out": arguments.hold_out,
        "rarer": arguments.hold_out_rarer,
        "unknown": sorted(arguments.unknown_digests.items()),
        "method": method,
        "seed": seed,
        "draw": draw,
        "backend": keras.backend.backend(),
        "version": VERSION,
    }
    # What is not asked for leaves the names of earlier runs as they were.
    options = ("train", "epochs", "hold_out_classes", "corrupted", "network")
    for option in options:
        if getattr(arguments, option):
            settings[option] = getattr(arguments, option)
    if arguments.people:
        settings["people"] = digest(arguments.people)
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    path = folder / f"{key.hexdigest()[:16]}.json"
    if not path.exists():
        figures = train_and_measure(
            data, method, seed, arguments.epochs, arguments.network
        )
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(
            json.dumps({"settings": settings, "figures": figures}, indent=1)
        )
        os.replace(unfinished, path)
    return json.loads(path.read_text())["figures"]


def with_mean_of_sets(figures):
    """Figures and, of each detector, the mean AUROC over the unknown sets.

    Noise that is made for every kind of data does not count.
    """
    sets = [n for n in unknown_sets({"": [figures]}) if n not in NOISE_SETS]
    if len(sets) < 2:
        return figures
    detectors = by_detector([figures], sets[0])
    return figures | {
        f"AUROC mean of {len(sets)} sets|{detector}": float(
            np.mean([figures[f"{name}|{detector}"] for name in sets])
        )
        for detector in detectors
    }


def cell(values):
    """Mean and standard deviation."""
    if not values:
        return ""
    spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{spread}"


def names_of(results):
    """What was measured, in the order in which it was measured first."""
    rows = [row for rows in results.values() for row in rows]
    return list(dict.fromkeys(name for row in rows for name in row))


def markdown(results, lines):
    head = "| % | " + " | ".join(results) + " |"
    return "\n".join([head, "|---" * (1 + len(results)) + "|", *lines])


def row_of(results, name):
    cells = (
        cell([row[name] for row in rows if name in row])
        for rows in results.values()
    )
    return f"| {name} | " + " | ".join(cells) + " |"


def by_detector(rows, prefix):
    """Dictionary of detector to its figures of one unknown set."""
    names = (n for n in names_of({"": rows}) if n.startswith(prefix + "|"))
    return {n.partition("|")[2]: [row[n] for row in rows] for n in names}


def unknown_sets(results):
    prefixes = (n.partition("|")[0] for n in names_of(results) if "|" in n)
    return list(dict.fromkeys(prefixes))


def table(results):
    """Markdown: means and standard deviations over draws and seeds."""
    lines = [row_of(results, n) for n in names_of(results) if "|" not in n]
    for name in unknown_sets(results):
        cells = (
            "<br>".join(
                f"{detector} {cell(values)}"
                for detector, values in by_detector(rows, name).items()
            )
            for rows in results.values()
        )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return markdown(results, lines)


def summary(results):
    """Markdown: HALO by its default, and baselines by their best score.

    The best one of each set, by its mean on that very set: to the advantage of
    the baselines.
    """
    lines = [row_of(results, name) for name in ("accuracy", "ECE")]
    for name in unknown_sets(results):
        cells = []
        for rows in results.values():
            of = by_detector(rows, name)
            best = max(of, key=lambda detector: np.mean(of[detector]))
            best = ABSTAIN if ABSTAIN in of else best
            cells.append(f"{cell(of[best])} ({best})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return markdown(results, lines)


def named_path(text):
    name, _, path = text.rpartition("=")
    return name or pathlib.Path(path).stem, path


def digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", required=True, help="the file, see above")
    parser.add_argument(
        "--unknown",
        nargs="+",
        default=[],
        metavar="[NAME=]FILE",
        help="npz files with more unknown inputs, `x` or `x_test`",
    )
    parser.add_argument(
        "--hold-out", type=int, default=0, help="how many classes"
    )
    parser.add_argument(
        "--hold-out-rarer",
        type=int,
        default=0,
        metavar="N",
        help="classes of fewer than N samples, and all of these are unknown",
    )
    parser.add_argument(
        "--draws", type=int, default=3, help="random draws of these, default 3"
    )
    parser.add_argument(
        "--train",
        type=int,
        metavar="N",
        help="train with N samples, drawn at random, instead of all",
    )
    parser.add_argument(
        "--epochs", type=int, metavar="N", help="in the place of the usual ones"
    )
    parser.add_argument(
        "--hold-out-classes",
        type=int,
        nargs="+",
        default=[],
        metavar="LABEL",
        help="these classes, in every draw",
    )
    parser.add_argument(
        "--corrupted",
        action="store_true",
        help="noise, and test images that show none of their classes any more",
    )
    parser.add_argument(
        "--network",
        choices=tuple(NETWORKS),
        help="of images, in the place of convnet",
    )
    parser.add_argument(
        "--people", metavar="FILE", help="npy file of people's labels"
    )
    parser.add_argument("--seeds", type=int, default=3, help="default 3")
    parser.add_argument(
        "--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS)
    )
    parser.add_argument("--output", default="swap_results", help="folder")
    parsed = parser.parse_args(arguments)
    more = dict(map(named_path, parsed.unknown))
    try:
        is_file = parsed.data != DIGITS
        parsed.digest = digest(parsed.data) if is_file else DIGITS
        parsed.unknown_digests = {n: digest(path) for n, path in more.items()}
    except OSError as error:
        sys.exit(f"default_swap.py: {error}")
    folder = pathlib.Path(parsed.output)
    folder.mkdir(parents=True, exist_ok=True)
    results = {method: [] for method in parsed.methods}
    draws = range(parsed.draws if parsed.hold_out else 1)
    for draw in draws:
        try:
            data = Data(
                parsed.data,
                more,
                parsed.hold_out,
                parsed.hold_out_rarer,
                draw,
                parsed.train,
                parsed.hold_out_classes,
                parsed.corrupted,
                parsed.people,
            )
            if parsed.network and data.kind != "images":
                raise ValueError(
                    "--network is for images. Received: "
                    f"{parsed.data}, which holds data of the kind "
                    f"{data.kind!r}."
                )
        except (OSError, KeyError, ValueError) as error:
            sys.exit(f"default_swap.py: {error}")
        for seed in range(parsed.seeds):
            for method in parsed.methods:
                figures = run(folder, parsed, data, method, seed, draw)
                results[method].append(with_mean_of_sets(figures))
                print(
                    f"draw {draw}, seed {seed}, {method}: accuracy "
                    f"{figures['accuracy']:.2f}, ECE {figures['ECE']:.2f}",
                    flush=True,
                )
    (folder / "table.md").write_text(table(results) + "\n", "utf-8")
    print(
        f"\n{summary(results)}\n\nEvery score of every method: "
        f"{folder / 'table.md'}."
    )
    return results


if __name__ == "__main__":
    main()
