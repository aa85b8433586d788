"""The code on the pages runs as it stands, and no public name is left out."""

import inspect
import os
import pathlib
import re
import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_halo

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = ("getting-started", "how-it-works", "settings", "faq", "monitoring")

pytestmark = pytest.mark.skipif(
    not DOCS.exists(), reason="the pages are not here"
)


def blocks(path):
    """The Python blocks of a page, each at the line where it stands."""
    text = path.read_text(encoding="utf-8")
    for match in re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S):
        yield "\n" * text[: match.start(1)].count("\n") + match[1]


def run(path, names):
    count = 0
    for block in blocks(path):
        exec(compile(block, str(path), "exec"), names)
        count += 1
    assert count > 0


@pytest.mark.any_backend
@pytest.mark.parametrize("page", PAGES)
def test_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(DOCS / f"{page}.md", {})


@pytest.mark.slow
def test_short_example_of_the_readme_runs():
    rng = np.random.default_rng(0)
    names = {
        "backbone": keras.layers.Dense(32, activation="relu"),
        "x": rng.normal(size=(64, 8)).astype("float32"),
        "y": rng.integers(0, 10, 64),
        "x_new": rng.normal(size=(5, 8)).astype("float32"),
    }
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(
        r"^## Swap two lines\n.*?^```python\n(.*?)^```$", text, re.M | re.S
    )
    exec(compile(block[1], "README.md", "exec"), names)
    assert names["predictions"].labels.shape == (5,)


@pytest.mark.slow
def test_a_binary_example_of_keras_prints_two_probabilities():
    model = keras.Sequential([keras.Input((8,)), keras_halo.HALODense(2)])
    names = {
        "keras": keras,
        "keras_halo": keras_halo,
        "model": model,
        "img_array": np.ones((1, 8), "float32"),
    }
    run(DOCS / "keras-examples.md", names)
    model.compile("sgd", keras_halo.HALOLoss(), metrics=names["metrics"])
    # As the page says: labels of one unit stay as they are, floats or not.
    for y in (np.array([0, 1]), np.array([[0.0], [1.0]])):
        assert np.isfinite(model.train_on_batch(np.eye(2, 8), y)[0])
    assert 0 < names["cat"] + names["dog"] <= 1


def a_classifier():
    return keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(16, activation="relu", name="block"),
            keras.layers.Dense(10),
        ]
    )


@pytest.mark.slow
def test_readme_puts_a_head_on_a_trained_network():
    rng = np.random.default_rng(0)
    y = np.arange(200) % 10
    x = 3 * rng.normal(size=(10, 8))[y] + 0.1 * rng.normal(size=(200, 8))
    # What a trained backbone is, a random one is for such classes.
    model = a_classifier()
    names = {
        "keras_halo": keras_halo,
        "HALOLoss": keras_halo.HALOLoss,
        "model": model,
        "x": x.astype("float32"),
        "y": y,
    }
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^## Already have.*?^## ", text, re.M | re.S)[0]
    (block,) = re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S)
    exec(compile(block, "README.md", "exec"), names)
    scores = names["model"].predict(x, verbose=0)
    assert (keras_halo.decode_predictions(scores).labels == y).mean() > 0.9


@pytest.mark.slow
def test_rule_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {
        "keras_halo": keras_halo,
        "model": keras.Sequential(
            [keras.Input((8,)), keras_halo.HALODense(10)]
        ),
        "x_val": np.random.default_rng(0).normal(size=(60, 8)),
        "x_new": np.random.default_rng(1).normal(size=(20, 8)),
    }
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^## From an answer.*?^## ", text, re.M | re.S)[0]
    (block,) = re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S)
    exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "guarded.keras").is_file()


@pytest.mark.any_backend
def test_the_readme_stays_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 120 and len(text.split()) <= 900


@pytest.mark.any_backend
def test_every_public_name_has_its_place_in_the_api():
    shown = set()
    for page in (DOCS / "api").glob("*.md"):
        shown |= set(re.findall(r"^::: (\S+)$", page.read_text(), re.M))
    places = {name.rsplit(".", 1)[-1] for name in shown}
    modules = (
        "layers",
        "losses",
        "metrics",
        "ops",
        "plots",
        "rejection",
        "workflows",
    )
    public = {
        name
        for module in (keras_halo, *(getattr(keras_halo, m) for m in modules))
        for name in module.__all__
    }
    # Told on the pages of their parts, or no thing to document.
    public -= {"OOD_METHODS", "__version__", "callbacks", *modules}
    assert sorted(public - places) == []


@pytest.mark.any_backend
def test_the_table_of_public_names_is_what_the_script_prints():
    script = pathlib.Path(__file__).parent / "scripts" / "public_names.py"
    printed = subprocess.run(
        [sys.executable, str(script)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ).stdout
    assert printed in (DOCS / "api" / "index.md").read_text("utf-8")


@pytest.mark.any_backend
def test_the_table_of_public_names_leaves_none_out():
    page = (DOCS / "api" / "index.md").read_text("utf-8")
    told = set(re.findall(r"^\| `(\S+)` \|", page, re.M))
    parts = {
        name: getattr(keras_halo, name)
        for name in keras_halo.__all__
        if inspect.ismodule(getattr(keras_halo, name))
    }
    missing = set(keras_halo.__all__) - set(parts) - {"__version__"} - told
    for part, module in parts.items():
        # What is also at the top level is told there.
        missing |= {
            f"{part}.{name}"
            for name in module.__all__
            if not told & {name, f"{part}.{name}"}
        }
    assert sorted(missing) == []


def in_the_docstring():
    """What `ood_score` says of each score."""
    text = inspect.getdoc(keras_halo.ood_score)
    return re.findall(r"^- (`.*?):", text, re.M)


def in_the_table():
    """The scores in the first column of a table."""
    text = (DOCS / "assurance.md").read_text("utf-8")
    (section,) = re.findall(
        r"^### What the scores miss\n(.*?)^#", text, re.M | re.S
    )
    return re.findall(r"^\| (.*?) \|", section, re.M)


@pytest.mark.any_backend
@pytest.mark.parametrize("place", [in_the_docstring, in_the_table])
def test_what_every_score_misses_is_told(place):
    told = re.findall(r'`"(\w+)"`', " ".join(place()))
    # Each in one place, and none that there is not.
    assert sorted(told) == sorted(keras_halo.OOD_METHODS)
