"""The quickstart, and the benchmarks in small, as the processes that they are.

What the benchmarks say about data too small to learn from is not looked at.
That they run to the end, go on where they stopped and read each other's tables
is.
"""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
# A method of each kind: `tox -e benchmark-smoke` trains the others, too. The
# last one begins where the first one ended.
METHODS = ("cross-entropy", "HALO", "HALO-converted-blocks")
ROW = re.compile(r"^(\S.*?)  +(-?\d+\.\d ± \d+\.\d)  +(-?\d+\.\d ± \d+\.\d)$")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not BENCHMARKS.exists(), reason="the benchmarks are not here"
    ),
]


def run(script, *arguments, **environment):
    """What a script prints."""
    done = subprocess.run(
        [sys.executable, ROOT / script, *map(str, arguments)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def table(text):
    """The rows of the quickstart's table: two figures a name."""
    matches = (ROW.match(line) for line in text.splitlines())
    return {match[1]: match.groups()[1:] for match in matches if match}


def mean(cell):
    return float(cell.split()[0])


def test_the_quickstart_prints_the_table_of_the_readme(tmp_path):
    picture = tmp_path / "quickstart.png"
    # Each of its figures is one backend's, on one kind of machine.
    printed = run("examples/quickstart.py", "--output", picture)
    assert picture.stat().st_size > 10_000
    readme = (ROOT / "README.md").read_text("utf-8")
    header = next(
        line for line in printed.splitlines() if line.startswith("%, mean")
    )
    assert header in readme
    rows, promised = table(printed), table(readme)
    assert list(rows) == list(promised) and len(rows) == 9
    for name in ("AUROC, unknown digits", "AUROC, noise"):
        cross_entropy, halo = map(mean, rows[name])
        assert halo > cross_entropy, name
    assert mean(rows["abstained, noise"][1]) > 80.0
    assert mean(rows["abstained, known"][1]) < 5.0


def test_the_benchmark_runs_once_and_goes_on_where_it_stopped(tmp_path):
    arguments = ["benchmarks/ood.py", "--smoke", "--output", tmp_path]
    methods = ["--methods", *METHODS]
    number = len(METHODS)
    first = run(*arguments, *methods)
    assert f"{number} trained, {number} evaluated, 0 found" in first
    finished = run(*arguments, *methods, "--expect-finished")
    assert f"0 trained, 0 evaluated, {number} found finished" in finished
    # A second seed is not there yet, and is left out of the tables.
    more = run(*arguments, *methods, "--seeds", 2, "--finished-only")
    assert f"0 trained, 0 evaluated, {number} found finished" in more
    detectors = tmp_path / "detectors.csv"
    assert run("benchmarks/agreement.py", detectors, "--with", detectors)


def test_the_swap_runs_on_data_that_need_no_file(tmp_path):
    printed = run(
        *("benchmarks/default_swap.py", "--data", "digits", "--hold-out", 2),
        *("--draws", 1, "--seeds", 1, "--epochs", 2, "--output", tmp_path),
        *("--methods", "cross-entropy", "HALO"),
    )
    assert "AUROC held out" in printed, printed
