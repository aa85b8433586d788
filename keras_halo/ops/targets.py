"""Soft targets of the classes, made of labels and distances."""

from keras import ops

from keras_halo.ops.tensors import bounded
from keras_halo.utils.shapes import axis_length
from keras_halo.utils.types import Tensor

# A target mass of exp(-60) is nothing beside one, see `class_nearness`.
MAX_EXPONENT = 60.0


def smoothed_targets(labels: Tensor, label_smoothing: float) -> Tensor:
    """Returns the soft targets of plain label smoothing over the classes.

    Formula:

    ```python
    q = (1 - label_smoothing) * labels + label_smoothing / K * sum(labels)
    ```

    The abstain class gets no target mass, and a row without a label has none
    at all.

    Args:
        labels: Tensor of shape `(..., K)`, a label distribution, or zeros.
        label_smoothing: Float in `[0, 1)`.

    Returns:
        Tensor of shape `(..., K)`.

    Example:

    >>> q = smoothed_targets(ops.array([[1.0, 0.0]]), 0.5)
    >>> ops.convert_to_numpy(q).tolist()
    [[0.75, 0.25]]
    """
    if not label_smoothing:
        return labels
    spread = label_smoothing / axis_length(labels, -1)
    total = ops.sum(labels, axis=-1, keepdims=True)
    return labels * (1.0 - label_smoothing) + spread * total


def class_nearness(
    logits: Tensor,
    squared_norm: Tensor,
    temperature: Tensor,
    label_smoothing: float,
) -> Tensor:
    """Measures how near the classes are, as unnormalized target mass.

    Formula:

    ```python
    e_k = exp(min(s_k - gamma * |x|^2, 0) / label_smoothing)
        = exp(-gamma * r_k^2 / label_smoothing)
    ```

    The exponent is bounded by -60, where the mass is nothing beside one:
    processors take many times longer where `exp`, or a product, underflows.

    Args:
        logits: Tensor `s` of shape `(..., K)`.
        squared_norm: Tensor `|x|^2` of shape `(..., 1)`.
        temperature: Tensor `gamma` of shape `(..., 1)` or a scalar.
        label_smoothing: Float in `(0, 1)`.

    Returns:
        Tensor of shape `(..., K)`.

    Example:

    >>> e = class_nearness(ops.array([[2.0, 1.9]]), 1.0, 2.0, 0.1)
    >>> ops.convert_to_numpy(e).round(3)
    array([[1.   , 0.368]], dtype=float32)
    """
    distances = bounded(
        temperature * squared_norm - logits,
        0.0,
        MAX_EXPONENT * label_smoothing,
    )
    distances *= -1.0 / label_smoothing
    return ops.exp(distances)


def distilled_targets(
    labels: Tensor,
    logits: Tensor,
    squared_norm: Tensor,
    temperature: Tensor,
    label_smoothing: float,
) -> Tensor:
    """Computes soft targets from how near the network has the other classes.

    Formula for the one-hot label `y`:

    ```python
    z_y = 0
    z_k = min(s_k - gamma * |x|^2, 0) / label_smoothing    for k != y
    q = softmax(z)
    ```

    A label distribution `Y` gets the mixture `sum_y Y_y q^(y)`, which needs no
    K x K table: with `e_k = exp(z_k)` taken for every class,

    ```python
    Z_y = 1 + sum_{k != y} e_k
    W = sum_y Y_y / Z_y
    q_k = Y_k / Z_k + e_k * (W - Y_k / Z_k)
    ```

    The abstain class gets no target mass, and no gradient flows into targets.

    Args:
        labels: Tensor `Y` of shape `(..., K)`, a label distribution.
        logits: Tensor `s` of shape `(..., K)`.
        squared_norm: Tensor `|x|^2` of shape `(..., 1)`.
        temperature: Tensor `gamma` of shape `(..., 1)` or a scalar.
        label_smoothing: Float in `[0, 1)`. Zero gives the labels themselves.

    Returns:
        Tensor of shape `(..., K)`.

    Example:

    >>> q = distilled_targets(
    ...     ops.array([[1.0, 0.0]]), ops.array([[2.0, 1.9]]), 1.0, 2.0, 0.1
    ... )
    >>> ops.convert_to_numpy(q).round(3)
    array([[0.731, 0.269]], dtype=float32)
    """
    if not label_smoothing:
        return labels
    nearness = class_nearness(
        logits, squared_norm, temperature, label_smoothing
    )
    total = ops.sum(nearness, axis=-1, keepdims=True)
    own = labels / (1.0 + (total - nearness))
    weight = ops.sum(own, axis=-1, keepdims=True)
    return ops.stop_gradient(own + nearness * (weight - own))
