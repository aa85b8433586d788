"""Statistics of training data, class by class, computed once in NumPy."""

import numpy as np
from keras import ops

from keras_halo.ops.labels import class_indices
from keras_halo.utils.checks import check_finite
from keras_halo.utils.extras import require

# Directions in which a class does not vary at all still get this share of the
# mean variance, so that every covariance can be inverted in float32.
RELATIVE_FLOOR = 1e-6


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
    ledoit_wolf = require("sklearn.covariance").ledoit_wolf
    embeddings = np.asarray(ops.convert_to_numpy(embeddings), "float64")
    if embeddings.ndim < 2:
        raise ValueError(
            "Expected embeddings of shape `(num_samples, ..., D)`. Received: "
            f"shape={embeddings.shape}."
        )
    labels = class_indices(labels, num_classes, embeddings.shape[:-1]).ravel()
    embeddings = embeddings.reshape(-1, embeddings.shape[-1])
    check_finite(embeddings, "embeddings")
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
