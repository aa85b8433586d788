"""Checks of the arrays that the functions on whole data sets take."""

import numpy as np
from keras import ops


def to_array(values):
    """Returns values as a float64 array, also those of a backend's tensor.

    Args:
        values: Array, tensor, or what NumPy makes an array of.

    Returns:
        NumPy array of float64.

    Example:

    >>> to_array([1, 2]).tolist()
    [1.0, 2.0]
    """
    if ops.is_tensor(values):
        values = ops.convert_to_numpy(values)
    return np.asarray(values, "float64")


def finite_vector(values, argument):
    """Returns values as a float64 vector, or says what is wrong with them.

    Args:
        values: What should be a non-empty 1-D array of finite numbers.
        argument: String, the name by which an error calls the array.

    Returns:
        1-D NumPy array of float64.

    Raises:
        ValueError: If the array is empty, not 1-D, or holds NaN or infinite
            values.

    Example:

    >>> finite_vector([0.5, float("nan")], "known")
    Traceback (most recent call last):
        ...
    ValueError: `known` must be finite. Received: 1 of 2 values are NaN or ...
    """
    values = to_array(values)
    if values.ndim != 1:
        raise ValueError(
            f"`{argument}` must be a 1-D array with one number a sample. "
            f"Received: shape={values.shape}. Flatten it first."
        )
    if values.size == 0:
        raise ValueError(
            f"`{argument}` must hold at least one sample. Received: an empty "
            "array. Check the data set, or the condition that selected from it."
        )
    check_finite(values, argument)
    return values


def check_finite(values, argument):
    """Raises `ValueError` if an array holds NaN or infinite values.

    Args:
        values: NumPy array of floats.
        argument: String, the name by which an error calls the array.
    """
    finite = np.isfinite(values)
    if not finite.all():
        raise ValueError(
            f"`{argument}` must be finite. Received: {int((~finite).sum())} of "
            f"{finite.size} values are NaN or infinite. Look for the step at "
            "which training diverged, or for NaN in the inputs of the model."
        )
