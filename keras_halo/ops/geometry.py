"""The mathematics of HALO as pure functions of `keras.ops`.

Notation of the formulas: `x` is an embedding of size `D`, `c_k` the centred
centroid of class `k` out of `K`, `gamma` the temperature, and `|v|^2` always
the *mean* of squares over the `D` components, so that a D-dimensional unit
Gaussian has `|v|^2` near one whatever `D` is.

Shapes: quantities of a class end in `K`; quantities of a sample end in an axis
of length one, so that both broadcast against each other. All arguments are
tensors unless they are said to be numbers.

The functions write products and differences as Python operators rather than
as `ops.multiply`, `ops.matmul`, `ops.mean` and `ops.maximum`: outside of
TensorFlow these compute float64 tensors in float32.

References:

- Raphael Pisoni, "I don't know!": Teaching neural networks to abstain with
  the HALO-Loss, 2026.
"""

import math
from typing import Any

from keras import backend, ops

from keras_halo.ops import tensors
from keras_halo.utils.shapes import axis_length
from keras_halo.utils.types import Tensor

# Below this squared radius the logarithm of the radial term continues as its
# tangent, which bounds the push off a centroid that an embedding sits on.
RADIUS_FLOOR = 1e-3

# A temperature of zero would leave no way back from logits to distances.
MIN_TEMPERATURE = 1e-6


# Features of a mean magnitude far below this stay short. Made as long as
# others, what they hold would be mostly noise, which a network would memorise.
SMALL_MAGNITUDE = 0.1

# More rectified Gaussian features than these are made shorter, so that no step
# of SGD is too long for the layer behind them.
MAX_SQUARED_LENGTH = 256

# Components beyond this are saturated: their squares, times the scale of the
# packed columns, are the largest that float32 holds.
MAX_COMPONENT = 1e12


def shell(embedding_dim: int) -> float:
    """Returns the squared radius at which a unit Gaussian concentrates.

    The mode of a chi-square distribution with `D` degrees of freedom, divided
    by `D`.

    Formula:

    ```python
    shell = 1 - 2 / embedding_dim
    ```

    Args:
        embedding_dim: Integer, at least 2. The size `D` of an embedding.

    Returns:
        Float in `[0, 1)`.

    Example:

    >>> shell(10)
    0.8
    """
    return 1.0 - 2.0 / embedding_dim


def initial_temperature(embedding_dim: int) -> float:
    """Returns the temperature at the start of training.

    Formula:

    ```python
    gamma_0 = 20 / (2 - shell(embedding_dim))
    ```

    Args:
        embedding_dim: Integer, at least 2. The size `D` of an embedding.

    Returns:
        Float, between 10 and 20.

    Example:

    >>> round(initial_temperature(10), 4)
    16.6667
    """
    return 20.0 / (2.0 - shell(embedding_dim))


def default_embedding_dim(num_classes: int) -> int:
    """Returns the size of the embedding for a number of classes.

    Twice as many dimensions as classes, as a power of two, within bounds:
    fewer than 128 train slowly, more than 1024 cost more than they gain.

    Formula:

    ```python
    D = min(max(2 ** ceil(log2(2 * num_classes)), 128), 1024)
    ```

    Args:
        num_classes: Integer, at least 2.

    Returns:
        Integer.

    Example:

    >>> default_embedding_dim(10), default_embedding_dim(150)
    (128, 512)
    """
    return min(max(1 << (2 * num_classes - 1).bit_length(), 128), 1024)


def normalized_features(features: Tensor) -> Tensor:
    """Bounds the length of features.

    Long features get one mean magnitude, so that the embedding depends on their
    direction alone. Features of a mean magnitude far below `0.1` are scaled
    by a constant and stay short: their embedding is near the origin, where a
    head abstains.

    Magnitudes are means of absolute values rather than root mean squares,
    which dropout raises: the features of training would be scaled otherwise
    than those of a prediction. The factor gives up to 256 long rectified
    Gaussian features a root mean square of one. More of them get a length of
    16 together: what a gradient step does to the layer behind grows with the
    squared length of its input, and at a usual learning rate of SGD training
    would diverge.

    Formula:

    ```python
    magnitude = mean(abs(features), axis=-1) + 0.1
    features / (sqrt(pi) * magnitude * sqrt(max(n / 256, 1)))
    ```

    Args:
        features: Tensor of shape `(..., n)`.

    Returns:
        Tensor of shape `(..., n)`.

    Example:

    >>> x = normalized_features(ops.array([[200.0, 0.0], [0.2, 0.0]]))
    >>> ops.convert_to_numpy(x).round(3)
    array([[1.127, 0.   ],
           [0.564, 0.   ]], dtype=float32)
    """
    num_features = features.shape[-1]
    total = ops.sum(ops.abs(features), axis=-1, keepdims=True)
    factor = math.sqrt(math.pi) * length_factor(num_features)
    return features / (factor * (total / num_features + SMALL_MAGNITUDE))


def length_factor(num_features: int) -> float:
    """Returns by how much features are too long, `sqrt(max(n / 256, 1))`.

    Args:
        num_features: Integer `n`.

    Returns:
        Float, at least one.

    Example:

    >>> length_factor(100), length_factor(1024)
    (1.0, 2.0)
    """
    return math.sqrt(max(num_features / MAX_SQUARED_LENGTH, 1.0))


def inverse_softplus(value: float) -> float:
    """Returns the number whose softplus is `value`.

    Formula:

    ```python
    inverse_softplus(value) = log(exp(value) - 1)
    ```

    Args:
        value: Positive float.

    Returns:
        Float.

    Example:

    >>> round(inverse_softplus(1.0), 4)
    0.5413
    """
    # exp(value) - 1 = exp(value) * (1 - exp(-value)) does not overflow.
    return value + math.log(-math.expm1(-value))


def abstain_bias(
    embedding_dim: int, num_classes: int | Tensor, label_smoothing: float
) -> Any:
    """Returns the logit of the abstain class, which a class must beat.

    The centroid of the abstain class is the origin, whose distance logit is
    zero once the common shift `gamma * |x|^2` is taken out. The bias places
    the boundary so that an embedding of unit squared norm on the shell around
    its centroid prefers its class to abstaining by exactly the odds that the
    smoothed label gives it over another class.

    Formula:

    ```python
    bias = initial_temperature * (1 - shell) - target_log_odds
    ```

    Args:
        embedding_dim: Integer, at least 2. The size `D` of an embedding.
        num_classes: Integer, at least 2. The number `K` of classes; or a
            scalar tensor of a floating dtype.
        label_smoothing: Float in `[0, 1)`.

    Returns:
        Float; a scalar tensor if `num_classes` is one.

    Example:

    >>> round(abstain_bias(10, 10, 0.1), 4)
    -1.1775
    """
    margin = initial_temperature(embedding_dim) * (1.0 - shell(embedding_dim))
    return margin - target_log_odds(num_classes, label_smoothing)


def target_log_odds(num_classes: int | Tensor, label_smoothing: float) -> Any:
    """Computes the log-odds of a class over another under a smoothed label.

    Formula:

    ```python
    log(p_hi / p_lo)
    p_hi = 1 - label_smoothing + label_smoothing / num_classes
    p_lo = label_smoothing / num_classes
    # without smoothing: p_hi = 0.99, p_lo = 0.01 / num_classes
    ```

    Args:
        num_classes: Integer, at least 2. The number `K` of classes; or a
            scalar tensor of a floating dtype.
        label_smoothing: Float in `[0, 1)`.

    Returns:
        Float; a scalar tensor if `num_classes` is one.

    Example:

    >>> round(target_log_odds(10, 0.1), 4)
    4.5109
    """
    if label_smoothing:
        p_hi = 1.0 - label_smoothing + label_smoothing / num_classes
        p_lo = label_smoothing / num_classes
    else:
        p_hi = 0.99
        p_lo = 0.01 / num_classes
    odds = p_hi / p_lo
    return ops.log(odds) if ops.is_tensor(odds) else math.log(odds)


def to_temperature(raw_gamma: Tensor) -> Tensor:
    """Maps a raw weight to a temperature, which is always positive.

    Formula:

    ```python
    gamma = max(softplus(raw_gamma), 1e-6)
    ```

    Args:
        raw_gamma: Tensor of any shape, the unconstrained weight.

    Returns:
        Tensor like `raw_gamma`.

    Example:

    >>> float(ops.round(to_temperature(ops.array(0.5413)), 3))
    1.0
    """
    if backend.standardize_dtype(raw_gamma.dtype) == "float64":
        # PyTorch's softplus jumps by 2e-9 at 20, its log-sigmoid nowhere.
        gamma = -ops.log_sigmoid(-raw_gamma)
    else:
        # A log-sigmoid loses half of its digits in onnxruntime.
        gamma = ops.softplus(raw_gamma)
    return tensors.bounded(gamma, MIN_TEMPERATURE, math.inf)


def centered(centroids: Tensor) -> Tensor:
    """Moves centroids so that their mean, the abstain class, is the origin.

    Formula:

    ```python
    c = centroids - mean(centroids, axis=0)
    ```

    Args:
        centroids: Tensor of shape `(K, D)`.

    Returns:
        Tensor of shape `(K, D)`; the gradient flows through the centring.

    Example:

    >>> ops.convert_to_numpy(
    ...     centered(ops.array([[1.0, 0.0], [3.0, 4.0]]))
    ... ).tolist()
    [[-1.0, -2.0], [1.0, 2.0]]
    """
    total = ops.sum(centroids, axis=0, keepdims=True)
    return centroids - total / axis_length(centroids, 0)


def mean_square(vectors: Tensor) -> Tensor:
    """Averages squares over components: the squared distance to the origin.

    Formula:

    ```python
    |v|^2 = mean(vectors ** 2, axis=-1)
    ```

    Args:
        vectors: Tensor of shape `(..., D)`.

    Returns:
        Tensor of shape `(..., 1)`.

    Example:

    >>> float(mean_square(ops.array([[3.0, 4.0]]))[0, 0])
    12.5
    """
    total = tensors.sum_columns(vectors * vectors)
    return total / vectors.shape[-1]


def class_logits(
    embeddings: Tensor, centroids: Tensor, temperature: Tensor
) -> Tensor:
    """Computes distance logits, up to the shift that softmax ignores.

    Formula:

    ```python
    s_k = gamma * (2 * dot(x, c_k) / D - |c_k|^2)
        = -gamma * |x - c_k|^2 + gamma * |x|^2
    ```

    One matrix product; no pairwise difference is ever formed.

    Args:
        embeddings: Tensor `x` of shape `(..., D)`.
        centroids: Tensor of centred centroids of shape `(K, D)`.
        temperature: Tensor `gamma`, a scalar.

    Returns:
        Tensor of shape `(..., K)`.

    Example:

    >>> x = ops.array([[1.0, 1.0]])
    >>> c = ops.array([[1.0, 1.0], [-1.0, -1.0]])
    >>> ops.convert_to_numpy(class_logits(x, c, 2.0)).tolist()
    [[2.0, -6.0]]
    """
    # The factors go into the small operands, not into the (..., K) product.
    scaled = embeddings * (temperature * (2.0 / centroids.shape[-1]))
    offset = temperature * ops.squeeze(mean_square(centroids), axis=-1)
    return scaled @ ops.transpose(centroids) - offset


def squared_radii(
    logits: Tensor, squared_norm: Tensor, temperature: Tensor
) -> Tensor:
    """Recovers the squared distances to the centroids from the logits.

    Formula:

    ```python
    r_k^2 = |x|^2 - s_k / gamma
    ```

    Args:
        logits: Tensor `s` of shape `(..., K)`.
        squared_norm: Tensor `|x|^2` of shape `(..., 1)`.
        temperature: Tensor `gamma` of shape `(..., 1)` or a scalar.

    Returns:
        Tensor of shape `(..., K)`. Rounding can leave a value that should be
        zero slightly negative.

    Example:

    >>> r2 = squared_radii(ops.array([[2.0, -6.0]]), ops.array([[1.0]]), 2.0)
    >>> ops.convert_to_numpy(r2).tolist()
    [[0.0, 4.0]]
    """
    return squared_norm - logits / temperature


def floored_log(squared_radius: Tensor) -> Tensor:
    """Takes a logarithm that follows its tangent below `RADIUS_FLOOR`.

    Formula:

    ```python
    log(r^2)                                      if r^2 >= floor
    log(floor) + (r^2 - floor) / floor            otherwise
    ```

    The bare logarithm diverges when an embedding meets its centroid. The
    tangent keeps the push outwards, bounds it, and is defined for the slightly
    negative squared radii that rounding produces.

    Args:
        squared_radius: Tensor of any shape.

    Returns:
        Tensor like `squared_radius`.

    Example:

    >>> round(float(floored_log(ops.array(0.0))), 4)
    -7.9078
    """
    floored = tensors.bounded(squared_radius, RADIUS_FLOOR, math.inf)
    return ops.log(floored) + (squared_radius - floored) / RADIUS_FLOOR


def radial_nll(squared_radius: Tensor, embedding_dim: int | Tensor) -> Tensor:
    """Computes the negative log density of a radius, per dimension.

    Formula:

    ```python
    R(r^2) = r^2 / 2 - (1 / 2 - 1 / D) * log(r^2)
    ```

    The radius of a D-dimensional unit Gaussian follows a chi distribution;
    this is its negative log density in `D * r^2`, divided by `D`, without the
    constant. It is smallest on the shell, `r^2 = 1 - 2 / D`. The logarithm is
    `floored_log`.

    Args:
        squared_radius: Tensor `r^2` of any shape.
        embedding_dim: `D`, a number or a tensor that broadcasts against
            `squared_radius`.

    Returns:
        Tensor like `squared_radius`.

    Example:

    >>> int(ops.argmin(radial_nll(ops.array([0.4, 0.8, 1.6]), 10)))
    1
    """
    volume = 0.5 - 1.0 / embedding_dim
    return 0.5 * squared_radius - volume * floored_log(squared_radius)


def radial_slope(squared_radius: Tensor, embedding_dim: int | Tensor) -> Tensor:
    """Differentiates `radial_nll` with respect to the squared radius.

    Formula:

    ```python
    R'(r^2) = 1 / 2 - (1 / 2 - 1 / D) / max(r^2, floor)
    ```

    Args:
        squared_radius: Tensor `r^2` of any shape.
        embedding_dim: `D`, a number or a tensor that broadcasts against
            `squared_radius`.

    Returns:
        Tensor like `squared_radius`; zero on the shell.

    Example:

    >>> round(float(radial_slope(ops.array(2.0), 4)), 4)
    0.375
    """
    volume = 0.5 - 1.0 / embedding_dim
    floored = tensors.bounded(squared_radius, RADIUS_FLOOR, math.inf)
    return 0.5 - volume / floored


def log_probabilities(logits: Tensor, abstain_logit: Tensor) -> Tensor:
    """Computes log-probabilities of the classes and of abstaining.

    Formula:

    ```python
    log_p = log_softmax([s_1, ..., s_K, a])
    ```

    Args:
        logits: Tensor `s` of shape `(..., K)`.
        abstain_logit: Tensor `a` of shape `(..., 1)`.

    Returns:
        Tensor of shape `(..., K + 1)`, abstain last.

    Example:

    >>> log_p = log_probabilities(ops.array([[0.0, 0.0]]), ops.array([[0.0]]))
    >>> ops.convert_to_numpy(ops.exp(log_p)).round(4)
    array([[0.3333, 0.3333, 0.3333]], dtype=float32)
    """
    return ops.log_softmax(ops.concatenate([logits, abstain_logit], axis=-1))


def cross_entropy(
    targets: Tensor, logits: Tensor, abstain_logit: Tensor
) -> Tensor:
    """Computes cross-entropy with soft targets over classes and abstaining.

    Formula:

    ```python
    H = -sum_k q_k * log softmax([s_1, ..., s_K, a])_k
    ```

    Abstaining competes in the softmax and is never a target: it wins by
    geometry alone.

    Args:
        targets: Tensor `q` of shape `(..., K)`.
        logits: Tensor `s` of shape `(..., K)`.
        abstain_logit: Tensor `a` of shape `(..., 1)`.

    Returns:
        Tensor of shape `(..., 1)`.

    Example:

    >>> h = cross_entropy(
    ...     ops.array([[1.0, 0.0]]), ops.array([[0.0, 0.0]]), ops.array([[0.0]])
    ... )
    >>> round(float(h[0, 0]), 4)
    1.0986
    """
    log_p = log_probabilities(logits, abstain_logit)[..., :-1]
    return -ops.sum(targets * log_p, axis=-1, keepdims=True)
