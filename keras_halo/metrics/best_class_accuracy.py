from typing import Any

import keras
from keras import ops

from keras_halo.metrics.packed_mean import PackedMean
from keras_halo.metrics.samples import are_distributions
from keras_halo.utils.keras_private import set_direction
from keras_halo.utils.types import DType, Tensor


@keras.saving.register_keras_serializable(package="keras_halo")
class BestClassAccuracy(PackedMean):
    """Accuracy of the most probable class, whether the model abstains or not.

    What `"accuracy"` is of a model that cannot abstain: that which stands in
    tables, and which to compare with cross-entropy. `"accuracy"` on packed
    scores counts an abstention as a mistake.

    Formula:

    ```python
    best_class_accuracy = mean(argmax([s_1, ..., s_K]) == label)
    ```

    Args:
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

    Example:

    >>> layer = keras_halo.HALODense.reference(
    ...     2, centroid_initializer=keras.initializers.Identity()
    ... )
    >>> scores = layer(np.array([[3.0, 0], [0, 3.0], [0.02, 0.01]]))
    >>> labels = np.array([0, 1, 0])
    >>> metric = keras_halo.metrics.BestClassAccuracy()
    >>> metric.update_state(labels, scores)
    >>> float(metric.result())
    1.0
    """

    def __init__(
        self,
        ignore_class: int | None = None,
        name: str | None = "best_class_accuracy",
        dtype: DType = None,
    ) -> None:
        super().__init__(ignore_class=ignore_class, name=name, dtype=dtype)
        set_direction(self, "up")

    def values_and_weights(self, samples: Any, weights: Tensor) -> Any:
        labels = samples.labels
        if are_distributions(labels):
            labels = ops.cast(ops.argmax(labels, axis=-1), "int32")
        named = ops.cast(ops.argmax(samples.logits[:, :-1], axis=-1), "int32")
        return ops.cast(ops.equal(named, labels), self.dtype), weights
