"""Lengths of axes, also where only the running graph knows them."""

import numpy as np
from keras import ops

_LENGTHS = (16384, 1024, 64)


def axis_length(tensor, axis):
    """Returns the length of an axis, as a number wherever it is one.

    A batch has no fixed size in a graph of TensorFlow; where the batch is the
    classes, as between two towers, neither has the number of classes.

    Args:
        tensor: Tensor of any shape.
        axis: Integer, the axis.

    Returns:
        Integer, or a scalar tensor of the dtype of `tensor` where the length
        is known only when the graph runs.

    Example:

    >>> axis_length(ops.ones((2, 3)), -1)
    3
    """
    length = tensor.shape[axis]
    if length is not None:
        return length
    return ops.cast(ops.shape(tensor)[axis], tensor.dtype)


def with_few_lengths(function, rows):
    """Calls a function of the rows of an array with three lengths only.

    JAX compiles anew for every shape that it has not seen, which takes seconds,
    and keeps what it has compiled, some tens of MiB for every shape. So rows go
    in by 16,384, 1,024 and 64, and the last of them are filled up.

    Args:
        function: Callable of an array of shape `(M, n)`, which returns a tuple
            of arrays of `M` rows that do not depend on each other.
        rows: NumPy array of shape `(N, n)`, with `N` at least one.

    Returns:
        Tuple of arrays of `N` rows.

    Example:

    >>> (lengths,) = with_few_lengths(lambda x: (0 * x + len(x),), np.eye(70))
    >>> lengths.shape, float(lengths[0, 0])
    ((70, 70), 64.0)
    """
    parts = []
    start = 0
    while start < len(rows):
        left = len(rows) - start
        length = next((n for n in _LENGTHS if n <= left), _LENGTHS[-1])
        part = rows[start : start + length]
        filling = ((0, length - len(part)), (0, 0))
        found = function(np.pad(part, filling, mode="edge"))
        parts.append([values[: len(part)] for values in found])
        start += length
    if len(parts) == 1:
        return tuple(parts[0])
    return tuple(np.concatenate(values) for values in zip(*parts, strict=True))
