"""A file saved on any backend answers the same on every other.

`tox -e exchange` installs the three of them; in an environment with one
backend only that one remains. Files of earlier releases, made on each backend,
are loaded by `test_faults.py` everywhere.
"""

import importlib.util
import itertools
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from cases import passed

pytestmark = pytest.mark.slow

SCRIPT = pathlib.Path(__file__).parent / "scripts" / "exchanged.py"

BACKENDS = ("jax", "tensorflow", "torch")

TIME_LIMIT = 300


def skip_without(*backends):
    for backend in backends:
        if importlib.util.find_spec(backend) is None:
            pytest.skip(f"{backend} is not installed here")


def run(backend, *arguments):
    # Of its own, because a process has one backend.
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        env={**os.environ, "KERAS_BACKEND": backend},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIME_LIMIT,
    )
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("exchange")


@pytest.mark.parametrize(
    "saved_by, loaded_by", list(itertools.product(BACKENDS, BACKENDS))
)
def test_files_answer_the_same_on_every_backend(saved_by, loaded_by, folder):
    skip_without(saved_by, loaded_by)
    if not (folder / saved_by).exists():
        run(saved_by, folder, "save")
    run(loaded_by, folder, "load", saved_by)
    with (
        np.load(folder / saved_by / "predictions.npz") as expected,
        np.load(folder / f"{saved_by}-on-{loaded_by}.npz") as found,
    ):
        assert set(found) == set(expected)
        assert {"classifier", "towers", "probabilities"} < set(found)
        for name in expected:
            np.testing.assert_allclose(
                found[name], expected[name], rtol=1e-5, atol=1e-5
            )
    passed[f"saved on {saved_by}, loaded on {loaded_by}"] += 1
