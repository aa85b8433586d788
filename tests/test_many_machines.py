"""What is fitted after training merges: shards give what one pass gives."""

import concurrent.futures
import dataclasses
import itertools
import json
import multiprocessing
import pathlib

import keras
import numpy as np
import pytest
from helpers import float64

import keras_halo
from keras_halo import ClassStatistics, HALODense, HALOLoss, rejection

pytest.importorskip("scipy", reason="needs SciPy")

pytestmark = pytest.mark.slow

SHARDS = 8
K, D = 4, 6


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    y = rng.integers(K, size=1600)
    x = 3.0 * rng.normal(size=(K, D))[y] + rng.normal(size=(1600, D))
    return x.astype("float32"), y


@pytest.fixture(scope="module")
def model(data):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((D,)), HALODense(K, 16)])
    model.compile(keras.optimizers.Adam(1e-2), HALOLoss())
    model.fit(*data, epochs=2, verbose=0)
    return model


def shards(*arrays):
    """Parts of different sizes, and a shuffled order of them."""
    cuts = np.cumsum(np.random.default_rng(1).integers(50, 200, SHARDS - 1))
    parts = list(zip(*(np.split(a, cuts) for a in arrays), strict=True))
    return parts, np.random.default_rng(2).permutation(SHARDS)


def test_gaussians_of_eight_shards_are_those_of_one_pass(model, data, tmp_path):
    x, y = data
    parts, order = shards(x, y)
    for number, part in enumerate(parts):
        statistics = keras_halo.collect_statistics(model, *part, verbose=0)
        np.savez(tmp_path / f"{number}.npz", **statistics.state())
    merged = ClassStatistics(K, 16)
    for number in order:
        with np.load(tmp_path / f"{number}.npz") as state:
            merged.merge(ClassStatistics.from_state(state))
    whole = keras_halo.collect_statistics(model, x, y, verbose=0)
    # Features depend on the batch that they were computed in, to float32.
    np.testing.assert_array_equal(merged.counts, whole.counts)
    np.testing.assert_allclose(merged.means, whole.means, rtol=1e-5, atol=1e-5)
    one = keras_halo.fit_class_gaussians(model, x, y, verbose=0)
    many = keras_halo.fit_class_gaussians(model, merged)
    expected, found = one.predict(x, verbose=0), many.predict(x, verbose=0)
    np.testing.assert_allclose(
        found["ood"], expected["ood"], rtol=1e-4, atol=1e-3
    )


def test_the_same_features_give_the_same_to_rounding(model, data):
    x, y = data
    parts, order = shards(x.astype("float64"), y)
    whole = ClassStatistics(K, D)
    whole.update(x.astype("float64"), y)
    merged = ClassStatistics(K, D)
    for number in order:
        statistics = ClassStatistics(K, D)
        statistics.update(*parts[number])
        merged.merge(statistics)
    for name, value in whole.state().items():
        np.testing.assert_allclose(
            merged.state()[name],
            value,
            rtol=1e-12,
            atol=1e-12 * np.abs(value).max(),
        )
    fitted = []
    with float64():
        for statistics in (whole, merged):
            layer = keras_halo.layers.ClassGaussians(K, dtype="float64")
            layer.set_statistics(statistics)
            fitted.append(
                [keras.ops.convert_to_numpy(w) for w in layer.weights]
            )
    for one, other in zip(*fitted, strict=True):
        np.testing.assert_allclose(
            other, one, rtol=1e-12, atol=1e-12 * np.abs(one).max()
        )


def assert_equal_to_rounding(found, expected):
    """Compares what JSON holds; the same row elsewhere is rounded otherwise."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        # That of a text, which tells every digit.
        assert found.keys() == expected.keys()
        for key in expected.keys() - {"checksum"}:
            assert_equal_to_rounding(found[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            assert_equal_to_rounding(*pair)
    elif isinstance(expected, float):
        # A score is a difference of logits, rounded as they are.
        assert found == pytest.approx(expected, rel=1e-6, abs=2e-6, nan_ok=True)
    else:
        assert found == expected


RULES = {
    "coverage": lambda: rejection.CoverageRule(0.9),
    "risk": lambda: rejection.SelectiveRiskRule(0.2),
    "conformal": lambda: rejection.ConformalRule(),
    "joint": lambda: rejection.JointRule(risk=0.3, coverage=0.5),
    "by class": lambda: rejection.GroupwiseRule(rejection.CoverageRule(0.8)),
    "label sets": lambda: rejection.LabelSetRule(0.9),
}


@pytest.mark.parametrize("name", RULES)
def test_calibration_scores_of_shards_make_one_rule(model, data, name):
    x, y = data
    scores = model.predict(x, verbose=0)
    parts, order = shards(scores, y)
    joined = [
        np.concatenate([parts[number][i] for number in order]) for i in (0, 1)
    ]
    one = RULES[name]().fit(scores, y)
    many = RULES[name]().fit(*joined)
    assert_equal_to_rounding(many.certificate(), one.certificate())
    a, b = one.predict(scores), many.predict(scores)
    np.testing.assert_array_equal(a.accepted, b.accepted)


def test_calibration_scores_of_shards_make_one_monitor(model, data):
    scores = model.predict(data[0], verbose=0)
    (*parts,), order = shards(scores)
    joined = np.concatenate([parts[number][0] for number in order])
    rule = rejection.CoverageRule(0.9).fit(scores)
    one = rejection.StreamMonitor(rule).fit(scores)
    many = rejection.StreamMonitor(rule).fit(joined)
    assert_equal_to_rounding(many.state, one.state)
    statuses = [
        dataclasses.asdict(monitor.update(scores[:300]))
        for monitor in (many, one)
    ]
    assert_equal_to_rounding(*statuses)


def monitored(known, count, false_alarm):
    rule = rejection.CoverageRule(0.95, method=None).fit(known)
    return [
        rejection.StreamMonitor(rule, false_alarm, seed=seed).fit(known)
        for seed in range(count)
    ]


def test_monitors_of_several_streams_say_what_they_saw_together():
    rng = np.random.default_rng(0)
    known = rng.normal(size=1000)
    monitors = monitored(known, 4, 0.01 / 4)
    assert rejection.merged_status(monitors).unknown_share == 0.0
    streams = rng.normal(size=(4, 600))
    streams[2, 300:] += 3.0
    wrong = rng.random((4, 600)) < 0.1
    for monitor, stream, errors in zip(monitors, streams, wrong, strict=True):
        monitor.update(stream, errors=errors)
    statuses = [monitor.status for monitor in monitors]
    # As they come from another machine, in any order.
    found = set()
    for order in itertools.permutations(range(4)):
        restored = []
        for number in order:
            monitor = rejection.StreamMonitor(
                monitors[0].rule, 0.01 / 4, seed=number
            )
            monitor.restore(json.loads(json.dumps(monitors[number].state)))
            restored.append(monitor)
        found.add(rejection.merged_status(restored))
    values = [(s.inputs, s.rejected, s.alarm, s.alarm_at) for s in found]
    assert set(values) == {
        (2400, sum(s.rejected for s in statuses), True, statuses[2].alarm_at)
    }
    (status, *others) = found
    for other in others:
        assert other.evidence == pytest.approx(status.evidence, rel=1e-12)
    mean = np.mean([10.0**s.evidence for s in statuses])
    assert status.evidence == pytest.approx(np.log10(mean))
    # The interval of one stream that had all labelled inputs.
    (all_of_it,) = monitored(known, 1, 0.01)
    expected = all_of_it.update(streams.ravel(), errors=wrong.ravel())
    assert status.risk == pytest.approx(expected.risk, rel=1e-12)
    assert status.labelled == expected.labelled
    assert 0.1 < status.unknown_share < 0.4


def test_streams_have_few_false_alarms_together():
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(200):
        monitors = monitored(rng.normal(size=300), 4, 0.1 / 4)
        for monitor in monitors:
            monitor.update(rng.normal(size=400))
        alarms += rejection.merged_status(monitors).alarm
    # 0.1 of 200 at most, and four standard deviations.
    assert alarms <= 20 + 4 * 4.3


def test_what_does_not_belong_together_is_refused(model, data):
    rng = np.random.default_rng(0)
    (one,) = monitored(rng.normal(size=300), 1, 0.01)
    (other,) = monitored(rng.normal(size=300), 1, 0.01)
    for monitors in ([], None, "monitors", [one, None], 3.0):
        with pytest.raises(ValueError, match="`monitors` must be a list"):
            rejection.merged_status(monitors)
    with pytest.raises(ValueError, match="2 rules"):
        rejection.merged_status([one, other])
    with pytest.raises(ValueError, match="not been fitted"):
        rejection.merged_status([rejection.StreamMonitor(one.rule)])
    statistics = keras_halo.collect_statistics(model, *data, verbose=0)
    with pytest.raises(ValueError, match="`y` belongs to inputs"):
        keras_halo.fit_class_gaussians(model, statistics, data[1])
    pooled = keras_halo.collect_statistics(model, *data, verbose=0, pooled=True)
    with pytest.raises(ValueError, match="pooled=True"):
        keras_halo.fit_class_gaussians(model, pooled)


def test_logs_of_several_processes_are_read_and_replayed_as_one(
    model, data, tmp_path
):
    x = data[0]
    rule = rejection.CoverageRule(0.9).fit(model.predict(x, verbose=0))
    guarded = keras_halo.guard(model, rule)
    paths = [tmp_path / f"{number}.jsonl" for number in range(3)]
    logs = [rejection.DecisionLog(path, rule) for path in paths]
    batches = np.array_split(np.arange(90), 9)
    for number, rows in enumerate(batches):
        answers = guarded.predict(x[rows], verbose=0)
        logs[number % 3].append(answers, references=rows)
    for log in logs:
        log.close()
    records = list(rejection.read_decisions(paths))
    assert [record.reference for record in records] == list(range(90))
    assert {pathlib.Path(record.file) for record in records} == set(paths)
    report = keras_halo.replay(paths[::-1], guarded, x)
    assert report.same and report.decisions == 90
    with pytest.raises(FileNotFoundError, match="no decision log"):
        rejection.read_decisions([*paths, tmp_path / "4.jsonl"])


def statistics_of(path):
    """What a worker does that knows a file and no model."""
    with np.load(path) as shard:
        statistics = ClassStatistics(K, D, pooled=True)
        statistics.update(shard["x"], shard["y"])
    return statistics.state()


def test_processes_collect_what_one_pass_does(data, tmp_path):
    x, y = data
    parts, _ = shards(x, y)
    paths = [tmp_path / f"{number}.npz" for number in range(SHARDS)]
    for path, (inputs, labels) in zip(paths, parts, strict=True):
        np.savez(path, x=inputs, y=labels)
    context = multiprocessing.get_context("spawn")
    merged = ClassStatistics(K, D, pooled=True)
    with concurrent.futures.ProcessPoolExecutor(2, context) as pool:
        # In whatever order they are done.
        jobs = [pool.submit(statistics_of, path) for path in paths]
        for job in concurrent.futures.as_completed(jobs):
            merged.merge(ClassStatistics.from_state(job.result()))
    whole = ClassStatistics(K, D, pooled=True)
    whole.update(x, y)
    np.testing.assert_array_equal(merged.counts, whole.counts)
    for one, other in (
        (whole.means, merged.means),
        (whole.scatter, merged.scatter),
        *zip(
            keras_halo.ops.class_statistics.whitening(whole),
            keras_halo.ops.class_statistics.whitening(merged),
            strict=True,
        ),
    ):
        np.testing.assert_allclose(
            other, one, rtol=1e-12, atol=1e-12 * np.abs(one).max()
        )
