"""The calibration of probabilities, on a whole data set.

Probabilities are those of the `K` classes, shape `(N, K)`. The probability of
abstaining is not among them: the rows of `Predictions.probabilities` sum to
less than one. Pass such rows as they are to hold the mass of abstaining
against the model, or through `renormalize` first to judge the classes under
the condition that the model answers.
"""

import collections
from collections.abc import Mapping

import numpy as np
from keras import ops

from keras_halo.metrics.samples import class_probabilities
from keras_halo.ops import packing
from keras_halo.ops.labels import read_labels
from keras_halo.ops.model_output import read_model_output
from keras_halo.utils.checks import as_integer, check_finite, number_array
from keras_halo.utils.types import Array, ArrayLike

# The smallest normal float32: about what a float32 model can output at all.
PROBABILITY_FLOOR = float(np.finfo("float32").tiny)

# How far rounding, also that of 16-bit models, may take a sum from one.
_TOLERANCE = 1e-2

# Numbers that are in float64 at a time.
_BLOCK_SIZE = 2**20

ReliabilityBins = collections.namedtuple(
    "ReliabilityBins", ["confidence", "accuracy", "count", "edges"]
)
ReliabilityBins.__doc__ = """Confidence against accuracy in bins of confidence.

Args:
    confidence: Array of shape `(num_bins,)`, the mean confidence of the
        samples in each bin; NaN where there is none.
    accuracy: Array of shape `(num_bins,)`, how often their most probable class
        is the label; NaN where there is none.
    count: Integer array of shape `(num_bins,)`, the number of samples.
    edges: Array of shape `(num_bins + 1,)`, from 0 to 1.
"""


def check_num_bins(num_bins):
    """Returns a positive integer; raises `ValueError` otherwise."""
    return as_integer(num_bins, "num_bins", 1, remedy="15 is customary.")


def bin_edges(num_bins):
    """Edges of equally wide bins of confidence.

    Args:
        num_bins: Positive integer.

    Returns:
        Float64 array of shape `(num_bins + 1,)`, from 0 to 1.

    Example:

    >>> bin_edges(4).tolist()
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    return np.linspace(0.0, 1.0, num_bins + 1)


def renormalize(probabilities: ArrayLike) -> Array:
    """Renormalizes class probabilities, given that the model answers.

    Formula:

    ```python
    p = probabilities / sum(probabilities, axis=-1, keepdims=True)
    ```

    A row of zeros, where abstaining has taken all of the mass, says nothing of
    the classes and becomes uniform: it has no largest entry any more. Packed
    scores still tell the classes apart. Have the best one from
    `Predictions.best_class`, these probabilities from
    `keras_halo.HALOSoftmax(abstain=False)`.

    Args:
        probabilities: Array of shape `(N, K)`, rows that sum to one or less;
            or packed scores, of which the classes alone are judged.

    Returns:
        Float64 array of shape `(N, K)`, rows that sum to one.

    Raises:
        ValueError: If the array holds no probabilities of at least two
            classes.

    Example:

    >>> renormalize([[0.75, 0.0], [0.0, 0.0]]).tolist()
    [[1.0, 0.0], [0.5, 0.5]]
    """
    probabilities = _checked_probabilities(probabilities).astype("float64")
    largest = probabilities.max(axis=-1, keepdims=True)
    empty = largest == 0.0
    # Dividing by the largest first keeps sums of denormal numbers exact.
    scaled = np.where(empty, 1.0, probabilities / np.where(empty, 1.0, largest))
    return scaled / scaled.sum(axis=-1, keepdims=True)


def reliability_bins(
    labels: ArrayLike, probabilities: ArrayLike, num_bins: int = 15
) -> ReliabilityBins:
    """Sorts samples into bins of confidence: what a reliability diagram shows.

    The confidence of a sample is the largest of its class probabilities. The
    bins are equally wide and closed below, the last one also above: confidence
    0 belongs to the first bin, confidence 1 to the last.

    Args:
        labels: Integers of shape `(N,)` or `(N, 1)`, or a distribution,
            one-hot or soft, of shape `(N, K)`. With soft labels the accuracy
            of a sample is the mass on its most probable class.
        probabilities: Array of shape `(N, K)`, rows that sum to one or less;
            or packed scores, of which the classes alone are judged.
        num_bins: Positive integer, at most `N`. Defaults to `15`.

    Returns:
        `ReliabilityBins`.

    Raises:
        ValueError: If labels and probabilities do not fit each other or are no
            such thing, or there are fewer samples than bins.

    Example:

    >>> p = [[0.9, 0.1], [0.8, 0.2], [0.4, 0.6]]
    >>> bins = reliability_bins([0, 1, 1], p, num_bins=2)
    >>> bins.count.tolist(), bins.accuracy.round(2).tolist()
    ([0, 3], [nan, 0.67])

    References:

    - Chuan Guo et al., On calibration of modern neural networks, 2017.
    """
    num_bins = check_num_bins(num_bins)
    confidence, accuracy = confidence_and_accuracy(labels, probabilities)
    return _sorted_into_bins(confidence, accuracy, num_bins)


def confidence_and_accuracy(labels, probabilities):
    """The largest probability of each sample, and whether it is right.

    Args:
        labels: As in `reliability_bins`.
        probabilities: Array of shape `(N, K)`.

    Returns:
        Two float64 arrays of shape `(N,)`. With soft labels the accuracy is
        the mass on the most probable class.

    Example:

    >>> p = [[0.75, 0.25], [0.25, 0.75]]
    >>> [values.tolist() for values in confidence_and_accuracy([0, 0], p)]
    [[0.75, 0.75], [1.0, 0.0]]
    """
    labels, probabilities = _checked(labels, probabilities)
    predicted = probabilities.argmax(axis=-1)[:, None]
    confidence = np.take_along_axis(probabilities, predicted, axis=-1)[:, 0]
    if labels.ndim > 1:
        accuracy = np.take_along_axis(labels, predicted, axis=-1)[:, 0]
    else:
        accuracy = predicted[:, 0] == labels
    return confidence.astype("float64"), accuracy.astype("float64")


def _sorted_into_bins(confidence, accuracy, num_bins):
    if len(confidence) < num_bins:
        raise ValueError(
            "Expected at least as many samples as bins. Received: "
            f"{len(confidence)} samples for num_bins={num_bins}. Use fewer "
            "bins or more samples."
        )
    edges = bin_edges(num_bins)
    index = np.searchsorted(edges[1:-1], confidence, side="right")
    count = np.bincount(index, minlength=num_bins)

    def mean(values):
        total = np.bincount(index, weights=values, minlength=num_bins)
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)

    return ReliabilityBins(mean(confidence), mean(accuracy), count, edges)


def expected_calibration_error(
    labels: ArrayLike, probabilities: ArrayLike, num_bins: int = 15
) -> float:
    """Computes the expected distance between confidence and accuracy.

    Formula:

    ```python
    ece = sum_b count_b / N * abs(accuracy_b - confidence_b)
    ```

    over the bins of `reliability_bins`.

    Args:
        labels: Integers of shape `(N,)` or `(N, 1)`, or a distribution,
            one-hot or soft, of shape `(N, K)`.
        probabilities: Array of shape `(N, K)`, rows that sum to one or less;
            or packed scores, of which the classes alone are judged.
        num_bins: Positive integer, at most `N`. Defaults to `15`.

    Returns:
        Float in `[0, 1]`; 0 for calibrated probabilities.

    Raises:
        ValueError: If labels and probabilities do not fit each other or are no
            such thing, or there are fewer samples than bins.

    Example:

    >>> p = [[0.75, 0.25], [0.75, 0.25], [0.75, 0.25], [0.75, 0.25]]
    >>> expected_calibration_error([0, 0, 0, 1], p, num_bins=4)
    0.0
    >>> expected_calibration_error([0, 0, 1, 1], p, num_bins=4)
    0.25

    References:

    - Chuan Guo et al., On calibration of modern neural networks, 2017.
    """
    return _mean_gap(reliability_bins(labels, probabilities, num_bins))


def _mean_gap(bins):
    filled = bins.count > 0
    gap = np.abs(bins.accuracy - bins.confidence)[filled]
    return float(np.sum(bins.count[filled] * gap) / bins.count.sum())


def classwise_calibration_error(
    labels: ArrayLike, probabilities: ArrayLike, num_bins: int = 15
) -> float:
    """Averages the expected calibration error of each class's probability.

    The usual error looks at the most probable class alone. This one asks of
    every class whether, of the inputs to which it is given 20 %, a fifth
    belongs to it. With many classes most probabilities are near zero, and so
    is the average.

    Formula:

    ```python
    error = mean_k(sum_b count_kb / N * abs(frequency_kb - mean_p_kb))
    ```

    over equally wide bins of the probability of class `k`, closed as those of
    `reliability_bins`.

    Args:
        labels: Integers of shape `(N,)` or `(N, 1)`, or a distribution,
            one-hot or soft, of shape `(N, K)`.
        probabilities: Array of shape `(N, K)`, rows that sum to one or less;
            or packed scores, of which the classes alone are judged.
        num_bins: Positive integer, at most `N`. Defaults to `15`.

    Returns:
        Float in `[0, 1]`; 0 for calibrated probabilities.

    Raises:
        ValueError: If labels and probabilities do not fit each other or are no
            such thing, or there are fewer samples than bins.

    Example:

    >>> p = [[0.75, 0.25], [0.75, 0.25], [0.75, 0.25], [0.75, 0.25]]
    >>> classwise_calibration_error([0, 0, 0, 1], p, num_bins=4)
    0.0
    >>> classwise_calibration_error([0, 0, 1, 1], p, num_bins=4)
    0.25

    References:

    - Meelis Kull et al., Beyond temperature scaling: Obtaining well-calibrated
      multiclass probabilities with Dirichlet calibration, 2019.
    """
    num_bins = check_num_bins(num_bins)
    labels, probabilities = _checked(labels, probabilities)

    def error_of(index):
        of_class = (labels == index) if labels.ndim == 1 else labels[:, index]
        return _mean_gap(
            _sorted_into_bins(
                probabilities[:, index].astype("float64"),
                of_class.astype("float64"),
                num_bins,
            )
        )

    return float(np.mean([error_of(k) for k in range(probabilities.shape[1])]))


def brier_score(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Computes the mean squared distance between probabilities and labels.

    Formula:

    ```python
    brier = mean_n(sum_k (p_nk - Y_nk) ** 2)
    ```

    The sum goes over all classes, as in Brier's article, not over the positive
    class alone. Mass on abstaining is missing from the label's class.

    Args:
        labels: Integers of shape `(N,)` or `(N, 1)`, or a distribution,
            one-hot or soft, of shape `(N, K)`.
        probabilities: Array of shape `(N, K)`, rows that sum to one or less;
            or packed scores, of which the classes alone are judged.

    Returns:
        Float in `[0, 2]`; smaller is better.

    Raises:
        ValueError: If labels and probabilities do not fit each other or are no
            such thing.

    Example:

    >>> brier_score([0, 1], [[1.0, 0.0], [0.5, 0.5]])
    0.25

    References:

    - Glenn W. Brier, Verification of forecasts expressed in terms of
      probability, 1950.
    """
    return _mean_of_rows(
        lambda y, p: np.sum((p - y) ** 2, axis=-1), labels, probabilities
    )


def negative_log_likelihood(
    labels: ArrayLike, probabilities: ArrayLike
) -> float:
    """Computes the mean negative log-probability of the labels, in nats.

    Formula:

    ```python
    nll = mean_n(-sum_k Y_nk * log(max(p_nk, floor)))
    ```

    with `floor = 1.18e-38`, the smallest normal float32: a model that gives
    the label no probability at all is charged 87.3 nats for it, not infinity.
    Mass on abstaining is missing from the label's class.

    Args:
        labels: Integers of shape `(N,)` or `(N, 1)`, or a distribution,
            one-hot or soft, of shape `(N, K)`.
        probabilities: Array of shape `(N, K)`, rows that sum to one or less;
            or packed scores, of which the classes alone are judged.

    Returns:
        Float, between 0 and 87.3; smaller is better.

    Raises:
        ValueError: If labels and probabilities do not fit each other or are no
            such thing.

    Example:

    >>> round(negative_log_likelihood([0, 1], [[1.0, 0.0], [0.5, 0.5]]), 4)
    0.3466
    >>> round(negative_log_likelihood([1], [[1.0, 0.0]]), 1)
    87.3
    """
    return _mean_of_rows(
        lambda y, p: (
            -np.sum(y * np.log(np.maximum(p, PROBABILITY_FLOOR)), axis=-1)
        ),
        labels,
        probabilities,
    )


def _mean_of_rows(of_rows, labels, probabilities):
    """Mean of a function of label distributions and probabilities.

    In blocks: in float64 the whole set would take many times its size.
    """
    labels, probabilities = _checked(labels, probabilities)
    total = 0.0
    for rows in _blocks_of_rows(probabilities):
        values = probabilities[rows].astype("float64")
        total += float(
            of_rows(_distribution(labels[rows], values), values).sum()
        )
    return total / len(probabilities)


def _blocks_of_rows(matrix):
    size = max(1, _BLOCK_SIZE // matrix.shape[1])
    for start in range(0, len(matrix), size):
        yield slice(start, start + size)


def _distribution(labels, probabilities):
    """Labels as a distribution of the shape of the probabilities."""
    if labels.ndim > 1:
        return labels.astype("float64")
    one_hot = np.zeros_like(probabilities)
    one_hot[np.arange(len(labels)), labels] = 1.0
    return one_hot


def _checked(labels, probabilities):
    """Integer labels or distributions, and the probabilities, as they are."""
    probabilities = _checked_probabilities(probabilities)
    num_samples, num_classes = probabilities.shape
    labels = read_targets(
        labels,
        num_classes,
        (num_samples,),
        remedy="Leave samples of no class out.",
    )
    return labels, probabilities


def read_targets(
    labels, num_classes, leading_shape, ignore_class=None, remedy=None
):
    """Reads labels that every sample must have, hard or soft.

    Args:
        labels: Integers of shape `leading_shape` or `(*leading_shape, 1)`, or
            a distribution of shape `(*leading_shape, num_classes)`.
        num_classes: Integer `K`.
        leading_shape: Tuple, the shape that one label a sample has.
        ignore_class: Optional integer, one more label that is allowed.
            Defaults to `None`.
        remedy: As in `read_labels`.

    Returns:
        Array of shape `leading_shape`, or `(*leading_shape, num_classes)`.

    Raises:
        ValueError: If labels do not fit, or a row of a distribution is zero.

    Example:

    >>> read_targets([0, 255], 3, (2,), ignore_class=255).tolist()
    [0, 255]
    """
    labels = read_labels(
        labels, leading_shape, num_classes, ignore_class, remedy=remedy
    )
    if labels.ndim > len(leading_shape):
        _check_no_zeros(labels)
    return labels


def _checked_probabilities(probabilities):
    """An array of class probabilities, which packed scores are turned into."""
    if isinstance(probabilities, Mapping):
        scores = read_model_output(probabilities, "probabilities").scores
        probabilities = ops.convert_to_numpy(scores)
    probabilities = number_array(probabilities, "probabilities")
    if packing.may_be_packed(probabilities):
        packing.check_packed(probabilities, "probabilities")
        logits = ops.convert_to_tensor(
            probabilities[..., : packing.count_classes(probabilities) + 1]
        )
        logits = ops.reshape(logits, (-1, logits.shape[-1]))
        probabilities = ops.convert_to_numpy(
            class_probabilities(logits, renormalize=True)
        )
    if (
        probabilities.ndim != 2
        or probabilities.shape[0] < 1
        or probabilities.shape[1] < 2
    ):
        raise ValueError(
            "`probabilities` must have the shape `(N, K)` with at least one "
            f"sample and two classes. Received: shape={probabilities.shape}. "
            "Write a single column p of class 1 as `np.stack([1 - p, p], -1)`."
        )
    check_finite(probabilities, "probabilities")
    wrong = (probabilities.min(axis=-1) < 0.0) | (
        probabilities.sum(axis=-1, dtype="float64") > 1.0 + _TOLERANCE
    )
    if wrong.any():
        raise ValueError(
            "`probabilities` must be non-negative with rows that sum to one, "
            "or to less where the column of abstaining was cut off. Received: "
            f"{int(wrong.sum())} of {wrong.size} rows that do not, the first "
            f"{probabilities[wrong][0]}. Pass "
            "`keras_halo.decode_predictions(scores).probabilities`."
        )
    return probabilities


def _check_no_zeros(labels):
    empty = ~labels.any(axis=-1)
    if empty.any():
        raise ValueError(
            "Rows of labels must be distributions over the classes, with a sum "
            f"of one. Received: {int(empty.sum())} of {empty.size} rows of "
            "zeros. Leave samples of no class out."
        )
