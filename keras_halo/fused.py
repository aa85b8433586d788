"""Head and loss as one operation each, with gradients derived by hand.

The formulas are those of `keras_halo.geometry`; what is here computes the same
numbers in as few passes over memory as they need:

- The centring acts on products instead of on the centroids, so that no second
  array of their size is made: `dot(x, c_k) = dot(x, C_k) - dot(x, m)` and
  `dot(c_k, c_k) = dot(C_k, C_k) - 2 * dot(C_k, m) + dot(m, m)`, with `C` the
  raw centroids and `m` their mean. Rounding is relative to `|C_k|^2` then, and
  not to `|c_k|^2`: a mean a hundred times larger than the spread of the
  centroids would cost four digits. Training does not move it, because the
  gradient of the centroids sums to zero.
- Sums over samples or classes ride in the matrix products as extra rows.
- The gradient of the loss is `p - q`, as for cross-entropy.

Gradients are functions of the inputs alone, nothing of the forward pass is
kept but those, and second derivatives follow by automatic differentiation of
the first.
"""

import keras
from keras import ops

from keras_halo import geometry, packing


def _with_gradient(function, gradient):
    """Joins a function of tensors with its vector-Jacobian product.

    Args:
        function: Callable, `function(*inputs)` returns a tensor.
        gradient: Callable, `gradient(inputs, upstream)` returns a tuple with
            one tensor for every input.

    Returns:
        Callable like `function`.
    """

    @ops.custom_gradient
    def joined(*inputs):
        def backward(*args, upstream=None):
            # PyTorch passes the inputs on, the others pass upstream alone.
            if upstream is None:
                return gradient(inputs, *args)
            return gradient(args, upstream)

        return function(*inputs), backward

    return joined


def _row_dots(a, b):
    """Dot products of the rows of two matrices, without a third matrix."""
    if keras.backend.backend() == "torch":
        return ops.einsum("kd,kd->k", a, b)
    return ops.sum(a * b, axis=-1)


def packed_scores(embeddings, centroids, temperature, abstain_logit):
    """Packed scores of embeddings around raw centroids.

    Formula:

    ```python
    c = centroids - mean(centroids, axis=0)
    s = gamma * (2 * dot(x, c) / D - |c|^2)
    packed = [s | b | neutral(|x|^2) | neutral(gamma) | neutral(D)]
    ```

    Args:
        embeddings: Tensor `x` of shape `(N, D)`.
        centroids: Tensor of raw centroids of shape `(K, D)`.
        temperature: Tensor `gamma`, a scalar.
        abstain_logit: Tensor `b`, a scalar.

    Returns:
        Tensor of shape `(N, K + 4)`.

    Example:

    >>> x, c = ops.array([[1.0, 1.0]]), ops.array([[2.0, 2.0], [0.0, 0.0]])
    >>> scores = packed_scores(x, c, ops.array(2.0), ops.array(-1.0))
    >>> ops.convert_to_numpy(scores)[:, :3].tolist()
    [[2.0, -6.0, -1.0]]
    """
    if keras.backend.backend() == "tensorflow":
        # A gradient of one's own takes tensors, not variables.
        centroids = ops.reshape(centroids, centroids.shape)
        abstain_logit = ops.reshape(abstain_logit, ())
    return _packed_scores(embeddings, centroids, temperature, abstain_logit)


def _packed_scores_forward(x, centroids, gamma, abstain_logit):
    num_classes, dim = centroids.shape
    mean = ops.sum(centroids, axis=0, keepdims=True) / num_classes
    scaled = x * (gamma * (2.0 / dim))
    scaled_mean = mean * (gamma * (2.0 / dim))
    products = ops.concatenate([scaled, scaled_mean]) @ ops.transpose(centroids)
    per_class = products[-1:] - _row_dots(centroids, centroids) * (gamma / dim)
    per_sample = ops.sum(scaled * mean, axis=-1, keepdims=True) + 0.5 * ops.sum(
        scaled_mean * mean
    )
    return packing.pack(
        logits=products[:-1] + per_class - per_sample,
        abstain_logit=abstain_logit,
        squared_norm=geometry.mean_square(x),
        temperature=gamma,
        embedding_dim=dim,
    )


def _packed_scores_backward(inputs, upstream):
    x, centroids, gamma, _ = inputs
    num_classes, dim = centroids.shape
    upstream = packing.unpack_gradient(upstream)
    g = upstream.logits
    scale = gamma * (2.0 / dim)

    of_class = ops.sum(g, axis=0, keepdims=True)
    of_sample = ops.sum(g, axis=-1, keepdims=True)
    rows = ops.concatenate([g, of_class, ops.ones_like(of_class)])
    products = rows @ centroids
    mean = products[-1:] / num_classes
    # sum_k g_nk c_k and sum_nk g_nk c_k.
    pulls = products[:-2] - of_sample * mean
    class_pull = products[-2:-1] - ops.sum(of_class) * mean

    dx = pulls * scale + x * (upstream.squared_norm * (2.0 / dim))
    drift = (ops.sum(x * of_sample, axis=0, keepdims=True) - class_pull) * (
        scale / num_classes
    )
    dcentroids = ops.transpose(rows) @ ops.concatenate(
        [x * scale, mean * scale, -drift]
    ) - centroids * ops.transpose(of_class * scale)
    # sum_k of_class_k |c_k|^2 * D
    spread = ops.sum(of_class * _row_dots(centroids, centroids)) - ops.sum(
        (products[-2:-1] + class_pull) * mean
    )
    dgamma = (2.0 * ops.sum(x * pulls) - spread) / dim + ops.sum(
        upstream.temperature
    )
    return (
        dx,
        dcentroids,
        ops.reshape(dgamma, ()),
        ops.sum(upstream.abstain_logit),
    )


_packed_scores = _with_gradient(_packed_scores_forward, _packed_scores_backward)


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
        labels: Integer tensor `y` of shape `(N,)`, in `[0, K)`.
        scores: Packed scores, a tensor of shape `(N, K + 4)`.
        label_smoothing: Float in `[0, 1)`.
        distill: Boolean, distilled or plain soft targets.
        radial_weight: Non-negative float.

    Returns:
        Tensor of shape `(N,)`.

    Example:

    >>> scores = packing.pack(
    ...     ops.array([[0.0, 0.0]]), 0.0, ops.array([[0.0]]), 1.0, 2
    ... )
    >>> loss = integer_label_losses(ops.array([1]), scores, 0.0, True, 0.0)
    >>> round(float(loss[0]), 4)
    1.0986
    """
    labels = ops.expand_dims(labels, axis=-1)

    def nearness(parts):
        distances = ops.relu(
            parts.temperature * parts.squared_norm - parts.logits
        )
        return ops.exp(distances * (-1.0 / label_smoothing))

    def forward(scores):
        parts = packing.unpack(scores)
        own = ops.take_along_axis(parts.logits, labels, axis=-1)
        losses = _logsumexp(packing.answer_logits(scores)) - own
        if label_smoothing:
            others = own - parts.logits
            if distill:
                near = nearness(parts)
                total = ops.sum(near, axis=-1, keepdims=True)
                itself = ops.take_along_axis(near, labels, axis=-1)
                share = 1.0 / (1.0 + (total - itself))
                gaps = ops.sum(near * others, axis=-1, keepdims=True)
            else:
                share = label_smoothing / others.shape[-1]
                gaps = ops.sum(others, axis=-1, keepdims=True)
            losses = losses + gaps * share
        if radial_weight:
            radius = geometry.squared_radii(
                own, parts.squared_norm, parts.temperature
            )
            losses = losses + radial_weight * geometry.radial_nll(
                radius, parts.embedding_dim
            )
        return ops.squeeze(losses, axis=-1)

    def backward(inputs, upstream):
        (scores,) = inputs
        upstream = ops.expand_dims(upstream, axis=-1)
        parts = packing.unpack(scores)
        p = ops.softmax(packing.answer_logits(scores)) * upstream
        own = ops.take_along_axis(parts.logits, labels, axis=-1)
        p_classes = p[..., :-1]
        p_own = ops.take_along_axis(p_classes, labels, axis=-1)
        if label_smoothing and distill:
            near = nearness(parts)
            total = ops.sum(near, axis=-1, keepdims=True)
            itself = ops.take_along_axis(near, labels, axis=-1)
            target_own = upstream / (1.0 + (total - itself))
            slope = p_classes - near * target_own
        elif label_smoothing:
            spread = upstream * (label_smoothing / p_classes.shape[-1])
            target_own = upstream * (1.0 - label_smoothing) + spread
            slope = p_classes - spread
        else:
            target_own = upstream
            slope = p_classes
        slope_own = p_own - target_own
        if radial_weight:
            gamma = parts.temperature
            radius = geometry.squared_radii(own, parts.squared_norm, gamma)
            push = (upstream * radial_weight) * geometry.radial_slope(
                radius, parts.embedding_dim
            )
            slope_own = slope_own - push / gamma
        else:
            push = ops.zeros_like(upstream)
            gamma = parts.temperature
        return (
            packing.pack_gradient(
                logits=_with_own(slope, labels, slope_own),
                abstain_logit=p[..., -1:],
                squared_norm=push,
                temperature=push * own / (gamma * gamma),
            ),
        )

    return _with_gradient(forward, backward)(scores)


def _logsumexp(logits):
    # Before Keras 3.11 a symbolic tensor needs the axis as a tuple.
    return ops.logsumexp(logits, axis=(-1,), keepdims=True)


def _with_own(values, labels, own):
    """Replaces the values in the columns of the labels."""
    classes = ops.arange(values.shape[-1], dtype=labels.dtype)
    return ops.where(ops.equal(labels, classes), own, values)
