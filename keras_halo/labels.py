"""What kind of labels come with packed scores."""

from keras_halo import packing


def are_integer_labels(y_true_shape, y_pred_shape):
    """Tells integer labels from a label distribution by their shape.

    Args:
        y_true_shape: Tuple, the shape of the labels: `(...)` or `(..., 1)` for
            integers, `(..., K)` for a distribution.
        y_pred_shape: Tuple, the shape `(..., K + 4)` of the packed scores.

    Returns:
        Boolean, true for integer labels.

    Raises:
        ValueError: If the shapes do not fit each other.

    Example:

    >>> are_integer_labels((8, 1), (8, 14))
    True
    >>> are_integer_labels((8, 10), (8, 14))
    False
    """
    y_true_shape, y_pred_shape = tuple(y_true_shape), tuple(y_pred_shape)
    num_classes = packing.count_classes(y_pred_shape)
    rank = len(y_pred_shape)
    batch_shape = y_pred_shape[:-1]
    fits = len(y_true_shape) >= rank - 1 and all(
        a is None or b is None or a == b
        for a, b in zip(y_true_shape[: rank - 1], batch_shape, strict=True)
    )
    if fits and len(y_true_shape) == rank - 1:
        return True
    if fits and len(y_true_shape) == rank:
        if y_true_shape[-1] == 1:
            return True
        if y_true_shape[-1] in (num_classes, None):
            return False
    raise ValueError(
        f"Labels do not fit the packed scores, which have {num_classes} "
        "classes: expected integers of shape "
        f"{batch_shape} or {(*batch_shape, 1)}, or a distribution of shape "
        f"{(*batch_shape, num_classes)}. Received: y_true.shape="
        f"{y_true_shape}, y_pred.shape={y_pred_shape}. Check `units` of "
        "`keras_halo.HALODense`, which must be the last layer of the model, "
        "against the labels."
    )
