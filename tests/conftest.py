"""Same seeds for every test, no windows, and a count of the cases run."""

import functools
import gc
import os
import threading

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


def pytest_collection_modifyitems(items):
    """Begins with what takes longest: no core waits for it at the end."""
    items.sort(key=lambda item: item.path.name != "test_smoke.py")


def pytest_collection_finish():
    """Spares the garbage collector what was imported: it stays anyway."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def with_built_optimizer(method):
    """A method that trains a model, with an optimizer that has its variables.

    TensorFlow traces a training step twice where the optimizer makes them
    within, which is most of the time of a short training. Scripts that tests
    run by themselves train as they are.
    """

    @functools.wraps(method)
    def train(self, *args, **kwargs):
        optimizer = getattr(self, "optimizer", None)
        if self.built and optimizer is not None and not optimizer.built:
            optimizer.build(self.trainable_variables)
        return method(self, *args, **kwargs)

    return train


def kept_for_a_while(make):
    """What makes the context in which JAX writes a function for the compiler.

    JAX makes one for every function, however small: a quarter of the suite's
    time. They hold what was written in them, so none is kept for good.
    """
    kept = threading.local()

    @functools.wraps(make)
    def make_ir_context():
        kept.uses = getattr(kept, "uses", 0) + 1
        if kept.uses % 200 == 1:
            kept.context = make()
        return kept.context

    return make_ir_context


if keras.backend.backend() == "jax":
    from jax._src.interpreters import mlir

    # Private: a JAX without it is slower and nothing else.
    if hasattr(mlir, "make_ir_context"):
        mlir.make_ir_context = kept_for_a_while(mlir.make_ir_context)

if keras.backend.backend() == "tensorflow":
    for name in ("fit", "train_on_batch"):
        trained = with_built_optimizer(getattr(keras.Model, name))
        setattr(keras.Model, name, trained)


def pytest_terminal_summary(terminalreporter):
    """Says how many cases passed, where somebody asked for many."""
    if not (cases.THOROUGH and cases.passed):
        return
    backend = keras.backend.backend()
    terminalreporter.section(f"cases that passed on {backend}")
    for name, count in sorted(cases.passed.items()):
        terminalreporter.write_line(f"{count:7,}  {name}")
    terminalreporter.write_line(f"{cases.passed.total():7,}  in all")
