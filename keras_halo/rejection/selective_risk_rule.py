import keras
import numpy as np

from keras_halo.rejection import bounds
from keras_halo.rejection.readings import check_fraction
from keras_halo.rejection.rejection_rule import RejectionRule
from keras_halo.rejection.wording import percent
from keras_halo.utils.types import Array


@keras.saving.register_keras_serializable(package="keras_halo")
class SelectiveRiskRule(RejectionRule):
    """Keeps the error rate of what is accepted below a guaranteed level.

    The selective risk is the share of wrong answers among the accepted
    inputs. With probability at least `1 - delta` over the draw of the
    calibration set, that of the fitted rule on all inputs drawn as the
    calibration data were is at most `risk`. The rule takes the largest
    threshold for which that is proved.

    The proof needs no assumption on scores or model. Thresholds are tested
    upwards, each by an exact binomial test, until one fails. This keeps more
    than the binary search by Geifman and El-Yaniv, whose `delta` is divided
    among all of its steps; see `keras_halo.rejection.bounds.accepted_at_risk`
    for procedure and proof.

    If no threshold can be proved to keep the risk, `fit` raises instead of
    returning a rule that rejects everything: whoever deploys it must know.
    Such a failure says nothing against the model if there are few calibration
    samples. The guarantee holds for one `fit` with a risk chosen beforehand;
    a risk that is chosen by trying out several on the same data needs fresh
    data.

    Formula:

    ```python
    P(R(threshold) <= risk) >= 1 - delta,  R(t) = P(wrong | score <= t)
    ```

    Args:
        risk: Float in `(0, 1)`, the error rate to stay below.
        delta: Float in `(0, 1)`, the probability with which the guarantee may
            fail. Defaults to `0.05`.
        method: String, one of `keras_halo.OOD_METHODS`, for packed scores;
            `None` for plain scores. Defaults to `"abstain"`.

    Raises:
        ValueError: If an argument is out of range. `fit` raises it if there
            are fewer than `log(delta) / log(1 - risk) + 1` calibration
            samples, neither labels nor errors are given, or no threshold
            keeps the risk; then with the bound that its tests reached, and
            how many samples would do.

    Example:

    >>> scores = np.arange(1000)
    >>> errors = (scores >= 600) & (scores % 2 == 0)
    >>> rule = SelectiveRiskRule(0.05, method=None).fit(scores, errors=errors)
    >>> round(rule.threshold, 2)
    643.01

    References:

    - Yonatan Geifman, Ran El-Yaniv, Selective Classification for Deep Neural
      Networks, 2017.
    - Anastasios N. Angelopoulos et al., Learn then Test: Calibrating
      Predictive Algorithms to Achieve Risk Control, 2021.
    """

    parameters = ("risk", "delta")

    def __init__(
        self,
        risk: float,
        delta: float | None = 0.05,
        method: str | None = "abstain",
    ) -> None:
        super().__init__(method)
        self.risk = check_fraction("risk", risk)
        self.delta = check_fraction("delta", delta)

    def samples_needed(self) -> int:
        return bounds.samples_for_risk(self.risk, self.delta)

    def find_threshold(
        self, scores: Array, wrong: Array | None
    ) -> tuple[float, Array | None]:
        if wrong is None:
            raise ValueError(
                "A selective risk is an error rate: `fit` needs `labels` with "
                "packed scores, or `errors`. Received: neither."
            )
        self.require_samples(len(scores))
        accepted = bounds.accepted_at_risk(scores, wrong, self.risk, self.delta)
        if not accepted:
            raise ValueError(self._unreachable(scores, wrong))
        return bounds.threshold_after(accepted, scores), None

    def _unreachable(self, scores, wrong):
        tests, passed = bounds.tests_at_risk(
            scores, wrong, self.risk, self.delta
        )
        why = (
            f"No threshold keeps the risk of {percent(self.risk)} with "
            f"{percent(1.0 - self.delta)} confidence. Received: "
            f"{len(scores)} calibration samples, {int(wrong.sum())} of them "
            "wrong; "
        )
        if passed:
            tied = np.sort(scores)[passed - 1]
            return why + (
                f"it is kept by the {passed} lowest scores, but "
                f"{bounds.count_near(tied, scores)} samples share the score "
                f"{tied:.6g} and are accepted together or not at all. Take "
                "another `method`, whose scores have fewer ties."
            )
        best = min(tests, key=lambda test: test.bound)
        among = "" if len(tests) == 1 else f", of {len(tests)} such tests"
        return why + (
            f"the lowest bound of the risk is {percent(best.bound)}, with "
            f"{percent(1.0 - best.level)} confidence{among}, that of the "
            f"{best.count} samples with the lowest scores, {best.errors} of "
            f"them wrong. {self._remedy(best, len(scores))}"
        )

    def _remedy(self, test, num_samples):
        improve = (
            "take another `method`, or improve the model; a higher risk must "
            "be confirmed on fresh data."
        )
        rate = test.errors / test.count
        if rate >= self.risk:
            return (
                f"That is an error rate of {percent(rate)}, which as many "
                "samples more do not bring below the risk: collect so many "
                f"that a smaller share of them can be tested, {improve}"
            )
        needed = bounds.samples_for_rate(
            rate, test.count / num_samples, self.risk, self.delta, num_samples
        )
        return (
            f"At this error rate of {percent(rate)} about {needed:,} "
            f"calibration samples would do. Collect them, {improve}"
        )

    def state_guarantee(self) -> str:
        return (
            f"With {percent(1.0 - self.delta)} confidence at most "
            f"{percent(self.risk)} of the accepted inputs to come are answered "
            "wrongly."
        )
