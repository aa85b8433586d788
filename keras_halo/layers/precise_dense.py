from typing import Any

import keras

from keras_halo.layers.precise_layer import PreciseLayer
from keras_halo.utils.types import Tensor


@keras.saving.register_keras_serializable(package="keras_halo")
class PreciseDense(PreciseLayer, keras.layers.Dense):
    """A `Dense` layer that never computes below float32.

    Makes the embedding that a converted head reads, and stands for that of a
    `HALODense` where embeddings are needed by themselves. In 16 bits, the
    distances between them would be those between other points.

    Args:
        units: Integer, the number of outputs.
        **kwargs: Further arguments of `keras.layers.Dense`.

    Input shape:
        N-D tensor of floats with shape `(batch_size, ..., features)`.

    Output shape:
        N-D tensor with shape `(batch_size, ..., units)`. float32 whatever the
        dtype policy, float64 under a float64 policy.

    Example:

    >>> layer = PreciseDense(3, dtype="mixed_float16")
    >>> keras.backend.standardize_dtype(layer(np.ones((2, 4))).dtype)
    'float32'
    """

    def __init__(self, units: int, **kwargs: Any) -> None:
        super().__init__(units=units, **kwargs)

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        inputs = keras.ops.cast(inputs, self.head_dtype)
        return super().call(inputs, training=training)

    def compute_output_spec(
        self, inputs: Tensor, training: bool | None = None
    ) -> Any:
        # The base class would announce the 16-bit compute dtype of a mixed
        # policy, which is not what `call` returns.
        return keras.KerasTensor(
            self.compute_output_shape(inputs.shape), dtype=self.head_dtype
        )
