"""Several guarantees at once: all are kept, and what cannot be is named."""

import math
import re

import keras
import numpy as np
import pytest
from helpers import packed, to_numpy
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_halo
from keras_halo.rejection import (
    JointRule,
    SelectiveRiskRule,
    bounds,
    joint_bounds,
    load_rule,
)

DRAWS = 250
DELTA = 0.1
SAMPLING_ERROR = 3.0 * math.sqrt(DELTA * (1.0 - DELTA) / DRAWS)
GRID = (np.arange(50_000) + 0.5) / 50_000

# Error probability of a known input by its quantile, what the score makes of
# the quantile, and the power that makes quantiles of outliers: F(q) = q**power.
POPULATIONS = {
    "errors grow": (lambda u: 0.3 * u**4, lambda u: u, 8.0),
    "errors at both ends": (
        lambda u: np.select([u < 0.1, u < 0.7], [0.1, 0.0], 0.2),
        lambda u: u,
        5.0,
    ),
    "twenty distinct scores": (
        lambda u: 0.3 * u**3,
        lambda u: np.ceil(20 * u) / 20,
        6.0,
    ),
    "half share one score": (
        lambda u: 0.2 * (u > 0.6),
        lambda u: np.where((u > 0.1) & (u <= 0.6), 0.6, u),
        6.0,
    ),
}


class Truth:
    """What holds at a threshold, for all inputs of a population."""

    def __init__(self, error_rate, score, power):
        self.scores = score(GRID)
        self.risk = np.cumsum(error_rate(GRID)) / np.arange(1, GRID.size + 1)
        self.power = power

    def __call__(self, threshold):
        count = np.searchsorted(self.scores, threshold, side="right")
        quantile = count / GRID.size
        return self.risk[max(count - 1, 0)], quantile, quantile**self.power


# What is asked for lies at the limits of what is true, so that a procedure
# that spends delta twice is found out. At a quantile of 0.8 or 0.85:
LIMITS = {
    "risk": (0.8, {"coverage": -0.15, "false_positive_rate": 0.2}),
    "rate": (0.8, {"coverage": -0.15, "risk": 0.05}),
    "coverage": (0.85, {"risk": 0.0, "false_positive_rate": 0.0}),
    "risk and rate": (0.8, {"coverage": -0.15}),
    "no coverage": (0.8, {}),
}


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("errors grow", "risk"),
        ("errors grow", "rate"),
        ("errors at both ends", "no coverage"),
        ("errors at both ends", "coverage"),
        ("twenty distinct scores", "risk and rate"),
        ("twenty distinct scores", "rate"),
        ("half share one score", "risk"),
        ("half share one score", "coverage"),
    ],
)
def test_all_guarantees_hold_together_as_often_as_stated(name, limit):
    error_rate, score, power = POPULATIONS[name]
    truth = Truth(error_rate, score, power)
    quantile, slack = LIMITS[limit]
    at_limit = dict(
        zip(
            ("risk", "coverage", "false_positive_rate"),
            truth(score(np.array([quantile]))[0]),
            strict=True,
        )
    )
    wanted = {k: v + slack.get(k, 0.0) for k, v in at_limit.items()}
    if limit == "no coverage":
        del wanted["coverage"]
    rng = np.random.default_rng(7)
    broken, accepted = [], []
    requirements = joint_bounds.Requirements(
        wanted["risk"],
        wanted.get("coverage"),
        wanted["false_positive_rate"],
        DELTA,
    )
    for _ in range(DRAWS):
        u = rng.random(400)
        errors = rng.random(400) < error_rate(u)
        scores = score(u)
        outliers = score(rng.random(300) ** (1.0 / power))
        count, _ = joint_bounds.accepted_jointly(
            scores, errors, outliers, requirements
        )
        accepted.append(count)
        if count:
            risk, coverage, rate = truth(np.sort(scores)[count - 1])
            broken.append(
                risk > wanted["risk"] + 1e-9
                or coverage < wanted.get("coverage", 0.0) - 1e-9
                or rate > wanted["false_positive_rate"] + 1e-9
            )
    share = np.sum(broken) / DRAWS
    print(f"{name}, {limit}: broken {share:.3f}, kept {np.mean(accepted):.0f}")
    assert share <= DELTA + SAMPLING_ERROR
    if limit in ("risk", "rate", "no coverage"):
        # Refusing always would be no feat.
        assert np.mean(np.array(accepted) > 0) > 0.05


@pytest.mark.any_backend
def test_the_simulation_notices_a_threshold_that_was_not_tested():
    truth = Truth(*POPULATIONS["errors grow"])
    limits = np.array(truth(0.8))
    rng = np.random.default_rng(3)
    broken = 0
    for _ in range(DRAWS):
        u = np.sort(rng.random(400))
        wrong = np.cumsum(rng.random(400) < POPULATIONS["errors grow"][0](u))
        rates = np.mean(rng.random(300) ** (1.0 / 8.0) <= u[:, None], axis=1)
        counts = np.arange(1, 401)
        good = (wrong / counts <= limits[0]) & (rates <= limits[2])
        risk, _, rate = truth(u[np.flatnonzero(good)[-1]])
        broken += risk > limits[0] or rate > limits[2]
    assert broken / DRAWS > DELTA + SAMPLING_ERROR


def naive(scores, errors, outliers, wanted):
    """The procedure written out, with a coverage."""
    n, m = len(scores), len(outliers)

    def cdf(k, size, p):
        return sum(
            math.comb(size, i) * p**i * (1 - p) ** (size - i)
            for i in range(k + 1)
        )

    share = 0.2 * wanted.delta
    start = 1
    while 1.0 - cdf(start - 1, n, wanted.coverage) > share:
        start += 1
    lowest = 1
    while (1 - wanted.risk) ** lowest > wanted.delta - share:
        lowest += 1
    lowest += 1
    start = max(start, min(lowest, n), min(2 * lowest, n // 2))
    level = wanted.delta - (1.0 - cdf(start - 1, n, wanted.coverage))
    shuffled = np.random.default_rng(0).permutation(n)
    order = sorted(range(n), key=lambda i: (scores[i], shuffled[i]))
    best = 0
    for count in range(start - 1, n + 1):
        last = scores[order[count - 1]]
        wrong = sum(bool(errors[i]) for i in order[:count])
        let_in = sum(o <= last for o in outliers)
        if cdf(wrong, count, wanted.risk) > level or (
            cdf(let_in, m, wanted.rate) > level
        ):
            break
        tied = count < n and scores[order[count]] == last
        if count >= start and not tied:
            best = count
    return best


@pytest.mark.any_backend
@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(30, 90),
    m=st.integers(30, 60),
    distinct=st.sampled_from([4, 20, 10**6]),
    steepness=st.floats(0.0, 0.6),
    seed=st.integers(0, 10**6),
)
def test_the_threshold_is_that_of_the_procedure_written_out(
    n, m, distinct, steepness, seed
):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, distinct, n) / distinct
    errors = rng.random(n) < steepness * scores
    outliers = rng.integers(distinct // 2, 2 * distinct, m) / distinct
    wanted = joint_bounds.Requirements(0.3, 0.6, 0.3, 0.2)
    found, failed = joint_bounds.accepted_jointly(
        scores, errors, outliers, wanted
    )
    assert found == naive(scores, errors, outliers, wanted)
    if not found:
        assert failed


@pytest.mark.any_backend
def test_no_level_is_lost_to_a_second_requirement():
    rng = np.random.default_rng(0)
    scores = rng.random(1000)
    errors = rng.random(1000) < 0.3 * scores**4
    alone = SelectiveRiskRule(0.05, method=None).fit(scores, errors=errors)
    # Outliers that score higher than all known inputs cost nothing.
    both = JointRule(0.05, false_positive_rate=0.1, method=None)
    both.fit(scores, errors=errors, outliers=2.0 + rng.random(200))
    assert both.threshold == alone.threshold


@pytest.mark.any_backend
def test_no_outlier_beside_the_threshold_slips_in():
    scores = np.arange(100.0)
    errors = np.zeros(100, bool)
    # The rank of the coverage is 87; the next outlier is very near to it.
    outliers = np.concatenate([np.full(70, 89.0 + 1e-3), np.arange(30.0)])
    rule = JointRule(0.2, 0.8, 0.4, method=None)
    rule.fit(scores, errors=errors, outliers=outliers)
    assert 89.0 < rule.threshold < 89.0 + 1e-3
    assert rule.predict(outliers).coverage == 0.3
    assert rule.predict([89.0]).accepted.all()


@pytest.mark.any_backend
@pytest.mark.parametrize("ulps", [-8, -1, 0, 1, 8])
def test_outliers_that_rounding_may_let_in_count_as_accepted(ulps):
    scores = np.arange(200.0)
    errors = np.zeros(200, bool)
    # A known input scores as the outliers do, up to rounding.
    outliers = np.full(70, 180.0) + ulps * np.spacing(np.float32(180.0))
    outliers = np.concatenate([outliers, np.arange(30.0)])
    rule = JointRule(0.2, 0.8, 0.4, method=None)
    rule.fit(scores, errors=errors, outliers=outliers)
    for moved in (-2, 0, 2):
        group = 180.0 + moved * np.spacing(np.float32(180.0))
        assert rule.predict(np.array([group])).rejected.all()
    assert rule.predict(scores).accepted.sum() == 180


@pytest.mark.any_backend
@pytest.mark.parametrize("first", [390, 200, 10])
@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_a_group_that_is_split_stays_together(rate, first):
    step = np.spacing(np.float32(3.0))
    group = np.where(np.arange(400) < first, 3.0, 3.0 + step)
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.random(500), group, 4.0 + rng.random(100)])
    errors = np.zeros(1000, bool)
    errors[500:900] = np.arange(400) % 20 < 20 * rate
    errors[900:] = True
    rule = JointRule(0.1, 0.4, method=None).fit(scores, errors=errors)
    moved = rule.predict(3.0 + step * np.arange(-2, 4)).accepted
    assert moved.all() if rate < 0.1 else not moved.any()


CENTROIDS = 3.0 * np.random.default_rng(5).normal(size=(3, 8))


def known_data(n=400, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    embeddings = CENTROIDS - CENTROIDS.mean(axis=0)
    embeddings = embeddings[labels] + rng.normal(size=(n, 8))
    return packed(embeddings, CENTROIDS), labels


def fitted_rule():
    scores, labels = known_data()
    far = packed(
        np.random.default_rng(1).normal(size=(100, 8)) + 9.0, CENTROIDS
    )
    rule = JointRule(0.1, 0.7, 0.2, method="nearest")
    return rule.fit(scores, labels, outliers=far), scores, labels, far


def test_summary_certificate_and_file_tell_all(tmp_path):
    rule, scores, labels, far = fitted_rule()
    decisions = rule.predict(scores)
    summary = rule.summary()
    kept = int(decisions.accepted.sum())
    wrong = int((decisions.labels != labels)[decisions.accepted].sum())
    let_in = int(rule.predict(far).accepted.sum())
    assert f"{kept} of 400" in summary
    assert f"{wrong} of {kept}" in summary
    assert f"{let_in} of 100" in summary
    for text in ("95 % confidence", "70 %", "10 %", "20 %", "at once"):
        assert text in rule.guarantee
    assert "another kind" in rule.limits
    rule.save(tmp_path / "rule.json")
    loaded = load_rule(tmp_path / "rule.json")
    assert loaded.summary() == summary
    np.testing.assert_array_equal(
        loaded.predict(far).labels, rule.predict(far).labels
    )
    model = keras.Sequential([keras.Input((4,)), keras_halo.HALODense(3)])
    x = np.random.default_rng(0).normal(size=(300, 4))
    predicted = model.predict(x, verbose=0)
    right = np.argmax(predicted[:, :3], axis=-1)
    rule = JointRule(0.1, 0.5).fit(predicted, right)
    guarded = keras_halo.guard(model, rule)
    answers = guarded.predict(x, verbose=0)
    np.testing.assert_array_equal(
        answers["label"], rule.predict(predicted).labels
    )
    assert keras_halo.read_certificate(guarded) == rule.certificate()


def test_as_a_layer_it_decides_alike():
    rule, scores, _, far = fitted_rule()
    layer = rule.to_layer()
    for source in (scores, far):
        np.testing.assert_array_equal(
            to_numpy(layer(source)), rule.predict(source).labels
        )


# Refusals -------------------------------------------------------------------


def refusal(rule, scores, errors, outliers=None):
    with pytest.raises(ValueError, match="No threshold keeps") as refused:
        rule.fit(scores, errors=errors, outliers=outliers)
    return str(refused.value)


def figures(text, what):
    """The bound of a requirement, and what was asked for, in percent."""
    found = re.search(
        rf"{what} of at most ([\d.]+) % where ([\d.]+) % is asked", text
    )
    return float(found[1]), float(found[2])


@pytest.mark.any_backend
@pytest.mark.parametrize("fault", ["risk", "false-positive rate", "both"])
@pytest.mark.parametrize("coverage", [0.8, None])
def test_a_refusal_names_what_fails_with_figures_that_make_sense(
    fault, coverage
):
    rng = np.random.default_rng(0)
    scores = np.arange(800.0)
    errors = rng.random(800) < (0.04 if fault != "false-positive rate" else 0)
    outliers = rng.random(400) * 800 + (800 if fault == "risk" else 0)
    rule = JointRule(0.05, coverage, 0.1, method=None)
    if fault == "risk":
        errors[::20] = True
    if coverage is None and fault == "false-positive rate":
        outliers = rng.random(400)
    text = refusal(rule, scores, errors, outliers)
    named = re.search("What fails: (.*?)[.] Received", text)[1]
    risk, most_risk = figures(text, "risk")
    rate, most_rate = figures(text, "false-positive rate")
    assert (most_risk, most_rate) == (5.0, 10.0)
    # A requirement fails exactly where its bound exceeds what is asked for.
    assert ("the risk" in named) == (risk > most_risk)
    assert ("false-positive rate" in named) == (rate > most_rate)
    assert fault == "both" or fault in named
    found = re.search(r"accepts (\d+) of 800 .* (\d+) of them wrong, whi", text)
    count, wrong = map(int, found.groups())
    assert wrong == errors[:count].sum()
    let_in = int(re.search(r"and (\d+) of 400", text)[1])
    assert let_in == (outliers <= scores[count - 1]).sum()
    confidence = float(re.search(r"each with ([\d.]+) % conf", text)[1])
    bound = bounds.risk_bound(wrong, count, 1.0 - confidence / 100)
    assert risk == pytest.approx(100 * float(bound), rel=0.01)
    if coverage is not None:
        rank = bounds.coverage_rank(800, 0.8, 0.01)
        assert count >= rank - 1
    with pytest.raises(ValueError, match="not been fitted"):
        rule.predict([1.0])


@pytest.mark.any_backend
def test_a_refusal_says_what_would_do_without_the_coverage():
    scores = np.arange(1000.0)
    errors = (scores >= 600) & (np.arange(1000) % 3 == 0)
    text = refusal(JointRule(0.05, 0.8, method=None), scores, errors)
    accepted = int(re.search(r"threshold that accepts (\d+) of 1000", text)[1])
    alone = SelectiveRiskRule(0.05, method=None).fit(scores, errors=errors)
    assert accepted == alone.predict(scores).accepted.sum()
    assert "More samples alone would not help" in text


@pytest.mark.any_backend
@pytest.mark.parametrize("lacks", ["samples", "outliers"])
def test_about_as_many_samples_as_a_refusal_names_would_do(lacks):
    def data(n, m):
        every = 31 if lacks == "samples" else 500
        errors = np.arange(n) % every == every // 2
        outliers = 0.85 + np.arange(m) / m
        if lacks == "outliers":
            outliers -= 0.07
        return np.arange(n) / n, errors, outliers

    rule = JointRule(0.05, 0.8, 0.1, method=None)
    text = refusal(rule, *data(400, 100))
    found = re.search(
        r"about ([\d,]+) calibration samples and ([\d,]+) outliers", text
    )
    n, m = (int(group.replace(",", "")) for group in found.groups())
    assert (n > 400) == (lacks == "samples")
    assert (m > 100) == (lacks == "outliers")
    scores, errors, outliers = data(int(1.3 * n), int(1.3 * m))
    rule.fit(scores, errors=errors, outliers=outliers)
    assert rule.predict(scores).coverage >= 0.8


@pytest.mark.any_backend
def test_a_refusal_for_ties_says_so():
    # In the order in which ties are broken, so that some of them would pass.
    order = np.argsort(np.random.default_rng(0).permutation(300))
    errors = np.zeros(300, bool)
    errors[order[200::2]] = True
    rule = JointRule(0.05, 0.3, method=None)
    text = refusal(rule, np.full(300, 7), errors)
    assert "300 samples share the score 7" in text
    assert JointRule(0.05, 0.3, method=None).fit(
        np.where(errors, 8, 7), errors=errors
    ).predict([7, 8]).accepted.tolist() == [True, False]


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("arguments", "needed", "outliers"),
    [
        ({"risk": 0.05, "coverage": 0.8}, 60, 0),
        ({"risk": 0.05, "coverage": 0.98}, 228, 0),
        ({"risk": 0.05, "false_positive_rate": 0.1}, 60, 29),
        ({"coverage": 0.9, "false_positive_rate": 0.05}, 44, 63),
        (
            {"risk": 0.02, "coverage": 0.9, "false_positive_rate": 0.01},
            150,
            299,
        ),
    ],
    ids=str,
)
def test_too_few_samples_are_refused_with_the_number_needed(
    arguments, needed, outliers
):
    rule = JointRule(**arguments, method=None)

    def fit_on(n, m):
        if rule.false_positive_rate is None:
            far = None
        else:
            far = 1e6 + np.arange(float(m))
        return rule.fit(np.arange(float(n)), errors=np.zeros(n), outliers=far)

    with pytest.raises(ValueError, match=f"at least {needed} calibration"):
        fit_on(needed - 1, outliers + 5)
    if outliers:
        with pytest.raises(ValueError, match=f"at least {outliers} outliers"):
            fit_on(needed, outliers - 1)
    assert fit_on(needed, outliers).predict([0.0]).accepted.all()


def test_what_is_missing_or_too_much_is_named():
    scores, labels = known_data()
    for arguments in ({}, {"risk": 0.1}, {"coverage": 0.5}):
        with pytest.raises(ValueError, match="at least two of"):
            JointRule(**arguments)
    with pytest.raises(ValueError, match="needs `labels`"):
        JointRule(0.1, 0.5).fit(scores)
    with pytest.raises(ValueError, match="and no outliers"):
        JointRule(0.1, None, 0.5).fit(scores, labels)
    with pytest.raises(ValueError, match="and outliers"):
        JointRule(0.1, 0.5).fit(scores, labels, outliers=scores)
    other = packed(np.ones((50, 8)), CENTROIDS, gamma=5.0)
    with pytest.raises(ValueError, match="another model"):
        JointRule(0.1, None, 0.5).fit(scores, labels, outliers=other)
    # Without a risk no labels are needed.
    far = packed(np.full((50, 8), 40.0), CENTROIDS)
    rule = JointRule(None, 0.5, 0.5, method="nearest")
    assert "wrong" not in rule.fit(scores, outliers=far).summary()
