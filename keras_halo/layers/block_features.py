import math
from typing import Any, Self

import keras
import numpy as np
from keras import ops

from keras_halo.layers.precise_layer import PreciseLayer
from keras_halo.ops import geometry, tensors
from keras_halo.utils.checks import as_boolean, check_floating
from keras_halo.utils.shapes import axis_length
from keras_halo.utils.types import Shape, Tensor

# Squared lengths below this count as it: the logarithm of zero has no value,
# and its slope nearby no bound.
MIN_SQUARED_LENGTH = 1e-24


def pooled(maps, mask=None, spatial_moments=False):
    """Averages a feature map over its positions, with moments if asked for.

    Formula:

    ```python
    mean(x)                                   # over all positions
    mean(x * sqrt(2) * cos(pi * position_a))  # spatial moment, for each axis a
    ```

    with `position_a = (i + 1 / 2) / n` for the `i`-th of `n` positions along
    an axis. Each of these is the mean over positions of `x` times a wave whose
    mean square is one. A positive one says that a feature sits rather at the
    beginning of the axis, a negative one at its end.

    Args:
        maps: Tensor of shape `(B, ..., C)` with at least one axis of
            positions.
        mask: Boolean tensor of shape `(B, T)` for `T` positions along the
            first axis; masked ones are left out, and the others counted
            without them. Defaults to `None`, all positions.
        spatial_moments: Boolean, whether the moments along the axes of
            positions are added. An axis with one position has none. Defaults
            to `False`.

    Returns:
        Tensor of shape `(B, C * (1 + moments))`.

    Example:

    >>> x = ops.array([[[1.0], [0.0], [0.0]]])
    >>> ops.convert_to_numpy(pooled(x, spatial_moments=True)).round(3)
    array([[0.333, 0.408]], dtype=float32)
    """
    axes = tuple(range(1, len(maps.shape) - 1))
    count = math.prod(axis_length(maps, axis) for axis in axes)
    kept = None
    if mask is not None:
        kept = ops.cast(mask, maps.dtype)
        kept = ops.reshape(kept, (*ops.shape(kept), *[1] * len(axes)))
        share = ops.reshape(ops.sum(kept, axis=1), (-1, 1))
        # A sample without any position sums to zero, whatever it is over.
        share = tensors.bounded(share, 1.0, math.inf)
        count = share * (count / axis_length(maps, 1))
        maps = maps * kept
    waves = [None]
    if spatial_moments:
        waves += [
            _wave(maps, axis, kept if axis == 1 else None)
            for axis in axes
            if maps.shape[axis] != 1
        ]
    parts = [
        ops.sum(maps if wave is None else maps * wave, axis=axes) / count
        for wave in waves
    ]
    return ops.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]


def _wave(maps, axis, kept):
    """Half a period of a cosine along an axis, that broadcasts to maps."""
    length = maps.shape[axis]
    ones = [1] * (len(maps.shape) - axis - 1)
    if kept is not None:
        # Counts are exact in float32, which PyTorch gets whatever comes in.
        index = ops.cast(ops.cumsum(kept, axis=axis), maps.dtype) - 0.5
        length = ops.sum(kept, axis=axis, keepdims=True)
        length = tensors.bounded(length, 1.0, math.inf)
        wave = _cosine(index * (math.pi / length))
    elif length is None:
        index = ops.arange(ops.shape(maps)[axis], dtype=maps.dtype) + 0.5
        wave = _cosine(index * (math.pi / axis_length(maps, axis)))
        wave = ops.reshape(wave, (-1, *ones))
    else:
        wave = np.cos(np.pi * (np.arange(length) + 0.5) / length)
        wave = ops.convert_to_tensor(wave.reshape(-1, *ones), maps.dtype)
    return wave * math.sqrt(2.0)


def _cosine(angles):
    """Cosine of angles between zero and pi, in the precision that they have."""
    if keras.backend.standardize_dtype(angles.dtype) != "float64":
        return ops.cos(angles)
    # JAX would round it to float32: so a Taylor series around the middle.
    x = angles - 0.5 * math.pi
    total = term = -x
    for n in range(3, 27, 2):
        term = term * (x * x) / -(n * (n - 1))
        total = total + term
    return total


def direction_and_length(vectors):
    """Vectors with components near one, and the logarithm of their length.

    Formula:

    ```python
    length = sqrt(max(sum(x ** 2), 1e-24))
    x / length * sqrt(F), log(length)
    ```

    Args:
        vectors: Tensor `x` of shape `(B, F)`.

    Returns:
        Tuple of tensors of shapes `(B, F)` and `(B, 1)`.

    Example:

    >>> direction, length = direction_and_length(ops.array([[3.0, 4.0]]))
    >>> ops.convert_to_numpy(direction).round(3)
    array([[0.849, 1.131]], dtype=float32)
    >>> round(float(length[0, 0]), 3)
    1.609
    """
    squares = ops.sum(vectors * vectors, axis=-1, keepdims=True)
    squares = tensors.bounded(squares, MIN_SQUARED_LENGTH, math.inf)
    scale = math.sqrt(vectors.shape[-1]) / ops.sqrt(squares)
    return vectors * scale, 0.5 * ops.log(squares)


@keras.saving.register_keras_serializable(package="keras_halo")
class BlockFeatures(PreciseLayer):
    """What several layers of a network say, direction and length of each.

    The last features of a classifier keep what tells its classes apart and
    drop much of what tells that an input is none of them. Earlier blocks still
    have it. This layer joins them for a head: feature maps are averaged over
    their positions, the last of them also says where in it each feature sits,
    and every block is scaled to one length, so that blocks compare. How long it
    was, which says how much of anything an input has, is kept as a logarithm.

    Put a `Dense` and `keras_halo.convert_head` on it, once a network is
    trained, and train that head alone for a few epochs. The layer has no
    weights.

    Formula:

    ```python
    v_i = [mean(x_i), mean(x_i * sqrt(2) * cos(pi * position_a)) ...]
    outputs = [v_1 / |v_1| * sqrt(F_1), ..., log|v_1|, ...]
    ```

    with Euclidean lengths, the spatial moments, those with `position_a` (one
    for each axis of positions, at the middle of each position, between 0 and
    1), only for the last feature map, and `v_i = x_i` where an input has no
    positions.

    Args:
        spatial_moments: Boolean, whether the last of the inputs that have
            positions is also described by its spatial moments, which say
            where in it each feature sits. Defaults to `True`.
        data_format: String, `"channels_last"` or `"channels_first"`, as in
            `keras.layers.GlobalAveragePooling2D`. Defaults to
            `keras.config.image_data_format()`.
        **kwargs: Base layer keyword arguments, such as `name` and `dtype`.

    Call arguments:
        inputs: Tensor, or list of tensors: feature maps of shape
            `(batch_size, ..., channels)` with any number of axes of positions,
            such as images and sequences, and vectors of shape
            `(batch_size, features)`.
        mask: Mask of a sequence, or list of masks, of shape
            `(batch_size, steps)`. Masked steps are left out.

    Output shape:
        `(batch_size, F)`: the channels of all inputs, those of the last map
        again for each of its axes longer than one, and one for each input.
        float32 whatever the dtype policy, float64 under a float64 policy.

    Raises:
        ValueError: If an input has no known number of channels, no axis beside
            the batch, or is not in floating point.

    Example:

    >>> inputs = keras.Input((8, 8, 1))
    >>> early = keras.layers.Conv2D(4, 3, activation="relu")(inputs)
    >>> late = keras.layers.Conv2D(6, 3, activation="relu")(early)
    >>> keras_halo.layers.BlockFeatures()([early, late]).shape
    (None, 24)

    References:

    - Kimin Lee, Kibok Lee, Honglak Lee, Jinwoo Shin, A Simple Unified
      Framework for Detecting Out-of-Distribution Samples and Adversarial
      Attacks, 2018. (Features of all layers.)
    - Maximilian Mueller, Matthias Hein, Mahalanobis++: Improving OOD Detection
      via Feature Normalization, 2025. (Features of one length.)
    """

    def __init__(
        self,
        spatial_moments: bool = True,
        data_format: str | None = None,
        **kwargs: Any,
    ) -> None:
        if data_format is None:
            data_format = keras.config.image_data_format()
        if data_format not in ("channels_last", "channels_first"):
            raise ValueError(
                '`data_format` must be "channels_last" or "channels_first". '
                f"Received: data_format={data_format!r}."
            )
        spatial_moments = as_boolean(spatial_moments, "spatial_moments")
        super().__init__(**kwargs)
        self.spatial_moments = spatial_moments
        self.data_format = data_format
        self.supports_masking = True

    def build(self, input_shape: Shape) -> None:
        self._check_shapes(input_shape)
        specs = [
            keras.layers.InputSpec(
                ndim=len(shape),
                axes={self._channel_axis(shape): self._channels(shape)},
            )
            for shape in _as_list(input_shape)
        ]
        self.input_spec = specs if _is_list(input_shape) else specs[0]
        self.built = True

    def call(self, inputs: Tensor, mask: Tensor = None) -> Tensor:
        shapes = [x.shape for x in _as_list(inputs)]
        if mask is None or not isinstance(mask, (list, tuple)):
            mask = [mask] * len(shapes)
        parts = [
            self._read(x, m, i == self._placed(shapes))
            for i, (x, m) in enumerate(zip(_as_list(inputs), mask, strict=True))
        ]
        directions, lengths = zip(*parts, strict=True)
        return ops.concatenate([*directions, *lengths], axis=-1)

    def _read(self, x, mask, spatial_moments):
        check_floating(x.dtype, self)
        # Saturated, so that no sum of squares overflows.
        x = tensors.bounded(
            ops.cast(x, self.head_dtype),
            -geometry.MAX_COMPONENT,
            geometry.MAX_COMPONENT,
        )
        if len(x.shape) > 2:
            x = ops.moveaxis(x, self._channel_axis(x.shape), -1)
            x = pooled(x, mask, spatial_moments)
        return direction_and_length(x)

    def compute_mask(self, inputs: Tensor, mask: Tensor = None) -> Tensor:
        # The axis that was masked is gone.
        return None

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        self._check_shapes(input_shape)
        shapes = _as_list(input_shape)
        width = len(shapes)
        for i, shape in enumerate(shapes):
            copies = 1
            if i == self._placed(shapes):
                axes = set(range(1, len(shape))) - {self._channel_axis(shape)}
                copies += sum(shape[axis] != 1 for axis in axes)
            width += copies * self._channels(shape)
        return (shapes[0][0], width)

    def compute_output_spec(self, inputs: Tensor, mask: Tensor = None) -> Any:
        for x in _as_list(inputs):
            check_floating(x.dtype, self)
        shapes = [tuple(x.shape) for x in _as_list(inputs)]
        return keras.KerasTensor(
            self.compute_output_shape(shapes), dtype=self.head_dtype
        )

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "spatial_moments": self.spatial_moments,
            "data_format": self.data_format,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        config = dict(config)
        if "places" in config:
            # Files from when the argument had this name.
            config["spatial_moments"] = config.pop("places")
        return super().from_config(config)

    def _placed(self, shapes):
        """The rank of the input that says where; `None` if none does."""
        maps = [i for i, shape in enumerate(shapes) if len(shape) > 2]
        return maps[-1] if maps and self.spatial_moments else None

    def _channel_axis(self, shape):
        first = self.data_format == "channels_first" and len(shape) > 2
        return 1 if first else len(shape) - 1

    def _channels(self, shape):
        return shape[self._channel_axis(shape)]

    def _check_shapes(self, input_shape):
        if not _as_list(input_shape):
            raise ValueError(
                "`BlockFeatures` takes a tensor or a list of tensors. "
                "Received: an empty list."
            )
        for shape in _as_list(input_shape):
            if len(shape) < 2 or self._channels(shape) is None:
                raise ValueError(
                    "`BlockFeatures` takes feature maps of shape "
                    "`(batch_size, ..., channels)` and vectors of shape "
                    "`(batch_size, features)` whose channels are known. "
                    f"Received: a shape {tuple(shape)} with "
                    f'data_format="{self.data_format}".'
                )


def _is_list(inputs):
    """Whether there are several tensors, or shapes, and not one."""
    if not isinstance(inputs, (list, tuple)):
        return False
    return not inputs or not isinstance(inputs[0], (int, type(None)))


def _as_list(inputs):
    return list(inputs) if _is_list(inputs) else [inputs]
