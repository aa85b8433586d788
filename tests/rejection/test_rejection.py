"""Rejection rules: what they guarantee is kept, and bad input is refused."""

import concurrent.futures
import hashlib
import json
import math
import os
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
from helpers import packed, to_numpy
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import keras_halo
from keras_halo.ops.ood_scores import OOD_METHODS, ood_score
from keras_halo.rejection import (
    ConformalRule,
    CoverageRule,
    DecisionLog,
    FalsePositiveRateRule,
    JointRule,
    RejectionRule,
    SelectiveRiskRule,
    StreamMonitor,
    bounds,
    load_rule,
    storage,
)

DRAWS = 1000
DELTA = 0.05
CENTROIDS = 3.0 * np.random.default_rng(5).normal(size=(3, 8))

RULES = {
    "coverage": CoverageRule(0.9),
    "coverage-delta": CoverageRule(0.9, delta=0.05),
    "false-positives": FalsePositiveRateRule(0.1),
    "selective-risk": SelectiveRiskRule(0.2),
    "joint": JointRule(0.2, 0.5),
    "conformal": ConformalRule(0.1),
    "conformal-fdr": ConformalRule(0.1, fdr=True),
}


@pytest.fixture(params=RULES)
def new_rule(request):
    """A function that makes an unfitted rule."""
    rule = RULES[request.param]
    return lambda **changes: type(rule)(**(rule.get_config() | changes))


def known_data(n=300, seed=0, spread=1.0, **head):
    """Packed scores around the centroids and the classes they belong to."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    embeddings = CENTROIDS - CENTROIDS.mean(axis=0)
    embeddings = embeddings[labels] + spread * rng.normal(size=(n, 8))
    return packed(embeddings, CENTROIDS, **head), labels


def fit(rule, scores, labels):
    if isinstance(rule, FalsePositiveRateRule):
        return rule.fit(scores)
    return rule.fit(scores, labels)


def sampling_error(rate, n):
    """Three standard deviations of a share of n."""
    return 3.0 * math.sqrt(rate * (1.0 - rate) / n)


# The guarantees, by simulation ----------------------------------------------

# Error probability of a sample by its quantile: the true risk of a threshold
# is its integral.
POPULATIONS = {
    "errors grow with the score": lambda u: 1 / (1 + np.exp((1.02 - u) / 0.11)),
    "barely too many everywhere": lambda u: np.full_like(u, 0.0502),
    "worst among the lowest scores": lambda u: np.select(
        [u < 0.05, u < 0.6], [0.12, 0.01], 0.3
    ),
    "risk crosses the guarantee twice": lambda u: np.select(
        [u < 0.2, u < 0.4, u < 0.6], [0.03, 0.08, 0.01], 0.12
    ),
    "ten distinct scores": lambda u: 0.3 * np.floor(10 * u) ** 3 / 1e3,
}
QUANTILES = (np.arange(100_000) + 0.5) / 100_000


def selective_risks(name, choose):
    """True risk and coverage of the threshold of many calibration draws."""
    error_rate = POPULATIONS[name]
    true_risk = np.cumsum(error_rate(QUANTILES)) / np.arange(1, 100_001)
    rng = np.random.default_rng(7)
    risks, coverages = [], []
    for _ in range(DRAWS):
        u = rng.random(1000)
        errors = rng.random(1000) < error_rate(u)
        scores = np.floor(10 * u) if name == "ten distinct scores" else u
        count = choose(scores, errors)
        if not count:
            risks.append(0.0)
            coverages.append(0.0)
            continue
        threshold = np.sort(scores)[count - 1]
        if name == "ten distinct scores":
            threshold = (threshold + 1) / 10
        index = round(threshold * 100_000) - 1
        risks.append(true_risk[index])
        coverages.append(threshold)
    return np.array(risks), np.array(coverages)


@pytest.mark.any_backend
@pytest.mark.parametrize("name", POPULATIONS)
def test_selective_risk_exceeds_the_bound_as_rarely_as_guaranteed(name):
    risks, coverages = selective_risks(
        name, lambda s, e: bounds.accepted_at_risk(s, e, 0.05, DELTA)
    )
    exceeded = np.mean(risks > 0.05)
    print(f"{name}: exceeded {exceeded:.3f}, coverage {coverages.mean():.3f}")
    assert exceeded <= DELTA + sampling_error(DELTA, DRAWS)


@pytest.mark.any_backend
def test_the_simulation_notices_a_threshold_without_guarantee():
    def largest_with_low_empirical_risk(scores, errors):
        totals = np.cumsum(errors[np.argsort(scores)])
        low = np.flatnonzero(totals <= 0.05 * np.arange(1, len(totals) + 1))
        return low[-1] + 1 if low.size else 0

    risks, _ = selective_risks(
        "errors grow with the score", largest_with_low_empirical_risk
    )
    assert np.mean(risks > 0.05) > 0.3


@pytest.mark.any_backend
def test_selective_risk_keeps_more_than_the_published_binary_search():
    from scipy import stats

    def binary_search(scores, errors):
        order = np.argsort(scores)
        totals = np.cumsum(errors[order])
        low, high, best = 1, len(scores), 0
        steps = math.ceil(math.log2(len(scores)))
        for _ in range(steps):
            middle = math.ceil((low + high) / 2)
            p = stats.binom.cdf(totals[middle - 1], middle, 0.05)
            if p <= DELTA / steps:
                best = low = middle
            else:
                high = middle
        return best

    name = "errors grow with the score"
    _, ours = selective_risks(
        name, lambda s, e: bounds.accepted_at_risk(s, e, 0.05, DELTA)
    )
    _, published = selective_risks(name, binary_search)
    print(f"coverage {ours.mean():.3f}, published {published.mean():.3f}")
    assert ours.mean() > published.mean() + 0.01


@pytest.mark.any_backend
@pytest.mark.parametrize("n", [50, 333])
def test_coverage_is_kept_on_average_and_with_confidence(n):
    rng = np.random.default_rng(1)
    # Scores are quantiles: the true coverage of a threshold is itself.
    thresholds = {None: [], 0.1: []}
    for _ in range(DRAWS):
        scores = rng.random(n)
        for delta, values in thresholds.items():
            rule = CoverageRule(0.9, None, delta).fit(scores)
            assert np.mean(rule.predict(scores).accepted) >= 0.9
            values.append(rule.threshold)
            if delta is None:
                values[-1] = (rule.threshold, rule.coverage_bound(0.1))
    average, bound = np.array(thresholds[None]).T
    deviation = 3.0 * average.std() / math.sqrt(DRAWS)
    assert 0.9 - deviation <= average.mean() <= 0.9 + 1.0 / n + deviation
    limit = 0.1 + sampling_error(0.1, DRAWS)
    assert np.mean(average < bound) <= limit
    assert np.mean(np.array(thresholds[0.1]) < 0.9) <= limit


@pytest.mark.any_backend
@pytest.mark.parametrize("delta", [None, 0.1])
def test_false_positive_rate_is_kept(delta):
    rng = np.random.default_rng(2)
    rates = []
    for _ in range(DRAWS):
        outliers = rng.random(200)
        rule = FalsePositiveRateRule(0.1, None, delta).fit(outliers)
        assert rule.predict(outliers).coverage <= 0.1
        rates.append(rule.threshold)
    if delta is None:
        deviation = 3.0 * np.std(rates) / math.sqrt(DRAWS)
        assert abs(np.mean(rates) - 20 / 201) <= deviation
    else:
        exceeded = np.mean(np.array(rates) > 0.1)
        assert exceeded <= delta + sampling_error(delta, DRAWS)


@pytest.mark.any_backend
@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_conformal_false_alarms_are_as_rare_as_asked(alpha):
    rng = np.random.default_rng(3)
    alarms = []
    for _ in range(DRAWS):
        rule = ConformalRule(alpha, None).fit(rng.normal(size=99))
        alarms.append(rule.predict(rng.normal(size=50)).rejected.mean())
    # 99 samples make the rate exactly alpha.
    deviation = 3.0 * np.std(alarms) / math.sqrt(DRAWS)
    assert abs(np.mean(alarms) - alpha) <= deviation


@pytest.mark.any_backend
def test_false_discoveries_stay_under_their_level():
    rng = np.random.default_rng(4)
    proportions, found, plain = [], [], []
    outlier = np.arange(200) < 20
    for _ in range(DRAWS):
        calibration = rng.normal(size=1000)
        batch = rng.normal(size=200) + 4.0 * outlier
        rule = ConformalRule(0.1, None, fdr=True).fit(calibration)
        rejected = rule.predict(batch).rejected
        proportions.append(_false_share(rejected, outlier))
        found.append(rejected[outlier].mean())
        rejected = ConformalRule(0.1, None).fit(calibration).predict(batch)
        plain.append(_false_share(rejected.rejected, outlier))
    print(f"FDR {np.mean(proportions):.3f}, power {np.mean(found):.3f}")
    deviation = 3.0 * np.std(proportions) / math.sqrt(DRAWS)
    # Benjamini-Hochberg keeps alpha times the share of known inputs.
    assert abs(np.mean(proportions) - 0.1 * 0.9) <= deviation
    assert np.mean(found) > 0.8
    assert np.mean(plain) > 0.3


def _false_share(rejected, outlier):
    return (rejected & ~outlier).sum() / max(rejected.sum(), 1)


# The same numbers, written out ----------------------------------------------


def binomial_cdf(k, n, p):
    return sum(
        math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1)
    )


def naive_accepted_at_risk(scores, errors, risk, delta):
    n = len(scores)
    lowest = 2
    while (1 - risk) ** (lowest - 1) > delta:
        lowest += 1
    lowest = min(2 * lowest, n)
    starts = [n // 2**j for j in range(1, 40) if n // 2**j >= lowest][::-1]
    starts = starts or [lowest]
    shuffled = np.random.default_rng(0).permutation(n)
    order = sorted(range(n), key=lambda i: (scores[i], shuffled[i]))
    best, level, alive = 0, 0.0, False
    for rank in range(1, n + 1):
        if rank in starts:
            if not alive:
                level = 0.0
            level += delta / len(starts)
            below = sum(bool(errors[i]) for i in order[: rank - 1])
            alive = binomial_cdf(below, rank - 1, risk) <= level
        wrong = sum(bool(errors[i]) for i in order[:rank])
        alive = alive and binomial_cdf(wrong, rank, risk) <= level
        last = rank == n or scores[order[rank]] > scores[order[rank - 1]]
        if alive and last:
            best = rank
    return best


@pytest.mark.any_backend
@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(12, 120),
    distinct=st.sampled_from([3, 20, 10**6]),
    risk=st.sampled_from([0.2, 0.3, 0.5]),
    steepness=st.floats(0.0, 1.0),
    seed=st.integers(0, 10**6),
)
def test_selective_risk_equals_the_procedure_written_out(
    n, distinct, risk, steepness, seed
):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, distinct, n) / distinct
    errors = rng.random(n) < steepness * scores
    expected = naive_accepted_at_risk(scores, errors, risk, 0.1)
    assert bounds.accepted_at_risk(scores, errors, risk, 0.1) == expected


@pytest.mark.any_backend
@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(1, 300),
    coverage=st.floats(0.01, 0.99),
    delta=st.floats(0.001, 0.5),
)
def test_ranks_are_the_smallest_that_keep_the_guarantee(n, coverage, delta):
    if n >= bounds.samples_for_coverage(coverage):
        rank = bounds.coverage_rank(n, coverage)
        assert 1 <= rank <= n
        assert (rank - 1) / (n + 1) < coverage <= rank / (n + 1) + 1e-9
    else:
        assert n / (n + 1) < coverage
    if n >= bounds.samples_for_coverage(coverage, delta):
        rank = bounds.coverage_rank(n, coverage, delta)
        assert 1 <= rank <= n
        # P(share below the k-th smallest < c) = P(Binomial(n, c) >= k).
        failure = 1.0 - binomial_cdf(rank - 1, n, coverage)
        assert failure <= delta + 1e-9
        assert bounds.coverage_bound(rank, n, delta) >= coverage - 1e-9
        if rank > 1:
            assert 1.0 - binomial_cdf(rank - 2, n, coverage) > delta - 1e-9
    else:
        assert coverage**n > delta - 1e-9


@pytest.mark.any_backend
def test_risk_bound_is_where_so_few_errors_become_unlikely():
    for errors, n in [(0, 59), (3, 100), (20, 20)]:
        bound = float(bounds.risk_bound(errors, n, 0.05))
        if errors == n:
            assert bound == 1.0
        else:
            assert binomial_cdf(errors, n, bound) == pytest.approx(0.05)


@pytest.mark.any_backend
@settings(max_examples=50, deadline=None)
@given(
    calibration=st.lists(st.integers(0, 9), min_size=9, max_size=40),
    scores=st.lists(st.integers(-2, 12), min_size=1, max_size=20),
)
def test_conformal_p_values_and_decisions_written_out(calibration, scores):
    n = len(calibration)
    p = np.array(
        [(1 + sum(c >= s for c in calibration)) / (n + 1) for s in scores]
    )
    rule = ConformalRule(0.1, None).fit(calibration)
    np.testing.assert_allclose(rule.p_values(scores), p)
    accepted = rule.predict(scores).accepted
    np.testing.assert_array_equal(accepted, p > 0.1)
    coverage = CoverageRule(0.9, None).fit(calibration).predict(scores)
    np.testing.assert_array_equal(accepted, coverage.accepted)

    order = np.argsort(p)
    passing = [
        k for k in range(1, len(p) + 1) if p[order[k - 1]] <= 0.1 * k / len(p)
    ]
    rejected = p <= p[order[passing[-1] - 1]] if passing else p < 0
    rule = ConformalRule(0.1, None, fdr=True).fit(calibration)
    decisions = rule.predict(scores)
    np.testing.assert_array_equal(decisions.rejected, rejected)
    # Whatever the batch, nothing below the threshold is rejected.
    assert decisions.accepted[decisions.scores <= rule.threshold].all()


@pytest.mark.any_backend
@settings(max_examples=50, deadline=None)
@given(
    scores=st.lists(
        st.floats(-1e300, 1e300), min_size=20, max_size=60, unique=False
    )
)
def test_order_of_calibration_samples_does_not_matter(scores):
    backwards = scores[::-1]
    for make in (
        lambda: CoverageRule(0.9, None),
        lambda: FalsePositiveRateRule(0.1, None),
        lambda: ConformalRule(0.1, None),
    ):
        rule = make().fit(scores)
        assert rule.threshold == make().fit(backwards).threshold
        # A higher score is never accepted in place of a lower one.
        decisions = rule.predict(scores)
        if decisions.rejected.any() and decisions.accepted.any():
            highest = decisions.scores[decisions.accepted].max()
            assert highest < decisions.scores[decisions.rejected].min()


# Ties, constants, shapes ----------------------------------------------------


@pytest.mark.any_backend
def test_constant_scores_are_accepted_together_or_refused_together():
    constant = np.full(200, 3.0)
    assert (
        CoverageRule(method=None).fit(constant).predict(constant).coverage == 1
    )
    assert (
        ConformalRule(method=None).fit(constant).predict(constant).coverage == 1
    )
    rule = FalsePositiveRateRule(method=None).fit(constant)
    assert rule.predict(constant).coverage == 0.0
    rule = SelectiveRiskRule(0.1, method=None)
    few, many = np.arange(200) < 4, np.arange(200) < 40
    assert rule.fit(constant, errors=few).predict(constant).coverage == 1.0
    with pytest.raises(ValueError, match="No threshold keeps the risk"):
        rule.fit(constant, errors=many)


@pytest.mark.any_backend
@settings(max_examples=50, deadline=None)
@given(
    scores=st.lists(
        st.sampled_from([-2.0, 0.0, 1.0, 1.0 + 1e-7, 3.0, 1e6]),
        min_size=20,
        max_size=60,
    ),
    fdr=st.booleans(),
)
def test_p_values_stay_where_rounding_moves_ties(scores, fdr):
    # Scores that are all zero have no size of rounding.
    assume(any(scores))
    rule = ConformalRule(0.1, None, fdr=fdr).fit(scores)
    scores = np.sort(scores)
    moved = np.nextafter(scores.astype("float32"), np.float32(np.inf))
    moved = moved.astype("float64")
    # A neighbour that is nearer than rounding is the same score.
    same = np.isin(scores, (1.0, 1.0 + 1e-7))
    assert len(set(rule.p_values(scores)[same])) <= 1
    np.testing.assert_array_equal(rule.p_values(moved), rule.p_values(scores))
    np.testing.assert_array_equal(
        rule.predict(moved).accepted, rule.predict(scores).accepted
    )
    if not fdr:
        accepted = rule.p_values(moved) > 0.1
        np.testing.assert_array_equal(rule.predict(moved).accepted, accepted)


@pytest.mark.any_backend
def test_order_of_equal_scores_does_not_hide_their_errors():
    # Correct samples first: without shuffling, 100 of the ties would pass.
    scores = np.zeros(1000)
    errors = np.arange(1000) >= 800
    assert bounds.accepted_at_risk(scores, errors, 0.1, 0.05) == 0
    assert bounds.accepted_at_risk(scores, errors[::-1], 0.1, 0.05) == 0


@pytest.mark.parametrize("method", OOD_METHODS)
def test_packed_scores_are_judged_by_the_method_of_the_rule(method):
    scores, labels = known_data()
    rule = CoverageRule(0.9, method).fit(scores, labels)
    plain = ood_score(scores, method).astype("float64")
    expected = CoverageRule(0.9, None).fit(plain)
    assert rule.threshold == expected.threshold
    np.testing.assert_array_equal(
        rule.predict(scores).accepted, expected.predict(plain).accepted
    )


def test_decisions_on_packed_scores():
    scores, labels = known_data()
    rule = CoverageRule(0.9, "joint").fit(scores, labels)
    far = packed(np.full((2, 8), 40.0), CENTROIDS)
    decisions = rule.predict(np.concatenate([scores[:5], far]))
    np.testing.assert_array_equal(decisions.accepted, [True] * 5 + [False] * 2)
    np.testing.assert_array_equal(decisions.labels, [*labels[:5], -1, -1])
    np.testing.assert_array_equal(decisions.rejected, ~decisions.accepted)
    assert len(decisions) == 7
    assert decisions.coverage == 5 / 7
    with pytest.raises(ValueError):
        decisions.labels[0] = 2


def test_an_accepted_input_gets_a_class_where_the_model_would_abstain():
    origin = packed(np.full((1, 8), 0.01), CENTROIDS, bias=5.0)
    assert keras_halo.decode_predictions(origin).labels[0] == -1
    rule = CoverageRule(0.9).fit(np.repeat(origin, 20, axis=0))
    assert rule.predict(origin).labels[0] in (0, 1, 2)


def test_batches_of_any_length_get_the_scores_of_the_whole():
    scores, _ = known_data()
    rule = CoverageRule(0.9).fit(scores)
    whole = rule.predict(scores).scores
    for length in (1, 2, 3, 7):
        part = rule.predict(scores[-length:]).scores
        np.testing.assert_allclose(part, whole[-length:], rtol=1e-5)


def test_every_position_counts_and_decisions_keep_their_shape(new_rule):
    scores, labels = known_data(600)
    maps, label_maps = scores.reshape(6, 10, 10, 9), labels.reshape(6, 10, 10)
    flat = fit(new_rule(), scores, labels)
    rule = fit(new_rule(), maps, label_maps)
    assert rule.threshold == flat.threshold
    decisions = rule.predict(maps)
    assert decisions.accepted.shape == (6, 10, 10)
    np.testing.assert_array_equal(
        decisions.labels.ravel(), flat.predict(scores).labels
    )
    assert "600 positions of 6 inputs" in rule.guarantee
    assert "positions" not in flat.guarantee


@pytest.mark.parametrize("form", ["column", "one-hot", "float", "errors"])
def test_labels_in_every_form_give_the_same_rule(form):
    scores, labels = known_data()
    expected = SelectiveRiskRule(0.2).fit(scores, labels)
    rule = SelectiveRiskRule(0.2)
    if form == "errors":
        predicted = keras.ops.convert_to_numpy(scores)[:, :3].argmax(axis=-1)
        rule.fit(scores, errors=predicted != labels)
    else:
        convert = {
            "column": lambda y: y[:, None],
            "one-hot": lambda y: np.eye(3)[y],
            "float": lambda y: y.astype("float32"),
        }
        rule.fit(scores, convert[form](labels))
    assert rule.threshold == expected.threshold
    assert rule.summary() == expected.summary()


def test_tensors_of_the_backend_and_lists_are_taken():
    scores, labels = known_data()
    rule = CoverageRule(0.9).fit(scores, labels)
    tensor = keras.ops.convert_to_tensor(scores)
    assert CoverageRule(0.9).fit(tensor).threshold == rule.threshold
    np.testing.assert_array_equal(
        rule.predict(tensor).accepted, rule.predict(scores.tolist()).accepted
    )


def test_summary_tells_guarantee_and_numbers_achieved():
    scores, labels = known_data(500, spread=3.0)
    rule = SelectiveRiskRule(0.3).fit(scores, labels)
    summary = rule.summary()
    decisions = rule.predict(scores)
    accepted = decisions.accepted.sum()
    wrong = (decisions.labels != labels)[decisions.accepted].sum()
    assert repr(rule) in summary
    assert rule.guarantee in summary
    assert "95 % confidence at most 30 %" in rule.guarantee
    assert f"{accepted} of 500" in summary
    assert f"{wrong} of {accepted}" in summary

    outliers = packed(np.full((40, 8), 9.0), CENTROIDS)
    rule = FalsePositiveRateRule(0.1).fit(outliers, known=scores)
    kept = int(rule.predict(scores).accepted.sum())
    assert f"{kept} of 500" in rule.summary()
    assert f"{100 * rule.false_positive_bound():.4g} %" in rule.summary()


# As a layer -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, "abstain") for name in RULES if name != "conformal-fdr"]
    + [("coverage", method) for method in OOD_METHODS if method != "abstain"],
)
def test_as_a_layer_a_rule_gives_the_same_labels(name, method):
    rule = type(RULES[name])(**RULES[name].get_config() | {"method": method})
    fit(rule, *known_data())
    layer = rule.to_layer(name="decision")
    assert layer.name == "decision"
    decided = []
    # The calibration data too: one of them sits at the threshold.
    for scores in (
        known_data()[0],
        known_data(1000, seed=1, spread=4.0)[0],
        known_data(1000, seed=2)[0].reshape(10, 100, 9),
    ):
        expected = rule.predict(scores).labels
        np.testing.assert_array_equal(to_numpy(layer(scores)), expected)
        decided.append(expected.ravel())
    assert set(np.concatenate(decided)) == {-1, 0, 1, 2}


def test_a_rule_on_plain_scores_judges_the_second_argument():
    scores, _ = known_data()
    plain = ood_score(scores, "energy") ** 3
    rule = CoverageRule(0.9, method=None).fit(plain)
    decided = to_numpy(rule.to_layer()(scores, plain))
    np.testing.assert_array_equal(decided >= 0, rule.predict(plain).accepted)
    np.testing.assert_array_equal(
        decided[decided >= 0], np.argmax(scores[:, :3], axis=-1)[decided >= 0]
    )


def test_a_rule_that_judges_whole_batches_is_no_layer():
    rule = fit(ConformalRule(0.1, fdr=True), *known_data())
    with pytest.raises(ValueError, match="the others in the batch"):
        rule.to_layer()


def test_a_rule_that_is_not_fitted_is_no_layer(new_rule):
    if new_rule().get_config().get("fdr"):
        pytest.skip("refused for another reason")
    with pytest.raises(ValueError, match="has not been fitted"):
        new_rule().to_layer()


# Refusals -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "received", "needed"),
    [
        (CoverageRule(0.95, None), 18, 19),
        (CoverageRule(0.95, None, 0.05), 58, 59),
        (FalsePositiveRateRule(0.05, None), 18, 19),
        (FalsePositiveRateRule(0.01, None, 0.05), 298, 299),
        (ConformalRule(0.01, None), 98, 99),
        (SelectiveRiskRule(0.05, 0.05, None), 59, 60),
        (SelectiveRiskRule(0.001, 0.01, None), 500, 4604),
    ],
)
def test_too_few_samples_are_refused_with_the_number_needed(
    rule, received, needed
):
    def fit_on(n):
        scores = np.arange(float(n))
        if isinstance(rule, SelectiveRiskRule):
            return rule.fit(scores, errors=np.zeros(n))
        return rule.fit(scores)

    with pytest.raises(ValueError, match=f"at least {needed} calibration"):
        fit_on(received)
    with pytest.raises(ValueError, match="not been fitted"):
        rule.predict([1.0])
    # The number is not one too large, either.
    with pytest.raises(ValueError, match=f"at least {needed} calibration"):
        fit_on(needed - 1)
    assert fit_on(needed).predict([-1.0]).accepted.all()


@pytest.mark.any_backend
def test_a_risk_out_of_reach_is_refused_with_the_bound_reached():
    scores = np.arange(500.0)
    errors = np.arange(500) % 4 == 0
    rule = SelectiveRiskRule(0.1, method=None)
    with pytest.raises(ValueError, match=r"lowest bound .* is (\d+\.\d+) %"):
        rule.fit(scores, errors=errors)
    with pytest.raises(ValueError, match="not been fitted"):
        rule.predict(scores)
    with pytest.raises(ValueError, match="risk is 100 %"):
        rule.fit(scores, errors=np.ones(500))


def refusal(rule, scores, errors):
    with pytest.raises(ValueError, match="No threshold keeps") as refused:
        rule.fit(scores, errors=errors)
    return str(refused.value)


@pytest.mark.any_backend
@pytest.mark.parametrize("risk", [0.02, 0.1])
@pytest.mark.parametrize("n", [240, 1000, 4000])
@pytest.mark.parametrize("shape", ["even", "late", "early"])
def test_figures_of_a_refusal_are_those_of_its_own_test(shape, n, risk):
    rng = np.random.default_rng(n)
    rate = np.full(n, 1.05 * risk)
    if shape == "late":
        # So few errors among the lowest scores that their bound, which is not
        # that of a test, lies below the risk.
        few = bounds.samples_for_risk(risk, 0.05) + 5
        rate = np.where(np.arange(n) < few, 0.0, 5.0 * risk)
    elif shape == "early":
        rate = 3.0 * risk * (1.0 - np.arange(n) / n)
    errors = rng.random(n) < rate
    rule = SelectiveRiskRule(risk, method=None)
    text = refusal(rule, np.arange(float(n)), errors)
    numbers = r"is ([\d.]+) %, with ([\d.]+) % confidence.* the (\d+) samples"
    found = re.search(numbers + r" with the lowest scores, (\d+) of", text)
    bound, confidence, count, wrong = map(float, found.groups())
    count, wrong = int(count), int(wrong)
    assert wrong == errors[:count].sum()
    assert bound > 100 * risk
    level = 1.0 - confidence / 100
    # So many errors are that improbable just at the bound.
    binomial = pytest.importorskip("scipy.stats").binom
    if bound < 100.0:
        assert binomial.cdf(wrong, count, bound / 100) == pytest.approx(
            level, rel=0.03
        )
    assert binomial.cdf(wrong, count, risk) > level


@pytest.mark.any_backend
@pytest.mark.parametrize(("n", "every"), [(200, 25), (300, 32), (400, 36)])
def test_about_as_many_samples_as_a_refusal_names_would_do(n, every):
    def fit_on(count):
        errors = np.arange(count) % every == every // 2
        scores = np.arange(float(count))
        return SelectiveRiskRule(0.05, method=None), scores, errors

    text = refusal(*fit_on(n))
    found = re.search(r"about ([\d,]+) calibration samples would do", text)
    needed = int(found[1].replace(",", ""))
    rule, scores, errors = fit_on(int(1.3 * needed))
    assert rule.fit(scores, errors=errors).predict(scores).accepted.any()
    refusal(*fit_on(int(max(n, 0.5 * needed))))


@pytest.mark.any_backend
def test_a_refusal_for_ties_says_so():
    # Some of them pass before all of them fail.
    errors = np.random.default_rng(46).random(200) < 0.03
    text = refusal(
        SelectiveRiskRule(0.05, method=None), np.full(200, 7), errors
    )
    assert "200 samples share the score 7" in text


SHARES = [0.01, 0.02, 0.1, 0.2, 0.25, 0.5, 0.75, 0.9, 0.98, 0.99, 0.999]


@pytest.mark.any_backend
@pytest.mark.parametrize("share", SHARES)
def test_as_few_samples_as_are_named_do_in_spite_of_rounding(share):
    for delta in SHARES:
        check_least_samples(share, delta)


def check_least_samples(share, delta):
    needed = {
        SelectiveRiskRule(share, delta, None): bounds.samples_for_risk(
            share, delta
        ),
        CoverageRule(share, None, delta): bounds.samples_for_coverage(
            share, delta
        ),
        FalsePositiveRateRule(share, None, delta): bounds.samples_for_coverage(
            1.0 - share, delta
        ),
        ConformalRule(share, None): bounds.samples_for_coverage(1.0 - share),
    }
    for rule, n in needed.items():
        scores = np.arange(float(n))
        if isinstance(rule, SelectiveRiskRule):
            rule.fit(scores, errors=np.zeros(n))
            continue
        rule.fit(scores)
        with pytest.raises(ValueError, match="needs at least|at least one"):
            type(rule)(**rule.get_config()).fit(scores[:-1])


@pytest.mark.any_backend
def test_near_certainty_is_not_called_certain():
    rule = CoverageRule(0.9, None, delta=1e-9)
    assert "99.9999999 % confidence" in rule.guarantee


def broken(scores, what):
    scores = scores.copy()
    if what == "NaN":
        scores[3, 1] = np.nan
    elif what == "infinite":
        scores[3, 0] = np.inf
    elif what == "empty":
        scores = scores[:0]
    elif what == "one row":
        scores = scores[0]
    elif what == "too narrow":
        scores = scores[:, :5]
    elif what == "plain":
        scores = scores[:, 0]
    elif what == "probabilities":
        scores = np.full((300, 7), 1 / 7)
    elif what == "text":
        scores = np.full((300, 7), "a")
    elif what == "several models":
        scores = np.concatenate([scores, known_data(gamma=5.0)[0]])
    return scores


@pytest.mark.parametrize(
    "what",
    [
        "one row",
        "too narrow",
        "plain",
        "probabilities",
        "text",
        "several models",
    ],
)
def test_bad_scores_are_refused_and_change_nothing(what, new_rule, tmp_path):
    scores, labels = known_data()
    rule = fit(new_rule(), scores, labels)
    before = (rule.threshold, rule.summary())
    bad = broken(scores, what)
    bad_labels = np.zeros(len(bad), int)
    with pytest.raises(ValueError, match="Received|Expected"):
        fit(rule, bad, bad_labels)
    with pytest.raises(ValueError, match="Received|Expected"):
        rule.predict(bad)
    assert (rule.threshold, rule.summary()) == before
    unfitted = new_rule()
    with pytest.raises(ValueError):
        fit(unfitted, bad, bad_labels)
    with pytest.raises(ValueError, match="not been fitted"):
        unfitted.save(tmp_path / "rule.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.any_backend
@pytest.mark.parametrize("bad", [3.0, ["a"] * 30, [1j] * 30])
def test_bad_plain_scores_are_refused(bad):
    for rule in (CoverageRule(0.9, None), ConformalRule(0.1, None)):
        rule.fit(np.arange(30.0))
        with pytest.raises(ValueError, match="Received"):
            rule.fit(bad)
        with pytest.raises(ValueError, match="Received"):
            rule.predict(bad)
        assert rule.predict([5.0]).accepted.all()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(299), "shape"),
        (np.zeros((300, 2)), "shape"),
        (np.full(300, 3), r"\[0, 3\)"),
        (np.full(300, -1), "Number the classes from zero"),
        (np.full(300, 0.5), "integers"),
        (np.full(300, np.nan), "integers"),
        (np.full((300, 3), 1 / 3), "one-hot"),
        (np.zeros((300, 3)), "one-hot"),
        ([], "at least one sample"),
    ],
)
def test_bad_labels_are_refused(labels, message):
    scores, good = known_data()
    rule = SelectiveRiskRule(0.2).fit(scores, good)
    before = rule.summary()
    with pytest.raises(ValueError, match=message):
        rule.fit(scores, labels)
    assert rule.summary() == before


def test_labels_and_errors_are_asked_for_as_they_are_needed():
    scores, labels = known_data()
    with pytest.raises(ValueError, match="needs `labels`"):
        SelectiveRiskRule(0.2).fit(scores)
    with pytest.raises(ValueError, match="both"):
        SelectiveRiskRule(0.2).fit(scores, labels, errors=labels)
    with pytest.raises(ValueError, match="errors=predicted != labels"):
        SelectiveRiskRule(0.2, method=None).fit(scores[:, 0], labels)
    for errors in (np.zeros(299), np.full(300, 0.5), np.full(300, 2)):
        with pytest.raises(ValueError, match="`errors` must be booleans"):
            SelectiveRiskRule(0.2).fit(scores, errors=errors)


def test_packed_scores_are_not_taken_for_plain_ones():
    scores, _ = known_data()
    rule = CoverageRule(0.9, method=None).fit(scores[:, 0])
    with pytest.raises(ValueError, match="are packed scores"):
        rule.predict(scores)


@pytest.mark.any_backend
@pytest.mark.parametrize("value", [0, 1, -0.1, 1.5, np.nan, "0.5", None, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda v: CoverageRule(v),
        lambda v: CoverageRule(delta=v if v is not None else 0),
        lambda v: FalsePositiveRateRule(v),
        lambda v: SelectiveRiskRule(v),
        lambda v: SelectiveRiskRule(0.1, v),
        lambda v: ConformalRule(v),
    ],
)
def test_parameters_out_of_range_are_refused(make, value):
    with pytest.raises(ValueError, match="must be a number between 0 and 1"):
        make(value)


@pytest.mark.any_backend
def test_other_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="`method` must be one of"):
        CoverageRule(method="distance")
    with pytest.raises(ValueError, match="`fdr` must be"):
        ConformalRule(fdr=0.1)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"gamma": 4.001}, "temperature 4.001"),
        ({"bias": -0.9}, "abstain_logit"),
    ],
)
def test_scores_of_another_model_are_refused(head, message, new_rule):
    rule = fit(new_rule(), *known_data())
    with pytest.raises(ValueError, match=message):
        rule.predict(known_data(**head)[0])


def test_scores_of_another_size_are_refused(new_rule):
    rule = fit(new_rule(), *known_data())
    rng = np.random.default_rng(0)
    fewer = packed(rng.normal(size=(9, 8)), CENTROIDS[:2])
    with pytest.raises(ValueError, match="num_classes 2 instead of 3"):
        rule.predict(fewer)
    shorter = packed(rng.normal(size=(9, 6)), CENTROIDS[:, :6])
    with pytest.raises(ValueError, match="embedding_dim 6 instead of 8"):
        rule.predict(shorter)


def test_float_noise_does_not_make_another_model():
    scores, labels = known_data(dtype="float64", gamma=17.3, bias=-1.7)
    rule = CoverageRule(0.9).fit(scores, labels)
    single = scores.astype("float32")
    assert rule.predict(single).coverage == pytest.approx(0.9, abs=0.02)


def test_known_scores_of_another_model_are_refused():
    outliers, _ = known_data()
    with pytest.raises(ValueError, match="another model"):
        FalsePositiveRateRule(0.1).fit(outliers, known_data(gamma=5.0)[0])


@pytest.mark.any_backend
def test_a_fitted_guarantee_cannot_be_reworded():
    rule = CoverageRule(0.9, None)
    rule.coverage = 0.8
    rule.fit(np.arange(30.0))
    with pytest.raises(AttributeError, match="Make a new rule"):
        rule.coverage = 0.99


@pytest.mark.any_backend
def test_missing_scipy_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    rule = SelectiveRiskRule(0.1, method=None)
    with pytest.raises(ImportError, match=r"keras-halo\[tools\]"):
        rule.fit(np.arange(100.0), errors=np.zeros(100))


# With a model, and saved ----------------------------------------------------


@pytest.mark.slow
def test_a_rule_goes_with_a_model_and_not_with_what_it_becomes():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 384)
    inputs = 4.0 * np.eye(3)[labels] + rng.normal(size=(384, 3))
    model = keras.Sequential([keras.layers.Dense(8), keras_halo.HALODense(3)])
    model.compile(keras.optimizers.Adam(0.03), keras_halo.HALOLoss())
    model.fit(inputs[:256], labels[:256], epochs=15, verbose=0)
    scores = model.predict(inputs[256:], verbose=0)
    rule = SelectiveRiskRule(0.3).fit(scores, labels[256:])
    decisions = rule.predict(scores)
    wrong = decisions.labels != labels[256:]
    assert wrong[decisions.accepted].mean() <= 0.3
    model.fit(inputs[:256], labels[:256], verbose=0)
    with pytest.raises(ValueError, match="temperature"):
        rule.predict(model.predict(inputs[256:], verbose=0))


def test_save_and_load_give_the_same_rule(new_rule, tmp_path):
    rule = fit(new_rule(), *known_data())
    path = tmp_path / "rule.json"
    rule.save(path)
    loaded = load_rule(str(path))
    assert type(loaded) is type(rule)
    assert loaded.get_config() == rule.get_config()
    assert loaded.threshold == rule.threshold
    assert loaded.summary() == rule.summary()
    fresh, _ = known_data(seed=1, spread=1.5)
    expected, received = rule.predict(fresh), loaded.predict(fresh)
    np.testing.assert_array_equal(received.accepted, expected.accepted)
    np.testing.assert_array_equal(received.labels, expected.labels)
    with pytest.raises(ValueError, match="another model"):
        loaded.predict(known_data(gamma=5.0)[0])
    assert json.loads(path.read_text())["guarantee"] == rule.guarantee
    assert [file.name for file in tmp_path.iterdir()] == ["rule.json"]


@pytest.mark.any_backend
def test_a_new_process_decides_the_same(tmp_path):
    fresh, _ = known_data(seed=1, spread=1.5)
    np.save(tmp_path / "fresh.npy", fresh)
    expected = {}
    for name, rule in RULES.items():
        rule = type(rule)(**rule.get_config())
        fit(rule, *known_data()).save(tmp_path / f"{name}.json")
        expected[name] = rule.predict(fresh).labels.tolist()
    script = (
        "import json, pathlib, numpy, keras_halo.rejection as r\n"
        "fresh = numpy.load('fresh.npy')\n"
        "print(json.dumps({p.stem: r.load_rule(p).predict(fresh).labels"
        ".tolist() for p in pathlib.Path().glob('*.json')}))"
    )
    output = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "KERAS_BACKEND": keras.backend.backend()},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    ).stdout
    assert json.loads(output.splitlines()[-1]) == expected


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "rule.json"
    rule = ConformalRule(0.1).fit(known_data(12)[0])
    rule.save(path)
    return path


@pytest.mark.any_backend
def test_a_change_of_any_byte_is_noticed(saved):
    content = saved.read_bytes()
    document = json.loads(content)
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        saved.write_bytes(changed)
        try:
            load_rule(saved)
        except ValueError as error:
            assert "rule.json" in str(error)
        else:
            # One white space for another, or E for e.
            assert json.loads(bytes(changed)) == document


@pytest.mark.any_backend
def test_truncated_and_empty_files_are_refused(saved):
    content = saved.read_bytes()
    # Without the last byte, a line break, it is still whole.
    for length in [*range(0, len(content) - 1, 7), len(content) - 2]:
        saved.write_bytes(content[:length])
        with pytest.raises(ValueError, match="no complete JSON file"):
            load_rule(saved)


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "content",
    [
        b"null",
        b"[1, 2]",
        b"{}",
        b'{"format": "keras_halo.rejection"}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"format": "keras_halo.rejection", "threshold": 1e999}',
        b'{"format": "keras_halo.rejection", "threshold": NaN}',
        b"import os; os.system('true')",
    ],
)
def test_files_that_are_no_rules_are_refused(tmp_path, content):
    path = tmp_path / "other.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="other.json"):
        load_rule(path)
    with pytest.raises(FileNotFoundError):
        load_rule(tmp_path / "missing.json")


def forge(path, **changes):
    """Edits a file as one who knows how to compute the checksum."""
    document = json.loads(path.read_text())
    document.pop("checksum")
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(document[name], dict):
            document[name] |= value
        else:
            document[name] = value
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps({**document, "checksum": f"sha256:{digest}"}))


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "changes",
    [
        {"rule": "RejectionRule"},
        {"rule": "os.system"},
        {"rule": ["ConformalRule"]},
        {"rule": None},
        {"config": {"alpha": 2.0}},
        {"config": {"method": "distance"}},
        {"config": {"method": None}},
        {"config": {"extra": 1}},
        {"config": None},
        {"threshold": "1.0"},
        {"threshold": None},
        {"calibration": {"samples": 13}},
        {"calibration": {"samples": 0}},
        {"calibration": {"accepted": -1}},
        {"calibration": {"errors": 3}},
        {"calibration": {"more": 3}},
        {"calibration": []},
        {"fingerprint": None},
        {"fingerprint": {"temperature": -1.0}},
        {"fingerprint": {"num_classes": 2.5}},
        {"fingerprint": {"more": 1}},
        {"scores": None},
        {"scores": [3.0, 1.0, 2.0]},
        {"scores": ["a"] * 12},
        {"scores": [[1.0]] * 12},
        {"version": 3},
        {"version": "1"},
        {"format": "pickle"},
        {"config": {"alpha": 10**400}},
        {"calibration": {"samples": 10**400}},
        {"calibration": {"accepted": -(10**400)}},
        {"fingerprint": {"num_classes": 10**400}},
        {"fingerprint": {"temperature": 10**400}},
        {"scores": [10**400] * 12},
        {"threshold": 10**400},
        {"version": 10**400},
        {"threshold": [[[[1.0]]]]},
    ],
    ids=str,
)
def test_forged_files_are_refused_as_they_are_loaded(saved, changes):
    forge(saved, config={})
    assert load_rule(saved).predict(known_data()[0]).accepted.any()
    forge(saved, **changes)
    with pytest.raises(ValueError, match="rule.json"):
        load_rule(saved)


@pytest.mark.any_backend
@pytest.mark.parametrize("place", ["threshold", "config", "scores", "more"])
@pytest.mark.parametrize("depth", [300, 900, 3000, 100_000])
def test_files_that_are_nested_deeply_are_refused(place, depth, saved):
    document = json.loads(saved.read_text())
    document[place] = "HERE"
    nested = "[" * depth + "]" * depth
    saved.write_text(json.dumps(document).replace('"HERE"', nested))
    with pytest.raises(ValueError, match="rule.json"):
        load_rule(saved)


@pytest.mark.any_backend
@pytest.mark.parametrize("digits", [400, 5000])
def test_files_with_endless_integers_are_refused(digits, saved):
    text = saved.read_text()
    for key in ("threshold", "samples", "num_classes"):
        number = re.search(rf'"{key}": ([-.\de]+)', text)[1]
        saved.write_text(text.replace(number, "9" * digits, 1))
        with pytest.raises(ValueError, match="rule.json"):
            load_rule(saved)


@pytest.mark.any_backend
def test_a_failed_save_leaves_the_old_file(saved, monkeypatch):
    content = saved.read_bytes()
    rule = CoverageRule(0.9).fit(known_data()[0])

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        rule.save(saved)
    assert saved.read_bytes() == content
    assert [file.name for file in saved.parent.iterdir()] == ["rule.json"]


@keras.saving.register_keras_serializable(package="tests")
class OwnRule(RejectionRule):
    """What a user would write."""

    parameters = ("share",)

    def __init__(self, share=0.5, method="abstain"):
        super().__init__(method)
        self.share = share

    def find_threshold(self, scores, wrong):
        return float(np.quantile(scores, self.share)), None

    def state_guarantee(self):
        return f"Keeps {self.share:.0%} of the calibration data."


@pytest.mark.any_backend
def test_a_rule_of_ones_own_saves_and_loads(tmp_path):
    scores = np.random.default_rng(0).normal(size=200)
    rule = OwnRule(0.3, method=None).fit(scores)
    rule.save(tmp_path / "own.json")
    loaded = load_rule(tmp_path / "own.json")
    assert type(loaded) is OwnRule
    assert loaded.guarantee == "Keeps 30% of the calibration data."
    np.testing.assert_array_equal(
        loaded.predict(scores).accepted, rule.predict(scores).accepted
    )


@pytest.mark.any_backend
def test_a_rule_that_could_not_be_loaded_is_not_saved(tmp_path):
    class Unregistered(OwnRule):
        pass

    rule = Unregistered(method=None).fit(np.arange(9.0))
    with pytest.raises(ValueError, match="not registered"):
        rule.save(tmp_path / "rule.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.any_backend
def test_a_file_of_an_unknown_rule_is_refused(tmp_path):
    path = tmp_path / "rule.json"
    OwnRule(method=None).fit(np.arange(9.0)).save(path)
    objects = keras.saving.get_custom_objects()
    cls = objects.pop("tests>OwnRule")
    try:
        with pytest.raises(ValueError, match="'tests>OwnRule' is not known"):
            load_rule(path)
    finally:
        objects["tests>OwnRule"] = cls


TIED = {
    "coverage": lambda: CoverageRule(0.5, method=None),
    "coverage with confidence": lambda: CoverageRule(0.5, None, delta=0.05),
    "conformal": lambda: ConformalRule(0.5, method=None),
    "risk": lambda: SelectiveRiskRule(0.01, method=None),
}


@pytest.mark.any_backend
@pytest.mark.parametrize("level", [-25.0, -1e-3, 0.0, 3.0, 1e4])
@pytest.mark.parametrize("name", TIED)
def test_inputs_that_share_a_score_stay_together_however_it_is_rounded(
    name, level
):
    rng = np.random.default_rng(0)
    spread = max(1.0, abs(level))
    scores = np.concatenate(
        [
            np.full(500, level),
            level + spread * (0.01 + rng.random(250)),
            level - spread * (0.01 + rng.random(250)),
        ]
    ).astype("float32")
    errors = {"errors": scores > level} if name == "risk" else {}
    rule = TIED[name]().fit(scores, **errors)
    group = np.float32(level)
    nearby = [group]
    for end in (-np.inf, np.inf):
        value = group
        for _ in range(4):
            value = np.nextafter(value, np.float32(end))
        nearby.append(value)
    assert rule.predict(np.array(nearby)).accepted.all()
    # Nothing else of the calibration data comes along.
    assert 750 <= rule.predict(scores).accepted.sum() <= 753


@pytest.mark.any_backend
@pytest.mark.parametrize("level", [-25.0, 0.0, 3.0])
def test_outliers_that_share_a_score_are_rejected_together(level):
    rng = np.random.default_rng(0)
    outliers = np.concatenate(
        [
            np.full(900, level),
            level - 0.01 - rng.random(30),
            level + np.ones(70),
        ]
    ).astype("float32")
    rule = FalsePositiveRateRule(0.05, method=None).fit(outliers)
    below = np.nextafter(np.float32(level), np.float32(-np.inf))
    above = np.nextafter(np.float32(level), np.float32(np.inf))
    assert rule.predict(np.array([level, below, above])).rejected.all()
    assert rule.predict(outliers).accepted.sum() == 30


@pytest.mark.any_backend
def test_neighbours_in_float64_are_one_score():
    low = 1.0
    high = np.nextafter(low, np.inf)
    scores = np.array([0.0] * 10 + [low] * 11 + [high] * 19)
    rule = CoverageRule(0.5, method=None).fit(scores)
    assert rule.predict([0.0, low, high]).accepted.all()
    scores = np.array([0.0] * 10 + [low] * 9 + [high] * 21)
    rule = FalsePositiveRateRule(0.5, method=None).fit(scores)
    assert rule.predict([0.0, low, high]).accepted.tolist() == [
        True,
        False,
        False,
    ]


@pytest.mark.any_backend
def test_neighbours_without_a_number_between_them_keep_their_sides():
    tiny = np.nextafter(0.0, 1.0)
    scores = np.array([-tiny] * 10 + [0.0] * 11 + [tiny] * 19)
    rule = CoverageRule(0.5, method=None).fit(scores)
    assert rule.predict([0.0, tiny]).accepted.tolist() == [True, False]
    scores = np.array([-tiny] * 10 + [0.0] * 9 + [tiny] * 21)
    rule = FalsePositiveRateRule(0.5, method=None).fit(scores)
    assert rule.predict([0.0, tiny]).accepted.tolist() == [True, False]


def ulps_from(level, count):
    """The number of float32 that lies so many places from another."""
    level, end = np.float32(level), np.float32(math.copysign(np.inf, count))
    for _ in range(abs(count)):
        level = np.nextafter(level, end)
    return level


def split_group(level, first, second, ulps, spread):
    """A group that two batch sizes rounded differently, among other scores."""
    rng = np.random.default_rng(0)
    return np.concatenate(
        [
            np.full(first, np.float32(level)),
            np.full(second, ulps_from(level, ulps)),
            level - spread * (0.01 + rng.random(200)),
            level + spread * (0.01 + rng.random(150)),
        ]
    ).astype("float32")


# 200 of the samples score lower than the group, and 150 higher.
SPLIT_RULES = {
    "coverage": lambda: CoverageRule(0.5, None),
    "coverage, upper half": lambda: CoverageRule(0.8, None),
    "coverage with confidence": lambda: CoverageRule(0.5, None, delta=0.05),
    "conformal": lambda: ConformalRule(0.5, None),
    "risk": lambda: SelectiveRiskRule(0.1, method=None),
    "risk that the group exceeds": lambda: SelectiveRiskRule(0.1, method=None),
    "false positives": lambda: FalsePositiveRateRule(0.5, None),
    "false positives, lower half": lambda: FalsePositiveRateRule(0.25, None),
    "false positives with confidence": lambda: FalsePositiveRateRule(
        0.5, None, delta=0.05
    ),
}


@pytest.mark.any_backend
@pytest.mark.parametrize("level", [-25.0, 0.2, 3.0, 1e4])
@pytest.mark.parametrize("first", [643, 325, 7])
@pytest.mark.parametrize("name", SPLIT_RULES)
def test_a_group_that_is_split_in_the_calibration_data_stays_together(
    name, first, level
):
    for ulps in (-8, -1, 1, 2, 8):
        scores = split_group(level, first, 650 - first, ulps, max(1, level))
        errors = {}
        if "risk" in name:
            # The rarest are wrong where the whole group is too often so.
            rate = 0.05 if name == "risk" else 0.3
            among = np.arange(1000) % 20 < 20 * rate
            errors["errors"] = (np.arange(1000) < 650) & among
            errors["errors"] |= np.arange(1000) >= 850
        rule = SPLIT_RULES[name]().fit(scores, **errors)
        ends = [min(0, ulps) - 2, max(0, ulps) + 2]
        group = [ulps_from(level, k) for k in (*ends, 0, ulps)]
        accepted = rule.predict(np.array(group)).accepted
        kept = not ("false" in name or "exceeds" in name)
        np.testing.assert_array_equal(accepted, kept)
        # No others come along, but for those that the risk has room for.
        count = rule.predict(scores).accepted.sum()
        room = 50 if name == "risk" else 0
        assert 0 <= count - (850 if kept else 200) <= room
        if name == "conformal":
            assert len(set(rule.p_values(np.array(group)))) == 1
            # Those of a guarded model.
            entries = np.array(rule.learned.ranks.entries)
            assert not ((min(group) <= entries) & (entries < max(group))).any()


@pytest.mark.any_backend
def test_scores_of_a_large_calibration_set_form_no_chain():
    rng = np.random.default_rng(0)
    scores = rng.random(100_000).astype("float32").astype("float64")
    ranked = np.sort(scores)
    # So many scores lie as near to each other as rounding may move one.
    few = 5
    for rule, count in (
        (CoverageRule(0.7, None), 70_001),
        (ConformalRule(0.3, None), 70_001),
    ):
        kept = rule.fit(scores).predict(scores).accepted.sum()
        assert count <= kept <= count + few
    p = rule.p_values(ranked)
    exact = np.arange(100_000, 0, -1) + 1.0
    assert np.abs(100_001 * p - exact).max() <= few
    let_in = FalsePositiveRateRule(0.3, None).fit(scores).predict(scores)
    assert 30_000 - few <= let_in.accepted.sum() < 30_000
    errors = rng.random(100_000) < 0.2 * scores
    _, passed = bounds.tests_at_risk(scores, errors, 0.05, DELTA)
    accepted = bounds.accepted_at_risk(scores, errors, 0.05, DELTA)
    assert passed - few <= accepted <= passed


@pytest.mark.any_backend
@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(60, 200),
    spacing=st.sampled_from([1e-7, 5e-7, 1e-6, 1e-4]),
    distinct=st.sampled_from([4, 30, 10**4]),
    offset=st.sampled_from([-3.0, 0.0, 0.5]),
    seed=st.integers(0, 10**6),
)
def test_guarantees_hold_for_calibration_data_that_is_rounded_otherwise(
    n, spacing, distinct, offset, seed
):
    # Chains of near scores, and groups that share one.
    rng = np.random.default_rng(seed)
    steps = rng.integers(0, distinct, n)
    scores = offset + spacing * steps
    scores[: n // 10] += rng.random(n // 10)
    size = np.maximum(np.abs(scores), np.abs(scores).mean())
    moves = [0.0, 0.9e-6 * size, -0.9e-6 * size]
    moves += [0.9e-6 * size * rng.choice([-1, 0, 1], n) for _ in range(3)]

    rule = CoverageRule(0.7, None).fit(scores)
    rank = bounds.coverage_rank(n, 0.7)
    for moved in moves:
        accepted = rule.predict(scores + moved).accepted
        assert accepted.sum() >= rank
    rule = FalsePositiveRateRule(0.3, None).fit(scores)
    for moved in moves:
        accepted = rule.predict(scores + moved).accepted
        assert accepted.sum() <= n - rank

    errors = rng.random(n) < 0.3 * steps / distinct
    accepted = bounds.accepted_at_risk(scores, errors, 0.3, 0.1)
    if not accepted:
        return
    threshold = bounds.threshold_after(accepted, scores)
    assert (scores <= threshold).sum() == accepted
    _, totals = bounds.sorted_with_errors(scores, errors)
    p_values = bounds.risk_p_values(totals, 0.3)
    for moved in moves[1:3]:
        # All move alike, so that their order stays.
        count = (scores + moved <= threshold).sum()
        assert p_values[count] <= 0.1 * (1 + 1e-9)


def _fitted_rule(level=0.9):
    return CoverageRule(level, method=None).fit(np.arange(100.0))


@pytest.mark.any_backend
def test_threads_that_save_to_one_file_leave_it_whole(tmp_path):
    path = tmp_path / "rule.json"
    rules = [_fitted_rule(level) for level in (0.5, 0.6, 0.7, 0.8)]
    rules[0].save(path)

    def save(rule):
        for _ in range(25):
            rule.save(path)
            assert load_rule(path).coverage in (0.5, 0.6, 0.7, 0.8)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(save, rules))
    assert [p.name for p in tmp_path.iterdir()] == ["rule.json"]


@pytest.mark.any_backend
def test_saving_keeps_links_permissions_and_long_names(tmp_path):
    path = tmp_path / ("r" * 250 + ".json")
    _fitted_rule(0.5).save(path)
    path.chmod(0o600)
    link = tmp_path / "link.json"
    link.symlink_to(path)
    _fitted_rule(0.9).save(link)
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_rule(path).coverage == 0.9


@pytest.mark.any_backend
@pytest.mark.skipif(os.name == "nt", reason="other permissions")
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666, 0o400, None])
def test_nobody_may_read_a_file_while_it_is_saved(mode, tmp_path, monkeypatch):
    path = tmp_path / "rule.json"
    if mode is not None:
        _fitted_rule(0.5).save(path)
        path.chmod(mode)
    seen = []

    def watched(function):
        def call(*args, **kwargs):
            for file in tmp_path.glob(".*.tmp"):
                seen.append(file.stat())
            return function(*args, **kwargs)

        return call

    for name in ("chmod", "replace"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    umask = os.umask(0o022)
    try:
        _fitted_rule(0.9).save(path)
    finally:
        os.umask(umask)
    allowed = 0o644 if mode is None else mode
    assert path.stat().st_mode & 0o777 == allowed
    # The owner may write it.
    assert seen and not any(s.st_mode & 0o577 & ~allowed for s in seen)
    assert load_rule(path).coverage == 0.9


@pytest.mark.any_backend
@pytest.mark.parametrize("write", ["rule", "monitor", "log", "text"])
def test_paths_that_lead_to_no_file_are_refused(write, tmp_path):
    rule = _fitted_rule()
    save = {
        "rule": rule.save,
        "monitor": StreamMonitor(rule).fit(np.arange(100.0)).save,
        "log": lambda path: DecisionLog(path, rule),
        "text": lambda path: storage.write_text("", path),
    }[write]
    (tmp_path / "one").symlink_to(tmp_path / "two")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    (tmp_path / "self").symlink_to(tmp_path / "self")
    (tmp_path / "folder").mkdir()
    names = sorted(os.listdir(tmp_path))
    for name in ("one", "self"):
        with pytest.raises(ValueError, match="a link to itself. Pass another"):
            save(tmp_path / name)
    with pytest.raises(ValueError, match="which is none. Pass another"):
        save(tmp_path / "folder")
    for path in ("a\0b", tmp_path / "a\0b"):
        with pytest.raises(ValueError, match="without NUL characters. Receive"):
            save(path)
        with pytest.raises(ValueError, match="without NUL characters. Receive"):
            load_rule(path)
    assert sorted(os.listdir(tmp_path)) == names
    assert (tmp_path / "self").is_symlink()


@pytest.mark.any_backend
def test_a_path_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing does not exist"):
        _fitted_rule().save(tmp_path / "missing" / "rule.json")
    with pytest.raises(ValueError, match="path of a file"):
        _fitted_rule().save(tmp_path)


@pytest.mark.any_backend
def test_a_byte_order_mark_is_read_over_and_a_repeated_key_refused(tmp_path):
    path = tmp_path / "rule.json"
    _fitted_rule().save(path)
    content = path.read_bytes()
    path.write_bytes(b"\xef\xbb\xbf" + content)
    assert load_rule(path).coverage == 0.9
    path.write_bytes(content.replace(b"{", b'{"threshold": 1e9,', 1))
    with pytest.raises(ValueError, match="threshold more than once"):
        load_rule(path)


@pytest.mark.parametrize("what", ["NaN", "infinite"])
def test_rows_that_are_not_finite_are_rejected_but_not_learned_from(
    what, new_rule
):
    scores, labels = known_data()
    rule = fit(new_rule(), scores, labels)
    expected = rule.predict(scores)
    bad = broken(scores, what)
    with pytest.raises(ValueError, match="Received"):
        fit(rule, bad, labels)
    with pytest.warns(UserWarning, match="1 of 300 rows"):
        decisions = rule.predict(bad)
    assert not decisions.accepted[3]
    assert decisions.labels[3] == -1
    assert np.isnan(decisions.scores[3])
    if rule.judges_singly:
        others = np.arange(300) != 3
        np.testing.assert_array_equal(
            decisions.labels[others], expected.labels[others]
        )
        decided = to_numpy(rule.to_layer()(bad))
        np.testing.assert_array_equal(decided, decisions.labels)


def test_no_rows_are_decided_and_not_learned_from(new_rule):
    scores, labels = known_data()
    rule = fit(new_rule(), scores, labels)
    with pytest.raises(ValueError, match="Received"):
        fit(rule, scores[:0], labels[:0])
    decisions = rule.predict(scores[:0])
    assert decisions.accepted.shape == decisions.labels.shape == (0,)


@pytest.mark.any_backend
def test_plain_scores_that_are_nan_are_rejected():
    rule = CoverageRule(0.9, None).fit(np.arange(30.0))
    with pytest.warns(UserWarning, match="1 of 2 rows"):
        decisions = rule.predict([np.nan, 5.0])
    assert decisions.accepted.tolist() == [False, True]
    assert rule.predict([]).accepted.shape == (0,)


@pytest.mark.any_backend
def test_scores_of_a_small_scale_keep_their_order():
    rng = np.random.default_rng(0)
    outliers = 1e-6 * (1.0 + rng.random(19))
    known = 1e-9 * rng.random(300)
    rule = FalsePositiveRateRule(0.05, method=None).fit(outliers, known=known)
    assert rule.predict(known).accepted.all()
    rule = CoverageRule(0.95, method=None).fit(1e-7 * rng.random(19))
    assert rule.predict([5e-6]).rejected.all()


def test_a_rule_that_decides_otherwise_has_to_say_so():
    with pytest.raises(TypeError, match="judges_singly = False"):

        class Band(OwnRule):
            def accepts(self, scores):
                return np.abs(scores) <= self.threshold

    class SaidBand(OwnRule):
        judges_singly = False

        def accepts(self, scores):
            return np.abs(scores) <= self.threshold

    rule = SaidBand(0.9, method=None).fit(np.linspace(-9.0, 9.0, 99))
    assert rule.predict([-8.9, 0.0]).accepted.tolist() == [False, True]
    with pytest.raises(ValueError, match="depends on more than the score"):
        rule.to_layer()


def test_what_a_rule_of_ones_own_returns_and_takes(tmp_path):
    class One(OwnRule):
        def find_threshold(self, scores, wrong):
            return 1.0

    with pytest.raises(ValueError, match="must return the threshold and"):
        One(method=None).fit(np.arange(9.0))
    rule = OwnRule(np.float32(0.5), method=None).fit(np.arange(9.0))
    with pytest.raises(ValueError, match="cannot be saved"):
        rule.save(tmp_path / "rule.json")
    assert not list(tmp_path.iterdir())


def test_a_fitted_score_that_is_nan_is_rejected_with_a_warning():
    scores, _ = known_data()
    ood = np.arange(300.0)
    rule = CoverageRule(0.9, "fitted").fit({"scores": scores, "ood": ood})
    ood[3] = np.nan
    with pytest.warns(UserWarning, match=r"1 of 300 rows .*'ood'"):
        decisions = rule.predict({"scores": scores, "ood": ood})
    assert not decisions.accepted[3]


@pytest.mark.parametrize("count", [1, 3])
def test_nothing_but_nan_is_rejected(count, new_rule):
    scores, labels = known_data()
    rule = fit(new_rule(), scores, labels)
    bad = np.full((count, scores.shape[1]), np.nan)
    with pytest.warns(UserWarning, match=f"{count} of {count} rows"):
        decisions = rule.predict(bad)
    assert decisions.labels.tolist() == [-1] * count


@pytest.mark.any_backend
@pytest.mark.parametrize("share", [0.5, 0.01])
def test_an_error_rate_next_to_the_risk_has_an_end(share):
    rate = np.nextafter(0.05, 0)
    needed = bounds.samples_for_rate(rate, share, 0.05, 0.05, 200)
    assert 1e11 < needed < 1e14


@pytest.mark.any_backend
@pytest.mark.filterwarnings("ignore:20 of 120 rows")
def test_rows_that_are_not_finite_make_no_others_easier_to_reject():
    pytest.importorskip("scipy", reason="needs SciPy")
    rng = np.random.default_rng(0)
    lost = {0: 0, 20: 0}
    for _ in range(100):
        rule = ConformalRule(0.1, None, fdr=True).fit(rng.normal(size=500))
        scores = rng.normal(size=100)
        for broken in lost:
            given = np.append(scores, [np.nan] * broken)
            accepted = rule.predict(given).accepted
            assert not accepted[100:].any()
            lost[broken] += not accepted[:100].all()
    # Of batches without outliers one in ten may lose an input.
    assert lost[0] == lost[20] <= 16


@pytest.mark.any_backend
@pytest.mark.parametrize("dtype", ["int64", "uint8", "bool"])
def test_labels_are_no_scores_of_known_inputs(dtype):
    scores = np.random.default_rng(0).normal(size=200)
    labels = (np.arange(200) % 2).astype(dtype)
    rule = FalsePositiveRateRule(0.2, method=None).fit(scores)
    before = rule.certificate()
    with pytest.raises(ValueError, match="not labels"):
        rule.fit(scores, labels)
    assert rule.certificate() == before
    packed, labels = known_data()
    with pytest.raises(ValueError, match="known"):
        FalsePositiveRateRule(0.2).fit(packed, labels)
    rule.fit(scores, labels.astype("float64"))
