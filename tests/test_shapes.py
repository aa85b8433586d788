"""Arrays of any length are worked on with few lengths."""

import keras
import numpy as np
import pytest
from helpers import packed

import keras_halo
from keras_halo.ops.ood_scores import OOD_METHODS
from keras_halo.utils.shapes import with_few_lengths


@pytest.mark.parametrize("length", [1, 63, 64, 65, 1024, 1100, 17000])
def test_rows_come_back_in_order_and_once(length):
    rows = np.arange(2.0 * length).reshape(length, 2)
    seen = []

    def function(part):
        seen.append(len(part))
        return part[:, 0], 2.0 * part

    first, doubled = with_few_lengths(function, rows)
    np.testing.assert_array_equal(first, rows[:, 0])
    np.testing.assert_array_equal(doubled, 2.0 * rows)
    assert set(seen) <= {64, 1024, 16384}
    assert sum(seen) - length < 64


@pytest.mark.parametrize("method", OOD_METHODS)
def test_scores_of_a_part_are_parts_of_the_scores(method):
    rng = np.random.default_rng(0)
    scores = packed(rng.normal(size=(1100, 4)), np.eye(3, 4))
    scores = scores.astype("float32")
    every = keras_halo.ood_score(scores, method)
    for part in (slice(0, 1), slice(7, 90), slice(1000, 1100)):
        np.testing.assert_allclose(
            keras_halo.ood_score(scores[part], method),
            every[part],
            rtol=1e-5,
            atol=1e-5,
        )


@pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="Only JAX compiles every shape."
)
def test_new_lengths_compile_nothing_new(caplog):
    import jax

    rng = np.random.default_rng(0)
    scores = packed(rng.normal(size=(300, 4)), np.eye(3, 4)).astype("float32")

    def read(length):
        keras_halo.decode_predictions(scores[:length])
        keras_halo.ood_score(scores[:length])

    read(300)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for length in rng.integers(1, 300, size=1000):
            read(int(length))
    assert "Compiling" not in caplog.text
