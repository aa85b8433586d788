"""Number formats: nothing is computed below float32, nothing is rounded."""

import keras
import numpy as np
import pytest
from helpers import float64, to_numpy
from keras import ops

from keras_halo.utils.precision import (
    as_array,
    computation_dtype,
    exact_constant,
    full_precision,
)

BACKEND = keras.backend.backend()


@pytest.mark.parametrize(
    "dtype, expected",
    [
        ("float16", "float32"),
        ("bfloat16", "float32"),
        ("float32", "float32"),
        ("float64", "float64"),
        (np.float64, "float64"),
        (np.dtype("float16"), "float32"),
        ("int64", "float32"),
        ("bool", "float32"),
    ],
)
def test_what_is_below_float32_is_raised_to_it(dtype, expected):
    assert computation_dtype(dtype) == expected


@pytest.mark.skipif(BACKEND != "torch", reason="`torch.autocast`")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast_of_torch_ends_within_and_goes_on_after(dtype):
    import torch

    # 1 + 2**-12 is 1 in 16 bits.
    x = torch.full((1, 1), 1.0 + 2.0**-12)
    one = torch.ones((1, 1))
    with torch.autocast("cpu", getattr(torch, dtype)):
        assert (x @ one).item() == 1.0
        with full_precision():
            product = x @ one
            assert product.dtype == torch.float32
            assert product.item() == x.item()
            with full_precision():
                assert (x @ one).item() == x.item()
        assert (x @ one).item() == 1.0
        with pytest.raises(KeyError), full_precision():
            raise KeyError
        assert (x @ one).item() == 1.0
    assert (x @ one).item() == x.item()


def test_without_autocast_the_scope_changes_nothing():
    x = 1.0 + np.arange(6.0, dtype="float32").reshape(2, 3) / 7.0
    outside = to_numpy(ops.matmul(x, x.T))
    with full_precision():
        within = to_numpy(ops.matmul(x, x.T))
    assert within.dtype == "float32"
    np.testing.assert_array_equal(within, outside)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
@pytest.mark.parametrize("value", [0.1, -1.0 / 3.0, 0.0, 1e300])
def test_a_constant_is_exact_in_float64(shape, value):
    with float64():
        found = to_numpy(exact_constant(value)(shape, "float64"))
    assert found.dtype == "float64" and found.shape == shape
    np.testing.assert_array_equal(found, np.full(shape, value))


def test_a_constant_fills_a_weight():
    layer = keras.layers.Layer()
    weight = layer.add_weight(
        shape=(2, 3), initializer=exact_constant(0.1), dtype="float32"
    )
    np.testing.assert_array_equal(
        to_numpy(weight), np.full((2, 3), 0.1, "float32")
    )


@pytest.mark.parametrize("floatx", ["float16", "float32", "float64"])
def test_lists_get_the_precision_of_keras(floatx):
    keras.config.set_floatx(floatx)
    for values in ([0.1, 1.0], (0.1, 1.0), [[0.1], [1.0]], [np.float64(0.1)]):
        found = as_array(values)
        assert found.dtype == floatx
        np.testing.assert_array_equal(found, np.asarray(values).astype(floatx))


@pytest.mark.parametrize(
    "dtype", ["float16", "float32", "float64", "int32", "uint8", "bool"]
)
def test_what_has_a_precision_keeps_it(dtype):
    values = np.array([0.0, 1.0, 3.0]).astype(dtype)
    found = as_array(values)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, values)
    with float64():
        found = as_array(ops.convert_to_tensor(values))
    assert isinstance(found, np.ndarray) and found.dtype == dtype
    np.testing.assert_array_equal(found, values)


def test_lists_of_other_than_floats_are_left_alone():
    assert as_array([1, 2]).dtype.kind == "i"
    assert as_array([True, False]).dtype == "bool"
    assert as_array(["a", "b"]).dtype.kind == "U"
