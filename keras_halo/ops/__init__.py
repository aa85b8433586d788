"""The mathematics, as pure functions of tensors that know no layer."""

from keras_halo.ops import geometry, packing, targets
from keras_halo.ops.gradients import plain_gradients

__all__ = ["geometry", "packing", "plain_gradients", "targets"]
