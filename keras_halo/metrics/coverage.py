import keras
from keras import ops

from keras_halo.metrics.abstention_rate import abstained
from keras_halo.metrics.packed_mean import PackedMean
from keras_halo.utils.keras_private import set_direction


@keras.saving.register_keras_serializable(package="keras_halo")
class Coverage(PackedMean):
    """Share of the samples on which the model names a class.

    The counterpart of `SelectiveAccuracy`: an accuracy among the answered
    samples means little without the share that was answered.

    Formula:

    ```python
    coverage = mean(argmax([s_1, ..., s_K, b]) < K) = 1 - abstention_rate
    ```

    Args:
        ignore_class: Optional integer, a label that does not count, such as
            255 for void pixels; needs integer labels. Defaults to `None`.
        name: Optional name for the metric instance.
        dtype: The dtype of the metric's computations; 16-bit dtypes are raised
            to float32. Defaults to `None`, which means
            `keras.config.floatx()`.

    The result is NaN before the first sample that counts, and if a row that
    counts holds no packed scores.

    Example:

    >>> head = keras_halo.HALODense.reference(3)
    >>> scores = head(np.zeros((2, 8), "float32"))
    >>> metric = keras_halo.metrics.Coverage()
    >>> metric.update_state(None, scores)
    >>> float(metric.result())
    0.0
    """

    reads_labels = False

    def __init__(self, ignore_class=None, name="coverage", dtype=None):
        super().__init__(ignore_class=ignore_class, name=name, dtype=dtype)
        # Metric should be maximized during optimization.
        set_direction(self, "up")

    def values_and_weights(self, samples, weights):
        answered = ops.logical_not(abstained(samples.logits))
        return ops.cast(answered, self.dtype), weights
