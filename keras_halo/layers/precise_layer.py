from typing import Any

import keras

from keras_halo.utils.precision import computation_dtype, full_precision
from keras_halo.utils.types import Tensor


class PreciseLayer(keras.layers.Layer):
    """Base of the layers that never compute below float32.

    Squares, logarithms and packed scores lose their digits in 16 bits. Such a
    layer casts its inputs and weights by itself, to `head_dtype`, and
    `torch.autocast` around a model ends at it.

    Args:
        **kwargs: Base layer keyword arguments.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.autocast = False

    @property
    def head_dtype(self) -> str:
        """String, the dtype in which the layer computes and answers."""
        return computation_dtype(self.compute_dtype)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        with full_precision():
            return super().__call__(*args, **kwargs)

    def stateless_call(self, *args: Any, **kwargs: Any) -> Any:
        # Keras does not go through `__call__` here.
        with full_precision():
            return super().stateless_call(*args, **kwargs)
