"""Sample weights and masks: one rule of what fits, whoever asks."""

import itertools

import cases
import keras
import numpy as np
import pytest
from helpers import jit, to_numpy
from hypothesis import strategies as st
from keras import ops

from keras_halo.utils.weights import (
    counted_positions,
    fitting_weights,
    weights_of_positions,
    weights_of_samples,
)


def spread(weights, positions, one_for_all=False):
    """One value for every position, by the rules of NumPy; `None` if none fit.

    A trailing axis of one is left out, and missing axes are put at the end.
    """
    rank = len(positions)
    if weights.ndim == rank + 1 and weights.shape[-1] == 1:
        weights = weights.reshape(weights.shape[:-1])
    missing = rank - weights.ndim
    if missing < 0:
        return None
    weights = weights.reshape(weights.shape + (1,) * missing)
    if missing < rank and not one_for_all and len(weights) != positions[0]:
        return None
    try:
        return np.broadcast_to(weights, positions)
    except ValueError:
        return None


def shapes(ranks, lengths=(1, 2, 3)):
    return [
        shape
        for rank in ranks
        for shape in itertools.product(lengths, repeat=rank)
    ]


@pytest.mark.parametrize("one_for_all", [False, True])
@pytest.mark.parametrize("positions", shapes([1, 2]))
def test_what_fits_is_what_numpy_broadcasts_from_the_front(
    positions, one_for_all
):
    counts = {True: 0, False: 0}
    for shape in shapes([0, 1, 2, 3]):
        weights = 1.0 + np.arange(np.prod(shape)).reshape(shape)
        expected = spread(weights, positions, one_for_all)
        counts[expected is not None] += 1
        if expected is None:
            with pytest.raises(ValueError) as error:
                fitting_weights(weights, positions, "these", one_for_all)
            message = str(error.value)
            assert message.startswith("Expected these to have one value")
            assert str(positions) in message and f"shape={shape}" in message
            continue
        found = fitting_weights(weights, positions, "these", one_for_all)
        assert found.ndim == len(positions)
        np.testing.assert_array_equal(
            np.broadcast_to(found, positions), expected
        )
    assert min(counts.values()) >= 2


@cases.for_all(
    positions=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    kept=st.integers(0, 3),
    column=st.booleans(),
    dtype=st.sampled_from(["float32", "float64", "int32", "uint8", "bool"]),
    seed=st.integers(0, 100),
)
def test_arrays_and_tensors_are_read_alike(
    positions, kept, column, dtype, seed
):
    positions = tuple(positions)
    shape = positions[:kept]
    if column and len(shape) == len(positions):
        shape = (*shape, 1)
    rng = np.random.default_rng(seed)
    weights = rng.integers(0, 2, size=shape).astype(dtype)
    expected = spread(weights, positions)
    array = fitting_weights(weights, positions)
    assert isinstance(array, np.ndarray) and array.dtype == dtype
    listed = fitting_weights(weights.tolist(), positions)
    tensor = fitting_weights(ops.convert_to_tensor(weights), positions)
    assert ops.is_tensor(tensor)
    ones = ops.ones(positions)
    product = weights_of_positions(weights, None, ones)
    for found in (array, listed, to_numpy(tensor), to_numpy(product)):
        np.testing.assert_array_equal(
            np.broadcast_to(found, positions), expected
        )
    assert tuple(product.shape) == positions
    if shape:
        np.testing.assert_array_equal(
            counted_positions(weights, positions, "x"), expected != 0
        )
        np.testing.assert_array_equal(
            counted_positions(None, positions, "x", weights), expected != 0
        )


def test_lengths_that_are_not_known_fit_every_length():
    for shape, positions, rank in (
        ((None,), (None, 3), 2),
        ((None, None), (None, 3), 2),
        ((None, 3, 1), (None, 3), 2),
        ((4,), (None, None, 5), 3),
        ((), (None,), 1),
    ):
        found = fitting_weights(keras.KerasTensor(shape), positions)
        assert len(found.shape) == rank
        assert found.shape[0] in (None, 1, 4)
    for shape, positions in (
        ((None, 2), (None, 3)),
        ((None, 3, None), (None, 3)),
        ((1,), (4, None)),
    ):
        with pytest.raises(ValueError, match="Received: shape="):
            fitting_weights(keras.KerasTensor(shape), positions)


def test_one_weight_for_all_is_for_keras_alone():
    # Keras multiplies a loss or a metric's update by it; of data it says
    # nothing.
    weights = weights_of_positions(
        ops.convert_to_tensor(2.0), None, ops.ones((2, 3))
    )
    assert to_numpy(weights).tolist() == [[2.0] * 3] * 2
    assert fitting_weights([2.0], (4, 3), one_for_all=True).shape == (1, 1)
    for weights in ([2.0], [[2.0, 1.0, 0.5]]):
        with pytest.raises(ValueError, match=r"shape \(4,\), or for every"):
            fitting_weights(weights, (4, 3))
    with pytest.raises(ValueError, match="one number a sample"):
        counted_positions(np.float32(1.0), (2, 3), "x")
    with pytest.raises(ValueError, match="one number a sample"):
        weights_of_samples(1.0, 1, "x")


def test_weights_and_mask_are_multiplied():
    weights, mask = (
        np.array([2.0, 3.0, 0.5]),
        np.array([[1, 0], [0, 0], [1, 1]]),
    )
    expected = [[2.0, 0.0], [0.0, 0.0], [0.5, 0.5]]
    for dtype in ("float32", "float16"):
        ones = ops.ones((3, 2), dtype)
        found = weights_of_positions(weights, mask.astype(bool), ones)
        assert found.dtype == ones.dtype
        assert to_numpy(found).tolist() == expected
        assert weights_of_positions(None, None, ones) is None
    alone = weights_of_positions(None, mask.astype(bool), ops.ones((3, 2)))
    assert to_numpy(alone).tolist() == mask.tolist()
    with pytest.raises(ValueError, match=r"mask of `y_pred`.*shape=\(2,\)"):
        weights_of_positions(weights, [True, False], ops.ones((3, 2)))
    with pytest.raises(ValueError, match=r"`sample_weight` to.*shape=\(2,\)"):
        weights_of_positions(weights[:2], mask, ops.ones((3, 2)))


def test_a_weight_that_is_nan_is_not_lost():
    found = weights_of_positions([np.nan, 1.0], [True, False], ops.ones((2,)))
    assert np.isnan(to_numpy(found)).tolist() == [True, False]


def test_weights_and_mask_are_multiplied_in_compiled_functions():
    @jit
    def total(weights, mask):
        return weights_of_positions(weights, mask, ops.ones((3, 2)))

    weights = ops.convert_to_tensor([1.0, 2.0, 3.0])
    mask = ops.convert_to_tensor([[True, False]] * 3)
    found = to_numpy(total(weights, mask))
    assert found.tolist() == [[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]]


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="of TensorFlow alone"
)
def test_batches_of_unknown_size_are_weighted():
    import tensorflow as tf

    float32 = tf.float32

    @tf.function(
        input_signature=[
            tf.TensorSpec((None,), float32),
            tf.TensorSpec((None, 2), float32),
        ]
    )
    def weighted(weights, values):
        return fitting_weights(weights, values.shape) * values

    found = weighted(tf.constant([1.0, 2.0]), tf.ones((2, 2)))
    assert found.numpy().tolist() == [[1.0, 1.0], [2.0, 2.0]]


@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 3), (5, 3, 2)])
def test_weights_of_samples_may_be_of_any_positions(shape):
    weights = np.arange(np.prod(shape)).reshape(shape)
    found = weights_of_samples(weights, 5, "x")
    assert found.dtype == "float64" and found.shape == shape
    np.testing.assert_array_equal(found, weights)
    tensor = ops.convert_to_tensor(weights)
    np.testing.assert_array_equal(weights_of_samples(tensor, 5, "x"), weights)
    for count in (0, 1, 4, 6):
        with pytest.raises(ValueError, match="sample weights of `known`") as e:
            weights_of_samples(weights, count, "known")
        assert f"({count},)" in str(e.value)
        assert f"shape={shape}" in str(e.value)


@pytest.mark.parametrize(
    "read",
    [
        lambda bad: fitting_weights(bad, (2,)),
        lambda bad: weights_of_positions(bad, None, ops.ones((2,))),
        lambda bad: weights_of_samples(bad, 2, "x"),
        lambda bad: counted_positions(bad, (2,), "x"),
    ],
)
@pytest.mark.parametrize("bad", sorted(set(cases.NO_NUMBERS) - {"none"}))
def test_what_is_no_array_of_numbers_is_refused(read, bad):
    with pytest.raises(ValueError, match="`sample_weight` must.*Received: "):
        read(cases.NO_NUMBERS[bad])


def test_none_is_no_array_of_weights():
    # The other readers take it for weights that were left out.
    with pytest.raises(ValueError, match="`sample_weight` must be"):
        fitting_weights(None, (2,))
    with pytest.raises(ValueError, match="`sample_weight` must be"):
        weights_of_samples(None, 2, "x")
    assert weights_of_positions(None, None, ops.ones((2,))) is None
    assert counted_positions(None, (2,), "x").all()


@pytest.mark.parametrize("bad", [-1.0, -1e-30, np.nan, np.inf, -np.inf])
def test_what_is_no_weight_of_data_is_refused(bad):
    weights = np.array([1.0, bad])
    for read in (
        lambda: weights_of_samples(weights, 2, "x"),
        lambda: counted_positions(weights, (2, 3), "x"),
    ):
        with pytest.raises(ValueError, match="Received: 1 of 2 others"):
            read()
    # Keras multiplies by whatever it is given.
    assert fitting_weights(weights, (2,)) is weights


def test_no_samples_have_no_weights():
    for empty in ([], np.zeros((0,)), np.zeros((0, 3)), np.zeros((0, 3, 1))):
        assert counted_positions(empty, (0, 3), "x").shape == (0, 3)
        for positions in ((2, 3), (1, 3)):
            with pytest.raises(ValueError, match=r"Received: shape=\(0"):
                counted_positions(empty, positions, "x")
        # A length of zero is no length of one.
        with pytest.raises(ValueError, match=r"Received: shape=\(0"):
            fitting_weights(empty, (2, 3), one_for_all=True)
