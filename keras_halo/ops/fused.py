"""Head and loss as one operation each, with gradients derived by hand.

The formulas are those of `keras_halo.ops.geometry`; what is here computes the
same numbers in as few passes over memory as they need:

- The centring acts on products instead of on the centroids, so that no second
  array of their size is made: `dot(x, c_k) = dot(x, C_k) - dot(x, m)` and
  `dot(c_k, c_k) = dot(C_k, C_k) - 2 * dot(C_k, m) + dot(m, m)`, with `C` the
  raw centroids and `m` their mean. Rounding is relative to `|C_k|^2` then, and
  not to `|c_k|^2`: a mean a hundred times larger than the spread of the
  centroids would cost four digits. Training does not move it, because the
  gradient of the centroids sums to zero.
- What is added to a product is added to its small operand, or to the product
  in place: on PyTorch a fresh array costs more than the arithmetic in it.
- The gradient of the loss is `p - q`, as for cross-entropy.

Gradients are functions of the inputs alone, and second derivatives follow by
automatic differentiation of the first. What both passes of the head need beside
its inputs (saturated embeddings, mean and norms of the centroids) goes in as
further inputs without gradients: those of the embeddings and of the centroids
account for them.
"""

import functools

import keras
from keras import ops

from keras_halo.ops import geometry, packing
from keras_halo.ops.gradients import with_gradient

_NARROW = ("bool", "int8", "uint8", "int16", "uint16")

# Zero would say that there is no far background.
_MIN_FAR_RADIUS = 1e-3

# Numbers that a block of a matrix may have to stay in the processor's cache.
_BLOCK_SIZE = 2**18


def _mean_row(matrix):
    """The mean of the rows of a matrix, shape `(1, D)`."""
    num_rows = matrix.shape[0]
    if keras.backend.backend() == "torch":
        # Its sum over rows takes twice as long as this product.
        ones = ops.ones((1, num_rows), dtype=matrix.dtype)
        return (ones @ matrix) * (1.0 / num_rows)
    return ops.sum(matrix, axis=0, keepdims=True) * (1.0 / num_rows)


def _squared_norms(matrix):
    """Squared norms of the rows of a matrix, shape `(1, K)`."""
    dtype = keras.backend.standardize_dtype(matrix.dtype)
    if keras.backend.backend() == "torch" and dtype == "float32":
        # The squares would fill a second matrix. In float64 they have to:
        # `ops.norm` would round it to float32.
        norms = ops.norm(matrix, axis=-1)
        return ops.expand_dims(norms * norms, axis=0)
    return ops.expand_dims(ops.sum(matrix * matrix, axis=-1), axis=0)


def _minus_scaled_rows(total, factors, rows, offset):
    """`total - factors * rows - offset`; may write into `total`."""
    if keras.backend.backend() != "torch":
        return total - factors * rows - offset
    # In place and in blocks that stay in the cache: most of the time of a
    # fresh matrix goes into its memory pages.
    block = max(1, _BLOCK_SIZE // rows.shape[-1])
    for start in range(0, rows.shape[0], block):
        stop = start + block
        scaled = factors[start:stop] * rows[start:stop]
        scaled += offset
        total[start:stop] -= scaled
    return total


def packed_scores(embeddings, centroids, temperature, abstain_bias):
    """Packed scores of embeddings around raw centroids.

    Formula:

    ```python
    c = centroids - mean(centroids, axis=0)
    s = gamma * (2 * dot(x, c) / D - |c|^2)
    packed = [s | abstain_bias | neutral(|x|^2, gamma, D, 0, layout)]
    ```

    Args:
        embeddings: Tensor `x` of shape `(N, D)`. Components beyond `1e12` in
            magnitude are saturated.
        centroids: Tensor of raw centroids of shape `(K, D)`.
        temperature: Tensor `gamma`, a scalar.
        abstain_bias: Tensor, a scalar.

    Returns:
        Tensor of shape `(N, K + 6)`.

    Example:

    >>> x, c = ops.array([[1.0, 1.0]]), ops.array([[2.0, 2.0], [0.0, 0.0]])
    >>> scores = packed_scores(x, c, ops.array(2.0), ops.array(-1.0))
    >>> ops.convert_to_numpy(scores)[:, :3].tolist()
    [[2.0, -6.0, -1.0]]
    """
    if keras.backend.backend() == "tensorflow":
        # A gradient of one's own takes tensors, not variables.
        centroids = ops.reshape(centroids, centroids.shape)
        abstain_bias = ops.reshape(abstain_bias, ())
    return _packed_scores(
        embeddings,
        centroids,
        temperature,
        abstain_bias,
        _saturated(embeddings),
        _mean_row(centroids),
        _squared_norms(centroids),
    )


def _saturated(x):
    # Without a gradient of its own: what is far out is pulled back as if it
    # were not.
    limit = geometry.MAX_COMPONENT
    return geometry.bounded(x, -limit, limit)


def _plain_saturated(x):
    # The differences are zero, and have a slope. That of infinities is NaN.
    difference = x - ops.stop_gradient(x)
    return ops.stop_gradient(_saturated(x)) + ops.where(
        ops.isfinite(x), difference, 0.0
    )


_saturated_where_far = with_gradient(
    _saturated, lambda inputs, upstream: (upstream,), _plain_saturated
)


def saturated(x):
    """Embeddings whose squares float32 holds; the gradient passes as it is.

    Args:
        x: Tensor of any shape.

    Returns:
        Tensor like `x`, with components in `[-1e12, 1e12]`.

    Example:

    >>> float(saturated(ops.array(-1e20)))
    -999999995904.0
    """
    return _saturated_where_far(x)


def _packed_scores_forward(
    _, centroids, gamma, abstain_bias, x, mean, squared_norms
):
    dim = centroids.shape[-1]
    scale = gamma * (2.0 / dim)
    half = 0.5 * scale
    # dot(x, c_k) - |c_k|^2 / 2
    #     = dot(x + m, C_k) - |C_k|^2 / 2 - dot(x + m, m) + |m|^2 / 2
    rows = x + mean
    rows *= scale
    logits = rows @ ops.transpose(centroids)
    logits -= squared_norms * half
    # Not as products: the converter to OpenVINO does not know the rank of the
    # mean, and so cannot transpose it.
    logits -= sum_columns(rows * mean) - sum_columns(mean * mean) * half
    return packing.pack(
        logits=logits,
        abstain_logit=abstain_bias,
        squared_norm=geometry.mean_square(x),
        temperature=gamma,
        embedding_dim=dim,
    )


def _packed_scores_backward(inputs, upstream):
    _, centroids, gamma, _, x, mean, squared_norms = inputs
    num_classes, dim = centroids.shape
    upstream = packing.unpack_gradient(upstream)
    g = upstream.logits
    scale = gamma * (2.0 / dim)

    of_class = ops.sum(g, axis=0, keepdims=True)
    of_sample = sum_columns(g)
    # sum_k g_nk c_k, and the sum of these over the samples.
    pulls = g @ centroids
    pulls -= of_sample * mean
    of_centered = ops.sum(pulls, axis=0, keepdims=True)
    of_raw = of_centered + ops.sum(of_class) * mean
    drift = ops.transpose(of_sample) @ x - of_centered

    dx = pulls * scale
    dx += x * (upstream.squared_norm * (2.0 / dim))
    # sum_n g_nk (x_n - c_k) for every class, less the mean of these.
    rows = x + mean
    rows *= scale
    dcentroids = _minus_scaled_rows(
        ops.transpose(g) @ rows,
        ops.transpose(of_class * scale),
        centroids,
        drift * (scale * (1.0 / num_classes)),
    )
    # sum_k of_class_k |c_k|^2, times D.
    spread = ops.sum(of_class * squared_norms) - ops.sum(
        (of_raw + of_centered) * mean
    )
    dgamma = (2.0 * ops.sum(x * pulls) - spread) * (1.0 / dim) + ops.sum(
        upstream.temperature
    )
    dbias = ops.sum(upstream.abstain_logit)
    return dx, dcentroids, dgamma, dbias, None, None, None


def _plain_packed_scores(embeddings, centroids, gamma, abstain_bias, *_):
    x = _plain_saturated(embeddings)
    return packing.pack(
        logits=geometry.class_logits(x, geometry.centered(centroids), gamma),
        abstain_logit=abstain_bias,
        squared_norm=geometry.mean_square(x),
        temperature=gamma,
        embedding_dim=centroids.shape[-1],
    )


_packed_scores = with_gradient(
    _packed_scores_forward, _packed_scores_backward, _plain_packed_scores
)


def with_far_background(scores, far_bias, far_scale):
    """Packed scores that abstain far from the origin as well.

    The abstain logit of the given scores, which stands for the narrow
    background at the origin, is joined by that of a wide one. The evidence for
    the best class against the wide background is measured in its own unit,
    because it scatters otherwise than that against the narrow one.

    Formula:

    ```python
    top = max_k s_k
    far = top + far_scale * (gamma * |x|^2 / 2 + far_bias - top)
    a = logaddexp(a, far)
    kappa = max(-far_bias / gamma, 1e-3)
    ```

    Args:
        scores: Packed scores, a tensor of shape `(N, K + 6)`.
        far_bias: Tensor, a scalar, a constant for gradients.
        far_scale: Tensor, a positive scalar, a constant for gradients.

    Returns:
        Tensor of shape `(N, K + 6)`.

    Example:

    >>> logits, norm = ops.array([[2.0, -6.0]]), ops.array([[8.0]])
    >>> scores = packing.pack(logits, -9.0, norm, 1.0, 2)
    >>> scores = with_far_background(scores, ops.array(-1.0), ops.array(1.0))
    >>> round(float(scores[0, 2]), 3)
    3.0
    """
    return _with_far_background(scores, far_bias, far_scale)


def _far_logit(parts, top, far_bias, far_scale):
    far = 0.5 * parts.temperature * parts.squared_norm + far_bias
    return top + far_scale * (far - top)


def _with_far_forward(
    scores, far_bias, far_scale, best_of_rows=geometry.max_of_rows
):
    parts = packing.unpack(scores)
    # Where the background begins is a constant for gradients.
    gamma = ops.stop_gradient(parts.temperature)
    far = _far_logit(parts, best_of_rows(parts.logits), far_bias, far_scale)
    return packing.with_abstaining(
        scores,
        abstain_logit=geometry.log_add_exp(parts.abstain_logit, far),
        far_radius=ops.where(
            far_bias < -_MIN_FAR_RADIUS * gamma,
            far_bias / -gamma,
            _MIN_FAR_RADIUS,
        ),
    )


def _with_far_backward(inputs, upstream):
    scores, far_bias, far_scale = inputs
    parts = packing.unpack(scores)
    upstream = packing.unpack_gradient(upstream)
    winner = ops.expand_dims(ops.argmax(parts.logits, axis=-1), axis=-1)
    winner = ops.cast(winner, "int32")
    far = _far_logit(
        parts, at_labels(parts.logits, winner), far_bias, far_scale
    )
    of_far = upstream.abstain_logit * ops.sigmoid(far - parts.abstain_logit)
    of_exponent = of_far * far_scale
    gradient = packing.pack_gradient(
        logits=upstream.logits,
        abstain_logit=upstream.abstain_logit - of_far,
        squared_norm=upstream.squared_norm
        + of_exponent * (0.5 * parts.temperature),
        temperature=upstream.temperature
        + of_exponent * (0.5 * parts.squared_norm),
    )
    return plus_at_labels(gradient, winner, of_far - of_exponent), None, None


_with_far_background = with_gradient(
    _with_far_forward,
    _with_far_backward,
    functools.partial(_with_far_forward, best_of_rows=geometry.best_of_rows),
)


def integer_label_losses(
    labels, scores, label_smoothing, distill, radial_weight
):
    """The HALO loss of integer labels, sample by sample.

    The targets `q` are those of `geometry.distilled_targets` or of
    `geometry.smoothed_targets`; they are never formed in the forward pass:

    Formula:

    ```python
    cross_entropy = logsumexp([s | b]) - s_y + sum_k q_k * (s_y - s_k)
    loss = cross_entropy + radial_weight * R(r_y^2)
    ```

    Args:
        labels: Tensor `y` of shape `(...)`, of an integer dtype or integers in
            floating point.
        scores: Packed scores, a tensor of shape `(..., K + 6)`.
        label_smoothing: Float in `[0, 1)`.
        distill: Boolean, distilled or plain soft targets.
        radial_weight: Non-negative float.

    Returns:
        Tensor of shape `(...)`; NaN, with a gradient of zero, where a label is
        not in `[0, K)` or a row does not hold packed scores.

    Example:

    >>> scores = packing.pack(
    ...     ops.array([[0.0, 0.0]]), 0.0, ops.array([[0.0]]), 1.0, 2
    ... )
    >>> loss = integer_label_losses(ops.array([1]), scores, 0.0, True, 0.0)
    >>> round(float(loss[0]), 4)
    1.0986
    """
    num_classes = packing.count_classes(scores)
    shape = None
    if len(scores.shape) > 2:
        shape = ops.shape(labels)
        labels = ops.reshape(labels, (-1,))
        scores = ops.reshape(scores, (-1, ops.shape(scores)[-1]))
    labels, in_range = safe_indices(labels, num_classes)

    def target_terms(parts, labels):
        """Mass near each class, that of the label, and what divides it."""
        near = geometry.class_nearness(
            parts.logits, parts.squared_norm, parts.temperature, label_smoothing
        )
        itself = at_labels(near, labels)
        return near, itself, 1.0 + (sum_columns(near) - itself)

    def forward(scores, labels, in_range):
        parts = packing.unpack(scores)
        own = at_labels(parts.logits, labels)
        top, log_total = normalizer(
            parts.logits, training_bias(parts, label_smoothing, num_classes)
        )
        losses = (top - own) + log_total
        if label_smoothing and distill:
            near, _, total = target_terms(parts, labels)
            gaps = own - parts.logits
            gaps *= near
            losses += sum_columns(gaps) / total
        elif label_smoothing:
            spread = label_smoothing / num_classes
            losses += sum_columns(own - parts.logits) * spread
        if radial_weight:
            losses += radial_losses(parts, own) * radial_weight
        losses = ops.where(is_known(parts, in_range), losses, float("nan"))
        # Not squeezed, which needs a known number of classes.
        return losses[..., 0]

    def backward(inputs, upstream):
        scores, labels, in_range = inputs
        parts = packing.unpack(scores)
        upstream = ops.where(
            is_known(parts, in_range), ops.expand_dims(upstream, axis=-1), 0.0
        )
        top, log_total = normalizer(
            parts.logits, training_bias(parts, label_smoothing, num_classes)
        )
        p = ops.exp((parts.logits - top) - log_total)
        if label_smoothing and distill:
            # Targets are constants, also to a second derivative.
            near, itself, total = map(
                ops.stop_gradient, target_terms(parts, labels)
            )
            target = 1.0 / total
            near *= target
            slopes = p - near
            own_slope = upstream * (target * (itself - 1.0))
        else:
            slopes = p - label_smoothing / num_classes
            own_slope = upstream * (label_smoothing - 1.0)
        # Last, when no slope is so small that the product underflows, which
        # some processors take long for.
        slopes *= upstream
        radial_slope, norm_slope, gamma_slope = radial_slopes(
            parts,
            at_labels(parts.logits, labels),
            upstream * radial_weight,
        )
        own_slope = own_slope + radial_slope
        return (
            packing.pack_gradient(
                logits=plus_at_labels(slopes, labels, own_slope),
                abstain_logit=abstain_slope(parts, top, log_total) * upstream,
                squared_norm=norm_slope,
                temperature=gamma_slope,
            ),
            None,
            None,
        )

    def plain(scores, labels, in_range):
        return plain_losses(
            labels, in_range, scores, label_smoothing, distill, radial_weight
        )

    losses = with_gradient(forward, backward, plain)(scores, labels, in_range)
    return losses if shape is None else ops.reshape(losses, shape)


def plain_losses(
    labels, in_range, scores, label_smoothing, distill, radial_weight
):
    """The losses of integer labels by the formulas, as they stand.

    Args:
        labels: Integer tensor `y` of shape `(N, 1)`, in `[0, K)`.
        in_range: Boolean tensor of shape `(N, 1)`, false where the loss is
            NaN.
        scores: Packed scores, a tensor of shape `(N, K + 6)`.
        label_smoothing: Float in `[0, 1)`.
        distill: Boolean, distilled or plain soft targets.
        radial_weight: Non-negative float.

    Returns:
        Tensor of shape `(N,)`.
    """
    parts = packing.unpack(scores)
    num_classes = packing.count_classes(scores)
    one_hot = ops.cast(
        ops.equal(labels, _class_indices(num_classes)), scores.dtype
    )
    if distill:
        targets = geometry.distilled_targets(
            one_hot,
            parts.logits,
            parts.squared_norm,
            parts.temperature,
            label_smoothing,
        )
    else:
        targets = geometry.smoothed_targets(one_hot, label_smoothing)
    losses = geometry.cross_entropy(
        targets,
        parts.logits,
        training_bias(parts, label_smoothing, num_classes),
    )
    if radial_weight:
        own = sum_columns(one_hot * parts.logits)
        losses = losses + radial_losses(parts, own) * radial_weight
    losses = ops.where(is_known(parts, in_range), losses, float("nan"))
    return losses[..., 0]


def _class_indices(num_classes):
    if ops.is_tensor(num_classes):
        num_classes = ops.cast(num_classes, "int32")
    return ops.arange(num_classes, dtype="int32")


def safe_indices(labels, num_classes):
    """Labels as indices that any gather takes, and whether they were in range.

    Args:
        labels: Tensor of shape `(...)`.
        num_classes: `K`, an integer or a scalar tensor.

    Returns:
        Tuple of an int32 tensor in `[0, K)` and a boolean tensor, both of
        shape `(..., 1)`.
    """
    labels = ops.expand_dims(labels, axis=-1)
    if keras.backend.standardize_dtype(labels.dtype) in _NARROW:
        # They may not hold `K` itself.
        labels = ops.cast(labels, "int32")
    if ops.is_tensor(num_classes):
        num_classes = ops.cast(num_classes, labels.dtype)
    in_range = (labels >= 0) & (labels < num_classes)
    if "float" in keras.backend.standardize_dtype(labels.dtype):
        # A label of 0.9 is not class 0.
        in_range &= labels == ops.floor(labels)
    labels = ops.where(in_range, labels, ops.zeros_like(labels))
    return ops.cast(labels, "int32"), in_range


def at_labels(matrix, labels):
    """The entry of each row of a matrix at its label, shape `(N, 1)`."""
    if keras.backend.backend() == "torch":
        # One operation, where `ops.take_along_axis` takes five.
        rows = ops.arange(labels.shape[0], dtype="int32")
        return matrix[rows, labels[:, 0]][:, None]
    return ops.take_along_axis(matrix, labels, axis=-1)


def plus_at_labels(matrix, labels, values, start=0):
    """`matrix` with one value a row added at its label; may write into it.

    Args:
        matrix: Tensor of shape `(N, K)`.
        labels: Integer tensor of shape `(N, 1)`.
        values: Tensor of shape `(N, 1)`.
        start: Integer, the class of the first column.

    Returns:
        Tensor of shape `(N, K)`. A row whose label has no column is unchanged,
        but on PyTorch all labels need one.
    """
    if keras.backend.backend() == "torch":
        rows = ops.arange(labels.shape[0], dtype="int32")
        matrix[rows, labels[:, 0]] += values[:, 0]
        return matrix
    classes = _class_indices(ops.shape(matrix)[-1]) + start
    is_own = ops.cast(ops.equal(labels, classes), matrix.dtype)
    return matrix + is_own * values


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
    return ops.where(parts.far_radius > 0.0, margin, parts.abstain_logit)


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
        Tuple of two tensors of shape `(N, 1)`.
    """
    top = geometry.max_of_rows(logits)
    top = ops.stop_gradient(ops.where(bias > top, bias, top))
    total = sum_columns(ops.exp(logits - top)) + ops.exp(bias - top)
    return top, ops.log(total)


def abstain_slope(parts, top, log_total):
    """Gradient of the cross-entropy with respect to the abstain column."""
    return ops.where(
        parts.far_radius > 0.0,
        0.0,
        ops.exp((parts.abstain_logit - top) - log_total),
    )


def is_known(parts, in_range=True):
    """Where a loss can be told: labels in range, scores of a HALO head."""
    return (parts.embedding_dim >= 2.0) & in_range


def sum_columns(matrix):
    """Sum over the last axis, which stays."""
    return ops.sum(matrix, axis=-1, keepdims=True)


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
