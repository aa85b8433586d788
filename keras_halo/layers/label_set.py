from typing import Any

import keras
from keras import ops

from keras_halo.layers.decision import Decision
from keras_halo.ops import packing
from keras_halo.utils.types import Shape, Tensor


@keras.saving.register_keras_serializable(package="keras_halo")
class LabelSet(Decision):
    """Turns packed scores into the set of labels that an input may have.

    `rule.to_layer()` makes the layer that answers as a fitted
    `keras_halo.rejection.LabelSetRule` does. The empty set means "none of
    them".

    Formula:

    ```python
    outputs[k] = ood_score + max_j s_j - s_k <= threshold
    ```

    Args:
        threshold: Float, or a list of `K` floats, one for each label.
        method: As in `keras_halo.layers.Decision`. Defaults to
            `"max_probability"`.
        **kwargs: Base layer keyword arguments, such as `name` and `dtype`.

    Call arguments:
        scores: As in `keras_halo.layers.Decision`.
        ood: As in `keras_halo.layers.Decision`.

    Output shape:
        `(batch_size, ..., K)`, booleans: whether a label is in the set.

    Raises:
        ValueError: As in `keras_halo.layers.Decision`, or if `threshold` is
            `None`.

    Example:

    >>> head = keras_halo.HALODense.reference(
    ...     2, centroid_initializer="identity"
    ... )
    >>> scores = head(np.array([[5, 0, 0, 0], [0, 0, 0, 0.0]], "float32"))
    >>> layer = keras_halo.layers.LabelSet(threshold=2.0)
    >>> ops.convert_to_numpy(layer(scores)).tolist()
    [[True, False], [False, False]]
    >>> layer = keras_halo.layers.LabelSet(threshold=6.0)
    >>> ops.convert_to_numpy(layer(scores)).tolist()
    [[True, False], [True, True]]
    """

    def __init__(
        self,
        threshold: float | list[float],
        method: str | None = "max_probability",
        **kwargs: Any,
    ) -> None:
        if threshold is None:
            raise ValueError(
                "A set of labels needs a `threshold`. Received: "
                "threshold=None. Fit a `keras_halo.rejection.LabelSetRule` "
                "and use `rule.to_layer()`."
            )
        super().__init__(threshold, method, **kwargs)

    def call(self, scores: Tensor, ood: Tensor = None) -> Tensor:
        scores, ood = self._both(scores, ood)
        self._check_shapes(scores.shape, None if ood is None else ood.shape)
        return self._members(ops.cast(scores, self.head_dtype), ood)

    def compute_output_shape(
        self, scores_shape: Shape, ood_shape: Shape = None
    ) -> Shape:
        shape = tuple(self._both(scores_shape, ood_shape)[0])
        return (*shape[:-1], packing.count_classes(shape))

    def compute_output_spec(self, scores: Tensor, ood: Tensor = None) -> Any:
        scores, ood = self._both(scores, ood)
        self._check_shapes(scores.shape, None if ood is None else ood.shape)
        shape = tuple(scores.shape)
        return keras.KerasTensor(
            (*shape[:-1], packing.count_classes(shape)), dtype="bool"
        )
