"""Counts how many decisions are equal across backends and export formats.

    KERAS_BACKEND=jax python tests/scripts/exported_decisions.py FOLDER
    KERAS_BACKEND=torch python tests/scripts/exported_decisions.py FOLDER

The first run writes a guarded model and 100,000 inputs to the folder. Every run
decides on all of them, on its backend and in each format that the backend
exports to, and prints how many labels are those of every run so far in the same
folder. It fails if fewer than 99.99 % are, or if labels differ where the score
is farther than `BAND` from the threshold and the logits of the best two classes
are farther than it from each other.
"""

import itertools
import pathlib
import sys
import tempfile

import keras
import numpy as np
import pytest

import keras_halo
from keras_halo import HALODense, HALOLoss
from keras_halo.rejection import CoverageRule

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from formats import BACKEND, FORMATS

COUNT, DIM, CLASSES = 100_000, 16, 8

# Of scores and logits, relative to the threshold.
BAND = 1e-4

SHARE = 0.9999


def make(folder):
    """Trains a small network, guards it, and draws inputs of many kinds."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(CLASSES, DIM))
    labels = rng.integers(CLASSES, size=8000)
    x = centers[labels] + rng.normal(0.0, 0.6, size=(8000, DIM))
    x = x.astype("float32")
    model = keras.Sequential(
        [
            keras.Input((DIM,)),
            keras.layers.Dense(64, activation="relu"),
            HALODense(CLASSES, embedding_dim=32),
        ]
    )
    model.compile(keras.optimizers.Adam(3e-3), HALOLoss())
    model.fit(x[:4000], labels[:4000], epochs=5, batch_size=64, verbose=0)
    rule = CoverageRule(0.9)
    rule.fit(model.predict(x[4000:], verbose=0), labels[4000:])
    keras_halo.guard(model, rule).save(folder / "guarded.keras")
    # Known ones, ones between two classes, noise, and noise far out.
    first, second = rng.integers(CLASSES, size=(2, COUNT))
    share = rng.choice([0.0, 0.0, 0.3, 0.5], size=(COUNT, 1))
    inputs = (1.0 - share) * centers[first] + share * centers[second]
    inputs += rng.normal(0.0, 0.6, size=(COUNT, DIM))
    noise = rng.random(COUNT) < 0.2
    scale = rng.choice([1.0, 3.0, 30.0], size=(COUNT, 1))
    inputs[noise] = (scale * rng.normal(size=(COUNT, DIM)))[noise]
    np.save(folder / "inputs.npy", inputs.astype("float32"))


def labels_and_scores(outputs, names):
    if not isinstance(outputs, dict):
        outputs = dict(zip(names, outputs, strict=True))
    return {
        name: keras.ops.convert_to_numpy(outputs[name])
        for name in ("label", "score", "probabilities")
    }


def decide(folder):
    """Decides on all inputs in every format of this backend."""
    guarded = keras.models.load_model(folder / "guarded.keras")
    x = np.load(folder / "inputs.npy")
    guarded(x[:1])
    names = sorted(guarded.output)
    runs = {"predict": lambda x: guarded.predict(x, 4000, verbose=0)}
    with tempfile.TemporaryDirectory() as temporary:
        for export in FORMATS:
            model = guarded
            if BACKEND == "torch" and export.__name__ == "openvino":
                # PyTorch's tracer refuses the dictionary.
                model = keras.Model(
                    guarded.inputs[0],
                    [guarded.output[name] for name in names],
                )
                model(x[:1])
            target = pathlib.Path(temporary) / export.__name__
            target.mkdir()
            try:
                runs[export.__name__] = export(model, target)
            except pytest.skip.Exception as reason:
                print(f"{BACKEND} {export.__name__}: skipped, {reason}")
        for name, run in runs.items():
            batches = [
                labels_and_scores(run(x[start : start + 4000]), names)
                for start in range(0, COUNT, 4000)
            ]
            np.savez(
                folder / f"{BACKEND}-{name}.npz",
                **{
                    key: np.concatenate([batch[key] for batch in batches])
                    for key in batches[0]
                },
            )


def compare(folder):
    """Prints how many labels are equal; returns whether enough are."""
    certificate = keras_halo.read_certificate(folder / "guarded.keras")
    threshold = certificate["threshold"]
    answers = {
        path.stem: dict(np.load(path)) for path in sorted(folder.glob("*.npz"))
    }
    first = next(iter(answers.values()))
    print(
        f"{COUNT:,} inputs, {np.mean(first['label'] == -1):.1%} rejected, "
        f"threshold {threshold:.6g}, band {BAND:g} of it"
    )
    enough = True
    for one, other in itertools.combinations(answers, 2):
        a, b = answers[one], answers[other]
        different = np.flatnonzero(a["label"] != b["label"])
        largest = np.abs(a["score"] - b["score"])
        largest = largest / np.maximum(1.0, np.abs(a["score"]))
        distances = np.abs(a["score"][different] - threshold)
        top = np.sort(a["probabilities"][different], axis=-1)[:, -2:]
        gaps = np.log(top[:, 1] / np.maximum(top[:, 0], 1e-30))
        # Where both accept, two classes are as probable.
        both = (a["label"][different] >= 0) & (b["label"][different] >= 0)
        distances = np.where(both, gaps, distances)
        distances = distances / max(1.0, abs(threshold))
        farthest = distances.max(initial=0.0)
        print(
            f"{one:23}{other:23}{COUNT - len(different):9,} equal, "
            f"farthest of the others {farthest:.1e}, scores {largest.max():.1e}"
        )
        enough &= len(different) <= (1.0 - SHARE) * COUNT and farthest <= BAND
    return enough


if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "inputs.npy").exists():
        make(folder)
    decide(folder)
    if not compare(folder):
        sys.exit("too many decisions differ, or too far from the threshold")
