"""Checks of arguments and arrays that several parts of the package take."""

import contextlib
import math
import numbers
from collections.abc import Mapping

import keras
import numpy as np
from keras import ops


def as_integer(value, argument, least=None, meaning="", remedy=""):
    """Returns an integer of Python, or says what is wrong with it.

    Takes the integers of NumPy too, which are what a length or a maximum is
    there; JSON could not hold them.

    Args:
        value: What should be an integer.
        argument: String, the name by which an error calls it.
        least: Optional integer, the smallest that is allowed. Defaults to
            `None`.
        meaning: String, what an error says of the argument beside.
        remedy: String, what to do.

    Returns:
        Integer.

    Raises:
        ValueError: If it is no integer, a boolean, or too small.

    Example:

    >>> as_integer(np.int64(3), "num_bins", least=1)
    3
    >>> as_integer(2.5, "num_bins", least=1)
    Traceback (most recent call last):
        ...
    ValueError: `num_bins` must be a positive integer. Received: ...
    """
    if (
        not isinstance(value, numbers.Integral)
        or isinstance(value, bool)
        or (least is not None and value < least)
    ):
        kinds = {None: "an", 0: "a non-negative", 1: "a positive"}
        kind = kinds.get(least, "an") + " integer"
        if least not in kinds:
            kind += f" of at least {least}"
        raise ValueError(
            f"`{argument}` must be {kind}{meaning}. Received: "
            f"{argument}={value!r:.100}. {remedy}".rstrip()
        )
    return int(value)


def as_number(value, argument, fits, expected, remedy=""):
    """Returns a float of Python, or says what is wrong with it.

    Args:
        value: What should be a real number, of Python or NumPy.
        argument: String, the name by which an error calls it.
        fits: Function of a float, whether it is allowed. Of NaN, which
            compares as false with everything, it is not asked.
        expected: String, what an error says is allowed.
        remedy: String, what to do.

    Returns:
        Float.

    Raises:
        ValueError: If it is no number, a boolean, NaN, or not allowed.

    Example:

    >>> as_number("0.1", "mass", lambda v: 0 < v <= 1, "in (0, 1]")
    Traceback (most recent call last):
        ...
    ValueError: `mass` must be in (0, 1]. Received: mass='0.1'.
    """
    number = math.nan
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            # An integer of Python that no float holds.
            number = math.inf if value > 0 else -math.inf
    if number != number or not fits(number):
        raise ValueError(
            f"`{argument}` must be {expected}. Received: "
            f"{argument}={value!r:.100}. {remedy}".rstrip()
        )
    return number


def as_boolean(value, argument, remedy=""):
    """Returns a boolean of Python, or says what is wrong with it.

    Args:
        value: What should be a boolean, of Python or NumPy.
        argument: String, the name by which an error calls it.
        remedy: String, what to do.

    Returns:
        Boolean.

    Raises:
        ValueError: If it is anything else, such as a string, which would be
            true whatever it says.

    Example:

    >>> as_boolean("no", "distill")
    Traceback (most recent call last):
        ...
    ValueError: `distill` must be True or False. Received: distill='no'.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(
            f"`{argument}` must be True or False. Received: "
            f"{argument}={value!r:.100}. {remedy}".rstrip()
        )
    return bool(value)


def check_string(value, argument, remedy=""):
    """Raises `ValueError` unless this is a string."""
    if not isinstance(value, str):
        raise ValueError(
            f"`{argument}` must be a string. Received: "
            f"{argument}={value!r:.100}. {remedy}".rstrip()
        )


def check_not_taken(given, reasons, owner):
    """Raises `ValueError` for arguments of Keras that make no sense here.

    Args:
        given: Dictionary of name to value, the arguments beside the known ones.
        reasons: Dictionary of name to string, why there is no such argument
            and what to do.
        owner: String, what the arguments are given to.

    Example:

    >>> check_not_taken({"axis": 1}, {"axis": "classes are last"}, "HALOLoss")
    Traceback (most recent call last):
        ...
    ValueError: `HALOLoss` takes no `axis`: classes are last. Received: axis=1.
    """
    for name, reason in reasons.items():
        if name in given:
            raise ValueError(
                f"`{owner}` takes no `{name}`: {reason}. Received: "
                f"{name}={given[name]!r:.100}."
            )


def as_list(values, argument, kinds, expected, remedy="", least=0):
    """Returns a list of Python of things of a kind, or says what is wrong.

    Args:
        values: What should be several things that can be gone through.
        argument: String, the name by which an error calls them.
        kinds: Type or tuple of types that they may have.
        expected: String, what an error says is allowed.
        remedy: String, what to do.
        least: Integer, how many there must be. Defaults to `0`.

    Returns:
        List.

    Raises:
        ValueError: If it is a string or a dictionary, cannot be gone through,
            is too short, or holds anything of another kind.

    Example:

    >>> as_list("cat", "names", str, "a list of strings")
    Traceback (most recent call last):
        ...
    ValueError: `names` must be a list of strings. Received: names='cat'.
    """
    found = None
    if not isinstance(values, (str, bytes, Mapping)):
        # An array without an axis has all that lists have, and is none.
        with contextlib.suppress(TypeError):
            found = list(values)
    if (
        found is None
        or len(found) < least
        or not all(isinstance(value, kinds) for value in found)
    ):
        raise ValueError(
            f"`{argument}` must be {expected}. Received: "
            f"{argument}={values!r:.100}. {remedy}".rstrip()
        )
    return found


def check_units(units):
    """Returns the number of classes; raises `ValueError` below 2."""
    return as_integer(
        units,
        "units",
        2,
        ", the number of classes: the centroid of a single class would "
        "coincide with the origin, where abstaining sits",
        "For a yes-or-no question use units=2.",
    )


def check_embedding_dim(embedding_dim):
    """Returns the size, `"auto"` or `None`; raises `ValueError` otherwise."""
    if embedding_dim is None or (
        isinstance(embedding_dim, str) and embedding_dim == "auto"
    ):
        return embedding_dim
    return as_integer(
        embedding_dim,
        "embedding_dim",
        2,
        ", 'auto', or `None` for the input as it is",
        "Leave it out for a size that fits the number of classes.",
    )


def check_abstain_rate(abstain_rate):
    """Returns `None` or a float in `[0, 0.5)`; raises `ValueError`."""
    if abstain_rate is None:
        return None
    return as_number(
        abstain_rate,
        "abstain_rate",
        lambda rate: 0.0 <= rate < 0.5,
        "in [0, 0.5), the share of training samples to abstain from, or "
        "`None` for the fixed margin of the published method",
        "Write 1 % as 0.01.",
    )


def check_label_smoothing(label_smoothing):
    """Returns a float; raises `ValueError` unless it is in `[0, 1)`."""
    return as_number(
        label_smoothing,
        "label_smoothing",
        lambda share: 0.0 <= share < 1.0,
        "in [0, 1)",
        "Use 0 to switch it off.",
    )


def check_block_size(block_size):
    """Returns `None` or a positive integer; raises `ValueError`."""
    if block_size is None:
        return None
    return as_integer(
        block_size, "block_size", 1, ", or `None` for all classes at once"
    )


def check_ignore_class(ignore_class):
    """Returns `None` or an integer of int32; raises `ValueError` otherwise."""
    if ignore_class is None:
        return None
    found = as_integer(
        ignore_class,
        "ignore_class",
        meaning=", the label that does not count, or `None`",
    )
    # Labels are compared with it in int32.
    if not -(2**31) <= found < 2**31:
        raise ValueError(
            "`ignore_class` must be a label that int32 holds, from -2**31 to "
            f"2**31 - 1. Received: ignore_class={found}. Give what does not "
            "count another label, such as -1."
        )
    return found


def check_batch_size(batch_size):
    """Returns `None` or a positive integer; raises `ValueError` otherwise."""
    if batch_size is None:
        return None
    return as_integer(
        batch_size, "batch_size", 1, ", or `None` for batches of 32"
    )


def check_verbose(verbose):
    """Returns 0, 1, 2 or `"auto"`; raises `ValueError` otherwise."""
    if isinstance(verbose, str) and verbose == "auto":
        return verbose
    # Keras takes booleans for 0 and 1.
    is_integer = isinstance(verbose, (numbers.Integral, np.bool_))
    if not is_integer or verbose not in (0, 1, 2):
        raise ValueError(
            "`verbose` must be 0, 1, 2 or 'auto'. Received: "
            f"verbose={verbose!r:.100}. Use 0 for silence."
        )
    return int(verbose)


def check_model(model):
    """Raises `ValueError` unless this is a Keras model."""
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"Expected a `keras.Model`. Received: model={model!r:.100}. Pass "
            "the trained model itself; `keras.saving.load_model(path)` makes "
            "one of a file."
        )


def check_floating(dtype, layer):
    """Raises `ValueError` unless embeddings of a dtype suit a layer."""
    dtype = keras.backend.standardize_dtype(dtype)
    if "float" not in dtype:
        raise ValueError(
            f"`{type(layer).__name__}` takes embeddings in floating point. "
            f"Received: dtype={dtype}. Cast the input to float32, or put the "
            "network that computes embeddings before the head."
        )


def check_feature_axis(shape, layer):
    """Raises `ValueError` for a single number in the place of features."""
    if len(shape) == 0:
        raise ValueError(
            f"`{type(layer).__name__}` takes features of shape `(batch_size, "
            f"..., features)`. Received: shape={tuple(shape)}. Give it what "
            "the network before it emits."
        )


# Beyond this, float64 does not hold every integer.
_LARGEST_INTEGER = 2**53

# Of an array of NumPy.
_MOST_AXES = 64


def number_array(values, argument, remedy=None, to_float=True):
    """Returns what should be numbers as an array, in the dtype that it has.

    The one way by which values of users become arrays.

    Args:
        values: Array, tensor, or what NumPy makes an array of.
        argument: String, the name by which an error calls the values.
        remedy: Optional string, what to do about values that are no numbers.
        to_float: Boolean, whether the values will be compared as floats, so
            that integers beyond 2**53 are refused. Defaults to `True`.

    Returns:
        NumPy array of real numbers or booleans.

    Raises:
        ValueError: If the values are no real numbers, ragged, masked, or
            integers that float64 cannot tell apart.

    Example:

    >>> number_array([1, 2], "labels").tolist()
    [1, 2]
    >>> number_array([1.0, None], "scores")
    Traceback (most recent call last):
        ...
    ValueError: `scores` must be an array of real numbers. Received: ...
    """
    if ops.is_tensor(values):
        values = ops.convert_to_numpy(values)
    check_not_masked(values, argument)
    received = None
    try:
        array = np.asarray(values)
    except (TypeError, ValueError) as error:
        received = f"{type(values).__name__} ({error})"
    else:
        # NumPy has no kind of its own for bfloat16.
        if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
            received = f"dtype={array.dtype}"
            if array.ndim == 0:
                received = f"{values!r:.100}"
    if received is not None:
        raise ValueError(
            f"`{argument}` must be an array of real numbers. Received: "
            f"{received}. "
            + (remedy or 'Convert it with `np.asarray(values, "float32")`.')
        )
    wide = array.dtype.kind in "iu" and array.dtype.itemsize > 4
    if to_float and wide and array.size:
        # Not by magnitude: that of the smallest int64 is negative.
        low, high = int(array.min()), int(array.max())
        if max(-low, high) > _LARGEST_INTEGER:
            raise ValueError(
                f"`{argument}` must hold numbers up to 2**53 in magnitude: "
                "beyond, float64 takes neighbouring integers for the same. "
                f"Received: integers from {low} to {high}. Subtract what they "
                "share, or number them with `np.unique(values, "
                "return_inverse=True)[1]`."
            )
    return array


def check_not_masked(values, argument):
    """Raises `ValueError` for a masked array, whose mask would be lost.

    Args:
        values: Anything; of a list, what it holds is checked.
        argument: String, the name by which an error calls the values.
    """
    masked = _masked_part(values)
    if masked is not None:
        raise ValueError(
            f"`{argument}` must not be a masked array: its mask would be lost. "
            f"Received: {np.ma.count_masked(masked)} of {masked.size} values "
            "masked. Leave them out of all arrays that belong together: "
            "`kept = ~np.ma.getmaskarray(values)`, `values.data[kept]`."
        )


def _masked_part(values, depth=_MOST_AXES):
    """The first masked array that values are, or hold in lists."""
    if isinstance(values, np.ma.MaskedArray):
        return values
    # A list may hold itself.
    if not isinstance(values, (list, tuple)) or not depth:
        return None
    # By the types, of which there are few: numbers are passed over fast.
    kinds = (list, tuple, np.ma.MaskedArray)
    if not any(issubclass(kind, kinds) for kind in set(map(type, values))):
        return None
    found = (_masked_part(part, depth - 1) for part in values)
    return next((part for part in found if part is not None), None)


def to_array(values, argument):
    """Returns values as a float64 array, also those of a backend's tensor.

    Args:
        values: Array, tensor, or what NumPy makes an array of.
        argument: String, the name by which an error calls the values.

    Returns:
        NumPy array of float64.

    Raises:
        ValueError: See `number_array`.

    Example:

    >>> to_array([1, 2], "scores").tolist()
    [1.0, 2.0]
    """
    return number_array(values, argument).astype("float64")


def label_array(labels, argument="labels"):
    """Returns labels as an array in the dtype that they have.

    Args:
        labels: Array, tensor, or what NumPy makes an array of.
        argument: String, the name by which an error calls the labels.
            Defaults to `"labels"`.

    Returns:
        NumPy array of numbers.

    Raises:
        ValueError: See `number_array`.

    Example:

    >>> label_array(["cat"])
    Traceback (most recent call last):
        ...
    ValueError: `labels` must be an array of real numbers. Received: ...
    """
    return number_array(
        labels,
        argument,
        "Labels must be numbers. Encode them first, for example with "
        "`keras.layers.StringLookup` or `np.unique(labels, "
        "return_inverse=True)[1]`.",
    )


def weight_array(sample_weight, argument="sample_weight"):
    """Returns sample weights as a float64 array.

    Args:
        sample_weight: Array, tensor, or what NumPy makes an array of.
        argument: String, the name by which an error calls the weights.
            Defaults to `"sample_weight"`.

    Returns:
        NumPy array of float64 with at least one axis.

    Raises:
        ValueError: If the weights are no numbers, a single number, negative,
            NaN or infinite.

    Example:

    >>> weight_array([1, -1])
    Traceback (most recent call last):
        ...
    ValueError: `sample_weight` must hold finite numbers that are not ...
    """
    weights = to_array(sample_weight, argument)
    if weights.ndim == 0:
        raise ValueError(
            f"`{argument}` must be an array with one number a sample. "
            f"Received: {sample_weight!r:.100}. Leave it out where all samples "
            "count the same."
        )
    # Written so that NaN fails.
    wrong = ~((weights >= 0.0) & (weights < np.inf))
    if wrong.any():
        raise ValueError(
            f"`{argument}` must hold finite numbers that are not negative. "
            f"Received: {int(wrong.sum())} of {wrong.size} others, among them "
            f"{weights[wrong][0]}. Give what must not count a weight of zero."
        )
    return weights


def finite_vector(values, argument):
    """Returns values as a float64 vector, or says what is wrong with them.

    Args:
        values: What should be a non-empty 1-D array of finite numbers.
        argument: String, the name by which an error calls the array.

    Returns:
        1-D NumPy array of float64.

    Raises:
        ValueError: If the array is empty, not 1-D, or holds NaN or infinite
            values.

    Example:

    >>> finite_vector([0.5, float("nan")], "known")
    Traceback (most recent call last):
        ...
    ValueError: `known` must be finite. Received: 1 of 2 values are NaN or ...
    """
    values = to_array(values, argument)
    if values.ndim != 1:
        raise ValueError(
            f"`{argument}` must be a 1-D array with one number a sample. "
            f"Received: shape={values.shape}. Flatten it first."
        )
    if values.size == 0:
        raise ValueError(
            f"`{argument}` must hold at least one sample. Received: an empty "
            "array. Check the data set, or the condition that selected from it."
        )
    check_finite(values, argument)
    return values


def check_finite(values, argument, remedy=None):
    """Raises `ValueError` if an array holds NaN or infinite values.

    Args:
        values: NumPy array of floats.
        argument: String, the name by which an error calls the array.
        remedy: Optional string, what to do. Defaults to `None`, where to look
            in what a model returned.
    """
    finite = np.isfinite(values)
    if not finite.all():
        raise ValueError(
            f"`{argument}` must be finite. Received: {int((~finite).sum())} of "
            f"{finite.size} values are NaN or infinite. "
            + (
                remedy
                or "Look for the step at which training diverged, or for NaN "
                "in the inputs of the model."
            )
        )
