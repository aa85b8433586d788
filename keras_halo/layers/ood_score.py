from typing import Any

import keras
from keras import ops

from keras_halo.layers.score_layer import ScoreLayer
from keras_halo.ops import ood_scores, packing
from keras_halo.ops.model_output import (
    FITTED,
    read_model_output,
    require_fitted,
)
from keras_halo.utils.types import Shape, Tensor


@keras.saving.register_keras_serializable(package="keras_halo")
class OODScore(ScoreLayer):
    """Turns packed scores into one out-of-distribution score an input.

    Append it to a trained model to deploy the score with the model: in a
    functional model with two outputs, the packed scores and this one.

    Formula: that of `keras_halo.ood_score` for the same `method`.

    Args:
        method: String, one of `keras_halo.OOD_METHODS`; `"fitted"` for the
            score that a model of `keras_halo.fit_class_gaussians` emits.
            Defaults to `"abstain"`.
        **kwargs: Base layer keyword arguments, such as `name` and `dtype`.

    Input shape:
        Packed scores of shape `(batch_size, ..., packed_width)`, or the
        dictionary of a model of `keras_halo.fit_class_gaussians`.

    Output shape:
        `(batch_size, ...)`. float32 whatever the dtype policy, float64 under a
        float64 policy.

    Raises:
        ValueError: If `method` is not known, the input has fewer than 8
            columns, or it holds no fitted score with `method="fitted"`.

    Example:

    >>> scores = keras_halo.HALODense(3)(np.zeros((2, 8), "float32"))
    >>> tuple(keras_halo.layers.OODScore("nearest")(scores).shape)
    (2,)
    """

    def __init__(self, method: str = "abstain", **kwargs: Any) -> None:
        ood_scores.check_method(method, allow_fitted=True)
        super().__init__(**kwargs)
        self.method = method
        if not self.reads_fitted_score:
            self.input_spec = keras.layers.InputSpec(min_ndim=2)
        self.supports_masking = True

    @property
    def reads_fitted_score(self) -> bool:
        return self.method == FITTED

    def build(self, input_shape: Any) -> None:
        if self.reads_fitted_score:
            self.built = True
            return
        packing.count_classes(input_shape)
        self.input_spec = keras.layers.InputSpec(
            min_ndim=2, axes={-1: input_shape[-1]}
        )
        self.built = True

    def call(self, inputs: Any) -> Tensor:
        if self.reads_fitted_score:
            return ops.cast(self._fitted(inputs), self.head_dtype)
        return ood_scores.ood_score(
            ops.cast(inputs, self.head_dtype), self.method
        )

    def _fitted(self, inputs):
        return require_fitted(read_model_output(inputs, "inputs"), "inputs")

    def compute_output_shape(self, input_shape: Any) -> Shape:
        if self.reads_fitted_score:
            return tuple(input_shape["ood"])
        return tuple(input_shape[:-1])

    def compute_output_spec(self, inputs: Any) -> Any:
        if self.reads_fitted_score:
            shape = self._fitted(inputs).shape
            return keras.KerasTensor(shape, dtype=self.head_dtype)
        packing.count_classes(inputs.shape)
        return keras.KerasTensor(
            self.compute_output_shape(inputs.shape), dtype=self.head_dtype
        )

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "method": self.method}
