"""The swap with its defaults: wrong files are named before anything trains."""

import default_swap
import numpy as np
import pytest


@pytest.fixture
def images(tmp_path):
    path = tmp_path / "images.npz"
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (60, 8, 8, 3)).astype("uint8")
    np.savez(path, x=x, y=np.arange(60) % 3)
    return path


def swap(tmp_path, *arguments):
    output = str(tmp_path / "out")
    default_swap.main([*map(str, arguments), "--output", output])


def other(tmp_path, **arrays):
    path = tmp_path / "other.npz"
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("shape", [(5, 8, 8), (5, 9, 9, 3), (5, 8, 8, 1)])
def test_unknown_inputs_of_another_shape_are_named(images, shape, tmp_path):
    path = other(tmp_path, x=np.zeros(shape, "uint8"))
    with pytest.raises(SystemExit) as caught:
        swap(tmp_path, "--data", images, "--unknown", f"strange={path}")
    message = str(caught.value)
    assert "(8, 8, 3)" in message and "'strange'" in message
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--hold-out", "2"], "two have to be left"),
        (["--train", "1000"], "--train 1000"),
        (["--hold-out-classes", "7"], "7"),
    ],
)
def test_what_the_data_do_not_have_is_named(images, arguments, named, tmp_path):
    with pytest.raises(SystemExit, match=named):
        swap(tmp_path, "--data", images, *arguments)


@pytest.mark.parametrize("missing", ["x", "y"])
def test_arrays_that_are_missing_are_named(missing, tmp_path):
    arrays = {"x": np.zeros((6, 4), "float32"), "y": np.arange(6) % 2}
    del arrays[missing]
    path = other(tmp_path, **arrays)
    with pytest.raises(SystemExit) as caught:
        swap(tmp_path, "--data", path)
    assert "default_swap.py: " in str(caught.value)
    assert missing in str(caught.value)
