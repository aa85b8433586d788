"""Fitting and scoring on worker processes of Dask: `tox -e dask`."""

import json
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_halo
from keras_halo import rejection

pytest.importorskip("distributed", reason="needs Dask, see `tox -e dask`")

SCRIPT = pathlib.Path(__file__).parents[1] / "benchmarks" / "dask_scoring.py"
ROWS, CHUNK = 24_000, 1_000


def run(folder, *options):
    arguments = ["--rows", str(ROWS), "--chunk", str(CHUNK), *options]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), *arguments],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, run(folder, "--workers", "1", "2")


def answers(folder):
    parts = [np.load(path) for path in sorted(folder.glob("*.npz"))]
    assert len(parts) == ROWS // CHUNK
    return {
        name: np.concatenate([part[name] for part in parts])
        for name in ("label", "p_value")
    }


def test_any_number_of_workers_gives_one_report(undisturbed):
    folder, (one, two) = undisturbed
    assert one == two and one["rows"] == ROWS
    first, second = answers(folder / "answers1"), answers(folder / "answers2")
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
    # What the rule was asked for, and what it says of noise.
    assert one["known accepted"] / one["known"] == pytest.approx(0.95, abs=0.02)
    assert one["unknown rejected"] > 0.9 * one["unknown"]
    assert (first["label"] >= 0).sum() == (
        one["known accepted"] + one["unknown"] - one["unknown rejected"]
    )


def test_a_killed_worker_loses_nothing(undisturbed, tmp_path):
    folder, (expected, _) = undisturbed
    (found,) = run(tmp_path, "--workers", "2", "--kill")
    assert found == expected
    one, other = answers(folder / "answers1"), answers(tmp_path / "answers2")
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def test_what_shards_fitted_is_what_one_pass_fits(undisturbed):
    folder, _ = undisturbed
    model = keras.models.load_model(folder / "model.keras")
    shards = [np.load(folder / f"shard{number}.npz") for number in range(16)]
    x, y = (
        np.concatenate([shard[name] for shard in shards]) for name in ("x", "y")
    )
    fitted = keras_halo.fit_class_gaussians(
        model, x[:8000], y[:8000], 1000, verbose=0
    )
    rule = rejection.CoverageRule(0.95, method="fitted")
    rule.fit(fitted.predict(x[8000:], 1000, verbose=0), y[8000:])
    certificate = keras_halo.read_certificate(folder / "guarded.keras")
    assert certificate["threshold"] == pytest.approx(rule.threshold, rel=1e-5)
    assert certificate["calibration"]["samples"] == 8000
    guarded = keras.models.load_model(folder / "guarded.keras")
    labels = guarded.predict(x, 1000, verbose=0)["label"]
    expected = rule.predict(fitted.predict(x, 1000, verbose=0)).labels
    assert np.mean(labels == expected) >= 0.9999
