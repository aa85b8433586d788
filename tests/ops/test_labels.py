"""Labels: one reader for arrays, and one for tensors."""

import keras
import numpy as np
import pytest
from helpers import to_numpy
from keras import ops

import keras_halo
from keras_halo.ops import labels as reading

INTEGERS = [
    np.array([0, 2]),
    np.array([[0], [2]]),
    np.array([0.0, 2.0]),
    np.array([0, 2], "uint8"),
    [0, 2],
]
ROWS = [np.eye(3)[[0, 2]], np.array([[0.5, 0.5, 0.0], [0.0, 0.1, 0.9]])]


@pytest.mark.parametrize("labels", INTEGERS)
def test_integers_of_every_kind_are_read_alike(labels):
    for read in (
        reading.read_labels(labels, (2,), 3),
        reading.read_labels(labels, (2,), 3, any_integer=True),
        reading.fitting_labels(labels, (2,), 3),
        reading.class_indices(labels, 3, (2,)),
        reading.class_indices(ops.convert_to_tensor(labels), 3, (2,)),
        to_numpy(reading.label_tensor(labels, (2, 9))[0]),
    ):
        assert read.tolist() == [0, 2]
    assert reading.label_tensor(labels, (2, 9))[1]


@pytest.mark.parametrize("rows", ROWS)
def test_distributions_are_read_alike(rows):
    tensor, are_integers = reading.label_tensor(rows, (2, 9))
    assert not are_integers
    for read in (
        reading.read_labels(rows, (2,), 3),
        reading.fitting_labels(rows, (2,), 3),
        to_numpy(tensor),
    ):
        np.testing.assert_allclose(read, rows, rtol=1e-6)


@pytest.mark.parametrize("read", ["loss", "metric", "function", "classes"])
@pytest.mark.parametrize(
    "labels, message",
    [
        (np.array([0.5, 1.0]), "must be integers.*Received: 1 of 2.*0.5"),
        (np.array(["cat", "dog"]), "of real numbers.*Received: dtype=<U3"),
        (np.array([0, 1, 2]), "Labels do not fit.*Received: .*[(]3,[)]"),
        (np.ones((2, 3)), "(sum of one|one-hot).*Received: 2 of 2 rows"),
    ],
)
def test_bad_labels_have_one_error_each_whoever_reads_them(
    read, labels, message
):
    scores = to_numpy(keras_halo.HALODense(3)(np.eye(2, 8, dtype="float32")))
    readers = {
        "loss": lambda: keras_halo.HALOLoss()(labels, scores),
        "metric": lambda: keras_halo.metrics.SelectiveAccuracy().update_state(
            labels, scores
        ),
        "function": lambda: keras_halo.metrics.brier_score(
            labels, np.full((2, 3), 1 / 3)
        ),
        "classes": lambda: reading.class_indices(labels, 3, (2,)),
    }
    with pytest.raises(ValueError, match=message):
        readers[read]()


@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_an_integer_of_more_than_32_bits_is_no_class(kind):
    if kind == "tensor" and keras.backend.backend() == "jax":
        pytest.skip("tensors of JAX have 32 bits")
    scores = keras_halo.HALODense(2)(np.eye(2, 8, dtype="float32"))
    named = to_numpy(scores)[:, :2].argmax(axis=-1).astype("int64")
    metric = keras_halo.metrics.ExpectedCalibrationError(num_bins=1)
    metric.update_state(named, scores)
    right = float(metric.result())
    metric.reset_state()
    wide = named + 2**32
    if kind == "tensor":
        wide = ops.convert_to_tensor(wide)
    metric.update_state(wide, scores)
    # Every answer is wrong, so that the gap is the confidence.
    assert abs(right + float(metric.result()) - 1.0) < 1e-5
