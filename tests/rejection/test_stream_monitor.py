"""A monitor of a stream: evidence that is fair, at any time."""

import json
import math

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_halo import HALODense, plots, rejection
from keras_halo.rejection import StreamMonitor, load_monitor, martingale

stats = pytest.importorskip("scipy.stats", reason="needs SciPy")

# Unknown inputs that a detector with an AUROC of 95 % sees.
SHIFT = float(stats.norm.ppf(0.95) * math.sqrt(2.0))


def monitored(known, **kwargs):
    rule = rejection.CoverageRule(0.95, method=None).fit(known)
    return StreamMonitor(rule, **kwargs).fit(known)


def stream(rng, known, unknown, share=0.2):
    """Scores of known inputs, and then of a mixture."""
    scores = rng.normal(size=known + unknown)
    scores[known:] += SHIFT * (rng.random(unknown) < share)
    return scores


# Mathematics ----------------------------------------------------------------


@pytest.mark.any_backend
def test_every_bet_is_fair():
    # On the scale of the normal quantiles, where bets are smooth.
    z = np.linspace(-7.5, 7.5, 15_001)
    bets = np.exp(martingale.log_bets(stats.norm.sf(z)))
    mean = np.sum(bets * stats.norm.pdf(z)[:, None], axis=0) * (z[1] - z[0])
    np.testing.assert_allclose(mean, 1.0, atol=1e-3)
    # Finite at the ends, and never the loss of everything.
    ends = martingale.log_bets(np.array([0.0, 1.0]))
    assert np.isfinite(ends).all()
    assert (ends > math.log(0.25)).all()


@pytest.mark.any_backend
@settings(max_examples=30, deadline=None)
@given(
    p=st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=60),
    cut=st.integers(0, 60),
)
def test_wealth_is_that_of_a_naive_loop(p, cut):
    p = np.array(p)
    wealth = np.zeros(martingale.NUM_BETS)
    expected = []
    for t, bets in enumerate(np.exp(martingale.log_bets(p))):
        left = martingale.stake_left(np.array([t, t + 1]))
        joining = (left[0] - left[1]) / martingale.NUM_BETS
        wealth = (wealth + joining) * bets
        expected.append(wealth.sum() + left[1])
    # In one piece, and in two.
    state = np.full(martingale.NUM_BETS, -np.inf)
    found = []
    for part, start in ((p[:cut], 0), (p[cut:], min(cut, len(p)))):
        state, evidence = martingale.grown(state, start, part)
        found.append(evidence)
    np.testing.assert_allclose(np.exp(np.concatenate(found)), expected)
    np.testing.assert_allclose(np.exp(state), wealth)


@pytest.mark.any_backend
def test_evidence_stays_finite_over_long_streams():
    rng = np.random.default_rng(0)
    state = np.full(martingale.NUM_BETS, -np.inf)
    for start in range(0, 300_000, 50_000):
        p = rng.random(50_000)
        state, evidence = martingale.grown(state, start, p)
        assert np.isfinite(evidence).all() and np.isfinite(state).all()
    assert evidence[-1] < 0.0
    _, evidence = martingale.grown(state, 300_000, np.full(100_000, 1e-9))
    assert np.isfinite(evidence).all() and evidence[-1] > 1e5


@pytest.mark.any_backend
@pytest.mark.parametrize("bins", [1, 3, 40])
def test_smoothed_ranks_are_uniform_and_independent(bins):
    rng = np.random.default_rng(bins)
    ranks = []
    for _ in range(400):
        # One bin much fuller than the others: ties.
        drawn = np.minimum(rng.geometric(0.3, size=330) - 1, bins - 1)
        counts = np.bincount(drawn[:30], minlength=bins)
        p, after = martingale.smoothed_ranks(
            counts, drawn[30:], rng.random(300)
        )
        np.testing.assert_array_equal(after, np.bincount(drawn, minlength=bins))
        ranks.append(p)
    ranks = np.array(ranks)
    assert stats.kstest(ranks.ravel(), "uniform").pvalue > 1e-3
    neighbours = np.corrcoef(ranks[:, :-1].ravel(), ranks[:, 1:].ravel())
    assert abs(neighbours[0, 1]) < 4.0 / math.sqrt(ranks.size)


@pytest.mark.any_backend
def test_the_risk_interval_holds_at_all_times():
    rng = np.random.default_rng(0)
    misses = 0
    for _ in range(200):
        errors = np.cumsum(rng.random(2000) < 0.07)
        times = np.unique(np.geomspace(1, 2000, 60).astype(int))
        for n in times:
            low, high = martingale.risk_interval(errors[n - 1], n, 0.1)
            if not low <= 0.07 <= high:
                misses += 1
                break
    assert misses <= stats.binom.ppf(0.999, 200, 0.1)
    # Narrower with more samples, and never without the rate itself.
    assert martingale.risk_interval(0, 0, 0.05) == (0.0, 1.0)
    assert martingale.risk_interval(0, 1000, 0.05)[0] == 0.0
    assert martingale.risk_interval(0, 1000, 0.05)[1] < 0.01
    assert martingale.risk_interval(50, 50, 0.05)[1] == 1.0
    low, high = martingale.risk_interval(70, 1000, 0.05)
    assert 0.04 < low < 0.07 < high < 0.11


# Streams --------------------------------------------------------------------


@pytest.mark.any_backend
@pytest.mark.parametrize("kind", ["continuous", "ties"])
def test_alarms_without_a_change_are_as_rare_as_stated(kind):
    alarms = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        scores = rng.normal(size=1200)
        if kind == "ties":
            scores = np.round(2.0 * scores)
        monitor = monitored(scores[:200], false_alarm=0.1, seed=seed)
        alarms += monitor.update(scores[200:]).alarm
    assert alarms <= stats.binom.ppf(0.999, 200, 0.1)
    # Not because there is never one.
    assert monitor.update(scores[200:] + 5.0).alarm


@pytest.mark.any_backend
@pytest.mark.parametrize("known, limit", [(0, 40), (2000, 100)])
def test_unknown_inputs_are_noticed_soon(known, limit):
    delays, shares = [], []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        monitor = monitored(rng.normal(size=2000), seed=seed)
        status = monitor.update(stream(rng, known, 800))
        delays.append((status.alarm_at or 10**9) - known)
        shares.append(status.unknown_share)
    assert np.median(delays) <= limit
    assert 0.1 < np.mean(shares) < 0.3


@pytest.mark.any_backend
@pytest.mark.parametrize("sizes", [[1], [7, 0, 64], [1000]])
def test_batches_make_no_difference(sizes):
    rng = np.random.default_rng(3)
    known, scores = rng.normal(size=300), stream(rng, 150, 150)
    errors = rng.random(300) < 0.1
    whole = monitored(known)
    expected = whole.update(scores, errors=errors)
    monitor = monitored(known)
    start, turn = 0, 0
    while start < len(scores):
        part = slice(start, start + sizes[turn % len(sizes)])
        status = monitor.update(scores[part], errors=errors[part])
        start, turn = part.stop, turn + 1
    assert status.evidence == pytest.approx(expected.evidence, abs=1e-9)
    assert status.unknown_share == pytest.approx(expected.unknown_share)
    assert status.alarm_at == expected.alarm_at is not None
    assert status.risk == expected.risk and status.labelled > 200
    assert (status.inputs, status.rejected) == (300, expected.rejected)


@pytest.mark.any_backend
@pytest.mark.parametrize("ulps", [-2, 2])
def test_rounding_of_scores_that_many_inputs_share_is_no_change(ulps):
    rng = np.random.default_rng(0)

    def drawn(count):
        scores = rng.normal(size=count).astype("float32")
        # Blank frames, say.
        return np.where(rng.random(count) < 0.4, np.float32(1.5), scores)

    step = np.spacing(np.float32(1.5))
    for of_known in (0.0, 0.03, 0.5):
        known, scores = drawn(2000), drawn(3000)
        # Some of the calibration data may have come out otherwise too.
        moved = (known == np.float32(1.5)) & (rng.random(2000) < of_known)
        known[moved] += step
        monitor = monitored(known)
        scores[scores == np.float32(1.5)] += ulps * step
        assert not monitor.update(scores).alarm


def test_packed_scores_with_labels_and_nan():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), HALODense(3)])
    x = np.random.default_rng(0).normal(size=(400, 4))
    scores = model.predict(x, verbose=0)
    labels = np.argmax(scores[:, :3], axis=-1)
    rule = rejection.CoverageRule(0.9).fit(scores[:200])
    monitor = StreamMonitor(rule).fit(scores[:200])
    new = scores[200:].copy()
    new[5] = np.nan
    given = (labels[200:] + (x[200:, 0] > 1)) % 3
    with pytest.warns(UserWarning, match="NaN"):
        decisions = rule.predict(new)
    with pytest.warns(UserWarning, match="NaN"):
        status = monitor.update(new, given)
    assert status.rejected == decisions.rejected.sum()
    assert status.labelled == decisions.accepted.sum()
    wrong = (x[200:, 0] > 1) & decisions.accepted
    low, high = status.risk
    assert low < wrong.sum() / status.labelled < high
    other = keras.Sequential([keras.Input((4,)), HALODense(4)])
    with pytest.raises(ValueError, match="another model"):
        monitor.update(other.predict(x[:2], verbose=0))
    assert monitor.status == status


@pytest.mark.any_backend
def test_a_monitor_that_was_saved_goes_on(tmp_path):
    rng = np.random.default_rng(0)
    known, scores = rng.normal(size=500), stream(rng, 100, 200)
    monitor = monitored(known, false_alarm=0.02, delta=0.1, seed=5)
    path = tmp_path / "monitor.json"
    for part in (scores[:0], scores[:50], scores[50:120]):
        monitor.update(part)
        monitor.save(path)
        loaded = load_monitor(path)
        assert loaded.status == monitor.status
        assert repr(loaded.rule) == repr(monitor.rule)
    assert loaded.update(scores[120:]) == monitor.update(scores[120:])
    assert (loaded.false_alarm, loaded.delta, loaded.seed) == (0.02, 0.1, 5)

    text = path.read_text("utf-8")
    document = json.loads(text)
    document["state"]["evidence"] = 0.0
    path.write_text(json.dumps(document), "utf-8")
    with pytest.raises(ValueError, match="damaged or edited"):
        load_monitor(path)
    monitor.rule.save(path)
    with pytest.raises(ValueError, match="holds no monitor"):
        load_monitor(path)


@pytest.mark.any_backend
def test_what_is_refused_leaves_the_monitor_as_it_was():
    rng = np.random.default_rng(0)
    monitor = monitored(rng.normal(size=100))
    status = monitor.update(rng.normal(size=10))
    for bad in (
        lambda: monitor.update("scores"),
        lambda: monitor.update([1.0, 2.0], errors=[True]),
        lambda: monitor.update([1.0, 2.0], labels=[0, 1]),
        lambda: monitor.fit(np.zeros(39)),
        lambda: monitor.fit(np.full(100, np.nan)),
    ):
        with pytest.raises(ValueError):
            bad()
        assert monitor.status == status
    rule = rejection.CoverageRule(method=None)
    with pytest.raises(ValueError, match="has not been fitted"):
        StreamMonitor(rule)
    with pytest.raises(ValueError, match=r"monitor\.fit"):
        StreamMonitor(monitor.rule).update([1.0])


@pytest.mark.any_backend
def test_the_picture_shows_evidence_threshold_and_alarm():
    pytest.importorskip("matplotlib")
    rng = np.random.default_rng(0)
    monitor = monitored(rng.normal(size=500))
    scores = stream(rng, 300, 300, share=0.5)
    statuses = [monitor.update(part) for part in np.split(scores, 30)]
    ax = plots.stream_evidence(statuses)
    evidence, threshold, alarm = ax.get_lines()
    assert evidence.get_xdata()[-1] == 600
    assert threshold.get_ydata()[0] == pytest.approx(2.0)
    assert 300 < alarm.get_xdata()[0] < 400
    # No alarm, no line.
    assert len(plots.stream_evidence(statuses[:15]).get_lines()) == 2


def test_a_rule_that_judges_whole_batches_is_refused():
    known = np.random.default_rng(0).normal(size=500)
    for rule in (
        rejection.ConformalRule(0.1, None, fdr=True).fit(known),
        rejection.GroupwiseRule(
            rejection.ConformalRule(0.1, None, fdr=True), by="group"
        ).fit(known, groups=np.arange(500) % 2),
    ):
        with pytest.raises(ValueError, match="batches|groups"):
            StreamMonitor(rule)
