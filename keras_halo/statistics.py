"""Statistics of training data, class by class, computed once in NumPy."""

import numpy as np
from keras import ops

# Directions in which a class does not vary at all still get this share of the
# mean variance, so that every covariance can be inverted in float32.
RELATIVE_FLOOR = 1e-6


def class_indices(labels, num_classes, leading_shape):
    """Integer labels from integer or one-hot labels, checked.

    Args:
        labels: Integers of shape `leading_shape` or `(*leading_shape, 1)`, or
            one-hot of shape `(*leading_shape, num_classes)`.
        num_classes: Integer, the number `K` of classes.
        leading_shape: Tuple, the shape that one label a sample has.

    Returns:
        Integer array of shape `leading_shape`.

    Raises:
        ValueError: If the shape does not fit, a label is out of range, or a
            row is not one-hot.

    Example:

    >>> class_indices([[0, 1], [1, 0]], 2, (2,)).tolist()
    [1, 0]
    """
    labels = np.asarray(ops.convert_to_numpy(labels))
    leading_shape = tuple(leading_shape)
    if labels.shape == (*leading_shape, num_classes) and num_classes > 1:
        one_hot = ((labels == 0) | (labels == 1)).all(axis=-1)
        one_hot &= labels.sum(axis=-1) == 1
        if not one_hot.all():
            raise ValueError(
                "Expected one-hot labels: one 1 and otherwise 0 in every row. "
                f"Received: {int((~one_hot).sum())} of {one_hot.size} rows "
                "that are not. Pass the labels before smoothing or mixing."
            )
        return labels.argmax(axis=-1)
    if labels.shape == (*leading_shape, 1):
        labels = labels[..., 0]
    if labels.shape != leading_shape:
        raise ValueError(
            f"Labels do not fit the data: expected integers of shape "
            f"{leading_shape} or {(*leading_shape, 1)}, or one-hot of shape "
            f"{(*leading_shape, num_classes)}. Received: shape={labels.shape}."
            " Pass one label for every sample."
        )
    wrong = ~((labels >= 0) & (labels < num_classes))
    wrong |= labels != np.round(labels)
    if wrong.any():
        raise ValueError(
            f"Labels must be integers in [0, {num_classes}). Received: "
            f"{int(wrong.sum())} of {wrong.size} others, among them "
            f"{labels[wrong].flat[0]}. Leave these samples out."
        )
    return labels.astype("int64")


def class_statistics(embeddings, labels, num_classes):
    """Mean and shrunk covariance of the embeddings of every class.

    The covariance is that of the residuals around the mean of the class,
    shrunk towards a ball by the amount that Ledoit and Wolf found to be best
    for the number of samples and dimensions; it is invertible also with fewer
    samples than dimensions. Two samples of a class are the least that say
    anything about its extent.

    Args:
        embeddings: Array of shape `(..., D)`.
        labels: Integers of shape `(...)` or `(..., 1)`, or one-hot of shape
            `(..., K)`.
        num_classes: Integer, the number `K` of classes.

    Returns:
        Means of shape `(K, D)` and covariances of shape `(K, D, D)`, float64.

    Raises:
        ValueError: If embeddings hold NaN or infinite values, labels do not
            fit, a class has fewer than two samples, or embeddings do not vary
            inside of their classes.
        ImportError: If scikit-learn is missing.

    Example:

    >>> rng = np.random.default_rng(0)
    >>> embeddings = rng.normal(size=(4000, 2)) * [1, 3]
    >>> labels = np.arange(4000) % 2
    >>> means, covariances = class_statistics(embeddings, labels, 2)
    >>> np.diagonal(covariances[0]).round().tolist()
    [1.0, 9.0]

    References:

    - Olivier Ledoit, Michael Wolf, A well-conditioned estimator for
      large-dimensional covariance matrices, 2004.
    """
    ledoit_wolf = _import_ledoit_wolf()
    embeddings = np.asarray(ops.convert_to_numpy(embeddings), "float64")
    if embeddings.ndim < 2:
        raise ValueError(
            "Expected embeddings of shape `(num_samples, ..., D)`. Received: "
            f"shape={embeddings.shape}."
        )
    labels = class_indices(labels, num_classes, embeddings.shape[:-1]).ravel()
    embeddings = embeddings.reshape(-1, embeddings.shape[-1])
    finite = np.isfinite(embeddings)
    if not finite.all():
        raise ValueError(
            f"Embeddings must be finite. Received: {int((~finite).sum())} of "
            f"{finite.size} values are NaN or infinite. Look for the step at "
            "which training diverged, or for NaN in the inputs of the model."
        )
    counts = np.bincount(labels, minlength=num_classes)
    if counts.min() < 2:
        few = {int(k): int(counts[k]) for k in np.flatnonzero(counts < 2)}
        raise ValueError(
            "Every class needs at least 2 samples, because one sample has no "
            "extent. Received too few for these classes (class: number of "
            f"samples): {few}. Pass more training data."
        )
    means = np.stack(
        [embeddings[labels == k].mean(axis=0) for k in range(num_classes)]
    )
    residuals = embeddings - means[labels]
    floor = RELATIVE_FLOOR * (residuals**2).mean()
    if not floor > 0.0:
        raise ValueError(
            "The embeddings of every class are all the same, so that they "
            "have no covariance. Received: residuals around the class means "
            "that are all zero. Pass more than copies of one sample, or look "
            "for a layer whose output has collapsed."
        )
    covariances = np.stack(
        [
            ledoit_wolf(residuals[labels == k], assume_centered=True)[0]
            for k in range(num_classes)
        ]
    )
    return means, covariances + floor * np.eye(embeddings.shape[-1])


def _import_ledoit_wolf():
    try:
        from sklearn.covariance import ledoit_wolf
    except ImportError as error:
        raise ImportError(
            "Fitting class Gaussians needs scikit-learn. Install it with "
            "`pip install keras-halo[tools]`."
        ) from error
    return ledoit_wolf
