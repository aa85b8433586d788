"""How far an evaluation has come: silence, lines, and bars on terminals."""

import contextlib
import os
import re

import keras
import pytest

from keras_halo.utils.progress import Progress

pytestmark = pytest.mark.any_backend

CONTROL = set("\b\r\x1b")


def report(verbose, num_batches=2):
    """Two sets of two batches."""
    progress = Progress(verbose, num_sets=2)
    for name in ("known", "noise"):
        progress.start(name, num_batches)
        for _ in range(2):
            progress.step()
        progress.finish(count=12345)


def on_a_terminal(function):
    """What a function prints to a terminal, without what ends its lines."""
    pty = pytest.importorskip("pty", reason="needs a system with terminals")
    reading, writing = pty.openpty()
    with open(reading, "rb", buffering=0) as screen:
        with open(writing, "w") as terminal:
            with contextlib.redirect_stdout(terminal):
                function()
        shown = b""
        # Linux says with an error that nobody writes any more.
        with contextlib.suppress(OSError):
            while part := screen.read(4096):
                shown += part
    return shown.decode().replace("\r\n", "\n")


def test_zero_is_silence(capsys):
    report(0)
    assert capsys.readouterr().out == ""
    assert on_a_terminal(lambda: (report(0), print("end"))) == "end\n"


@pytest.mark.parametrize("verbose", [1, 2, "auto", True])
def test_a_log_gets_one_line_for_each_set(verbose, capsys):
    report(verbose)
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert len(lines) == 2
    for index, (line, name) in enumerate(
        zip(lines, ("known", "noise"), strict=True), 1
    ):
        expected = rf"{index}/2 {name}: 12,345 samples - \d+s"
        assert re.fullmatch(expected, line)
    assert CONTROL.isdisjoint(out) and out.endswith("\n")


@pytest.mark.parametrize("verbose", [1, "auto"])
@pytest.mark.parametrize("num_batches", [2, None])
def test_a_terminal_gets_a_bar_for_each_set(verbose, num_batches):
    out = on_a_terminal(lambda: report(verbose, num_batches))
    assert "1/2 known\n" in out and "\n2/2 noise\n" in out
    assert "samples" not in out
    # Each bar is drawn over itself, and its line ends.
    bar = "2/2" if num_batches else "/Unknown"
    for part in re.split(r"[12]/2 (?:known|noise)\n", out)[1:]:
        assert bar in part and "\r" in part and part.endswith("\n")
        assert part.count("\n") == 1


def test_a_terminal_that_asks_for_lines_gets_lines():
    out = on_a_terminal(lambda: report(2))
    assert len(out.splitlines()) == 2 and "\b" not in out


def test_the_log_of_keras_gets_what_is_not_printed(caplog, capsys):
    keras.config.disable_interactive_logging()
    try:
        with caplog.at_level("INFO", logger="absl"):
            report(2)
    finally:
        keras.config.enable_interactive_logging()
    assert capsys.readouterr().out == ""
    assert "1/2 known: 12,345 samples" in caplog.text


def test_an_output_that_is_no_terminal_by_itself_is_none(tmp_path):
    # Such as what a notebook puts in its place.
    class Output:
        def __init__(self):
            self.text = ""

        def write(self, text):
            self.text += text

        def flush(self):
            pass

    output = Output()
    with contextlib.redirect_stdout(output):
        report(1)
    assert len(output.text.splitlines()) == 2
    with open(tmp_path / "log", "w") as log, contextlib.redirect_stdout(log):
        report("auto")
    assert len((tmp_path / "log").read_text().splitlines()) == 2
    assert os.path.getsize(tmp_path / "log") < 100


@pytest.mark.parametrize("verbose", [3, -1, "loud", None, 0.5, [1]])
def test_what_is_no_verbosity_is_refused(verbose):
    with pytest.raises(ValueError, match="`verbose` must be 0, 1, 2 or 'auto'"):
        Progress(verbose, num_sets=1)
