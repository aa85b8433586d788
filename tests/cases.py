"""How many cases a test runs, a count of those that it did run, and bad values.

`HALO_TESTS=thorough` asks for many times more cases than the suite runs by
default, and has them counted at the end of the run.
"""

import collections
import functools
import os
import pathlib

import numpy as np
from hypothesis import given, settings

PROFILE = os.environ.get("HALO_TESTS", "quick")

THOROUGH = PROFILE == "thorough"

# Quick runs draw the same cases every time: a failure is a change of the code.
settings.register_profile(
    "quick", max_examples=10, deadline=None, derandomize=True
)
settings.register_profile(
    "thorough", max_examples=200, deadline=None, print_blob=True
)

# Cases that passed, by the name of the test.
passed = collections.Counter()


def for_all(**strategies):
    """`hypothesis.given`, with every case that passes counted."""

    def decorate(test):
        @functools.wraps(test)
        def counted(**drawn):
            test(**drawn)
            passed[test.__name__] += 1

        return settings(settings.get_profile(PROFILE))(
            given(**strategies)(counted)
        )

    return decorate


# What is no array of numbers, by the name of what it is.
NO_NUMBERS = {
    "none": None,
    "text": "typo",
    "path": pathlib.Path("train.npz"),
    "object": object(),
    "function": len,
    "dictionary": {"x": 1.0},
    "names": ["cat", "dog"],
    "bytes": np.array([b"cat", b"dog"]),
    "nones": [1.0, None],
    "objects": np.array([object(), 1.0], dtype=object),
    "ragged": [[1.0], [1.0, 2.0]],
    "complex": [1j, 1.0],
    "dates": np.array(["2020-01-01", "2020-01-02"], "datetime64[D]"),
    "Python integers": [2**70, 1],
    "masked": np.ma.array([1.0, 2.0], mask=[True, False]),
    "masked rows": [np.ma.array([1.0], mask=[True]), np.ones(1)],
}
