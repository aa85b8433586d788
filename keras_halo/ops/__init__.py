"""The mathematics, as pure functions of tensors that know no layer."""

from keras_halo.ops import geometry, packing

__all__ = ["geometry", "packing"]
