from typing import Any, Self

import keras
import numpy as np

from keras_halo.layers.decision import Decision
from keras_halo.rejection import storage
from keras_halo.rejection.decisions import Decisions, decisions_of
from keras_halo.rejection.fitted import Fitted, Group
from keras_halo.rejection.readings import (
    Reading,
    read_errors,
    read_groups,
    read_scores,
)
from keras_halo.rejection.rejection_rule import RejectionRule
from keras_halo.utils.types import Array, ArrayLike, Scores

_BY = ("class", "group")

# So many groups are listed by a summary.
_MAX_LISTED = 20

# So many are named by an error.
_MAX_NAMED = 5


@keras.saving.register_keras_serializable(package="keras_halo")
class GroupwiseRule(RejectionRule):
    """Gives every class, or every group, a guarantee of its own.

    A rule for all inputs may keep its share by rejecting a rare class
    entirely. This one fits a rule of the given kind, with a threshold of its
    own, on the calibration data of each group (Mondrian conformal prediction):

    - `by="class"`: by the class that the model predicts. It is a function of
      the input, known when an input arrives, so that the calibration data
      that got the same prediction are drawn as those inputs are, and the
      guarantee of the rule holds for them. By the true class that cannot be
      done: whoever decides does not know it. `LabelSetRule` keeps a guarantee
      for every true class, since it tries each as a label.
    - `by="group"`: by groups that are passed along, such as the camera or the
      hospital.

    The guarantees hold for each group by itself. That all of `G` groups keep
    theirs at the same time has the confidence `1 - delta` if the rule is given
    `delta / G`. The p-value that a model of `keras_halo.guard` answers with is
    that among all known inputs. Each group needs as many calibration samples
    as the rule alone does, also a class that is rarely predicted.

    Formula:

    ```python
    accepted = score <= thresholds[predicted class, or group]
    ```

    Args:
        rule: A rule of `keras_halo.rejection`, such as `CoverageRule(0.95)`.
            What it was fitted on does not matter.
        by: String, `"class"` or `"group"`. Defaults to `"class"`.

    Raises:
        ValueError: If an argument is none of these, or the rule cannot be
            applied to groups: a rule with `method=None` by class, or a
            `JointRule` with a false-positive rate. `fit` raises it if a group
            has too few samples, or cannot keep its guarantee, and names it.

    Example:

    >>> rule = keras_halo.rejection.CoverageRule(0.9, method=None)
    >>> rule = keras_halo.rejection.GroupwiseRule(rule, by="group")
    >>> scores = np.concatenate([np.arange(100.0), 50.0 + np.arange(100.0)])
    >>> rule = rule.fit(scores, groups=["day"] * 100 + ["night"] * 100)
    >>> {name: round(t) for name, t in rule.thresholds.items()}
    {'day': 90, 'night': 140}
    >>> rule.predict([95.0, 95.0], groups=["day", "night"]).accepted.tolist()
    [False, True]

    References:

    - Vladimir Vovk, Alex Gammerman, Glenn Shafer, Algorithmic Learning in a
      Random World, 2005.
    """

    parameters = ("by",)

    def __init__(
        self, rule: RejectionRule | dict[str, Any], by: str = "class"
    ) -> None:
        if isinstance(rule, dict) and set(rule) == {"class_name", "config"}:
            # From `get_config`.
            rule = storage.unfitted(rule["class_name"], rule["config"])
        if (
            not isinstance(rule, RejectionRule)
            or isinstance(rule, GroupwiseRule)
            or rule.gives_sets
        ):
            raise ValueError(
                "`rule` must be a rule of `keras_halo.rejection` for the "
                f"inputs of one group. Received: rule={rule!r:.100}. Pass one "
                "such as `CoverageRule(0.95)`."
            )
        if not isinstance(by, str) or by not in _BY:
            raise ValueError(
                f"`by` must be 'class' or 'group'. Received: by={by!r:.100}."
            )
        if rule.method is None and by == "class":
            raise ValueError(
                "Plain scores do not tell which class is predicted. Received: "
                f"{rule!r} with by='class'. Use `by='group'`, and pass the "
                "predicted classes as `groups`."
            )
        if getattr(rule, "false_positive_rate", None) is not None:
            raise ValueError(
                "A rule that needs outliers beside known inputs cannot be "
                f"fitted by groups. Received: {rule!r}. Leave out "
                "`false_positive_rate`, or fit one such rule for each group."
            )
        super().__init__(rule.method)
        # Fitting it anew elsewhere must not change this one.
        self.rule = _copy(rule)
        self.by = by

    @property
    def judges_singly(self) -> bool:
        return self.rule.judges_singly

    @property
    def fitted_on_known(self) -> bool:
        return self.rule.fitted_on_known

    @property
    def sample_name(self) -> str:
        return self.rule.sample_name

    @property
    def thresholds(self) -> dict[str | int, float]:
        """Dictionary, the largest accepted score of each class or group."""
        return self._require_fitted().by_group

    @property
    def rules(self) -> dict[str | int, RejectionRule]:
        """Dictionary, the fitted rule of each class or group."""
        fitted = self._require_fitted()
        rules = {}
        for group, threshold in zip(
            fitted.groups, fitted.threshold, strict=True
        ):
            rules[group.name] = _copy(self.rule)
            rules[group.name].restore(
                Fitted(
                    threshold,
                    group.calibration,
                    fitted.fingerprint,
                    group.scores,
                )
            )
        return rules

    def fit(
        self,
        scores: Scores,
        labels: ArrayLike | None = None,
        errors: ArrayLike | None = None,
        groups: ArrayLike | None = None,
    ) -> Self:
        """Fits one rule for each class or group.

        Args:
            scores: Scores of the kind that the rule takes: packed scores of
                shape `(..., packed_width)`, or the dictionary of a fitted
                model; with `method=None` plain scores of shape `(...)`.
            labels: Integers of shape `(...)` or `(..., 1)`, or one-hot of
                shape `(..., K)`. Defaults to `None`.
            errors: Booleans of shape `(...)`, true where the prediction is
                wrong, instead of `labels`. Defaults to `None`.
            groups: Strings or integers of shape `(...)`, or one for each
                input, the group of each sample; with `by="group"`, and only
                then. Defaults to `None`.

        Returns:
            The rule itself.

        Raises:
            ValueError: If the input is not usable, or a group has too few
                samples or cannot keep its guarantee; the rule stays as it
                was.
        """
        reading = read_scores(scores, self.method)
        if not self.fitted_on_known and not (labels is None and errors is None):
            raise ValueError(
                f"{self!r} is fitted on outliers, which have no right answer. "
                "Received: `labels` or `errors`. Leave them out."
            )
        wrong = read_errors(reading, labels, errors)
        of_each = self._groups_of(reading, groups)
        if self.by == "class":
            found = range(reading.fingerprint.num_classes)
        else:
            found = np.unique(of_each).tolist()
        members = {name: of_each == name for name in found}
        self._require_samples_of_all(members)
        accepted = np.zeros(reading.scores.shape, bool)
        thresholds, learned = [], []
        for name, member in members.items():
            part = Reading(reading.scores[member], None, reading.fingerprint)
            rule = _copy(self.rule)
            try:
                rule.learn(part, None if wrong is None else wrong[member])
            except ValueError as error:
                raise ValueError(f"{self._describe(name)}: {error}") from error
            fitted = rule.learned
            accepted[member] = part.scores <= fitted.threshold
            thresholds.append(fitted.threshold)
            learned.append(Group(name, fitted.calibration, fitted.scores))
        self._remember(
            reading,
            thresholds,
            wrong=wrong,
            accepted=accepted,
            groups=learned,
        )
        return self

    def _groups_of(self, reading, groups):
        """The class or group of each sample."""
        if (groups is None) != (self.by == "class"):
            raise ValueError(
                "`groups` are expected with by='group', and only then. "
                f"Received: by={self.by!r} and "
                + (
                    "no `groups`. Pass the group of each input."
                    if groups is None
                    else "`groups`. Leave them out."
                )
            )
        if groups is None:
            return reading.labels
        return read_groups(groups, reading.scores.shape)

    def _describe(self, *found):
        listed = ", ".join(repr(name) for name in found[:_MAX_NAMED])
        if len(found) > _MAX_NAMED:
            listed += f" and {len(found) - _MAX_NAMED} more"
        if self.by == "group":
            return f"Group {listed}"
        return f"Predicted class {listed}"

    def _require_samples_of_all(self, members):
        needed = self.rule.samples_needed()
        counts = {name: int(m.sum()) for name, m in members.items()}
        lacking = [name for name in counts if counts[name] < needed]
        if not lacking:
            return
        received = ", ".join(
            f"{counts[name]} of {self._kind} {name!r}"
            for name in lacking[:_MAX_NAMED]
        )
        if len(lacking) > _MAX_NAMED:
            received += f", and {len(lacking) - _MAX_NAMED} more with too few"
        raise ValueError(
            f"{self!r} needs at least {needed} calibration samples of every "
            f"{self._kind} for its guarantee. Received: {received}. Collect "
            "more of these, "
            + (
                "or ask for less."
                if self.by == "class"
                else "join groups, or ask for less."
            )
        )

    def predict(
        self, scores: Scores, groups: ArrayLike | None = None
    ) -> Decisions:
        """Decides which inputs are accepted, by the threshold of their group.

        Args:
            scores: Scores of the kind and the model that the rule was fitted
                on: packed of shape `(..., packed_width)`, or plain of shape
                `(...)`.
            groups: As in `fit`. Defaults to `None`.

        Returns:
            `Decisions`: `accepted`, `labels` with -1 for rejected, `scores`,
            each of shape `(...)`. Rows that hold NaN are rejected, with a
            warning; their score is NaN.

        Raises:
            ValueError: If the rule is not fitted, the scores are not usable
                or come from another model, or a group was not in the
                calibration data.
        """
        reading = self.read(scores)
        return decisions_of(reading, self.accepts_reading(reading, groups))

    def accepts_reading(
        self, reading: Reading, groups: ArrayLike | None = None
    ) -> Array:
        rules = self.rules
        of_each = self._groups_of(reading, groups)
        unknown = set(np.unique(of_each).tolist()) - set(rules)
        if unknown:
            raise ValueError(
                "`groups` must be among those of the calibration data, "
                f"{self._describe(*rules)}. Received: "
                f"{self._describe(*sorted(unknown, key=str))}. Fit the rule on "
                "data of every group."
            )
        accepted = np.zeros(reading.scores.shape, bool)
        for name, rule in rules.items():
            member = of_each == name
            if member.any():
                accepted[member] = rule.accepts(reading.scores[member])
        return accepted & np.isfinite(reading.scores)

    def accepts(self, scores: Array) -> Array:
        """Not available: scores alone do not tell the group."""
        raise ValueError(
            f"Scores alone do not tell a group. Received: {self!r}. Use "
            "`rule.predict`, or `rule.rules[group].accepts(scores)`."
        )

    def to_layer(self, **kwargs: Any) -> Decision:
        """Makes a layer that decides as the rule does, inside a model.

        See `RejectionRule.to_layer`. A layer sees the class that is predicted
        but no groups of the user: there is one with `by="class"` alone.

        Args:
            **kwargs: Base layer keyword arguments, such as `name`.

        Returns:
            `keras_halo.layers.Decision`, with one threshold for each class.

        Raises:
            ValueError: If the rule is not fitted, judges by groups, or its
                decision on one input depends on others.
        """
        self.require_judging_singly()
        fitted = self._require_fitted()
        return Decision(list(fitted.threshold), self.method, **kwargs)

    def require_judging_singly(self) -> None:
        if self.by == "group":
            raise ValueError(
                "A model does not know to which group an input belongs. "
                f"Received: {self!r}. Use `rule.predict(scores, groups=...)` "
                "on what the model answers, or by='class'."
            )
        super().require_judging_singly()

    def restore(self, fitted: Any) -> None:
        """Takes over what a rule learned that was saved.

        Args:
            fitted: `keras_halo.rejection.fitted.Fitted`.
        """
        groups = fitted.groups
        if groups is None or any(
            (group.scores is not None) != self.rule.keeps_scores
            for group in groups
        ):
            raise ValueError("its groups or their scores are missing")
        if self.by == "class" and [group.name for group in groups] != list(
            range(fitted.fingerprint.num_classes)
        ):
            raise ValueError("its groups are not the classes")
        super().restore(fitted)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor arguments as a dictionary."""
        return {
            "rule": {
                "class_name": storage.registered_name(self.rule),
                "config": self.rule.get_config(),
            },
            "by": self.by,
        }

    def __repr__(self):
        return f"{type(self).__name__}({self.rule!r}, by={self.by!r})"

    def state_guarantee(self) -> str:
        guarantee = self.rule.state_guarantee()
        return (
            f"For the inputs of each {self._kind} by itself: "
            f"{guarantee[:1].lower()}{guarantee[1:]}"
        )

    @property
    def _kind(self):
        return "predicted class" if self.by == "class" else "group"

    def state_limits(self) -> str:
        limits = self.rule.state_limits()
        if self.by == "group":
            return f"{limits} That all groups keep theirs at once."
        return (
            f"{limits} That all classes keep theirs at once. Anything by true "
            "class, which is not known when an input arrives."
        )

    def summary(self) -> str:
        """Describes the rule, its guarantee, and its calibration by group.

        Returns:
            String of a few lines, and one for each of the first groups.

        Raises:
            ValueError: If the rule is not fitted.
        """
        lines = [super().summary()]
        rules = self.rules
        for name in list(rules)[:_MAX_LISTED]:
            calibration = rules[name].learned.calibration
            told = rules[name].describe_calibration(calibration)
            lines.append(
                f"{self._describe(name)}: threshold "
                f"{rules[name].threshold:.6g}, {', '.join(told)}."
            )
        if len(rules) > _MAX_LISTED:
            lines.append(f"And {len(rules) - _MAX_LISTED} more.")
        return "\n".join(lines)


def _copy(rule):
    """The same rule, not fitted."""
    return type(rule)(**rule.get_config())
