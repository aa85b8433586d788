from typing import Any

import keras
import numpy as np
from keras import ops

from keras_halo.metrics.calibration import bin_edges, check_num_bins
from keras_halo.metrics.packed_mean import PackedMean
from keras_halo.metrics.samples import (
    are_distributions,
    class_probabilities,
    one_hot,
)
from keras_halo.ops.tensors import max_of_rows
from keras_halo.utils.checks import as_boolean
from keras_halo.utils.keras_private import set_direction
from keras_halo.utils.types import DType, Tensor


@keras.saving.register_keras_serializable(package="keras_halo")
class ExpectedCalibrationError(PackedMean):
    """Expected distance between confidence and accuracy, over batches.

    The streaming form of `keras_halo.metrics.expected_calibration_error`, read
    from packed scores. The confidence of a sample is the largest of its class
    probabilities, whether or not the model abstains on it; the bins are
    equally wide and closed below, the last one also above.

    Formula:

    ```python
    renormalize=True:    p = softmax([s_1, ..., s_K])
    renormalize=False:   p = softmax([s_1, ..., s_K, min(a, max(s) + 20)])[:K]
    ece = sum_b abs(sum(w * (correct - max(p)) in bin b)) / sum(w)
    ```

    Args:
        num_bins: Positive integer. Defaults to `15`.
        renormalize: Boolean. `True`, the default, judges the classes under the
            condition that the model answers. `False` leaves the mass of
            abstaining out of the confidence.
        ignore_class: Optional integer, a label that does not count, such as
            255 for void pixels; needs integer labels. Defaults to `None`.
        name: Optional name for the metric instance.
        dtype: The dtype of the metric's computations; 16-bit dtypes are raised
            to float32. Defaults to `None`, which means
            `keras.config.floatx()`.

    Labels are integers or a distribution; a sample with a soft label is
    correct to the degree of the mass on its most probable class. An integer
    that belongs to no class makes every prediction wrong.

    Of two towers it would compare ids with positions in the batch:
    `keras_halo.metrics.RetrievalRecall` knows ids.

    The result is NaN before the first sample that counts, and if a row that
    counts holds no packed scores, or labels that are no distribution, such as
    multi-hot ones. With fewer samples than bins it is
    unreliable: `keras_halo.metrics.expected_calibration_error` refuses that, a
    metric in the middle of a stream cannot.

    Raises:
        ValueError: If `num_bins` is not a positive integer.

    Example:

    >>> layer = keras_halo.HALODense.reference(
    ...     2, centroid_initializer=keras.initializers.Identity()
    ... )
    >>> scores = layer(np.array([[3.0, 0], [0, 3.0], [0, 3.0], [0, 3.0]]))
    >>> metric = keras_halo.metrics.ExpectedCalibrationError()
    >>> metric.update_state(np.array([0, 1, 1, 0]), scores)
    >>> round(float(metric.result()), 2)
    0.25

    References:

    - Chuan Guo et al., On calibration of modern neural networks, 2017.
    """

    def __init__(
        self,
        num_bins: int = 15,
        renormalize: bool = True,
        ignore_class: int | None = None,
        name: str | None = "expected_calibration_error",
        dtype: DType = None,
    ) -> None:
        num_bins = check_num_bins(num_bins)
        renormalize = as_boolean(renormalize, "renormalize")
        super().__init__(
            shape=(num_bins,), ignore_class=ignore_class, name=name, dtype=dtype
        )
        self.num_bins = num_bins
        self.renormalize = renormalize
        # Metric should be minimized during optimization.
        set_direction(self, "down")

    def values_and_weights(
        self, samples: Any, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        probabilities = class_probabilities(samples.logits, self.renormalize)
        confidence = max_of_rows(probabilities)[:, 0]
        # Of logits: where abstaining is far ahead, probabilities underflow.
        named = ops.cast(ops.argmax(samples.logits[:, :-1], axis=-1), "int32")
        if are_distributions(samples.labels):
            chosen = one_hot(named, probabilities.shape[-1], self.dtype)
            correct = ops.sum(samples.labels * chosen, axis=-1)
        else:
            correct = ops.cast(ops.equal(named, samples.labels), self.dtype)
        return self._in_bins(confidence) * (correct - confidence), weights

    def _in_bins(self, confidence):
        """One-hot bins of shape `(num_bins, N)`."""
        inner = ops.convert_to_tensor(
            _rounded_up(bin_edges(self.num_bins)[1:-1], self.dtype)
        )
        reached = ops.cast(confidence >= inner[:, None], self.dtype)
        every = ops.ones_like(confidence)[None]
        none = ops.zeros_like(every)
        return ops.concatenate([every, reached], axis=0) - ops.concatenate(
            [reached, none], axis=0
        )

    def result(self) -> Tensor:
        return ops.sum(ops.absolute(super().result()))

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "num_bins": self.num_bins,
            "renormalize": self.renormalize,
        }


def _rounded_up(edges, dtype):
    """The smallest numbers of a dtype that are not below the edges.

    A number of that dtype lies above an edge exactly if it does not lie below
    the edge rounded up, so that float32 and float64 agree on every bin.
    """
    rounded = edges.astype(dtype)
    return np.where(
        rounded < edges, np.nextafter(rounded, rounded.dtype.type(2)), rounded
    )
