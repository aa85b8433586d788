"""
Title: A network trained with cross-entropy, given the answer "I don't know"
Description: add_abstention against detectors fitted after training.

Trains the networks of `default_swap.py` with `Dense` and cross-entropy. Then
each of them is read in three ways: by its logits, by detectors that are fitted
on its features after training, and by the packed scores of
`keras_halo.add_abstention(model, x, y)`, called once with its defaults.

    python benchmarks/trained_network.py --data digits --hold-out-classes 8 9
    python benchmarks/trained_network.py --data fashion.npz --train 20000 \\
        --corrupted --unknown MNIST=mnist10k.npz
    python benchmarks/trained_network.py --data cifar10.npz \\
        --network small_resnet --epochs 10 --unknown near-CIFAR-100=cifar100.npz

`--data` and `--unknown` are files as `default_swap.py` takes them. Trained
networks are kept in the output folder: the same command again trains what is
missing. Classes that are held out and `--unknown` sets whose names begin with
`near` are near, all others are far; noise that is made for every kind of data
is in no mean. Needs `keras-halo[tools]`.
"""

import argparse
import os
import pathlib
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import default_swap
import keras
import numpy as np
from baselines import cross_entropy
from default_swap import Data, digest, features_of, named_path
from keras import layers
from networks import NETWORKS, block_outputs
from ood_bench import posthoc

import keras_halo
from keras_halo import metrics

LOGITS, FITTED, ADDED = "logits", "post-hoc", "add_abstention"
MEANS = ("near", "far")


def trained(data, arguments, seed, path):
    """The network with a linear head, from its file where there is one."""
    keras.utils.set_random_seed(seed)
    network, epochs = features_of(data, arguments.network)
    logits = layers.Dense(data.num_classes, name="logits")(network.output)
    model = keras.Model(network.input, logits)
    if path.exists():
        model.load_weights(path)
        return model
    epochs = arguments.epochs or epochs
    steps = epochs * -(-len(data.x) // 128)
    rate = keras.optimizers.schedules.CosineDecay(2e-3, steps)
    model.compile(keras.optimizers.Adam(rate), cross_entropy())
    model.fit(data.x, data.y, batch_size=128, epochs=epochs, verbose=2)
    unfinished = path.with_name("unfinished.weights.h5")
    model.save_weights(unfinished)
    os.replace(unfinished, path)
    return model


def predict(model, x):
    return model.predict(x, batch_size=500, verbose=0)


def calibration(logits, labels):
    """Accuracy and calibration of class logits, in percent."""
    right = logits.argmax(axis=-1) == labels
    probabilities = default_swap.softmax(logits.astype("float64"))
    error = metrics.expected_calibration_error(labels, probabilities)
    return {
        "accuracy": 100.0 * right.mean(),
        "ECE": 100.0 * error,
        "AURC": 100.0 * metrics.aurc(~right, -probabilities.max(axis=-1)),
    }


def areas(known, unknown):
    """AUROC of every unknown set, and the means of near and far ones.

    Args:
        known: Array of scores.
        unknown: Dictionary of name to an array of scores.
    """
    found = {
        name: 100.0 * metrics.auroc(known, scores)
        for name, scores in unknown.items()
    }
    groups = {mean: [] for mean in MEANS}
    for name, area in found.items():
        if f"AUROC {name}" not in default_swap.NOISE_SETS:
            groups["near" if is_near(name) else "far"].append(area)
    means = {f"mean, {n}": np.mean(v) for n, v in groups.items() if v}
    return found | means


def is_near(name):
    return name.startswith("near") or name == "held out"


def measure(data, model):
    """Dictionary of way, score and figure, `(way, score)` to figures."""
    features = {
        "features": model.layers[-1].input,
        "logits": model.output,
    }
    blocks = block_outputs(model)
    if blocks:
        features["blocks"] = keras_halo.layers.BlockFeatures()(blocks)
    network = keras.Model(model.input, features)
    sets = {"": data.x_test, **data.unknown}
    outputs = {name: predict(network, x) for name, x in sets.items()}
    train = predict(network, data.x)
    known = outputs[""]["logits"]
    base = calibration(known, data.y_test)
    figures = {(LOGITS, name): dict(base) for name in free_scores(known)}
    for key in figures:
        scores = {
            name: free_scores(values["logits"])[key[1]]
            for name, values in outputs.items()
        }
        figures[key] |= areas(scores.pop(""), scores)
    detectors = posthoc.fit_all(
        train["features"],
        train["logits"],
        data.y,
        *model.layers[-1].get_weights(),
        1.0,
    )
    for name in posthoc.logit_detectors(1.0):
        del detectors[name]
    if blocks:
        detectors |= posthoc.fit_on_blocks(
            train["blocks"], data.y, data.num_classes
        )
    for name, detector in detectors.items():
        scores = {
            unknown: detector.score(values[detector.reads], values["logits"])
            for unknown, values in outputs.items()
        }
        figures[FITTED, name] = base | areas(scores.pop(""), scores)
    for name, epochs in (("default", 3), ("epochs=0", 0)):
        start = time.perf_counter()
        added = keras_halo.add_abstention(
            model, data.x, data.y, epochs=epochs, verbose=0
        )
        seconds = time.perf_counter() - start
        packed = {name: predict(added, x) for name, x in sets.items()}
        scores = {n: keras_halo.ood_score(p) for n, p in packed.items()}
        answers = {n: ~abstained(p) for n, p in packed.items()}
        figures[ADDED, name] = {
            **calibration(packed[""][:, : data.num_classes], data.y_test),
            "known answered": 100.0 * answers[""].mean(),
            "seconds": seconds,
            **areas(scores.pop(""), scores),
            **{
                f"refused {n}": 100.0 - 100.0 * answers[n].mean()
                for n in data.unknown
            },
        }
    return figures


def free_scores(logits):
    return default_swap.scores_of_logits(logits)


def abstained(packed):
    return keras_halo.decode_predictions(packed).abstained


def table(runs):
    """Markdown: a row for every way of reading the networks.

    Args:
        runs: List of what `measure` returns, one for every seed.
    """
    columns = list(
        dict.fromkeys(n for r in runs for f in r.values() for n in f)
    )
    lines = [
        "| % | score | " + " | ".join(columns) + " |",
        "|---" * (2 + len(columns)) + "|",
    ]
    for way, score in runs[0]:
        rows = [run[way, score] for run in runs]
        cells = [
            default_swap.cell([row[name] for row in rows if name in row])
            for name in columns
        ]
        lines.append(f"| {way} | {score} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(runs):
    """Markdown: logits and detectors by their best score, to their advantage.

    The best by its mean over seeds on the very sets that are reported.
    """
    means = [f"mean, {n}" for n in MEANS]
    means = [m for m in means if m in next(iter(runs[0].values()))]
    names = ["accuracy", "ECE", *means]
    head = "| % | " + " | ".join(names) + " |"
    lines = [head, "|---" * (1 + len(names)) + "|"]
    for way in (LOGITS, FITTED, ADDED):
        keys = [key for key in runs[0] if key[0] == way]
        if way == ADDED:
            keys = keys[:1]
        cells = []
        for name in names:

            def values(key, name=name):
                return [run[key][name] for run in runs]

            best = max(keys, key=lambda key: np.mean(values(key)))
            note = f" ({best[1]})" if name in means and way != ADDED else ""
            cells.append(default_swap.cell(values(best)) + note)
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", required=True, help="the file")
    parser.add_argument(
        "--unknown", nargs="+", default=[], metavar="[NAME=]FILE"
    )
    parser.add_argument("--train", type=int, metavar="N")
    parser.add_argument("--epochs", type=int, metavar="N")
    parser.add_argument(
        "--hold-out-classes", type=int, nargs="+", default=[], metavar="LABEL"
    )
    parser.add_argument("--corrupted", action="store_true")
    parser.add_argument("--network", choices=tuple(NETWORKS), default="convnet")
    parser.add_argument("--seeds", type=int, default=3, help="default 3")
    parser.add_argument("--output", default="trained_results", help="folder")
    parsed = parser.parse_args(arguments)
    try:
        data = Data(
            parsed.data,
            dict(map(named_path, parsed.unknown)),
            0,
            0,
            0,
            parsed.train,
            parsed.hold_out_classes,
            parsed.corrupted,
        )
    except (OSError, KeyError, ValueError) as error:
        sys.exit(f"trained_network.py: {error}")
    folder = pathlib.Path(parsed.output)
    folder.mkdir(parents=True, exist_ok=True)
    identity = parsed.data
    if parsed.data != default_swap.DIGITS:
        identity = digest(parsed.data)[:12]
    held_out = "".join(map(str, parsed.hold_out_classes))
    runs = []
    for seed in range(parsed.seeds):
        name = (
            f"{identity}-{parsed.network}-{parsed.train}-{parsed.epochs}-"
            f"{held_out}-{keras.backend.backend()}-{seed}.weights.h5"
        )
        model = trained(data, parsed, seed, folder / name)
        runs.append(measure(data, model))
        print(f"seed {seed}\n{summary(runs[-1:])}", flush=True)
    (folder / "table.md").write_text(table(runs) + "\n", "utf-8")
    print(
        f"\n{summary(runs)}\n\nEvery score: {folder / 'table.md'}, of "
        f"{len(runs)} networks."
    )
    return runs


if __name__ == "__main__":
    main()
