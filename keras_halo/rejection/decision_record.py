import contextlib
import dataclasses
import json
import math
import re
import zlib
from typing import Any

import numpy as np

from keras_halo.ops.labels import ABSTAINED
from keras_halo.rejection import storage

VERSION = 1

# How every line begins, whoever wrote it.
BEGINNING = b'{"version":'

# Longer lines are none of a log. A reference is kept well below that.
MAX_LINE = 2**16
MAX_REFERENCE = 1000

# JSON has no numbers for these.
_NOT_FINITE = ("nan", "inf", "-inf")

_CHECKSUM = re.compile(rb',"checksum":"([0-9a-f]{8})"}\n')


@dataclasses.dataclass(frozen=True)
class DecisionRecord:
    """One decision, as it stands in a log.

    Args:
        number: Integer, the number of the decision in its log, from one.
        time: String, when it was logged: UTC in ISO 8601, to microseconds.
        rule: String, the checksum of the certificate of the rule.
        accepted: Boolean, whether the input was accepted.
        label: Integer, the class, -1 for rejected; `None` for a rule on plain
            scores.
        score: Float, what the rule judged, larger for outliers.
        p_value: Float, or `None` where there was none.
        reference: Integer or string that names the input, or `None`.
        position: Tuple of integers, which position of the input was decided
            on; `None` where an input has one decision.
        file: String, the path of the file that holds it.
        line: Integer, the line in that file, from one.

    Example:

    >>> import tempfile, os
    >>> rule = keras_halo.rejection.CoverageRule(0.9, method=None)
    >>> rule = rule.fit(np.arange(100.0))
    >>> path = os.path.join(tempfile.mkdtemp(), "decisions.jsonl")
    >>> with keras_halo.rejection.DecisionLog(path, rule) as log:
    ...     numbers = log.append(rule.predict([2.5]), references=["a.png"])
    >>> (record,) = keras_halo.rejection.read_decisions(path)
    >>> record.number, record.accepted, record.score, record.reference
    (1, True, 2.5, 'a.png')
    """

    number: int
    time: str
    rule: str
    accepted: bool
    label: int | None
    score: float
    p_value: float | None
    reference: int | str | None
    position: tuple[int, ...] | None
    file: str = dataclasses.field(compare=False)
    line: int = dataclasses.field(compare=False)

    def __post_init__(self):
        texts = (self.time, self.rule)
        position = self.position or ()
        if not (
            all(isinstance(text, str) for text in texts)
            and _is_count(self.number, 1)
            and isinstance(self.accepted, bool)
            and (self.label is None or _is_count(self.label, ABSTAINED))
            and isinstance(self.score, float)
            and (self.p_value is None or 0.0 <= self.p_value <= 1.0)
            and (self.reference is None or is_reference(self.reference))
            and all(_is_count(index, 0) for index in position)
        ):
            raise ValueError(f"this is no decision: {self!r:.500}")
        expected = self.accepted
        if self.label is not None:
            expected = self.label != ABSTAINED
        if expected != self.accepted:
            raise ValueError(
                f"accepted={self.accepted} contradicts label={self.label}"
            )


def is_reference(value):
    """Whether this can name an input in a log.

    Args:
        value: Anything.

    Returns:
        Boolean.

    Example:

    >>> is_reference(17), is_reference("a.png"), is_reference(0.5)
    (True, True, False)
    """
    if isinstance(value, str):
        return len(value) <= MAX_REFERENCE
    # Every reader of JSON holds integers up to here.
    return type(value) is int and abs(value) <= 2**53


def list_of_references(references: Any) -> list[Any]:
    """Returns references as a list, numbers of NumPy as those of Python.

    Args:
        references: Iterable, such as a list, a range or an array.

    Returns:
        List of whatever they are.

    Raises:
        ValueError: If they are no several things, or a single string.

    Example:

    >>> list_of_references(np.arange(3))
    [0, 1, 2]
    """
    if not isinstance(references, (str, bytes)):
        # What is no iterable, and an array without axes.
        with contextlib.suppress(TypeError):
            return [
                value.item() if isinstance(value, np.generic) else value
                for value in references
            ]
    raise ValueError(
        "`references` must be integers or strings, one an input. Received: "
        f"references={references!r:.100}. Pass a list, a range or an array."
    )


def to_line(fields: dict[str, Any]) -> bytes:
    """Returns the line of a decision.

    Args:
        fields: Dictionary, the fields of a `DecisionRecord` without `file` and
            `line`.

    Returns:
        Bytes, ASCII, with the line break.

    Example:

    >>> to_line({"number": 1, "score": float("nan")})
    b'{"version":1,"number":1,"score":"nan","checksum":"4292ba9a"}\\n'
    """
    score = fields["score"]
    if not math.isfinite(score):
        fields = {**fields, "score": str(score)}
    text = json.dumps(
        {"version": VERSION, **fields}, separators=(",", ":"), allow_nan=False
    )
    content = text.encode("ascii")
    return content[:-1] + b',"checksum":"%08x"}\n' % zlib.crc32(content)


def from_line(line: bytes, file: str, number: int) -> DecisionRecord:
    """Reads the line of a decision.

    Args:
        line: Bytes, with the line break.
        file: String, the file that it stands in.
        number: Integer, its number in that file.

    Returns:
        `DecisionRecord`.

    Raises:
        ValueError: If the line is not as it was written.
    """
    end = _CHECKSUM.search(line, max(0, len(line) - 64))
    if not line.startswith(BEGINNING) or end is None:
        raise ValueError("it is no line of a decision log")
    content = line[: end.start()] + b"}"
    if end.end() != len(line) or int(end[1], 16) != zlib.crc32(content):
        raise ValueError("its content does not match its checksum")
    try:
        fields = storage.parse(content.decode("ascii"))
        version = fields.pop("version")
    except (AttributeError, LookupError, RecursionError, ValueError) as error:
        raise ValueError(f"it is no JSON of a decision: {error}") from error
    if version != VERSION:
        raise ValueError(
            f"it has version {version!r} of the format; this keras_halo reads "
            f"version {VERSION}"
        )
    try:
        if fields["score"] in _NOT_FINITE:
            fields["score"] = float(fields["score"])
        if fields["position"] is not None:
            fields["position"] = tuple(fields["position"])
        return DecisionRecord(**fields, file=file, line=number)
    except (LookupError, TypeError) as error:
        raise ValueError(f"it has other fields: {error}") from error


def _is_count(value, least):
    return type(value) is int and value >= least
