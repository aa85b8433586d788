"""What the Keras metrics read off packed scores, flattened into samples.

Every position of a token or pixel head is a sample of its own. Weights and
masks are broadcast over positions as Keras's own metrics do it.
"""

import collections

import numpy as np
from keras import ops

from keras_halo.ops import packing
from keras_halo.ops.labels import (
    are_distributions as distributions_in,
)
from keras_halo.ops.labels import (
    are_integer_labels,
    check_ignorable,
    label_tensor,
    labels_and_scores,
    read_labels,
)
from keras_halo.ops.tensors import max_of_rows
from keras_halo.utils.keras_private import mask_of
from keras_halo.utils.weights import weights_of_positions

Samples = collections.namedtuple(
    "Samples", ["logits", "labels", "weights", "packed"]
)
Samples.__doc__ = """A batch of samples, positions flattened.

Args:
    logits: Tensor of shape `(N, K + 1)`, those of the classes and, last, of
        abstaining.
    labels: Tensor of integers of shape `(N,)`, or a distribution of shape
        `(N, K)`, or `None`. An integer out of range belongs to no class.
    weights: Tensor of shape `(N,)`, or `None` if every sample counts once. NaN
        where a sample counts and its label is neither an integer nor a
        distribution.
    packed: Boolean tensor of shape `(N,)`, false where a row shows that it did
        not come from a HALO head.
"""

# How many nats ahead of the best class abstaining is taken to be at most.
_MOST_AHEAD = 20.0


def to_samples(
    y_true, y_pred, sample_weight=None, ignore_class=None, dtype="float32"
):
    """Flattens labels, packed scores, weights and mask into samples.

    Args:
        y_true: Labels: integers of shape `(...)` or `(..., 1)`, or a
            distribution of shape `(..., K)`, or `None` for no labels.
        y_pred: Packed scores of shape `(..., packed_width)`; a mask that Keras
            put on them is honoured.
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
    mask = mask_of(y_pred)
    y_pred = ops.cast(ops.convert_to_tensor(y_pred), dtype)
    num_classes = packing.count_classes(y_pred.shape)

    labels = counted = None
    if y_true is not None:
        labels, are_integers = _read_labels(y_true, y_pred.shape, num_classes)
        if are_integers:
            labels = _whole(ops.reshape(labels, (-1,)), ignore_class)
        else:
            labels = ops.cast(ops.reshape(labels, (-1, num_classes)), dtype)
            counted = _share_of_rows(labels)
    check_ignorable(
        ignore_class,
        labels is not None and not are_distributions(labels),
        "no labels" if labels is None else "a label distribution",
    )

    template = ops.ones_like(y_pred[..., 0])
    weights = weights_of_positions(sample_weight, mask, template)
    if weights is not None:
        weights = ops.reshape(weights, (-1,))
    if ignore_class is not None:
        counted = ops.cast(ops.not_equal(labels, ignore_class), dtype)
    if weights is None:
        weights = counted
    elif counted is not None:
        # What does not count may hold anything.
        nothing = ops.equal(weights, 0.0)
        weights = ops.where(nothing, 0.0, weights * counted)

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


def readable_weights(samples):
    """Weights that are NaN where a sample counts and cannot be read.

    Scores of another layer, or of a diverged model, and labels that are none
    must not pass for a result; what does not count may hold anything.

    Args:
        samples: `Samples`.

    Returns:
        Tensor of shape `(N,)`.

    Example:

    >>> samples = to_samples(None, ops.ones((2, 9)))
    >>> ops.convert_to_numpy(readable_weights(samples)).tolist()
    [nan, nan]
    """
    weights = samples.weights
    if weights is None:
        weights = ops.ones_like(samples.logits[:, 0])
    return ops.where(
        ops.logical_or(samples.packed, ops.equal(weights, 0.0)),
        weights,
        float("nan"),
    )


def _read_labels(y_true, y_pred_shape, num_classes):
    if isinstance(y_true, (np.ndarray, list, tuple)):
        are_integer_labels(np.shape(y_true), y_pred_shape)
        y_true = read_labels(
            y_true, y_pred_shape[:-1], num_classes, any_integer=True
        )
    return label_tensor(y_true, y_pred_shape)


def _share_of_rows(labels):
    """Which rows of labels count, as in the loss.

    One for a distribution, zero for a row of zeros, which has no part, and NaN
    for any other row.
    """
    good = ops.squeeze(distributions_in(labels), axis=-1)
    share = ops.cast(ops.sum(labels, axis=-1) > 0.0, labels.dtype)
    return ops.where(good, share, float("nan"))


def _whole(labels, ignore_class):
    """Labels in int32; one that int32 cannot hold is of no class."""
    whole = ops.cast(labels, "int32")
    # A label of 0.9 is none to ignore either.
    none = -1 if ignore_class != -1 else -2
    is_same = ops.equal(ops.cast(whole, labels.dtype), labels)
    return ops.where(is_same, whole, none)


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
    renormalize=False:   p = softmax([s_1, ..., s_K, min(a, max(s) + 20)])[:K]
    ```

    The bound leaves the classes a mass of at least 2e-9, however far abstaining
    is ahead. So the largest column stays that of the best class, and rows have
    a sum to be divided by. Less than 1e-9 Keras's F-scores take for zero; what
    is less than 1e-7 its other metrics cannot tell from zero.

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
    classes, abstaining = logits[:, :-1], logits[:, -1:]
    if renormalize:
        return _softmax(classes)
    farthest = max_of_rows(classes) + _MOST_AHEAD
    bounded = ops.minimum(abstaining, farthest)
    return _softmax(ops.concatenate([classes, bounded], axis=-1))[:, :-1]


def _softmax(logits):
    # TensorFlow's own makes 0.49999997 of two equal logits, on the wrong side
    # of a bin's edge.
    exponentials = ops.exp(logits - max_of_rows(logits))
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
