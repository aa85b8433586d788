"""The statistics behind the rejection rules, as pure functions of NumPy.

Nothing is assumed of how scores are distributed, only that calibration data
and new inputs are drawn independently from the same source. A sample is
accepted when its score is at most the threshold.
"""

import collections
import math

import numpy as np

from keras_halo.utils.extras import require

# Doubles that should be an integer, such as 0.07 * 100, may miss it by this.
_ROUNDING = 1e-12

_MAX_SAMPLES = 1e12

# How many of the highest calibration scores a table of ranks has, and how many
# of the others.
_TABLE_SIZE = 128

# By how much another batch size or compiler moves a score, relative to it. A
# score is a difference of logits that are some tens of times as large.
_SCORE_ROUNDING = 1e-5

# Scores that are nearer than this, relative to them, may be one score that
# batches of two sizes rounded differently: sixteen units in the last place of
# float32, about twice what was measured for most methods. The margin above may
# be larger, since it is taken only where no scores lie.
_SAME_SCORE = 2e-6


def samples_for_coverage(coverage, delta=None):
    """Returns the least number of samples that can guarantee a coverage.

    Formula:

    ```python
    n >= coverage / (1 - coverage)         # on average
    n >= log(delta) / log(coverage)        # with confidence 1 - delta
    ```

    Args:
        coverage: Float in `(0, 1)`.
        delta: Float in `(0, 1)`, or `None` for a guarantee on average. Defaults
            to `None`.

    Returns:
        Integer.

    Example:

    >>> samples_for_coverage(0.95), samples_for_coverage(0.95, delta=0.05)
    (19, 59)
    """
    if delta is None:
        return _ceil(coverage / (1.0 - coverage))
    return _ceil(math.log(delta) / math.log(coverage))


def coverage_rank(num_samples, coverage, delta=None):
    """Returns the rank of the score below which a coverage is kept.

    The share of the population up to the k-th smallest of n scores follows a
    Beta(k, n + 1 - k) distribution (with ties it is larger), whatever the
    scores are.

    Formula:

    ```python
    k = ceil((n + 1) * coverage)                         # mean of the Beta
    k = min{k : P(Beta(k, n + 1 - k) < coverage) <= delta}
    ```

    Args:
        num_samples: Integer `n`, at least `samples_for_coverage`.
        coverage: Float in `(0, 1)`.
        delta: Float in `(0, 1)`, or `None` for a guarantee on average. Defaults
            to `None`.

    Returns:
        Integer in `[1, n]`.

    Example:

    >>> coverage_rank(100, 0.95), coverage_rank(100, 0.95, delta=0.05)
    (96, 99)
    """
    if delta is None:
        return _ceil((num_samples + 1) * coverage)
    # P(Beta(k, n + 1 - k) < c) = P(Binomial(n, c) >= k).
    # Equality is to do, as it does for `samples_for_coverage`.
    delta = delta * (1.0 + _ROUNDING)
    binomial = require("scipy.stats").binom
    return int(binomial.isf(delta, num_samples, coverage)) + 1


def coverage_threshold(scores, coverage, delta=None):
    """Returns the lowest threshold that keeps a coverage.

    Args:
        scores: Array of shape `(n,)`, of at least `samples_for_coverage`.
        coverage: Float in `(0, 1)`.
        delta: As in `coverage_rank`.

    Returns:
        Float.

    Example:

    >>> round(coverage_threshold(np.arange(100.0), 0.95), 2)
    95.0
    """
    rank = coverage_rank(len(scores), coverage, delta)
    largest = float(np.partition(scores, rank - 1)[rank - 1])
    return threshold_above(largest, scores)


def coverage_bound(rank, num_samples, delta):
    """Returns the coverage that a rank keeps with a given confidence.

    Formula:

    ```python
    bound = quantile(Beta(rank, num_samples + 1 - rank), delta)
    ```

    Args:
        rank: Integer in `[1, num_samples]`.
        num_samples: Integer, the size of the calibration set.
        delta: Float in `(0, 1)`.

    Returns:
        Float: with probability `1 - delta` over calibration sets, at least
        this share of the population has scores up to that rank.

    Example:

    >>> round(coverage_bound(96, 100, 0.05), 4)
    0.9108
    """
    return float(
        require("scipy.stats").beta.ppf(delta, rank, num_samples + 1 - rank)
    )


def conformal_p_values(scores, calibration_scores):
    """Computes how probably a known input scores at least as high, by rank.

    Formula:

    ```python
    p(s) = (1 + #{i : raised(calibration_scores)[i] >= s}) / (n + 1)
    ```

    For a new known input `P(p <= alpha) <= alpha` at every `alpha`, whatever
    the distribution of scores. Calibration scores are raised as
    `threshold_above` raises the threshold, so that `p > alpha` exactly where
    a score is at most that threshold.

    Args:
        scores: Array of any shape.
        calibration_scores: Sorted array of shape `(n,)`.

    Returns:
        Array shaped as `scores`, values in `(0, 1]`.

    Example:

    >>> conformal_p_values(np.array([0.5, 9.0]), np.arange(4.0)).tolist()
    [0.8, 0.2]

    References:

    - Vladimir Vovk, Alex Gammerman, Glenn Shafer, Algorithmic Learning in a
      Random World, 2005.
    """
    calibration_scores = raised(calibration_scores)
    below = np.searchsorted(calibration_scores, scores, side="left")
    n = len(calibration_scores)
    return (1.0 + (n - below)) / (n + 1.0)


def table_of_ranks(scores):
    """Makes a short table of calibration scores to read p-values from.

    The highest scores stand in it each by itself, the others in groups at the
    highest score of each. So the p-values of the table are never below those
    of all scores, equal to them where they are small, and larger by less than
    one in a hundred elsewhere.

    Formula:

    ```python
    p(s) = (1 + sum(counts[entries >= s])) / (n + 1)
    ```

    Args:
        scores: Vector of `n` calibration scores.

    Returns:
        Tuple: entries, an ascending vector of scores raised as
        `threshold_above` raises them, and as many integers, the counts.

    Example:

    >>> entries, counts = table_of_ranks(np.array([1.0, 2.0, 2.0]))
    >>> counts.tolist()
    [1, 2]
    >>> len(table_of_ranks(np.arange(1e5))[0])
    256
    """
    ranked = raised(np.sort(scores))
    n = len(ranked)
    lower = max(n - _TABLE_SIZE, 0)
    steps = np.ceil(np.linspace(0, lower, min(lower, _TABLE_SIZE) + 1)[1:])
    ends = np.concatenate([steps.astype(int), np.arange(lower, n) + 1])
    # Entries that share a score become one.
    entries, last = np.unique(ranked[ends - 1][::-1], return_index=True)
    ends = ends[::-1][last]
    return entries, np.diff(ends, prepend=0)


def threshold_above(largest, scores):
    """Returns a threshold that accepts a score however it is rounded.

    Many inputs may share the score at the threshold, such as blank frames.
    Another batch size or compiler moves all of them by a few units in the last
    place of float32, and a threshold that is exactly that score would let the
    whole group change sides. So it lies in the gap to the next score.

    The last batch of the calibration data may have moved some of the group
    already. Scores that are nearer than `2e-6` of their size are accepted with
    the largest one, and the gap is the one after them. They are counted from
    that score, not from one to the next, so that the many scores of a large
    calibration set cannot form a chain. Whatever moves scores by less than
    half of that distance leaves accepted what is at most `largest`.

    Formula:

    ```python
    scale = max(abs(largest), mean(abs(scores)))
    top = max(scores[scores <= largest + 2e-6 * scale])
    following = min(scores[scores > top])
    threshold = top + min((following - top) / 2, 1e-5 * scale)
    ```

    Args:
        largest: Float, the largest score to accept.
        scores: Vector of calibration scores.

    Returns:
        Float, at least `largest`, below every score that is larger and not
        next to it.

    Example:

    >>> threshold_above(2.0, np.array([1.0, 2.0, 3.0]))
    2.00002
    >>> threshold_above(2.0, np.array([1.0, 2.0, 2.00001]))
    2.000005
    >>> round(threshold_above(2.0, np.array([1.0, 2.0, 2.000001])), 6)
    2.000021
    """
    distinct = np.unique(np.append(scores, largest))
    return float(_raise(largest, distinct, _mean_magnitude(scores)))


def raised(scores):
    """Raises each score of a sorted vector as `threshold_above` does.

    Args:
        scores: Sorted vector.

    Returns:
        Sorted vector.

    Example:

    >>> raised(np.array([1.0, 1.0, 3.0])).round(3).tolist()
    [1.0, 1.0, 3.0]
    >>> bool((raised(np.array([1.0, 3.0])) > [1.0, 3.0]).all())
    True
    """
    distinct, inverse = np.unique(scores, return_inverse=True)
    return _raise(distinct, distinct, _mean_magnitude(scores))[inverse]


def _raise(scores, distinct, mean_magnitude):
    """Scores, raised into the gaps after those that are nearly the same."""
    ends = np.searchsorted(
        distinct, _upmost(scores, mean_magnitude), side="right"
    )
    tops = distinct[ends - 1]
    return _into_gap(tops, np.append(distinct, np.inf)[ends], mean_magnitude)


def _into_gap(scores, following, mean_magnitude):
    """Numbers in the gaps between scores and those that follow."""
    with np.errstate(over="ignore"):
        margins = np.minimum(
            _SCORE_ROUNDING * np.maximum(np.abs(scores), mean_magnitude),
            (following - scores) / 2.0,
        )
        raised = scores + margins
    # Neighbours in float64 leave no room, nor does its largest number.
    fits = np.isfinite(raised) & (raised < following)
    return np.where(fits, raised, scores)


def _distance(scores, mean_magnitude):
    """How far away a score that is nearly the same may be."""
    return _SAME_SCORE * np.maximum(np.abs(scores), mean_magnitude)


def _upmost(scores, mean_magnitude):
    """The largest numbers that are nearly the same as scores."""
    with np.errstate(over="ignore"):
        return scores + _distance(scores, mean_magnitude)


def _mean_magnitude(scores):
    """The mean of the magnitudes, whose sum may be too large for a float."""
    top = float(np.abs(scores).max())
    if not top:
        return 0.0
    # Sorted, so that the order of the samples rounds nothing otherwise.
    return top * float(np.mean(np.sort(np.abs(scores) / top)))


def threshold_below(smallest, scores):
    """Returns a threshold that rejects a score however it is rounded.

    Formula: that of `threshold_above`, downwards.

    Args:
        smallest: Float, the smallest score to reject.
        scores: Vector of calibration scores.

    Returns:
        Float below `smallest`, at least every score that is smaller and not
        next to it.

    Example:

    >>> threshold_below(2.0, np.array([1.0, 2.0, 3.0]))
    1.99998
    """
    threshold = -threshold_above(-smallest, -scores)
    if threshold >= smallest:
        threshold = float(np.nextafter(smallest, -np.inf))
    return threshold


def samples_for_risk(risk, delta):
    """Returns the least number of samples that can guarantee a risk.

    Even without a single error `n` samples leave `(1 - risk) ** n` of doubt.
    One more sample sets the first threshold that is tested.

    Formula:

    ```python
    n >= log(delta) / log(1 - risk) + 1
    ```

    Args:
        risk: Float in `(0, 1)`.
        delta: Float in `(0, 1)`.

    Returns:
        Integer.

    Example:

    >>> samples_for_risk(0.05, 0.05)
    60
    """
    return _ceil(math.log(delta) / math.log1p(-risk)) + 1


def risk_bound(errors, num_samples, delta):
    """Computes an exact upper bound of an error rate (Clopper-Pearson).

    Formula:

    ```python
    bound = quantile(Beta(errors + 1, num_samples - errors), 1 - delta)
    ```

    Args:
        errors: Integer or array of integers.
        num_samples: Integer or array of integers, at least `errors`.
        delta: Float in `(0, 1)`.

    Returns:
        Array: with probability `1 - delta` the error rate is below it.

    Example:

    >>> float(risk_bound(3, 100, 0.05).round(4))
    0.0757
    """
    bound = require("scipy.stats").beta.ppf(
        1.0 - delta, np.add(errors, 1), np.subtract(num_samples, errors)
    )
    return np.where(np.equal(errors, num_samples), 1.0, bound)


def accepted_at_risk(scores, errors, risk, delta):
    """Counts the lowest scores that can be accepted at a guaranteed risk.

    Let `R(t)` be the error rate of the population among scores up to `t`. The
    hypothesis "`R(t) > risk`" is rejected for a threshold when the binomial
    test of the `e` errors among the `n` samples up to it says so,

    ```python
    p(t) = P(Binomial(n, risk) <= e) <= level
    ```

    which is: the Clopper-Pearson bound at `level` is at most `risk`. The
    thresholds, all real numbers, are tested upwards from the score of a start
    rank, and testing goes on until one test fails (fixed-sequence testing);
    the last threshold that passed is taken. Starts lie at a half, a quarter,
    ... of the samples, and `delta` is divided among these few starts alone,
    not among the thresholds; a chain of passed tests that reaches the next
    start takes that start's share along (the fallback procedure), so that a
    chain from the lowest start arrives with the whole `delta`.

    Why `P(R(threshold) > risk) <= delta`: ties are broken at random, so scores
    may be taken to be continuous, and with them `R`. Accepting a threshold
    beyond the risk takes a chain that runs, from its start `u`, through the
    first `t >= u` with `R(t) > risk`.

    - If `R(u) <= risk`, that first `t` has `R(t) = risk`, and so has the last
      such point `a` below `u`, if there is one. Hence also the samples in
      `(a, t]` alone have error rate `risk`, and given how many samples lie
      below `a` and `t`, which decides on what side of them the start ranks
      fall, the errors up to `t` are Binomial(n, risk): the test at `t` passes
      with probability at most its level, the sum of the shares of the starts
      within `(a, t]`.
    - If `R(u) > risk`, the samples below the start rank are, given the score
      `u` at that rank, independent draws from below `u`; the test at a start
      counts these alone and passes with probability at most its share.

    The shares sum to `delta`, whatever start falls where.

    Args:
        scores: Array of shape `(n,)`.
        errors: Boolean array of shape `(n,)`.
        risk: Float in `(0, 1)`.
        delta: Float in `(0, 1)`.

    Returns:
        Integer in `[0, n]`; zero if no threshold passes. Equal scores, and
        those that rounding may have made different, are accepted together or
        not at all; see `largest_count`.

    Example:

    >>> scores = np.arange(1000)
    >>> errors = (scores >= 600) & (scores % 2 == 0)
    >>> accepted_at_risk(scores, errors, risk=0.05, delta=0.05)
    644

    References:

    - Yonatan Geifman, Ran El-Yaniv, Selective Classification for Deep Neural
      Networks, 2017.
    - Anastasios N. Angelopoulos et al., Learn then Test: Calibrating
      Predictive Algorithms to Achieve Risk Control, 2021.
    - Brian L. Wiens, Alexei Dmitrienko, The Fallback Procedure for Evaluating
      a Single Family of Hypotheses, 2005.
    """
    scores, passed, _ = _test_upwards(scores, errors, risk, delta)
    return largest_count(scores, passed)


def largest_count(scores, passed):
    """Returns the largest number of lowest scores that a test lets accept.

    The sample after the last accepted one must have a larger score. Where the
    two are nearer than another batch size may move them, the scores within
    half of that distance of the threshold may come to lie on either side of
    it. Every number of them must have passed then: a group of inputs that was
    rounded in two ways is accepted as a whole or not at all, unless either is
    proved. Whatever is chosen among thresholds that passed has their
    guarantee.

    Args:
        scores: Ascending vector of `n` scores.
        passed: Booleans of shape `(n + 1,)`, by the number of lowest scores.

    Returns:
        Integer in `[0, n]`; zero if there is none.

    Example:

    >>> passed = np.array([False, True, True, False])
    >>> largest_count(np.array([1.0, 2.0, 3.0]), passed)
    2
    >>> largest_count(np.array([1.0, 2.0, 2.0 + 1e-7]), passed)
    1
    """
    counts = np.arange(1, len(scores) + 1)
    counts = counts[np.append(scores[:-1] < scores[1:], True)]
    mean_magnitude = _mean_magnitude(scores)
    following = np.append(scores, np.inf)[counts]
    thresholds = _into_gap(scores[counts - 1], following, mean_magnitude)
    reach = _distance(thresholds, mean_magnitude) / 2.0
    with np.errstate(over="ignore"):
        fewest = np.searchsorted(scores, thresholds - reach, side="right")
        most = np.searchsorted(scores, thresholds + reach, side="right")
    failed = np.cumsum(np.append(0, ~passed))
    counts = counts[failed[most + 1] == failed[fewest]]
    return int(counts[-1]) if len(counts) else 0


def threshold_after(count, scores, others=()):
    """Returns a threshold that accepts so many of the lowest scores.

    Args:
        count: Integer in `[1, n]`, such as `largest_count` returns.
        scores: Vector of `n` scores.
        others: Vector of scores, of which the threshold lies below all that
            are larger than the last accepted one, unless they are nearly the
            same. Defaults to `()`.

    Returns:
        Float, in the gap to the next score.

    Example:

    >>> threshold_after(2, np.array([1.0, 2.0, 2.000001]))
    2.0000005
    """
    mean_magnitude = _mean_magnitude(scores)
    largest = np.partition(scores, count - 1)[count - 1]
    others = np.asarray(others, "float64")
    above = np.concatenate(
        [
            scores[scores > largest],
            others[others > _upmost(largest, mean_magnitude)],
        ]
    )
    following = above.min() if above.size else np.inf
    return float(_into_gap(largest, following, mean_magnitude))


def count_up_to(scores, others):
    """Counts other scores that are at most each score, or nearly the same.

    Args:
        scores: Vector of scores.
        others: Vector of other scores.

    Returns:
        Integers, as many as there are scores.

    Example:

    >>> others = np.array([1.0, 2.0, 2.0 + 1e-7, 3.0])
    >>> count_up_to(np.array([1.0, 2.0]), others).tolist()
    [1, 3]
    """
    upmost = _upmost(scores, _mean_magnitude(scores))
    return np.searchsorted(np.sort(others), upmost, side="right")


def count_near(score, scores):
    """Counts the scores that are nearly the same as one of them.

    Args:
        score: Float.
        scores: Vector of scores.

    Returns:
        Integer.

    Example:

    >>> count_near(2.0, np.array([1.0, 2.0, 2.0 + 1e-7, 3.0]))
    2
    """
    distance = _distance(score, _mean_magnitude(scores))
    return int((np.abs(scores - score) <= distance).sum())


StartTest = collections.namedtuple(
    "StartTest", ["count", "errors", "level", "bound"]
)
StartTest.__doc__ = """The test at which a chain of thresholds starts.

Args:
    count: Integer, the number of samples below the start, those with the
        lowest scores.
    errors: Integer, how many of them are wrong.
    level: Float, the share of `delta` that the test has.
    bound: Float, the upper bound of the risk at this level. The test passes
        where it is at most the risk to keep.
"""


def tests_at_risk(scores, errors, risk, delta):
    """Returns the first tests of `accepted_at_risk`, and how far they led.

    Args:
        scores: Array of shape `(n,)`.
        errors: Boolean array of shape `(n,)`.
        risk: Float in `(0, 1)`.
        delta: Float in `(0, 1)`.

    Returns:
        Tuple: a list of `StartTest`, from the lowest start on, and the number
        of lowest scores that passed if equal scores need not stay together.

    Example:

    >>> tests, passed = tests_at_risk(
    ...     np.arange(100), np.arange(100) % 9 == 0, risk=0.05, delta=0.05
    ... )
    >>> tests[0].count, tests[0].errors, passed
    (99, 11, 0)
    """
    _, passed, starts = _test_upwards(scores, errors, risk, delta)
    tests = [
        StartTest(*start, float(risk_bound(start[1], start[0], start[2])))
        for start in starts
    ]
    return tests, int(np.flatnonzero(passed)[-1]) if passed.any() else 0


def samples_for_rate(rate, share, risk, delta, num_samples):
    """Estimates how many samples prove a risk at a given error rate.

    Args:
        rate: Float below `risk`, the error rate among the lowest scores.
        share: Float in `(0, 1)`, the share of the samples that these are.
        risk: Float in `(0, 1)`.
        delta: Float in `(0, 1)`.
        num_samples: Integer, where to begin.

    Returns:
        Integer, of two digits: a calibration set of which the lowest scores
        pass the test, if they have the same error rate.

    Example:

    >>> samples_for_rate(0.025, 0.5, risk=0.05, delta=0.05, num_samples=200)
    680
    """
    found = float(num_samples)
    # A rate next to the risk would take more samples than can be counted.
    while found < _MAX_SAMPLES:
        found *= 1.05
        level = delta / len(start_ranks(int(found), risk, delta))
        count = share * found
        if risk_bound(math.ceil(rate * count), count, level) <= risk:
            break
    return int(float(f"{found:.2g}"))


def _test_upwards(scores, errors, risk, delta):
    """Sorted scores, which counts of them passed, and the tests at starts."""
    scores, totals = sorted_with_errors(scores, errors)
    p_values = risk_p_values(totals, risk)
    starts = start_ranks(len(scores), risk, delta)
    passed, tests = walk_upwards(p_values, starts, delta)
    return (
        scores,
        passed,
        [(count, int(totals[count]), level) for count, level, _ in tests],
    )


def sorted_with_errors(scores, errors):
    """Sorts scores and counts how many of the lowest ones are wrong.

    Args:
        scores: Array of shape `(n,)`.
        errors: Boolean array of shape `(n,)`.

    Returns:
        Tuple: the sorted scores, and `n + 1` integers, the number of errors
        among the `0, 1, ..., n` lowest.

    Example:

    >>> sorted_with_errors(np.array([3, 1]), np.array([True, False]))[1]
    array([0, 0, 1])
    """
    # The order of the samples may depend on their labels: shuffle it away.
    tie_breaker = np.random.default_rng(0).permutation(len(scores))
    order = np.lexsort((tie_breaker, scores))
    return scores[order], np.concatenate([[0], np.cumsum(errors[order])])


def risk_p_values(totals, risk):
    """Computes p-values of "the risk is larger", by number of lowest scores.

    Args:
        totals: Integers of shape `(n + 1,)`, the errors among the `0, 1, ...,
            n` lowest scores.
        risk: Float in `(0, 1)`.

    Returns:
        Array of shape `(n + 1,)`.

    Example:

    >>> risk_p_values(np.array([0, 0, 0]), 0.5).tolist()
    [1.0, 0.5, 0.25]
    """
    binomial = require("scipy.stats").binom
    return binomial.cdf(totals, np.arange(len(totals)), risk)


def walk_upwards(p_values, starts, delta):
    """Tests thresholds upwards, from each start until one fails.

    See `accepted_at_risk` for the procedure.

    Args:
        p_values: Array of shape `(n + 1,)`, by the number of lowest scores.
        starts: List of ascending integers, ranks in `[1, n]`.
        delta: Float, what the starts share.

    Returns:
        Tuple: booleans of shape `(n + 1,)`, which numbers passed; and for
        each start the number of samples below it, the level of its test, and
        the number whose test failed, `None` where the next start was reached.

    Example:

    >>> walk_upwards(np.array([1.0, 0.01, 0.02, 0.9]), [2], 0.05)
    (array([False, False,  True, False]), [(1, 0.05, 3)])
    """
    passed = np.zeros(len(p_values), bool)
    level = 0.0
    tests = []
    for start, stop in zip(starts, [*starts[1:], len(p_values)], strict=True):
        level += delta / len(starts)
        # Equality is to pass, and rounding of `1 - risk` may not spoil it.
        limit = level * (1.0 + _ROUNDING)
        # The last sample of the chain so far, or the samples below the start.
        failures = np.flatnonzero(p_values[start - 1 : stop] > limit)
        failed = start - 1 + int(failures[0]) if failures.size else None
        tests.append((start - 1, level, failed))
        if failed is not None:
            stop = failed
            level = 0.0
        passed[start:stop] = True
    return passed, tests


def start_ranks(n, risk, delta):
    """Returns ranks at `n / 2`, `n / 4`, ... that leave room for an error.

    Args:
        n: Integer, at least `samples_for_risk`.
        risk: Float in `(0, 1)`.
        delta: Float in `(0, 1)`.

    Returns:
        List of ascending integers.

    Example:

    >>> start_ranks(1000, risk=0.05, delta=0.05)
    [125, 250, 500]
    """
    lowest = min(2 * samples_for_risk(risk, delta), n)
    starts = []
    while n // 2 >= lowest:
        n //= 2
        starts.insert(0, n)
    return starts or [lowest]


def _ceil(value):
    return math.ceil(value * (1.0 - _ROUNDING))
