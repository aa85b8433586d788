import dataclasses
import itertools
import os
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import numpy as np

from keras_halo.ops.labels import ABSTAINED
from keras_halo.rejection.answers import thresholds_of
from keras_halo.rejection.decision_files import read_decisions
from keras_halo.rejection.decision_record import (
    is_reference,
    list_of_references,
)
from keras_halo.rejection.wording import thresholds_in_words
from keras_halo.utils.checks import as_integer, check_batch_size, check_model
from keras_halo.workflows.guard import read_certificate


@dataclasses.dataclass(frozen=True)
class ReplayDifference:
    """A decision that comes out otherwise than it was logged.

    Args:
        file: String, the file of the log.
        line: Integer, the line in it.
        number: Integer, the number of the decision.
        reference: Integer or string, the input.
        logged_label: Integer, -1 for rejected.
        label: Integer, the label now.
        logged_score: Float.
        score: Float, the score now.
        distance: Float, how far the logged score is from the threshold.
    """

    file: str
    line: int
    number: int
    reference: int | str
    logged_label: int
    label: int
    logged_score: float
    score: float
    distance: float

    def __str__(self):
        return (
            f"line {self.line} of {self.file}, input {self.reference!r}: "
            f"label {self.label} instead of {self.logged_label}, score "
            f"{self.score:.7g} instead of {self.logged_score:.7g}, "
            f"{self.distance:.2g} from the threshold"
        )


@dataclasses.dataclass(frozen=True)
class ReplayReport:
    """What became of the decisions of a log when they were made again.

    Args:
        decisions: Integer, how many the log holds.
        different: Integer, how many of them have another label now.
        differences: Tuple of `ReplayDifference`, the first of them.
        threshold: Float, the largest score that is accepted; a list of one for
            each class where a `GroupwiseRule` decides.
        largest_distance: Float, the largest distance of a logged score from the
            nearest threshold, of decisions that were accepted and are now
            rejected, or the reverse; zero without one.
        largest_score_change: Float, by how much a score changed at most.
    """

    decisions: int
    different: int
    differences: tuple[ReplayDifference, ...]
    threshold: float | list[float]
    largest_distance: float
    largest_score_change: float

    @property
    def same(self) -> bool:
        """Boolean, whether every decision comes out as it was logged."""
        return self.different == 0

    def to_dict(self) -> dict[str, Any]:
        """Returns plain numbers, strings and dictionaries."""
        return dataclasses.asdict(self)

    def __str__(self):
        same = self.decisions - self.different
        lines = [
            f"{same:,} of {self.decisions:,} decisions come out the same.",
            f"Largest change of a score: {self.largest_score_change:.3g}; "
            f"threshold: {thresholds_in_words(self.threshold)}.",
        ]
        if self.different:
            lines.append(
                "Scores that changed sides lay up to "
                f"{self.largest_distance:.3g} from the threshold."
            )
        lines += map(str, self.differences)
        left = self.different - len(self.differences)
        if left:
            lines.append(f"and {left:,} more")
        return "\n".join(lines)


def replay(
    log: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    guarded: keras.Model,
    x: Any,
    references: Iterable[int | str] | None = None,
    batch_size: int | None = None,
    max_differences: int = 10,
) -> ReplayReport:
    """Makes the decisions of a log again, and says which come out otherwise.

    The log is read once, from its first decision to its last, in memory that
    does not grow with it.

    Scores that another machine or backend computes differ in their last digits.
    So may a decision whose score is that near to the threshold; the report says
    how near.

    Args:
        log: String or path, as it was given to `DecisionLog`; or a list of
            them, the logs of several processes.
        guarded: Model of `keras_halo.guard` whose decisions were logged.
        x: Array of the inputs, or a list or dictionary of arrays.
        references: What the log calls the inputs, in the order of `x`. Defaults
            to `None`: their row numbers, from zero.
        batch_size: Integer, of the prediction; `None` for 32.
        max_differences: Integer, how many differences to list. Defaults to
            `10`.

    Returns:
        `ReplayReport`.

    Raises:
        ValueError: If the log is empty, damaged or of another rule, names an
            input that is not there or none, or the model has no guard.
        OSError: If there is no such log, or it cannot be read.

    Example:

    >>> import tempfile, os
    >>> x = np.random.default_rng(0).normal(size=(200, 4))
    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), keras_halo.HALODense(3)]
    ... )
    >>> rule = keras_halo.rejection.CoverageRule(0.9)
    >>> rule = rule.fit(model.predict(x, verbose=0))
    >>> guarded = keras_halo.guard(model, rule)
    >>> path = os.path.join(tempfile.mkdtemp(), "decisions.jsonl")
    >>> with keras_halo.rejection.DecisionLog(path, rule) as log:
    ...     answers = guarded.predict(x[:20], verbose=0)
    ...     numbers = log.append(answers, references=range(20))
    >>> report = keras_halo.replay(path, guarded, x)
    >>> report.same, report.decisions
    (True, 20)
    """
    check_model(guarded)
    certificate = read_certificate(guarded)
    batch_size = check_batch_size(batch_size) or 32
    max_differences = as_integer(max_differences, "max_differences", 0)
    x, rows = _rows(x, references)
    thresholds = thresholds_of(certificate)
    count = different = 0
    differences = []
    largest_distance = largest_change = 0.0
    for batch in _batches(read_decisions(log), batch_size):
        indices = [_row(r, rows, certificate["checksum"]) for r in batch]
        answers = guarded.predict_on_batch(_taken(x, indices))
        for i, record in enumerate(batch):
            count += 1
            label, score = _answer(answers, i, record)
            # NaN that stays NaN is no change.
            largest_change = max(largest_change, abs(score - record.score))
            if label == record.label:
                continue
            different += 1
            distance = float(np.abs(record.score - thresholds).min())
            if ABSTAINED in (label, record.label):
                largest_distance = max(largest_distance, distance)
            if len(differences) < max_differences:
                differences.append(
                    ReplayDifference(
                        file=record.file,
                        line=record.line,
                        number=record.number,
                        reference=record.reference,
                        logged_label=record.label,
                        label=label,
                        logged_score=record.score,
                        score=score,
                        distance=distance,
                    )
                )
    if not count:
        raise ValueError(
            f"Expected a log of decisions. Received: {log}, which "
            "holds none. Pass the path that `DecisionLog` was given."
        )
    return ReplayReport(
        decisions=count,
        different=different,
        differences=tuple(differences),
        threshold=certificate["threshold"],
        largest_distance=largest_distance,
        largest_score_change=largest_change,
    )


def _batches(records, size):
    """Lists of records, one after the other."""
    while batch := list(itertools.islice(records, size)):
        yield batch


def _taken(x, indices):
    return keras.tree.map_structure(lambda array: array[indices], x)


def _rows(x, references):
    """Arrays of inputs, and a dictionary from a reference to its row."""
    arrays = keras.tree.flatten(x)
    if not arrays or not all(
        isinstance(array, np.ndarray) and array.ndim for array in arrays
    ):
        raise ValueError(
            "`x` must be a NumPy array of inputs, or a list or dictionary of "
            f"arrays. Received: x={x!r:.100}. Rows are taken from it by "
            "number: `np.asarray(x)` makes an array of a list."
        )
    counts = {len(array) for array in arrays}
    if len(counts) > 1:
        raise ValueError(
            "`x` must hold arrays of one length. Received: lengths "
            f"{sorted(counts)}."
        )
    (count,) = counts
    if references is None:
        return x, {row: row for row in range(count)}
    named = list_of_references(references)
    wrong = [name for name in named if not is_reference(name)]
    if wrong or len(named) != count or len(set(named)) != count:
        received = f"{len(named)} references for {count} rows"
        if wrong:
            received += f", among them {wrong[0]!r:.100}"
        elif len(set(named)) != len(named):
            received += f", {len(named) - len(set(named))} of them repeated"
        raise ValueError(
            "`references` must name every row of `x` by an integer or a "
            f"string of its own. Received: {received}."
        )
    return x, {name: row for row, name in enumerate(named)}


def _row(record, rows, checksum):
    where = f"Line {record.line} of {record.file}"
    if record.rule != checksum:
        raise ValueError(
            f"{where} is the decision of another rule: expected the "
            f"certificate {checksum}. Received: {record.rule}. Pass the "
            "guarded model that made the log."
        )
    if record.reference is None:
        raise ValueError(
            f"{where} does not say which input it decided on: expected a "
            "reference. Received: none. Log with `log.append(answers, "
            "references)`."
        )
    if record.reference not in rows:
        raise ValueError(
            f"{where} decided on input {record.reference!r:.100}, which is "
            f"not in the data. Received: {len(rows)} rows. Pass all data that "
            "the log refers to, with the references it uses."
        )
    return rows[record.reference]


def _answer(answers, index, record):
    labels, scores = answers["label"][index], answers["score"][index]
    position = record.position or ()
    if labels.ndim != len(position) or any(
        i >= length for i, length in zip(position, labels.shape, strict=False)
    ):
        raise ValueError(
            f"Line {record.line} of {record.file} decided on position "
            f"{position} of an input. Received: an input with positions of "
            f"shape {labels.shape}. Pass the inputs as they were decided on."
        )
    return int(labels[position]), float(scores[position])
