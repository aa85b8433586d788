"""The loss of integer labels in blocks of classes, for very many classes.

The same numbers as `keras_halo.ops.fused.integer_label_losses`, from arrays of
`block_size` columns: beside the scores and their gradient no array of the size
of the scores is made. The loop over the blocks is a loop of the graph: were it
unrolled, XLA would work on many blocks at a time and hold them all.
"""

import math

import keras
from keras import ops

from keras_halo.ops import geometry, packing
from keras_halo.ops.fused import (
    abstain_slope,
    at_labels,
    is_known,
    plain_losses,
    plus_at_labels,
    radial_losses,
    radial_slopes,
    safe_indices,
    sum_columns,
    training_bias,
)
from keras_halo.ops.gradients import with_gradient

# Tensors of PyTorch can be written into.
_WRITES = keras.backend.backend() == "torch"

# PyTorch makes an array for every operation. Beyond this many numbers most of
# its time goes into the memory pages of these arrays, while small ones are
# used again and stay in the cache.
_LARGE, _SMALL = 2**21, 2**18

# Where there are so many rows that a small block has hardly any classes, a loop
# over strided columns takes longer than it saves. Blocks are wider there, and
# serve arrays of 32 MiB and more, which malloc gives back each time.
_NARROWEST, _HUGE = 32, 2**23


def best_block_size(scores):
    """Classes in a block where nothing is asked for: an integer, or `None`.

    XLA makes one loop of the unblocked loss and needs no blocks. On an
    accelerator each of them is as many kernels to launch.

    Args:
        scores: Packed scores, a tensor of shape `(..., K + 6)`.
    """
    if not _WRITES or scores.device.type != "cpu":
        return None
    size = math.prod(scores.shape)
    block_size = _SMALL // max(math.prod(scores.shape[:-1]), 1)
    if block_size < _NARROWEST:
        return _NARROWEST if size >= _HUGE else None
    return block_size if size >= _LARGE else None


def integer_label_losses(
    labels, scores, label_smoothing, distill, radial_weight, block_size
):
    """The HALO loss of integer labels, a block of classes at a time.

    Args:
        labels: Tensor `y` of shape `(...)`, of an integer dtype or integers in
            floating point.
        scores: Packed scores, a tensor of shape `(..., K + 6)`.
        label_smoothing: Float in `[0, 1)`.
        distill: Boolean, distilled or plain soft targets.
        radial_weight: Non-negative float.
        block_size: Positive integer, the number of classes in a block.

    Returns:
        Tensor of shape `(...)`; NaN, with a gradient of zero, where a label is
        not in `[0, K)` or a row does not hold packed scores.

    Raises:
        ValueError: If the number of columns is not known.

    Example:

    >>> scores = packing.pack(
    ...     ops.array([[0.0, 0.0]]), 0.0, ops.array([[0.0]]), 1.0, 2
    ... )
    >>> loss = integer_label_losses(ops.array([1]), scores, 0.0, True, 0.0, 1)
    >>> round(float(loss[0]), 4)
    1.0986
    """
    if scores.shape[-1] is None:
        raise ValueError(
            "`block_size` needs packed scores with a known number of columns. "
            f"Received: shape={tuple(scores.shape)}. Leave `block_size` out, "
            "or name the columns in the `input_signature`."
        )
    shape = ops.shape(labels)
    scores = ops.reshape(scores, (-1, scores.shape[-1]))
    num_classes = packing.count_classes(scores.shape)
    labels, in_range = safe_indices(ops.reshape(labels, (-1,)), num_classes)
    batch = ops.shape(scores)[0]

    def over_blocks(step, carry):
        """`carry = step(start, size, carry)` for one block after the other."""
        count, rest = divmod(num_classes, block_size)
        if count:
            carry = ops.fori_loop(
                0,
                count,
                lambda i, carry: step(i * block_size, block_size, carry),
                carry,
            )
        return step(count * block_size, rest, carry) if rest else carry

    def nearness(parts, logits):
        return geometry.class_nearness(
            logits, parts.squared_norm, parts.temperature, label_smoothing
        )

    def bias_of(parts):
        return training_bias(parts, label_smoothing, num_classes)

    def sums_of(scores, parts, own, with_gaps=True):
        """What the classes contribute: `log Z`, target mass and gaps."""

        def add_block(start, size, carry):
            normalizer, total, gaps = carry
            logits = ops.slice(scores, (0, start), (batch, size))
            # Not `ops.logaddexp`, which rounds float64 to float32.
            normalizer = normalizer + ops.softplus(
                ops.logsumexp(logits, axis=(-1,), keepdims=True) - normalizer
            )
            near = 1.0
            if label_smoothing and distill:
                near = nearness(parts, logits)
                total = total + sum_columns(near)
            if label_smoothing and with_gaps:
                gaps = gaps + sum_columns((own - logits) * near)
            return normalizer, total, gaps

        nothing = ops.zeros_like(own)
        normalizer, total, gaps = over_blocks(
            add_block, (bias_of(parts), nothing, nothing)
        )
        if label_smoothing and distill:
            total = 1.0 + (total - nearness(parts, own))
        return normalizer, total, gaps

    def forward(scores, labels, in_range):
        parts = packing.unpack(scores)
        own = at_labels(parts.logits, labels)
        normalizer, total, gaps = sums_of(scores, parts, own)
        losses = normalizer - own
        if label_smoothing and distill:
            losses += gaps / total
        elif label_smoothing:
            losses += gaps * (label_smoothing / num_classes)
        if radial_weight:
            losses += radial_losses(parts, own) * radial_weight
        losses = ops.where(is_known(parts, in_range), losses, float("nan"))
        return ops.squeeze(losses, axis=-1)

    def backward(inputs, upstream):
        scores, labels, in_range = inputs
        parts = packing.unpack(scores)
        upstream = ops.where(
            is_known(parts, in_range), ops.expand_dims(upstream, axis=-1), 0.0
        )
        own = at_labels(parts.logits, labels)
        normalizer, total, _ = sums_of(scores, parts, own, with_gaps=False)
        if label_smoothing and distill:
            # Targets are constants, also to a second derivative.
            target = ops.stop_gradient(1.0 / total)
            itself = ops.stop_gradient(nearness(parts, own))
            own_slope = upstream * (target * (itself - 1.0))
        else:
            own_slope = upstream * (label_smoothing - 1.0)
        radial_slope, norm_slope, gamma_slope = radial_slopes(
            parts, own, upstream * radial_weight
        )
        own_slope = own_slope + radial_slope

        def fill_block(start, size, gradient):
            logits = ops.slice(scores, (0, start), (batch, size))
            slopes = ops.exp(logits - normalizer)
            if label_smoothing and distill:
                near = ops.stop_gradient(nearness(parts, logits))
                slopes = slopes - near * target
            elif label_smoothing:
                slopes = slopes - label_smoothing / num_classes
            slopes = slopes * upstream
            if not _WRITES:
                slopes = plus_at_labels(slopes, labels, own_slope, start)
            return _with_columns(gradient, start, slopes)

        gradient = over_blocks(fill_block, ops.zeros_like(scores))
        if _WRITES:
            gradient = plus_at_labels(gradient, labels, own_slope)
        rest = packing.pack_gradient(
            logits=parts.logits[:, :0],
            abstain_logit=abstain_slope(parts, normalizer, 0.0) * upstream,
            squared_norm=norm_slope,
            temperature=gamma_slope,
        )
        return _with_columns(gradient, num_classes, rest), None, None

    def plain(scores, labels, in_range):
        return plain_losses(
            labels, in_range, scores, label_smoothing, distill, radial_weight
        )

    losses = with_gradient(forward, backward, plain)(scores, labels, in_range)
    return ops.reshape(losses, shape)


def _with_columns(matrix, start, columns):
    """`matrix` with some of its columns replaced; may write into it."""
    if _WRITES:
        # `ops.slice_update` would copy the whole matrix.
        matrix[:, start : start + columns.shape[-1]] = columns
        return matrix
    if keras.backend.backend() == "tensorflow":
        return _updated(matrix, columns, ops.cast(start, "int32"))
    return ops.slice_update(matrix, (0, start), columns)


# TensorFlow knows no gradient of its update.
_updated = with_gradient(
    lambda matrix, columns, start: ops.slice_update(
        matrix, (0, start), columns
    ),
    lambda inputs, upstream: (
        _updated(upstream, ops.zeros_like(inputs[1]), inputs[2]),
        ops.slice(upstream, (0, inputs[2]), ops.shape(inputs[1])),
        None,
    ),
    lambda matrix, columns, start: ops.slice_update(
        matrix, (0, start), columns
    ),
)
