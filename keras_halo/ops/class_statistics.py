"""Statistics of training data, class by class, in float64 NumPy."""

from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from keras_halo.ops.labels import class_indices
from keras_halo.utils.checks import (
    as_boolean,
    as_integer,
    check_finite,
    number_array,
)
from keras_halo.utils.types import Array, ArrayLike

# A feature that varies less than this many units in its last place does not
# vary: layers round more than once.
ROUNDINGS = 16.0

# Nor does one that float32 can hardly tell from zero: its inverse overflows.
_SMALLEST = ROUNDINGS * float(np.finfo("float32").tiny)

# How many embeddings are turned into products at once.
_CHUNK = 4096

# How many classes an error names.
_NAMED = 5


class ClassStatistics:
    """Counts, means and scatter of classes, batch by batch.

    What is kept does not grow with the data, and statistics of two parts of it
    merge into those of the whole, in any order, to rounding: fit shards apart,
    bring `state()` together and `merge`. Everything is measured around the mean
    of its class, so that no sum around a far-off origin cancels.

    Memory: 8 bytes times `D^2`, and times `K` unless `pooled`.

    Args:
        num_classes: Integer, the number `K` of classes.
        dim: Integer, the size `D` of an embedding.
        pooled: Boolean, whether one scatter for all classes together is enough.
            Defaults to `False`.

    Attributes:
        counts: Integer array of shape `(K,)`, the embeddings of each class.
        means: Array of shape `(K, D)`, float64.
        scatter: Array of shape `(K, D, D)`, or `(D, D)` if pooled: sums of
            outer products of what lies between embeddings and means.

    Raises:
        ValueError: If an argument is no positive integer, or no boolean.

    Example:

    >>> statistics = ClassStatistics(2, 2, pooled=True)
    >>> statistics.update(np.array([[1.0, 0.0], [3.0, 0.0]]), np.array([0, 0]))
    >>> other = ClassStatistics(2, 2, pooled=True)
    >>> other.update(np.array([[5.0, 5.0]]), np.array([1]))
    >>> statistics.merge(other)
    >>> statistics.means.tolist(), statistics.counts.tolist()
    ([[2.0, 0.0], [5.0, 5.0]], [2, 1])
    >>> statistics.pooled_covariance().round(4).tolist()
    [[0.6667, 0.0], [0.0, 0.0]]
    """

    def __init__(
        self, num_classes: int, dim: int, pooled: bool = False
    ) -> None:
        num_classes = as_integer(num_classes, "num_classes", 1)
        dim = as_integer(dim, "dim", 1)
        self.pooled = as_boolean(pooled, "pooled")
        self.counts = np.zeros(num_classes, "int64")
        self.means = np.zeros((num_classes, dim))
        shape = (dim, dim) if pooled else (num_classes, dim, dim)
        self.scatter = np.zeros(shape)
        # What rounding can do to a feature.
        self.resolution = np.zeros(dim)

    @property
    def total(self) -> int:
        """Number of embeddings seen."""
        return int(self.counts.sum())

    def update(self, embeddings: ArrayLike, labels: ArrayLike) -> None:
        """Adds a batch.

        Args:
            embeddings: Array of shape `(..., D)`.
            labels: Integers of shape `(...)` or `(..., 1)`, or one-hot of
                shape `(..., K)`.

        Raises:
            ValueError: If the labels do not fit, or an embedding is not
                finite. The statistics are left as they were.
        """
        embeddings = number_array(embeddings, "embeddings")
        num_classes, dim = self.means.shape
        if embeddings.ndim < 2 or embeddings.shape[-1] != dim:
            raise ValueError(
                f"Expected embeddings of shape `(num_samples, ..., {dim})`. "
                f"Received: shape={embeddings.shape}."
            )
        labels = class_indices(labels, num_classes, embeddings.shape[:-1])
        embeddings, labels = embeddings.reshape(-1, dim), labels.reshape(-1)
        check_finite(
            embeddings,
            "embeddings",
            "They are what enters the head: look for NaN in the inputs, or in "
            "the weights of the model.",
        )
        for start in range(0, len(labels), _CHUNK):
            part = slice(start, start + _CHUNK)
            self._add(embeddings[part].astype("float64"), labels[part])
        if len(embeddings):
            self.resolution = np.maximum(
                self.resolution, resolution_of(embeddings)
            )

    def _add(self, embeddings, labels):
        counts = np.bincount(labels, minlength=len(self.counts))
        order = np.argsort(labels, kind="stable")
        embeddings = embeddings[order]
        present = np.flatnonzero(counts)
        ends = np.cumsum(counts[present])
        groups = np.split(embeddings, ends[:-1])
        means = np.stack([group.mean(axis=0) for group in groups])
        residuals = embeddings - np.repeat(means, counts[present], axis=0)
        if self.pooled:
            self.scatter += residuals.T @ residuals
        else:
            parts = np.split(residuals, ends[:-1])
            for k, part in zip(present, parts, strict=True):
                self.scatter[k] += part.T @ part
        self._join(present, counts[present], means)

    def _join(self, present, counts, means):
        """Moves means, and adds what lies between old and new ones."""
        before = self.counts[present]
        after = before + counts
        apart = means - self.means[present]
        weights = before * (counts / after)
        if self.pooled:
            self.scatter += (apart * weights[:, None]).T @ apart
        else:
            for k, weight, delta in zip(present, weights, apart, strict=True):
                if weight:
                    self.scatter[k] += weight * np.outer(delta, delta)
        self.means[present] += apart * (counts / after)[:, None]
        self.counts[present] = after

    def merge(self, other: "ClassStatistics") -> None:
        """Adds the statistics of other data.

        Args:
            other: `ClassStatistics` of the same classes and embeddings.

        Raises:
            ValueError: If the two do not fit. Nothing is changed.
        """
        if not isinstance(other, ClassStatistics):
            raise ValueError(
                "Expected `ClassStatistics`. Received: other="
                f"{other!r:.100}. `ClassStatistics.from_state(state)` makes "
                "them of what `state()` returned."
            )
        mine = (self.means.shape, self.pooled)
        if mine != (other.means.shape, other.pooled):
            raise ValueError(
                "Statistics merge with those of the same classes and "
                f"embeddings. Received: (classes, dimensions) {mine[0]} with "
                f"pooled={mine[1]}, and {other.means.shape} with pooled="
                f"{other.pooled}."
            )
        present = np.flatnonzero(other.counts)
        self.scatter += other.scatter
        self._join(present, other.counts[present], other.means[present])
        self.resolution = np.maximum(self.resolution, other.resolution)

    def state(self) -> dict[str, Array]:
        """Returns a dictionary of arrays, as `numpy.savez` takes it."""
        return {
            "counts": self.counts.copy(),
            "means": self.means.copy(),
            "scatter": self.scatter.copy(),
            "resolution": self.resolution.copy(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Returns what `state()` was taken of.

        Args:
            state: Dictionary of arrays, or what `numpy.load` returns.

        Raises:
            ValueError: If an array is missing, has a wrong shape, or holds
                what no data give.
        """
        names = ("counts", "means", "scatter", "resolution")
        if not isinstance(state, Mapping):
            raise ValueError(
                "Expected the state of class statistics, a dictionary of "
                f"arrays. Received: state={state!r:.100}. Pass what `state()` "
                "returned, or what `numpy.load` made of its file."
            )
        missing = [name for name in names if name not in state]
        if missing:
            raise ValueError(
                f"A state of class statistics holds {names}. Received: "
                f"{sorted(state)}, without {missing}."
            )
        counts, means, scatter, resolution = (
            number_array(state[name], name) for name in names
        )
        found = tuple(a.shape for a in (counts, means, scatter, resolution))
        k, dim = means.shape if means.ndim == 2 else (0, 0)
        if found not in (
            ((k,), (k, dim), (dim, dim), (dim,)),
            ((k,), (k, dim), (k, dim, dim), (dim,)),
        ):
            raise ValueError(
                "A state of class statistics holds arrays of shapes (K,), "
                "(K, D), (D, D) or (K, D, D), and (D,). Received: "
                f"{', '.join(map(str, found))}."
            )
        if (counts < 0).any() or not all(
            np.isfinite(a).all() for a in (counts, means, scatter, resolution)
        ):
            raise ValueError(
                "A state of class statistics holds finite numbers, and counts "
                "that are not negative. Received: others. The file is damaged."
            )
        statistics = cls(k, dim, pooled=scatter.ndim == 2)
        statistics.counts = counts.astype("int64")
        statistics.means = means.astype("float64")
        statistics.scatter = scatter.astype("float64")
        statistics.resolution = resolution.astype("float64")
        return statistics

    def pooled_covariance(self) -> Array:
        """Covariance of residuals around class means, of shape `(D, D)`."""
        scatter = self.scatter if self.pooled else self.scatter.sum(axis=0)
        return scatter / max(self.total, 1)

    def deviations(self) -> Array:
        """Standard deviations of features within classes, as measured."""
        if self.pooled:
            variances = np.diagonal(self.scatter).copy()
        else:
            variances = np.einsum("kii->i", self.scatter)
        return np.sqrt(variances / max(self.total, 1))

    def scales(self) -> Array | None:
        """Standard deviations of features within classes, of shape `(D,)`.

        A feature that does not vary beyond rounding has no scale of its own
        and gets the median one: it must not count by a billion as soon as it
        varies.

        Returns:
            Array of shape `(D,)`, or `None` where no feature varies.
        """
        deviations = self.deviations()
        varies = deviations > self.resolution
        if not varies.any():
            return None
        return np.where(varies, deviations, np.median(deviations[varies]))

    def covariance(self, label: int, scales: ArrayLike) -> Array:
        """The covariance of one class, shrunk, of shape `(D, D)`.

        Args:
            label: Integer, the class.
            scales: Array of shape `(D,)`, see `scales()`.
        """
        count = int(self.counts[label])
        return shrunk(self.scatter[label] / count, count, scales)[0]


def check_counts(counts, least, option=""):
    """Raises `ValueError` where a class has too few samples.

    Args:
        counts: Array of shape `(K,)`, the samples of every class.
        least: Integer, how many every class needs.
        option: String, what there is to do besides. Defaults to `""`.

    Example:

    >>> check_counts(np.array([5, 1]), 2)
    Traceback (most recent call last):
        ...
    ValueError: Every class needs at least 2 samples. Received: 6 samples, ...
    """
    few = np.flatnonzero(counts < least)
    if not few.size:
        return
    named = ", ".join(f"{k}: {counts[k]}" for k in few[:_NAMED])
    more = f", and {few.size - _NAMED} more" if few.size > _NAMED else ""
    raise ValueError(
        f"Every class needs at least {least} sample{'s'[: least - 1]}. "
        f"Received: {counts.sum()} samples, too few of these classes (class: "
        f"number of samples): {named}{more}. Pass data of all classes that the "
        f"model was trained on{option}."
    )


def shrunk(covariance, count, scales, least=0.0):
    """A covariance, shrunk towards one without correlations.

    The target has the variances of `scales`, all multiplied by one number. So
    the result does not depend on the units of features.

    Formula:

    ```python
    C = covariance / outer(scales, scales)
    C = (1 - rho) * C + rho * trace(C) / D * identity
    shrunk = C * outer(scales, scales)
    ```

    Args:
        covariance: Array of shape `(D, D)`.
        count: Integer, the number of samples behind it.
        scales: Array of shape `(D,)`, positive.
        least: Float, the least shrinkage `rho`. Defaults to `0.0`.

    Returns:
        Tuple of the shrunk covariance and `C`, both of shape `(D, D)`.

    Example:

    >>> covariance = np.array([[1.0, 90.0], [90.0, 10000.0]])
    >>> shrunk(covariance, 100, np.array([1.0, 100.0]))[0].round(2).tolist()
    [[1.0, 87.78], [87.78, 10000.0]]
    """
    dim = len(covariance)
    units = np.outer(scales, scales)
    standard = covariance / units
    rho = max(oracle_shrinkage(standard, count), least)
    # No class may be without extent in any direction, in float32 at last.
    average = max(np.trace(standard) / dim, 1e-6)
    standard = (1.0 - rho) * standard + max(rho, 1e-6) * average * np.eye(dim)
    return standard * units, standard


def oracle_shrinkage(covariance, count):
    """Oracle approximating shrinkage of a covariance towards a multiple of I.

    Formula:

    ```python
    rho = ((1 - 2 / D) * trace(S @ S) + trace(S) ** 2) / (
        (n + 1 - 2 / D) * (trace(S @ S) - trace(S) ** 2 / D)
    )
    ```

    bounded by one.

    Args:
        covariance: Array `S` of shape `(D, D)`.
        count: Integer `n`, the number of samples.

    Returns:
        Float in `[0, 1]`.

    Example:

    >>> oracle_shrinkage(np.eye(3), 10)
    1.0

    References:

    - Yilun Chen, Ami Wiesel, Yonina C. Eldar, Alfred O. Hero, Shrinkage
      Algorithms for MMSE Covariance Estimation, 2010.
    """
    dim = len(covariance)
    squares = np.sum(covariance * covariance)
    trace = np.trace(covariance) ** 2
    numerator = (1.0 - 2.0 / dim) * squares + trace
    denominator = (count + 1.0 - 2.0 / dim) * (squares - trace / dim)
    if numerator >= denominator:
        return 1.0
    return float(numerator / denominator)


def whitening(statistics, least=0.0):
    """The map that makes classes unit Gaussians around the origin.

    Args:
        statistics: `ClassStatistics` in which every class has a sample.
        least: Float, the least shrinkage of the covariance. Defaults to `0.0`.

    Returns:
        Tuple of a `(D, D)` matrix `W` and the center, of shape `(D,)`: the mean
        of the means. `W @ (x - center)` are the embeddings, with a mean square
        of one around the class means.

    Raises:
        ValueError: If all embeddings are the same, to rounding.

    Example:

    >>> statistics = ClassStatistics(2, 2, pooled=True)
    >>> x = np.array([[-3.0, 2.0], [3.0, 2.0], [1.0, 5.0], [7.0, 5.0]])
    >>> statistics.update(x, np.array([0, 0, 1, 1]))
    >>> transform, center = whitening(statistics)
    >>> center.tolist()
    [2.0, 3.5]
    """
    means = statistics.means
    center = means.mean(axis=0)
    dim = len(center)
    scales = statistics.scales()
    if scales is None:
        # Every sample sits on the mean of its class: only the scale of the
        # means is known.
        apart = np.abs(means - center)
        if not (apart > statistics.resolution).any():
            raise ValueError(
                "The embeddings of all samples are the same to rounding, so "
                "that nothing can be told apart. Received: embeddings around "
                f"{center[:3].round(4).tolist()}. Look for a layer whose "
                "output has collapsed, or train the model for longer."
            )
        return np.eye(dim) / np.sqrt(np.square(apart).mean()), center
    covariance = statistics.pooled_covariance()
    _, standard = shrunk(covariance, statistics.total, scales, least)
    values, vectors = np.linalg.eigh(standard)
    transform = (vectors / np.sqrt(values)) @ vectors.T / scales
    # Shrinkage makes the residuals smaller than one; undo that on average.
    residual = np.sum((transform @ covariance) * transform) / dim
    return transform / np.sqrt(residual), center


def resolution_of(rows):
    """What must be exceeded by the deviation of a feature that varies.

    Args:
        rows: Array of shape `(N, D)` of at least one row.

    Returns:
        Array of shape `(D,)`, float64: a few units in the last place of the
        largest value of each feature.

    Example:

    >>> resolution_of(np.array([[1.0, 2.0]], "float32")).tolist()
    [1.9073486328125e-06, 3.814697265625e-06]
    """
    largest = np.abs(rows).max(axis=0).astype("float64")
    return np.maximum(ROUNDINGS * epsilon(rows.dtype) * largest, _SMALLEST)


def epsilon(dtype):
    """The unit in the last place of one, for floats of every width.

    Args:
        dtype: NumPy dtype.

    Example:

    >>> epsilon(np.dtype("float16"))
    0.0009765625
    """
    if dtype.kind not in "fV":
        return 0.0
    # Also for the 16-bit floats that NumPy does not know.
    one = np.ones((), dtype)
    unit = 1.0
    while one + np.asarray(unit / 2.0, dtype) != one:
        unit /= 2.0
    return unit
