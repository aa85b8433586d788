"""Scores of how little an input resembles what the model was trained on.

Every score is larger for outliers and is computed from packed scores alone.
They read how far the logit of abstaining is above those of the classes, how
much one class stands out, and how typical the distance to the nearest centroid
is of a member of its class.

The pure functions work inside a Keras graph; `ood_score` also takes NumPy
arrays. `keras_halo.layers.OODScore` is the same as a layer.
"""

import math

import numpy as np
from keras import ops

from keras_halo.ops import geometry, packing, tensors
from keras_halo.ops.model_output import (
    FITTED,
    is_symbolic_or_tensor,
    read_model_output,
    require_fitted,
)
from keras_halo.utils.precision import computation_dtype
from keras_halo.utils.shapes import with_few_lengths
from keras_halo.utils.types import Array, Scores

# Coefficients of Numerical Recipes' `erfcc`, whose relative error is below
# 1.2e-7 everywhere: a logarithm of it is exact to float32 in the far tail too.
_ERFC = (
    -1.26551223,
    1.00002368,
    0.37409196,
    0.09678418,
    -0.18628806,
    0.27886807,
    -1.13520398,
    1.48851587,
    -0.82215223,
    0.17087277,
)

# Taylor coefficients of log(rho(delta)) / delta, see `radial_tail`.
_LOG_RHO = (-1 / 3, 5 / 36, -67 / 810, 371 / 6480, -293 / 6804)

_MIN_SQUARED_NORM = 1e-12

# The exponent that the authors of the generalized entropy recommend.
_GEN_POWER = 0.1

# Within this distance of the mean the Taylor series is the more exact one.
_NEAR_MEAN = 0.05


def abstain_log_odds(scores):
    """Log-odds of abstaining: the `"abstain"` score, the default.

    Formula:

    ```python
    log(P(abstain) / (1 - P(abstain))) = a - logsumexp([s_1, ..., s_K])
    a = logaddexp(abstain_bias, top + far_scale * (far - top))
    top, far = max_k s_k, gamma * |x|^2 / 2 + far_bias
    ```

    Its sigmoid is the probability of abstaining. As log-odds it keeps apart
    what the probability rounds to zero or one.

    Args:
        scores: Packed scores, a tensor of shape `(..., packed_width)`.

    Returns:
        Tensor of shape `(..., 1)`.

    Example:

    >>> logits, norm = ops.array([[0.0, 0.0]]), ops.array([[1.0]])
    >>> scores = packing.pack(logits, 3.0, norm, 1.0, 2)
    >>> round(float(abstain_log_odds(scores)[0, 0]), 4)
    2.3069
    """
    parts = packing.unpack(scores)
    return parts.abstain_logit - _logsumexp(parts.logits)


def _logsumexp(logits):
    # Before Keras 3.11 a symbolic tensor needs the axis as a tuple.
    return ops.logsumexp(logits, axis=(-1,), keepdims=True)


def class_radii(scores):
    """Squared radii of packed scores, none of them negative.

    Formula:

    ```python
    r_k^2 = max(|x|^2 - s_k / gamma, 0)
    ```

    Args:
        scores: Packed scores, a tensor of shape `(..., packed_width)`.

    Returns:
        Tensor of shape `(..., K)`.

    Example:

    >>> logits, norm = ops.array([[2.0, -6.0]]), ops.array([[1.0]])
    >>> scores = packing.pack(logits, 0.0, norm, 2.0, 2)
    >>> ops.convert_to_numpy(class_radii(scores)).tolist()
    [[0.0, 4.0]]
    """
    parts = packing.unpack(scores)
    # Rounding may leave a zero slightly negative; a distance is not.
    return ops.relu(
        geometry.squared_radii(
            parts.logits, parts.squared_norm, parts.temperature
        )
    )


def radial_tail(squared_radius, embedding_dim):
    """Negative log of the two-sided chi-square tail of a squared radius.

    Under the model `D * r^2` of a member of a class follows a chi-square
    distribution with `D` degrees of freedom. The tail is that of the closed
    form by Barndorff-Nielsen, which `keras.ops` can express and which stays
    exact far out, where a normal approximation fails.

    Formula:

    ```python
    p = 2 * min(F(D * r^2), 1 - F(D * r^2)),  F = CDF of chi-square(D)
    -log(p) ~= -log(erfc(abs(z) / sqrt(2)))
    z = w - log(rho) / w
    w = delta * sqrt(D / 2) * rho
    rho = sqrt(2 * (delta - log(1 + delta))) / abs(delta)
    delta = r^2 - 1
    ```

    The error of `-log(p)`, measured against `scipy.stats.chi2` for `r^2` from
    1e-3 to 1e3, is below 0.08 for `D = 2`, 0.015 for `D = 10` and 0.002 for
    `D = 64`; it falls as `1 / D` and does not grow in the tails. The error of
    `p` itself is below 0.004, 0.001 and 0.0001. Below `r^2 = 1e-3` the
    logarithm continues as its tangent.

    Args:
        squared_radius: Tensor `r^2` of any shape, not negative.
        embedding_dim: `D`, a number or a tensor that broadcasts against
            `squared_radius`.

    Returns:
        Tensor like `squared_radius`: zero at the median, growing without bound
        to both sides.

    Example:

    >>> tail = radial_tail(ops.array([0.2, 0.934, 4.0]), 10)
    >>> print(np.exp(-ops.convert_to_numpy(tail)).round(3))
    [0.007 0.999 0.   ]

    References:

    - O. E. Barndorff-Nielsen, Approximate interval probabilities, Journal of
      the Royal Statistical Society B 52, 1990.
    """
    delta = squared_radius - 1.0
    far = ops.abs(delta) > _NEAR_MEAN
    # The branch that is not taken gets a harmless value, so that its gradient
    # is not 0 * inf.
    safe_delta = ops.where(far, delta, 1.0)
    safe_excess = safe_delta - geometry.floored_log(safe_delta + 1.0)
    # Two divisions: the square of a large delta would overflow.
    log_rho = ops.where(
        far,
        0.5 * ops.log(2.0 * safe_excess / safe_delta / safe_delta),
        delta * _polynomial(_LOG_RHO, ops.where(far, 0.0, delta)),
    )
    log_rho_by_delta = ops.where(
        far,
        log_rho / safe_delta,
        _polynomial(_LOG_RHO, ops.where(far, 0.0, delta)),
    )
    rho = ops.exp(log_rho)
    scale = ops.sqrt(0.5 * embedding_dim * ops.ones_like(delta))
    z = delta * scale * rho - log_rho_by_delta / (scale * rho)
    return _negative_log_erfc(ops.abs(z) * math.sqrt(0.5))


def _polynomial(coefficients, x):
    value = coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + coefficient
    return value


def _negative_log_erfc(x):
    t = 1.0 / (1.0 + 0.5 * x)
    return x * x - ops.log(t) - _polynomial(_ERFC, t)


def _joint(scores):
    dim = packing.unpack(scores).embedding_dim
    typicality = geometry.radial_nll(class_radii(scores), dim)
    # -log(1 - P(abstain)), without the subtraction that would round to zero.
    rejection = ops.softplus(abstain_log_odds(scores))
    return rejection + dim * tensors.min_of_rows(typicality)


def _radius(scores):
    dim = packing.unpack(scores).embedding_dim
    return radial_tail(_nearest(scores), dim)


def _energy(scores):
    gamma = packing.unpack(scores).temperature
    radii = class_radii(scores)
    nearest = -tensors.best_of_rows(-radii)
    # Not a bare logsumexp: a compiler that fuses the product with gamma into
    # its subtraction of the maximum makes exp overflow at large radii.
    others = ops.where(
        tensors.is_best_of_rows(-radii),
        0.0,
        ops.exp(-(gamma * ops.relu(radii - nearest))),
    )
    crowding = ops.log1p(ops.sum(others, axis=-1, keepdims=True))
    return gamma * nearest - crowding


def _max_probability(scores):
    logits = packing.answer_logits(scores)
    classes = packing.unpack(scores).logits
    best = ops.expand_dims(packing.best_class(scores), axis=-1)
    is_best = ops.equal(ops.arange(0, logits.shape[-1], dtype="int32"), best)
    others = _logsumexp(ops.where(is_best, -math.inf, logits))
    return ops.softplus(others - tensors.best_of_rows(classes))


def _max_logit(scores):
    logits = packing.unpack(scores).logits
    return -tensors.best_of_rows(logits)


def _gap(scores):
    parts = packing.unpack(scores)
    logits = parts.logits
    mean = ops.sum(logits, axis=-1, keepdims=True) / logits.shape[-1]
    gap = tensors.best_of_rows(logits) - mean
    # A floor under the root: its slope at zero is infinite.
    norm = ops.sqrt(parts.squared_norm + _MIN_SQUARED_NORM)
    return gap / -(parts.temperature * norm)


def _logit_gap(scores):
    logits = packing.unpack(scores).logits
    # The difference of the best class to itself is zero and adds nothing.
    below = tensors.best_of_rows(logits) - logits
    return ops.sum(below, axis=-1, keepdims=True) / (1 - logits.shape[-1])


def _gen(scores):
    logits = packing.unpack(scores).logits
    is_best = tensors.is_best_of_rows(logits)
    others = _logsumexp(ops.where(is_best, -math.inf, logits))
    lead = tensors.best_of_rows(logits) - others
    # Not as 1 - p, which is nothing but rounding where p is nearly one.
    log_best = -ops.log1p(ops.exp(-lead))
    log_p = ops.where(is_best, log_best, logits - others + (log_best - lead))
    log_rest = ops.where(
        is_best,
        log_best - lead,
        # A harmless value in the branch that is not taken.
        ops.log1p(-ops.exp(ops.where(is_best, -1.0, log_p))),
    )
    return ops.sum(
        ops.exp(_GEN_POWER * (log_p + log_rest)), axis=-1, keepdims=True
    )


def _nearest(scores):
    return tensors.min_of_rows(class_radii(scores))


_FORMULAS = {
    "abstain": abstain_log_odds,
    "gap": _gap,
    "gen": _gen,
    "max_logit": _max_logit,
    "logit_gap": _logit_gap,
    "joint": _joint,
    "radius": _radius,
    "energy": _energy,
    "max_probability": _max_probability,
    "nearest": _nearest,
}

OOD_METHODS = tuple(_FORMULAS)


def label_scores(logits, ood):
    """Scores how little an input resembles each class: larger for outliers.

    Formula:

    ```python
    ood + max_j s_j - s_k
    ```

    With the score `"max_probability"` it is `-log(p_k)`, with
    `p = softmax([s_1, ..., s_K, a])`.

    Args:
        logits: Tensor or array of shape `(..., K)`.
        ood: Tensor or array of shape `(...)`, the score of the input.

    Returns:
        Like `logits`; the smallest in a row is `ood`.

    Example:

    >>> label_scores(np.array([[2.0, 5.0]]), np.array([0.5])).tolist()
    [[3.5, 0.5]]
    """
    if isinstance(logits, np.ndarray):
        best = np.max(logits, axis=-1, keepdims=True, initial=-np.inf)
    else:
        # No position: of these Keras makes operations on bits, which runtimes
        # of ONNX do not know.
        best = tensors.max_of_rows(logits)
    return ood[..., None] + (best - logits)


def check_method(method, allow_fitted=False):
    """Raises `ValueError` unless `method` names a score.

    Args:
        method: String, one of `OOD_METHODS`.
        allow_fitted: Boolean, whether `"fitted"` may be meant, the score that
            a model itself emits. Defaults to `False`.

    Raises:
        ValueError: If it is not.

    Example:

    >>> check_method("distance")
    Traceback (most recent call last):
        ...
    ValueError: `method` must be one of 'abstain', 'gap', ...
    """
    known = (*OOD_METHODS, FITTED) if allow_fitted else OOD_METHODS
    if not isinstance(method, str) or method not in known:
        names = ", ".join(repr(name) for name in known)
        raise ValueError(
            f"`method` must be one of {names}. Received: method={method!r}. "
            "Leave it out for the log-odds of abstaining."
        )


def ood_score(scores: Scores, method: str = "abstain") -> Array:
    """Scores how likely inputs are out of distribution: larger for outliers.

    Formulas, with `r_k^2` the squared radius around the centroid of class `k`:

    ```python
    abstain          log(P(abstain) / (1 - P(abstain)))
    gap              -(max_k s_k - mean_k s_k) / (gamma * |x|)
    gen              sum_k (p_k * (1 - p_k)) ** 0.1,  p = softmax([s_1 ... s_K])
    max_logit        -max_k s_k
    logit_gap        mean_{k != best} s_k - max_k s_k
    joint            -log(1 - P(abstain)) + D * min_k R(r_k^2)
    radius           -log(2 * min(F, 1 - F)),  F = chi2_D.cdf(D * min_k r_k^2)
    energy           -log(sum_k exp(-gamma * r_k^2))
    max_probability  -log(max_k p_k),  p = softmax([s_1, ..., s_K, a])
    nearest          min_k r_k^2
    ```

    `R(r^2) = r^2 / 2 - (1 / 2 - 1 / D) * log(r^2)` is
    `keras_halo.ops.geometry.radial_nll`.

    What each of them sees, and what it misses:

    - `"abstain"`, the default: the log-odds of "I don't know" against every
      class, so that it agrees with what the model decides. Sees what lies near
      the origin and what lies far out. A head without a far background
      (`HALODense.reference`, `HALOSimilarity`) ranks what lies far from
      everything as the most familiar of all.
    - `"gap"`: how much the best class stands out, for an embedding of unit
      length. Does not depend on the scale of the embedding, so that it misses
      what differs in length alone.
    - `"gen"`: the generalized entropy of the class probabilities. Sees inputs
      between classes. Misses what lies far out.
    - `"max_logit"`: the evidence for the best class. Misses what lies far out.
    - `"logit_gap"`: how far the best class is ahead of the average of the
      others, all of them (the authors also propose the nearest few). Centroids
      are centred, so that the mean of all logits is a constant of a head:
      inputs rank as by `"max_logit"`, and what that misses is missed. Its zero
      is a tie of all classes, whatever the head.
    - `"joint"`: rejects what lies near the origin and what lies at an atypical
      distance from every centroid, by the distance that the theory expects.
      New inputs lie nearer than that and are charged for it, the more the
      larger the embedding is.
    - `"radius"`: an atypical distance to the nearest centroid, too far or too
      near, as negative log of a p-value that is exact as far as embeddings
      are Gaussian around their centroid. Misses what lies at the right
      distance in a wrong direction, such as between two classes.
    - `"energy"`: a soft form of `"nearest"`, the negative log of the summed
      densities of the classes. The distance logits are taken without the
      shift `gamma * |x|^2` that `HALODense` leaves in `s_k`, because with it
      the energy would rank as `"abstain"` does; the logit of abstaining takes
      no part, because it would make the origin a familiar place. Misses what
      lies too near to a centroid, or on the boundary between two.
    - `"max_probability"`: the negative log-probability of the answer that is
      not "I don't know"; the probabilities of the classes are not scaled up
      to one, so abstaining counts as doubt. Sees inputs between classes, and
      what lies far out where the head has a far background. Where it has none
      (`HALODense.reference`, `HALOSimilarity`) it misses the latter, as
      `"abstain"` does.
    - `"nearest"`: the distance to the nearest centroid. Misses what falls
      short: embeddings that shrink towards the origin or onto a centroid.

    The detector NCI (Liu and Qin, 2025) is not among them: it needs the length
    of each centroid and the sum of the absolute features, which packed scores
    do not hold. Where all centroids are equally long, its angle, without that
    sum, ranks as `"gap"` does.

    Args:
        scores: Packed scores of shape `(..., packed_width)`, as `HALODense`
            emits them: an array, or a tensor, also inside a graph. Or what a
            model of `keras_halo.fit_class_gaussians` returned.
        method: String, one of `keras_halo.OOD_METHODS`, or `"fitted"` for the
            score that such a model emits. Defaults to `"abstain"`.

    Returns:
        Scores of shape `(...)`: a NumPy array for a NumPy array (or a list),
        a tensor for a tensor. Finite wherever the embedding was; values of
        tensors are not inspected.

    Raises:
        ValueError: If `method` is not known, or an array holds NaN, infinite
            values or no packed scores.

    Example:

    >>> head = keras_halo.HALODense.reference(
    ...     2, centroid_initializer="identity"
    ... )
    >>> scores = ops.convert_to_numpy(
    ...     head(np.array([[0.4, -0.2, 0, 0], [9, 9, 9, 9.0]], "float32"))
    ... )
    >>> print(ood_score(scores, "joint").round(1))
    [  5.2 162.6]

    References:

    - Raphael Pisoni, "I don't know!": Teaching neural networks to abstain
      with the HALO-Loss, 2026.
    - Dan Hendrycks, Kevin Gimpel, A Baseline for Detecting Misclassified and
      Out-of-Distribution Examples in Neural Networks, 2017.
    - Weitang Liu, Xiaoyun Wang, John Owens, Yixuan Li, Energy-based
      Out-of-distribution Detection, 2020.
    - Dan Hendrycks et al., Scaling Out-of-Distribution Detection for
      Real-World Settings, 2022. (The largest logit.)
    - Xixi Liu, Yaroslava Lochman, Christopher Zach, GEN: Pushing the Limits of
      Softmax-Based Out-of-Distribution Detection, 2023.
    - Litian Liu, Yao Qin, Fast Decision Boundary based Out-of-Distribution
      Detector, 2024. (The gap.)
    - Litian Liu, Yao Qin, Detecting Out-of-Distribution through the Lens of
      Neural Collapse, 2025. (NCI.)
    - Jiachen Liang et al., Revisiting Logit Distributions for Reliable
      Out-of-Distribution Detection, 2025. (LogitGap.)
    """
    check_method(method, allow_fitted=True)
    output = read_model_output(scores)
    scores = output.scores
    if method == FITTED:
        fitted = require_fitted(output)
        if not is_symbolic_or_tensor(fitted):
            packing.check_packed(scores)
        return fitted
    if is_symbolic_or_tensor(scores):
        packing.count_classes(scores.shape)
        dtype = computation_dtype(scores.dtype)
        return ops.squeeze(_FORMULAS[method](ops.cast(scores, dtype)), axis=-1)
    packing.check_packed(scores)
    if scores.size == 0:
        # The minimum over the classes of nothing fails on some backends.
        return np.zeros(scores.shape[:-1], scores.dtype)
    (found,) = with_few_lengths(
        lambda rows: (
            ops.convert_to_numpy(
                ood_score(ops.convert_to_tensor(rows), method)
            ),
        ),
        scores.reshape(-1, scores.shape[-1]),
    )
    return found.reshape(scores.shape[:-1])
