"""Examples on real data say what is missing, and are skipped for a reason.

That they run is tested by `tox -e examples`, where there are data.
"""

import gzip
import os
import pathlib
import re
import runpy
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
# Top-level constants of a script, by which the runner knows what it needs.
NAMED = re.compile(r"^DATA_FILES? = ", re.M)
PATHS = [
    path
    for path in sorted(EXAMPLES.glob("*.py"))
    if NAMED.search(path.read_text("utf-8"))
]

pytestmark = [
    pytest.mark.any_backend,
    pytest.mark.skipif(
        not EXAMPLES.exists(), reason="the examples are not here"
    ),
]


def run_examples(*arguments, **environment):
    without = {k: v for k, v in os.environ.items() if k != "KERAS_HALO_DATA"}
    return subprocess.run(
        [sys.executable, ROOT / "tests/scripts/run_examples.py", *arguments],
        env=without | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_an_example_without_its_data_says_where_to_get_them(
    path, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KERAS_HALO_DATA", raising=False)
    missing = tmp_path / "missing"
    monkeypatch.setattr(sys, "argv", [path.name, "--data", str(missing)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(path), run_name="__main__")
    message = str(caught.value)
    assert str(missing) in message
    assert "https://" in message
    assert f"{path.name} --data " in message
    assert "KERAS_HALO_DATA" in message


def test_examples_without_data_are_skipped_with_the_reason(tmp_path):
    done = run_examples(tmp_path)
    assert done.returncode == 0, done.stderr
    for path in PATHS:
        line = f"{path.stem}: skipped: KERAS_HALO_DATA is not set"
        assert line in done.stdout.splitlines()
    done = run_examples(tmp_path, KERAS_HALO_DATA=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"skipped: {tmp_path.resolve()} holds no ") == len(
        PATHS
    )


def test_a_failing_example_and_a_missing_folder_fail(tmp_path):
    done = run_examples(tmp_path, KERAS_HALO_DATA=str(tmp_path / "missing"))
    assert done.returncode == 1
    assert "must be a folder" in done.stderr
    # The script exits with a message here, too, but this is no skip.
    lists = gzip.compress(b'{"train": []}')
    (tmp_path / "clinc150.json.gz").write_bytes(lists)
    done = run_examples(
        tmp_path, "intent_classification", KERAS_HALO_DATA=str(tmp_path)
    )
    assert done.returncode == 1
    assert "Missing: oos_test, test, val" in done.stderr
    assert "intent_classification: exit status 1" in done.stdout


def test_the_readme_lists_every_example():
    text = (EXAMPLES / "README.md").read_text("utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f"]({path.name})" in text
