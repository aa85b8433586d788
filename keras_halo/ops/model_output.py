"""One reader of what a model returned: packed scores, alone or with a score."""

import collections
import warnings
from collections.abc import Mapping

import keras
import numpy as np
from keras import ops

from keras_halo.ops import packing
from keras_halo.utils.checks import check_not_masked, number_array
from keras_halo.utils.precision import as_array

# The method that names the score which a model itself emits.
FITTED = "fitted"

ModelOutput = collections.namedtuple("ModelOutput", ["scores", "fitted"])
ModelOutput.__doc__ = """What a model says of its inputs.

Args:
    scores: Packed scores of shape `(..., packed_width)`, an array or a tensor.
    fitted: A score of shape `(...)` that the model emits beside them, larger
        for outliers; `None` without one.
"""


def read_model_output(output, argument="scores"):
    """Reads packed scores, or the dictionary of a fitted model.

    Args:
        output: Array, tensor or list of packed scores, or a dictionary with
            packed scores under `"scores"` and, optionally, a score a row under
            `"ood"`, as the models of `keras_halo.fit_class_gaussians` emit it.
        argument: String, the name by which an error calls the output.

    Returns:
        `ModelOutput`. Values are not inspected.

    Raises:
        ValueError: If it is neither, or the two do not fit each other.

    Example:

    >>> output = {"scores": np.zeros((2, 9)), "ood": np.zeros(2)}
    >>> read_model_output(output).fitted.shape
    (2,)
    >>> read_model_output({"probabilities": np.zeros((2, 3))})
    Traceback (most recent call last):
        ...
    ValueError: `scores` must be packed scores of `keras_halo.HALODense`, or ...
    """
    fitted = None
    scores = output
    if isinstance(output, Mapping):
        scores, fitted = output.get("scores"), output.get("ood")
    check_not_masked(scores, argument)
    if not is_symbolic_or_tensor(scores):
        if scores is None or isinstance(scores, (str, bytes, Mapping)):
            raise ValueError(_expected(argument, output))
        if isinstance(scores, (list, tuple)) and any(
            len(getattr(part, "shape", ())) > 1 for part in scores
        ):
            # The outputs of a model with several of them.
            raise ValueError(_expected(argument, output))
        try:
            scores = as_array(scores)
            scores = number_array(scores, argument, to_float=False)
        except (TypeError, ValueError) as error:
            raise ValueError(_expected(argument, output)) from error
        if scores.dtype.kind == "b":
            raise ValueError(_expected(argument, output))
    packing.check_precision(scores.dtype, argument)
    if fitted is not None:
        check_not_masked(fitted, f"{argument}['ood']")
        if not is_symbolic_or_tensor(fitted):
            fitted = number_array(fitted, f"{argument}['ood']", to_float=False)
            if fitted.dtype.kind == "b":
                raise ValueError(
                    f"The entry 'ood' of `{argument}` must hold real numbers. "
                    f"Received: dtype={fitted.dtype}. Pass what "
                    "`model.predict` returned."
                )
        shapes = tuple(fitted.shape), tuple(scores.shape[:-1])
        if shapes[0] != shapes[1] and None not in shapes[0] + shapes[1]:
            raise ValueError(
                f"The entry 'ood' of `{argument}` must hold one score for each "
                f"row of 'scores'. Received: shape={tuple(fitted.shape)} for "
                f"packed scores of shape {tuple(scores.shape)}. Expected the "
                f"shape {tuple(scores.shape[:-1])}."
            )
    return ModelOutput(scores, fitted)


def is_symbolic_or_tensor(x):
    """Whether `x` is a tensor, or stands for one in the graph of a model."""
    return isinstance(x, keras.KerasTensor) or ops.is_tensor(x)


def require_fitted(output, argument="scores"):
    """The fitted score of a `ModelOutput`; raises `ValueError` without one."""
    if output.fitted is None:
        raise ValueError(
            f"method='fitted' needs a dictionary with the entries 'scores' "
            f"and 'ood' as `{argument}`. Received: packed scores alone. Append "
            "the score with `keras_halo.fit_class_gaussians`, or choose "
            "another method."
        )
    return output.fitted


def finite_rows(scores, argument="scores"):
    """Which rows are finite; warns of the others, which are to be rejected.

    Args:
        scores: NumPy array of shape `(..., n)`.
        argument: String, the name by which a message calls the array.

    Returns:
        Boolean array of shape `(...)`.

    Example:

    >>> finite_rows(np.ones((2, 3))).tolist()
    [True, True]
    """
    finite = np.isfinite(scores).all(axis=-1)
    if finite.all():
        return finite
    warnings.warn(
        f"{int((~finite).sum())} of {finite.size} rows hold NaN or infinite "
        f"values in `{argument}`: they are rejected. Look for NaN in the "
        "inputs of the model, or for the step at which training diverged.",
        stacklevel=3,
    )
    return finite


def _expected(argument, output):
    received = type(output).__name__
    if isinstance(output, Mapping):
        received = f"a dictionary with the entries {sorted(map(str, output))}"
    elif isinstance(output, np.ndarray):
        received = f"an array of dtype={output.dtype}"
    return (
        f"`{argument}` must be packed scores of `keras_halo.HALODense`, or a "
        "dictionary with the entries 'scores' and, for method='fitted', "
        f"'ood'. Received: {received}. Pass what `model.predict` returned, or "
        "select an output with `keras.Model(model.inputs, output)`."
    )
