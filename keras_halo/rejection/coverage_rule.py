from collections.abc import Iterator
from typing import Any

import keras

from keras_halo.rejection import bounds
from keras_halo.rejection.readings import check_fraction
from keras_halo.rejection.rejection_rule import RejectionRule
from keras_halo.rejection.wording import percent
from keras_halo.utils.types import Array


@keras.saving.register_keras_serializable(package="keras_halo")
class CoverageRule(RejectionRule):
    """Keeps a share of the known inputs, rejecting those with highest scores.

    The threshold is the k-th smallest of `n` calibration scores. The share of
    all known inputs that it keeps follows a Beta(k, n + 1 - k) distribution
    over the draw of the calibration set (or is larger, with ties), whatever
    the scores are. So `k` gives either of two guarantees:

    - on average (`delta=None`): at least `coverage` of the calibration data
      is kept, and a new known input is kept with probability at least
      `coverage`, calibration set and input both random;
    - with confidence (`delta=0.05`): with probability at least `1 - delta`
      over calibration sets, the share of all known inputs that this very rule
      keeps is at least `coverage`.

    Formula:

    ```python
    threshold = sorted(scores)[k - 1]
    k = ceil((n + 1) * coverage)                              # delta=None
    k = min{k : P(Beta(k, n + 1 - k) < coverage) <= delta}
    ```

    Args:
        coverage: Float in `(0, 1)`. Defaults to `0.95`.
        method: String, one of `keras_halo.OOD_METHODS`, for packed scores;
            `None` for plain scores. Defaults to `"abstain"`.
        delta: Float in `(0, 1)`, the probability with which the guarantee may
            fail, or `None` for a guarantee on average. Defaults to `None`.

    Raises:
        ValueError: If an argument is out of range. `fit` raises it if there
            are fewer than `coverage / (1 - coverage)` calibration samples, or
            with `delta` fewer than `log(delta) / log(coverage)`.

    Example:

    >>> rule = CoverageRule(0.9, method=None).fit(np.arange(1.0, 101.0))
    >>> rule.threshold, round(rule.coverage_bound(delta=0.05), 3)
    (91.00091, 0.848)
    >>> rule.predict([5.0, 300.0]).accepted.tolist()
    [True, False]

    References:

    - Samuel S. Wilks, Determination of Sample Sizes for Setting Tolerance
      Limits, 1941.
    - Vladimir Vovk, Conditional Validity of Inductive Conformal Predictors,
      2012.
    """

    parameters = ("coverage", "delta")

    def __init__(
        self,
        coverage: float = 0.95,
        method: str | None = "abstain",
        delta: float | None = None,
    ) -> None:
        super().__init__(method)
        self.coverage = check_fraction("coverage", coverage)
        self.delta = None if delta is None else check_fraction("delta", delta)

    def coverage_bound(self, delta: float | None = 0.05) -> float:
        """Share of all known inputs that is kept, with confidence `1 - delta`.

        Args:
            delta: Float in `(0, 1)`. Defaults to `0.05`.

        Returns:
            Float: with probability `1 - delta` over calibration sets, at least
            this share is kept.
        """
        check_fraction("delta", delta)
        samples = self._require_fitted().calibration.samples
        rank = bounds.coverage_rank(samples, self.coverage, self.delta)
        return bounds.coverage_bound(rank, samples, delta)

    def samples_needed(self) -> int:
        return bounds.samples_for_coverage(self.coverage, self.delta)

    def find_threshold(
        self, scores: Array, wrong: Array | None
    ) -> tuple[float, Array | None]:
        self.require_samples(len(scores))
        threshold = bounds.coverage_threshold(scores, self.coverage, self.delta)
        return threshold, None

    def state_guarantee(self) -> str:
        if self.delta is None:
            return (
                f"Keeps at least {percent(self.coverage)} of the calibration "
                f"data, and on average at least {percent(self.coverage)} of "
                "known inputs to come."
            )
        return (
            f"With {percent(1.0 - self.delta)} confidence keeps at least "
            f"{percent(self.coverage)} of known inputs to come."
        )

    def describe_calibration(self, calibration: Any) -> Iterator[str]:
        yield from super().describe_calibration(calibration)
        yield (
            f"at least {percent(self.coverage_bound())} of known inputs kept "
            "with 95 % confidence"
        )
