"""Decisions on record: whole lines only, in order, and of one rule."""

import dataclasses
import datetime
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import tracemalloc

import keras
import numpy as np
import pytest

import keras_halo
from keras_halo import HALODense, rejection
from keras_halo.rejection import DecisionLog, read_decisions

SCRIPT = pathlib.Path(__file__).parents[1] / "scripts" / "logging_process.py"


@pytest.fixture
def rule():
    return rejection.CoverageRule(0.9, method=None).fit(np.arange(100.0))


@pytest.fixture(scope="module")
def guarded():
    """A guarded model, its rule, and inputs of which it rejects some."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), HALODense(3)])
    x = np.random.default_rng(0).normal(size=(256, 4)).astype("float32")
    rule = rejection.CoverageRule(0.8).fit(model.predict(x, verbose=0))
    return keras_halo.guard(model, rule), rule, x[:64]


def numbers(path, **options):
    return [record.number for record in read_decisions(path, **options)]


def test_a_record_holds_what_the_guarded_model_said(guarded, tmp_path):
    model, rule, x = guarded
    path = tmp_path / "decisions.jsonl"
    answers = model.predict(x, verbose=0)
    before = datetime.datetime.now(datetime.UTC)
    with DecisionLog(path, rule) as log:
        assert log.append(answers, references=np.arange(64)) == range(1, 65)
    after = datetime.datetime.now(datetime.UTC)
    records = list(read_decisions(path))
    assert [r.label for r in records] == answers["label"].tolist()
    assert [r.score for r in records] == answers["score"].tolist()
    assert [r.p_value for r in records] == answers["p_value"].tolist()
    assert [r.reference for r in records] == list(range(64))
    assert {r.accepted for r in records} == {True, False}
    assert all(r.accepted == (r.label >= 0) for r in records)
    assert {r.rule for r in records} == {rule.certificate()["checksum"]}
    assert {r.file for r in records} == {str(path)}
    assert [r.line for r in records] == [r.number for r in records]
    for record in records:
        time = datetime.datetime.fromisoformat(record.time)
        assert before <= time <= after
        assert time.utcoffset() == datetime.timedelta(0)
    # What any reader of JSON Lines sees.
    lines = path.read_text("ascii").splitlines()
    plain = [json.loads(line) for line in lines]
    assert [line["label"] for line in plain] == answers["label"].tolist()

    # The certificate of the file will do, and the log goes on.
    model.save(tmp_path / "guarded.keras")
    certificate = keras_halo.read_certificate(tmp_path / "guarded.keras")
    with DecisionLog(path, certificate) as log:
        assert log.append(answers) == range(65, 129)
    assert numbers(path) == list(range(1, 129))


def test_decisions_of_a_rule_and_positions_are_logged(guarded, tmp_path):
    model, rule, x = guarded
    inner = model.layers[-2].output
    scores = keras.Model(model.inputs, inner).predict(x, verbose=0)
    decisions = rule.predict(scores.reshape(8, 8, -1))
    with DecisionLog(tmp_path / "log.jsonl", rule) as log:
        log.append(decisions, references=[f"text {i}" for i in range(8)])
    records = list(read_decisions(tmp_path / "log.jsonl"))
    assert [r.label for r in records] == decisions.labels.ravel().tolist()
    assert [r.score for r in records] == decisions.scores.ravel().tolist()
    assert [r.position for r in records[:9]] == [
        *((i,) for i in range(8)),
        (0,),
    ]
    assert records[63].reference == "text 7"


@pytest.mark.any_backend
def test_scores_that_are_not_finite_come_back(rule, tmp_path):
    path = tmp_path / "log.jsonl"
    with DecisionLog(path, rule) as log:
        with pytest.warns(UserWarning, match="NaN"):
            decisions = rule.predict([np.nan, np.inf, -1.5, 1e300])
        log.append(decisions, references=["ä \n\U0001f600", "", 2**53, -1])
        # As an exported model may answer.
        log.append({"label": [-1, 2], "score": [np.inf, -np.inf]})
    *records, high, low = read_decisions(path)
    assert (high.score, high.label) == (np.inf, -1)
    assert (low.score, low.label) == (-np.inf, 2)
    assert np.isnan(records[0].score)
    assert [r.score for r in records[2:]] == [-1.5, 1e300]
    assert [r.accepted for r in records] == [False, False, True, False]
    assert [r.label for r in records] == [None] * 4
    assert [r.reference for r in records] == ["ä \n\U0001f600", "", 2**53, -1]
    assert path.read_bytes().count(b"\n") == 6


@pytest.mark.any_backend
def test_full_files_are_kept_in_order(rule, tmp_path):
    path = tmp_path / "log.jsonl"
    scores = np.random.default_rng(0).normal(50.0, 40.0, size=60)
    for part in np.split(scores, 3):
        with DecisionLog(path, rule, max_bytes=1000) as log:
            log.append(rule.predict(part[:13]))
            log.append(rule.predict(part[13:]))
    files = sorted(tmp_path.glob("log.0*.jsonl"))
    assert len(files) > 10 and files[0].name == "log.000000001.jsonl"
    assert all(f.stat().st_size <= 1000 for f in [path, *files])
    records = list(read_decisions(path))
    assert [r.score for r in records] == scores.tolist()
    assert [r.number for r in records] == list(range(1, 61))
    assert {r.file for r in records} == {str(f) for f in [path, *files]}

    # The oldest may be moved away, others may not.
    files[0].unlink()
    assert numbers(path)[-1] == 60 and numbers(path)[0] > 1
    files[4].unlink()
    with pytest.raises(ValueError, match="missing before line 1 of .*expected"):
        numbers(path)
    with pytest.warns(UserWarning, match="Decisions are missing"):
        assert len(numbers(path, skip_damaged=True)) == len(records) - 6
    # Where the newest is missing too, the number is known from the last.
    last = numbers(files[-1])[-1] if files[-1].exists() else 0
    path.unlink()
    with DecisionLog(path, rule) as log:
        assert log.append(rule.predict([1.0]))[0] == last + 1


@pytest.mark.any_backend
@pytest.mark.skipif(os.name == "nt", reason="other permissions")
def test_the_next_file_of_a_log_has_the_permissions_of_the_last(rule, tmp_path):
    path = tmp_path / "log.jsonl"
    umask = os.umask(0o022)
    try:
        with DecisionLog(path, rule, max_bytes=1000) as log:
            path.chmod(0o600)
            for _ in range(5):
                log.append(rule.predict(np.zeros(10)))
    finally:
        os.umask(umask)
    files = list(tmp_path.glob("*.jsonl"))
    assert len(files) > 2
    assert {f.stat().st_mode & 0o777 for f in files} == {0o600}


@pytest.mark.any_backend
def test_a_log_is_read_while_it_is_written(rule, tmp_path):
    path = tmp_path / "log.jsonl"
    with DecisionLog(path, rule, max_bytes=1000) as log:
        log.append(rule.predict(np.zeros(10)))
        reader = read_decisions(path)
        seen = [next(reader).number]
        for _ in range(5):
            log.append(rule.predict(np.zeros(10)))
        seen += [record.number for record in reader]
    assert seen == list(range(1, len(seen) + 1)) and len(seen) >= 10


@pytest.mark.any_backend
def test_threads_share_a_log(rule, tmp_path):
    path = tmp_path / "log.jsonl"
    found = {}
    with DecisionLog(path, rule, max_bytes=5000) as log:

        def write(name):
            found[name] = [
                log.append(rule.predict([float(name), 250.0]), [name, name])
                for _ in range(25)
            ]

        threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    records = list(read_decisions(path))
    assert [r.number for r in records] == list(range(1, 401))
    times = [r.time for r in records]
    assert times == sorted(times)
    for name, ranges in found.items():
        for pair in ranges:
            assert [records[n - 1].reference for n in pair] == [name, name]


@pytest.mark.any_backend
@pytest.mark.skipif(sys.platform == "win32", reason="there are no such limits")
def test_a_process_that_was_killed_leaves_whole_lines(rule, tmp_path):
    path = tmp_path / "log.jsonl"
    rule.save(tmp_path / "rule.json")
    command = [sys.executable, SCRIPT, path, tmp_path / "rule.json", "20000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGXFSZ, done.stderr
    refused, *acknowledged = [int(line) for line in done.stdout.split()]
    # What a forked process tried: to write to the log, and to open it.
    assert refused == 2
    torn = path.read_bytes()
    assert len(torn) == 20000 and not torn.endswith(b"\n")
    with pytest.warns(UserWarning, match="is not whole"):
        found = numbers(path)
    assert len(acknowledged) > 10
    # The call that was killed may have written one of its two lines.
    assert found == list(range(1, len(found) + 1))
    assert 0 <= len(found) - acknowledged[-1] <= 1

    with pytest.warns(UserWarning, match="cut off"):
        log = DecisionLog(path, rule)
    with log:
        assert log.append(rule.predict([7.0]))[0] == len(found) + 1
    records = list(read_decisions(path))
    assert len(records) == len(found) + 1 and records[-1].score == 7.0
    assert torn.startswith(path.read_bytes()[: torn.rindex(b"\n") + 1])


@pytest.mark.any_backend
@pytest.mark.parametrize("cut", [1, 5, 100, 200])
def test_half_a_line_is_never_continued(cut, rule, tmp_path):
    path = tmp_path / "log.jsonl"
    with DecisionLog(path, rule) as log:
        log.append(rule.predict([1.0, 2.0]))
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with pytest.warns(UserWarning, match="cut off"):
        DecisionLog(path, rule).close()
    assert path.read_bytes() == whole[: whole.index(b"\n") + 1]
    # A failed machine may leave zeros, and a log of one line half of it.
    for torn in (b"\0" * 5000, whole[:3]):
        path.write_bytes(torn)
        with pytest.warns(UserWarning, match="cut off"):
            DecisionLog(path, rule).close()
        assert path.read_bytes() == b"" and numbers(path) == []


@pytest.mark.any_backend
@pytest.mark.skipif(sys.platform == "win32", reason="there are no such limits")
def test_a_full_disk_leaves_the_log_usable(rule, tmp_path):
    """The system takes some bytes, and refuses the rest."""
    import resource

    path = tmp_path / "log.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with DecisionLog(path, rule) as log:
        log.append(rule.predict([1.0]))
        whole = path.read_bytes()
        decisions = rule.predict([2.0, 3.0])
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 400, limits[1]))
        try:
            with pytest.raises(OSError):
                log.append(decisions)
            after = path.read_bytes()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert after == whole
        assert log.append(rule.predict([4.0])) == range(2, 3)
    assert [r.score for r in read_decisions(path)] == [1.0, 4.0]


@pytest.mark.any_backend
def test_a_log_is_read_in_constant_memory(rule, tmp_path):
    path = tmp_path / "log.jsonl"
    with DecisionLog(path, rule, max_bytes=10**6) as log:
        log.append(rule.predict(np.zeros(8000)), range(8000))
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) > 2 * 10**6
    tracemalloc.start()
    try:
        count = sum(1 for _ in read_decisions(path))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 8000 and peak < 500_000


def test_another_rule_is_refused(rule, guarded, tmp_path):
    path = tmp_path / "log.jsonl"
    with DecisionLog(path, rule, max_bytes=300) as log:
        log.append(rule.predict([1.0, 2.0]))
    content = path.read_bytes()
    other = rejection.CoverageRule(0.8, method=None).fit(np.arange(100.0))
    with pytest.raises(ValueError, match="log of another rule"):
        DecisionLog(path, other)
    # Nor does it become a log of another by the loss of its last file.
    path.unlink()
    with pytest.raises(ValueError, match="log of another rule"):
        DecisionLog(path, other)
    assert not path.exists()
    path.write_bytes(content)
    edited = {**rule.certificate(), "threshold": 1e9}
    with pytest.raises(ValueError, match="damaged or edited"):
        DecisionLog(path, edited)

    # Answers of another rule, as far as they show it.
    model, own, x = guarded
    answers = model.predict(x, verbose=0)
    with DecisionLog(tmp_path / "other.jsonl", own) as log:
        wrong = {**answers, "score": answers["score"] + 100.0}
        with pytest.raises(ValueError, match="not those of this rule"):
            log.append(wrong)
        wrong = {**answers, "label": np.where(answers["label"] < 0, 0, -1)}
        with pytest.raises(ValueError, match="not those of this rule"):
            log.append(wrong)
        # Rounding by another engine is no other rule.
        log.append({**answers, "score": answers["score"] * (1 + 1e-6)})


@pytest.mark.any_backend
def test_damage_is_named_by_its_line(rule, tmp_path):
    path = tmp_path / "log.jsonl"
    with DecisionLog(path, rule) as log:
        log.append(rule.predict(np.arange(5.0)))
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    edited = lines[2].replace(b'"score":2.0', b'"score":3.0')
    assert edited != lines[2]
    flipped = bytes([lines[2][40] ^ 1])
    for bad, message in (
        (edited, "does not match its checksum"),
        (lines[2][:40] + flipped + lines[2][41:], "line 3 of|Line 3 of"),
        (b"\n", "no line of a decision log"),
        (b"x" * 200_000 + b"\n", "no line of a decision log"),
        (b'{"version":' + b"[" * 9000 + b"\n", "no line of a decision log"),
    ):
        path.write_bytes(b"".join([*lines[:2], bad, *lines[3:]]))
        with pytest.raises(ValueError, match=message) as caught:
            numbers(path)
        assert "Line 3 of" in str(caught.value)
        with pytest.warns(UserWarning, match="Line 3 of|missing") as warned:
            assert numbers(path, skip_damaged=True) == [1, 2, 4, 5]
        assert len(warned) == 2
    path.write_bytes(b"".join([*lines[:2], *lines[3:]]))
    with pytest.raises(ValueError, match="missing before line 3"):
        numbers(path)
    path.write_bytes(b"".join([*lines[:4], lines[4][:-20], b"\n"]))
    with pytest.raises(ValueError, match="last line cannot be read"):
        DecisionLog(path, rule)
    path.write_bytes(b"".join([lines[0][:-9], b"\n", *lines[1:]]))
    with pytest.raises(ValueError, match="first line cannot be read"):
        DecisionLog(path, rule)
    # A copy in the place of a full file is not overwritten.
    path.write_bytes(whole)
    copy = tmp_path / "log.000000001.jsonl"
    copy.write_bytes(whole)
    with DecisionLog(path, rule, max_bytes=10) as log:
        with pytest.raises(FileExistsError, match="exists already"):
            log.append(rule.predict([1.0]))
    assert copy.read_bytes() == path.read_bytes() == whole


@pytest.mark.any_backend
def test_a_file_that_is_no_log_stays_as_it_is(rule, tmp_path):
    for content in (b"notes of a user", b"a,b\n1,2\n", b'{"format": 1}'):
        path = tmp_path / "notes.txt"
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is no decision log"):
            DecisionLog(path, rule)
        assert path.read_bytes() == content
    with pytest.raises(FileNotFoundError, match="does not exist"):
        DecisionLog(tmp_path / "no folder" / "log.jsonl", rule)
    with pytest.raises(ValueError, match="path of a file"):
        DecisionLog(tmp_path, rule)
    with pytest.raises(FileNotFoundError, match="no decision log"):
        read_decisions(tmp_path / "log.jsonl")
    with pytest.raises(ValueError, match="True or False"):
        read_decisions(path, skip_damaged="yes")


@pytest.mark.any_backend
def test_one_holder_at_a_time(rule, tmp_path):
    path = tmp_path / "log.jsonl"
    with DecisionLog(path, rule) as log:
        with pytest.raises(ValueError, match="in use"):
            DecisionLog(path, rule)
        log.append(rule.predict([1.0]))
    with pytest.raises(ValueError, match="closed"):
        log.append(rule.predict([1.0]))
    log.close()
    with DecisionLog(path, rule, sync=True) as log:
        assert log.append(rule.predict([1.0])) == range(2, 3)
    # A link leads to the same log, and to its full files.
    link = tmp_path / "link"
    link.symlink_to(path)
    with DecisionLog(link, rule, max_bytes=10) as log:
        log.append(rule.predict([1.0]))
        with pytest.raises(ValueError, match="in use"):
            DecisionLog(path, rule)
    assert numbers(link) == numbers(path) == [1, 2, 3]


def test_what_is_refused_is_not_written(rule, guarded, tmp_path):
    model, own, x = guarded
    answers = model.predict(x[:4], verbose=0)
    path = tmp_path / "log.jsonl"
    with DecisionLog(path, own) as log:
        for bad, message in (
            ({**answers, "label": answers["score"]}, "integers"),
            ({**answers, "label": answers["label"] - 5}, "-1 for rejected"),
            ({**answers, "score": answers["score"][:2]}, "one label, score"),
            ({**answers, "p_value": answers["p_value"] + 1}, r"\[0, 1\]"),
            ({"label": answers["label"]}, "a dictionary of"),
            (answers["label"], "must be what"),
        ):
            with pytest.raises(ValueError, match=message):
                log.append(bad)
        for bad in (range(3), "abcd", 7, [0.5] * 4, ["x" * 1001] * 4):
            with pytest.raises(ValueError, match="`references` must be"):
                log.append(answers, bad)
        assert path.read_bytes() == b""
        nothing = {name: value[:0] for name, value in answers.items()}
        assert log.append(nothing) == range(1, 1)
        assert log.append(answers, (str(i) for i in range(4))) == range(1, 5)
    unfitted = rejection.CoverageRule(method=None)
    with pytest.raises(ValueError, match="not been fitted"):
        DecisionLog(path, unfitted)
    with pytest.raises(ValueError, match="read_certificate"):
        DecisionLog(path, {"threshold": 1.0})


def test_a_rule_that_judges_whole_batches_is_logged(tmp_path):
    pytest.importorskip("scipy", reason="needs SciPy")
    rng = np.random.default_rng(0)
    rule = rejection.ConformalRule(0.05, method=None, fdr=True)
    rule.fit(rng.normal(size=1000))
    decisions = rule.predict(rng.normal(size=200))
    # Others in the batch let it pass.
    assert decisions.accepted[decisions.scores > rule.threshold].any()
    path = tmp_path / "decisions.jsonl"
    with DecisionLog(path, rule) as log:
        log.append(decisions)
    accepted = [record.accepted for record in read_decisions(path)]
    assert accepted == decisions.accepted.tolist()
    # What no batch can explain is refused still.
    accepted = decisions.accepted.copy()
    accepted[np.argmin(decisions.scores)] = False
    wrong = dataclasses.replace(decisions, accepted=accepted)
    with DecisionLog(path, rule) as log:
        with pytest.raises(ValueError, match="are not those of this rule"):
            log.append(wrong)
