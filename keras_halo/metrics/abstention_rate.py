from typing import Any

import keras
from keras import ops

from keras_halo.metrics.packed_mean import PackedMean
from keras_halo.ops.tensors import max_of_rows
from keras_halo.utils.keras_private import set_direction
from keras_halo.utils.types import DType, Tensor


def abstained(logits):
    """Tells for each sample whether abstaining is the most probable answer.

    A class that ties with abstaining is named.

    Args:
        logits: Tensor of shape `(N, K + 1)`, that of abstaining last.

    Returns:
        Boolean tensor of shape `(N,)`.

    Example:

    >>> logits = ops.array([[0.0, 1.0, 2.0], [0.0, 2.0, 2.0]])
    >>> ops.convert_to_numpy(abstained(logits)).tolist()
    [True, False]
    """
    return logits[:, -1] > max_of_rows(logits[:, :-1])[:, 0]


@keras.saving.register_keras_serializable(package="keras_halo")
class AbstentionRate(PackedMean):
    """Share of the samples on which the model says "I don't know".

    A sample counts as abstained when abstaining is the most probable of the
    `K + 1` answers. Labels are not read, so that the rate can be taken of
    outliers too.

    Formula:

    ```python
    abstention_rate = mean(argmax([s_1, ..., s_K, a]) == K)
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
    >>> metric = keras_halo.metrics.AbstentionRate()
    >>> metric.update_state(None, scores)
    >>> float(metric.result())
    1.0

    Usage with `compile()` API:

    ```python
    model.compile(
        "adam",
        loss=keras_halo.HALOLoss(),
        metrics=["accuracy", keras_halo.metrics.AbstentionRate()],
    )
    ```
    """

    reads_labels = False

    def __init__(
        self,
        ignore_class: int | None = None,
        name: str | None = "abstention_rate",
        dtype: DType = None,
    ) -> None:
        super().__init__(ignore_class=ignore_class, name=name, dtype=dtype)
        # Metric should be minimized during optimization.
        set_direction(self, "down")

    def values_and_weights(
        self, samples: Any, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        return ops.cast(abstained(samples.logits), self.dtype), weights
