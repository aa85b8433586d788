"""What the Keras metrics read off packed scores, flattened into samples.

Every position of a token or pixel head is a sample of its own. Weights and
masks are broadcast over positions as Keras's own metrics do it.
"""

import collections

import numpy as np
from keras import ops
from keras.src import backend

from keras_halo.ops import packing
from keras_halo.ops.labels import (
    are_integer_labels,
    check_distributions,
    labels_and_scores,
)
from keras_halo.ops.model_output import is_symbolic_or_tensor
from keras_halo.utils.checks import number_array

Samples = collections.namedtuple(
    "Samples", ["logits", "labels", "weights", "packed"]
)
Samples.__doc__ = """A batch of samples, positions flattened.

Args:
    logits: Tensor of shape `(N, K + 1)`, those of the classes and, last, of
        abstaining.
    labels: Tensor of integers of shape `(N,)`, or a distribution of shape
        `(N, K)`, or `None`. An integer out of range belongs to no class.
    weights: Tensor of shape `(N,)`, or `None` if every sample counts once.
    packed: Boolean tensor of shape `(N,)`, false where a row shows that it did
        not come from a HALO head.
"""


def to_samples(
    y_true, y_pred, sample_weight=None, ignore_class=None, dtype="float32"
):
    """Flattens labels, packed scores, weights and mask into samples.

    Args:
        y_true: Labels: integers of shape `(...)` or `(..., 1)`, or a
            distribution of shape `(..., K)`, or `None` for no labels.
        y_pred: Packed scores of shape `(..., K + 6)`; a mask that Keras put on
            them is honoured.
        sample_weight: Optional weights of shape `(...)` or `(..., 1)`, or of
            fewer axes, which are those of the front. Defaults to `None`.
        ignore_class: Optional integer, a label that does not count. Needs
            integer labels. Defaults to `None`.
        dtype: String, the dtype of logits and weights, `"float32"` or
            `"float64"`.

    Returns:
        `Samples`.

    Raises:
        ValueError: If shapes do not fit, a NumPy array holds no packed scores,
            or `ignore_class` is given without integer labels.

    Example:

    >>> scores = keras_halo.HALODense(3)(np.zeros((2, 5, 8), "float32"))
    >>> samples = to_samples(None, scores, sample_weight=np.array([1.0, 2.0]))
    >>> tuple(samples.logits.shape), tuple(samples.weights.shape)
    ((10, 4), (10,))
    """
    y_true, y_pred = labels_and_scores(y_true, y_pred)
    mask = backend.get_keras_mask(y_pred)
    y_pred = ops.cast(ops.convert_to_tensor(y_pred), dtype)
    num_classes = packing.count_classes(y_pred.shape)

    labels = counted = None
    if y_true is not None:
        _check_integral(y_true, y_pred.shape)
        y_true = ops.convert_to_tensor(y_true)
        if are_integer_labels(y_true.shape, y_pred.shape):
            labels = ops.reshape(y_true, (-1,))
            is_float = "float" in backend.standardize_dtype(labels.dtype)
            integral = labels == ops.floor(labels) if is_float else None
            labels = ops.cast(labels, "int32")
            if is_float:
                # A label of 0.9 belongs to no class, and is none to ignore.
                none = -1 if ignore_class != -1 else -2
                labels = ops.where(integral, labels, none)
        else:
            labels = ops.cast(ops.reshape(y_true, (-1, num_classes)), dtype)
            # A row of zeros has no part, as in the loss.
            counted = ops.cast(ops.sum(labels, axis=-1) > 0.0, dtype)
    if ignore_class is not None:
        _check_ignorable(labels, ignore_class)

    template = y_pred[..., 0]
    weights = None
    if sample_weight is not None:
        weights = _spread(sample_weight, template, "sample_weight")
    if mask is not None:
        mask = _spread(mask, template, "the mask of y_pred")
        weights = mask if weights is None else weights * mask
    if weights is not None:
        weights = ops.reshape(weights, (-1,))
    if ignore_class is not None:
        counted = ops.cast(ops.not_equal(labels, ignore_class), dtype)
    if counted is not None:
        weights = counted if weights is None else weights * counted

    flat = ops.reshape(y_pred, (-1, y_pred.shape[-1]))
    parts = packing.unpack(flat)
    packed = ops.logical_and(
        ops.logical_and(parts.squared_norm >= 0.0, parts.temperature > 0.0),
        parts.embedding_dim >= 2.0,
    )
    return Samples(
        logits=packing.answer_logits(flat),
        labels=labels,
        weights=weights,
        packed=ops.squeeze(packed, axis=-1),
    )


def _check_integral(y_true, y_pred_shape):
    if not isinstance(y_true, np.ndarray):
        return
    if not are_integer_labels(y_true.shape, y_pred_shape):
        check_distributions(y_true)
        return
    if y_true.dtype.kind != "f":
        return
    fractional = y_true != np.floor(y_true)
    if fractional.any():
        raise ValueError(
            "Labels must be integers. Received: "
            f"{int(fractional.sum())} of {y_true.size} that are not, among "
            f"them {y_true[fractional].flat[0]}. Pass a distribution over the "
            "classes, of shape `(..., K)`, for soft labels."
        )


def check_labels_given(y_true, reader):
    """Raises `ValueError` if there are no labels.

    Args:
        y_true: Labels or `None`.
        reader: String, the name of the metric that reads them.
    """
    if y_true is None:
        raise ValueError(
            f"`{reader}` needs labels. Received: y_true=None. Pass the labels "
            "of the samples."
        )


def class_probabilities(logits, renormalize):
    """Probabilities of the classes alone.

    Formula:

    ```python
    renormalize=True:    p = softmax([s_1, ..., s_K])
    renormalize=False:   p = softmax([s_1, ..., s_K, b])[:K]
    ```

    Args:
        logits: Tensor of shape `(N, K + 1)`, that of abstaining last.
        renormalize: Boolean, whether the mass of abstaining goes to the
            classes.

    Returns:
        Tensor of shape `(N, K)`.

    Example:

    >>> logits = ops.array([[0.0, 0.0, 0.0]])
    >>> ops.convert_to_numpy(class_probabilities(logits, True)).tolist()
    [[0.5, 0.5]]
    """
    if renormalize:
        return _softmax(logits[:, :-1])
    return _softmax(logits)[:, :-1]


def _softmax(logits):
    # TensorFlow's own makes 0.49999997 of two equal logits, on the wrong side
    # of a bin's edge.
    exponentials = ops.exp(logits - ops.max(logits, axis=-1, keepdims=True))
    return exponentials / ops.sum(exponentials, axis=-1, keepdims=True)


def one_hot(labels, num_classes, dtype):
    """One-hot rows of integer labels; zeros for a label out of range.

    Unlike `ops.one_hot`, whose answer to such labels differs by backend.

    Args:
        labels: Integer tensor of shape `(N,)`.
        num_classes: Integer.
        dtype: String.

    Returns:
        Tensor of shape `(N, num_classes)`.

    Example:

    >>> rows = one_hot(ops.array([1, 255]), 2, "float32")
    >>> ops.convert_to_numpy(rows).tolist()
    [[0.0, 1.0], [0.0, 0.0]]
    """
    classes = ops.arange(num_classes, dtype="int32")
    return ops.cast(ops.equal(labels[:, None], classes), dtype)


def are_distributions(labels):
    """Tells label distributions from integer labels, both flattened."""
    return len(labels.shape) == 2


def _check_ignorable(labels, ignore_class):
    if labels is None or are_distributions(labels):
        received = "no labels" if labels is None else "a label distribution"
        raise ValueError(
            f"`ignore_class` needs integer labels. Received: {received} with "
            f"ignore_class={ignore_class}. Pass integer labels, or give the "
            "samples to ignore a `sample_weight` of zero."
        )


def _spread(weights, template, argument):
    """Broadcasts weights over the positions of a sample."""
    if not is_symbolic_or_tensor(weights):
        weights = number_array(weights, argument)
    weights = ops.cast(ops.convert_to_tensor(weights), template.dtype)
    shape = tuple(weights.shape)
    rank = len(template.shape)
    if len(weights.shape) == rank + 1 and weights.shape[-1] == 1:
        weights = ops.squeeze(weights, axis=-1)
    while len(weights.shape) < rank:
        weights = ops.expand_dims(weights, axis=-1)
    fits = len(weights.shape) == rank and all(
        a is None or b is None or a in (1, b)
        for a, b in zip(weights.shape, template.shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"Expected {argument} of shape {tuple(template.shape)}, or of its "
            f"first axes. Received: shape={shape}. Give every sample, or every "
            "position of it, one weight."
        )
    return weights * ops.ones_like(template)
