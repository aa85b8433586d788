"""What a guarded model answered, and whether a rule can have decided so."""

import collections
from collections.abc import Mapping

import numpy as np

from keras_halo.ops.labels import ABSTAINED
from keras_halo.rejection.decisions import Decisions
from keras_halo.utils.checks import number_array

# A score that another engine rounds may lie on the other side of its
# threshold, but not further from it than this.
_TOLERANCE = 1e-3

Answers = collections.namedtuple(
    "Answers", ["labels", "scores", "p_values", "accepted"]
)
Answers.__doc__ = """Decisions as arrays of one shape.

Args:
    labels: Integers, -1 for rejected; `None` for a rule on plain scores.
    scores: Float64 array.
    p_values: Array; `None` where the rule gives none.
    accepted: Boolean array.
"""


def are_answers(values):
    """Whether values are the dictionary that a guarded model returns.

    Args:
        values: Anything.

    Example:

    >>> are_answers({"label": [0], "score": [0.5]}), are_answers([0.5])
    (True, False)
    """
    return isinstance(values, Mapping) and {"label", "score"} <= set(values)


def read_answers(answers):
    """Reads what a guarded model, or a rule, answered.

    Args:
        answers: What a model of `keras_halo.guard` returned, or `Decisions` of
            `rule.predict`.

    Returns:
        `Answers`.

    Raises:
        ValueError: If it is neither.

    Example:

    >>> answers = {"label": np.array([2, -1]), "score": np.array([0.5, 9.0])}
    >>> read_answers(answers).accepted.tolist()
    [True, False]
    """
    if isinstance(answers, Decisions):
        return Answers(answers.labels, answers.scores, None, answers.accepted)
    if not are_answers(answers):
        received = f"{answers!r:.100}"
        if isinstance(answers, Mapping):
            received = f"a dictionary of {sorted(map(str, answers))}"
        raise ValueError(
            "`answers` must be what a model of `keras_halo.guard` returned, "
            "with 'label' and 'score', or `Decisions` of `rule.predict`. "
            f"Received: {received}."
        )
    arrays = {
        name: number_array(answers[name], f"answers[{name!r}]")
        for name in ("label", "score", "p_value")
        if name in answers
    }
    labels, scores = arrays["label"], arrays["score"].astype("float64")
    shapes = {name: array.shape for name, array in arrays.items()}
    if len(set(shapes.values())) > 1 or scores.ndim == 0:
        raise ValueError(
            "`answers` must hold one label, score and p-value a decision, with "
            f"a batch axis. Received: shapes {shapes}."
        )
    if labels.dtype.kind not in "iu" or (labels < ABSTAINED).any():
        raise ValueError(
            "`answers['label']` must hold integers, -1 for rejected. Received: "
            f"dtype={labels.dtype}, from {labels.min(initial=0)} on."
        )
    p_values = arrays.get("p_value")
    if p_values is not None and (
        (p_values < 0.0).any() or (p_values > 1.0).any()
    ):
        raise ValueError(
            "`answers['p_value']` must lie in [0, 1]. Received: from "
            f"{p_values.min()} to {p_values.max()}."
        )
    return Answers(labels, scores, p_values, labels != ABSTAINED)


def thresholds_of(certificate):
    """The thresholds in a certificate, one or one for each group.

    Args:
        certificate: Dictionary, what `rule.certificate()` returns.

    Returns:
        Float64 vector.

    Example:

    >>> thresholds_of({"threshold": 2.0}).tolist()
    [2.0]
    """
    return np.atleast_1d(np.asarray(certificate["threshold"], "float64"))


def check_own(answers, certificate):
    """Raises `ValueError` unless a rule can have decided so.

    Where groups have thresholds of their own, a rejected input does not tell
    its group: nothing above all thresholds is accepted, nothing below all of
    them rejected. A rule that judges whole batches may accept what lies above.

    Args:
        answers: `Answers`.
        certificate: Dictionary, what `rule.certificate()` returns.

    Raises:
        ValueError: If it cannot.

    Example:

    >>> answers = {"label": np.array([2]), "score": np.array([3.0])}
    >>> check_own(read_answers(answers), {"threshold": 1.0})
    Traceback (most recent call last):
        ...
    ValueError: `answers` are not those of this rule: ...
    """
    thresholds = thresholds_of(certificate)
    lowest, highest = thresholds.min(), thresholds.max()
    scores, accepted = answers.scores, answers.accepted
    margin = _TOLERANCE * np.maximum(
        1.0, np.maximum(np.abs(scores), np.abs(thresholds).max())
    )
    # NaN is rejected, and compares as neither.
    too_high = ~(scores <= highest + margin)
    # Others in the batch may have let an input pass.
    too_high &= certificate.get("judges_singly", True)
    wrong = np.where(accepted, too_high, scores < lowest - margin)
    if wrong.any():
        index = tuple(int(i) for i in np.argwhere(wrong)[0])
        decision = "accepted" if accepted[index] else "rejected"
        raise ValueError(
            "`answers` are not those of this rule: expected scores up to "
            f"{highest if accepted[index] else lowest:.7g} accepted. Received: "
            f"the score {scores[index]:.7g} {decision}. Pass the answers of "
            "the model that the rule guards."
        )
