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


@pytest.mark.parametrize(
    "counts",
    [np.ones((12, 4)), np.ones((11, 3)), np.zeros((12, 3)), -np.ones((12, 3))],
)
def test_labels_of_people_fit_the_test_inputs(images, counts, tmp_path):
    path = tmp_path / "counts.npy"
    np.save(path, counts)
    with pytest.raises(SystemExit, match="counts.npy must hold"):
        swap(tmp_path, "--data", images, "--people", path)


def test_labels_of_people_are_read_of_all_classes(images, tmp_path):
    path = tmp_path / "counts.npy"
    np.save(path, np.ones((12, 3)))
    with pytest.raises(SystemExit, match="1 held out"):
        swap(
            tmp_path,
            "--data",
            images,
            "--people",
            path,
            "--hold-out-classes",
            2,
        )


def test_a_network_of_images_is_refused_elsewhere(tmp_path):
    path = other(tmp_path, x=np.zeros((60, 4)), y=np.arange(60) % 3)
    with pytest.raises(SystemExit, match="for images"):
        swap(tmp_path, "--data", path, "--network", "small_resnet")


def test_cross_entropy_of_what_people_say():
    # Class probabilities do not depend on what is added to all logits.
    logits = np.log([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]])
    logits += [[3.0], [-900.0]]
    people = np.array([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]])
    expected = -np.mean([0.5 * np.log(0.5) + 0.5 * np.log(0.25), np.log(0.8)])
    found = default_swap.cross_entropy_of(people, logits)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
