"""A card says what is known of a model, and what nobody has told."""

import json
import re

import keras
import numpy as np
import pytest
from digits import known_and_unknown

import keras_halo
from keras_halo import HALODense, HALOLoss, rejection

pytestmark = pytest.mark.slow

TEXTS = {
    "name": "digits | 0 to 4",
    "intended_use": "Reads digits.\n\nNot for letters.",
    "data": {"training": "500 digits\nof UCI", "calibration": "200 digits"},
    "limits": "Never tried on photographs.",
}


@pytest.fixture(scope="module")
def evaluated():
    """A model, its rule, and its evaluation on known and unknown digits."""
    keras.utils.set_random_seed(0)
    x, y, x_unknown = known_and_unknown()
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1), name="image"),
            keras.layers.Flatten(),
            keras.layers.Dense(32, activation="relu"),
            HALODense(5),
        ]
    )
    model.compile(keras.optimizers.Adam(5e-3), HALOLoss())
    model.fit(x[:500], y[:500], batch_size=64, epochs=8, verbose=0)
    rule = rejection.CoverageRule(0.9)
    rule.fit(model.predict(x[500:700], verbose=0), y[500:700])
    unknown = {"5 to 9": x_unknown, "noise | grey": x_unknown[::-1, ::-1] * 0.5}
    report = keras_halo.evaluate_ood(
        model, (x[700:], y[700:]), unknown, verbose=0
    )
    return model, rule, report, (x[700:], y[700:], x_unknown)


def sections(card):
    parts = re.split(r"^## (.*)$\n", card.to_markdown(), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_a_card_holds_what_was_measured(evaluated, tmp_path):
    model, rule, report, (x, y, x_unknown) = evaluated
    guarded = keras_halo.guard(model, rule)
    card = keras_halo.model_card(guarded, report, **TEXTS)
    card.save(tmp_path / "card.json")
    content = json.loads((tmp_path / "card.json").read_text("utf-8"))
    assert content == card.to_dict() == json.loads(card.to_json())

    certificate = rule.certificate()
    assert content["guarantee"] == {
        "rule": "keras_halo>CoverageRule",
        "arguments": {"coverage": 0.9, "delta": None, "method": "abstain"},
        "in_words": rule.guarantee,
        "threshold": rule.threshold,
        "certificate": certificate["checksum"],
    }
    assert content["calibration"]["samples"] == 200
    assert content["limits"] == {
        "of_the_rule": rule.limits,
        "stated": TEXTS["limits"],
    }
    assert content["metrics"]["evaluation"] == report.to_dict()
    assert content["data"]["described"] == TEXTS["data"]
    assert content["data"]["evaluated"]["known"] == len(x)
    assert content["model"]["parameters"] == model.count_params()
    assert content["model"]["inputs"] == [
        {"name": "image", "shape": [None, 8, 8, 1]}
    ]
    assert content["versions"]["Keras"] == keras.__version__
    assert content["versions"][keras.backend.backend()] is not None

    # The decisions are those of the guarded model.
    found = content["metrics"]["decisions"]
    labels = guarded.predict(x, verbose=0)["label"]
    wrong = (labels != y) & (labels >= 0)
    assert found["known"] == {
        "count": len(x),
        "accepted": int((labels >= 0).sum()),
        "accepted_errors": int(wrong.sum()),
    }
    labels = guarded.predict(x_unknown, verbose=0)["label"]
    assert found["unknown"]["5 to 9"] == {
        "count": len(x_unknown),
        "accepted": int((labels >= 0).sum()),
    }


def test_the_text_says_the_same(evaluated, tmp_path):
    model, rule, report, _ = evaluated
    card = keras_halo.model_card(keras_halo.guard(model, rule), report, **TEXTS)
    card.save(tmp_path / "card.md")
    text = (tmp_path / "card.md").read_text("utf-8")
    assert text == card.to_markdown()
    assert text.startswith("# Model card: digits | 0 to 4\n")
    found = sections(card)
    assert list(found) == [
        "Intended use",
        "Model",
        "Data",
        "Metrics",
        "Guarantee",
        "Calibration data",
        "Limits",
        "Versions",
    ]
    assert "Not for letters." in found["Intended use"]
    assert "- training: 500 digits of UCI\n" in found["Data"]
    assert report.to_markdown() in found["Metrics"]
    decisions = card.to_dict()["metrics"]["decisions"]
    for row in ("known", r"noise \| grey"):
        (line,) = re.findall(
            rf"^\| {re.escape(row)} \| (\d+) of (\d+) \(",
            found["Metrics"],
            re.M,
        )
        one = decisions["unknown"].get(row.replace("\\", ""))
        one = one or decisions["known"]
        assert line == (str(one["accepted"]), str(one["count"]))
    assert rule.guarantee in found["Guarantee"]
    assert rule.certificate()["checksum"] in found["Guarantee"]
    assert "- samples: 200\n" in found["Calibration data"]
    assert rule.limits in found["Limits"]
    assert "photographs" in found["Limits"]
    assert f"- Keras: {keras.__version__}\n" in found["Versions"]
    assert "not given" not in text
    # Nothing in it depends on when it is written.
    again = keras_halo.model_card(
        keras_halo.guard(model, rule), report, **TEXTS
    )
    assert again.to_markdown() == text and again == card


def test_what_was_not_given_is_said(evaluated, tmp_path):
    model, rule, report, _ = evaluated
    guarded = keras_halo.guard(model, rule)
    guarded.save(tmp_path / "guarded.keras")
    of_file = keras_halo.model_card(tmp_path / "guarded.keras")
    assert of_file == keras_halo.model_card(rule)
    found = sections(of_file)
    assert found["Intended use"].strip() == "not given"
    assert found["Metrics"].strip() == "not given"
    assert "- described: not given\n- evaluated on: not given" in found["Data"]
    assert "- parameters: not given" in found["Model"]
    assert "- stated by the provider: not given" in found["Limits"]
    content = json.loads(of_file.to_json())
    for part in ("name", "intended_use", "metrics"):
        assert content[part] is None
    assert of_file.to_markdown().startswith("# Model card: not given\n")

    # Another score than the rule's says nothing of its decisions.
    other = rejection.CoverageRule(0.9, "gap").fit(
        model.predict(np.zeros((20, 8, 8, 1)), verbose=0)
    )
    card = keras_halo.model_card(other, report)
    assert card.to_dict()["metrics"]["decisions"] is None
    assert "not given, since" in sections(card)["Metrics"]
    # Nor are errors known where no labels were.
    assert "- wrong: not given" in sections(card)["Calibration data"]


def test_a_copy_is_handed_out(evaluated):
    _, rule, report, _ = evaluated
    content = keras_halo.model_card(rule, report).to_dict()
    content["metrics"]["evaluation"]["known"]["aurc"] = "changed"
    again = keras_halo.model_card(rule, report).to_dict()
    assert again["metrics"]["evaluation"] == report.to_dict()


def test_what_is_no_use_is_refused(evaluated, tmp_path):
    model, rule, report, _ = evaluated
    with pytest.raises(ValueError, match="keras_halo.guard"):
        keras_halo.model_card(model)
    with pytest.raises(ValueError, match="not been fitted"):
        keras_halo.model_card(rejection.CoverageRule())
    with pytest.raises(FileNotFoundError):
        keras_halo.model_card(tmp_path / "none.keras")
    scores = keras.Sequential([keras.Input((4,)), HALODense(3)]).predict(
        np.zeros((40, 4)), verbose=0
    )
    other = rejection.CoverageRule(0.9).fit(scores)
    with pytest.raises(ValueError, match="expected 3 classes. Received: 5"):
        keras_halo.model_card(other, report)
    card = keras_halo.model_card(rule)
    with pytest.raises(ValueError, match=r"\.md or \.json"):
        card.save(tmp_path / "card.txt")
    with pytest.raises(ValueError, match="path of a file"):
        card.save(3)
    assert list(tmp_path.iterdir()) == []


def test_a_rule_that_judges_whole_batches_has_no_decisions_in_a_card(evaluated):
    model, _, report, (x, _, _) = evaluated
    rule = rejection.ConformalRule(0.05, fdr=True)
    rule.fit(model.predict(x, verbose=0))
    card = keras_halo.model_card(rule, report).to_dict()
    assert card["metrics"]["decisions"] is None
