"""How sample weights and masks fit the positions of a batch.

One weight for every sample, or one for every position of it, such as a token
or a pixel; as tensors where Keras computes, as arrays where data are read.
"""

import keras
import numpy as np
from keras import ops

from keras_halo.utils.checks import number_array, weight_array


def weight_tensor(weights, positions, argument="sample_weight"):
    """Weights in a tensor that broadcasts over positions.

    Args:
        weights: Tensor or array of shape `(B, ...)` or `(B, ..., 1)`, or of
            fewer axes, which are those of the front.
        positions: Tuple, the shape `(B, ...)` of one number a position.
            Lengths may be `None`.
        argument: String, what an error calls the weights.

    Returns:
        Tensor with as many axes as `positions`.

    Raises:
        ValueError: If the shapes do not fit.

    Example:

    >>> tuple(weight_tensor([1.0, 0.0], (2, 3)).shape)
    (2, 1)
    """
    if not (isinstance(weights, keras.KerasTensor) or ops.is_tensor(weights)):
        weights = number_array(weights, argument)
    weights = ops.convert_to_tensor(weights)
    rank = len(_fitted_shape(weights.shape, positions, argument))
    if len(weights.shape) > rank:
        weights = ops.squeeze(weights, axis=-1)
    while len(weights.shape) < rank:
        weights = ops.expand_dims(weights, axis=-1)
    return weights


def counted_positions(sample_weight, positions, where, mask=None):
    """Tells which samples or positions have a weight other than zero.

    Args:
        sample_weight: Array or tensor of weights, of a shape that
            `weight_tensor` takes; or `None`.
        positions: Tuple, the shape `(B, ...)` of one number a position.
        where: String, the name by which an error calls the data.
        mask: Optional booleans of a shape like that of the weights, false for
            positions that do not count either. Defaults to `None`.

    Returns:
        Boolean array of the shape `positions`.

    Raises:
        ValueError: If the shapes do not fit, or a weight is negative or NaN.

    Example:

    >>> counted_positions([1.0, 0.0], (2, 3), "x").tolist()
    [[True, True, True], [False, False, False]]
    """
    counted = np.ones(positions, "bool")
    if sample_weight is not None:
        weights = weight_array(sample_weight)
        argument = f"the sample weights of `{where}`"
        shape = _fitted_shape(weights.shape, positions, argument)
        counted &= weights.reshape(shape) != 0
    if mask is not None:
        mask = np.asarray(mask, bool)
        argument = f"a mask of the model on `{where}`"
        shape = _fitted_shape(mask.shape, positions, argument)
        counted &= mask.reshape(shape)
    return counted


def _fitted_shape(shape, positions, argument):
    """The shape of weights with as many axes as the positions have."""
    shape, positions = tuple(shape), tuple(positions)
    fitted, rank = shape, len(positions)
    if len(fitted) == rank + 1 and fitted[-1] == 1:
        fitted = fitted[:-1]
    missing = rank - len(fitted)
    pairs = list(zip(fitted, positions, strict=False))
    fits = missing >= 0 and all(
        None in (length, full) or length in (1, full) for length, full in pairs
    )
    # One weight for a batch of several is a mistake, not a broadcast.
    fits = fits and all(
        None in (length, full) or length == full for length, full in pairs[:1]
    )
    if not fits:
        raise ValueError(
            f"Expected {argument} of shape {positions}, or of its first axes. "
            f"Received: shape={shape}. Give every sample, or every position of "
            "it, one weight."
        )
    return fitted + (1,) * missing
