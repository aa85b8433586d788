import dataclasses
from collections.abc import Iterator
from typing import Any, Self

import keras
import numpy as np

from keras_halo.rejection import bounds, joint_bounds
from keras_halo.rejection.readings import (
    check_fraction,
    read_errors,
    read_scores,
)
from keras_halo.rejection.rejection_rule import RejectionRule
from keras_halo.rejection.wording import percent, share
from keras_halo.utils.types import Array, ArrayLike, Scores


@keras.saving.register_keras_serializable(package="keras_halo")
class JointRule(RejectionRule):
    """Keeps several guarantees at once, all of them with one confidence.

    With probability at least `1 - delta` over the draw of calibration data
    and outliers, all that is asked for holds for the fitted rule: the error
    rate among accepted inputs is at most `risk`, the share of known inputs
    that is accepted at least `coverage`, and the share of outliers of the
    given kind that is accepted at most `false_positive_rate`. Of the
    thresholds for which that is proved, the rule takes the largest, which
    answers most.

    Fitting one rule for each and taking a threshold between theirs is no
    such guarantee: each may fail with probability `delta`. Here `delta` is
    not divided by three either. A threshold is proved where the exact
    binomial tests of risk and false-positive rate both pass at the same
    level, and a known small part of `delta` goes to the coverage; see
    `keras_halo.rejection.joint_bounds.accepted_jointly` for procedure and
    proof.

    If no threshold can be proved to keep everything, `fit` raises: it says
    what fails, what each requirement reaches, and how many samples would do.
    The guarantee holds for one `fit` with requirements chosen beforehand;
    those that are chosen by trying out several need fresh data.

    Formula:

    ```python
    P(R(threshold) <= risk and C(threshold) >= coverage
      and F(threshold) <= false_positive_rate) >= 1 - delta
    R(t) = P(wrong | score <= t), C(t) = P(score <= t),
    F(t) = P(score of an outlier <= t)
    ```

    Args:
        risk: Float in `(0, 1)`, the error rate to stay below, or `None`.
            Defaults to `None`.
        coverage: Float in `(0, 1)`, the share of known inputs to accept at
            least, or `None`. Defaults to `None`.
        false_positive_rate: Float in `(0, 1)`, the share of outliers to
            accept at most, or `None`. At least two of the three must be
            given. Defaults to `None`.
        delta: Float in `(0, 1)`, the probability with which any of them may
            fail. Defaults to `0.05`.
        method: String, one of `keras_halo.OOD_METHODS`, for packed scores;
            `None` for plain scores. Defaults to `"abstain"`.

    Raises:
        ValueError: If an argument is out of range, or fewer than two
            guarantees are asked for. `fit` raises it if labels or outliers
            are missing where they are needed, if there are too few samples,
            or if no threshold keeps everything.

    Example:

    >>> scores = np.arange(1000)
    >>> errors = (scores >= 900) & (scores % 2 == 0)
    >>> rule = keras_halo.rejection.JointRule(
    ...     risk=0.05, coverage=0.8, false_positive_rate=0.1, method=None
    ... )
    >>> rule = rule.fit(scores, errors=errors, outliers=np.arange(800, 1800))
    >>> round(rule.threshold, 2)
    882.01

    References:

    - Roger L. Berger, Multiparameter Hypothesis Testing and Acceptance
      Sampling, 1982.
    - Anastasios N. Angelopoulos et al., Learn then Test: Calibrating
      Predictive Algorithms to Achieve Risk Control, 2021.
    """

    parameters = ("risk", "coverage", "false_positive_rate", "delta")

    def __init__(
        self,
        risk: float | None = None,
        coverage: float | None = None,
        false_positive_rate: float | None = None,
        delta: float | None = 0.05,
        method: str | None = "abstain",
    ) -> None:
        super().__init__(method)
        wanted = {
            "risk": risk,
            "coverage": coverage,
            "false_positive_rate": false_positive_rate,
        }
        for name, value in wanted.items():
            if value is not None:
                value = check_fraction(name, value)
            setattr(self, name, value)
        if sum(value is not None for value in wanted.values()) < 2:
            raise ValueError(
                "Expected at least two of `risk`, `coverage` and "
                "`false_positive_rate`. Received: "
                + ", ".join(f"{k}={v!r}" for k, v in wanted.items())
                + ". For one guarantee use `SelectiveRiskRule`, "
                "`CoverageRule` or `FalsePositiveRateRule`."
            )
        self.delta = check_fraction("delta", delta)

    def fit(
        self,
        scores: Scores,
        labels: ArrayLike | None = None,
        errors: ArrayLike | None = None,
        outliers: Scores | None = None,
    ) -> Self:
        """Fits the rule on known inputs, and on outliers where it needs them.

        Args:
            scores: Scores of known inputs: packed scores of shape
                `(..., packed_width)`, or the dictionary of a fitted model; with
                `method=None` plain scores of shape `(...)`.
            labels: Integers of shape `(...)` or `(..., 1)`, or one-hot of
                shape `(..., K)`. A risk needs labels or errors. Defaults to
                `None`.
            errors: Booleans of shape `(...)`, true where the prediction is
                wrong, instead of `labels`. Defaults to `None`.
            outliers: Scores of outliers, of the same kind as `scores`. Given
                with a `false_positive_rate`, and only then. Defaults to
                `None`.

        Returns:
            The rule itself.

        Raises:
            ValueError: If the input is not usable or too small for the
                guarantees, or no threshold keeps them; the rule stays as it
                was.
        """
        reading = read_scores(scores, self.method)
        wrong = read_errors(reading, labels, errors)
        of_outliers = None
        if outliers is not None:
            others = read_scores(outliers, self.method, "outliers")
            if reading.fingerprint is not None:
                reading.fingerprint.check_same(others.fingerprint)
            of_outliers = others.scores.ravel()
        threshold, _ = self.find_threshold(
            reading.scores.ravel(),
            None if wrong is None else wrong.ravel(),
            of_outliers,
        )
        counts = {}
        if of_outliers is not None:
            counts["outliers"] = of_outliers.size
            counts["outliers_accepted"] = int((of_outliers <= threshold).sum())
        self._remember(reading, threshold, wrong=wrong, **counts)
        return self

    def samples_needed(self) -> int:
        return self._requirements().samples_needed()

    def find_threshold(
        self,
        scores: Array,
        wrong: Array | None,
        outliers: Array | None = None,
    ) -> tuple[float, Array | None]:
        if wrong is None and self.risk is not None:
            raise ValueError(
                "A selective risk is an error rate: `fit` needs `labels` with "
                "packed scores, or `errors`. Received: neither."
            )
        if (outliers is None) != (self.false_positive_rate is None):
            raise ValueError(
                "`outliers` are expected with a `false_positive_rate`, and "
                "only then. Received: "
                f"false_positive_rate={self.false_positive_rate!r} and "
                + ("no outliers." if outliers is None else "outliers.")
                + " Pass the scores of outliers of the kind to reject to "
                "`fit`, or leave both out."
            )
        wanted = self._requirements()
        if wanted.starts(len(scores)) is None:
            self.require_samples(len(scores))
        needed = wanted.outliers_needed(len(scores))
        received = 0 if outliers is None else len(outliers)
        if received < needed:
            raise ValueError(
                f"{self!r} needs at least {needed} outliers for its "
                f"guarantee. Received: {received}. Collect "
                f"{needed - received} more, or ask for less."
            )
        if wrong is None:
            wrong = np.zeros(len(scores), bool)
        if outliers is None:
            outliers = np.zeros(0)
        accepted, failed = joint_bounds.accepted_jointly(
            scores, wrong, outliers, wanted
        )
        if not accepted:
            raise ValueError(self._unreachable(scores, wrong, outliers, failed))
        # Below the next outlier too.
        return bounds.threshold_after(accepted, scores, outliers), None

    def _requirements(self):
        return joint_bounds.Requirements(
            self.risk, self.coverage, self.false_positive_rate, self.delta
        )

    def _unreachable(self, scores, wrong, outliers, failed):
        best = min(failed, key=self._excess)
        fails = " and ".join(name for name, *_ in self._failures(best))
        received = f"{len(scores)} calibration samples"
        if self.risk is not None:
            received += f", {int(wrong.sum())} of them wrong"
        if len(outliers):
            received += f", and {len(outliers)} outliers"
        return (
            "No threshold keeps all that is asked for with "
            f"{percent(1.0 - self.delta)} confidence. What fails: {fails}. "
            f"Received: {received}. {self._reached(best, scores, outliers)}"
            f"{self._without_coverage(scores, wrong, outliers)}"
            f"{self._remedy(best, len(scores), len(outliers))}"
        )

    def _excess(self, test):
        """By what factor a bound exceeds what is asked for."""
        pairs = (
            (test.risk_bound, self.risk),
            (test.rate_bound, self.false_positive_rate),
        )
        return max(bound / most for bound, most in pairs if most is not None)

    def _failures(self, test):
        """Name, rate and limit of what a test found to be too much."""
        if self.risk is not None and test.risk_bound > self.risk:
            yield "the risk", test.errors / test.count, self.risk
        most = self.false_positive_rate
        if most is not None and test.rate_bound > most:
            rate = test.outliers / test.num_outliers
            yield "the false-positive rate", rate, most

    def _reached(self, test, scores, outliers):
        accepted = f"{share(test.count, len(scores))} samples"
        lowest = (
            f"The best threshold that was tested accepts {accepted}"
            if self.coverage is None
            else f"The lowest threshold that keeps the coverage of "
            f"{percent(self.coverage)} accepts {accepted}"
        )
        parts = []
        if self.risk is not None:
            parts.append(
                f"{test.errors} of them wrong, which proves a risk of at most "
                f"{percent(test.risk_bound)} where {percent(self.risk)} is "
                "asked for"
            )
        if self.false_positive_rate is not None:
            parts.append(
                f"and {share(test.outliers, len(outliers))} outliers, which "
                "proves a false-positive rate of at most "
                f"{percent(test.rate_bound)} where "
                f"{percent(self.false_positive_rate)} is asked for"
            )
        text = (
            f"{lowest}, {', '.join(parts)}, each with "
            f"{percent(1.0 - test.level)} confidence. "
        )
        last = np.partition(scores, test.count - 1)[test.count - 1]
        tied = int((scores == last).sum())
        if (scores <= last).sum() > test.count:
            text += (
                f"{tied} samples share the score {last:.6g} and are accepted "
                "together or not at all: take another `method`, whose scores "
                "have fewer ties. "
            )
        return text

    def _without_coverage(self, scores, wrong, outliers):
        if self.coverage is None:
            return ""
        accepted, _ = joint_bounds.accepted_jointly(
            scores,
            wrong,
            outliers,
            dataclasses.replace(self._requirements(), coverage=None),
        )
        if not accepted:
            return "Without the coverage no threshold would do either. "
        return (
            "Without the coverage a threshold that accepts "
            f"{share(accepted, len(scores))} would do. "
        )

    def _remedy(self, test, num_samples, num_outliers):
        improve = (
            "take another `method`, improve the model, or ask for less, "
            "confirmed on fresh data."
        )
        hopeless = [
            f"{name} of {percent(rate)}"
            for name, rate, most in self._failures(test)
            if rate >= most
        ]
        if hopeless:
            return (
                f"More samples alone would not help, since {hopeless[0]} that "
                f"was observed is itself more than what is asked for: {improve}"
            )
        samples, others = joint_bounds.samples_for_test(
            test, self._requirements(), num_samples, num_outliers
        )
        needed = f"{samples:,} calibration samples"
        if num_outliers:
            needed += f" and {others:,} outliers"
        return (
            f"At the observed rates about {needed} would do. Collect them, "
            f"{improve}"
        )

    def state_guarantee(self) -> str:
        parts = []
        if self.coverage is not None:
            parts.append(
                f"at least {percent(self.coverage)} of known inputs to come "
                "are accepted"
            )
        if self.risk is not None:
            parts.append(
                f"at most {percent(self.risk)} of the accepted inputs are "
                "answered wrongly"
            )
        if self.false_positive_rate is not None:
            parts.append(
                f"at most {percent(self.false_positive_rate)} of outliers of "
                "the given kind are accepted"
            )
        return (
            f"With {percent(1.0 - self.delta)} confidence all of this holds "
            f"at once: {', '.join(parts[:-1])}, and {parts[-1]}."
        )

    def state_limits(self) -> str:
        if self.false_positive_rate is None:
            return super().state_limits()
        return (
            "Anything about outliers of another kind than the given ones, and "
            "anything once inputs differ from the calibration data."
        )

    def describe_calibration(self, calibration: Any) -> Iterator[str]:
        yield from super().describe_calibration(calibration)
        if calibration.outliers is not None:
            accepted = share(
                calibration.outliers_accepted, calibration.outliers
            )
            yield f"{accepted} outliers accepted"
