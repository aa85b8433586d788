import dataclasses

import numpy as np

from keras_halo.ops.labels import class_indices
from keras_halo.rejection.decisions import Decisions
from keras_halo.utils.types import Array, ArrayLike


@dataclasses.dataclass(frozen=True, eq=False)
class LabelSets(Decisions):
    """The labels that each input may have, as a `LabelSetRule` found them.

    Immutable, as `Decisions`. An input is accepted where its set holds a
    label; the empty set means "none of them". So `coverage` is the share of
    inputs whose set is not empty; the share whose label is in the set is
    `contain(labels).mean()`.

    Args:
        accepted: Boolean array of shape `(...)`.
        labels: Integer array of shape `(...)`: the most probable label of the
            set, -1 where it is empty.
        scores: Array of shape `(...)`, the scores of the inputs, larger for
            outliers.
        members: Boolean array of shape `(..., K)`, whether each label is in
            the set.

    Example:

    >>> sets = keras_halo.rejection.LabelSets(
    ...     accepted=np.array([True, False]),
    ...     labels=np.array([1, -1]),
    ...     scores=np.array([0.1, 7.0]),
    ...     members=np.array([[True, True], [False, False]]),
    ... )
    >>> sets.sizes.tolist(), sets.contain([0, 0]).tolist()
    ([2, 0], [True, False])
    """

    members: np.ndarray

    @property
    def sizes(self) -> Array:
        """Integer array of shape `(...)`, how many labels each set holds."""
        return self.members.sum(axis=-1)

    def contain(self, labels: ArrayLike) -> Array:
        """Says which sets hold the given labels.

        Args:
            labels: Integers of shape `(...)` or `(..., 1)`, or one-hot of
                shape `(..., K)`.

        Returns:
            Boolean array of shape `(...)`.

        Raises:
            ValueError: If the labels have another shape or are no classes.
        """
        labels = class_indices(
            labels, self.members.shape[-1], self.accepted.shape
        )
        found = np.take_along_axis(self.members, labels[..., None], axis=-1)
        return found[..., 0]
