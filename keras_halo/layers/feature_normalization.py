from typing import Any

import keras
from keras import ops

from keras_halo.layers.precise_layer import PreciseLayer
from keras_halo.ops import geometry
from keras_halo.ops.head import saturated
from keras_halo.utils.checks import check_feature_axis
from keras_halo.utils.types import Shape, Tensor


@keras.saving.register_keras_serializable(package="keras_halo")
class FeatureNormalization(PreciseLayer):
    """Bounds the length of features, as `HALODense` does.

    Stands before an embedding that has been taken out of a head, where
    embeddings are needed by themselves.

    Formula: that of `keras_halo.ops.geometry.normalized_features`.

    Args:
        **kwargs: Base layer keyword arguments, such as `name` and `dtype`.

    Input shape:
        N-D tensor of floats with shape `(batch_size, ..., features)`.

    Output shape:
        As the input. float32 whatever the dtype policy, float64 under a
        float64 policy.

    Raises:
        ValueError: If the input is a single number.

    Example:

    >>> layer = keras_halo.layers.FeatureNormalization()
    >>> x = layer(np.array([[200.0, 0.0]], "float32"))
    >>> round(float(x[0, 0]), 4)
    1.1273
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True

    def build(self, input_shape: Shape) -> None:
        self.built = True

    def call(self, inputs: Tensor) -> Tensor:
        check_feature_axis(inputs.shape, self)
        features = saturated(ops.cast(inputs, self.head_dtype))
        return geometry.normalized_features(features)

    def compute_output_spec(self, inputs: Tensor) -> Any:
        check_feature_axis(inputs.shape, self)
        return keras.KerasTensor(inputs.shape, dtype=self.head_dtype)
