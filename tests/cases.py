"""How many cases a test runs, and a count of those that it did run.

`HALO_TESTS=thorough` asks for many times more cases than the suite runs by
default, and has them counted at the end of the run.
"""

import collections
import functools
import os

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
