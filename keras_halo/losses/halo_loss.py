from typing import Any

import keras
import numpy as np
from keras import ops

from keras_halo.losses.packed_scores_loss import (
    PackedScoresLoss,
    check_radial_weight,
    weights_of_loss,
    without_uncounted_labels,
)
from keras_halo.ops import packing
from keras_halo.ops.head_smoothing import check_label_smoothing_of_head
from keras_halo.ops.labels import (
    are_integer_labels,
    check_ignorable,
    check_order,
    label_tensor,
    labels_and_scores,
    read_labels,
)
from keras_halo.ops.loss import distribution_losses, integer_label_losses
from keras_halo.ops.model_output import is_symbolic_or_tensor
from keras_halo.utils.checks import (
    as_boolean,
    check_block_size,
    check_ignore_class,
    check_label_smoothing,
    label_array,
    number_array,
)
from keras_halo.utils.keras_private import set_mask
from keras_halo.utils.precision import computation_dtype
from keras_halo.utils.types import DType, Tensor


@keras.saving.register_keras_serializable(package="keras_halo")
def halo_loss(
    y_true: Any,
    y_pred: Tensor,
    label_smoothing: float = 0.1,
    distill: bool = True,
    radial_weight: float = 1.0,
    ignore_class: int | None = None,
    block_size: int | None = None,
) -> Tensor:
    """Computes the HALO loss of packed scores, sample by sample.

    Formula:

    ```python
    loss = cross_entropy(targets, [s | b]) + radial_weight * sum_k Y_k R(r_k^2)
    ```

    Args:
        y_true: Labels: integers of shape `(...)` or `(..., 1)`, or a
            distribution (one-hot or soft) of shape `(..., K)`.
        y_pred: Packed scores of shape `(..., packed_width)`, the output of
            `HALODense`.
        label_smoothing: Float in `[0, 1)`. Defaults to `0.1`.
        distill: Boolean, distilled or plain soft targets. Defaults to `True`.
        radial_weight: Non-negative float. Defaults to `1.0`.
        ignore_class: Optional integer, a label that does not count. Needs
            integer labels. Defaults to `None`.
        block_size: Optional integer, how many classes to work on at a time.
            Needs integer labels. Defaults to `None`: what is fastest.

    Returns:
        Tensor of shape `(...)`. Where an integer label is neither in `[0, K)`
        nor `ignore_class`, or a row does not hold packed scores, it is NaN; so
        it is where the head takes its margin from another `label_smoothing`
        and that could not be said before.

    Raises:
        ValueError: If the shapes of labels and scores do not fit, the head
            takes its margin from another `label_smoothing`, or `ignore_class`
            or `block_size` is given with a label distribution.

    Example:

    >>> scores = keras_halo.HALODense(3)(np.zeros((2, 8), "float32"))
    >>> tuple(keras_halo.losses.halo_loss(np.array([0, 2]), scores).shape)
    (2,)
    """
    label_smoothing = check_label_smoothing(label_smoothing)
    distill = as_boolean(distill, "distill")
    radial_weight = check_radial_weight(radial_weight)
    ignore_class = check_ignore_class(ignore_class)
    block_size = check_block_size(block_size)
    if not is_symbolic_or_tensor(y_pred):
        y_pred = number_array(y_pred, "y_pred")
    if not is_symbolic_or_tensor(y_true):
        y_true = label_array(y_true, "y_true")
    check_order(y_true, y_pred)
    check_label_smoothing_of_head(y_pred, label_smoothing)
    y_pred = ops.convert_to_tensor(y_pred)
    y_pred = ops.cast(y_pred, computation_dtype(y_pred.dtype))
    y_true, are_integers = label_tensor(y_true, y_pred.shape)
    if are_integers:
        counted = None
        if ignore_class is not None:
            counted = ops.not_equal(y_true, ignore_class)
            y_true = ops.where(counted, y_true, ops.zeros_like(y_true))
        losses = integer_label_losses(
            y_true, y_pred, label_smoothing, distill, radial_weight, block_size
        )
        if counted is not None:
            losses = ops.where(counted, losses, 0.0)
            # As Keras's own losses do, so that ignored samples leave the mean.
            set_mask(losses, counted)
        return losses
    received = f"labels of shape {tuple(y_true.shape)}"
    check_ignorable(ignore_class, are_integers, received)
    if block_size is not None:
        raise ValueError(
            "`block_size` needs integer labels of shape "
            f"{tuple(y_pred.shape[:-1])}: a distribution over so many classes "
            f"would take the memory that blocks save. Received: {received} "
            f"with block_size={block_size}."
        )
    return distribution_losses(
        ops.cast(y_true, y_pred.dtype),
        y_pred,
        label_smoothing,
        distill,
        radial_weight,
    )


@keras.saving.register_keras_serializable(package="keras_halo")
class HALOLoss(PackedScoresLoss):
    """Cross-entropy on distances to centroids, with embeddings kept on shells.

    Takes the place of `CategoricalCrossentropy` or
    `SparseCategoricalCrossentropy` in a model that ends in `HALODense`. It
    pulls an embedding towards the centroid of its class and away from the
    others, but only as far as the shell on which a Gaussian around the
    centroid would have its mass: confidence is bounded, and the origin stays
    free for what belongs to no class.

    Labels are integers or a distribution; the loss sees which from their
    shape. It computes in float32 whatever the dtype policy, in float64 under
    a float64 policy.

    Formula:

    ```python
    cross_entropy = -sum_k q_k * log softmax([s_1, ..., s_K, b])_k
    R(r^2) = r^2 / 2 - (1 / 2 - 1 / D) * log(r^2)
    loss = cross_entropy + radial_weight * sum_k Y_k * R(r_k^2)
    ```

    where `q` are the soft targets made of the labels `Y`, `b` is the fixed
    margin of the published method, not the abstain logit of the scores, and
    `r_k^2` is the mean squared distance to the centroid of class `k`. Below
    `r^2 = 1e-3` the logarithm continues as its tangent.

    Args:
        label_smoothing: Float in `[0, 1)`. With `distill=False`, the share of
            the target spread evenly over the classes. With `distill=True`, the
            temperature at which the distances to the other classes become
            target mass. `0` takes the labels as they are in both cases. A
            head with `abstain_rate=None`, such as `HALODense.reference`, must
            have the same value; others take none. Defaults to `0.1`.
        distill: Boolean. `True` makes the soft targets of the network's own
            distances, so that a class close by gets more than one far away;
            no gradient flows into them. `False` smooths evenly. Defaults to
            `True`.
        radial_weight: Non-negative float, the weight of the radial term `R`.
            Defaults to `1.0`.
        ignore_class: Optional integer, a label that does not count, such as
            -1 or 255 for void pixels; needs integer labels. Defaults to
            `None`.
        block_size: Optional integer, how many classes to work on at a time;
            needs integer labels. For very many classes: the loss then makes
            no array of the size of the scores but their gradient. 2,048 is a
            good size. Defaults to `None`, what is fastest: all classes at once
            where XLA compiles the loss together with the head, which takes no
            more memory then, and blocks that stay in the processor's cache on
            PyTorch on a CPU.
        reduction: Type of reduction to apply to the loss, one of
            `"sum_over_batch_size"`, `"sum"`, `"mean"`,
            `"mean_with_sample_weight"`, `"none"` or `None`, with the meaning
            they have in `keras.losses`. Defaults to `"sum_over_batch_size"`.
        name: Optional name for the loss instance.
        dtype: The dtype of the loss's computations; 16-bit dtypes are raised
            to float32. Defaults to `None`, which means the compute dtype of
            `keras.config.dtype_policy()`.
        **kwargs: No others. Those of Keras's cross-entropies, such as
            `from_logits`, are refused with the reason.

    Call arguments:
        y_true: Integers of shape `(batch_size, ...)` or
            `(batch_size, ..., 1)`, or a distribution, one-hot or soft, of
            shape `(batch_size, ..., K)`.
        y_pred: Packed scores of shape `(batch_size, ..., packed_width)`.
        sample_weight: Optional weights of shape `(batch_size,)`, one for each
            sample, or `(batch_size, ...)`, one for each position.

    Bad labels: a NumPy array that holds a label neither an integer in `[0, K)`
    nor equal to `ignore_class`, or a row of a distribution that does not sum to
    one, such as a multi-hot one, is refused with a `ValueError`; a row of zeros
    is left out. In a
    tensor, where values cannot be inspected without a stop, the loss of such a
    sample is NaN on TensorFlow, JAX and PyTorch alike, while gradients of
    the other samples remain intact; `keras.callbacks.TerminateOnNaN` turns
    that into a stop. Labels at masked positions are never read.

    Another `label_smoothing` than that of the head is refused with a
    `ValueError` before the first step. Where a further operation stands
    between head and loss, the two are compiled apart, or `torch.compile` traces
    them, the loss learns of it only from values: it is NaN from the first batch
    on then.

    Raises:
        ValueError: If an argument is out of range, if the shapes of labels
            and scores do not fit, if `y_pred` cannot be packed scores, or if
            the head takes its margin from another `label_smoothing`.

    Example:

    >>> scores = keras_halo.HALODense(3)(np.ones((2, 8), "float32"))
    >>> loss = keras_halo.HALOLoss()
    >>> integer = loss(np.array([0, 2]), scores)
    >>> one_hot = loss(np.array([[1, 0, 0], [0, 0, 1]]), scores)
    >>> bool(ops.abs(integer - one_hot) < 1e-5)
    True

    References:

    - Raphael Pisoni, "I don't know!": Teaching neural networks to abstain
      with the HALO-Loss, 2026.
    """

    def __init__(
        self,
        label_smoothing: float = 0.1,
        distill: bool = True,
        radial_weight: float = 1.0,
        ignore_class: int | None = None,
        block_size: int | None = None,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "halo_loss",
        dtype: DType = None,
        **kwargs: Any,
    ) -> None:
        ignore_class = check_ignore_class(ignore_class)
        block_size = check_block_size(block_size)
        super().__init__(
            label_smoothing,
            distill,
            radial_weight,
            reduction,
            name,
            dtype,
            kwargs,
        )
        self.ignore_class = ignore_class
        self.block_size = block_size

    def __call__(
        self, y_true: Any, y_pred: Tensor, sample_weight: Any = None
    ) -> Tensor:
        if y_true is None:
            raise ValueError(
                "The HALO loss needs labels. Received: y_true=None. Pass the "
                "labels of the samples."
            )
        y_true, y_pred = labels_and_scores(y_true, y_pred)
        check_label_smoothing_of_head(y_pred, self.label_smoothing)
        if sample_weight is not None:
            sample_weight = weights_of_loss(sample_weight, y_pred)
        y_true = without_uncounted_labels(y_true, y_pred, sample_weight)
        if isinstance(y_true, np.ndarray):
            y_true = _checked_labels(y_true, y_pred.shape, self.ignore_class)
        return super().__call__(y_true, y_pred, sample_weight=sample_weight)

    def call(self, y_true: Any, y_pred: Tensor) -> Tensor:
        return halo_loss(
            y_true,
            y_pred,
            label_smoothing=self.label_smoothing,
            distill=self.distill,
            radial_weight=self.radial_weight,
            ignore_class=self.ignore_class,
            block_size=self.block_size,
        )

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "ignore_class": self.ignore_class,
            "block_size": self.block_size,
        }


def _checked_labels(y_true, y_pred_shape, ignore_class):
    are_integer_labels(np.shape(y_true), y_pred_shape)
    num_classes = None
    if y_pred_shape[-1] is not None:
        num_classes = packing.count_classes(y_pred_shape)
    return read_labels(
        y_true,
        y_pred_shape[:-1],
        num_classes,
        ignore_class,
        remedy="Number the classes from zero, or name the label to leave out "
        "as `ignore_class`.",
    )
