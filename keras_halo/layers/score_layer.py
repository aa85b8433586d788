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

    Packed scores do not survive a cast to 16 bits: those that come in 16 bits
    are refused. Of the dictionary that a model of
    `keras_halo.fit_class_gaussians` emits, a layer that does not read the
    fitted score gets the packed scores.

    Files of keras_halo 0.1.0 say that the layer was built for packed scores
    with two columns fewer. They are built for what their head emits now.

    Args:
        **kwargs: Base layer keyword arguments.
    """

    # The names under which Keras may keep the shape of packed scores.
    _SHAPES = ("input_shape", "scores_shape")

    # The place of packed scores among the arguments of a call.
    _SCORES_AT = 0

    @property
    def reads_fitted_score(self) -> bool:
        """Whether the layer is called on the dictionary of a fitted model."""
        return False

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        scores = kwargs.get("scores")
        place = self._SCORES_AT
        if scores is None and len(args) > place:
            scores = args[place]
        if isinstance(scores, Mapping) and not self.reads_fitted_score:
            scores = read_model_output(scores).scores
            if "scores" in kwargs:
                kwargs["scores"] = scores
            else:
                args = (*args[:place], scores, *args[place + 1 :])
        for tensor in keras.tree.flatten(scores):
            if hasattr(tensor, "dtype"):
                check_precision(tensor.dtype)
        return super().__call__(*args, **kwargs)

    def get_build_config(self) -> Any:
        config = super().get_build_config()
        return config and {**config, _MARK: NUM_EXTRA_COLUMNS}

    def build_from_config(self, config: dict[str, Any]) -> None:
        config = dict(config)
        if config.pop(_MARK, None) is None:
            config = _with_all_columns(config, self._SHAPES)
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
