"""The names of types: each is used, and none needs more than NumPy."""

import ast
import pathlib
import subprocess
import sys
import typing

import numpy as np
import pytest

import keras_halo
from keras_halo.utils import types

pytestmark = pytest.mark.any_backend

ROOT = pathlib.Path(keras_halo.__file__).parent
NAMES = {
    target.id
    for node in ast.walk(ast.parse(pathlib.Path(types.__file__).read_text()))
    if isinstance(node, ast.AnnAssign)
    for target in [node.target]
}


def test_each_name_stands_in_an_annotation():
    imported = set()
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (
                node.module == "keras_halo.utils.types"
            ):
                imported |= {alias.name for alias in node.names}
    assert {"Tensor", "Data", "Scores"} <= NAMES
    assert imported >= NAMES, NAMES - imported


def test_annotations_with_them_can_be_resolved():
    hints = typing.get_type_hints(keras_halo.ood_score)
    assert hints["scores"] == types.Scores
    assert hints["return"] == types.Array


def test_arrays_are_those_of_numpy():
    assert typing.get_origin(types.Array) is np.ndarray


def test_they_need_neither_matplotlib_nor_a_backend():
    # `Axes` stands for what only the extra `tools` brings.
    code = (
        "import importlib.util, sys; "
        f"spec = importlib.util.spec_from_file_location('t', {types.__file__!r}"
        "); module = importlib.util.module_from_spec(spec); "
        "spec.loader.exec_module(module); "
        "print({'matplotlib', 'keras', 'jax', 'torch', 'tensorflow'} "
        "& set(sys.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert run.stdout.strip() == "set()"
