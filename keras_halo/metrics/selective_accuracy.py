from typing import Any

import keras
from keras import ops

from keras_halo.metrics.abstention_rate import abstained
from keras_halo.metrics.packed_mean import PackedMean
from keras_halo.metrics.samples import are_distributions
from keras_halo.utils.keras_private import set_direction
from keras_halo.utils.types import DType, Tensor


@keras.saving.register_keras_serializable(package="keras_halo")
class SelectiveAccuracy(PackedMean):
    """Accuracy among the samples on which the model names a class.

    `"accuracy"` counts an abstention as a mistake; this metric leaves it out.
    Read it together with `AbstentionRate`: an
    accuracy among the answered samples means little without their share.

    Formula:

    ```python
    answer = argmax([s_1, ..., s_K, a])
    selective_accuracy = mean((answer == label)[answer < K])
    ```

    Args:
        ignore_class: Optional integer, a label that does not count, such as
            255 for void pixels; needs integer labels. Defaults to `None`.
        name: Optional name for the metric instance.
        dtype: The dtype of the metric's computations; 16-bit dtypes are raised
            to float32. Defaults to `None`, which means
            `keras.config.floatx()`.

    Labels are integers, or a distribution whose most probable class is the
    label, as in `keras.metrics.CategoricalAccuracy`. An integer that belongs
    to no class, such as -1 for an outlier, makes every named class wrong.

    Of two towers it would compare ids with positions in the batch:
    `keras_halo.metrics.RetrievalRecall` knows ids.

    The result is NaN while the model has abstained on all samples: no answer
    is neither right nor wrong, and `ModelCheckpoint` does not take NaN for the
    best value. It is NaN too if a row that counts holds no packed scores, or a
    row of labels is no distribution, such as a multi-hot one.

    Example:

    >>> layer = keras_halo.HALODense.reference(
    ...     2, centroid_initializer=keras.initializers.Identity()
    ... )
    >>> scores = layer(np.array([[3.0, 0], [0, 3.0], [0, 3.0], [0.0, 0]]))
    >>> metric = keras_halo.metrics.SelectiveAccuracy()
    >>> metric.update_state(np.array([0, 1, 0, 0]), scores)
    >>> round(float(metric.result()), 4)
    0.6667

    References:

    - Yonatan Geifman, Ran El-Yaniv, Selective classification for deep neural
      networks, 2017.
    """

    def __init__(
        self,
        ignore_class: int | None = None,
        name: str | None = "selective_accuracy",
        dtype: DType = None,
    ) -> None:
        super().__init__(ignore_class=ignore_class, name=name, dtype=dtype)
        # Metric should be maximized during optimization.
        set_direction(self, "up")

    def values_and_weights(
        self, samples: Any, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        labels = samples.labels
        if are_distributions(labels):
            labels = ops.cast(ops.argmax(labels, axis=-1), "int32")
        named = ops.cast(ops.argmax(samples.logits[:, :-1], axis=-1), "int32")
        correct = ops.cast(ops.equal(named, labels), self.dtype)
        answered = ops.logical_not(abstained(samples.logits))
        # A product, so that a NaN weight stays one.
        return correct, weights * ops.cast(answered, self.dtype)
