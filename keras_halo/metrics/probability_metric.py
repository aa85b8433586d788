from typing import Any, Self

import keras
from keras import ops

from keras_halo.metrics.samples import (
    are_distributions,
    check_labels_given,
    class_probabilities,
    one_hot,
    readable_weights,
    to_samples,
)
from keras_halo.utils.checks import (
    as_boolean,
    as_integer,
    check_ignore_class,
)
from keras_halo.utils.keras_private import (
    direction_of,
    function_of,
    set_direction,
)
from keras_halo.utils.precision import computation_dtype
from keras_halo.utils.types import DType, Tensor


@keras.saving.register_keras_serializable(package="keras_halo")
class ProbabilityMetric(keras.Metric):
    """Feeds any Keras metric with the class probabilities of packed scores.

    `"accuracy"` and the other metrics that only look for the largest column
    can read packed scores themselves. `AUC`, `Precision`, `F1Score`, `MeanIoU`
    and their like cannot: wrapped, they receive what a model with a softmax
    would have given them.

    Formula:

    ```python
    renormalize=True:    p = softmax([s_1, ..., s_K])
    renormalize=False:   p = softmax([s_1, ..., s_K, min(a, max(s) + 20)])[:K]
    class_id=None:       metric.update_state(y_true, p)
    class_id=c:          metric.update_state(y_true == c, p[c])
    ```

    What the metric gets has flattened positions: `(N, K)` probabilities and
    `(N,)` integer or `(N, K)` one-hot labels, or `(N, 1)` of both with a
    `class_id`. So a metric that takes two axes only, such as `F1Score`, works
    on token and pixel heads too.

    - A binary question (`AUC`, `Precision`, `Recall`, `BinaryAccuracy`,
      `BinaryIoU` on `HALODense(2)`): `class_id=1`. More generally `class_id=c`
      asks for class `c` against the rest, whatever form the labels have. `AUC`
      sorts probabilities into 200 bins of equal width and cannot tell apart
      those that share one; `keras_halo.metrics.auroc` is exact.
    - Many classes (`F1Score`, `AUC(multi_label=True)`, `TopK...`,
      `CategoricalAccuracy`): `class_id=None`, labels one-hot.
    - Metrics that compare classes (`Sparse...`, `MeanIoU(num_classes=K)`):
      `class_id=None`, labels integer. An IoU with `sparse_y_pred=True`, the
      default of Keras, gets the most probable class for its prediction.

    Args:
        metric: A `keras.Metric`, owned by this one from then on.
        renormalize: Boolean. `True`, the default, judges the classes under the
            condition that the model answers. `False` leaves the mass of
            abstaining out, so that the rows sum to less than one, down to
            2e-9: zeros would have no largest column. Metrics that look for
            it, such as accuracies and IoUs, give the same with both. The
            cross-entropies of Keras need `True`: they divide rows by their
            sum, and take what is less than 1e-7 for 1e-7.
        class_id: Optional integer, the class whose probability alone is fed.
            Defaults to `None`.
        one_hot_labels: Optional boolean, whether the metric gets labels
            one-hot or as integers, into which the given ones are turned. Not
            together with `class_id`. `None`, the default, gives integers to
            metrics whose name begins with "Sparse", to those made of such a
            function and to an IoU with `sparse_y_true=True`, and one-hot
            labels to all others. State it for a metric of your own.
        ignore_class: Optional integer, a label that does not count, such as
            255 for void pixels; needs integer labels. Defaults to `None`.
        name: Optional name for the metric instance. Defaults to that of
            `metric`.
        dtype: The dtype in which probabilities are computed; 16-bit dtypes are
            raised to float32. Defaults to `None`, which means
            `keras.config.floatx()`.

    An integer label out of range belongs to no class: it becomes a row of
    zeros among one-hot labels, and not class `c` with a `class_id`.

    The result is NaN if a row that counts holds no packed scores, or a row of
    labels is no distribution, such as a multi-hot one.

    Raises:
        ValueError: If `metric` is no `keras.Metric` or one that knows nothing
            of classes (`Accuracy`, `Mean`, `Sum`), `class_id` is negative or
            not below the number of classes, or both `class_id` and
            `one_hot_labels` are given.

    Example:

    >>> layer = keras_halo.HALODense.reference(
    ...     2, centroid_initializer=keras.initializers.Identity()
    ... )
    >>> scores = layer(np.array([[0.3, 0], [0.2, 0.1], [0.1, 0.2], [0, 0.3]]))
    >>> auc = keras_halo.metrics.ProbabilityMetric(
    ...     keras.metrics.AUC(name="auc"), class_id=1
    ... )
    >>> auc.update_state(np.array([0, 1, 0, 1]), scores)
    >>> round(float(auc.result()), 2)
    0.75

    Usage with `compile()` API:

    ```python
    model.compile(
        "adam",
        loss=keras_halo.HALOLoss(),
        metrics=[keras_halo.metrics.ProbabilityMetric(keras.metrics.F1Score())],
    )
    ```
    """

    def __init__(
        self,
        metric: keras.Metric,
        renormalize: bool = True,
        class_id: int | None = None,
        one_hot_labels: bool | None = None,
        ignore_class: int | None = None,
        name: str | None = None,
        dtype: DType = None,
    ) -> None:
        if class_id is not None:
            class_id = as_integer(
                class_id, "class_id", 0, remedy="Number the classes from zero."
            )
        if one_hot_labels is not None:
            one_hot_labels = as_boolean(one_hot_labels, "one_hot_labels")
        renormalize = as_boolean(renormalize, "renormalize")
        ignore_class = check_ignore_class(ignore_class)
        _check_arguments(metric, class_id, one_hot_labels)
        policy = keras.dtype_policies.get(dtype or keras.config.floatx())
        super().__init__(
            name=name or metric.name,
            dtype=computation_dtype(policy.compute_dtype),
        )
        self.metric = metric
        self.renormalize = renormalize
        self.class_id = class_id
        self.one_hot_labels = one_hot_labels
        self.ignore_class = ignore_class
        # Not left to the metric: counts in integers cannot hold NaN.
        self.unreadable = self.add_variable(
            shape=(), initializer="zeros", dtype=self.dtype, name="unreadable"
        )
        # Callbacks ask for it to tell better from worse.
        set_direction(self, direction_of(metric))

    def update_state(
        self, y_true: Any, y_pred: Tensor, sample_weight: Any = None
    ) -> None:
        """Feeds a batch to the wrapped metric.

        Args:
            y_true: Labels: integers of shape `(...)` or `(..., 1)`, or a
                distribution of shape `(..., K)`.
            y_pred: Packed scores of shape `(..., packed_width)`; their mask is
                honoured.
            sample_weight: Optional weights of shape `(...)`, or of its first
                axes. Defaults to `None`.
        """
        check_labels_given(y_true, type(self).__name__)
        samples = to_samples(
            y_true, y_pred, sample_weight, self.ignore_class, self.dtype
        )
        unreadable = ops.any(ops.isnan(readable_weights(samples)))
        self.unreadable.assign(
            ops.maximum(self.unreadable, ops.cast(unreadable, self.dtype))
        )
        probabilities = class_probabilities(samples.logits, self.renormalize)
        weights = samples.weights
        if weights is not None:
            weights = ops.where(ops.isnan(weights), 0.0, weights)
        labels = _valid_where_uncounted(samples.labels, weights)
        if self.class_id is None:
            labels = self._encode(labels, probabilities.shape[-1])
            if getattr(self.metric, "sparse_y_pred", False):
                probabilities = ops.argmax(samples.logits[:, :-1], axis=-1)
        else:
            labels, probabilities = _one_against_rest(
                labels, probabilities, self.class_id
            )
        if weights is None:
            self.metric.update_state(labels, probabilities)
            return
        if sample_weight is None and "int" in str(self.metric.dtype):
            # A mask keeps an integer metric an integer one.
            weights = ops.cast(weights, self.metric.dtype)
        self.metric.update_state(labels, probabilities, sample_weight=weights)

    def _encode(self, labels, num_classes):
        """Labels in the form that the wrapped metric takes."""
        wants_one_hot = self.one_hot_labels
        if wants_one_hot is None:
            wants_one_hot = not _takes_integers(self.metric)
        if are_distributions(labels) == wants_one_hot:
            return labels
        if wants_one_hot:
            return one_hot(labels, num_classes, self.dtype)
        return ops.cast(ops.argmax(labels, axis=-1), "int32")

    def reset_state(self) -> None:
        super().reset_state()
        self.metric.reset_state()

    def result(self) -> Any:
        return keras.tree.map_structure(
            lambda value: ops.where(self.unreadable > 0.0, float("nan"), value),
            self.metric.result(),
        )

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            {
                "metric": keras.saving.serialize_keras_object(self.metric),
                "renormalize": self.renormalize,
                "class_id": self.class_id,
                "one_hot_labels": self.one_hot_labels,
                "ignore_class": self.ignore_class,
            }
        )
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        metric = keras.saving.deserialize_keras_object(config["metric"])
        return cls(**{**config, "metric": metric})


# They compare, or add, the numbers themselves.
_NOT_OF_CLASSES = (
    keras.metrics.Accuracy,
    keras.metrics.Mean,
    keras.metrics.Sum,
)


def _valid_where_uncounted(labels, weights):
    """Labels, the first class where a sample has no weight, or a row of zeros.

    The number of what is ignored, such as 255, need not be that of a class, and
    metrics that count in a table fail on it, whatever its weight. NaN times a
    weight of zero is NaN.
    """
    if weights is None:
        return labels
    uncounted = ops.equal(weights, 0)
    if are_distributions(labels):
        uncounted = ops.expand_dims(uncounted, axis=-1)
    return ops.where(uncounted, ops.zeros_like(labels), labels)


def _one_against_rest(labels, probabilities, class_id):
    num_classes = probabilities.shape[-1]
    if class_id >= num_classes:
        raise ValueError(
            f"`class_id` must be below the number of classes, {num_classes}. "
            f"Received: class_id={class_id}. Number the classes from zero."
        )
    column = slice(class_id, class_id + 1)
    if not are_distributions(labels):
        labels = one_hot(labels, num_classes, probabilities.dtype)
    return labels[:, column], probabilities[:, column]


def _takes_integers(metric):
    if hasattr(metric, "sparse_y_true"):
        return metric.sparse_y_true
    function = function_of(metric)
    return type(metric).__name__.startswith("Sparse") or getattr(
        function, "__name__", ""
    ).startswith("sparse")


def _check_arguments(metric, class_id, one_hot_labels):
    if not isinstance(metric, keras.Metric):
        raise ValueError(
            "`metric` must be a `keras.Metric`. Received: "
            f"metric={metric!r}. Pass an instance, such as "
            "`keras.metrics.AUC()`."
        )
    if type(metric) in _NOT_OF_CLASSES:
        raise ValueError(
            "`metric` must be one that compares labels with probabilities. "
            f"Received: `keras.metrics.{type(metric).__name__}`, which knows "
            "nothing of classes. Use `keras_halo.metrics.BestClassAccuracy()` "
            "for the share of right answers."
        )
    if class_id is None:
        if isinstance(metric, keras.metrics.BinaryIoU):
            raise ValueError(
                "`BinaryIoU` asks about one class. Received: class_id=None. "
                "Name the class, for two classes with `class_id=1`."
            )
        return
    if one_hot_labels is not None:
        raise ValueError(
            "With a `class_id` the labels are those of this class against the "
            f"rest. Received: class_id={class_id}, one_hot_labels="
            f"{one_hot_labels}. Give one of the two."
        )
