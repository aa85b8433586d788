"""Checks of arguments and arrays that several parts of the package take."""

import keras
import numpy as np
from keras import ops


def check_units(units):
    """Raises `ValueError` unless `units` is an integer of at least 2."""
    if not isinstance(units, int) or isinstance(units, bool) or units < 2:
        raise ValueError(
            "`units` is the number of classes and must be an integer of at "
            "least 2: the centroid of a single class would coincide with the "
            f"origin, where abstaining sits. Received: units={units}. For a "
            "yes-or-no question use units=2."
        )


def check_embedding_dim(embedding_dim):
    """Raises `ValueError` unless it is `"auto"`, `None` or at least 2."""
    if embedding_dim is None or embedding_dim == "auto":
        return
    if (
        not isinstance(embedding_dim, int)
        or isinstance(embedding_dim, bool)
        or embedding_dim < 2
    ):
        raise ValueError(
            "`embedding_dim` must be an integer of at least 2, 'auto', or "
            "`None` for the input as it is. Received: "
            f"embedding_dim={embedding_dim!r}. Leave it out for a size that "
            "fits the number of classes."
        )


def check_abstain_rate(abstain_rate):
    """Raises `ValueError` unless `abstain_rate` is `None` or in `[0, 0.5)`."""
    if abstain_rate is None:
        return
    # Written so that NaN fails.
    if (
        not isinstance(abstain_rate, (int, float))
        or isinstance(abstain_rate, bool)
        or not 0.0 <= abstain_rate < 0.5
    ):
        raise ValueError(
            "`abstain_rate` is the share of training samples to abstain from "
            "and must be a number in [0, 0.5), or `None` for the fixed margin "
            f"of the published method. Received: abstain_rate={abstain_rate!r}."
            " Write 1 % as 0.01."
        )


def check_label_smoothing(label_smoothing):
    """Raises `ValueError` unless `label_smoothing` is in `[0, 1)`."""
    # Written so that NaN fails.
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(
            "`label_smoothing` must be in [0, 1). Received: "
            f"label_smoothing={label_smoothing}. Use 0 to switch it off."
        )


def check_block_size(block_size):
    """Raises `ValueError` unless `block_size` is `None` or positive."""
    if block_size is None:
        return
    if (
        not isinstance(block_size, int)
        or isinstance(block_size, bool)
        or block_size < 1
    ):
        raise ValueError(
            "`block_size` must be a positive integer, or `None` for all "
            f"classes at once. Received: block_size={block_size}."
        )


def check_floating(dtype, layer):
    """Raises `ValueError` unless embeddings of a dtype suit a layer."""
    dtype = keras.backend.standardize_dtype(dtype)
    if "float" not in dtype:
        raise ValueError(
            f"`{type(layer).__name__}` takes embeddings in floating point. "
            f"Received: dtype={dtype}. Cast the input to float32, or put the "
            "network that computes embeddings before the head."
        )


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


def label_array(labels):
    """Returns labels as a NumPy array of numbers.

    Args:
        labels: Array, tensor, or lists of numbers.

    Returns:
        NumPy array.

    Raises:
        ValueError: If labels are no numbers.

    Example:

    >>> label_array(["cat"])
    Traceback (most recent call last):
        ...
    ValueError: Labels must be numbers. Received: dtype=<U3. Encode them ...
    """
    if ops.is_tensor(labels):
        labels = ops.convert_to_numpy(labels)
    labels = np.asarray(labels)
    if labels.dtype.name == "bfloat16":
        # Not a kind of number that NumPy knows.
        labels = labels.astype("float32")
    if labels.dtype.kind not in "biuf":
        raise ValueError(
            f"Labels must be numbers. Received: dtype={labels.dtype}. Encode "
            "them first, for example with `keras.layers.StringLookup` or "
            "`np.unique(labels, return_inverse=True)`."
        )
    return labels


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
