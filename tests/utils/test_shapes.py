"""Lengths of axes, and arrays that are worked on with few lengths."""

import keras
import numpy as np
import pytest
from helpers import to_numpy
from keras import ops

from keras_halo.utils.shapes import axis_length, with_few_lengths


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


def test_rows_that_fill_up_are_rows_that_are_there():
    # Zeros could be an input on which the function fails.
    rows = np.arange(1.0, 71.0)[:, None]
    least = []
    with_few_lengths(lambda part: (least.append(part.min()) or part,), rows)
    assert min(least) == 1.0


def test_a_length_that_is_known_is_an_integer():
    for axis, length in ((0, 2), (1, 3), (2, 5), (-1, 5), (-3, 2)):
        found = axis_length(ops.ones((2, 3, 5)), axis)
        assert isinstance(found, int) and found == length
    assert axis_length(keras.KerasTensor((None, 3)), 1) == 3


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow",
    reason="Graphs of other backends know every length.",
)
@pytest.mark.parametrize("dtype", ["float32", "float64", "int32"])
def test_a_length_that_the_graph_alone_knows_is_a_tensor(dtype):
    import tensorflow as tf

    lengths = []

    @tf.function(input_signature=[tf.TensorSpec((None, 3), dtype)])
    def scaled(x):
        lengths.extend([axis_length(x, 0), axis_length(x, 1)])
        return x * lengths[0]

    for count in (2, 7):
        found = to_numpy(scaled(tf.ones((count, 3), dtype)))
        np.testing.assert_array_equal(found, np.full((count, 3), count))
        assert found.dtype == dtype
    assert lengths[0].shape == () and lengths[1] == 3
