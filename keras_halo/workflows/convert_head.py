"""Turns a trained classifier into one whose HALO head fits what it knows."""

import math
import warnings
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_halo.layers.halo_dense import HALODense
from keras_halo.layers.precise_dense import PreciseDense
from keras_halo.ops import evidence, packing
from keras_halo.ops.class_statistics import (
    ClassStatistics,
    check_counts,
    whitening,
)
from keras_halo.ops.labels import class_indices
from keras_halo.utils.batches import check_readable, labelled_data
from keras_halo.utils.checks import (
    check_batch_size,
    check_model,
    check_units,
    check_verbose,
)
from keras_halo.utils.types import Data
from keras_halo.workflows.collecting import check_labels, collect
from keras_halo.workflows.graph import (
    free_name,
    input_structure,
    warn_of_preprocessor,
)
from keras_halo.workflows.last_layer import embeddings_before_head

# How many embeddings the biases of the head are placed by.
_SAMPLE_SIZE = 4096

# Directions in which training data do not vary would be blown up without
# bound: every direction gets at least this share of the average variance.
_MIN_SHRINKAGE = 0.1

# A loss of accuracy, on a sample of the given data, that nobody expects.
_WARN_BELOW = 0.02


def convert_head(
    model: keras.Model,
    x: Data,
    y: Any = None,
    label_smoothing: float | None = None,
    batch_size: int | None = None,
    sample_weight: Any = None,
    abstain_rate: float | None = 0.01,
    units: int | None = None,
    verbose: str | int = "auto",
    **kwargs: Any,
) -> keras.Model:
    """Replaces the head of a trained classifier by a HALO head that fits it.

    The new model starts with the knowledge of the old one and can abstain at
    once; a few epochs with `HALOLoss` do the rest. One pass over the data
    measures, in the space that enters the head, the mean of every class and the
    covariance around these means. A `Dense` in between, trainable like any
    other, turns that space such that the classes become the unit Gaussians that
    HALO expects, with the origin amidst them; the means become the
    centroids. So the converted model answers as linear discriminant analysis
    with a shrunk covariance does on these embeddings, whatever the units of
    their features, and its squared radii are about one. The shrinkage is at
    least 0.1: where classes differ in directions in which they hardly vary, the
    answers are not those of an analysis without it. There, and where classes
    are no ellipsoids of one shape, a linear layer can tell more of them apart:
    a warning says so if, on up to 4,096 of the given samples, the new head is
    right two points less often than the old one.

    The new model shares all other layers with the given one, which keeps
    working as it did; fine-tuning the new model trains the layers of both. To
    keep the old one, convert `keras.models.clone_model(model)` with the weights
    of `model`.

    A head for two classes with one unit becomes `HALODense(2)`. A model that
    ends in features and has no head gets one with `units`.

    **A model that has a HALO head** gets another one. The radial term gives the
    residuals of a class their length and leaves their directions free;
    whitened, they vary alike in every direction, which is what squared radii go
    by. Temperature and biases start anew, those of the old head are left
    behind.

    **Back to plain probabilities.** Put `HALOSoftmax` on top, with
    `abstain=False` for as many columns as before; a binary classifier with one
    column again is the second of them, P(class 1):

    ```python
    probabilities = keras_halo.HALOSoftmax(abstain=False)(converted.output)
    plain = keras.Model(converted.input, probabilities)            # (B, K)
    binary = keras.Model(converted.input, probabilities[..., 1:])  # (B, 1)
    ```

    Formula:

    ```python
    S = mean over x of outer(x - mean_y, x - mean_y)
    C = S / outer(scales, scales) for scales = sqrt(diag(S))
    C = (1 - shrinkage) * C + shrinkage * trace(C) / D * identity
    W = a * inverse_square_root(C) / scales
    embedding = W @ (x - mean(mean_k))
    centroids = W @ (mean_k - mean(mean_k))
    ```

    with the oracle approximating shrinkage, at least 0.1, and `a` such that
    `mean(|W @ (x - mean_y)|^2) = 1`, a mean over components too. A feature that
    does not vary beyond rounding gets the median of the other scales. Where
    features vary so little that rounding may be all of it, some inputs are
    predicted again, one by one, to measure what it is.

    Args:
        model: A trained functional or sequential model with one output that
            ends in `keras.layers.Dense`, or a convolution of size one, with
            softmax, sigmoid or no activation. What changes neither the order of
            classes nor their number may follow: `Softmax`, `Activation`,
            `keras.ops.softmax`, `Identity`, dropout, `Reshape`, `Flatten`. Or
            one that ends in `HALODense`. A model inside of it may hold these
            layers. With `units`, one that ends in features.
        x: Training inputs, whatever `model.predict` takes; or, without `y`, a
            dataset of batches `(x, y)` or `(x, y, sample_weight)`: a
            `tf.data.Dataset`, a `torch.utils.data.DataLoader`, a
            `keras.utils.PyDataset` or a generator. A few hundred samples a
            class are enough.
        y: Labels, integers of shape `(N, ...)` or `(N, ..., 1)`, or one-hot of
            shape `(N, ..., K)`; for one unit 0 or 1.
        label_smoothing: Float in `[0, 1)`, that of a head with
            `abstain_rate=None`. Defaults to `None`, as in `HALODense`.
        batch_size: Integer, as in `model.predict`. Defaults to 32.
        sample_weight: Optional weights of shape `(N,)` or `(N, ...)`. What
            has a weight of zero is left out, whatever its label, such as
            padding; every other weight counts as one. Defaults to `None`.
        abstain_rate: As in `HALODense`. The biases are placed by the evidence
            of up to 4,096 samples of the given data, drawn at random. Defaults
            to `0.01`.
        units: Integer, the number of classes, for a `model` that emits the
            features that the head is to read. Defaults to `None`, which means
            that the model is a classifier.
        verbose: `"auto"`, 0, 1 or 2, as in `model.predict`. Defaults to
            `"auto"`.
        **kwargs: Further arguments of `HALODense`, such as `learn_gamma` and
            `name`.

    Returns:
        `keras.Model` with the inputs of `model` that emits packed scores. It
        is to be compiled with `HALOLoss`.

    Raises:
        ValueError: If the model does not end as described, labels are out of
            range or missing, a class has no sample, embeddings are not finite
            or, to rounding, all the same, or classes lie too far apart for
            float32. The given model is never changed.

    Example:

    >>> rng = np.random.default_rng(0)
    >>> x, y = rng.normal(size=(60, 4)).astype("float32"), np.arange(60) % 3
    >>> x[np.arange(60), y] += 9.0
    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(3, activation="softmax")]
    ... )
    >>> converted = convert_head(model, x, y, verbose=0)
    >>> scores = converted.predict(x, verbose=0)
    >>> bool(np.mean(keras_halo.decode_predictions(scores).labels == y) > 0.95)
    True

    References:

    - Raphael Pisoni, "I don't know!": Teaching neural networks to abstain
      with the HALO-Loss, 2026.
    - Yilun Chen, Ami Wiesel, Yonina C. Eldar, Alfred O. Hero, Shrinkage
      Algorithms for MMSE Covariance Estimation, 2010.
    """
    check_model(model)
    if units is not None:
        units = check_units(units)
    batch_size = check_batch_size(batch_size)
    verbose = check_verbose(verbose)
    embeddings, old_head = embeddings_before_head(model, units)
    warn_of_preprocessor(model)
    dim = embeddings.shape[-1]
    if dim is None or dim < 2:
        raise ValueError(
            "The last layer must receive embeddings of at least 2 "
            f"components. Received: embeddings of shape {embeddings.shape}. "
            "Put a wider layer before it and train the model again."
        )
    num_classes = max(units or old_head.units, 2)
    # Bad arguments show here, before the data are read.
    head = new_head(
        num_classes,
        abstain_rate=abstain_rate,
        label_smoothing=label_smoothing,
        **kwargs,
    )
    data = labelled_data(x, y, sample_weight)
    check_labels(data, model, num_classes, embeddings.shape[:-1], 1)
    check_readable(data, "x")
    inputs = input_structure(model)
    statistics = ClassStatistics(num_classes, dim, pooled=True)
    sample = _Sample(_SAMPLE_SIZE, num_classes)
    repetition = collect(
        keras.Model(inputs, embeddings),
        data,
        batch_size,
        verbose,
        statistics.update,
        sample.update,
    )
    check_counts(statistics.counts, 1)
    statistics.resolution = repetition.resolution(
        statistics.deviations(), statistics.resolution
    )
    transform, center, centroids = whitened_centroids(statistics)
    whitened = PreciseDense(dim, name=free_name(model, "halo_embedding"))
    converted = keras.Model(inputs, head(whitened(embeddings)))
    rows = (sample.rows - center) @ transform.T
    with np.errstate(over="ignore", invalid="ignore"):
        whitened.set_weights([transform.T, -transform @ center])
        head.centroids.assign(centroids)
        _check_finite(
            ops.convert_to_numpy(head(whitened(sample.rows))),
            statistics,
            centroids,
        )
    if abstain_rate is not None:
        parts = packing.unpack(head(rows))
        head.assign_evidence(
            ops.convert_to_numpy(
                evidence.class_evidence(
                    parts.logits, parts.squared_norm, head.temperature
                )
            )
        )
    if old_head is not None:
        _compare(old_head.answers(sample.rows), rows, centroids, sample.labels)
    return converted


def new_head(units, /, **kwargs):
    """A head on embeddings as they are.

    Args:
        units: Integer, the number of classes.
        **kwargs: Arguments of `HALODense`.

    Returns:
        `HALODense`.

    Raises:
        ValueError: If an argument is not one of them, or is not to be chosen.

    Example:

    >>> new_head(3, embedding_dim=16)
    Traceback (most recent call last):
        ...
    ValueError: The head reads features as they are. Received: ...
    """
    if "embedding_dim" in kwargs:
        raise ValueError(
            "The head reads features as they are. Received: embedding_dim="
            f"{kwargs['embedding_dim']!r:.100}. Leave it out. For smaller "
            "embeddings put a `Dense` of that size before the last layer of "
            "the given model, and train it."
        )
    if "units" in kwargs:
        raise ValueError(
            f"The given model says how many classes there are, {units}. "
            f"Received: units={kwargs['units']!r:.100}. Leave it out."
        )
    return HALODense(units, embedding_dim=None, **kwargs)


def _check_finite(scores, statistics, centroids):
    """Raises `ValueError` where float32 cannot hold what was found."""
    if np.isfinite(scores).all():
        return
    apart = np.sqrt(np.square(centroids).mean(axis=-1).max())
    deviations = statistics.deviations()
    raise ValueError(
        "The classes lie so far apart that scores of the new head would be "
        "infinite or NaN. Received: a class mean that lies "
        f"{apart:.1e} standard deviations from the middle of all, and features "
        "that deviate within their classes by "
        f"{deviations.min():.1e} to {deviations.max():.1e}. Leave out features "
        "that hold the label or have overflowed, or train the model with a "
        "`BatchNormalization` before its last layer."
    )


def whitened_centroids(statistics):
    """The class means where the classes have a covariance of one.

    Args:
        statistics: `ClassStatistics` of `K` classes, pooled.

    Returns:
        Tuple of arrays: the map of shape `(D, D)`, the center of shape `(D,)`
        that is subtracted before, and the centroids of shape `(K, D)`.

    Example:

    >>> from keras_halo.ops.class_statistics import ClassStatistics
    >>> statistics = ClassStatistics(2, 3, pooled=True)
    >>> rows = np.random.default_rng(0).normal(size=(50, 3))
    >>> statistics.update(rows, np.arange(50) % 2)
    >>> [array.shape for array in whitened_centroids(statistics)]
    [(3, 3), (3,), (2, 3)]
    """
    transform, center = whitening(statistics, _MIN_SHRINKAGE)
    return transform, center, (statistics.means - center) @ transform.T


def _compare(old_answers, rows, centroids, labels):
    """Warns where the new head is right less often than the old one."""
    if old_answers is None:
        return
    scores = 2.0 * rows @ centroids.T - np.square(centroids).sum(axis=-1)
    new = np.mean(scores.argmax(axis=-1) == labels)
    old = np.mean(old_answers == labels)
    if new < old - _WARN_BELOW:
        warnings.warn(
            f"On {len(labels)} of the given samples the converted model is "
            f"right in {new:.1%}, the given one in {old:.1%}: a mean and one "
            "covariance say less of these classes than a linear layer does. "
            "Fine-tune the converted model with `HALOLoss` for a few epochs.",
            stacklevel=3,
        )


class _Sample:
    """Rows drawn at random from batches, each with the same probability."""

    def __init__(self, size, num_classes):
        self.size, self.num_classes = size, num_classes
        self.rng = np.random.default_rng(0)
        self.rows = self.labels = None
        self.keys = np.zeros(0)

    def update(self, embeddings, labels):
        shape = embeddings.shape
        rows = np.asarray(embeddings, "float64").reshape(
            math.prod(shape[:-1]), shape[-1]
        )
        labels = class_indices(labels, self.num_classes, shape[:-1]).ravel()
        keys = np.concatenate([self.keys, self.rng.random(len(rows))])
        if self.rows is not None:
            rows = np.concatenate([self.rows, rows])
            labels = np.concatenate([self.labels, labels])
        kept = np.argsort(keys)[: self.size]
        self.rows, self.labels = rows[kept], labels[kept]
        self.keys = keys[kept]
