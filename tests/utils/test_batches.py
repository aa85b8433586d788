"""One reader for every kind of data: each row once, with what belongs to it."""

import keras
import numpy as np
import pytest
from helpers import to_numpy
from keras import ops

from keras_halo.utils import batches as reading

BACKEND = keras.backend.backend()
N = 70
X = np.arange(2.0 * N, dtype="float32").reshape(N, 2)
Y = np.arange(N) % 3
WEIGHTS = (np.arange(N) % 4).astype("float32")


def slices(size=32):
    return [slice(start, start + size) for start in range(0, N, size)]


class Batches(keras.utils.PyDataset):
    def __init__(self, *arrays):
        super().__init__()
        self.arrays = arrays
        self.begun = self.epochs = 0

    def __len__(self):
        return len(slices())

    def __getitem__(self, index):
        return tuple(array[slices()[index]] for array in self.arrays)

    def on_epoch_begin(self):
        self.begun += 1

    def on_epoch_end(self):
        self.epochs += 1


class Endless(Batches):
    num_batches = None


def as_generator(*arrays):
    return (tuple(array[part] for array in arrays) for part in slices())


def as_tf_dataset(*arrays):
    tf = pytest.importorskip("tensorflow", reason="needs TensorFlow")
    return tf.data.Dataset.from_tensor_slices(arrays).batch(32)


def as_loader(*arrays):
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    dataset = torch.utils.data.TensorDataset(*map(torch.as_tensor, arrays))
    return torch.utils.data.DataLoader(dataset, batch_size=32)


KINDS = {
    "arrays": lambda *arrays: arrays,
    "tensors": lambda *arrays: tuple(map(ops.convert_to_tensor, arrays)),
    "PyDataset": Batches,
    "generator": as_generator,
    "list": lambda *arrays: list(as_generator(*arrays)),
    "list of lists": lambda *arrays: list(map(list, as_generator(*arrays))),
    "tf.data": as_tf_dataset,
    "DataLoader": as_loader,
}


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_row_is_read_once_in_order(kind, count):
    arrays = (X, Y, WEIGHTS)[:count]
    found = list(reading.read_batches(KINDS[kind](*arrays)))
    assert [len(x) for x, _, _ in found] == [32, 32, 6]
    for position, whole in enumerate((X, Y, WEIGHTS)):
        parts = [batch[position] for batch in found]
        if position >= count:
            assert parts == [None] * 3
            continue
        assert all(isinstance(part, np.ndarray) for part in parts)
        np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"arrays", "tensors"}))
def test_datasets_are_told_from_arrays_and_counted(kind):
    data = KINDS[kind](X, Y)
    assert reading.is_dataset(data)
    number = reading.count_batches(data)
    assert number == (None if kind == "generator" else 3)
    # To count is not to read.
    assert len(list(reading.read_batches(data))) == 3


def test_arrays_are_no_datasets():
    tensor = ops.convert_to_tensor(X)
    for data in (X, tensor, (X, Y), [X, X], {"x": X}, [[1.0, 2.0]], []):
        assert not reading.is_dataset(data)
    for size, number in ((1, 70), (32, 3), (70, 1), (100, 1), (None, 3)):
        assert reading.count_batches((X, Y), size) == number


@pytest.mark.parametrize("size", [1, 3, 70, 100])
def test_arrays_come_in_batches_of_a_size(size):
    found = [x for x, _, _ in reading.read_batches(X, size)]
    assert [len(x) for x in found] == [len(X[part]) for part in slices(size)]
    np.testing.assert_array_equal(np.concatenate(found), X)


def test_several_inputs_stay_together():
    for inputs in ([X, Y], {"a": X, "b": Y}):
        ((found, labels, _),) = reading.read_batches((inputs, Y), 100)
        assert type(found) is type(inputs)
        for part, whole in zip(keras.tree.flatten(found), (X, Y), strict=True):
            np.testing.assert_array_equal(part, whole)
        np.testing.assert_array_equal(labels, Y)


def test_labels_in_a_list_are_labels():
    data = X[:4], [0, 1, 2, 0], [1.0, 0.0, 1.0, 2.0]
    ((_, labels, weights),) = reading.read_batches(data)
    assert labels.tolist() == [0, 1, 2, 0]
    assert weights.tolist() == [1.0, 0.0, 1.0, 2.0]


def test_a_loader_of_bare_tensors_yields_inputs_alone():
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    loader = torch.utils.data.DataLoader(torch.as_tensor(X), batch_size=32)
    found = list(reading.read_batches(loader))
    assert [len(x) for x, _, _ in found] == [32, 32, 6]
    assert all(y is None for _, y, _ in found)


def test_an_epoch_ends_also_where_reading_stops():
    data = Batches(X, Y)
    list(reading.read_batches(data))
    assert data.epochs == 1
    batches = reading.read_batches(data)
    next(batches)
    assert data.epochs == 1
    batches.close()
    assert data.epochs == data.begun == 2


def test_lists_of_batches_are_told_from_lists_of_inputs():
    assert reading.is_list_of_batches([(X, Y)])
    assert reading.is_list_of_batches([[X, Y], [X, Y]])
    assert reading.is_list_of_batches([(X,)])
    for other in ([X, Y], [X], [[1.0], [2.0]], [], (X, Y), X, [(X, Y), X]):
        assert not reading.is_list_of_batches(other)


# What cannot be read


@pytest.mark.parametrize(
    "data",
    [
        "train.npz",
        None,
        3.0,
        np.float32(3.0),
        np.zeros((0, 2)),
        [],
        {},
        [np.zeros((2, 2)), None],
        np.ma.masked_less(X, 1.0),
        object(),
        [("a", "b")],
    ],
)
def test_what_is_no_array_with_samples_is_refused(data):
    with pytest.raises(ValueError, match="`known`.*Received: "):
        reading.check_readable(data, "known")
    with pytest.raises(ValueError, match="`known`.*Received: "):
        reading.check_arrays(data, "known")


def test_what_can_be_read_is_let_through():
    for kind in ("arrays", "tensors", "PyDataset", "generator", "list"):
        reading.check_readable(KINDS[kind](X, Y, WEIGHTS), "known")
    for data in (X, [X, X], {"x": X}, (X, Y.tolist()), (X, [0] * N, [1] * N)):
        reading.check_readable(data, "known", again=True)
        reading.check_readable(data, "known")


def test_a_generator_is_read_once():
    reading.check_readable(as_generator(X), "known")
    with pytest.raises(ValueError, match="`known` is a generator.*Received"):
        reading.check_readable(as_generator(X), "known", again=True)


def test_what_has_no_end_is_refused():
    with pytest.raises(ValueError, match="`known` is infinite.*Received"):
        reading.check_readable(Endless(X), "known")
    if BACKEND == "tensorflow":
        data = as_tf_dataset(X, Y)
        reading.check_readable(data, "known")
        reading.check_readable(data.repeat(2), "known")
        with pytest.raises(ValueError, match="`known` is infinite.*Received"):
            reading.check_readable(data.repeat(), "known")


def test_labels_and_weights_of_arrays_are_checked():
    for labels in (1, np.array(1), "cat"):
        with pytest.raises(ValueError, match="labels of `known`.*Received"):
            reading.check_readable((X, labels), "known")
    for weights in (WEIGHTS[1:], np.ones(1), np.ones((N + 1, 2))):
        with pytest.raises(ValueError, match="weights of `known`.*Received"):
            reading.check_readable((X, Y, weights), "known")
    for weights in (-WEIGHTS, np.full(N, np.nan), "text", 1.0):
        with pytest.raises(ValueError, match="`sample_weight`.*Received"):
            reading.check_readable((X, Y, weights), "known")


@pytest.mark.parametrize("dtype", ["U1", "S1", "O"])
def test_inputs_that_are_no_numbers_are_refused(dtype):
    bad = np.full((4, 2), "a").astype(dtype)
    for data in (bad, [X[:4], bad], {"x": bad}):
        with pytest.raises(ValueError, match="arrays of numbers.*Received"):
            reading.check_numbers(data)
        with pytest.raises(ValueError, match="arrays of numbers.*Received"):
            next(reading.read_batches(data))
    reading.check_numbers([X, Y, X > 0])


# Labels and weights beside inputs


def test_inputs_get_their_labels():
    for x, y, weights in (
        (X, Y, WEIGHTS),
        (X, Y, None),
        (X, Y.tolist(), WEIGHTS.tolist()),
        ([X, X], Y, None),
        (ops.convert_to_tensor(X), ops.convert_to_tensor(Y), None),
    ):
        found = reading.labelled_data(x, y, weights)
        assert found[0] is x
        np.testing.assert_array_equal(found[1], Y)
        if weights is None:
            assert found[2] is None
        else:
            np.testing.assert_array_equal(found[2], WEIGHTS)
        joined = reading.labelled_data(
            (x, y) if weights is None else (x, y, weights)
        )
        np.testing.assert_array_equal(joined[1], Y)
    # With labels beside them, lists in a list are inputs.
    nested = [[X, X]]
    assert reading.labelled_data(nested, Y)[0] is nested


@pytest.mark.parametrize("kind", ["PyDataset", "generator", "list"])
def test_datasets_have_labels_of_their_own(kind):
    data = KINDS[kind](X, Y)
    assert reading.labelled_data(data) is data
    with pytest.raises(ValueError, match="`y` belongs to arrays.*Received: y"):
        reading.labelled_data(data, Y)
    with pytest.raises(ValueError, match="`sample_weight` belongs to arrays"):
        reading.labelled_data(data, None, WEIGHTS)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((X,), "Labels are missing"),
        (((X,),), "Labels are missing"),
        ((X, None, WEIGHTS), "`sample_weight` belongs to arrays `x` and `y`"),
        ((X, 1), "one label for every input"),
        ((X, Y[1:]), "70 inputs and 69 labels"),
        ((X, ["cat"] * N), "Labels must be numbers"),
        ((X, Y, WEIGHTS[1:]), r"sample weights of `x` .*shape=\(69,\)"),
        ((X, Y, -WEIGHTS), "not negative"),
        (("train.npz", Y), "`x` must be an array"),
    ],
)
def test_what_does_not_belong_together_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        reading.labelled_data(*arguments)
    assert "Received: " in str(error.value)


# What counts


def by_hand(values, labels, weights, mask):
    """The positions that count, one after the other."""
    kept_values, kept_labels = [], []
    for index in np.ndindex(values.shape[:-1]):
        weight = 1.0
        if weights is not None:
            weight = weights[index[: weights.ndim]]
        if weight and (mask is None or mask[index[: mask.ndim]]):
            kept_values.append(values[index])
            kept_labels.append(labels[index])
    return np.array(kept_values), np.array(kept_labels)


@pytest.mark.parametrize("weights_rank", [None, 1, 2])
@pytest.mark.parametrize("mask_rank", [None, 1, 2])
@pytest.mark.parametrize("is_column", [False, True])
def test_what_counts_is_what_a_loop_keeps(weights_rank, mask_rank, is_column):
    rng = np.random.default_rng(1)
    values = rng.normal(size=(6, 4, 3))
    labels = rng.integers(0, 3, size=(6, 4, 1) if is_column else (6, 4))
    weights = mask = None
    if weights_rank:
        weights = rng.integers(0, 3, size=(6, 4)[:weights_rank])
    if mask_rank:
        mask = rng.random(size=(6, 4)[:mask_rank]) < 0.5
    found = reading.counted(values, labels, weights, mask)
    if weights is None and mask is None:
        assert found[0] is values and found[1] is labels
        return
    expected = by_hand(values, labels, weights, mask)
    assert 0 < len(expected[0]) < 24
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_labels_that_do_not_fit_what_counts_are_refused():
    values = np.zeros((6, 4, 3))
    for labels in (np.zeros(6), np.zeros((5, 4)), np.zeros((6, 3))):
        with pytest.raises(ValueError, match=r"\(6, 4\).*Received: labels"):
            reading.counted(values, labels, np.ones(6))
    with pytest.raises(ValueError, match=r"sample weights of `x`.*\(5,\)"):
        reading.counted(values, np.zeros((6, 4)), np.ones(5))
    with pytest.raises(ValueError, match=r"mask of the model on `x`.*\(6, 5\)"):
        reading.counted(values, np.zeros((6, 4)), None, np.ones((6, 5)))


def test_tensors_of_weights_count_like_arrays():
    values, weights = np.eye(4), ops.convert_to_tensor([1.0, 0.0, 0.0, 2.0])
    found, labels = reading.counted(values, np.arange(4), weights)
    np.testing.assert_array_equal(found, values[to_numpy(weights) > 0])
    assert labels.tolist() == [0, 3]
