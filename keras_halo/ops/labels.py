"""Labels of every kind, read from arrays and from tensors.

A label is an integer, or a distribution over the classes, one-hot or soft.
Which of them is told by the shape. Values of arrays are checked; those of
tensors, which cannot be inspected without a stop, are left to the formulas.
"""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_halo.ops import packing
from keras_halo.ops.model_output import is_symbolic_or_tensor, read_model_output
from keras_halo.ops.tensors import min_of_rows
from keras_halo.utils.checks import label_array, number_array

# Soft labels may come through 16 bits.
_SUM_TOLERANCE = 0.01

# The label of an input on which a model or a rule abstains.
ABSTAINED = -1


def are_integer_labels(y_true_shape, y_pred_shape):
    """Tells integer labels from a label distribution by their shape.

    Args:
        y_true_shape: Tuple, the shape of the labels: `(...)` or `(..., 1)` for
            integers, `(..., K)` for a distribution.
        y_pred_shape: Tuple, the shape `(..., packed_width)` of the packed
            scores. The width may be `None`, where a batch of keys are the
            classes.

    Returns:
        Boolean, true for integer labels.

    Raises:
        ValueError: If the shapes do not fit each other.

    Example:

    >>> are_integer_labels((8, 1), (8, 14))
    True
    >>> are_integer_labels((8, 10), (8, packing.packed_width(10)))
    False
    """
    num_classes = None
    if tuple(y_pred_shape[-1:]) != (None,):
        num_classes = packing.count_classes(y_pred_shape)
    batch_shape = tuple(y_pred_shape[:-1])
    are_integers = _are_integers(y_true_shape, batch_shape, num_classes)
    if are_integers is not None:
        return are_integers
    raise ValueError(
        f"Labels do not fit the packed scores, which have {num_classes} "
        "classes: expected integers of shape "
        f"{batch_shape} or {(*batch_shape, 1)}, or a distribution of shape "
        f"{(*batch_shape, num_classes)}. Received: y_true.shape="
        f"{tuple(y_true_shape)}, y_pred.shape={tuple(y_pred_shape)}. Check "
        "`units` of `keras_halo.HALODense`, which must be the last layer of "
        "the model, against the labels."
    )


def _are_integers(shape, leading_shape, num_classes):
    """Whether labels of a shape are integers; `None` if they do not fit."""
    rank = len(leading_shape)
    fits = len(shape) in (rank, rank + 1) and all(
        a is None or b is None or a == b
        for a, b in zip(shape, leading_shape, strict=False)
    )
    if not fits:
        return None
    if len(shape) == rank or shape[-1] == 1:
        return True
    if num_classes is None or shape[-1] in (num_classes, None):
        return False
    return None


def label_tensor(y_true, y_pred_shape):
    """Reads labels into a tensor, with one axis less for integers.

    Args:
        y_true: Labels: integers of shape `(...)` or `(..., 1)`, or a
            distribution of shape `(..., K)`; a tensor or an array.
        y_pred_shape: Tuple, the shape `(..., packed_width)` of the packed
            scores.

    Returns:
        Tuple: a tensor of shape `(...)` or `(..., K)`, and whether the labels
        are integers.

    Raises:
        ValueError: If the shapes do not fit each other.

    Example:

    >>> labels, are_integers = label_tensor([[2], [0]], (2, 9))
    >>> tuple(labels.shape), are_integers
    ((2,), True)
    """
    y_true = ops.convert_to_tensor(y_true)
    are_integers = are_integer_labels(y_true.shape, y_pred_shape)
    if are_integers and len(y_true.shape) == len(y_pred_shape):
        y_true = ops.squeeze(y_true, axis=-1)
    return y_true, are_integers


def fitting_labels(labels, leading_shape, num_classes, where="the data"):
    """Reads labels into an array by their shape alone; values may be any.

    Args:
        labels: Integers of shape `leading_shape` or `(*leading_shape, 1)`, or
            a distribution of shape `(*leading_shape, num_classes)`.
        leading_shape: Tuple, the shape that one label a sample has.
        num_classes: Integer `K`, or `None` where it is not known.
        where: String, what the labels belong to in the words of an error.

    Returns:
        Array of shape `leading_shape` for integers, or
        `(*leading_shape, num_classes)` for distributions.

    Raises:
        ValueError: If labels are no numbers, or the shape does not fit.

    Example:

    >>> fitting_labels([[-1], [7]], (2,), 3).tolist()
    [-1, 7]
    """
    labels = label_array(labels)
    leading_shape = tuple(leading_shape)
    are_integers = _are_integers(labels.shape, leading_shape, num_classes)
    if are_integers is None:
        by_class = (*leading_shape, num_classes or "K")
        by_class = f"({', '.join(map(str, by_class))})"
        raise ValueError(
            f"Labels do not fit {where}: expected integers of shape "
            f"{leading_shape} or {(*leading_shape, 1)}, or a distribution of "
            f"shape {by_class}. Received: shape={labels.shape}. Pass one label "
            "for every sample, and at least one sample."
        )
    if are_integers and labels.ndim > len(leading_shape):
        labels = labels[..., 0]
    return labels


def read_labels(
    labels,
    leading_shape,
    num_classes,
    ignore_class=None,
    any_integer=False,
    remedy=None,
):
    """Reads labels into an array and checks their values.

    Args:
        labels: As in `fitting_labels`.
        leading_shape: Tuple, the shape that one label a sample has.
        num_classes: Integer `K`, or `None` where it is not known.
        ignore_class: Optional integer, one more label that is allowed.
            Defaults to `None`.
        any_integer: Boolean, whether integers that name no class are allowed.
            Defaults to `False`.
        remedy: Optional string, what to do about labels out of range. Defaults
            to `None`, which means `remedy_for_labels`.

    Returns:
        Integer array of shape `leading_shape`, or a distribution of shape
        `(*leading_shape, num_classes)`, rows of zeros allowed.

    Raises:
        ValueError: If the shape does not fit, an integer label is out of
            range, or a row is no distribution.

    Example:

    >>> read_labels([0.0, 255.0], (2,), 3, ignore_class=255).tolist()
    [0, 255]
    """
    labels = fitting_labels(labels, leading_shape, num_classes)
    if labels.ndim > len(leading_shape):
        check_distributions(labels)
        return labels
    if not any_integer:
        return _class_numbers(labels, num_classes, ignore_class, remedy)
    fractional = labels != np.floor(labels)
    if fractional.any():
        raise ValueError(
            "Labels must be integers. Received: "
            f"{int(fractional.sum())} of {labels.size} that are not, among "
            f"them {labels[fractional].flat[0]}. Pass a distribution over the "
            "classes, of shape `(..., K)`, for soft labels."
        )
    # Tensors of JAX have 32 bits, in which a larger one would be another.
    limits = np.iinfo("int32")
    return np.clip(labels, limits.min, limits.max).astype("int32")


def _class_numbers(labels, num_classes, ignore_class=None, remedy=None):
    limit = np.inf if num_classes is None else num_classes
    wrong = ~((labels >= 0) & (labels < limit)) | (labels != np.floor(labels))
    if ignore_class is not None:
        wrong &= labels != ignore_class
    if wrong.any():
        raise ValueError(
            f"Labels must be integers in [0, {limit})"
            + ("" if ignore_class is None else f" or {ignore_class}")
            + f". Received: {int(wrong.sum())} of {wrong.size} labels out of "
            f"range, among them {labels[wrong].flat[0]}. "
            + (remedy or remedy_for_labels(labels, num_classes))
        )
    return labels.astype("int64")


def labels_and_scores(y_true, y_pred):
    """What a loss or a metric is called with, in order and readable.

    Args:
        y_true: Labels, a tensor or what NumPy makes an array of; or `None`.
        y_pred: Packed scores, likewise; or the dictionary of a model of
            `keras_halo.fit_class_gaussians`.

    Returns:
        Tuple of both: a NumPy array for what is no tensor, `None` for no
        labels.

    Raises:
        ValueError: If one of them holds no numbers, the two are swapped, or
            the second shows that it holds no packed scores.

    Example:

    >>> labels_and_scores(np.zeros((2, 9)), [0, 1])
    Traceback (most recent call last):
        ...
    ValueError: `y_pred` must be packed scores in floating point. Received: ...
    """
    if isinstance(y_pred, Mapping):
        y_pred = read_model_output(y_pred, "y_pred").scores
    if not is_symbolic_or_tensor(y_pred):
        y_pred = number_array(
            y_pred, "y_pred", "Pass what `keras_halo.HALODense` emits."
        )
    if y_true is not None and not is_symbolic_or_tensor(y_true):
        y_true = label_array(y_true, "y_true")
    check_order(y_true, y_pred)
    packing.check_precision(y_pred.dtype, "y_pred")
    if isinstance(y_pred, np.ndarray):
        packing.check_packed(y_pred, argument="y_pred")
    return y_true, y_pred


def check_order(y_true, y_pred, first="Labels", layer="HALODense"):
    """Raises `ValueError` for scores in the place of labels.

    Args:
        y_true: Tensor or array, or `None` for no labels.
        y_pred: Tensor or array.
        first: String, what an error says belongs first.
        layer: String, the layer that emits what belongs second.

    Example:

    >>> check_order(np.zeros((2, 9)), np.zeros(2))
    Traceback (most recent call last):
        ...
    ValueError: `y_true` has the shape of packed scores and `y_pred` that of ...
    """
    order = f"{first} come first: `loss(y_true, y_pred)`."
    dtype = keras.backend.standardize_dtype(y_pred.dtype)
    if "float" not in dtype:
        raise ValueError(
            "`y_pred` must be packed scores in floating point. Received: "
            f"dtype={dtype}, shape={tuple(y_pred.shape)}. {order}"
        )
    if y_true is None:
        return
    labels, scores = tuple(y_true.shape), tuple(y_pred.shape)
    width = labels[-1] if labels else None
    if width is None or width < packing.MIN_COLUMNS:
        return
    num_classes = width - packing.NUM_EXTRA_COLUMNS
    if scores in (
        labels[:-1],
        (*labels[:-1], 1),
        (*labels[:-1], num_classes),
    ):
        raise ValueError(
            "`y_true` has the shape of packed scores and `y_pred` that of "
            f"their labels: they seem to be swapped. Received: y_true.shape="
            f"{labels}, y_pred.shape={scores}. {order} Packed scores are what "
            f"`keras_halo.{layer}` emits."
        )


def are_distributions(labels):
    """Which rows are distributions over the classes, or zero.

    Args:
        labels: Tensor or array of floats of shape `(..., K)`.

    Returns:
        Booleans of shape `(..., 1)`: true where no entry is negative and the
        sum is one to within 1 %, or zero.

    Example:

    >>> are_distributions(np.array([[0.5, 0.5], [1.0, 1.0]])).tolist()
    [[True], [False]]
    """
    total = labels.sum(-1) if isinstance(labels, np.ndarray) else None
    if total is not None:
        total, least = total[..., None], labels.min(axis=-1)[..., None]
    else:
        total = ops.sum(labels, axis=-1, keepdims=True)
        least = min_of_rows(labels)
    is_one = (total > 1.0 - _SUM_TOLERANCE) & (total < 1.0 + _SUM_TOLERANCE)
    return (is_one | (total == 0.0)) & (least >= 0.0)


def check_distributions(labels):
    """Raises `ValueError` unless rows are distributions, or zero.

    Args:
        labels: NumPy array of shape `(..., K)`.
    """
    good = are_distributions(np.asarray(labels, "float64"))
    if not good.all():
        row = np.asarray(labels, "float64")[~good[..., 0]][0]
        raise ValueError(
            "Rows of labels must be distributions over the classes: not "
            f"negative, with a sum of one. Received: {int((~good).sum())} of "
            f"{good.size} rows that are not, among them one with a sum of "
            f"{row.sum():.4g}. For labels of which several may hold at once "
            "the HALO loss has no meaning; otherwise divide rows by their sum."
        )


def class_indices(labels, num_classes, leading_shape, remedy=None):
    """Integer labels from integer or one-hot labels, checked.

    Args:
        labels: Integers of shape `leading_shape` or `(*leading_shape, 1)`, or
            one-hot of shape `(*leading_shape, num_classes)`.
        num_classes: Integer, the number `K` of classes, or `None` where it is
            not known.
        leading_shape: Tuple, the shape that one label a sample has.
        remedy: As in `read_labels`.

    Returns:
        Integer array of shape `leading_shape`.

    Raises:
        ValueError: If the shape does not fit, a label is out of range, or a
            row is not one-hot.

    Example:

    >>> class_indices([[0, 1], [1, 0]], 2, (2,)).tolist()
    [1, 0]
    """
    labels = fitting_labels(labels, leading_shape, num_classes)
    if labels.ndim == len(leading_shape):
        return _class_numbers(labels, num_classes, remedy=remedy)
    one_hot = ((labels == 0) | (labels == 1)).all(axis=-1)
    one_hot &= labels.sum(axis=-1) == 1
    if not one_hot.all():
        raise ValueError(
            "Expected one-hot labels: one 1 and otherwise 0 in every row. "
            f"Received: {int((~one_hot).sum())} of {one_hot.size} rows "
            "that are not. Pass the labels before smoothing or mixing."
        )
    return labels.argmax(axis=-1)


def check_ignorable(ignore_class, are_integers, received):
    """Raises `ValueError` if a class is to be ignored that cannot be.

    Args:
        ignore_class: Integer or `None`.
        are_integers: Boolean, whether labels are integers.
        received: String, what there is in their place.

    Example:

    >>> check_ignorable(255, False, "no labels")
    Traceback (most recent call last):
        ...
    ValueError: `ignore_class` needs integer labels. Received: no labels ...
    """
    if ignore_class is not None and not are_integers:
        raise ValueError(
            f"`ignore_class` needs integer labels. Received: {received} with "
            f"ignore_class={ignore_class}. Pass integer labels, or give what "
            "is to be ignored a `sample_weight` of zero."
        )


def remedy_for_labels(labels, num_classes):
    """What to do about labels of which some are out of range.

    Args:
        labels: NumPy array of numbers.
        num_classes: Integer `K`.

    Returns:
        String, a sentence or two.

    Example:

    >>> remedy_for_labels(np.array([1, 2, 3]), 3)
    'Number the classes from zero: subtract 1.'
    """
    if labels.min() >= 1 and labels.max() == num_classes:
        return "Number the classes from zero: subtract 1."
    return (
        "Number the classes from zero. What has no label, such as void pixels "
        "or padding, gets a `sample_weight` of zero, or is left out of both: "
        "`scores[kept], labels[kept]`."
    )


def pair_labels(
    query_ids: Any, key_ids: Any = None, dtype: str = "float32"
) -> Any:
    """Makes soft labels of queries among keys: even over those of one id.

    What `keras_halo.HALOSimilarity` is trained on. Ids are only compared: they
    name what a query and a key are about, such as the number of the image that
    several captions describe. Where every pair stands for itself, the number
    of the pair is its id.

    Formula:

    ```python
    same = query_ids[:, None] == key_ids[None, :]
    labels = same / max(sum(same, axis=-1, keepdims=True), 1)
    ```

    Args:
        query_ids: Integers of shape `(B,)` or `(B, 1)`, an array or a tensor.
            Tensors of JAX have 32 bits, and `fit` makes tensors of labels: ids
            that differ in higher bits alone become the same there, in silence.
            Number wider ones with `np.unique(ids, return_inverse=True)[1]`
            before.
        key_ids: Integers of shape `(K,)` or `(K, 1)`. Defaults to `None`,
            which means `query_ids`: query and key come in pairs.
        dtype: String, the dtype of the labels. Defaults to `"float32"`.

    Returns:
        Labels of shape `(B, K)`. A row sums to one; that of a query
        without a match is zero, which `keras_halo.HALOLoss` leaves out. A
        NumPy array for arrays, a tensor if one of the ids is a tensor.

    Raises:
        ValueError: If the ids are no integers, or not of the shape above, or
            those of an array do not fit a tensor beside a tensor.

    Example:

    >>> pair_labels([3, 5, 3])
    array([[0.5, 0. , 0.5],
           [0. , 1. , 0. ],
           [0.5, 0. , 0.5]], dtype=float32)
    """
    if key_ids is None:
        key_ids = query_ids
    query_ids, key_ids = _flat_ids(query_ids), _flat_ids(key_ids)
    if ops.is_tensor(query_ids) or ops.is_tensor(key_ids):
        query_ids, key_ids = _tensor_of(query_ids), _tensor_of(key_ids)
        same = ops.equal(query_ids[:, None], key_ids[None, :])
        same = ops.cast(same, dtype)
        return same / ops.clip(ops.sum(same, axis=-1, keepdims=True), 1, np.inf)
    same = (query_ids[:, None] == key_ids[None, :]).astype(dtype)
    return same / same.sum(axis=-1, keepdims=True).clip(1)


def ids_and_scores(ids, y_pred, dtype, remedy):
    """What a loss or a metric of pairs is called with.

    Args:
        ids: Ids of the pairs, see `pair_labels`.
        y_pred: Packed scores of shape `(B, packed_width)`, or
            `(B, 2, packed_width)` of both directions: a tensor, or what NumPy
            makes an array of.
        dtype: String, the dtype of the labels.
        remedy: String, what to do where keys are not paired with queries.

    Returns:
        Tuple of tensors: the labels of the pairs, of shape `(B, B)`, and the
        scores as they are.

    Raises:
        ValueError: If one of them holds no such numbers, the two are swapped,
            or do not fit.

    Example:

    >>> ids_and_scores(np.zeros((3, 9)), [7, 5, 7], "float32", "")
    Traceback (most recent call last):
        ...
    ValueError: `y_pred` must be packed scores in floating point. Received: ...
    """
    if not is_symbolic_or_tensor(y_pred):
        y_pred = number_array(
            y_pred, "y_pred", "Pass what `keras_halo.HALOSimilarity` emits."
        )
    if not is_symbolic_or_tensor(ids):
        ids = _id_array(ids)
    check_order(ids, y_pred, "Ids", "HALOSimilarity")
    packing.check_precision(y_pred.dtype, "y_pred")
    labels = ops.convert_to_tensor(pair_labels(ids, dtype=dtype))
    _check_pairs(labels.shape, y_pred.shape, remedy)
    return labels, ops.convert_to_tensor(y_pred)


def _check_pairs(labels_shape, y_pred_shape, remedy):
    """Raises `ValueError` unless scores have a row and a key for every id."""
    rank = len(y_pred_shape)
    fits = rank == 2 or (rank == 3 and y_pred_shape[1] == 2)
    if fits:
        sizes = {labels_shape[0], y_pred_shape[0]} - {None}
        width = y_pred_shape[-1]
        if width is not None:
            sizes.add(width - packing.NUM_EXTRA_COLUMNS)
        fits = len(sizes) <= 1
    if not fits:
        raise ValueError(
            "Expected ids of shape (B,) and packed scores of shape "
            f"(B, B + {packing.NUM_EXTRA_COLUMNS}) or "
            f"(B, 2, B + {packing.NUM_EXTRA_COLUMNS}), as "
            "`keras_halo.HALOSimilarity` emits them for pairs. Received: "
            f"{labels_shape[0]} ids and scores of shape "
            f"{tuple(y_pred_shape)}. {remedy}"
        )


def _id_array(ids):
    return number_array(
        ids,
        "ids",
        "Ids must be integers. Number them with "
        "`np.unique(ids, return_inverse=True)[1]`.",
        to_float=False,
    )


def _tensor_of(ids):
    """Ids of an array in a tensor, refused where they do not fit."""
    tensor = ops.convert_to_tensor(ids)
    if isinstance(ids, np.ndarray) and ids.size:
        limits = np.iinfo(keras.backend.standardize_dtype(tensor.dtype))
        low, high = int(ids.min()), int(ids.max())
        if low < limits.min or high > limits.max:
            raise ValueError(
                "Ids beside a tensor must fit the integers of this backend's "
                f"tensors, {limits.dtype}. Received: an array of ids from "
                f"{low} to {high}. Pass arrays for both, or number the ids of "
                "both together with `np.unique(ids, return_inverse=True)[1]`."
            )
    return tensor


def _flat_ids(ids):
    if not ops.is_tensor(ids):
        ids = _id_array(ids)
    shape = tuple(ids.shape)
    if len(shape) == 2 and shape[1] == 1:
        ids = ids[:, 0]
    elif len(shape) != 1:
        raise ValueError(
            "Ids say which queries and keys belong together: expected integers "
            f"of shape (batch_size,) or (batch_size, 1). Received: shape="
            f"{shape}. Pass one id for every pair; a model with an output for "
            "each direction takes them once for each."
        )
    if isinstance(ids, np.ndarray):
        are_integers = ids.dtype.kind in "iu"
    else:
        are_integers = "int" in keras.backend.standardize_dtype(ids.dtype)
    if not are_integers:
        raise ValueError(
            "Ids must be integers: in floating point neighbouring ones are "
            "the same, and booleans tell no more than two apart. Received: "
            f"dtype={ids.dtype}. Number them with "
            "`np.unique(ids, return_inverse=True)[1]`."
        )
    return ids


_NARROW = ("bool", "int8", "uint8", "int16", "uint16")


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
