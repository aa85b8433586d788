"""Every class, and every group, keeps a guarantee of its own."""

import json
import math
import re

import keras
import numpy as np
import pytest
from helpers import packed, to_numpy
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_halo
from keras_halo import rejection
from keras_halo.layers import Decision
from keras_halo.ops.ood_scores import ood_score
from keras_halo.rejection import (
    ConformalRule,
    CoverageRule,
    FalsePositiveRateRule,
    GroupwiseRule,
    JointRule,
    SelectiveRiskRule,
    load_rule,
)

DRAWS = 300
DELTA = 0.1
CENTROIDS = 3.0 * np.random.default_rng(5).normal(size=(3, 8))
SHARES = [0.7, 0.2, 0.1]
SPREADS = np.array([0.7, 1.0, 1.4])

RULES = {
    "coverage": CoverageRule(0.8),
    "coverage-delta": CoverageRule(0.7, delta=0.1),
    "risk": SelectiveRiskRule(0.3),
    "joint": JointRule(0.3, 0.4),
    "conformal": ConformalRule(0.2),
    "conformal-fdr": ConformalRule(0.2, fdr=True),
    "outliers": FalsePositiveRateRule(0.2),
}


def known_data(n=600, seed=0, **head):
    """Packed scores of a frequent class, a rarer and a rare one."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(3, n, p=SHARES)
    noise = SPREADS[labels][:, None] * rng.normal(size=(n, 8))
    embeddings = (CENTROIDS - CENTROIDS.mean(axis=0))[labels] + noise
    return packed(embeddings, CENTROIDS, **head), labels


def fit(rule, scores, labels):
    if isinstance(rule.rule, FalsePositiveRateRule):
        return rule.fit(scores)
    return rule.fit(scores, labels)


@pytest.fixture(params=RULES)
def rule(request):
    return fit(GroupwiseRule(RULES[request.param]), *known_data())


@pytest.mark.any_backend
@pytest.mark.parametrize("distinct", [None, 30], ids=["continuous", "ties"])
def test_every_group_keeps_its_coverage_where_one_threshold_does_not(distinct):
    # Of group g the quantile of a score s is s ** power[g].
    powers = np.array([0.5, 1.0, 6.0])
    rng = np.random.default_rng(0)
    short = np.zeros((2, 3))
    for _ in range(DRAWS):
        groups = rng.choice(3, 700, p=[0.75, 0.15, 0.1])
        scores = rng.random(700) ** (1.0 / powers[groups])
        if distinct:
            scores = np.ceil(distinct * scores) / distinct
        rule = CoverageRule(0.8, None, DELTA)
        each = GroupwiseRule(rule, by="group").fit(scores, groups=groups)
        together = rule.fit(scores).threshold
        for row, thresholds in enumerate(
            ([together] * 3, each.thresholds.values())
        ):
            limits = np.array(list(thresholds))
            if distinct:
                limits = np.floor(distinct * limits) / distinct
            short[row] += np.minimum(limits, 1.0) ** powers < 0.8 - 1e-9
    one, own = short / DRAWS
    print(f"short of 80 %: one threshold {one}, one for each {own}")
    assert (own <= DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / DRAWS)).all()
    assert one.max() > 0.9


@pytest.mark.parametrize("name", RULES)
def test_it_decides_as_a_rule_that_was_fitted_on_each_class_alone(name):
    scores, labels = known_data()
    fresh, _ = known_data(seed=1)
    rule = fit(GroupwiseRule(RULES[name]), scores, labels)
    decisions = rule.predict(fresh)
    predicted = np.argmax(scores[:, :3], axis=-1)
    fresh_predicted = np.argmax(fresh[:, :3], axis=-1)
    for k in range(3):
        alone = type(RULES[name])(**RULES[name].get_config())
        of_class = scores[predicted == k], labels[predicted == k]
        if name == "outliers":
            alone.fit(of_class[0])
        else:
            alone.fit(*of_class)
        assert rule.thresholds[k] == alone.threshold
        assert rule.rules[k].summary() == alone.summary()
        expected = alone.predict(fresh[fresh_predicted == k])
        of_each = decisions.labels[fresh_predicted == k]
        np.testing.assert_array_equal(of_each, expected.labels)
    assert set(decisions.labels) >= {0, 1, 2}
    assert decisions.rejected.any() or name == "conformal-fdr"
    np.testing.assert_array_equal(decisions.accepted, decisions.labels >= 0)


@pytest.mark.any_backend
@settings(max_examples=40, deadline=None)
@given(
    groups=st.lists(st.sampled_from("abc"), min_size=60, max_size=90),
    seed=st.integers(0, 10**6),
)
def test_groups_of_the_user_written_out(groups, seed):
    groups = np.array([*groups, *("abc" * 4)])
    scores = np.random.default_rng(seed).integers(0, 40, len(groups))
    rule = GroupwiseRule(CoverageRule(0.75, None), by="group")
    rule.fit(scores, groups=groups)
    for name in "abc":
        own = np.sort(scores[groups == name])
        largest = own[math.ceil(0.75 * (len(own) + 1)) - 1]
        decisions = rule.predict(np.arange(40), groups=[name] * 40)
        np.testing.assert_array_equal(
            decisions.accepted, np.arange(40) <= largest
        )
        assert decisions.labels is None


@pytest.mark.any_backend
@pytest.mark.parametrize("name", ["coverage", "false positives"])
def test_equal_inputs_that_were_rounded_otherwise_stay_together(name):
    step = np.spacing(np.float32(3.0))
    blank = np.where(np.arange(300) < 290, 3.0, 3.0 + step)
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.random(100), blank, 4.0 + rng.random(100)])
    rule = {
        "coverage": CoverageRule(0.5, None),
        "false positives": FalsePositiveRateRule(0.79, None),
    }[name]
    rule = GroupwiseRule(rule, by="group")
    rule.fit(np.tile(scores, 2), groups=np.repeat(["day", "night"], 500))
    moved = 3.0 + step * np.arange(-2, 4)
    for group in ("day", "night"):
        accepted = rule.predict(moved, groups=[group] * 6).accepted
        assert accepted.all() if name == "coverage" else not accepted.any()


@pytest.mark.any_backend
@pytest.mark.parametrize("dtype", ["<U5", object, "int64"])
@pytest.mark.parametrize("form", ["array", "rows", "element"])
def test_masked_groups_are_refused(form, dtype):
    groups = np.ma.array(np.arange(40).reshape(20, 2) % 2, dtype)
    groups[3, 1] = np.ma.masked
    given = {
        "array": groups,
        "rows": list(groups),
        "element": [[groups[i, 0], groups[i, 1]] for i in range(20)],
    }[form]
    rule = GroupwiseRule(CoverageRule(0.5, None), by="group")
    with pytest.raises(ValueError, match="`groups` must not be a masked"):
        rule.fit(np.arange(40.0).reshape(20, 2), groups=given)


@pytest.mark.parametrize("form", ["strings", "list", "tensor", "int8"])
def test_groups_in_every_form_are_the_same(form):
    scores = np.random.default_rng(0).random((90, 4))
    numbers = np.arange(90) % 3
    groups = {
        "strings": np.array(["a", "b", "c"], object)[numbers],
        "list": numbers.tolist(),
        "tensor": keras.ops.convert_to_tensor(numbers),
        "int8": numbers.astype("int8"),
    }[form]
    rule = GroupwiseRule(CoverageRule(0.9, None), by="group")
    rule.fit(scores, groups=groups)
    # One group an input: its positions share it.
    expected = GroupwiseRule(CoverageRule(0.9, None), by="group").fit(
        scores, groups=np.repeat(numbers[:, None], 4, axis=1)
    )
    assert list(rule.thresholds.values()) == list(expected.thresholds.values())
    accepted = rule.predict(scores, groups=groups).accepted
    assert accepted.shape == (90, 4)
    np.testing.assert_array_equal(
        accepted,
        expected.predict(scores, groups=np.tile(numbers[:, None], 4)).accepted,
    )
    assert "360 positions of 90 inputs" in rule.guarantee


def test_saved_and_loaded_it_is_the_same(rule, tmp_path):
    path = tmp_path / "rule.json"
    rule.save(path)
    loaded = load_rule(path)
    assert repr(loaded) == repr(rule)
    assert loaded.summary() == rule.summary()
    assert loaded.thresholds == rule.thresholds
    fresh, _ = known_data(seed=1)
    np.testing.assert_array_equal(
        loaded.predict(fresh).labels, rule.predict(fresh).labels
    )
    with pytest.raises(ValueError, match="another model"):
        loaded.predict(known_data(gamma=5.0)[0])
    document = json.loads(path.read_text())
    assert document["guarantee"] == rule.guarantee
    assert len(document["groups"]) == len(document["threshold"]) == 3


@pytest.mark.any_backend
def test_names_of_groups_are_saved(tmp_path):
    scores = np.arange(80.0)
    groups = np.array(["day", "night"])[np.arange(80) % 2]
    rule = GroupwiseRule(ConformalRule(0.1, None), by="group")
    rule.fit(scores, groups=groups).save(tmp_path / "rule.json")
    loaded = load_rule(tmp_path / "rule.json")
    assert loaded.thresholds == rule.thresholds
    assert list(loaded.rules) == ["day", "night"]
    np.testing.assert_array_equal(
        loaded.rules["night"].p_values([3.0]),
        rule.rules["night"].p_values([3.0]),
    )


def test_damaged_groups_are_refused(tmp_path):
    rule = fit(GroupwiseRule(ConformalRule(0.2)), *known_data())
    path = tmp_path / "rule.json"
    for change in (
        lambda d: d.pop("groups"),
        lambda d: d["groups"].pop(),
        lambda d: d["groups"][1].update(name=0),
        lambda d: d["groups"][1].update(name=None),
        lambda d: d["groups"][1].update(name=7),
        lambda d: d["groups"][1].update(scores=None),
        lambda d: d["groups"][1]["calibration"].update(samples=3),
        lambda d: d["threshold"].pop(),
        lambda d: d.update(threshold=1.0),
        lambda d: d["config"].update(by="shape"),
        lambda d: d["config"].update(rule={"class_name": "os", "config": {}}),
        lambda d: d["config"].update(rule=None),
    ):
        document = rule.certificate()
        document = json.loads(json.dumps(document))
        del document["checksum"]
        change(document)
        signed = rejection.storage.signed(document)
        path.write_text(json.dumps(signed))
        with pytest.raises(ValueError, match="rule.json"):
            load_rule(path)


# In a model -----------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    """A model of three classes, its calibration data, and new inputs."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 640)
    x = 4.0 * np.eye(4)[labels] + rng.normal(size=(640, 4))
    model = keras.Sequential([keras.Input((4,)), keras_halo.HALODense(3)])
    model.compile(keras.optimizers.Adam(0.03), keras_halo.HALOLoss())
    model.fit(x[:320], labels[:320], epochs=10, verbose=0)
    return model, x[320:], labels[320:], 4.0 * rng.normal(size=(320, 4))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["coverage", "risk", "conformal", "outliers"])
def test_thresholds_by_class_go_into_layer_and_model(name, trained, tmp_path):
    model, x, labels, new = trained
    scores = model.predict(x, verbose=0)
    rule = fit(GroupwiseRule(RULES[name]), scores, labels)
    expected = rule.predict(model.predict(new, verbose=0)).labels
    assert -1 in expected and len(set(expected)) > 2
    layer = rule.to_layer()
    again = Decision.from_config(layer.get_config())
    assert again.threshold == list(rule.thresholds.values())
    for decide in (layer, again):
        np.testing.assert_array_equal(
            to_numpy(decide(model.predict(new, verbose=0))), expected
        )
    guarded = keras_halo.guard(model, rule)
    guarded.save(tmp_path / "guarded.keras")
    for source in (
        guarded,
        keras.models.load_model(tmp_path / "guarded.keras"),
    ):
        answers = source.predict(new, verbose=0)
        np.testing.assert_array_equal(answers["label"], expected)
        assert ("p_value" in answers) == (name != "outliers")
    certificate = keras_halo.read_certificate(tmp_path / "guarded.keras")
    assert certificate == rule.certificate()
    assert "each predicted class" in certificate["guarantee"]


def test_a_layer_holds_one_threshold_for_each_class():
    scores, _ = known_data(50)
    judged = ood_score(scores)
    limits = np.quantile(judged, [0.2, 0.5, 0.8]).tolist()
    predicted = np.argmax(scores[:, :3], axis=-1)
    expected = np.where(
        judged <= np.array(limits, "float64")[predicted] + 1e-6, predicted, -1
    )
    labels = to_numpy(Decision([limit + 1e-6 for limit in limits])(scores))
    np.testing.assert_array_equal(labels, expected)
    with pytest.raises(ValueError, match="each of the 3 classes.* 2 numbers"):
        Decision(limits[:2])(scores)
    for bad in ([1.0, np.nan, 2.0], [1.0, "a", 2.0], [], [True, 1.0]):
        with pytest.raises(ValueError, match=r"`threshold.* must be a finite"):
            Decision(bad)


def test_what_depends_on_more_than_score_and_class_is_no_layer():
    scores, labels = known_data()
    model = keras.Sequential([keras.Input((4,)), keras_halo.HALODense(3)])
    by_group = GroupwiseRule(CoverageRule(0.9), by="group")
    by_group.fit(scores, groups=labels)
    batches = GroupwiseRule(ConformalRule(0.1, fdr=True)).fit(scores)
    for rule, message in (
        (by_group, "does not know to which group"),
        (batches, "the others in the batch"),
        (GroupwiseRule(CoverageRule(0.9)), "has not been fitted"),
    ):
        with pytest.raises(ValueError, match=message):
            rule.to_layer()
        with pytest.raises(ValueError, match=message):
            keras_halo.guard(model, rule)


def test_a_stream_is_monitored_by_the_decisions_of_each_class():
    scores, labels = known_data()
    rule = GroupwiseRule(CoverageRule(0.9)).fit(scores, labels)
    monitor = rejection.StreamMonitor(rule).fit(scores)
    fresh, fresh_labels = known_data(seed=1)
    status = monitor.update(fresh, labels=fresh_labels)
    assert status.rejected == rule.predict(fresh).rejected.sum()
    assert not status.alarm
    rule = GroupwiseRule(CoverageRule(0.9), by="group")
    rule.fit(scores, groups=labels)
    with pytest.raises(ValueError, match=r"StreamMonitor\(rule.rules"):
        rejection.StreamMonitor(rule)
    rejection.StreamMonitor(rule.rules[0]).fit(scores[labels == 0])


# Words and refusals ---------------------------------------------------------


def test_summary_tells_every_group_and_what_is_not_guaranteed(rule):
    summary = rule.summary()
    for k in range(3):
        accepted = rule.rules[k].predict(known_data()[0][:1])
        assert accepted.accepted.shape == (1,)
        assert f"Predicted class {k}: threshold" in summary
    assert "each predicted class by itself" in rule.guarantee
    assert "at once" in rule.limits and "true class" in rule.limits
    assert rule.limits in summary
    counts = re.search(r"(\d+) of 600 .* accepted", summary)
    if rule.judges_singly:
        accepted = rule.predict(known_data()[0]).accepted.sum()
        assert int(counts[1]) == accepted


@pytest.mark.any_backend
def test_many_groups_are_summed_up():
    groups = np.repeat(np.arange(50), 10)
    rule = GroupwiseRule(CoverageRule(0.5, None), by="group")
    summary = rule.fit(np.arange(500.0), groups=groups).summary()
    assert summary.count("\n") < 30 and "And 30 more." in summary


def test_too_little_data_of_a_group_is_refused_with_the_number_needed():
    scores, labels = known_data(60)
    rule = GroupwiseRule(CoverageRule(0.9, delta=0.1))
    predicted = np.bincount(np.argmax(scores[:, :3], axis=-1), minlength=3)
    with pytest.raises(ValueError, match="at least 22 .* every predicted") as e:
        rule.fit(scores, labels)
    for k, count in enumerate(predicted):
        told = f"{count} of predicted class {k}"
        assert (told in str(e.value)) == (count < 22)
    with pytest.raises(ValueError, match="not been fitted"):
        rule.predict(scores)
    # A class that is never predicted cannot be left out: it may be, once.
    with pytest.raises(ValueError, match="Received: 0 of predicted class"):
        GroupwiseRule(CoverageRule(0.5)).fit(scores[labels == 0])


@pytest.mark.any_backend
def test_a_group_that_cannot_keep_its_guarantee_is_named():
    rng = np.random.default_rng(0)
    groups = np.array(["good", "bad"])[np.arange(600) % 2]
    errors = (groups == "bad") & (rng.random(600) < 0.5)
    rule = GroupwiseRule(SelectiveRiskRule(0.1, method=None), by="group")
    with pytest.raises(ValueError, match="Group 'bad': No threshold keeps"):
        rule.fit(rng.random(600), errors=errors, groups=groups)


def test_groups_are_asked_for_as_they_are_needed():
    scores, labels = known_data()
    by_class = GroupwiseRule(CoverageRule(0.9)).fit(scores)
    by_group = GroupwiseRule(CoverageRule(0.9), by="group")
    by_group.fit(scores, groups=labels)
    for call in (
        lambda: by_class.fit(scores, groups=labels),
        lambda: by_class.predict(scores, groups=labels),
        lambda: by_group.fit(scores),
        lambda: by_group.predict(scores),
    ):
        with pytest.raises(ValueError, match="with by='group', and only then"):
            call()
    with pytest.raises(ValueError, match="Received: Group 7"):
        by_group.predict(scores[:2], groups=[0, 7])
    for bad in (labels + 0.5, labels[:9], [None] * 600, "day", labels == 1):
        with pytest.raises(ValueError, match="`groups` must .* Received"):
            by_group.predict(scores, groups=bad)
    with pytest.raises(ValueError, match=r"Use `rule.thresholds`"):
        _ = by_group.threshold
    with pytest.raises(ValueError, match="do not tell a group"):
        by_group.accepts(labels)
    outliers = GroupwiseRule(FalsePositiveRateRule(0.2))
    with pytest.raises(ValueError, match="no right answer"):
        outliers.fit(scores, labels)


def test_rules_that_cannot_be_grouped_are_refused():
    for rule, by, message in (
        ("coverage", "class", "`rule` must be a rule"),
        (CoverageRule, "class", "`rule` must be a rule"),
        ({"rule": 1}, "class", "`rule` must be a rule"),
        (GroupwiseRule(CoverageRule()), "class", "for the inputs of one"),
        (CoverageRule(), "label", "`by` must be"),
        (CoverageRule(), ["class"], "`by` must be"),
        (CoverageRule(method=None), "class", "Plain scores do not tell"),
        (JointRule(0.1, 0.5, 0.1), "class", "fit one such rule for each"),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            GroupwiseRule(rule, by)
        assert "Received" in str(refused.value)


def test_rows_that_are_not_finite_are_rejected(rule):
    scores, _ = known_data()
    bad = scores[:9].copy()
    bad[3, 1] = np.nan
    with pytest.warns(UserWarning, match="1 of 9 rows"):
        decisions = rule.predict(bad)
    assert decisions.labels[3] == -1 and not decisions.accepted[3]
    assert rule.predict(scores[:0]).labels.shape == (0,)


def test_what_the_given_rule_was_or_will_be_fitted_on_does_not_matter():
    scores, labels = known_data()
    inner = CoverageRule(0.8).fit(scores[:100])
    rule = GroupwiseRule(inner).fit(scores, labels)
    before = rule.thresholds
    inner.fit(scores[100:200])
    assert rule.thresholds == before
    with pytest.raises(AttributeError, match="Make a new rule"):
        rule.by = "group"


@keras.saving.register_keras_serializable(package="groupwise")
class MedianRule(rejection.RejectionRule):
    """What a user would write."""

    def __init__(self, method="abstain"):
        super().__init__(method)

    def find_threshold(self, scores, wrong):
        return float(np.median(scores)), None

    def state_guarantee(self):
        return "Keeps half of the calibration data."


def test_a_rule_of_ones_own_is_applied_to_each_class(tmp_path):
    scores, _ = known_data()
    rule = GroupwiseRule(MedianRule()).fit(scores)
    predicted = np.argmax(scores[:, :3], axis=-1)
    for k in range(3):
        expected = np.median(ood_score(scores)[predicted == k])
        assert rule.thresholds[k] == pytest.approx(expected)
    rule.save(tmp_path / "rule.json")
    loaded = load_rule(tmp_path / "rule.json")
    assert type(loaded.rule) is MedianRule
    assert loaded.guarantee.endswith("keeps half of the calibration data.")


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "make",
    [
        np.asarray,
        lambda names: np.asarray(names, object),
        lambda names: np.asarray(names, np.dtypes.StringDType()),
    ],
)
def test_names_of_groups_come_in_any_dtype_of_strings(make):
    names = ["a", "b"] * 50
    rule = GroupwiseRule(CoverageRule(0.9, method=None), by="group")
    rule.fit(np.arange(100.0), groups=make(names))
    expected = GroupwiseRule(CoverageRule(0.9, method=None), by="group")
    expected.fit(np.arange(100.0), groups=names)
    assert rule.thresholds == expected.thresholds
