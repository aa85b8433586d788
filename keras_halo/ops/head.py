"""The head as one operation, with a gradient derived by hand.

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

Gradients are functions of the inputs alone, and second derivatives follow by
automatic differentiation of the first. What both passes need beside the inputs
(saturated embeddings, mean and norms of the centroids) goes in as further
inputs without gradients: those of the embeddings and of the centroids account
for them.
"""

import functools

from keras import ops

from keras_halo.ops import geometry, packing, tensors
from keras_halo.ops.gradients import with_gradient
from keras_halo.ops.tensors import (
    at_labels,
    plus_at_labels,
    sum_columns,
    sum_entries,
    sum_rows,
)

# Zero would say that there is no far background.
_MIN_FAR_RADIUS = 1e-3


def packed_scores(
    embeddings, centroids, temperature, abstain_bias, background=0.0
):
    """Packed scores of embeddings around raw centroids.

    Formula:

    ```python
    c = centroids - mean(centroids, axis=0)
    s = gamma * (2 * dot(x, c) / D - |c|^2)
    packed = [s | abstain_bias | neutral(|x|^2, gamma, D, background, layout)]
    ```

    Args:
        embeddings: Tensor `x` of shape `(N, D)`. Components beyond `1e12` in
            magnitude are saturated.
        centroids: Tensor of raw centroids of shape `(K, D)`.
        temperature: Tensor `gamma`, a scalar.
        abstain_bias: Tensor, a scalar.
        background: Float, as in `packing.pack`. Defaults to zero.

    Returns:
        Tensor of shape `(N, packed_width)`.

    Example:

    >>> x, c = ops.array([[1.0, 1.0]]), ops.array([[2.0, 2.0], [0.0, 0.0]])
    >>> scores = packed_scores(x, c, ops.array(2.0), ops.array(-1.0))
    >>> ops.convert_to_numpy(scores)[:, :3].tolist()
    [[2.0, -6.0, -1.0]]
    """
    centroids = tensors.as_tensor(centroids)
    abstain_bias = tensors.as_tensor(abstain_bias)
    return _packed_scores_with(background)(
        embeddings,
        centroids,
        temperature,
        abstain_bias,
        _saturated(embeddings),
        tensors.mean_row(centroids),
        tensors.squared_norms(centroids),
    )


def _saturated(x):
    # Without a gradient of its own: what is far out is pulled back as if it
    # were not.
    limit = geometry.MAX_COMPONENT
    return tensors.bounded(x, -limit, limit)


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
    background, _, centroids, gamma, abstain_bias, x, mean, squared_norms
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
        background=background,
    )


def _packed_scores_backward(inputs, upstream):
    _, centroids, gamma, _, x, mean, squared_norms = inputs
    num_classes, dim = centroids.shape
    upstream = packing.unpack_gradient(upstream)
    g = upstream.logits
    scale = gamma * (2.0 / dim)

    of_class = sum_rows(g)
    of_sample = sum_columns(g)
    # sum_k g_nk c_k, and the sum of these over the samples.
    pulls = g @ centroids
    pulls -= of_sample * mean
    of_centered = sum_rows(pulls)
    of_raw = of_centered + sum_entries(of_class) * mean
    drift = ops.transpose(of_sample) @ x - of_centered

    dx = pulls * scale
    dx += x * (upstream.squared_norm * (2.0 / dim))
    # sum_n g_nk (x_n - c_k) for every class, less the mean of these.
    rows = x + mean
    rows *= scale
    dcentroids = tensors.minus_scaled_rows(
        ops.transpose(g) @ rows,
        ops.transpose(of_class * scale),
        centroids,
        drift * (scale * (1.0 / num_classes)),
    )
    # sum_k of_class_k |c_k|^2, times D.
    spread = sum_entries(of_class * squared_norms) - sum_entries(
        (of_raw + of_centered) * mean
    )
    dgamma = (2.0 * sum_entries(x * pulls) - spread) * (1.0 / dim)
    dgamma += sum_entries(upstream.temperature)
    dbias = sum_entries(upstream.abstain_logit)
    return dx, dcentroids, dgamma, dbias, None, None, None


def _plain_packed_scores(
    background, embeddings, centroids, gamma, abstain_bias, *_
):
    x = _plain_saturated(embeddings)
    return packing.pack(
        logits=geometry.class_logits(x, geometry.centered(centroids), gamma),
        abstain_logit=abstain_bias,
        squared_norm=geometry.mean_square(x),
        temperature=gamma,
        embedding_dim=centroids.shape[-1],
        background=background,
    )


# One function for each label smoothing that heads have, not for each call.
@functools.cache
def _packed_scores_with(background):
    return with_gradient(
        functools.partial(_packed_scores_forward, background),
        _packed_scores_backward,
        functools.partial(_plain_packed_scores, background),
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
        scores: Packed scores, a tensor of shape `(N, packed_width)`.
        far_bias: Tensor, a scalar, a constant for gradients.
        far_scale: Tensor, a positive scalar, a constant for gradients.

    Returns:
        Tensor of shape `(N, packed_width)`.

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
    scores, far_bias, far_scale, best_of_rows=tensors.max_of_rows
):
    parts = packing.unpack(scores)
    # Where the background begins is a constant for gradients.
    gamma = ops.stop_gradient(parts.temperature)
    far = _far_logit(parts, best_of_rows(parts.logits), far_bias, far_scale)
    return packing.with_abstaining(
        scores,
        abstain_logit=tensors.log_add_exp(parts.abstain_logit, far),
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
    functools.partial(_with_far_forward, best_of_rows=tensors.best_of_rows),
)
