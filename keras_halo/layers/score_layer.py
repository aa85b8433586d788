import inspect
from collections.abc import Mapping
from typing import Any

import keras

from keras_halo.layers.precise_layer import PreciseLayer
from keras_halo.ops.model_output import read_model_output
from keras_halo.ops.packing import (
    NUM_EXTRA_COLUMNS,
    OLD_EXTRA_COLUMNS,
    check_precision,
)
from keras_halo.utils.types import Tensor

_MARK = "packed_columns"


class ScoreLayer(PreciseLayer):
    """Base of the layers that read packed scores.

    A layer of your own says in `call` what it makes of them. Packed scores do
    not survive a cast to 16 bits, so that the base never casts them, whatever
    the dtype policy, and refuses those that come in 16 bits; `torch.autocast`
    ends at the layer. Of the dictionary that a model of
    `keras_halo.fit_class_gaussians` emits, `call` gets the packed scores.
    Registered with `keras.saving.register_keras_serializable`, the layer is
    saved with a model and loads with it.

    Files of keras_halo 0.1.0 say that the layer was built for packed scores
    with two columns fewer. They are built for what their head emits now, and
    told by their build configuration: a `get_build_config` of your own adds to
    that of the base.

    Args:
        **kwargs: Base layer keyword arguments, such as `name` and `dtype`.

    Attributes:
        scores_index: Integer, the place of the packed scores among the
            arguments of `call`. Defaults to `0`.
        scores_shape_names: Tuple of strings, the names under which the build
            configuration may hold the shape of the packed scores. Defaults to
            `("input_shape", "scores_shape")`.

    Example:

    >>> @keras.saving.register_keras_serializable(package="my_package")
    ... class Margin(keras_halo.layers.ScoreLayer):
    ...     def call(self, scores):
    ...         logits = keras_halo.ops.packing.unpack(scores).logits
    ...         best = ops.top_k(logits, 2)[0]
    ...         return best[..., 0] - best[..., 1]
    >>> scores = keras_halo.HALODense(3)(np.zeros((2, 8), "float32"))
    >>> tuple(Margin()(scores).shape)
    (2,)
    """

    # The place of packed scores among the arguments of a call.
    scores_index = 0

    # The names under which Keras may keep the shape of packed scores.
    scores_shape_names = ("input_shape", "scores_shape")

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # None where `call` takes any number of arguments.
        names = [*inspect.signature(self.call).parameters, None]
        self._scores_name = names[min(self.scores_index, len(names) - 1)]

    @property
    def reads_fitted_score(self) -> bool:
        """Whether `call` gets the whole dictionary of a fitted model."""
        return False

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        name, place = self._scores_name, self.scores_index
        scores = args[place] if len(args) > place else kwargs.get(name)
        if isinstance(scores, Mapping) and not self.reads_fitted_score:
            scores = read_model_output(scores).scores
            if len(args) > place:
                args = (*args[:place], scores, *args[place + 1 :])
            else:
                kwargs[name] = scores
        for tensor in keras.tree.flatten(scores):
            if hasattr(tensor, "dtype"):
                check_precision(tensor.dtype)
        return super().__call__(*args, **kwargs)

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        # A layer of Keras that tells the shape of its outputs has them in the
        # dtype of its policy, which may be 16 bits.
        return keras.Operation.compute_output_spec(self, *args, **kwargs)

    def get_build_config(self) -> Any:
        config = super().get_build_config()
        return config and {**config, _MARK: NUM_EXTRA_COLUMNS}

    def build_from_config(self, config: dict[str, Any]) -> None:
        config = dict(config)
        if config.pop(_MARK, None) is None:
            config = _with_all_columns(config, self.scores_shape_names)
        super().build_from_config(config)


def _with_all_columns(config, names):
    """A build configuration of 0.1.0 for packed scores of today."""
    more = NUM_EXTRA_COLUMNS - OLD_EXTRA_COLUMNS
    changed = {}
    for key, value in config.items():
        if isinstance(value, dict):
            value = _with_all_columns(value, names)
        elif key in names and value and value[-1] is not None:
            value = [*value[:-1], value[-1] + more]
        changed[key] = value
    return changed
