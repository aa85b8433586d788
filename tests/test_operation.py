"""Every rule in operation: guarded, logged, replayed, monitored, on a card."""

import keras
import numpy as np
import pytest

import keras_halo
from keras_halo import HALODense, HALOLoss, rejection
from keras_halo.rejection import DecisionLog, StreamMonitor

pytestmark = pytest.mark.slow

RULES = {
    "coverage": rejection.CoverageRule(0.9),
    "joint": rejection.JointRule(risk=0.04, coverage=0.5),
    "by class": rejection.GroupwiseRule(rejection.CoverageRule(0.9)),
    "sets": rejection.LabelSetRule(0.9),
    "sets by class": rejection.LabelSetRule(0.9, class_conditional=True),
}


@pytest.fixture(scope="module")
def trained():
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    y = np.arange(1200) % 3
    x = rng.normal(size=(1200, 6)).astype("float32")
    x[np.arange(1200), y] += 3.0
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(16, activation="relu"),
            HALODense(3),
        ]
    )
    model.compile(keras.optimizers.Adam(1e-2), HALOLoss())
    model.fit(x[:600], y[:600], epochs=8, verbose=0)
    return model, x[600:], y[600:]


@pytest.mark.parametrize("name", RULES)
def test_every_rule_in_operation(name, trained, tmp_path):
    model, x, y = trained
    scores = model.predict(x, verbose=0)
    rule = RULES[name].fit(scores[:400], y[:400])
    guarded = keras_halo.guard(model, rule)
    new = np.concatenate([x[400:], -4.0 * x[400:]])
    answers = guarded.predict(new, verbose=0)
    rejected = answers["label"] < 0
    assert 0 < rejected.sum() < len(new)

    path = tmp_path / "log.jsonl"
    with DecisionLog(path, rule) as log:
        log.append(answers, references=range(len(new)))
    report = keras_halo.replay(path, guarded, new)
    assert report.same and report.decisions == len(new)
    assert "come out the same" in str(report)
    # Other inputs: what differs is named, with a distance that makes sense.
    report = keras_halo.replay(path, guarded, new[::-1])
    assert not report.same
    assert 0.0 < report.largest_distance < np.inf

    card = keras_halo.model_card(
        guarded,
        keras_halo.evaluate_ood(model, (x, y), {"far": new[200:]}, verbose=0),
    )
    assert rule.guarantee in card.to_markdown()
    assert card.to_dict()["guarantee"]["certificate"] in card.to_json()


@pytest.mark.parametrize("name", ["coverage", "by class"])
def test_a_monitor_takes_the_answers_of_a_guarded_model(name, trained):
    model, x, y = trained
    scores = model.predict(x, verbose=0)
    rule = RULES[name].fit(scores[:400], y[:400])
    guarded = keras_halo.guard(model, rule)
    by_scores, by_answers = (
        StreamMonitor(rule).fit(scores[:400]) for _ in range(2)
    )
    answers = guarded.predict(x[400:], verbose=0)
    expected = by_scores.update(scores[400:], labels=y[400:])
    found = by_answers.update(answers, labels=y[400:])
    assert (found.inputs, found.rejected) == (
        expected.inputs,
        expected.rejected,
    )
    assert found.labelled == expected.labelled > 0
    assert found.risk == expected.risk
    assert found.evidence == pytest.approx(expected.evidence, abs=1e-3)

    state = by_answers.status
    wrong = {**answers, "score": answers["score"] + 100.0}
    for given, message in (
        (wrong, "not those of this rule"),
        ({**answers, "label": answers["label"][:3]}, "one label, score"),
    ):
        with pytest.raises(ValueError, match=message):
            by_answers.update(given)
        assert by_answers.status == state
