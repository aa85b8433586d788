"""Keras's own examples with the lines swapped: every kind of file is read."""

import json
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest

SCRIPT = pathlib.Path(__file__).with_name("official_examples.py")
# The small Xception takes long to compile; its data are those of the second.
NAMES = (
    "mnist_convnet",
    "transfer_learning",
    "text_classification_from_scratch",
    "timeseries_classification_from_scratch",
)


def run(*arguments):
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)],
        env=os.environ,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    digits = rng.integers(0, 256, (60, 28, 28)).astype("uint8")
    np.savez(folder / "mnist.npz", x=digits, y=np.arange(60) % 10)
    pictures = rng.integers(0, 256, (60, 32, 32, 3)).astype("uint8")
    labels = np.arange(60) % 2 * 2 + 3
    np.savez(
        folder / "cifar10.npz",
        x_train=pictures,
        y_train=labels[:, None],
        x_test=pictures,
        y_test=labels[:, None],
    )
    inputs = keras.Input((96, 96, 3))
    keras.Model(inputs, keras.layers.AveragePooling2D(32)(inputs)).save(
        folder / "backbone.keras"
    )
    lines = [
        f"{i}\t{rating}\tThe {word}, <br />really {word}!\n"
        for i in range(30)
        for rating, word in ((1.5, "best"), (-2, "worst"), (0, "same"))
    ]
    (folder / "reviews.txt").write_text("".join(lines), "latin-1")
    lengths = rng.integers(3000, 7000, 60)
    np.savez(
        folder / "series.npz",
        samples=rng.integers(-999, 999, lengths.sum()).astype("int16"),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        y=np.arange(60) % 3,
    )
    for part in ("TRAIN", "TEST"):
        table = np.column_stack(
            [np.tile([-1, 1], 20), rng.normal(size=(40, 30))]
        )
        np.savetxt(folder / f"Ford_{part}.tsv", table, delimiter="\t")
    return {
        "mnist": folder / "mnist.npz",
        "cifar10": folder / "cifar10.npz",
        "backbone": folder / "backbone.keras",
        "reviews": folder / "reviews.txt",
        "series": folder / "series.npz",
        "tables": folder / "Ford_TRAIN.tsv",
    }


def short(files, output, *names, series="series"):
    options = {**files, "series": files[series], "output": output}
    del options["tables"]
    arguments = [x for name in options for x in (f"--{name}", options[name])]
    arguments += ["--train", 40, "--epochs", 1, "--seeds", 0, "--only", *names]
    return run(*arguments)


def test_either_head_is_trained_on_each_and_never_twice(files, tmp_path):
    done = short(files, tmp_path, *NAMES)
    assert done.returncode == 0, done.stderr
    for name in NAMES:
        for kind in ("original", "HALO"):
            assert f"| {name} | {kind} | " in done.stdout
            path = tmp_path / f"{name}-40-1-{kind}-0.json"
            figures = json.loads(path.read_text())
            assert 0 <= figures["ECE"] <= 1
            # Abstaining counts as an error in `"accuracy"`, and only there.
            lowest = figures["best-class accuracy"] - figures["abstained"]
            assert figures['"accuracy"'] >= lowest - 1e-6
            highest = figures["best-class accuracy"]
            assert figures['"accuracy"'] <= highest + 1e-6
            if kind == "original":
                assert figures["abstained"] == 0
    again = short(files, tmp_path, *NAMES)
    assert again.returncode == 0
    assert "-40-1-" not in again.stdout
    table = (tmp_path / "table.md").read_text("utf-8")
    assert table.strip() in again.stdout


def test_the_tables_of_the_original_time_series_are_read(files, tmp_path):
    done = short(files, tmp_path, NAMES[-1], series="tables")
    assert done.returncode == 0, done.stderr
    assert f"| {NAMES[-1]} | HALO | " in done.stdout


def test_what_is_missing_or_wrong_is_named(files, tmp_path):
    done = run("--only", NAMES[1], NAMES[2], "--output", tmp_path)
    assert done.returncode == 0
    assert "transfer_learning: left out without --backbone" in done.stdout
    assert f"{NAMES[2]}: left out without --reviews" in done.stdout
    wrong = {**files, "mnist": files["series"]}
    done = short(wrong, tmp_path, NAMES[0])
    assert done.returncode == 1
    assert "must hold x, y. Missing: x" in done.stderr
    (tmp_path / "bad.txt").write_text("1\tnot a rating\ta text\n")
    wrong = {**files, "reviews": tmp_path / "bad.txt"}
    done = short(wrong, tmp_path, NAMES[2])
    assert done.returncode == 1
    assert "separated by tabs" in done.stderr
