"""Guarantees about the package as a whole."""

import ast
import importlib.metadata
import pathlib
import re
import subprocess
import sys

import pytest

import keras_halo

SOURCE = pathlib.Path(keras_halo.__file__).parent


def _imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_no_backend_is_imported():
    found = {
        f"{path.name}: {module}"
        for path in SOURCE.rglob("*.py")
        for module in _imported_modules(path)
        if module.split(".")[0] in ("tensorflow", "jax", "jaxlib", "torch")
    }
    assert found == set()


@pytest.mark.slow
def test_imports_with_keras_and_numpy_alone():
    # A finder that hides what only the extras bring.
    program = """
import importlib.abc, sys
HIDDEN = {"sklearn", "scipy", "matplotlib", "pandas"}
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
import keras
for name in [n for n in sys.modules if n.split(".")[0] in HIDDEN]:
    del sys.modules[name]
sys.meta_path.insert(0, Hide())
import keras_halo, numpy as np
scores = keras_halo.HALODense.reference(3)(np.zeros((2, 4), "float32"))
print(keras_halo.decode_predictions(scores).labels.tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[-1, -1]"


def test_core_requires_keras_and_numpy_only():
    required = {
        re.split(r"[<>=!~ ;\[]", line)[0].lower()
        for line in importlib.metadata.requires("keras-halo")
        if "extra ==" not in line
    }
    assert required == {"keras", "numpy"}


def test_version_is_that_of_the_distribution():
    assert importlib.metadata.version("keras-halo") == keras_halo.__version__


def test_every_public_name_exists():
    assert sorted(keras_halo.__all__) == sorted(set(keras_halo.__all__))
    for name in keras_halo.__all__:
        assert getattr(keras_halo, name) is not None


def test_the_wheel_is_typed():
    assert (SOURCE / "py.typed").is_file()
