"""What only the extra `tools` brings is imported late, and named if missing."""

import ast
import importlib
import pathlib
import re
import subprocess
import sys

import pytest

import keras_halo
from keras_halo.utils.extras import require

pytestmark = pytest.mark.any_backend

ROOT = pathlib.Path(keras_halo.__file__).parent


def required():
    """The names of modules that the package requires, by where it does."""
    found = {}
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            called = isinstance(node, ast.Call) and ast.unparse(node.func)
            if called == "require":
                found.setdefault(path.name, []).append(node.args[0].value)
    return found


@pytest.mark.parametrize(
    "name, library",
    [
        ("scipy.stats", "SciPy"),
        ("sklearn.metrics", "scikit-learn"),
        ("matplotlib.pyplot", "matplotlib"),
    ],
)
def test_the_module_itself_or_the_command_that_installs_it(name, library):
    pytest.importorskip(name)
    assert require(name) is importlib.import_module(name)
    top = name.partition(".")[0]
    expected = f"needs {library}, which cannot be imported. Run `pip install "
    with pytest.raises(ImportError, match=expected) as error:
        require(f"{top}.no_such_module")
    assert '"keras-halo[tools]"' in str(error.value)
    # What really went wrong, such as a library that is broken.
    assert isinstance(error.value.__cause__, ModuleNotFoundError)


def test_each_module_that_is_required_has_a_library_to_name():
    found = required()
    assert len(found) >= 5
    for name in {name for names in found.values() for name in names}:
        pytest.importorskip(name)
        assert require(name).__name__ == name
        with pytest.raises(ImportError, match=r"keras-halo\[tools\]"):
            require(f"{name}.no_such_module")


def test_nothing_is_imported_before_it_is_needed():
    # Keras and its backends import SciPy where they find it.
    code = (
        "import sys, keras; before = set(sys.modules); import keras_halo; "
        "print(*sorted(set(sys.modules) - before))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    new = run.stdout.split()
    assert "keras_halo.utils.extras" in new
    libraries = re.compile(r"(matplotlib|sklearn|scipy)(\.|$)")
    assert not [name for name in new if libraries.match(name)]
