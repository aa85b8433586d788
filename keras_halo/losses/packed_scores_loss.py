from typing import Any

import keras
import numpy as np
from keras import ops

from keras_halo.ops.labels import are_integer_labels, label_tensor
from keras_halo.utils.checks import (
    as_boolean,
    as_number,
    check_label_smoothing,
    check_not_taken,
)
from keras_halo.utils.keras_private import mask_of
from keras_halo.utils.precision import computation_dtype, full_precision
from keras_halo.utils.types import DType, Tensor
from keras_halo.utils.weights import fitting_weights


class PackedScoresLoss(keras.losses.Loss):
    """Base of the losses of packed scores: what they have in common.

    Args:
        label_smoothing: Float in `[0, 1)`.
        distill: Boolean.
        radial_weight: Non-negative float.
        reduction: As in `keras.losses.Loss`.
        name: String, the name of the loss instance.
        dtype: The dtype of the loss's computations, or `None`; 16-bit dtypes
            are raised to float32.
        kwargs: Dictionary of name to value, what else was given: there is
            nothing else, and an error says so of what Keras's losses take.

    Raises:
        ValueError: If an argument is out of range, or one of Keras's losses.
        TypeError: If there is no such argument.
    """

    def __init__(
        self,
        label_smoothing: float,
        distill: bool,
        radial_weight: float,
        reduction: str | None,
        name: str | None,
        dtype: DType,
        kwargs: dict[str, Any],
    ) -> None:
        _check_no_others(kwargs, type(self).__name__)
        label_smoothing = check_label_smoothing(label_smoothing)
        distill = as_boolean(distill, "distill")
        radial_weight = check_radial_weight(radial_weight)
        policy = keras.dtype_policies.get(dtype or keras.config.dtype_policy())
        super().__init__(
            name=name,
            reduction=reduction,
            dtype=computation_dtype(policy.compute_dtype),
        )
        self.label_smoothing = label_smoothing
        self.distill = distill
        self.radial_weight = radial_weight

    def __call__(
        self, y_true: Any, y_pred: Tensor, sample_weight: Any = None
    ) -> Tensor:
        with full_precision():
            return super().__call__(y_true, y_pred, sample_weight)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "label_smoothing": self.label_smoothing,
            "distill": self.distill,
            "radial_weight": self.radial_weight,
            "dtype": self.dtype,
        }


# What the cross-entropies of Keras take, and why there is no such thing here.
_NOT_TAKEN = {
    "from_logits": "packed scores always are logits. Leave it out",
    "axis": "classes are on the last axis. Leave it out",
}


def _check_no_others(kwargs, owner):
    check_not_taken(kwargs, _NOT_TAKEN, owner)
    for name in kwargs:
        # As Python says it.
        raise TypeError(
            f"{owner}.__init__() got an unexpected keyword argument {name!r}"
        )


def check_radial_weight(radial_weight):
    """Returns the weight of the radial term, checked.

    Args:
        radial_weight: Non-negative, finite number.

    Example:

    >>> check_radial_weight(1)
    1.0
    """
    return as_number(
        radial_weight,
        "radial_weight",
        lambda weight: 0.0 <= weight < np.inf,
        "non-negative and finite: a negative weight would reward embeddings "
        "for leaving their shell",
        "Use 0 to switch the radial term off.",
    )


def without_uncounted_labels(y_true, y_pred, sample_weight=None):
    """Replaces labels that do not count by a harmless class.

    At masked positions they are often -1, and void ones, with a weight of zero,
    255. The loss of such a label is NaN, which a weight of zero leaves NaN.

    Args:
        y_true: Labels that fit the scores.
        y_pred: Packed scores, with or without a mask of Keras.
        sample_weight: Tensor or array, as `weights_of_loss` returns it, or
            `None`. Defaults to `None`.

    Returns:
        The labels as they are where all of them count, an array for arrays of
        labels and weights without a mask, otherwise a tensor.

    Raises:
        ValueError: If the mask does not fit the scores.

    Example:

    >>> scores, weights = ops.zeros((2, 16)), np.array([1.0, 0.0])
    >>> without_uncounted_labels(np.array([3, 255]), scores, weights).tolist()
    [3, 0]
    """
    mask = mask_of(y_pred)
    if mask is None and isinstance(y_true, np.ndarray):
        # What is wrong with an array is said before anything is computed.
        if not isinstance(sample_weight, np.ndarray):
            return y_true
        counts = sample_weight != 0
        are_integers = are_integer_labels(y_true.shape, y_pred.shape)
        if not are_integers or y_true.ndim == len(y_pred.shape):
            counts = counts[..., None]
        return np.where(counts, y_true, np.zeros_like(y_true))
    if mask is None and sample_weight is None:
        return y_true
    counts = None
    if sample_weight is not None:
        counts = ops.not_equal(ops.convert_to_tensor(sample_weight), 0)
    if mask is not None:
        mask = weights_of_loss(mask, y_pred, "the mask of `y_pred`")
        mask = ops.cast(mask, "bool")
        counts = mask if counts is None else ops.logical_and(counts, mask)
    y_true, are_integers = label_tensor(y_true, y_pred.shape)
    if not are_integers:
        counts = ops.expand_dims(counts, axis=-1)
    return ops.where(counts, y_true, ops.zeros_like(y_true))


def weights_of_loss(weights, y_pred, argument="`sample_weight`"):
    """Returns the weights, or the mask, of packed scores, checked.

    Keras would take those of `B` samples for those of `B` positions of each.

    Args:
        weights: Tensor, or what NumPy makes an array of.
        y_pred: Packed scores.
        argument: String, what an error calls the weights.

    Returns:
        Tensor or array with one axis for each of the positions.

    Raises:
        ValueError: If the weights are no numbers, or do not fit.

    Example:

    >>> weights_of_loss([1.0, 0.0], ops.zeros((2, 3, 16))).shape
    (2, 1)
    """
    # Keras broadcasts one weight for all.
    return fitting_weights(
        weights, y_pred.shape[:-1], argument, one_for_all=True
    )
