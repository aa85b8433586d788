from typing import Any

import keras
import numpy as np
from keras import ops

from keras_halo.ops import packing
from keras_halo.ops.labels import label_tensor
from keras_halo.utils.checks import (
    as_boolean,
    as_number,
    check_label_smoothing,
)
from keras_halo.utils.keras_private import mask_of
from keras_halo.utils.precision import computation_dtype, full_precision
from keras_halo.utils.types import DType, Tensor


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

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        label_smoothing: float,
        distill: bool,
        radial_weight: float,
        reduction: str | None,
        name: str | None,
        dtype: DType,
    ) -> None:
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


def checked_scores(y_pred):
    """Checks packed scores before Keras casts them.

    What a cast loses cannot be seen after it.

    Args:
        y_pred: Tensor, array or lists.

    Returns:
        The tensor as it is, or a NumPy array.

    Raises:
        ValueError: If an array holds no packed scores, or a tensor has 16 bits.

    Example:

    >>> checked_scores(np.zeros((1, 16)))
    Traceback (most recent call last):
        ...
    ValueError: The last 5 columns of `y_pred` hold no packed geometry ...
    """
    if isinstance(y_pred, (np.ndarray, list, tuple)):
        y_pred = np.asarray(y_pred)
        packing.check_packed(y_pred, argument="y_pred")
    elif hasattr(y_pred, "dtype"):
        packing.check_precision(y_pred.dtype, "y_pred")
    return y_pred


def without_masked_labels(y_true, y_pred):
    """Replaces labels at masked positions, often -1, by a harmless class.

    Args:
        y_true: Labels that fit the scores.
        y_pred: Packed scores, with or without a mask of Keras.

    Returns:
        The labels as they are where there is no mask, otherwise a tensor.

    Example:

    >>> without_masked_labels([0, 1], ops.zeros((2, 16)))
    [0, 1]
    """
    mask = mask_of(y_pred)
    if mask is None:
        return y_true
    y_true, are_integers = label_tensor(y_true, y_pred.shape)
    if not are_integers:
        mask = ops.expand_dims(mask, axis=-1)
    return ops.where(mask, y_true, ops.zeros_like(y_true))
