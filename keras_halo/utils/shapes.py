"""Lengths of axes, also where only the running graph knows them."""

from keras import ops


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
