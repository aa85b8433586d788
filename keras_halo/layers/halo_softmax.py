from typing import Any

import keras
from keras import ops

from keras_halo.layers.score_layer import ScoreLayer
from keras_halo.ops import packing
from keras_halo.utils.checks import as_boolean
from keras_halo.utils.types import Shape, Tensor


@keras.saving.register_keras_serializable(package="keras_halo")
class HALOSoftmax(ScoreLayer):
    """Turns the packed scores of a HALO head into plain probabilities.

    Append it to a trained model for deployment, or wherever code expects
    probabilities and nothing else. Train without it: `HALOLoss` needs the
    packed scores.

    Formula:

    ```python
    abstain=True:   p = softmax([s_1, ..., s_K, a])
    abstain=False:  p = softmax([s_1, ..., s_K])
    ```

    Args:
        abstain: Boolean. `True`, the default, gives `K + 1` probabilities with
            that of abstaining last. `False` gives the `K` class probabilities
            under the condition that the model does not abstain.
        **kwargs: Base layer keyword arguments, such as `name` and `dtype`.

    Input shape:
        Packed scores of shape `(batch_size, ..., packed_width)`.

    Output shape:
        `(batch_size, ..., K + 1)`, or `(batch_size, ..., K)` with
        `abstain=False`. float32 whatever the dtype policy, float64 under a
        float64 policy.

    Raises:
        ValueError: If the input has fewer than 8 columns.

    Example:

    >>> scores = keras_halo.HALODense(3)(np.zeros((2, 8), "float32"))
    >>> tuple(keras_halo.HALOSoftmax()(scores).shape)
    (2, 4)
    >>> tuple(keras_halo.HALOSoftmax(abstain=False)(scores).shape)
    (2, 3)
    """

    def __init__(self, abstain: bool = True, **kwargs: Any) -> None:
        abstain = as_boolean(abstain, "abstain")
        super().__init__(**kwargs)
        self.abstain = abstain
        self.input_spec = keras.layers.InputSpec(min_ndim=2)
        self.supports_masking = True

    def build(self, input_shape: Shape) -> None:
        self._count_outputs(input_shape)
        self.input_spec = keras.layers.InputSpec(
            min_ndim=2, axes={-1: input_shape[-1]}
        )
        self.built = True

    def call(self, inputs: Tensor) -> Tensor:
        logits = packing.answer_logits(ops.cast(inputs, self.head_dtype))
        return ops.softmax(logits if self.abstain else logits[..., :-1])

    def _count_outputs(self, input_shape):
        return packing.count_classes(input_shape) + int(self.abstain)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return (*input_shape[:-1], self._count_outputs(input_shape))

    def compute_output_spec(self, inputs: Tensor) -> Any:
        return keras.KerasTensor(
            self.compute_output_shape(inputs.shape), dtype=self.head_dtype
        )

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "abstain": self.abstain}
