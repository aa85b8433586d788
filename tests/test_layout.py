"""The layout of the package: few parts, and imports that go downwards."""

import pathlib
import sys

import pytest

import keras_halo

sys.path.insert(0, str(pathlib.Path(__file__).parent / "scripts"))

import import_graph

ROOT = pathlib.Path(keras_halo.__file__).parent


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
    assert loose == {"__init__.py", "version.py", "py.typed"}


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


def test_dir_shows_what_is_public():
    assert dir(keras_halo) == sorted(keras_halo.__all__)
