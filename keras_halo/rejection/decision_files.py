"""The files of a decision log: their names, their order, and their ends.

A log `decisions.jsonl` is written to a file of that name. Once it is large
enough the file is renamed to `decisions.000000001.jsonl`, by the number of the
first decision in it, and a new one is begun.
"""

import contextlib
import heapq
import os
import pathlib
import re
import warnings
from collections.abc import Iterator, Sequence

from keras_halo.rejection import storage
from keras_halo.rejection.decision_record import (
    BEGINNING,
    MAX_LINE,
    DecisionRecord,
    from_line,
)
from keras_halo.utils.checks import as_boolean

_BLOCK = 2**16


def rotated_path(path, number):
    """Returns the path of a file that is full.

    Args:
        path: `pathlib.Path` of the log.
        number: Integer, the number of the first decision in the file.

    Returns:
        `pathlib.Path`.

    Example:

    >>> rotated_path(pathlib.Path("decisions.jsonl"), 17).name
    'decisions.000000017.jsonl'
    """
    return path.with_name(f"{path.stem}.{number:09d}{path.suffix}")


def rotated_paths(path):
    """Returns the files of a log that are full, in order.

    Args:
        path: `pathlib.Path` of the log.

    Returns:
        Dictionary from the number of the first decision in a file to its
        `pathlib.Path`.
    """
    name = re.compile(
        re.escape(path.stem) + r"\.([0-9]{9,})" + re.escape(path.suffix)
    )
    found = {
        int(match[1]): other
        for other in path.parent.iterdir()
        if (match := name.fullmatch(other.name))
    }
    return dict(sorted(found.items()))


def end_of_lines(file):
    """Returns where the last whole line of a file ends.

    Args:
        file: Binary file, open for reading.

    Returns:
        Integer, a number of bytes; zero if there is no whole line.
    """
    start = file.seek(0, os.SEEK_END)
    while start > 0:
        size = min(_BLOCK, start)
        start = file.seek(start - size)
        found = file.read(size).rfind(b"\n")
        if found >= 0:
            return start + found + 1
    return 0


def first_record(path):
    """Returns the first decision of one file.

    Args:
        path: `pathlib.Path` of the file.

    Returns:
        `DecisionRecord`, or `None` if the file is empty.

    Raises:
        ValueError: If what the file begins with was written by no log.
    """
    with path.open("rb") as file:
        line = file.readline(MAX_LINE)
    return _end_record(line, path, "first") if line else None


def last_record(path):
    """Returns the last decision of one file.

    Args:
        path: `pathlib.Path` of the file.

    Returns:
        Tuple: `DecisionRecord`, or `None` if the file holds no whole line, and
        the number of bytes up to the end of that line.

    Raises:
        ValueError: If what the file ends in was written by no log.
    """
    with path.open("rb") as file:
        end = end_of_lines(file)
        file.seek(end)
        torn = file.read(len(BEGINNING))
        # Where the power failed a file may end in zeros.
        if not BEGINNING.startswith(torn.rstrip(b"\0")):
            raise ValueError(
                f"{path} is no decision log, or was damaged: expected lines "
                f"that `DecisionLog` wrote. Received: {torn!r} after the last "
                "line. Give the log another path, or move its files away."
            )
        if not end:
            return None, 0
        file.seek(max(0, end - MAX_LINE))
        *_, line = file.read(min(end, MAX_LINE)).splitlines(keepends=True)
    return _end_record(line, path, "last"), end


def _end_record(line, path, which):
    try:
        return from_line(line, str(path), 0)
    except ValueError as error:
        raise ValueError(
            f"{path} is no decision log, or was damaged: its {which} line "
            f"cannot be read: {error}. Give the log another path, or move its "
            "files away."
        ) from error


def read_decisions(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    skip_damaged: bool = False,
) -> Iterator[DecisionRecord]:
    """Reads the decisions of a log, in the order in which they were made.

    All files of the log are read one after the other, in constant memory. A log
    may be read while it is written to: what is added after the beginning may be
    missed. A last line that is not whole, as a killed process leaves it, is
    skipped with a warning.

    Files that are full may have been moved away, the oldest first. A gap
    between those that remain is an error.

    Several logs, such as those of the processes that share a model, are read as
    one, by the time of each decision. Numbers count the decisions of each log.

    Args:
        path: String or path, as it was given to `DecisionLog`; or a list of
            them.
        skip_damaged: Boolean, whether to warn of damaged lines and of gaps,
            and read on. Defaults to `False`.

    Returns:
        Iterator of `DecisionRecord`.

    Raises:
        ValueError: If a line is damaged, or decisions are missing.
        OSError: If there is no such log, or it cannot be read.

    Example:

    >>> import tempfile, os
    >>> rule = keras_halo.rejection.CoverageRule(0.9, method=None)
    >>> rule = rule.fit(np.arange(100.0))
    >>> path = os.path.join(tempfile.mkdtemp(), "decisions.jsonl")
    >>> with keras_halo.rejection.DecisionLog(path, rule) as log:
    ...     numbers = log.append(rule.predict([2.5, 300.0]))
    >>> [r.accepted for r in keras_halo.rejection.read_decisions(path)]
    [True, False]
    """
    skip_damaged = as_boolean(skip_damaged, "skip_damaged")
    if isinstance(path, (list, tuple)) and path:
        logs = [_records(_found(log), skip_damaged) for log in path]
        # Equal times stay in the order of the list.
        return heapq.merge(*logs, key=lambda record: record.time)
    return _records(_found(path), skip_damaged)


def _found(path):
    storage.check_path(path)
    # As `DecisionLog` does: a link leads to all files of the log.
    path = pathlib.Path(os.path.realpath(path))
    if not path.is_file() and not (
        path.parent.is_dir() and rotated_paths(path)
    ):
        raise FileNotFoundError(
            f"There is no decision log {path}. Pass the path that "
            "`DecisionLog` was given."
        )
    return path


def _records(path, skip_damaged):
    with contextlib.ExitStack() as stack:
        # First what may be renamed: once open, a file stays the same.
        newest = None
        with contextlib.suppress(FileNotFoundError):
            newest = stack.enter_context(path.open("rb"))
        expected = None
        for number, other in rotated_paths(path).items():
            if newest is not None and _is_same(newest, other):
                continue
            with other.open("rb") as file:
                for record in _lines(file, other, skip_damaged, False):
                    expected = _checked(record, expected, skip_damaged, number)
                    yield record
        if newest is not None:
            for record in _lines(newest, path, skip_damaged, True):
                expected = _checked(record, expected, skip_damaged)
                yield record


def _is_same(file, path):
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lines(file, path, skip_damaged, may_be_torn):
    number = 0
    while line := file.readline(MAX_LINE):
        number += 1
        if may_be_torn and not line.endswith(b"\n") and len(line) < MAX_LINE:
            warnings.warn(
                f"Line {number} of {path} is not whole and was skipped: its "
                "writer was stopped, or is at it.",
                stacklevel=4,
            )
            return
        while len(line) == MAX_LINE and not line.endswith(b"\n"):
            # Too long for a decision: on to its end.
            line = b"-" + file.readline(MAX_LINE - 1)
        try:
            yield from_line(line, str(path), number)
        except ValueError as error:
            _complain(
                f"Line {number} of {path} is damaged: {error}.", skip_damaged
            )


def _checked(record, expected, skip_damaged, named=None):
    """Returns the number that has to come next."""
    if expected is None:
        # Files may have been moved away, the first lines of one may not.
        expected = named or record.number
    if record.number != expected:
        _complain(
            f"Decisions are missing before line {record.line} of "
            f"{record.file}: expected number {expected}. Received: number "
            f"{record.number}.",
            skip_damaged,
        )
    return record.number + 1


def _complain(message, skip_damaged):
    if not skip_damaged:
        raise ValueError(
            f"{message} Restore the file from a copy, or read what is left "
            "with `read_decisions(path, skip_damaged=True)`."
        )
    warnings.warn(message, stacklevel=5)
