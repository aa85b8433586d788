import dataclasses

import numpy as np

from keras_halo.ops.labels import ABSTAINED
from keras_halo.utils.types import Array


@dataclasses.dataclass(frozen=True, eq=False)
class Decisions:
    """What a rejection rule decided for each input.

    Immutable: the fields cannot be set and their arrays cannot be written to.

    Args:
        accepted: Boolean array of shape `(...)`.
        labels: Integer array of shape `(...)`: the most probable class where
            the input is accepted, -1 where it is rejected. `None` for a rule
            on plain scores, which carry no classes.
        scores: Array of shape `(...)`, the scores that the rule judged, larger
            for outliers.

    Example:

    >>> rule = keras_halo.rejection.CoverageRule(0.9, method=None)
    >>> decisions = rule.fit(np.arange(100.0)).predict([3.0, 250.0])
    >>> decisions.accepted.tolist(), decisions.coverage
    ([True, False], 0.5)
    """

    accepted: np.ndarray
    labels: np.ndarray | None
    scores: np.ndarray

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                value.flags.writeable = False

    @property
    def rejected(self) -> Array:
        """Boolean array of shape `(...)`, the opposite of `accepted`."""
        return ~self.accepted

    @property
    def coverage(self) -> float:
        """Float, the share that is accepted."""
        return float(self.accepted.mean())

    def __len__(self) -> int:
        return len(self.accepted)


def decisions_of(reading, accepted):
    """The decisions on what was read.

    Args:
        reading: `keras_halo.rejection.readings.Reading`.
        accepted: Boolean array of shape `(...)`.

    Returns:
        `Decisions`.
    """
    labels = reading.labels
    if labels is not None:
        labels = np.where(accepted, labels, ABSTAINED)
    return Decisions(accepted, labels, reading.scores)
