"""What a rule remembers of its calibration data.

The classes check their values, because these also arrive from files.
"""

import dataclasses
import itertools
import math

import numpy as np

# Temperature and bias reach packed scores through float32, from whatever
# backend; one step of training moves them further than this.
_TOLERANCE = 1e-5

# No array is larger; what is may not even be compared with a float.
_MAX_COUNT = 2**63


def nearly_equal(a, b):
    """Whether two numbers are the same but for float32 rounding.

    Args:
        a: Float.
        b: Float.

    Returns:
        Boolean.

    Example:

    >>> nearly_equal(16.0, 16.00001), nearly_equal(16.0, 16.001)
    (True, False)
    """
    return abs(a - b) <= _TOLERANCE * max(1.0, abs(a), abs(b))


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """What packed scores tell of the head that they came from.

    Args:
        num_classes: Integer, the number `K` of classes.
        embedding_dim: Integer, the size `D` of the embedding.
        temperature: Float, the temperature of the distances.
        abstain_logit: Float, the logit of abstaining; zero for a head with a
            far background, where each input has its own.
        far_radius: Float, where the far background begins; zero without one.
            Defaults to zero.

    Raises:
        ValueError: If a value cannot be that of a head.

    Example:

    >>> Fingerprint(10, 64, 19.4, -1.2).embedding_dim
    64
    """

    num_classes: int
    embedding_dim: int
    temperature: float
    abstain_logit: float
    far_radius: float = 0.0

    def __post_init__(self):
        sizes = (self.num_classes, self.embedding_dim)
        values = (self.temperature, self.abstain_logit, self.far_radius)
        if not (
            all(type(size) is int and 2 <= size < _MAX_COUNT for size in sizes)
            and all(_is_finite_float(value) for value in values)
            and self.temperature > 0.0
            and self.far_radius >= 0.0
        ):
            raise ValueError(f"this is no head: {self}")

    def check_same(self, other):
        """Raises `ValueError` unless `other` may be of the same head."""
        pairs = {
            field.name: (getattr(self, field.name), getattr(other, field.name))
            for field in dataclasses.fields(self)
        }
        differences = [
            f"{name} {received:.7g} instead of {expected:.7g}"
            for name, (expected, received) in pairs.items()
            if not nearly_equal(expected, received)
        ]
        if differences:
            raise ValueError(
                "`scores` come from another model than the rule was fitted "
                f"on. Received: {', '.join(differences)}. Its guarantee does "
                "not carry over: fit a rule on predictions of this model, or "
                "use the model that the rule was fitted on."
            )


@dataclasses.dataclass(frozen=True)
class CalibrationCounts:
    """Size of the calibration data, and what was achieved on them.

    Args:
        samples: Integer, the number of scores.
        inputs: Integer, the length of the batch axis; less than `samples` if
            an input has several positions.
        accepted: Integer, how many samples are accepted.
        errors: Integer, how many are answered wrongly, or `None` if unknown.
        accepted_errors: Integer, how many of them are accepted, or `None`.
        known: Integer, the number of known samples next to outliers, or
            `None`.
        known_accepted: Integer, how many of them are accepted, or `None`.
        outliers: Integer, the number of outliers next to known samples, or
            `None`.
        outliers_accepted: Integer, how many of them are accepted, or `None`.
        covered: Integer, of how many samples the right label is in the set,
            or `None`.
        set_labels: Integer, how many labels all sets have, or `None`.

    Raises:
        ValueError: If the numbers contradict each other.

    Example:

    >>> CalibrationCounts(samples=100, inputs=100, accepted=95).accepted
    95
    """

    samples: int
    inputs: int
    accepted: int
    errors: int | None = None
    accepted_errors: int | None = None
    known: int | None = None
    known_accepted: int | None = None
    outliers: int | None = None
    outliers_accepted: int | None = None
    covered: int | None = None
    set_labels: int | None = None

    def __post_init__(self):
        counts = [
            value for value in dataclasses.astuple(self) if value is not None
        ]
        pairs = [
            (self.accepted, self.samples),
            (self.accepted_errors, self.errors),
            (self.known_accepted, self.known),
            (self.outliers_accepted, self.outliers),
            (self.covered, self.set_labels),
        ]
        if not (
            all(
                type(count) is int and 0 <= count < _MAX_COUNT
                for count in counts
            )
            and 0 < self.inputs <= self.samples
            and (self.covered or 0) <= self.samples
            and all(
                (part is None) == (whole is None)
                and (part is None or part <= whole)
                for part, whole in pairs
            )
        ):
            raise ValueError(f"its counts contradict each other: {self}")


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Calibration scores as a table; see `bounds.table_of_ranks`.

    Args:
        entries: List of ascending floats.
        counts: List of as many positive integers.

    Raises:
        ValueError: If they are no such table.

    Example:

    >>> Ranks([1.0, 2.0], [3, 1]).counts
    [3, 1]
    """

    entries: list
    counts: list

    def __post_init__(self):
        if not (
            len(self.entries) == len(self.counts) > 0
            and all(_is_finite_float(entry) for entry in self.entries)
            and all(a < b for a, b in itertools.pairwise(self.entries))
            and all(type(c) is int and 0 < c < _MAX_COUNT for c in self.counts)
        ):
            raise ValueError("its ranks are no table of scores and counts")


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """What a rule learned of one group of inputs.

    Args:
        name: String or integer.
        calibration: `CalibrationCounts`.
        scores: As in `Fitted`.

    Raises:
        ValueError: If the name is of another type.

    Example:

    >>> Group("night", CalibrationCounts(100, 100, 95)).name
    'night'
    """

    name: str | int
    calibration: CalibrationCounts
    scores: np.ndarray | None = None

    def __post_init__(self):
        if type(self.name) not in (str, int):
            raise ValueError(f"this is no name of a group: {self.name!r}")


@dataclasses.dataclass(frozen=True, eq=False)
class Fitted:
    """All that a rule learned.

    Args:
        threshold: Float, the largest score that is accepted; with groups a
            list of one for each.
        calibration: `CalibrationCounts`.
        fingerprint: `Fingerprint` of the head, `None` for plain scores.
        scores: Sorted array of all calibration scores, if the rule needs them,
            or `None`.
        ranks: `Ranks`, `None` where the samples are outliers or the rule comes
            from a file of keras_halo 0.1.0.
        groups: List of `Group`, if each has a threshold of its own, or `None`.

    Raises:
        ValueError: If the threshold or a score is not finite, the scores are
            not sorted or not as many as the samples, or the ranks are not.

    Example:

    >>> Fitted(2.5, CalibrationCounts(100, 100, 95), None).threshold
    2.5
    """

    threshold: float
    calibration: CalibrationCounts
    fingerprint: Fingerprint | None
    scores: np.ndarray | None = None
    ranks: Ranks | None = None
    groups: list | None = None

    def __post_init__(self):
        if self.ranks and sum(self.ranks.counts) != self.calibration.samples:
            raise ValueError("its ranks are not those of the samples")
        thresholds = [self.threshold]
        if self.groups is not None:
            thresholds = self.threshold
            self._check_groups()
        if not all(map(_is_finite_float, thresholds)):
            raise ValueError(
                f"the threshold is no finite float: {self.threshold!r}"
            )
        if self.scores is not None and not (
            self.scores.shape == (self.calibration.samples,)
            and np.isfinite(self.scores).all()
            and (np.diff(self.scores) >= 0.0).all()
        ):
            raise ValueError("its calibration scores are not a sorted list")

    @property
    def by_group(self):
        """Dictionary, the threshold of each group by its name."""
        names = [group.name for group in self.groups]
        return dict(zip(names, self.threshold, strict=True))

    def _check_groups(self):
        if len(self.groups) != len(self.threshold):
            raise ValueError("its thresholds are not as many as its groups")
        if len({group.name for group in self.groups}) != len(self.groups):
            raise ValueError("its groups do not have names of their own")
        samples = sum(group.calibration.samples for group in self.groups)
        if samples != self.calibration.samples:
            raise ValueError("its groups do not hold the samples")


def _is_finite_float(value):
    return type(value) is float and math.isfinite(value)
