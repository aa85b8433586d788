"""The examples in the docstrings of the installed package run as they stand."""

import doctest
import importlib
import pkgutil

import keras
import numpy as np
import pytest

import keras_halo

pytestmark = pytest.mark.slow

# Read, not made, by users: the functions that return them have the example.
RESULTS = {"CalibrationReport", "OODReport", "Predictions"}

MODULES = [
    module.name
    for module in pkgutil.walk_packages(keras_halo.__path__, "keras_halo.")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    module = importlib.import_module(name)
    names = {
        "np": np,
        "keras": keras,
        "ops": keras.ops,
        "keras_halo": keras_halo,
    }
    results = doctest.testmod(
        module,
        extraglobs=names,
        optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE,
    )
    assert results.failed == 0


def test_every_public_name_has_an_example():
    without = [
        name
        for name in keras_halo.__all__
        if callable(getattr(keras_halo, name))
        and name not in RESULTS
        and ">>>" not in getattr(keras_halo, name).__doc__
    ]
    assert without == []
