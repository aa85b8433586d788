"""From what a user passes to a rule to what the rule works with."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from keras import ops

from keras_halo.ops import ood_scores, packing
from keras_halo.ops.labels import class_indices
from keras_halo.ops.model_output import (
    FITTED,
    finite_rows,
    is_symbolic_or_tensor,
    read_model_output,
    require_fitted,
)
from keras_halo.rejection.fitted import Fingerprint, nearly_equal
from keras_halo.utils.checks import (
    as_number,
    check_finite,
    check_not_masked,
    number_array,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
    """Scores as a rule works with them.

    Args:
        scores: float64 array of shape `(...)`, larger for outliers.
        labels: Integer array of shape `(...)`, the most probable class; `None`
            for plain scores.
        fingerprint: `Fingerprint`; `None` for plain scores.
        logits: Array of shape `(..., K)`; `None` for plain scores.
    """

    scores: np.ndarray
    labels: np.ndarray | None
    fingerprint: Fingerprint | None
    logits: np.ndarray | None = None


def check_fraction(name, value):
    """Returns `value` as a float, or raises unless it lies in `(0, 1)`.

    Args:
        name: String, the name by which an error calls the value.
        value: Number.

    Raises:
        ValueError: If it is no number, NaN, outside of `(0, 1)`, or so small
            that one minus it is one.

    Example:

    >>> check_fraction("risk", 5)
    Traceback (most recent call last):
        ...
    ValueError: `risk` must be a number between 0 and 1, both excluded. ...
    """
    return as_number(
        value,
        name,
        lambda share: 0.0 < share < 1.0 and 1.0 - share != 1.0,
        "a number between 0 and 1, both excluded",
        "Write 5 % as 0.05.",
    )


def read_scores(scores, method, argument="scores", to_judge=False):
    """Reads packed or plain scores.

    Args:
        scores: Packed scores of shape `(..., packed_width)`, or the dictionary
            of a fitted model; with `method=None` plain scores of shape `(...)`.
        method: String, one of `keras_halo.OOD_METHODS`, `"fitted"`, or `None`.
        argument: String, the name by which an error calls the scores.
        to_judge: Boolean, whether the scores are to be judged and not to be
            learned from: none at all are allowed then, and rows that are not
            finite get the score NaN, which is above every threshold. Defaults
            to `False`.

    Returns:
        `Reading`.

    Raises:
        ValueError: If the scores are empty, of a wrong shape or kind, not
            finite, or of several models.

    Example:

    >>> read_scores([1.5, 2.0], method=None).scores.tolist()
    [1.5, 2.0]
    """
    if method is None:
        # Plain scores are compared alone, and keep their precision.
        if isinstance(scores, Mapping):
            raise ValueError(
                f"`{argument}` is a dictionary, but the rule has method=None "
                "and expects plain scores, one number a sample. Use a rule "
                "with `method='fitted'` for the output of a fitted model."
            )
        array = _to_array(scores, argument, to_judge)
        return Reading(_plain(array, argument, to_judge), None, None)
    output = read_model_output(scores, argument)
    array = _to_array(output.scores, argument, to_judge)
    if array.ndim < 2:
        raise ValueError(
            f"`{argument}` must be packed scores of shape `(batch_size, ..., "
            f"num_classes + {packing.NUM_EXTRA_COLUMNS})`, of which the rule "
            f"computes method={method!r}. Received: shape={array.shape}. For "
            "plain scores of your own use a rule with `method=None`."
        )
    num_classes = packing.count_classes(array.shape)
    logits = array[..., :num_classes]
    if not array.size:
        nothing = np.zeros(array.shape[:-1])
        return Reading(nothing, nothing.astype(int), None, logits)
    finite = np.ones(array.shape[:-1], bool)
    if to_judge:
        finite = finite_rows(array, argument)
        if not finite.any():
            rejected = np.full(finite.shape, np.nan)
            return Reading(rejected, np.zeros(finite.shape, int), None, logits)
        # Any row of the same head takes the place of what cannot be read.
        array = np.where(finite[..., None], array, array[finite][0])
    packing.check_packed(array, argument)
    parts = packing.unpack(array)
    far_radius = _common(parts.far_radius, argument)
    if method == FITTED:
        judged = np.asarray(
            ops.convert_to_numpy(require_fitted(output, argument)), "float64"
        )
        if to_judge:
            finite &= finite_rows(judged[..., None], f"{argument}['ood']")
    else:
        judged = ood_scores.ood_score(array, method).astype("float64")
    judged = np.where(finite, judged, np.nan)
    return Reading(
        judged if to_judge else _finite(judged, argument),
        np.argmax(parts.logits, axis=-1),
        Fingerprint(
            num_classes=num_classes,
            embedding_dim=int(_common(parts.embedding_dim, argument)),
            temperature=_common(parts.temperature, argument),
            abstain_logit=(
                0.0 if far_radius else _common(parts.abstain_logit, argument)
            ),
            far_radius=far_radius,
        ),
        parts.logits,
    )


def read_errors(reading, labels=None, errors=None):
    """Marks the samples whose most probable class is wrong.

    Args:
        reading: `Reading`.
        labels: Integers of shape `(...)` or `(..., 1)`, or one-hot of shape
            `(..., K)`. Defaults to `None`.
        errors: Booleans of shape `(...)`, true where the prediction is wrong.
            Defaults to `None`.

    Returns:
        Boolean array of shape `(...)`, or `None` if neither was given.

    Raises:
        ValueError: If both are given, `labels` with plain scores, or one of
            another shape or with values that are not possible.

    Example:

    >>> read_errors(read_scores([1.5, 2.0], None), errors=[0, 1]).tolist()
    [False, True]
    """
    if labels is not None and errors is not None:
        raise ValueError(
            "Received both `labels` and `errors`. Pass one of them: `errors` "
            "says directly which predictions are wrong."
        )
    if errors is not None:
        nothing = not reading.scores.size
        return _checked_errors(_to_array(errors, "errors", nothing), reading)
    if labels is None:
        return None
    if reading.labels is None:
        raise ValueError(
            "`labels` need packed scores, which hold the predicted classes. "
            "Received: `labels` for a rule with method=None. Pass "
            "`errors=predicted != labels` instead."
        )
    labels = class_indices(
        labels,
        reading.fingerprint.num_classes,
        reading.scores.shape,
    )
    return labels != reading.labels


def read_groups(groups, shape):
    """Reads to which group each sample belongs.

    Args:
        groups: Strings or integers of shape `(...)`, or one for each input,
            whose positions then share it.
        shape: Tuple, the shape of the scores.

    Returns:
        Array of this shape, of strings or integers.

    Raises:
        ValueError: If it has another shape or another type, or is masked.

    Example:

    >>> read_groups(["day", "night"], (2, 2)).tolist()
    [['day', 'day'], ['night', 'night']]
    """
    check_not_masked(groups, "groups")
    if _are_names(groups):
        array = np.asarray(groups, object).astype(str)
    else:
        array = number_array(groups, "groups")
        if array.dtype.kind not in "iu" and array.size:
            raise ValueError(
                "`groups` must be strings or integers. Received: "
                f"dtype={array.dtype}. Number or name the groups."
            )
        array = array.astype("int64")
    if array.shape != shape[: array.ndim] or not array.ndim:
        raise ValueError(
            f"`groups` must have the shape {shape} of the scores, or hold one "
            f"group for each of the inputs. Received: shape={array.shape}."
        )
    extra = (1,) * (len(shape) - array.ndim)
    return np.broadcast_to(array.reshape(array.shape + extra), shape)


def _are_names(values):
    """Whether values are strings, in lists or in an array."""
    if isinstance(values, str) or is_symbolic_or_tensor(values):
        return False
    if not isinstance(values, (list, tuple)):
        # Columns of other libraries have dtypes of their own.
        kind = np.asarray(values).dtype.kind
        if kind != "O":
            return kind in "UT"
    flat = np.asarray(values, object).ravel().tolist()
    return bool(flat) and all(isinstance(value, str) for value in flat)


def _to_array(values, argument, may_be_empty=False):
    array = number_array(values, argument)
    if array.dtype.name == "bfloat16":
        array = array.astype("float32")
    if array.size == 0 and not may_be_empty:
        raise ValueError(
            f"`{argument}` must hold at least one sample. Received: "
            f"shape={array.shape}."
        )
    return array


def _plain(array, argument, to_judge):
    if _is_packed(array):
        raise ValueError(
            f"`{argument}` are packed scores, but the rule has method=None and "
            "expects plain scores, one number a sample. Received: "
            f"shape={array.shape}. Use a rule with `method='abstain'`, or pass "
            "`keras_halo.ood_score(scores)`."
        )
    if array.ndim == 0:
        raise ValueError(
            f"`{argument}` must have a batch axis. Received: a single number. "
            "Pass a list of one."
        )
    array = array.astype("float64")
    if to_judge:
        finite = finite_rows(array[..., None], argument)
        return np.where(finite, array, np.nan)
    return _finite(array, argument)


def _finite(scores, argument):
    check_finite(scores, argument)
    return scores


def _is_packed(array):
    if array.ndim < 2:
        return False
    try:
        packing.check_packed(array)
    except ValueError:
        return False
    return True


def _common(column, argument):
    """The one value of a column that is the same for all samples of a head."""
    low, high = float(column.min()), float(column.max())
    if not nearly_equal(low, high):
        raise ValueError(
            f"`{argument}` mix the outputs of several models: expected one "
            "temperature, embedding size and pair of abstain biases. "
            f"Received: values between {low:.7g} and {high:.7g}. Fit and use "
            "one rule a model."
        )
    return low


def _checked_errors(errors, reading):
    shape = reading.scores.shape
    if errors.shape != shape or not np.isin(errors, (0, 1)).all():
        raise ValueError(
            f"`errors` must be booleans of shape {shape}, true where the "
            f"prediction is wrong. Received: shape={errors.shape}, "
            f"dtype={errors.dtype}, values from {errors.min()} to "
            f"{errors.max()}."
        )
    return errors.astype(bool)
