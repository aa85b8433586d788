"""The loss as one operation, with a gradient derived by hand.

Integer labels at once, in blocks of classes, and distributions over the
classes. The gradient is `p - q`, as for cross-entropy, and a function of the
inputs alone: second derivatives follow by automatic differentiation.

In blocks, beside the scores and their gradient no array of the size of the
scores is made. The loop over the blocks is a loop of the graph: were it
unrolled, XLA would work on many blocks at a time and hold them all. At once is
not a single block: on JAX that takes about three times as long.
"""

import collections
import math
from typing import NamedTuple

from keras import ops

from keras_halo.ops import geometry, packing, tensors
from keras_halo.ops.gradients import with_gradient
from keras_halo.ops.labels import are_distributions, safe_indices
from keras_halo.ops.targets import (
    class_nearness,
    distilled_targets,
    smoothed_targets,
)
from keras_halo.ops.tensors import (
    at_labels,
    class_indices,
    plus_at_labels,
    sum_columns,
)
from keras_halo.utils.shapes import axis_length

# PyTorch makes an array for every operation. Beyond this many numbers most of
# its time goes into the memory pages of these arrays, while small ones are
# used again and stay in the cache.
_LARGE, _SMALL = 2**21, 2**18

# Where there are so many rows that a small block has hardly any classes, a loop
# over strided columns takes longer than it saves. Blocks are wider there, and
# serve arrays of 32 MiB and more, which malloc gives back each time.
_NARROWEST, _HUGE = 32, 2**23


class _Terms(NamedTuple):
    """What the loss is made of."""

    label_smoothing: float
    distill: bool
    radial_weight: float
    num_classes: object  # An integer, or a scalar tensor.

    def training_bias(self, parts):
        return training_bias(parts, self.label_smoothing, self.num_classes)

    def known(self, parts, in_range):
        """Where a loss can be told: labels in range, scores of a head of it."""
        is_packed = parts.embedding_dim >= 2.0
        fits = parts.may_train_with(self.label_smoothing)
        return is_packed & fits & in_range

    def nearness(self, parts, logits):
        return class_nearness(
            logits, parts.squared_norm, parts.temperature, self.label_smoothing
        )

    def targets(self, labels, parts):
        if not self.distill:
            return smoothed_targets(labels, self.label_smoothing)
        return distilled_targets(
            labels,
            parts.logits,
            parts.squared_norm,
            parts.temperature,
            self.label_smoothing,
        )


def best_block_size(scores):
    """Classes in a block where nothing is asked for: an integer, or `None`.

    XLA makes one loop of the unblocked loss and needs no blocks. On an
    accelerator each of them is as many kernels to launch.

    Args:
        scores: Packed scores, a tensor of shape `(..., packed_width)`.
    """
    if not tensors.WRITES or scores.device.type != "cpu":
        return None
    size = math.prod(scores.shape)
    block_size = _SMALL // max(math.prod(scores.shape[:-1]), 1)
    if block_size < _NARROWEST:
        return _NARROWEST if size >= _HUGE else None
    return block_size if size >= _LARGE else None


def integer_label_losses(
    labels, scores, label_smoothing, distill, radial_weight, block_size=None
):
    """The HALO loss of integer labels, sample by sample.

    The targets `q` are those of `distilled_targets` or of `smoothed_targets`;
    they are never formed in the forward pass:

    Formula:

    ```python
    cross_entropy = logsumexp([s | b]) - s_y + sum_k q_k * (s_y - s_k)
    loss = cross_entropy + radial_weight * R(r_y^2)
    ```

    Args:
        labels: Tensor `y` of shape `(...)`, of an integer dtype or integers in
            floating point.
        scores: Packed scores, a tensor of shape `(..., packed_width)`.
        label_smoothing: Float in `[0, 1)`.
        distill: Boolean, distilled or plain soft targets.
        radial_weight: Non-negative float.
        block_size: Positive integer, the number of classes in a block, or
            `None` for what is fastest.

    Returns:
        Tensor of shape `(...)`; NaN, with a gradient of zero, where a label is
        not in `[0, K)` or a row does not hold packed scores, or those of a head
        with another label smoothing.

    Raises:
        ValueError: If `block_size` is given and the number of columns is not
            known.

    Example:

    >>> scores = packing.pack(
    ...     ops.array([[0.0, 0.0]]), 0.0, ops.array([[0.0]]), 1.0, 2
    ... )
    >>> loss = integer_label_losses(ops.array([1]), scores, 0.0, True, 0.0)
    >>> round(float(loss[0]), 4)
    1.0986
    """
    if block_size is None:
        block_size = best_block_size(scores)
    elif scores.shape[-1] is None:
        raise ValueError(
            "`block_size` needs packed scores with a known number of columns. "
            f"Received: shape={tuple(scores.shape)}. Leave `block_size` out, "
            "or name the columns in the `input_signature`."
        )
    num_classes = packing.count_classes(scores)
    shape = None
    if len(scores.shape) != 2:
        shape = ops.shape(labels)
        labels = ops.reshape(labels, (-1,))
        scores = ops.reshape(scores, (-1, ops.shape(scores)[-1]))
    labels, in_range = safe_indices(labels, num_classes)
    terms = _Terms(label_smoothing, distill, radial_weight, num_classes)
    if block_size is None:
        read, slopes_of = _at_once(terms)
    else:
        read, slopes_of = _in_blocks(terms, block_size)

    def losses(scores, labels, in_range):
        return _losses_of(read(scores, labels, in_range), terms)

    def gradient(inputs, upstream):
        reading = read(*inputs, with_gaps=False)
        return slopes_of(reading, upstream), None, None

    def both(scores, labels, in_range):
        reading = read(scores, labels, in_range)

        def gradient_of_it(upstream):
            return slopes_of(reading, upstream), None, None

        return _losses_of(reading, terms), gradient_of_it

    def plain(scores, labels, in_range):
        return _plain_losses(labels, in_range, scores, terms)

    found = with_gradient(losses, gradient, plain, both)(
        scores, labels, in_range
    )
    return found if shape is None else ops.reshape(found, shape)


_Reading = collections.namedtuple(
    "_Reading",
    [
        "scores",
        "labels",
        "parts",
        "known",
        "own",
        "top",
        "log_total",
        "masses",
        "near",
        "itself",
        "target_total",
        "gaps",
    ],
)
_Reading.__doc__ = """What the losses and their gradient have in common.

Args:
    scores: Packed scores of shape `(N, packed_width)`.
    labels: Integers of shape `(N, 1)`.
    parts: `PackedScores` of them.
    known: Boolean, where a loss can be told. This and all that follow but
        `masses` and `near` are of shape `(N, 1)`.
    own: Logits at the labels.
    top: With `log_total` the logarithm of what softmax divides by, in two
        parts: see `normalizer`.
    log_total: The other part.
    masses: `exp(s - top)` of shape `(N, K)`; `None` in blocks.
    near: With distilled targets the mass near each class, of shape `(N, K)`;
        `None` in blocks.
    itself: With distilled targets the mass near the label.
    target_total: With distilled targets what divides these masses.
    gaps: With soft targets `sum_k near_k * (own - s_k)`, where plain targets
        have one for `near_k`. `None` where it is not asked for.
"""


def _losses_of(reading, terms):
    losses = (reading.top - reading.own) + reading.log_total
    if terms.label_smoothing and terms.distill:
        losses += reading.gaps / reading.target_total
    elif terms.label_smoothing:
        losses += reading.gaps * (terms.label_smoothing / terms.num_classes)
    if terms.radial_weight:
        radial = radial_losses(reading.parts, reading.own)
        losses += radial * terms.radial_weight
    losses = ops.where(reading.known, losses, float("nan"))
    # Not squeezed, which needs a known number of classes.
    return losses[..., 0]


def _slopes_but_of_classes(reading, upstream, terms):
    """What the gradient of the class columns and of the others is made of.

    Args:
        reading: `_Reading`.
        upstream: Gradient of the losses, of shape `(N,)`.
        terms: `_Terms`.

    Returns:
        Tuple of tensors of shape `(N, 1)`: `upstream`, zero where no loss can
        be told; `1 / target_total`, or `None` without distilled targets; what
        the logit at the label gets beside `p - q` of other classes; and a
        dictionary of the slopes of the other columns, for `pack_gradient`.
    """
    parts = reading.parts
    upstream = ops.where(reading.known, ops.expand_dims(upstream, axis=-1), 0.0)
    target = None
    if terms.label_smoothing and terms.distill:
        # Targets are constants, also to a second derivative.
        target = ops.stop_gradient(1.0 / reading.target_total)
        itself = ops.stop_gradient(reading.itself)
        own_slope = upstream * (target * (itself - 1.0))
    else:
        own_slope = upstream * (terms.label_smoothing - 1.0)
    radial_slope, norm_slope, gamma_slope = radial_slopes(
        parts, reading.own, upstream * terms.radial_weight
    )
    of_bias = abstain_slope(parts, reading.top, reading.log_total)
    others = {
        "abstain_logit": of_bias * upstream,
        "squared_norm": norm_slope,
        "temperature": gamma_slope,
    }
    return upstream, target, own_slope + radial_slope, others


def _at_once(terms):
    """The loss of all classes at once, and its gradient.

    Returns:
        Tuple of two functions: one makes a `_Reading` of packed scores, labels
        and where these are in range; the other makes the gradient of it and of
        what comes from upstream, and may write into it.
    """
    label_smoothing, distill, _, num_classes = terms

    def read(scores, labels, in_range, with_gaps=True):
        parts = packing.unpack(scores)
        own = at_labels(parts.logits, labels)
        near = itself = total = gaps = None
        if label_smoothing and distill:
            near = terms.nearness(parts, parts.logits)
            itself = at_labels(near, labels)
            total = 1.0 + (sum_columns(near) - itself)
        if label_smoothing and with_gaps:
            gaps = own - parts.logits
            if distill:
                gaps *= near
            gaps = sum_columns(gaps)
        top, log_total, masses = normalizer(
            parts.logits, terms.training_bias(parts)
        )
        return _Reading(
            scores=scores,
            labels=labels,
            parts=parts,
            known=terms.known(parts, in_range),
            own=own,
            top=top,
            log_total=log_total,
            masses=masses,
            near=near,
            itself=itself,
            target_total=total,
            gaps=gaps,
        )

    def slopes_of(reading, upstream):
        upstream, target, own_slope, others = _slopes_but_of_classes(
            reading, upstream, terms
        )
        slopes = reading.masses * ops.exp(-reading.log_total)
        if label_smoothing and distill:
            near = ops.stop_gradient(reading.near)
            near *= target
            slopes -= near
        else:
            slopes -= label_smoothing / num_classes
        # Last, when no slope is so small that the product underflows, which
        # some processors take long for.
        slopes *= upstream
        slopes = plus_at_labels(slopes, reading.labels, own_slope)
        return packing.pack_gradient(logits=slopes, **others)

    return read, slopes_of


def _in_blocks(terms, block_size):
    """The loss of a block of classes after the other, and its gradient.

    Returns:
        Tuple of two functions, as those of `_at_once`.
    """
    label_smoothing, distill, _, num_classes = terms

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

    def read(scores, labels, in_range, with_gaps=True):
        parts = packing.unpack(scores)
        own = at_labels(parts.logits, labels)
        batch = ops.shape(scores)[0]

        def add_block(start, size, carry):
            normalizer, total, gaps = carry
            logits = ops.slice(scores, (0, start), (batch, size))
            # Not `ops.logaddexp`, which rounds float64 to float32.
            normalizer = normalizer + ops.softplus(
                ops.logsumexp(logits, axis=(-1,), keepdims=True) - normalizer
            )
            near = 1.0
            if label_smoothing and distill:
                near = terms.nearness(parts, logits)
                total = total + sum_columns(near)
            if label_smoothing and with_gaps:
                gaps = gaps + sum_columns((own - logits) * near)
            return normalizer, total, gaps

        nothing = ops.zeros_like(own)
        normalizer, total, gaps = over_blocks(
            add_block, (terms.training_bias(parts), nothing, nothing)
        )
        itself = None
        if label_smoothing and distill:
            itself = terms.nearness(parts, own)
            total = 1.0 + (total - itself)
        return _Reading(
            scores=scores,
            labels=labels,
            parts=parts,
            known=terms.known(parts, in_range),
            own=own,
            top=normalizer,
            log_total=nothing,
            masses=None,
            near=None,
            itself=itself,
            target_total=total,
            gaps=gaps,
        )

    def slopes_of(reading, upstream):
        upstream, target, own_slope, others = _slopes_but_of_classes(
            reading, upstream, terms
        )
        scores, labels, parts = reading.scores, reading.labels, reading.parts
        batch = ops.shape(scores)[0]

        def fill_block(start, size, gradient):
            logits = ops.slice(scores, (0, start), (batch, size))
            slopes = ops.exp(logits - reading.top)
            if label_smoothing and distill:
                near = ops.stop_gradient(terms.nearness(parts, logits))
                slopes = slopes - near * target
            elif label_smoothing:
                slopes = slopes - label_smoothing / num_classes
            slopes = slopes * upstream
            if not tensors.WRITES:
                slopes = plus_at_labels(slopes, labels, own_slope, start)
            return tensors.with_columns(gradient, start, slopes)

        gradient = over_blocks(fill_block, ops.zeros_like(scores))
        if tensors.WRITES:
            gradient = plus_at_labels(gradient, labels, own_slope)
        rest = packing.pack_gradient(logits=parts.logits[:, :0], **others)
        return tensors.with_columns(gradient, num_classes, rest)

    return read, slopes_of


def distribution_losses(
    labels, scores, label_smoothing, distill, radial_weight
):
    """The HALO loss of distributions over the classes, sample by sample.

    Formula:

    ```python
    cross_entropy = -sum_k q_k * log softmax([s | b])_k
    loss = cross_entropy + radial_weight * sum_k Y_k * R(r_k^2)
    ```

    Args:
        labels: Tensor `Y` of shape `(..., K)`, of the dtype of `scores`.
        scores: Packed scores, a tensor of shape `(..., packed_width)`.
        label_smoothing: Float in `[0, 1)`.
        distill: Boolean, distilled or plain soft targets.
        radial_weight: Non-negative float.

    Returns:
        Tensor of shape `(...)`; NaN where a row is no distribution or does not
        hold packed scores, or those of a head with another label smoothing.

    Example:

    >>> scores = packing.pack(
    ...     ops.array([[0.0, 0.0]]), 0.0, ops.array([[0.0]]), 1.0, 2
    ... )
    >>> labels = ops.array([[0.5, 0.5]])
    >>> loss = distribution_losses(labels, scores, 0.0, True, 0.0)
    >>> round(float(loss[0]), 4)
    1.0986
    """
    parts = packing.unpack(scores)
    num_classes = axis_length(parts.logits, -1)
    terms = _Terms(label_smoothing, distill, radial_weight, num_classes)
    losses = geometry.cross_entropy(
        terms.targets(labels, parts), parts.logits, terms.training_bias(parts)
    )
    if radial_weight:
        radial = radial_losses(parts, parts.logits)
        losses = losses + radial_weight * sum_columns(labels * radial)
    # By an index: where the number of keys is known only when a graph runs, so
    # is, to TensorFlow, the length of a slice.
    known = terms.known(parts, are_distributions(labels))[..., 0]
    return ops.where(known, ops.squeeze(losses, axis=-1), float("nan"))


def _plain_losses(labels, in_range, scores, terms):
    """The losses of integer labels by the formulas, as they stand."""
    parts = packing.unpack(scores)
    one_hot = ops.cast(
        ops.equal(labels, class_indices(terms.num_classes)), scores.dtype
    )
    losses = geometry.cross_entropy(
        terms.targets(one_hot, parts), parts.logits, terms.training_bias(parts)
    )
    if terms.radial_weight:
        own = sum_columns(one_hot * parts.logits)
        losses = losses + radial_losses(parts, own) * terms.radial_weight
    losses = ops.where(terms.known(parts, in_range), losses, float("nan"))
    return losses[..., 0]


def training_bias(parts, label_smoothing, num_classes):
    """The logit of abstaining that a loss trains against, shape `(N, 1)`.

    A head with a far background places its own biases for the decision, which
    follow the evidence. Trained against these, the class probabilities would
    rise with the bar that they have to clear. So the loss keeps to the margin
    of the published method. That of other heads is what they emit.

    Args:
        parts: `PackedScores`.
        label_smoothing: Float in `[0, 1)`.
        num_classes: `K`, an integer or a scalar tensor.

    Returns:
        Tensor of shape `(..., 1)`.
    """
    # `geometry.abstain_bias`, in a form that is finite also where the embedding
    # size is unknown, and zero.
    margin = 40.0 / (parts.embedding_dim + 2.0)
    margin -= geometry.target_log_odds(num_classes, label_smoothing)
    return ops.where(parts.has_far_background, margin, parts.abstain_logit)


def normalizer(logits, bias):
    """What softmax divides by, as the largest logit and a logarithm.

    Apart, because their sum would round away a logarithm near zero.

    Formula:

    ```python
    top = max(s_1, ..., s_K, b)
    log_total = log(exp(b - top) + sum_k exp(s_k - top))
    ```

    Args:
        logits: Tensor `s` of shape `(N, K)`.
        bias: Tensor `b` of shape `(N, 1)`.

    Returns:
        Tuple of two tensors of shape `(N, 1)`, and of `exp(s - top)`.
    """
    top = tensors.max_of_rows(logits)
    top = ops.stop_gradient(ops.where(bias > top, bias, top))
    masses = ops.exp(logits - top)
    total = sum_columns(masses) + ops.exp(bias - top)
    return top, ops.log(total), masses


def abstain_slope(parts, top, log_total):
    """Gradient of the cross-entropy with respect to the abstain column."""
    return ops.where(
        parts.has_far_background,
        0.0,
        ops.exp((parts.abstain_logit - top) - log_total),
    )


def radial_losses(parts, own):
    """The radial term at the labels, whose logits are `own`."""
    radius = geometry.squared_radii(own, parts.squared_norm, parts.temperature)
    return geometry.radial_nll(radius, parts.embedding_dim)


def radial_slopes(parts, own, upstream):
    """Gradients of the radial term: to `own`, `|x|^2` and `gamma`."""
    radius = geometry.squared_radii(own, parts.squared_norm, parts.temperature)
    of_norm = upstream * geometry.radial_slope(radius, parts.embedding_dim)
    of_own = of_norm / -parts.temperature
    return of_own, of_norm, of_own * (own / -parts.temperature)
