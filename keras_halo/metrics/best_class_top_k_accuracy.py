from typing import Any

import keras
from keras import ops

from keras_halo.metrics.packed_mean import PackedMean
from keras_halo.metrics.samples import are_distributions
from keras_halo.utils.checks import as_integer
from keras_halo.utils.keras_private import set_direction
from keras_halo.utils.types import DType, Tensor


@keras.saving.register_keras_serializable(package="keras_halo")
class BestClassTopKAccuracy(PackedMean):
    """How often the label is among the `k` most probable classes.

    Takes the place of `keras.metrics.SparseTopKCategoricalAccuracy` and
    `keras.metrics.TopKCategoricalAccuracy`, to which abstaining is one of the
    `k` answers.

    Formula:

    ```python
    ahead = sum_k (s_k > s_label) + sum_{k < label} (s_k == s_label)
    best_class_top_k_accuracy = mean(ahead < k)
    ```

    Args:
        k: Positive integer. Defaults to `5`.
        ignore_class: Optional integer, a label that does not count, such as
            255 for void pixels; needs integer labels. Defaults to `None`.
        name: Optional name for the metric instance.
        dtype: The dtype of the metric's computations; 16-bit dtypes are raised
            to float32. Defaults to `None`, which means
            `keras.config.floatx()`.

    Labels are integers, or a distribution whose most probable class is the
    label. An integer that belongs to no class is never right.

    Of two towers it would compare ids with positions in the batch:
    `keras_halo.metrics.RetrievalRecall` knows ids.

    The result is NaN before the first sample that counts, and if a row that
    counts holds no packed scores, or labels that are no distribution, such as
    multi-hot ones.

    Raises:
        ValueError: If `k` is not a positive integer.

    Example:

    >>> layer = keras_halo.HALODense.reference(
    ...     3, centroid_initializer=keras.initializers.Identity()
    ... )
    >>> scores = layer(np.array([[0.3, 0.2, 0.1], [0.3, 0.2, 0.1]]))
    >>> metric = keras_halo.metrics.BestClassTopKAccuracy(k=2)
    >>> metric.update_state(np.array([1, 2]), scores)
    >>> float(metric.result())
    0.5
    """

    def __init__(
        self,
        k: int = 5,
        ignore_class: int | None = None,
        name: str | None = "best_class_top_k_accuracy",
        dtype: DType = None,
    ) -> None:
        k = as_integer(k, "k", 1)
        super().__init__(ignore_class=ignore_class, name=name, dtype=dtype)
        self.k = k
        set_direction(self, "up")

    def values_and_weights(self, samples: Any, weights: Tensor) -> Any:
        logits, labels = samples.logits[:, :-1], samples.labels
        if are_distributions(labels):
            labels = ops.cast(ops.argmax(labels, axis=-1), "int32")
        num_classes = logits.shape[-1]
        labels = ops.expand_dims(labels, axis=-1)
        classes = ops.arange(num_classes, dtype="int32")
        is_own = ops.equal(labels, classes)
        own = ops.sum(ops.where(is_own, logits, 0.0), axis=-1, keepdims=True)
        # Of equal ones the first comes first, as in an argmax.
        first = ops.logical_and(ops.equal(logits, own), classes < labels)
        is_ahead = ops.logical_or(logits > own, first)
        # Also where a compiler has computed it twice, with other roundings.
        is_ahead = ops.logical_and(is_ahead, ops.logical_not(is_own))
        ahead = ops.sum(ops.cast(is_ahead, "int32"), axis=-1)
        found = ops.logical_and(ops.any(is_own, axis=-1), ahead < self.k)
        return ops.cast(found, self.dtype), weights

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "k": self.k}
