"""One reader for everything that `model.predict` takes, labels included."""

import types

import keras
import numpy as np

from keras_halo.utils import keras_private
from keras_halo.utils.checks import (
    check_batch_size,
    check_not_masked,
    label_array,
)
from keras_halo.utils.weights import counted_positions, weights_of_samples


def check_readable(data, where, again=False):
    """Refuses what cannot be read, or cannot be read to its end.

    Args:
        data: Arrays or a dataset, see `read_batches`.
        where: String, the name by which an error calls the data.
        again: Boolean, whether the data will be read more than once. Defaults
            to `False`.

    Raises:
        ValueError: If the data are none, empty or infinite, a generator is to
            be read again, or labels or weights are no arrays.

    Example:

    >>> check_readable((i for i in range(3)), "known", again=True)
    Traceback (most recent call last):
        ...
    ValueError: `known` is a generator, which can be read only once. ...
    """
    if isinstance(data, types.GeneratorType):
        if again:
            raise ValueError(
                f"`{where}` is a generator, which can be read only once. "
                "Expected arrays or a dataset that can be read every epoch, "
                f"such as `keras.utils.PyDataset`. Received: {data}."
            )
        return
    if not is_dataset(data):
        x, y, sample_weight = _unpacked(data)
        check_arrays(x, where)
        is_list = isinstance(y, (dict, list, tuple))
        if y is not None and not is_list and np.ndim(y) == 0:
            raise ValueError(
                f"The labels of `{where}` must be an array with one label a "
                f"sample. Received: {y!r:.100}. Leave them out where they are "
                "not known."
            )
        if sample_weight is not None:
            count = len(keras.tree.flatten(x)[0])
            weights_of_samples(sample_weight, count, where)
        return
    infinite = (
        isinstance(data, keras.utils.PyDataset) and data.num_batches is None
    )
    if keras_private.is_tf_dataset(data) and hasattr(data, "cardinality"):
        # tf.data.INFINITE_CARDINALITY
        infinite = int(data.cardinality()) == -1
    if infinite:
        raise ValueError(
            f"`{where}` is infinite. Expected data with an end. Received: "
            f"{type(data).__name__}. Leave out `repeat()`, or take a number of "
            "batches of it."
        )
    if not keras_private.is_tf_dataset(data):
        _check_adapter(data, f"`{where}` cannot be read. Received: ")


def _check_adapter(data, expected):
    """Raises `ValueError` for what Keras itself cannot read either."""
    try:
        count_batches(data)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{expected}{data!r:.100}. Load a file, or make an array of a "
            f"list, before. ({error})"
        ) from error


def check_arrays(x, where):
    """Raises `ValueError` unless these are arrays with an axis of samples.

    Args:
        x: What should be an array, or a list or dictionary of arrays.
        where: String, the name by which an error calls them.

    Example:

    >>> check_arrays("train.npz", "x")
    Traceback (most recent call last):
        ...
    ValueError: `x` must be an array whose first axis is that of samples, ...
    """
    expected = (
        f"`{where}` must be an array whose first axis is that of samples, a "
        "list or dictionary of such arrays, or a dataset. Received: "
    )
    leaves = keras.tree.flatten(x)
    shapes = [getattr(leaf, "shape", None) for leaf in leaves]
    # Keras 3.10 has no words of its own for `None`.
    if not leaves or any(leaf is None for leaf in leaves):
        raise ValueError(f"{expected}{x!r:.100}.")
    if None in shapes:
        _check_adapter(x, expected)
        return
    for leaf, shape in zip(leaves, shapes, strict=True):
        check_not_masked(leaf, where)
        if len(shape) == 0:
            raise ValueError(
                f"{expected}a single value, shape=(). For one sample pass "
                "`x[None]`."
            )
        if shape[0] == 0:
            raise ValueError(
                f"`{where}` must hold at least one sample. Received: "
                f"shape={tuple(shape)}. Check the path of the data, or the "
                "condition that selected from it."
            )


def check_numbers(x):
    """Raises `ValueError` for arrays of strings or objects.

    Keras makes no tensors of them. Data sets may yield strings.

    Args:
        x: Arrays, or a data set.

    Example:

    >>> check_numbers(np.array(["a", "b"]))
    Traceback (most recent call last):
        ...
    ValueError: Inputs must be arrays of numbers. Received: dtype=<U1, ...
    """
    for leaf in keras.tree.flatten(x):
        if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "OSU":
            raise ValueError(
                "Inputs must be arrays of numbers. Received: "
                f"dtype={leaf.dtype}, shape={leaf.shape}. Convert them with "
                '`np.asarray(x, "float32")`; rows of different lengths need '
                "padding first. For a model that takes strings pass a "
                "`tf.data.Dataset`."
            )


def count_batches(data, batch_size=None):
    """Returns the number of batches, or `None` if it cannot be known.

    Example:

    >>> count_batches(np.zeros((70, 3)), batch_size=32)
    3
    """
    if isinstance(data, types.GeneratorType):
        return None
    if is_list_of_batches(data):
        return len(data)
    return _to_adapter(data, batch_size).num_batches


def read_batches(data, batch_size=None):
    """Reads data once, batch by batch, inputs together with their labels.

    Args:
        data: A tuple `(x,)`, `(x, y)` or `(x, y, sample_weight)` of arrays; an
            array, or a list or dictionary of arrays for a model with many
            inputs; a `tf.data.Dataset`, a torch `DataLoader`, a
            `keras.utils.PyDataset`, a generator or a list of such tuples.
        batch_size: Optional integer, for arrays. Defaults to `None`, which
            means 32.

    Yields:
        Tuples `(x, y, sample_weight)` of NumPy arrays, `None` for what is not
        there.

    Example:

    >>> batches = read_batches((np.zeros((3, 2)), np.arange(3)), batch_size=2)
    >>> [y.tolist() for _, y, _ in batches]
    [[0, 1], [2]]
    """
    adapter = _to_adapter(data, batch_size)
    adapter.on_epoch_begin()
    try:
        if keras_private.is_torch_dataloader(data):
            batches = _torch_batches(data)
        else:
            batches = adapter.get_numpy_iterator()
        for batch in batches:
            yield keras.utils.unpack_x_y_sample_weight(batch)
    finally:
        adapter.on_epoch_end()


def _to_adapter(data, batch_size):
    if is_list_of_batches(data):
        # Keras would take a list for the inputs of one batch.
        data = (tuple(batch) for batch in data)
    # A tuple is a batch in Keras's sense; a list is a list of inputs.
    x, y, sample_weight = _unpacked(data)
    check_numbers(x)
    return keras_private.data_adapter(
        x, _listed(y), _listed(sample_weight), check_batch_size(batch_size)
    )


def _unpacked(data):
    """Inputs, labels and weights of arrays, `None` for what is not there."""
    if isinstance(data, tuple):
        return keras.utils.unpack_x_y_sample_weight(data)
    return data, None, None


def _listed(values):
    """Labels in a list: there is one output, so they are no list of arrays."""
    return np.asarray(values) if isinstance(values, list) else values


def _torch_batches(loader):
    # The adapter would take a batch that is one bare tensor for a tuple.
    for batch in loader:
        yield keras.tree.map_structure(
            lambda t: np.asarray(t.cpu() if hasattr(t, "cpu") else t), batch
        )


def is_dataset(x):
    """Whether `x` yields batches by itself, labels included.

    Example:

    >>> is_dataset(np.zeros((3, 2))), is_dataset(i for i in range(3))
    (False, True)
    """
    return (
        isinstance(x, (types.GeneratorType, keras.utils.PyDataset))
        or keras_private.is_tf_dataset(x)
        or keras_private.is_torch_dataloader(x)
        or hasattr(x, "as_numpy_iterator")
        or is_list_of_batches(x)
    )


def is_list_of_batches(x):
    """Whether `x` is a list of batches, and no list of inputs.

    Example:

    >>> x, y = np.zeros((3, 2)), np.zeros(3)
    >>> is_list_of_batches([(x, y), (x, y)]), is_list_of_batches([x, x])
    (True, False)
    """
    return (
        isinstance(x, list)
        and all(isinstance(batch, (tuple, list)) for batch in x)
        and any(hasattr(leaf, "shape") for leaf in keras.tree.flatten(x))
    )


def labelled_data(x, y=None, sample_weight=None):
    """Joins inputs, labels and weights into what `read_batches` takes.

    Args:
        x: Arrays; a tuple `(x, y)` or `(x, y, sample_weight)` of them; or a
            dataset of such batches, which may be a list.
        y: Optional array of labels, for arrays. Defaults to `None`.
        sample_weight: Optional array of weights, for arrays. Defaults to
            `None`.

    Returns:
        A tuple `(x, y, sample_weight)`, or a dataset.

    Raises:
        ValueError: If labels or weights are given beside a dataset, which has
            its own and may yield them in any order; if labels are missing, no
            numbers, or not as many as the inputs.

    Example:

    >>> labelled_data((batch for batch in []), np.zeros(3))
    Traceback (most recent call last):
        ...
    ValueError: `y` belongs to arrays `x`. Received: y beside a generator, ...
    """
    # With labels beside them, lists in a list are inputs that are nested.
    are_nested = (
        y is not None
        and is_list_of_batches(x)
        and not any(isinstance(part, tuple) for part in x)
    )
    if is_dataset(x) and not are_nested:
        for name, value in (("y", y), ("sample_weight", sample_weight)):
            if value is not None:
                raise ValueError(
                    f"`{name}` belongs to arrays `x`. Received: {name} beside "
                    f"a {type(x).__name__}, which yields its own and may "
                    "shuffle. Let it yield batches `(x, y)` or `(x, y, "
                    "sample_weight)`."
                )
        return x
    if isinstance(x, tuple) and y is None and sample_weight is None:
        x, y, sample_weight = _unpacked(x)
    if y is None:
        if sample_weight is not None:
            raise ValueError(
                "`sample_weight` belongs to arrays `x` and `y`. Received: "
                "y=None. Let the dataset yield batches `(x, y, "
                "sample_weight)`."
            )
        raise ValueError(
            f"Labels are missing. Received: {type(x).__name__} as `x` and "
            "y=None. Pass `y`, or a dataset of batches `(x, y)`."
        )
    leaves = [v for v in keras.tree.flatten(x) if hasattr(v, "shape")]
    check_arrays(x, "x")
    y = label_array(y, "y")
    if y.ndim == 0:
        raise ValueError(
            "Expected one label for every input. Received: a single number "
            f"as `y`, {y}. Pass an array of labels."
        )
    if leaves and len(y) != len(leaves[0]):
        raise ValueError(
            "Expected one label for every input. Received: "
            f"{len(leaves[0])} inputs and {len(y)} labels."
        )
    if sample_weight is not None:
        sample_weight = weights_of_samples(sample_weight, len(y), "x")
    return x, y, sample_weight


def counted(values, labels, sample_weight, mask=None):
    """Leaves out what is masked or has a weight of zero, such as padding.

    Args:
        values: Array of shape `(B, ..., D)`.
        labels: Array of shape `(B, ...)`, `(B, ..., 1)` or `(B, ..., K)`.
        sample_weight: Weights of shape `(B,)` or `(B, ...)`, or `None`.
        mask: Optional booleans of shape `(B, ...)`, false for what does not
            count either. Defaults to `None`.

    Returns:
        Values and labels, as they are where there are neither weights nor a
        mask, otherwise with a single axis in place of `(B, ...)`.

    Raises:
        ValueError: If weights or labels do not fit, or a weight is negative or
            NaN.

    Example:

    >>> counted(np.eye(2), np.array([0, -1]), [1.0, 0.0])
    (array([[1., 0.]]), array([0]))
    """
    if sample_weight is None and mask is None:
        return values, labels
    kept = counted_positions(sample_weight, values.shape[:-1], "x", mask)
    labels = label_array(labels)
    if labels.shape[: kept.ndim] != kept.shape:
        raise ValueError(
            "Expected one label for every sample or position, of shape "
            f"{kept.shape}. Received: labels of shape {labels.shape}."
        )
    return values[kept], labels[kept]
