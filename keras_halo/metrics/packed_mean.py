from typing import Any

import keras
from keras import ops

from keras_halo.metrics.samples import (
    check_labels_given,
    readable_weights,
    to_samples,
)
from keras_halo.utils.checks import check_ignore_class
from keras_halo.utils.precision import computation_dtype
from keras_halo.utils.types import DType, Tensor


def compensated_add(total, correction, increment):
    """Adds to a running sum and keeps what rounding lost, for a later sum.

    Formula:

    ```python
    new_total = round(total + increment)
    new_correction = correction + (total + increment - new_total)
    ```

    The difference is exact (Knuth's two-sum), so `total + correction` stays
    right to the last digits after any number of additions. A bare float32 sum
    of counts stops growing at 16.8 million.

    Args:
        total: Tensor, the sum so far.
        correction: Tensor like `total`, what its roundings lost so far.
        increment: Tensor like `total`.

    Returns:
        Tuple of two tensors like `total`: `(new_total, new_correction)`.

    Example:

    >>> total, rest = compensated_add(
    ...     ops.array(2.0**24), ops.array(0.0), ops.array(1.0)
    ... )
    >>> float(total), float(rest)
    (16777216.0, 1.0)
    """
    new_total = total + increment
    added = new_total - total
    lost = (total - (new_total - added)) + (increment - added)
    return new_total, correction + lost


class PackedMean(keras.Metric):
    """Base of the metrics that are a weighted mean over samples.

    A metric of your own says in `values_and_weights` what is averaged, and
    sets `reads_labels = False` if it needs no labels. The base reads packed
    scores, labels of every kind, weights and masks, takes every position of a
    token or pixel head for a sample, and adds up without losing digits, so
    that the result is the same however samples are split into batches.
    Registered with `keras.saving.register_keras_serializable`, the metric is
    saved with a compiled model and loads with it.

    Args:
        shape: Tuple, the shape of the value of one sample. A subclass whose
            values are no scalars passes it in its own constructor: it is not
            part of `get_config()`. Defaults to `()`.
        ignore_class: Optional integer, a label that does not count, such as
            255 for void pixels; needs integer labels. Defaults to `None`.
        name: Optional name for the metric instance.
        dtype: The dtype of the metric's computations; 16-bit dtypes are raised
            to float32. Defaults to `None`, which means
            `keras.config.floatx()`.

    Attributes:
        reads_labels: Boolean, whether the value of a sample depends on its
            label. Where it does not, `update_state` takes `None` for the
            labels. Defaults to `True`.

    The result is NaN before the first sample that counts, and if a row that
    counts holds no packed scores.

    Example:

    >>> @keras.saving.register_keras_serializable(package="my_package")
    ... class Confidence(keras_halo.metrics.PackedMean):
    ...     reads_labels = False
    ...
    ...     def values_and_weights(self, samples, weights):
    ...         probabilities = ops.softmax(samples.logits)
    ...         return ops.max(probabilities, axis=-1), weights
    >>> head = keras_halo.HALODense.reference(3)
    >>> scores = head(np.zeros((2, 8), "float32"))
    >>> metric = Confidence(name="confidence")
    >>> metric.update_state(None, scores)
    >>> 0.25 < float(metric.result()) < 1.0
    True
    """

    # Whether the value of a sample depends on its label.
    reads_labels = True

    def __init__(
        self,
        shape: tuple[int, ...] = (),
        ignore_class: int | None = None,
        name: str | None = None,
        dtype: DType = None,
    ) -> None:
        ignore_class = check_ignore_class(ignore_class)
        policy = keras.dtype_policies.get(dtype or keras.config.floatx())
        super().__init__(
            name=name, dtype=computation_dtype(policy.compute_dtype)
        )
        self.ignore_class = ignore_class
        self.total = self._add_sum("total", shape)
        self.total_correction = self._add_sum("total_correction", shape)
        self.weight = self._add_sum("weight", ())
        self.weight_correction = self._add_sum("weight_correction", ())

    def _add_sum(self, name, shape):
        return self.add_variable(
            shape=shape, initializer="zeros", dtype=self.dtype, name=name
        )

    def values_and_weights(
        self, samples: Any, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns what is averaged, and the weight that it has.

        Args:
            samples: Named tuple of `N` samples: `logits` of shape
                `(N, K + 1)`, that of abstaining last; `labels`, integers of
                shape `(N,)`, a distribution of shape `(N, K)`, or `None`
                where there are none.
            weights: Tensor of shape `(N,)`, the weights of the samples; NaN
                where a sample counts and holds no packed scores, or a row of
                labels that is no distribution. To leave samples out, multiply
                by zeros, so that a NaN stays one.

        Returns:
            Tuple of tensors: values of shape `(*shape, N)`, in the dtype of
            the metric, and weights of shape `(N,)`.
        """
        raise NotImplementedError

    def update_state(
        self, y_true: Any, y_pred: Tensor, sample_weight: Any = None
    ) -> None:
        """Adds a batch.

        Args:
            y_true: Labels: integers of shape `(...)` or `(..., 1)`, or a
                distribution of shape `(..., K)`. `None` where the metric does
                not read labels.
            y_pred: Packed scores of shape `(..., packed_width)`; their mask is
                honoured.
            sample_weight: Optional weights of shape `(...)`, or of its first
                axes. Defaults to `None`.
        """
        if not self.reads_labels and self.ignore_class is None:
            y_true = None
        else:
            check_labels_given(y_true, type(self).__name__)
        samples = to_samples(
            y_true, y_pred, sample_weight, self.ignore_class, self.dtype
        )
        weights = readable_weights(samples)
        self.add(*self.values_and_weights(samples, weights))

    def add(self, values: Tensor, weights: Tensor) -> None:
        """Adds values to the mean.

        Args:
            values: Tensor of shape `(*shape, N)`.
            weights: Tensor of shape `(N,)`.
        """
        weighted = ops.where(ops.equal(weights, 0.0), 0.0, values * weights)
        self._accumulate(
            self.total, self.total_correction, ops.sum(weighted, axis=-1)
        )
        self._accumulate(self.weight, self.weight_correction, ops.sum(weights))

    def _accumulate(self, total, correction, increment):
        new_total, new_correction = compensated_add(
            ops.convert_to_tensor(total),
            ops.convert_to_tensor(correction),
            increment,
        )
        total.assign(new_total)
        correction.assign(new_correction)

    def result(self) -> Tensor:
        total = self.total + self.total_correction
        weight = self.weight + self.weight_correction
        # Written so that a NaN weight stays one.
        nothing = ops.equal(weight, 0.0)
        return ops.where(
            nothing, float("nan"), total / ops.where(nothing, 1.0, weight)
        )

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "ignore_class": self.ignore_class}
