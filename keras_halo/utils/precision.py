"""The one rule about number formats: the head never computes below float32."""

import contextlib
import sys

import keras
import numpy as np
from keras import ops


def computation_dtype(dtype):
    """Returns the dtype in which head and loss compute under a given dtype.

    Squared distances overflow float16 at norms of a few hundred and cancel to
    zero in both 16-bit formats, so everything below float32 is raised to it.
    float64 stays float64.

    Args:
        dtype: String, the compute dtype of a policy, e.g. `"bfloat16"`.

    Returns:
        `"float64"` for float64, `"float32"` for every other dtype.

    Example:

    >>> computation_dtype("float16")
    'float32'
    >>> computation_dtype("float64")
    'float64'
    """
    if keras.backend.standardize_dtype(dtype) == "float64":
        return "float64"
    return "float32"


# The kinds of devices that PyTorch casts for.
_TORCH_DEVICES = ("cpu", "cuda", "mps", "xpu")


@contextlib.contextmanager
def full_precision():
    """Scope in which `torch.autocast` casts nothing.

    Around a model it would have products of float32 computed in 16 bits.

    Returns:
        A context manager.

    Example:

    >>> with full_precision():
    ...     x = ops.matmul(np.eye(2), np.ones((2, 1)))
    >>> ops.convert_to_numpy(x).tolist()
    [[1.0], [1.0]]
    """
    with contextlib.ExitStack() as scopes:
        if keras.backend.backend() == "torch":
            torch = sys.modules["torch"]
            for device in _TORCH_DEVICES:
                if torch.is_autocast_enabled(device):
                    scopes.enter_context(torch.autocast(device, enabled=False))
        yield


def exact_constant(value):
    """Returns an initializer that fills a weight with a number.

    `keras.initializers.Constant` rounds float64 to float32 on TensorFlow.

    Args:
        value: Float.

    Returns:
        Callable of a shape and a dtype.

    Example:

    >>> float(exact_constant(0.5)((), "float32"))
    0.5
    """
    return lambda shape, dtype: ops.convert_to_tensor(
        np.full(shape, value, dtype)
    )


def as_array(values):
    """NumPy array of an array or tensor, or of lists in Keras's precision.

    The numbers of Python have no precision of their own. As float64 they would
    get scores that differ in the last digits from those of the array they came
    from, and one that sits at a threshold would fall to the other side.

    Args:
        values: NumPy array, tensor, or nested lists of numbers.

    Returns:
        Array; of `keras.config.floatx()` for lists of floats.

    Example:

    >>> as_array([0.5, 1.5]).dtype.name
    'float32'
    """
    if not isinstance(values, (list, tuple)):
        return ops.convert_to_numpy(values)
    array = np.asarray(values)
    if array.dtype.kind == "f":
        return array.astype(keras.config.floatx())
    return array
