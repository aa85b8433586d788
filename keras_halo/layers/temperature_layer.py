from typing import Any, Self

import numpy as np
from keras import ops

from keras_halo.layers.precise_layer import PreciseLayer
from keras_halo.ops import geometry
from keras_halo.utils.checks import as_boolean, as_number
from keras_halo.utils.precision import exact_constant
from keras_halo.utils.types import Tensor

# What marks weights whose `raw_gamma` is zero at the start of training.
_MARK = "raw_gamma_origin"


class TemperatureLayer(PreciseLayer):
    """Base of the layers that own the inverse temperature of the distances.

    The weight is kept relative to where training starts: at zero the inverse
    temperature is `geometry.initial_temperature`. So weight decay pulls it
    towards its start and not towards one that depends on nothing.

    Layers of keras_halo 0.1.0 kept the weight as it is. They load as they were:
    their configuration lacks `"version"`, their weights lack a mark.

    Formula:

    ```python
    gamma = softplus(raw_gamma + inverse_softplus(initial_temperature(D)))
    ```

    Args:
        learn_gamma: Boolean, whether the inverse temperature is trained.
        **kwargs: Base layer keyword arguments.
    """

    VERSION = 2

    def __init__(self, learn_gamma: bool = True, **kwargs: Any) -> None:
        learn_gamma = as_boolean(learn_gamma, "learn_gamma")
        super().__init__(**kwargs)
        self.learn_gamma = learn_gamma
        self.layout_version = self.VERSION
        self.gamma_origin = 0.0

    @property
    def temperature(self) -> Tensor:
        """Scalar tensor, the current inverse temperature `gamma`."""
        raw_gamma = ops.convert_to_tensor(self.raw_gamma, self.head_dtype)
        return geometry.to_temperature(raw_gamma + self.gamma_origin)

    def assign_temperature(self, value: float) -> None:
        """Sets the inverse temperature.

        Args:
            value: Positive float.
        """
        value = as_number(
            value, "value", lambda v: 0.0 < v < np.inf, "positive and finite"
        )
        raw_gamma = geometry.inverse_softplus(value)
        self.raw_gamma.assign(raw_gamma - self.gamma_origin)

    def _add_temperature(self, embedding_dim):
        start = geometry.inverse_softplus(
            geometry.initial_temperature(embedding_dim)
        )
        if self.layout_version > 1:
            self.gamma_origin = start
        self.raw_gamma = self._add_head_weight(
            name="raw_gamma",
            shape=(),
            initializer=exact_constant(start - self.gamma_origin),
            trainable=self.learn_gamma,
        )

    def _add_head_weight(self, **kwargs):
        return self.add_weight(dtype=self.head_dtype, autocast=False, **kwargs)

    def save_own_variables(self, store: Any) -> None:
        super().save_own_variables(store)
        if self.gamma_origin:
            store[_MARK] = np.array(self.gamma_origin)

    def load_own_variables(self, store: Any) -> None:
        # What Keras passes need not be a dictionary.
        keys = list(store.keys())
        values = {key: store[key] for key in keys if key != _MARK}
        is_old = len(values) == len(keys)
        origin = 0.0 if is_old else float(np.array(store[_MARK]))
        self._check_number_of_weights(values, is_old)
        super().load_own_variables(values)
        if origin != self.gamma_origin:
            raw_gamma = np.float64(ops.convert_to_numpy(self.raw_gamma))
            self.raw_gamma.assign(raw_gamma + (origin - self.gamma_origin))

    def _check_number_of_weights(self, values, are_old):
        """Names the cure where the weights are those of another layer."""

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "learn_gamma": self.learn_gamma,
            "version": self.layout_version,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        config = dict(config)
        version = config.pop("version", 1)
        if version not in range(1, cls.VERSION + 1):
            raise ValueError(
                f"This keras_halo reads `{cls.__name__}` up to version "
                f"{cls.VERSION}. Received: version={version!r}. Install a "
                "newer keras-halo if a later one saved the layer."
            )
        if version == 1:
            config = cls._config_of_version_1(config)
        layer = super().from_config(config)
        layer.layout_version = version
        return layer

    @classmethod
    def _config_of_version_1(cls, config):
        return config
