from typing import Any

import keras
from keras import ops

from keras_halo.losses.halo_loss import halo_loss
from keras_halo.losses.packed_scores_loss import (
    PackedScoresLoss,
    weights_of_loss,
    without_uncounted_labels,
)
from keras_halo.ops import packing
from keras_halo.ops.head_smoothing import check_label_smoothing_of_head
from keras_halo.ops.labels import ids_and_scores
from keras_halo.utils.types import DType, Tensor


@keras.saving.register_keras_serializable(package="keras_halo")
class HALOContrastiveLoss(PackedScoresLoss):
    """The HALO loss of two towers, from the ids of the pairs in a batch.

    Takes the place of the symmetric cross-entropy (InfoNCE) in a model that
    ends in `HALOSimilarity`. A query is to find the keys of its own id among
    all keys of the batch; where an id occurs several times in a batch, all of
    its keys are right, in equal parts. It is `HALOLoss` on the soft labels
    `keras_halo.pair_labels(ids)`, made anew for every batch, whatever its size.
    In a batch of one pair there is nothing to tell apart: its loss is zero.

    Ids are compared as the integers they are, not as floats. Tensors of JAX
    have 32 bits, and `fit` makes tensors of labels: ids that differ in higher
    bits alone become the same there, in silence. Number wider ones before,
    `ids = np.unique(ids, return_inverse=True)[1]`.

    Formula:

    ```python
    same = ids[:, None] == ids[None, :]
    labels = same / sum(same, axis=-1, keepdims=True)
    loss = HALOLoss(labels, scores)
    ```

    Args:
        label_smoothing: Float in `[0, 1)`. As in `HALOLoss`;
            `HALOSimilarity` must have the same value. Defaults to `0.1`.
        distill: Boolean. As in `HALOLoss`. Defaults to `True`.
        radial_weight: Non-negative float. As in `HALOLoss`. Defaults to
            `1.0`.
        reduction: As in `HALOLoss`. Defaults to `"sum_over_batch_size"`.
        name: Optional name for the loss instance.
        dtype: As in `HALOLoss`. Defaults to `None`.
        **kwargs: No others. Those of Keras's cross-entropies, such as
            `from_logits`, are refused with the reason.

    Call arguments:
        y_true: Ids, integers of shape `(B,)` or `(B, 1)`.
        y_pred: Packed scores of shape `(B, packed_width)`, or
            `(B, 2, packed_width)` of both directions.
        sample_weight: Optional weights of shape `(B,)`, or `(B, 2)` to weigh
            the directions by themselves.

    Raises:
        ValueError: If an argument is out of range, ids and scores do not fit,
            or `HALOSimilarity` has another `label_smoothing`.

    Example:

    >>> pairs = np.random.default_rng(0).normal(size=(3, 8)).astype("float32")
    >>> scores = keras_halo.HALOSimilarity()([pairs, pairs])
    >>> contrastive = keras_halo.HALOContrastiveLoss()(np.arange(3), scores)
    >>> by_position = keras_halo.HALOLoss()(np.arange(3), scores)
    >>> bool(ops.abs(contrastive - by_position) < 1e-5)
    True

    References:

    - Raphael Pisoni, "I don't know!": Teaching neural networks to abstain
      with the HALO-Loss, 2026.
    - Aaron van den Oord, Yazhe Li, Oriol Vinyals, Representation Learning
      with Contrastive Predictive Coding, 2018.
    """

    def __init__(
        self,
        label_smoothing: float = 0.1,
        distill: bool = True,
        radial_weight: float = 1.0,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "halo_contrastive_loss",
        dtype: DType = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            label_smoothing,
            distill,
            radial_weight,
            reduction,
            name,
            dtype,
            kwargs,
        )

    def __call__(
        self, y_true: Any, y_pred: Tensor, sample_weight: Any = None
    ) -> Tensor:
        # Before the base class turns them into floats: a float32 cannot tell
        # 2^24 from its successor.
        labels, scores = ids_and_scores(
            y_true,
            y_pred,
            self.dtype,
            "For keys that are not paired with the queries use "
            "`keras_halo.HALOLoss` with the labels "
            "`keras_halo.pair_labels(query_ids, key_ids)`.",
        )
        check_label_smoothing_of_head(y_pred, self.label_smoothing)
        y_pred = scores
        if sample_weight is not None:
            sample_weight = weights_of_loss(sample_weight, y_pred)
        if len(y_pred.shape) == 3:
            labels = ops.stack([labels, labels], axis=1)
        labels = without_uncounted_labels(labels, y_pred)
        return super().__call__(labels, y_pred, sample_weight=sample_weight)

    def call(self, y_true: Any, y_pred: Tensor) -> Tensor:
        if y_pred.shape[-1] == packing.packed_width(1):
            # Not bare zeros, which have no gradient.
            return y_pred[..., 0] * 0.0
        losses = halo_loss(
            y_true,
            y_pred,
            label_smoothing=self.label_smoothing,
            distill=self.distill,
            radial_weight=self.radial_weight,
        )
        if y_pred.shape[-1] is None:
            losses = ops.where(packing.count_classes(y_pred) > 1, losses, 0.0)
        return losses
