"""How sample weights and masks fit the positions of a batch.

One value for every sample, or one for every position of it, such as a token or
a pixel. Losses, metrics and readers of data ask here and nowhere else.
"""

import keras
import numpy as np
from keras import ops

from keras_halo.utils.checks import number_array, weight_array


def fitting_weights(
    weights, positions, argument="`sample_weight`", one_for_all=False
):
    """Returns weights or a mask with an axis for each of the positions.

    Args:
        weights: Tensor, or what NumPy makes an array of, of shape `(B, ...)` or
            `(B, ..., 1)`, or of fewer axes, which are those of the front.
        positions: Tuple, the shape `(B, ...)` of one value a position. Lengths
            may be `None`.
        argument: String, what an error calls the weights.
        one_for_all: Boolean, whether one value may stand for several samples,
            as it may in the losses of Keras. Defaults to `False`: it is a
            mistake.

    Returns:
        Tensor, or NumPy array of what is none, that broadcasts over positions.

    Raises:
        ValueError: If the weights are no numbers, or their shape does not fit.

    Example:

    >>> fitting_weights([1.0, 0.0], (2, 3)).shape
    (2, 1)
    >>> fitting_weights([1.0, 0.0], (3,))
    Traceback (most recent call last):
        ...
    ValueError: Expected `sample_weight` to have one value for every sample, ...
    """
    if not (isinstance(weights, keras.KerasTensor) or ops.is_tensor(weights)):
        weights = number_array(weights, "sample_weight")
    shape, positions = tuple(weights.shape), tuple(positions)
    rank = len(positions)
    if len(shape) == rank + 1 and shape[-1] == 1:
        weights = weights[..., 0]
    fits = len(weights.shape) <= rank and all(
        None in (length, full)
        or length == full
        or (length == 1 and (axis > 0 or one_for_all))
        for axis, (length, full) in enumerate(
            zip(weights.shape, positions, strict=False)
        )
    )
    if not fits:
        expected = f"one value for every sample, shape {positions[:1]}"
        if rank > 1:
            expected += f", or for every position of it, shape {positions}"
        raise ValueError(
            f"Expected {argument} to have {expected}. Received: "
            f"shape={shape}. Give what must not count a value of zero."
        )
    while len(weights.shape) < rank:
        weights = weights[..., None]
    return weights


def weights_of_positions(sample_weight, mask, template):
    """Multiplies sample weights and a mask, spread over all positions.

    Args:
        sample_weight: Weights that `fitting_weights` takes, or `None`.
        mask: Booleans of such a shape, or `None`.
        template: Tensor of ones of shape `(B, ...)`, in the dtype that the
            weights are to have.

    Returns:
        Tensor like the template, or `None` where there are neither.

    Raises:
        ValueError: See `fitting_weights`.

    Example:

    >>> ones = ops.ones((2, 2))
    >>> weights = weights_of_positions([2.0, 3.0], [[1, 0], [1, 1]], ones)
    >>> ops.convert_to_numpy(weights).tolist()
    [[2.0, 0.0], [3.0, 3.0]]
    """
    weights = None
    for given, argument in (
        (sample_weight, "`sample_weight`"),
        (mask, "the mask of `y_pred`"),
    ):
        if given is not None:
            given = fitting_weights(given, template.shape, argument)
            given = ops.cast(given, template.dtype) * template
            weights = given if weights is None else weights * given
    return weights


def weights_of_samples(sample_weight, count, where):
    """Returns the weights of so many samples as an array.

    Args:
        sample_weight: Array or tensor of weights, of any shape `(N, ...)`: how
            many positions a sample has is not known yet.
        count: Integer, the number `N` of samples.
        where: String, the name by which an error calls the data.

    Returns:
        Float64 array of the shape that the weights have.

    Raises:
        ValueError: If there are not as many, or a weight is negative or not
            finite.

    Example:

    >>> weights_of_samples([1, 0], 3, "x")
    Traceback (most recent call last):
        ...
    ValueError: Expected the sample weights of `x` to have one value for ...
    """
    weights = weight_array(sample_weight)
    positions = (count, *weights.shape[1:])
    fitting_weights(weights, positions, f"the sample weights of `{where}`")
    return weights


def counted_positions(sample_weight, positions, where, mask=None):
    """Tells which samples or positions have a weight other than zero.

    Args:
        sample_weight: Array or tensor of weights that `fitting_weights` takes,
            or `None`.
        positions: Tuple, the shape `(B, ...)` of one number a position.
        where: String, the name by which an error calls the data.
        mask: Optional booleans of such a shape, false for positions that do
            not count either. Defaults to `None`.

    Returns:
        Boolean array of the shape `positions`.

    Raises:
        ValueError: If the shapes do not fit, or a weight is negative or not
            finite.

    Example:

    >>> counted_positions([1.0, 0.0], (2, 3), "x").tolist()
    [[True, True, True], [False, False, False]]
    """
    counted = np.ones(positions, "bool")
    if sample_weight is not None:
        weights = weight_array(sample_weight)
        argument = f"the sample weights of `{where}`"
        counted &= fitting_weights(weights, positions, argument) != 0
    if mask is not None:
        mask = np.asarray(mask, bool)
        argument = f"a mask of the model on `{where}`"
        counted &= fitting_weights(mask, positions, argument)
    return counted
