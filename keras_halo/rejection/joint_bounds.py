"""The statistics behind `JointRule`: several guarantees at one threshold.

A requirement that is not asked for is `None` everywhere.
"""

import dataclasses
import math

import numpy as np

from keras_halo.rejection import bounds
from keras_halo.utils.extras import require

# The share of `delta` that the coverage gets at most. It costs the ranks at
# which tests may start little, and the tests of risk and rate even less.
_COVERAGE_SHARE = 0.2

_MAX_SAMPLES = 10**9


@dataclasses.dataclass(frozen=True)
class Requirements:
    """What has to hold at once, each with the same confidence.

    Args:
        risk: Float in `(0, 1)`, the largest error rate among accepted inputs,
            or `None`.
        coverage: Float in `(0, 1)`, the least share of known inputs that is
            accepted, or `None`.
        rate: Float in `(0, 1)`, the largest share of outliers that is
            accepted, or `None`.
        delta: Float in `(0, 1)`, the probability with which any of them may
            fail.

    Example:

    >>> Requirements(0.05, 0.8, None, 0.05).starts(1000)
    ([830], 0.0411...)
    """

    risk: float | None
    coverage: float | None
    rate: float | None
    delta: float

    def starts(self, num_samples):
        """Ranks at which tests start, and the level of the tests at each.

        Args:
            num_samples: Integer.

        Returns:
            Tuple: ascending integers, and what is left of `delta` for all of
            them. `None` if there are too few samples for the guarantee.
        """
        if self.coverage is None:
            if self.risk is None:
                return [1], self.delta
            lowest = bounds.samples_for_risk(self.risk, self.delta)
            if num_samples < lowest:
                return None
            starts = [max(lowest, num_samples // 2)]
            if 4 * lowest <= num_samples:
                starts = bounds.start_ranks(num_samples, self.risk, self.delta)
            return starts, self.delta
        share = self.delta * _COVERAGE_SHARE
        if num_samples < bounds.samples_for_coverage(self.coverage, share):
            return None
        start = bounds.coverage_rank(num_samples, self.coverage, share)
        if self.risk is not None:
            # Leave room for an error, but not at the expense of the rate.
            lowest = bounds.samples_for_risk(self.risk, self.delta - share)
            room = min(2 * lowest, num_samples // 2)
            start = max(start, min(lowest, num_samples), room)
        missed = require("scipy.stats").binom.sf(
            start - 1, num_samples, self.coverage
        )
        level = self.delta - float(missed)
        if self.risk is not None:
            doubt = (start - 1) * math.log1p(-self.risk)
            if doubt > math.log(level) + 1e-12:
                return None
        return [start], level

    def samples_needed(self):
        """Smallest number of calibration samples that may do."""
        low = high = 1
        while self.starts(high) is None:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            if self.starts(middle) is None:
                low = middle
            else:
                high = middle
        return high

    def outliers_needed(self, num_samples):
        """Smallest number of outliers that may do."""
        if self.rate is None:
            return 0
        starts, level = self.starts(num_samples)
        return bounds.samples_for_coverage(1.0 - self.rate, level / len(starts))


@dataclasses.dataclass(frozen=True)
class JointTest:
    """A test of a threshold, and what it found.

    Args:
        count: Integer, the number of lowest scores that it accepts.
        errors: Integer, how many of these are wrong.
        outliers: Integer, how many outliers are accepted with them.
        num_outliers: Integer, of how many.
        level: Float, the level of the test.
        risk_bound: Float, upper bound of the risk at this level, or `None`.
        rate_bound: Float, that of the share of outliers, or `None`.
    """

    count: int
    errors: int
    outliers: int
    num_outliers: int
    level: float
    risk_bound: float | None
    rate_bound: float | None


def accepted_jointly(scores, errors, outliers, requirements):
    """Counts the lowest scores that can be accepted with all guarantees.

    Let a threshold accept a share `C(t)` of the known inputs, `F(t)` of the
    outliers, and be wrong on a share `R(t)` of what is known and accepted. The
    hypothesis "`R(t) > risk` or `F(t) > rate`" is rejected for a threshold if
    both exact binomial tests reject (an intersection-union test),

    ```python
    p(t) = max(P(Binomial(n, risk) <= e), P(Binomial(m, rate) <= a)) <= level
    ```

    for `e` errors among the `n` samples up to it and `a` of `m` outliers up to
    it. Thresholds are tested upwards as `accepted_at_risk` does. With a
    coverage to keep there is one start, a rank `k` with

    ```python
    missed = P(Binomial(n, coverage) >= k),  level = delta - missed
    ```

    Why `P(all hold) >= 1 - delta`: the score at rank `k` misses the coverage
    with probability `missed`, known before any data are seen, and thresholds
    above it accept more. Whoever takes a bad threshold has passed, from the
    start of a chain on, the first one that is bad, at which one of the two
    hypotheses is true, so that its own test alone, at the whole level, passes
    with probability at most the level: two requirements need no two shares.
    For the outliers that is so because they are independent of the
    calibration data, hence of where chains start, for the errors by the proof
    of `accepted_at_risk`.

    Args:
        scores: Array of shape `(n,)`.
        errors: Boolean array of shape `(n,)`.
        outliers: Array of shape `(m,)`, scores; empty without a rate.
        requirements: `Requirements`.

    Returns:
        Tuple: an integer in `[0, n]`, zero if no threshold passes; and where
        it is zero a list of `JointTest`, those that ended a chain. Equal
        scores are accepted together or not at all.

    Example:

    >>> scores = np.arange(1000)
    >>> errors = (scores >= 900) & (scores % 2 == 0)
    >>> outliers = np.arange(800, 1800)
    >>> wanted = Requirements(0.05, 0.8, 0.1, 0.05)
    >>> accepted_jointly(scores, errors, outliers, wanted)[0]
    883

    References:

    - Roger L. Berger, Multiparameter Hypothesis Testing and Acceptance
      Sampling, 1982.
    - Anastasios N. Angelopoulos et al., Learn then Test: Calibrating
      Predictive Algorithms to Achieve Risk Control, 2021.
    """
    scores, totals = bounds.sorted_with_errors(scores, errors)
    num_accepted = np.zeros(len(totals), int)
    # Outliers beside the threshold may come to lie below it.
    num_accepted[1:] = bounds.count_up_to(scores, outliers)
    p_values = np.zeros(len(totals))
    if requirements.risk is not None:
        p_values = bounds.risk_p_values(totals, requirements.risk)
    if requirements.rate is not None:
        rate_p_values = require("scipy.stats").binom.cdf(
            num_accepted, len(outliers), requirements.rate
        )
        p_values = np.maximum(p_values, rate_p_values)
    starts, level = requirements.starts(len(scores))
    passed, tests = bounds.walk_upwards(p_values, starts, level)
    accepted = bounds.largest_count(scores, passed)
    if accepted:
        return accepted, []
    return 0, [
        _test(count, totals, num_accepted, level, len(outliers), requirements)
        for _, level, count in tests
        if count is not None
    ]


def _test(count, totals, num_accepted, level, num_outliers, requirements):
    errors, outliers = int(totals[count]), int(num_accepted[count])
    risk_bound = rate_bound = None
    if requirements.risk is not None:
        risk_bound = float(bounds.risk_bound(errors, count, level))
    if requirements.rate is not None:
        rate_bound = float(bounds.risk_bound(outliers, num_outliers, level))
    return JointTest(
        count, errors, outliers, num_outliers, level, risk_bound, rate_bound
    )


def samples_for_test(test, requirements, num_samples, num_outliers):
    """Estimates how many samples make a failed test pass at the same rates.

    Args:
        test: `JointTest`, whose rates are below what is asked for.
        requirements: `Requirements`.
        num_samples: Integer, how many calibration samples there are.
        num_outliers: Integer, how many outliers there are.

    Returns:
        Tuple of integers, calibration samples and outliers, of two digits
        where they are more than there are.

    Example:

    >>> wanted = Requirements(0.05, 0.8, None, 0.05)
    >>> test = JointTest(829, 35, 0, 0, 0.0411, 0.0564, None)
    >>> samples_for_test(test, wanted, 1000, 0)
    (3200, 0)
    """

    def reaches(count, errors, level, most):
        return most is None or (
            bounds.risk_bound(math.ceil(errors), count, level) <= most
        )

    def level_and_count(samples):
        starts, level = requirements.starts(samples)
        count = test.count / num_samples * samples
        if requirements.coverage is not None:
            count = starts[0] - 1
        return level / len(starts), count

    def enough_samples(samples):
        level, count = level_and_count(samples)
        errors = test.errors / test.count * count
        return reaches(count, errors, level, requirements.risk)

    samples = _grown(num_samples, enough_samples)
    level = min(test.level, level_and_count(samples)[0])
    outliers = 0
    if num_outliers:
        share = test.outliers / num_outliers
        outliers = _grown(
            num_outliers,
            lambda m: reaches(m, share * m, level, requirements.rate),
        )
    return samples, outliers


def _grown(number, is_enough):
    if is_enough(number):
        return number
    while number < _MAX_SAMPLES and not is_enough(number):
        number = math.ceil(1.05 * number)
    return int(float(f"{number:.2g}"))
