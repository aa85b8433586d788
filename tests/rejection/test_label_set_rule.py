"""Sets of labels hold the right one as often as stated, or are empty."""

import json
import math

import keras
import numpy as np
import pytest
from helpers import packed, to_numpy

import keras_halo
from keras_halo import rejection
from keras_halo.layers import LabelSet
from keras_halo.ops.ood_scores import ood_score
from keras_halo.rejection import LabelSetRule, load_rule

DRAWS = 40
CENTROIDS = 2.0 * np.random.default_rng(5).normal(size=(4, 6))
SHARES = [0.5, 0.3, 0.15, 0.05]

RULES = {
    "marginal": LabelSetRule(0.9),
    "abstain": LabelSetRule(0.9, method="abstain"),
    "with confidence": LabelSetRule(0.8, delta=0.1),
    "class-conditional": LabelSetRule(0.8, class_conditional=True),
}


def known_data(n=400, seed=0, distinct=None, **head):
    """Packed scores of classes that overlap, the last one rare and wide."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(4, n, p=SHARES)
    noise = rng.normal(size=(n, 6)) * np.where(labels == 3, 2.5, 1.3)[:, None]
    if distinct:
        # So few kinds of input that most of them share their scores.
        noise = noise[rng.integers(0, distinct, n)]
    embeddings = (CENTROIDS - CENTROIDS.mean(axis=0))[labels] + noise
    return packed(embeddings, CENTROIDS, **head), labels


@pytest.fixture(params=RULES)
def rule(request):
    return RULES[request.param].fit(*known_data())


@pytest.mark.any_backend
@pytest.mark.parametrize("distinct", [None, 40], ids=["continuous", "ties"])
def test_sets_hold_the_label_as_often_as_stated(distinct):
    # Calibration data and the others are drawn from one pool, in which every
    # order is as likely as another.
    scores, labels = known_data(1500, distinct=distinct)
    rng = np.random.default_rng(1)
    found = {False: [], True: []}
    for _ in range(DRAWS):
        order = rng.permutation(1500)
        known, new = order[:500], order[500:]
        for conditional, rates in found.items():
            rule = LabelSetRule(0.8, class_conditional=conditional)
            sets = rule.fit(scores[known], labels[known]).predict(scores[new])
            held = sets.contain(labels[new])
            each = [held[labels[new] == k].mean() for k in range(4)]
            rates.append([held.mean(), *each])
    one, own = np.mean(list(found.values()), axis=1)
    deviations = np.std(list(found.values()), axis=1)
    error = 3.0 * deviations / math.sqrt(DRAWS)
    print("one threshold: all, each class:", one, "one for each:", own)
    assert one[0] >= 0.8 - error[0, 0]
    assert (own >= 0.8 - error[1]).all()
    # One threshold fails the rare class.
    assert one[4] < 0.78
    if distinct is None:
        assert one[0] <= 0.8 + 1.0 / 501 + error[0, 0]


@pytest.mark.any_backend
def test_with_confidence_few_calibration_sets_fall_short():
    scores, labels = known_data(1000)
    rng = np.random.default_rng(2)
    short = []
    for _ in range(3 * DRAWS):
        known = rng.choice(1000, 100)
        rule = LabelSetRule(0.8, delta=0.1).fit(scores[known], labels[known])
        short.append(rule.predict(scores).contain(labels).mean() < 0.8)
    limit = 0.1 + 3.0 * math.sqrt(0.1 * 0.9 / len(short))
    assert np.mean(short) <= limit


@pytest.mark.any_backend
def test_equal_inputs_that_were_rounded_otherwise_stay_together():
    step = np.spacing(np.float32(3.0))
    own = np.where(np.arange(300) < 290, 3.0, 3.0 + step)
    own = np.concatenate([np.linspace(0, 2, 100), own, np.linspace(4, 5, 100)])
    threshold, _ = LabelSetRule(0.5).find_threshold(own, None)
    assert 3.0 + 3 * step < threshold < 4.0


@pytest.mark.parametrize("method", ["max_probability", "abstain", "nearest"])
def test_a_set_holds_the_labels_with_a_large_enough_p_value(method):
    scores, labels = known_data(99)
    new, _ = known_data(60, seed=1)

    def label_scores(rows):
        logits = rows[:, :4]
        margins = logits.max(axis=1, keepdims=True) - logits
        return ood_score(rows, method)[:, None] + margins

    own = label_scores(scores)[np.arange(99), labels]
    p = np.array(
        [[(1 + sum(own >= a)) / 100 for a in row] for row in label_scores(new)]
    )
    sets = LabelSetRule(0.85, method=method).fit(scores, labels).predict(new)
    clear = np.abs(p - 0.15) > 1e-9
    np.testing.assert_array_equal(sets.members[clear], (p > 0.15)[clear])
    np.testing.assert_array_equal(sets.sizes, sets.members.sum(axis=1))
    np.testing.assert_array_equal(sets.rejected, sets.sizes == 0)
    for row, members, label in zip(new, sets.members, sets.labels, strict=True):
        best = max(np.flatnonzero(members), key=lambda k: row[k], default=-1)
        assert label == best


def test_the_default_score_is_the_improbability_of_each_label():
    scores, labels = known_data()
    rule = LabelSetRule(0.9).fit(scores, labels)
    probabilities = keras_halo.decode_predictions(scores).probabilities
    own = np.sort(probabilities[np.arange(400), labels])[::-1]
    lowest = own[math.ceil(0.9 * 401) - 1]
    assert math.exp(-rule.threshold) == pytest.approx(lowest, rel=1e-3)
    members = rule.predict(scores).members
    clear = np.abs(probabilities / lowest - 1.0) > 1e-3
    np.testing.assert_array_equal(
        members[clear], (probabilities >= lowest)[clear]
    )


def test_none_of_them_is_the_answer_far_away():
    scores, labels = known_data()
    far = packed(np.full((20, 6), 40.0), CENTROIDS)
    for method in ("joint", "nearest"):
        rule = LabelSetRule(0.9, method=method).fit(scores, labels)
        sets = rule.predict(far)
        assert sets.rejected.all() and (sets.labels == -1).all()
        assert not sets.members.any()
        # A known input gets it with a probability of 10 % at most.
        assert rule.predict(known_data(seed=3)[0]).rejected.mean() < 0.15


def test_saved_and_loaded_it_is_the_same(rule, tmp_path):
    path = tmp_path / "rule.json"
    rule.save(path)
    loaded = load_rule(path)
    assert loaded.get_config() == rule.get_config()
    assert loaded.summary() == rule.summary()
    fresh, _ = known_data(seed=1)
    np.testing.assert_array_equal(
        loaded.predict(fresh).members, rule.predict(fresh).members
    )
    with pytest.raises(ValueError, match="another model"):
        loaded.predict(known_data(gamma=5.0)[0])
    assert json.loads(path.read_text())["guarantee"] == rule.guarantee


def test_thresholds_that_are_not_those_of_the_classes_are_refused(tmp_path):
    rule = RULES["class-conditional"].fit(*known_data())
    path = tmp_path / "rule.json"
    for change in (
        lambda d: d["config"].update(class_conditional=False),
        lambda d: d.update(groups=None, threshold=1.0),
        lambda d: d["groups"][0].update(name=5),
        lambda d: d["calibration"].update(covered=900),
        lambda d: d["calibration"].update(set_labels=-1),
    ):
        document = json.loads(json.dumps(rule.certificate()))
        del document["checksum"]
        change(document)
        path.write_text(json.dumps(rejection.storage.signed(document)))
        with pytest.raises(ValueError, match="rule.json"):
            load_rule(path)


def test_as_a_layer_it_gives_the_same_sets(rule):
    layer = rule.to_layer(name="labels")
    again = LabelSet.from_config(layer.get_config())
    for scores in (
        known_data()[0],
        known_data(seed=1)[0].reshape(20, 20, 10),
    ):
        expected = rule.predict(scores).members
        assert expected.shape == (*scores.shape[:-1], 4)
        for one in (layer, again):
            members = to_numpy(one(scores))
            assert members.dtype == bool
            np.testing.assert_array_equal(members, expected)


@pytest.fixture(scope="module")
def trained():
    """A model of three classes, its calibration data, and new inputs."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 640)
    x = 2.5 * np.eye(4)[labels] + rng.normal(size=(640, 4))
    model = keras.Sequential([keras.Input((4,)), keras_halo.HALODense(3)])
    model.compile(keras.optimizers.Adam(0.03), keras_halo.HALOLoss())
    model.fit(x[:320], labels[:320], epochs=10, verbose=0)
    return model, x[320:], labels[320:], 3.0 * rng.normal(size=(320, 4))


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_a_guarded_model_answers_with_the_sets(name, trained, tmp_path):
    model, x, labels, new = trained
    # Sets of several labels, or empty ones.
    coverage = 0.75 if name == "abstain" else 0.95
    config = {**RULES[name].get_config(), "coverage": coverage}
    rule = LabelSetRule(**config).fit(model.predict(x, verbose=0), labels)
    expected = rule.predict(model.predict(new, verbose=0))
    assert (expected.sizes != 1).mean() > 0.05
    guarded = keras_halo.guard(model, rule)
    guarded.save(tmp_path / "guarded.keras")
    for source in (
        guarded,
        keras.models.load_model(tmp_path / "guarded.keras"),
    ):
        answers = source.predict(new, verbose=0)
        np.testing.assert_array_equal(answers["label_set"], expected.members)
        np.testing.assert_array_equal(answers["label"], expected.labels)
        np.testing.assert_allclose(
            answers["score"], expected.scores, rtol=1e-3, atol=1e-5
        )
        assert ("p_value" in answers) == (name != "class-conditional")
        if name in ("marginal", "abstain"):
            # The set is empty exactly where no label has a p-value as large.
            np.testing.assert_array_equal(
                answers["p_value"] <= 1.0 - coverage + 1e-6,
                answers["label"] == -1,
            )
    certificate = keras_halo.read_certificate(tmp_path / "guarded.keras")
    assert certificate == rule.certificate()
    assert guarded.compute_output_spec(keras.KerasTensor((None, 4)))[
        "label_set"
    ].shape == (None, 3)


@pytest.mark.slow
def test_sets_on_fitted_gaussians(trained, tmp_path):
    model, x, labels, new = trained
    fitted = keras_halo.fit_class_gaussians(model, x, labels, verbose=0)
    output = fitted.predict(x, verbose=0)
    rule = LabelSetRule(0.9, method="fitted").fit(output, labels)
    expected = rule.predict(fitted.predict(new, verbose=0))
    answers = keras_halo.guard(fitted, rule).predict(new, verbose=0)
    np.testing.assert_array_equal(answers["label_set"], expected.members)


def test_a_stream_is_monitored(rule):
    scores, _ = known_data()
    monitor = rejection.StreamMonitor(rule).fit(scores)
    fresh, fresh_labels = known_data(seed=1)
    status = monitor.update(fresh, labels=fresh_labels)
    assert status.rejected == rule.predict(fresh).rejected.sum()


# Words and refusals ---------------------------------------------------------


def test_summary_counts_what_was_achieved(rule):
    scores, labels = known_data()
    sets = rule.predict(scores)
    summary = rule.summary()
    held = int(sets.contain(labels).sum())
    assert f"the label in the sets of {held} of 400" in summary
    assert f"{int(sets.rejected.sum())} of 400" in summary
    assert f"{sets.sizes.mean():.3g} labels in a set" in summary
    assert "How large the sets are" in rule.limits
    assert ("true class" in rule.guarantee) == rule.class_conditional


def test_labels_of_sets_are_read_in_every_form():
    scores, labels = known_data()
    sets = LabelSetRule(0.9).fit(scores, np.eye(4)[labels]).predict(scores)
    expected = sets.contain(labels)
    for form in (labels[:, None], np.eye(4)[labels], labels.tolist()):
        np.testing.assert_array_equal(sets.contain(form), expected)
    with pytest.raises(ValueError, match=r"\[0, 4\)"):
        sets.contain(labels + 1)
    with pytest.raises(ValueError, match="Received"):
        sets.contain(labels[:9])
    with pytest.raises(ValueError):
        sets.members[0, 0] = True


def test_rows_that_are_not_finite_get_the_empty_set(rule):
    bad = known_data(9)[0].copy()
    bad[3, 1] = np.nan
    with pytest.warns(UserWarning, match="1 of 9 rows"):
        sets = rule.predict(bad)
    assert sets.sizes[3] == 0 and sets.labels[3] == -1
    np.testing.assert_array_equal(to_numpy(rule.to_layer()(bad)), sets.members)
    with pytest.warns(UserWarning, match="9 of 9 rows"):
        assert not rule.predict(np.full_like(bad, np.nan)).members.any()
    assert rule.predict(bad[:0]).members.shape == (0, 4)


def test_too_little_data_is_refused_with_the_number_needed():
    scores, labels = known_data()
    with pytest.raises(ValueError, match="at least 9 calibration samples"):
        LabelSetRule(0.9).fit(scores[:8], labels[:8])
    counts = np.bincount(labels)
    assert counts[3] < 29 < counts[2]
    rule = LabelSetRule(0.9, class_conditional=True, delta=0.05)
    with pytest.raises(ValueError, match="at least 29 .* of every class") as e:
        rule.fit(scores, labels)
    assert f"Received: {counts[3]} of class 3. Collect" in str(e.value)
    with pytest.raises(ValueError, match="not been fitted"):
        rule.predict(scores)
    few = LabelSetRule(0.8, class_conditional=True)
    with pytest.raises(ValueError, match="0 of class 3"):
        few.fit(scores[labels < 3], labels[labels < 3])


def test_what_cannot_be_is_refused():
    scores, labels = known_data()
    with pytest.raises(ValueError, match="Sets of labels need packed scores"):
        LabelSetRule(method=None)
    with pytest.raises(ValueError, match="`fit` needs `labels`"):
        LabelSetRule().fit(scores)
    with pytest.raises(ValueError, match="`class_conditional` must be"):
        LabelSetRule(0.9, 0.1)
    with pytest.raises(ValueError, match="between 0 and 1"):
        LabelSetRule(90)
    with pytest.raises(ValueError, match="Use `rule.thresholds`"):
        _ = RULES["class-conditional"].fit(scores, labels).threshold
    with pytest.raises(ValueError, match="Use `rule.threshold`"):
        _ = LabelSetRule().fit(scores, labels).thresholds
    with pytest.raises(ValueError, match="for the inputs of one"):
        rejection.GroupwiseRule(LabelSetRule())
    with pytest.raises(ValueError, match="needs a `threshold`"):
        LabelSet(None)
    with pytest.raises(ValueError, match="each of the 4 classes"):
        LabelSet([1.0, 2.0])(scores)
