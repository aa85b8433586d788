"""Same seeds for every test, no windows, and a count of the cases run."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")

import cases
import keras
import pytest


@pytest.fixture(autouse=True)
def seeded():
    """Starts every test from the same random state and default policy."""
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_dtype_policy("float32")
    keras.config.set_floatx("float32")


def pytest_terminal_summary(terminalreporter):
    """Says how many cases passed, where somebody asked for many."""
    if not (cases.THOROUGH and cases.passed):
        return
    backend = keras.backend.backend()
    terminalreporter.section(f"cases that passed on {backend}")
    for name, count in sorted(cases.passed.items()):
        terminalreporter.write_line(f"{count:7,}  {name}")
    terminalreporter.write_line(f"{cases.passed.total():7,}  in all")
