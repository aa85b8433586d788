from collections.abc import Iterator
from typing import Any, Self

import keras
import numpy as np

from keras_halo.rejection import bounds
from keras_halo.rejection.readings import check_fraction, read_scores
from keras_halo.rejection.rejection_rule import RejectionRule
from keras_halo.rejection.wording import percent, share
from keras_halo.utils.checks import number_array
from keras_halo.utils.types import Array, Scores


@keras.saving.register_keras_serializable(package="keras_halo")
class FalsePositiveRateRule(RejectionRule):
    """Accepts at most a share of outliers, as measured on given outliers.

    Positive means: accepted as known. A false positive is an outlier that is
    accepted, the convention in which "FPR at 95 % TPR" keeps 95 % of the known
    inputs. `fit` takes the scores of outliers; the threshold lies just below
    the m-th smallest of the `n` scores, so that fewer than `m` of them are
    accepted, and the share of all such outliers that is accepted follows a
    Beta(m, n + 1 - m) distribution over the draw of the given ones (or is
    smaller, with ties). So `m` gives either of two guarantees:

    - on average (`delta=None`): at most `rate` of the given outliers is
      accepted, and a new outlier of the same kind with probability at most
      `rate`, given and new ones both random;
    - with confidence (`delta=0.05`): with probability at least `1 - delta`
      over the given outliers, the share of all outliers of their kind that
      this very rule accepts is at most `rate`.

    Nothing is guaranteed for outliers of another kind.

    Formula:

    ```python
    threshold = largest number < sorted(scores)[m - 1]
    m = floor((n + 1) * rate)                                 # delta=None
    m = max{m : P(Beta(m, n + 1 - m) > rate) <= delta}
    ```

    Args:
        rate: Float in `(0, 1)`. Defaults to `0.05`.
        method: String, one of `keras_halo.OOD_METHODS`, for packed scores;
            `None` for plain scores. Defaults to `"abstain"`.
        delta: Float in `(0, 1)`, the probability with which the guarantee may
            fail, or `None` for a guarantee on average. Defaults to `None`.

    Raises:
        ValueError: If an argument is out of range. `fit` raises it if there
            are fewer than `1 / rate - 1` outliers, or with `delta` fewer than
            `log(delta) / log(1 - rate)`.

    Example:

    >>> rule = FalsePositiveRateRule(0.1, method=None)
    >>> rule = rule.fit(np.arange(50.0, 150.0), known=np.arange(100.0))
    >>> rule.predict([58.0, 59.0]).accepted.tolist()
    [True, False]
    """

    parameters = ("rate", "delta")
    sample_name = "outliers"
    fitted_on_known = False

    def __init__(
        self,
        rate: float = 0.05,
        method: str | None = "abstain",
        delta: float | None = None,
    ) -> None:
        super().__init__(method)
        self.rate = check_fraction("rate", rate)
        self.delta = None if delta is None else check_fraction("delta", delta)

    def fit(self, scores: Scores, known: Scores | None = None) -> Self:
        """Fits the rule on scores of outliers.

        Args:
            scores: Packed scores of outliers, of shape `(..., packed_width)`;
                with `method=None` plain scores of shape `(...)`.
            known: Scores of known inputs, of the same kind. With them
                `summary` tells how many are still accepted; the threshold does
                not depend on them. Defaults to `None`.

        Returns:
            The rule itself.

        Raises:
            ValueError: If the input is not usable or too small for the
                guarantee, or `known` are labels; the rule stays as it was.
        """
        if known is not None and self.method is None:
            _check_no_labels(known)
        outliers = read_scores(scores, self.method)
        threshold, _ = self.find_threshold(outliers.scores.ravel(), None)
        counts = {}
        if known is not None:
            known = read_scores(known, self.method, "known")
            if outliers.fingerprint is not None:
                outliers.fingerprint.check_same(known.fingerprint)
            counts["known"] = known.scores.size
            counts["known_accepted"] = int((known.scores <= threshold).sum())
        self._remember(outliers, threshold, **counts)
        return self

    def false_positive_bound(self, delta: float | None = 0.05) -> float:
        """Share of outliers that is accepted, with confidence `1 - delta`.

        Args:
            delta: Float in `(0, 1)`. Defaults to `0.05`.

        Returns:
            Float: with probability `1 - delta` over the given outliers, at
            most this share of all outliers of their kind is accepted.
        """
        check_fraction("delta", delta)
        samples = self._require_fitted().calibration.samples
        return 1.0 - bounds.coverage_bound(self._rank(samples), samples, delta)

    def _rank(self, num_samples):
        """Rank from above: to reject 1 - rate is to keep it, seen backwards."""
        return bounds.coverage_rank(num_samples, 1.0 - self.rate, self.delta)

    def samples_needed(self) -> int:
        return bounds.samples_for_coverage(1.0 - self.rate, self.delta)

    def find_threshold(
        self, scores: Array, wrong: Array | None
    ) -> tuple[float, Array | None]:
        n = len(scores)
        self.require_samples(n)
        place = n - self._rank(n)
        smallest = float(np.partition(scores, place)[place])
        return bounds.threshold_below(smallest, scores), None

    def state_guarantee(self) -> str:
        if self.delta is None:
            return (
                f"Accepts at most {percent(self.rate)} of the given outliers, "
                f"and on average at most {percent(self.rate)} of outliers of "
                "their kind."
            )
        return (
            f"With {percent(1.0 - self.delta)} confidence accepts at most "
            f"{percent(self.rate)} of outliers of the given kind."
        )

    def state_limits(self) -> str:
        return (
            "How many known inputs are accepted, and anything about outliers "
            "of another kind."
        )

    def describe_calibration(self, calibration: Any) -> Iterator[str]:
        yield from super().describe_calibration(calibration)
        yield (
            f"at most {percent(self.false_positive_bound())} of such outliers "
            "accepted with 95 % confidence"
        )
        if calibration.known is not None:
            kept = share(calibration.known_accepted, calibration.known)
            yield f"{kept} known samples accepted"


def _check_no_labels(known):
    """Raises `ValueError` for integers: other rules take labels there."""
    dtype = number_array(known, "known").dtype
    if dtype.kind in "biu":
        raise ValueError(
            "`known` must be scores of known inputs, not labels: this rule "
            f"needs none. Received: dtype={dtype}. Leave them out, or cast "
            'scores that are integers with `np.asarray(known, "float64")`.'
        )
