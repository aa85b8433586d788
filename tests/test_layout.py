"""The layout of the package: few parts, and imports that go downwards."""

import ast
import configparser
import pathlib
import re
import sys

import keras
import pytest

import keras_halo

sys.path.insert(0, str(pathlib.Path(__file__).parent / "scripts"))

import import_graph

pytestmark = pytest.mark.any_backend

ROOT = pathlib.Path(keras_halo.__file__).parent

# The one module that may use what Keras does not publish.
PRIVATE = "utils/keras_private.py"

# Public, whatever they look like.
OF_NAMED_TUPLES = {"_asdict", "_fields", "_make", "_replace"}


def names_of_keras():
    """Attributes with an underscore that Keras gives to its objects."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    things = (model, model.layers[0], model.inputs[0], keras.losses.Loss())
    metric = keras.metrics.BinaryAccuracy()
    things += (metric, keras.callbacks.Callback())
    names = {name for thing in things for name in dir(thing)}
    return {name for name in names if is_private(name)}


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def private_uses(source, names):
    """Lines of a module that use what Keras does not publish."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        modules, attribute, owner = [], None, ""
        if isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
            modules += [f"{node.module}.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute):
            attribute, owner = node.attr, ast.unparse(node.value)
            modules = [ast.unparse(node)]
        elif isinstance(node, ast.Call) and len(node.args) > 1:
            function = ast.unparse(node.func)
            name = node.args[1]
            if function in ("getattr", "hasattr", "setattr", "delattr"):
                owner = ast.unparse(node.args[0])
                attribute = getattr(name, "value", None)
        if any(f"{module}.".startswith("keras.src.") for module in modules):
            found.add(node.lineno)
        if not isinstance(attribute, str) or not is_private(attribute):
            continue
        is_own = owner in ("self", "cls", "super()") and attribute not in names
        if not is_own and attribute not in OF_NAMED_TUPLES:
            found.add(node.lineno)
    return found


def test_no_part_imports_one_above_it():
    graph = import_graph.import_graph(ROOT)
    assert set(graph) == set(import_graph.ORDER)
    for part, found in graph.items():
        below = import_graph.ORDER[: import_graph.ORDER.index(part)]
        assert found <= set(below), part


def test_parts_levels_and_imports_stay_few():
    graph = import_graph.import_graph(ROOT)
    assert len(graph) <= 13
    assert max(import_graph.levels(graph).values()) <= 8
    assert sum(len(found) for found in graph.values()) <= 40


def test_the_root_holds_packages_only():
    loose = {p.name for p in ROOT.iterdir() if p.is_file()}
    assert loose == {"__init__.py", "__main__.py", "version.py", "py.typed"}


def test_the_tests_lie_as_what_they_test():
    tests = pathlib.Path(__file__).parent
    folders = {path.parent.name for path in tests.glob("*/test_*.py")}
    parts = {path.parent.name for path in ROOT.glob("*/[!_]*.py")}
    assert folders == parts


def test_each_module_of_utils_has_tests_of_its_name():
    # What every part relies on is not only tested by the parts.
    tests = pathlib.Path(__file__).parent
    modules = {path.name for path in (ROOT / "utils").glob("[!_]*.py")}
    tested = {path.name for path in (tests / "utils").glob("test_*.py")}
    assert modules and tested == {f"test_{name}" for name in modules}


def test_the_mathematics_asks_for_the_backend_in_one_module():
    found = {
        path.name
        for path in (ROOT / "ops").glob("*.py")
        if "backend()" in path.read_text("utf-8")
    }
    # The other one tells which transforms a backend has.
    assert found == {"tensors.py", "gradients.py"}


def test_what_is_run_by_itself_lies_in_scripts():
    tests = pathlib.Path(__file__).parent
    for path in tests.rglob("*.py"):
        is_script = '__name__ == "__main__"' in path.read_text("utf-8")
        folder = path.relative_to(tests).parts[0]
        # This test and the makers of fixtures aside.
        makers = ("make_golden.py", "make_models.py")
        if path.name not in ("test_layout.py", *makers):
            assert not is_script or folder == "scripts", path


TOX = pathlib.Path(__file__).parents[1] / "tox.ini"


@pytest.mark.skipif(not TOX.exists(), reason="tox.ini is not here")
def test_tests_that_some_backends_leave_out_run_on_another():
    settings = configparser.RawConfigParser()
    settings.read(TOX, "utf-8")
    listed = settings["tox"]["env_list"].replace(",", " ").split()
    assert "torch" in [name.partition("-")[0] for name in listed]
    lines = settings["testenv"]["commands"].splitlines()
    runs = [line.partition(": pytest ") for line in lines if "pytest" in line]
    all_of_it = "{[testenv]parallel} {posargs}"
    left_out = 'posargs:-m "not any_backend and not slow"}'
    (leaving,) = [where for where, _, how in runs if how.endswith(left_out)]
    marked = [
        how
        for where, _, how in runs
        if "-m " in how and "not " in how and not where.startswith("lowest")
    ]
    assert len(marked) == 1
    (keeping,) = [where for where, _, how in runs if how == all_of_it]
    assert "!torch" in leaving.split("-")
    assert "torch" in keeping[1 : keeping.index("}")].split(",")
    elsewhere = '{[testenv]parallel} -m "any_backend or slow"'
    assert ("properties", elsewhere) in [(where, how) for where, _, how in runs]
    # Every push runs all of the suite on the others.
    workflow = (TOX.parent / ".github/workflows/tests.yml").read_text("utf-8")
    for backend in ("jax", "tensorflow"):
        assert backend in listed
        assert re.search(rf"\b{backend} -- \.", workflow)


def test_a_graph_with_a_cycle_is_found(tmp_path):
    root = tmp_path / "keras_halo"
    for name in ("ops", "layers"):
        (root / name).mkdir(parents=True)
    (root / "ops/a.py").write_text("from keras_halo.layers import b\n")
    (root / "layers/b.py").write_text("def f():\n    import keras_halo.ops.a\n")
    graph = import_graph.import_graph(root)
    assert graph == {"ops": {"layers"}, "layers": {"ops"}}
    with pytest.raises(ValueError, match="cycle"):
        import_graph.levels(graph)


def test_one_module_knows_how_many_columns_packed_scores_have():
    for path in sorted([*ROOT.rglob("*.py"), *ROOT.parent.glob("docs/*.md")]):
        text = path.read_text("utf-8")
        # One more than classes is what softmax gives, four more is 0.1.0.
        columns = re.findall(r"\b(?:[KBN]|units) \+ ([2-9]\d*)\b", text)
        if path.name == "packing.py":
            assert set(columns) == {"4"}
        else:
            assert not columns, path


def test_dir_shows_what_is_public():
    assert dir(keras_halo) == sorted(keras_halo.__all__)


def test_one_module_uses_what_keras_does_not_publish():
    names = names_of_keras()
    assert {"_direction", "_inbound_nodes", "_keras_history"} <= names
    found = {
        path.relative_to(ROOT).as_posix(): lines
        for path in ROOT.rglob("*.py")
        if (lines := private_uses(path.read_text("utf-8"), names))
    }
    assert set(found) == {PRIVATE}, found


@pytest.mark.parametrize(
    "line, is_use",
    [
        ("import keras.src.backend", True),
        ("from keras.src import backend", True),
        ("from keras import src", True),
        ("keras.src.backend.get_keras_mask(x)", True),
        ("tensor._keras_history", True),
        ("model.layers[0]._inbound_nodes", True),
        ("self._direction = 'up'", True),
        ("getattr(metric, '_fn', None)", True),
        ("hasattr(self, '_direction')", True),
        ("self._threshold = 1.0", False),
        ("super()._check(x)", False),
        ("parts._replace(x=1)", False),
        ("getattr(function, '__name__', '')", False),
        ("from keras import ops", False),
    ],
)
def test_a_use_of_what_keras_does_not_publish_is_found(line, is_use):
    assert bool(private_uses(line, names_of_keras())) == is_use
