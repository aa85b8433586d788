"""What the mathematics asks of tensors, as fast as each backend can.

Backends differ in what an operation costs, whether a tensor can be written into
and which gradients exist. The functions here know; the formulas do not.
"""

from keras import backend, ops

from keras_halo.ops.gradients import with_gradient
from keras_halo.utils.types import Tensor

# Tensors of PyTorch can be written into.
WRITES = backend.backend() == "torch"

# Keras takes the weights out of a model that it trains on JAX, and an error
# within a step leaves them out.
ERRORS_COST_WEIGHTS = backend.backend() == "jax"

# Numbers that a block of a matrix may have to stay in the processor's cache.
CACHED_SIZE = 2**18


def as_tensor(variable):
    """The tensor of a variable, which a gradient of one's own can take."""
    if backend.backend() == "tensorflow":
        return ops.reshape(variable, variable.shape)
    return variable


def _is_of_torch(x):
    """Whether `x` is a tensor of PyTorch.

    Its own methods take less time than Keras's operations, which look at the
    types of all that they are given.
    """
    return WRITES and hasattr(x, "clamp")


def sum_columns(matrix):
    """Sum over the last axis, which stays."""
    if _is_of_torch(matrix):
        return matrix.sum(-1, keepdim=True)
    return ops.sum(matrix, axis=-1, keepdims=True)


def sum_rows(matrix):
    """Sum over the first axis, which stays."""
    if _is_of_torch(matrix):
        return matrix.sum(0, keepdim=True)
    return ops.sum(matrix, axis=0, keepdims=True)


def sum_entries(matrix):
    """Sum over all axes, a scalar."""
    return matrix.sum() if _is_of_torch(matrix) else ops.sum(matrix)


def mean_row(matrix):
    """The mean of the rows of a matrix, shape `(1, D)`."""
    num_rows = matrix.shape[0]
    if WRITES:
        # Its sum over rows takes twice as long as this product.
        ones = ops.ones((1, num_rows), dtype=matrix.dtype)
        return (ones @ matrix) * (1.0 / num_rows)
    return ops.sum(matrix, axis=0, keepdims=True) * (1.0 / num_rows)


def squared_norms(matrix):
    """Squared norms of the rows of a matrix, shape `(1, K)`."""
    dtype = backend.standardize_dtype(matrix.dtype)
    if WRITES and dtype == "float32":
        # The squares would fill a second matrix. In float64 they have to:
        # `ops.norm` would round it to float32.
        norms = ops.norm(matrix, axis=-1)
        return ops.expand_dims(norms * norms, axis=0)
    return ops.expand_dims(ops.sum(matrix * matrix, axis=-1), axis=0)


def minus_scaled_rows(total, factors, rows, offset):
    """`total - factors * rows - offset`; may write into `total`."""
    if not WRITES:
        return total - factors * rows - offset
    # In place and in blocks that stay in the cache: most of the time of a
    # fresh matrix goes into its memory pages.
    block = max(1, CACHED_SIZE // rows.shape[-1])
    for start in range(0, rows.shape[0], block):
        stop = start + block
        scaled = factors[start:stop] * rows[start:stop]
        scaled += offset
        total[start:stop] -= scaled
    return total


def at_labels(matrix, labels):
    """The entry of each row of a matrix at its label, shape `(N, 1)`."""
    if WRITES:
        # One operation, where `ops.take_along_axis` takes five.
        rows = ops.arange(labels.shape[0], dtype="int32")
        return matrix[rows, labels[:, 0]][:, None]
    return ops.take_along_axis(matrix, labels, axis=-1)


def plus_at_labels(matrix, labels, values, start=0):
    """`matrix` with one value a row added at its label; may write into it.

    Args:
        matrix: Tensor of shape `(N, K)`.
        labels: Integer tensor of shape `(N, 1)`.
        values: Tensor of shape `(N, 1)`.
        start: Integer, the class of the first column.

    Returns:
        Tensor of shape `(N, K)`. A row whose label has no column is unchanged,
        but on PyTorch all labels need one.
    """
    if WRITES:
        rows = ops.arange(labels.shape[0], dtype="int32")
        matrix[rows, labels[:, 0]] += values[:, 0]
        return matrix
    classes = class_indices(ops.shape(matrix)[-1]) + start
    is_own = ops.cast(ops.equal(labels, classes), matrix.dtype)
    return matrix + is_own * values


def class_indices(num_classes):
    """The classes `0, ..., K - 1`, also where a graph counts them."""
    if ops.is_tensor(num_classes):
        num_classes = ops.cast(num_classes, "int32")
    return ops.arange(num_classes, dtype="int32")


def with_columns(matrix, start, columns):
    """`matrix` with some of its columns replaced; may write into it."""
    if WRITES:
        # `ops.slice_update` would copy the whole matrix.
        matrix[:, start : start + columns.shape[-1]] = columns
        return matrix
    if backend.backend() == "tensorflow":
        return _updated(matrix, columns, ops.cast(start, "int32"))
    return ops.slice_update(matrix, (0, start), columns)


# TensorFlow knows no gradient of its update.
_updated = with_gradient(
    lambda matrix, columns, start: ops.slice_update(
        matrix, (0, start), columns
    ),
    lambda inputs, upstream: (
        _updated(upstream, ops.zeros_like(inputs[1]), inputs[2]),
        ops.slice(upstream, (0, inputs[2]), ops.shape(inputs[1])),
        None,
    ),
    lambda matrix, columns, start: ops.slice_update(
        matrix, (0, start), columns
    ),
)


def bounded(x: Tensor, lower: float, upper: float) -> Tensor:
    """A new tensor of the numbers of `x`, none outside of `[lower, upper]`.

    Formula:

    ```python
    min(max(x, lower), upper)
    ```

    Not by `ops.clip`: on PyTorch it clips against tensors, which takes five
    times as long and does not reach ONNX. Gradients differ on the bounds.

    Args:
        x: Tensor of any shape.
        lower: Float.
        upper: Float.

    Returns:
        Tensor like `x`.

    Example:

    >>> ops.convert_to_numpy(bounded(ops.array([-1.0, 0.5]), 0.0, 1.0)).tolist()
    [0.0, 0.5]
    """
    if _is_of_torch(x):
        return x.clamp(lower, upper)
    if backend.standardize_dtype(x.dtype) == "float64":
        # The others would round it to float32 on JAX.
        return ops.clip(x, lower, upper)
    return ops.minimum(ops.maximum(x, lower), upper)


def log_add_exp(a: Tensor, b: Tensor) -> Tensor:
    """Logarithm of the sum of two exponentials.

    Not `ops.logaddexp`, which rounds float64 to float32.

    Formula:

    ```python
    log(exp(a) + exp(b))
    ```

    Args:
        a: Tensor of any shape.
        b: Tensor of the same shape.

    Returns:
        Tensor like `a`.

    Example:

    >>> round(float(log_add_exp(ops.array(0.0), ops.array(0.0))), 4)
    0.6931
    """
    gap = ops.abs(a - b)
    return ops.where(a > b, a, b) + ops.log(1.0 + ops.exp(-gap))


def max_of_rows(matrix: Tensor) -> Tensor:
    """The largest entry of each row; nothing for no rows.

    Formula:

    ```python
    max(matrix, axis=-1)
    ```

    Args:
        matrix: Tensor of shape `(..., K)`.

    Returns:
        Tensor of shape `(..., 1)`.

    Example:

    >>> ops.convert_to_numpy(max_of_rows(ops.array([[1.0, 3.0]]))).tolist()
    [[3.0]]
    """
    if _has_no_rows(matrix):
        return matrix[..., :1]
    if _is_of_torch(matrix):
        return matrix.amax(-1, keepdim=True)
    return ops.max(matrix, axis=-1, keepdims=True)


def min_of_rows(matrix: Tensor) -> Tensor:
    """The smallest entry of each row; nothing for no rows.

    Formula:

    ```python
    min(matrix, axis=-1)
    ```

    Args:
        matrix: Tensor of shape `(..., K)`.

    Returns:
        Tensor of shape `(..., 1)`.

    Example:

    >>> ops.convert_to_numpy(min_of_rows(ops.array([[1.0, 3.0]]))).tolist()
    [[1.0]]
    """
    if _has_no_rows(matrix):
        return matrix[..., :1]
    return ops.min(matrix, axis=-1, keepdims=True)


def _has_no_rows(matrix):
    """Whether Keras would refuse a maximum over the last axis on PyTorch."""
    return 0 in tuple(matrix.shape[:-1])


def best_of_rows(matrix: Tensor) -> Tensor:
    """The largest entry of each row, for what the backend differentiates.

    The gradient of a maximum goes to the entries that equal it. A compiler may
    compute both anew for that, and round them otherwise: no entry is equal
    then, and the gradient is infinite. That of a position cannot fail so.

    Formula:

    ```python
    matrix[i, argmax(matrix[i])]
    ```

    Args:
        matrix: Tensor of shape `(..., K)`.

    Returns:
        Tensor of shape `(..., 1)`. The gradient goes to the first of equals.

    Example:

    >>> ops.convert_to_numpy(best_of_rows(ops.array([[1.0, 3.0]]))).tolist()
    [[3.0]]
    """
    best = ops.stop_gradient(max_of_rows(matrix))
    picked = ops.sum(
        ops.where(
            is_best_of_rows(matrix), matrix - ops.stop_gradient(matrix), 0.0
        ),
        axis=-1,
        keepdims=True,
    )
    # Not the value that was picked: with NaN in a row, it may be another.
    return best + picked


def is_best_of_rows(matrix: Tensor) -> Tensor:
    """Where the largest entry of each row is; the first of equals.

    Formula:

    ```python
    arange(K) == argmax(matrix, axis=-1)
    ```

    Args:
        matrix: Tensor of shape `(..., K)`.

    Returns:
        Boolean tensor of shape `(..., K)`, true once in each row.

    Example:

    >>> is_best = is_best_of_rows(ops.array([[1.0, 3.0, 3.0]]))
    >>> ops.convert_to_numpy(is_best).tolist()
    [[False, True, False]]
    """
    winner = ops.argmax(ops.stop_gradient(matrix), axis=-1, keepdims=True)
    # As many as there are, also where a graph does not know.
    positions = ops.arange(0, ops.shape(matrix)[-1], dtype="int32")
    return ops.equal(positions, ops.cast(winner, "int32"))
