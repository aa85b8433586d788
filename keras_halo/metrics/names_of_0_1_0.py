"""What models saved by keras_halo 0.1.0 name, so that they load."""

import keras
from keras import ops

from keras_halo.metrics.abstention_rate import abstained
from keras_halo.metrics.packed_mean import PackedMean
from keras_halo.metrics.probability_metric import ProbabilityMetric
from keras_halo.utils.keras_private import set_direction

keras.saving.get_custom_objects()["keras_halo>OnProbabilities"] = (
    ProbabilityMetric
)


@keras.saving.register_keras_serializable(package="keras_halo")
class Coverage(PackedMean):
    """Share of the samples on which the model names a class.

    Now `AbstentionRate`, which is one minus this.

    Args:
        ignore_class: As in `AbstentionRate`.
        name: Optional name for the metric instance.
        dtype: As in `AbstentionRate`.

    Example:

    >>> head = keras_halo.HALODense.reference(3)
    >>> metric = Coverage()
    >>> metric.update_state(None, head(np.zeros((2, 8), "float32")))
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
