from collections.abc import Iterator
from typing import Any, Self

import keras
import numpy as np

from keras_halo.layers.label_set import LabelSet
from keras_halo.ops.labels import ABSTAINED, class_indices
from keras_halo.ops.ood_scores import label_scores
from keras_halo.rejection import bounds
from keras_halo.rejection.fitted import CalibrationCounts, Group
from keras_halo.rejection.label_sets import LabelSets
from keras_halo.rejection.readings import (
    Reading,
    check_fraction,
    read_scores,
)
from keras_halo.rejection.rejection_rule import RejectionRule
from keras_halo.rejection.wording import percent, share
from keras_halo.utils.checks import as_boolean
from keras_halo.utils.types import Array, ArrayLike, Scores

# So many classes are named by an error, and told by a summary.
_MAX_NAMED = 5


@keras.saving.register_keras_serializable(package="keras_halo")
class LabelSetRule(RejectionRule):
    """Answers with a set of labels that holds the right one, or with none.

    A sure answer is a set of one label, an ambiguous one a set of several,
    and the empty set means "none of them": no class explains the input. Every
    label has a score, larger the less the input resembles that class, and is
    in the set where the score is at most a threshold, which is a quantile of
    the scores that the right labels of calibration data have (split conformal
    prediction). It holds for a new known input with probability at least
    `coverage` that its label is in its set, whatever the model:

    - on average (`delta=None`): calibration set and input both random;
    - with confidence (`delta=0.05`): with probability at least `1 - delta`
      over calibration sets, the share of known inputs whose label is in their
      set is at least `coverage`.

    A known input gets the empty set with a probability of at most
    `1 - coverage`, for its label is missing then.

    With `class_conditional=True` each label has a threshold of its own,
    fitted on the calibration data that have this label, and the guarantee
    holds for the inputs of each true class by itself. Unlike other rules, sets
    can do that: a label is tried without knowing whether it is the right one.

    Formula:

    ```python
    score_k = ood_score + max_j s_j - s_k       # -log(p_k), with the default
    label_set = {k : score_k <= threshold}
    threshold = k-th smallest of score_y over n calibration samples
    k = as in CoverageRule
    ```

    Args:
        coverage: Float in `(0, 1)`. Defaults to `0.9`.
        class_conditional: Boolean, whether the guarantee is to hold for each
            true class by itself. Defaults to `False`.
        delta: Float in `(0, 1)`, the probability with which the guarantee may
            fail, or `None` for a guarantee on average. Defaults to `None`.
        method: String, one of `keras_halo.OOD_METHODS`, the score that decides
            about "none of them", or `"fitted"`. The default makes small sets;
            `"abstain"` separates unknown inputs better. Defaults to
            `"max_probability"`.

    Raises:
        ValueError: If an argument is out of range, or `method` is `None`:
            plain scores know no labels. `fit` raises it if there are too few
            calibration samples, of each class if it is class-conditional.

    Example:

    >>> rng = np.random.default_rng(0)
    >>> labels = rng.integers(0, 3, 300)
    >>> x = 4.0 * np.eye(3)[labels] + rng.normal(size=(300, 3))
    >>> head = keras_halo.HALODense.reference(
    ...     3, centroid_initializer=keras.initializers.Constant(4.0 * np.eye(3))
    ... )
    >>> scores = ops.convert_to_numpy(head(x.astype("float32")))
    >>> rule = keras_halo.rejection.LabelSetRule(0.9).fit(scores, labels)
    >>> sets = rule.predict(scores)
    >>> bool(sets.contain(labels).mean() >= 0.9)
    True

    References:

    - Vladimir Vovk, Alex Gammerman, Glenn Shafer, Algorithmic Learning in a
      Random World, 2005.
    - Mauricio Sadinle, Jing Lei, Larry Wasserman, Least Ambiguous Set-Valued
      Classifiers with Bounded Error Levels, 2019.
    - Leying Guan, Robert Tibshirani, Prediction and Outlier Detection in
      Classification Problems, 2022. (The empty set.)
    """

    parameters = ("coverage", "class_conditional", "delta")
    judges_singly = True
    gives_sets = True

    def __init__(
        self,
        coverage: float = 0.9,
        class_conditional: bool = False,
        delta: float | None = None,
        method: str = "max_probability",
    ) -> None:
        if method is None:
            raise ValueError(
                "Sets of labels need packed scores, which hold the logits of "
                "the classes. Received: method=None. Use one of "
                "`keras_halo.OOD_METHODS`."
            )
        super().__init__(method)
        self.coverage = check_fraction("coverage", coverage)
        self.class_conditional = as_boolean(
            class_conditional,
            "class_conditional",
            "Each true class gets a guarantee of its own with `True`.",
        )
        self.delta = None if delta is None else check_fraction("delta", delta)

    @property
    def fitted_on_known(self) -> bool:
        # Ranks among the scores of all classes are no p-values of one.
        return not self.class_conditional

    @property
    def thresholds(self) -> dict[str | int, float]:
        """Dictionary, with `class_conditional=True` the threshold of each."""
        fitted = self._require_fitted()
        if fitted.groups is None:
            raise ValueError(
                "Expected a rule with several thresholds. Received: "
                f"{self!r}, which has one. Use `rule.threshold`."
            )
        return fitted.by_group

    def samples_needed(self) -> int:
        return bounds.samples_for_coverage(self.coverage, self.delta)

    def fit(self, scores: Scores, labels: ArrayLike | None = None) -> Self:
        """Fits the rule on calibration data of known inputs.

        Args:
            scores: What `model.predict` returned: packed scores of shape
                `(..., packed_width)`, or the dictionary of a fitted model.
            labels: Integers of shape `(...)` or `(..., 1)`, or one-hot of
                shape `(..., K)`; needed.

        Returns:
            The rule itself.

        Raises:
            ValueError: If the input is not usable or too small for the
                guarantee; the rule stays as it was.
        """
        reading = read_scores(scores, self.method)
        if labels is None:
            raise ValueError(
                "Sets that hold the right label are fitted on right labels: "
                "`fit` needs `labels`. Received: labels=None."
            )
        num_classes = reading.fingerprint.num_classes
        labels = class_indices(labels, num_classes, reading.scores.shape)
        every = _label_scores(reading)
        own = np.take_along_axis(every, labels[..., None], axis=-1)[..., 0]
        of_labels = Reading(own, None, reading.fingerprint)
        if not self.class_conditional:
            threshold, _ = self.find_threshold(own.ravel(), None)
            limits, groups = threshold, None
        else:
            threshold, groups = self._of_each_class(own, labels, num_classes)
            limits = np.array(threshold)
        members = every <= limits
        wrong = np.argmax(reading.logits, axis=-1) != labels
        self._remember(
            of_labels,
            threshold,
            wrong=wrong,
            accepted=members.any(axis=-1),
            groups=groups,
            covered=int((own <= _limits_of(limits, labels)).sum()),
            set_labels=int(members.sum()),
        )
        return self

    def _of_each_class(self, own, labels, num_classes):
        counts = np.bincount(labels.ravel(), minlength=num_classes)
        needed = self.samples_needed()
        lacking = np.flatnonzero(counts < needed)
        if lacking.size:
            received = ", ".join(
                f"{counts[k]} of class {k}" for k in lacking[:_MAX_NAMED]
            )
            more = lacking.size - _MAX_NAMED
            if more > 0:
                received += f", and {more} more classes with too few"
            raise ValueError(
                f"{self!r} needs at least {needed} calibration samples of "
                f"every class for its guarantee. Received: {received}. "
                "Collect more of these, ask for less, or take "
                "`class_conditional=False`."
            )
        thresholds, groups = [], []
        for k in range(num_classes):
            of_class = own[labels == k]
            threshold, _ = self.find_threshold(of_class, None)
            covered = int((of_class <= threshold).sum())
            count = int(of_class.size)
            thresholds.append(threshold)
            groups.append(Group(k, CalibrationCounts(count, count, covered)))
        return thresholds, groups

    def find_threshold(
        self, scores: Array, wrong: Array | None
    ) -> tuple[float, Array | None]:
        self.require_samples(len(scores))
        threshold = bounds.coverage_threshold(scores, self.coverage, self.delta)
        return threshold, None

    def predict(self, scores: Scores) -> LabelSets:
        """Finds the labels that each input may have.

        Args:
            scores: Scores of the kind and the model that the rule was fitted
                on, packed of shape `(..., packed_width)`.

        Returns:
            `LabelSets`: `members` of shape `(..., K)`; `accepted`, `labels`
            with -1 for the empty set, `scores`, each of shape `(...)`. Rows
            that hold NaN get the empty set, with a warning.

        Raises:
            ValueError: If the rule is not fitted, or the scores are not usable
                or come from another model.
        """
        reading = self.read(scores)
        members = self._members(reading)
        accepted = members.any(axis=-1)
        logits = np.where(members, reading.logits, -np.inf)
        labels = np.where(accepted, np.argmax(logits, axis=-1), ABSTAINED)
        return LabelSets(accepted, labels, reading.scores, members)

    def _members(self, reading):
        members = _label_scores(reading) <= np.array(
            self._require_fitted().threshold
        )
        return members & np.isfinite(reading.scores)[..., None]

    def accepts_reading(self, reading: Reading) -> Array:
        return self._members(reading).any(axis=-1)

    def to_layer(self, **kwargs: Any) -> LabelSet:
        """Makes a layer that gives the same sets, inside a model.

        Args:
            **kwargs: Base layer keyword arguments, such as `name`.

        Returns:
            `keras_halo.layers.LabelSet`.

        Raises:
            ValueError: If the rule is not fitted.
        """
        threshold = self._require_fitted().threshold
        return LabelSet(threshold, self.method, **kwargs)

    def restore(self, fitted: Any) -> None:
        """Takes over what a rule learned that was saved.

        Args:
            fitted: `keras_halo.rejection.fitted.Fitted`.
        """
        names = None
        if fitted.groups is not None:
            names = [group.name for group in fitted.groups]
        expected = None
        if self.class_conditional:
            expected = list(range(fitted.fingerprint.num_classes))
        if names != expected:
            raise ValueError("its thresholds are not those of the classes")
        super().restore(fitted)

    def state_guarantee(self) -> str:
        whose = "known inputs to come"
        if self.class_conditional:
            whose += ", of each true class by itself,"
        least = percent(self.coverage)
        most = percent(1.0 - self.coverage)
        if self.delta is None:
            return (
                f"On average at least {least} of {whose} get a set that holds "
                f"their label, hence at most {most} the empty set."
            )
        return (
            f"With {percent(1.0 - self.delta)} confidence at least {least} of "
            f"{whose} get a set that holds their label, hence at most {most} "
            "the empty set."
        )

    def state_limits(self) -> str:
        return (
            "How large the sets are, how often those of one size or with one "
            "label hold the right one, how many unknown inputs get the empty "
            "set, and anything once inputs differ from the calibration data."
        )

    def describe_calibration(self, calibration: Any) -> Iterator[str]:
        samples = calibration.samples
        empty = samples - calibration.accepted
        mean = calibration.set_labels / samples
        yield f"the label in the sets of {share(calibration.covered, samples)}"
        yield f"{share(empty, samples)} empty"
        yield f"{mean:.3g} labels in a set on average"


def _label_scores(reading):
    # In the precision of the logits, as in a layer.
    scores = reading.scores.astype(reading.logits.dtype)
    return label_scores(reading.logits, scores).astype("float64")


def _limits_of(limits, labels):
    return limits if np.ndim(limits) == 0 else limits[labels]
