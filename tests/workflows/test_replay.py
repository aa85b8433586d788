"""Decisions on record come out the same again, or it is said which do not."""

import json

import keras
import numpy as np
import pytest
from digits import known_and_unknown

import keras_halo
from keras_halo import HALODense, HALOLoss, rejection
from keras_halo.rejection import DecisionLog
from keras_halo.workflows.command_line import main

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A guarded model of the digits 0 to 4, its log, and the inputs."""
    folder = tmp_path_factory.mktemp("files")
    keras.utils.set_random_seed(0)
    x, y, x_unknown = known_and_unknown()
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Flatten(),
            keras.layers.Dense(32, activation="relu"),
            HALODense(5),
        ]
    )
    model.compile(keras.optimizers.Adam(5e-3), HALOLoss())
    model.fit(x[:500], y[:500], batch_size=64, epochs=8, verbose=0)
    scores = model.predict(x[500:700], verbose=0)
    rule = rejection.CoverageRule(0.9).fit(scores, y[500:700])
    keras_halo.guard(model, rule).save(folder / "guarded.keras")
    other = rejection.CoverageRule(0.8).fit(scores, y[500:700])
    keras_halo.guard(model, other).save(folder / "other.keras")
    model.save(folder / "model.keras")

    new = np.concatenate([x[700:800], x_unknown[:100]])
    names = [f"digit {row}" for row in range(len(new))]
    np.savez(folder / "data.npz", x=new, name=names)
    guarded = keras.models.load_model(folder / "guarded.keras")
    rows = np.random.default_rng(0).permutation(len(new))
    with DecisionLog(folder / "log.jsonl", rule, max_bytes=20_000) as log:
        for part in np.split(rows, 4):
            log.append(guarded.predict(new[part], verbose=0), part)
    answers = guarded.predict(new[rows], verbose=0)
    with DecisionLog(folder / "named.jsonl", rule) as log:
        log.append(answers, [names[row] for row in rows])
    with DecisionLog(folder / "nameless.jsonl", rule) as log:
        log.append(answers)
    DecisionLog(folder / "empty.jsonl", rule).close()
    lines = (folder / "named.jsonl").read_bytes().splitlines(keepends=True)
    lines[6] = lines[6].replace(b'"p_value":0', b'"p_value":1')
    (folder / "damaged.jsonl").write_bytes(b"".join(lines))
    return folder


def data(files):
    with np.load(files / "data.npz") as arrays:
        return arrays["x"]


def guarded_model(files):
    return keras.models.load_model(files / "guarded.keras")


def run(files, log, *arguments, model="guarded.keras", inputs="data.npz"):
    paths = [str(files / name) for name in (log, model, inputs)]
    return main(["replay", *paths, *arguments])


def test_the_same_model_decides_the_same(files, capsys):
    assert len(list(files.glob("log.0*.jsonl"))) > 1
    assert run(files, "log.jsonl") == 0
    assert "200 of 200 decisions come out the same" in capsys.readouterr().out
    arguments = ["--references", "name", "--batch-size", "7"]
    assert run(files, "named.jsonl", *arguments) == 0
    report = keras_halo.replay(
        files / "log.jsonl", guarded_model(files), data(files)
    )
    assert report.same and report.decisions == 200
    assert report.differences == () and report.largest_distance == 0.0
    # Scores in other batches differ by rounding at most.
    assert report.largest_score_change < 1e-4
    assert json.loads(json.dumps(report.to_dict()))["decisions"] == 200


def test_other_inputs_are_found_by_line(files, tmp_path, capsys):
    x = data(files)
    records = list(rejection.read_decisions(files / "log.jsonl"))
    accepted = [r for r in records if r.accepted][:3]
    rejected = next(r for r in records if not r.accepted)
    for record in accepted:
        x[record.reference] = x[rejected.reference]
    np.savez(tmp_path / "data.npz", x=x)
    assert run(files, "log.jsonl", inputs=tmp_path / "data.npz") == 1
    text = capsys.readouterr().out
    assert "197 of 200 decisions" in text
    for record in accepted:
        assert f"line {record.line} of {record.file}" in text
        assert f"label -1 instead of {record.label}" in text

    report = keras_halo.replay(
        files / "log.jsonl", guarded_model(files), x, max_differences=2
    )
    assert (report.different, len(report.differences)) == (3, 2)
    assert "and 1 more" in str(report)
    distances = [report.threshold - record.score for record in accepted]
    assert report.largest_distance == pytest.approx(max(distances))
    change = max(rejected.score - record.score for record in accepted)
    assert report.largest_score_change == pytest.approx(change, rel=1e-4)


def test_a_model_that_moved_changes_what_is_near_the_threshold(files):
    """Every decision is compared with one that is made by hand."""
    guarded, x = guarded_model(files), data(files)
    (dense,) = (v for v in guarded.layers if isinstance(v, keras.layers.Dense))
    kernel = dense.get_weights()[0]
    noise = np.random.default_rng(0).normal(0.0, 0.03, size=kernel.shape)
    dense.set_weights([kernel + noise, *dense.get_weights()[1:]])
    report = keras_halo.replay(
        files / "log.jsonl", guarded, x, max_differences=200
    )
    records = list(rejection.read_decisions(files / "log.jsonl"))
    answers = guarded.predict(x, verbose=0)
    labels = answers["label"][[r.reference for r in records]]
    differ = [
        r for r, label in zip(records, labels, strict=True) if r.label != label
    ]
    assert report.different == len(differ) > 0
    assert [d.number for d in report.differences] == [r.number for r in differ]
    sides = [d for d in report.differences if -1 in (d.label, d.logged_label)]
    assert report.largest_distance == max(d.distance for d in sides)
    assert report.largest_distance < report.largest_score_change


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"log": "log.jsonl", "model": "other.keras"}, "another rule"),
        ({"log": "log.jsonl", "model": "model.keras"}, "keras_halo.guard"),
        ({"log": "log.jsonl", "inputs": "few.npz"}, "not in the data"),
        ({"log": "named.jsonl"}, "'digit "),
        ({"log": "nameless.jsonl"}, "does not say which input"),
        ({"log": "damaged.jsonl"}, "Line 7 of"),
        ({"log": "empty.jsonl"}, "holds none"),
        ({"log": "none.jsonl"}, "no decision log"),
        ({"log": "log.jsonl", "inputs": "none.npz"}, "no file"),
        ({"log": "log.jsonl", "model": "none.keras"}, "no model"),
    ],
    ids=lambda value: value if isinstance(value, str) else value["log"],
)
def test_what_is_wrong_is_said_in_one_line(arguments, message, files, capsys):
    np.savez(files / "few.npz", x=data(files)[:20])
    assert run(files, **arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("keras_halo: error: ")
    assert message in lines[0]


def test_half_a_line_at_the_end_is_no_decision(files, tmp_path):
    content = (files / "named.jsonl").read_bytes()
    path = tmp_path / "torn.jsonl"
    path.write_bytes(content[:-9])
    names = [f"digit {row}" for row in range(200)]
    with pytest.warns(UserWarning, match="Line 200 .* is not whole"):
        report = keras_halo.replay(
            path, guarded_model(files), data(files), names
        )
    assert report.same and report.decisions == 199
    for bad in (names[:-1], [*names[:-1], names[0]], [0.5] * 200, "digits"):
        with pytest.raises(ValueError, match="`references` must"):
            keras_halo.replay(path, guarded_model(files), data(files), bad)


def test_positions_are_replayed(tmp_path):
    model = keras.Sequential([keras.Input((6, 4)), HALODense(3)])
    x = np.random.default_rng(0).normal(size=(32, 6, 4)).astype("float32")
    rule = rejection.CoverageRule(0.8).fit(model.predict(x, verbose=0))
    guarded = keras_halo.guard(model, rule)
    with DecisionLog(tmp_path / "log.jsonl", rule) as log:
        log.append(guarded.predict(x[:8], verbose=0), range(8))
    report = keras_halo.replay(tmp_path / "log.jsonl", guarded, x)
    assert report.same and report.decisions == 48
    # Read backwards, the same inputs get other answers.
    report = keras_halo.replay(tmp_path / "log.jsonl", guarded, x[:, ::-1])
    assert not report.same
    short = keras.Sequential([keras.Input((None, 4)), *model.layers])
    with pytest.raises(ValueError, match="position"):
        keras_halo.replay(
            tmp_path / "log.jsonl", keras_halo.guard(short, rule), x[:, :2]
        )
