import contextlib
import datetime
import os
import threading
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Self

import numpy as np

from keras_halo.rejection import decision_files, storage
from keras_halo.rejection.answers import check_own, read_answers
from keras_halo.rejection.decision_record import (
    MAX_REFERENCE,
    is_reference,
    list_of_references,
    to_line,
)
from keras_halo.rejection.decisions import Decisions
from keras_halo.rejection.file_lock import locked
from keras_halo.rejection.rejection_rule import RejectionRule
from keras_halo.utils.checks import as_boolean, as_integer


class DecisionLog:
    """Records the decisions of a rule, one JSON line each, for good.

    Every line holds the number of the decision, the UTC time, the checksum of
    the rule's certificate, whether the input was accepted, the label, score and
    p-value, what the caller names the input by, and a checksum of the line.
    Lines are only ever added. A file that would exceed `max_bytes` is renamed
    by the number of its first decision, `decisions.000000001.jsonl`, and a new
    one is begun; nothing is deleted. `read_decisions` reads all of them in
    order, `keras_halo.replay` decides again and compares.

    When `append` returns, the operating system has the lines: a process that is
    killed then loses nothing. With `sync=True` the disk has them, and a power
    failure loses nothing either; every call waits for the disk. Without it a
    file reaches the disk for certain when it is full and when the log is
    closed. A process that is killed during `append` may leave half a line.
    It is cut off with a warning when the log is opened again, before anything
    else is written.

    Threads of one process may share a log. Processes may not: a second one that
    opens the log is refused as long as the first has it, by a lock on the empty
    file `decisions.jsonl.lock`, which ends with the process and those forked
    from it. A forked process cannot write to the log of its parent either. Give
    every process a log of its own. Locks of network file systems may not hold
    between machines.

    Checksums and numbers tell of damage and of missing lines, not of a forger,
    who can compute them, and not of lines that are missing at the end.

    Args:
        path: String or path of the file, such as `"decisions.jsonl"`. A log
            that exists is continued.
        rule: The fitted rule that decides, or its certificate:
            `keras_halo.read_certificate("guarded.keras")`.
        max_bytes: Integer, the size at which a file is full. Defaults to
            `100_000_000`.
        sync: Boolean, whether `append` waits until the lines are on the disk.
            Defaults to `False`.

    Raises:
        ValueError: If an argument is no use, the log is that of another rule,
            is damaged at its end, or is in use. Nothing is changed then.
        OSError: If the folder does not exist, or cannot be written to.

    Example:

    >>> import tempfile, os
    >>> rng = np.random.default_rng(0)
    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), keras_halo.HALODense(3)]
    ... )
    >>> scores = model.predict(rng.normal(size=(200, 4)), verbose=0)
    >>> rule = keras_halo.rejection.CoverageRule(0.9).fit(scores)
    >>> guarded = keras_halo.guard(model, rule)
    >>> answers = guarded.predict(rng.normal(size=(5, 4)), verbose=0)
    >>> path = os.path.join(tempfile.mkdtemp(), "decisions.jsonl")
    >>> with keras_halo.rejection.DecisionLog(path, rule) as log:
    ...     log.append(answers, references=range(5))
    range(1, 6)
    >>> records = list(keras_halo.rejection.read_decisions(path))
    >>> [record.label for record in records] == answers["label"].tolist()
    True
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        rule: RejectionRule | Mapping[str, Any],
        max_bytes: int = 100_000_000,
        sync: bool = False,
    ) -> None:
        self.path = storage.writable_path(path)
        certificate = _certificate(rule)
        self.max_bytes = as_integer(max_bytes, "max_bytes", 1)
        self.sync = as_boolean(sync, "sync")
        self._rule = certificate["checksum"]
        self._certificate = certificate
        self._mutex = threading.Lock()
        self._process = os.getpid()
        self._file = None
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(f"{self.path}.lock"))
            self._next = self._repaired(certificate)
            self._open()
            # Kept from here on, until `close`.
            self._held = stack.pop_all()

    def append(
        self,
        answers: Mapping[str, Any] | Decisions,
        references: Iterable[int | str] | None = None,
    ) -> range:
        """Adds the decisions on a batch of inputs.

        Args:
            answers: What a model of `keras_halo.guard` returned, a dictionary
                of `"label"`, `"score"` and, where the rule has them,
                `"p_value"`; or `Decisions` of `rule.predict`. For inputs of
                several positions every position is a decision.
            references: Integers or strings of at most 1,000 characters, one an
                input, that name the inputs: row numbers, ids, file names.
                Defaults to `None`.

        Returns:
            `range` of the numbers of these decisions in the log.

        Raises:
            ValueError: If the input is not usable, contradicts the rule, or
                the log is closed; nothing is written.
            OSError: If not all could be written. What was, stays in whole
                lines, and the log can be used further.
        """
        rows = list(self._rows(answers, references))
        with self._mutex:
            self._require_open()
            first = self._next
            # Under the lock, so that times are in the order of numbers.
            now = datetime.datetime.now(datetime.UTC)
            time = now.isoformat(timespec="microseconds")
            common = {"time": time.replace("+00:00", "Z"), "rule": self._rule}
            waiting, size = [], self._size
            for number, row in enumerate(rows, first):
                line = to_line({"number": number, **common, **row})
                if size > 0 and size + len(line) > self.max_bytes:
                    self._write(waiting)
                    self._rotate()
                    waiting, size = [], 0
                waiting.append(line)
                size += len(line)
            self._write(waiting)
        return range(first, first + len(rows))

    def close(self) -> None:
        """Writes everything to the disk and lets others have the log."""
        with self._mutex:
            if self._file is not None and self._process == os.getpid():
                os.fsync(self._file.fileno())
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _repaired(self, certificate):
        """Cuts off half a line, and returns the number that comes next."""
        record, end = None, 0
        if self.path.exists():
            record, end = decision_files.last_record(self.path)
        previous = decision_files.rotated_paths(self.path)
        last = record
        if last is None and previous:
            last, _ = decision_files.last_record(list(previous.values())[-1])
        if last is not None and last.rule != certificate["checksum"]:
            raise ValueError(
                f"{self.path} is the log of another rule: expected the "
                f"certificate {certificate['checksum']}. Received: decisions "
                f"by {last.rule}. Give the new rule a new log."
            )
        size = self.path.stat().st_size if self.path.exists() else 0
        if size > end:
            warnings.warn(
                f"{self.path} ended in half a line, {size - end} bytes that "
                "were not written to their end. They were cut off.",
                stacklevel=3,
            )
            os.truncate(self.path, end)
        return 1 if last is None else last.number + 1

    def _rows(self, answers, references):
        read = read_answers(answers)
        check_own(read, self._certificate)
        labels, scores, p_values, accepted = read
        shape = scores.shape
        if references is None:
            references = [None] * shape[0]
        else:
            references = _references(references, shape[0])
        for index in np.ndindex(shape):
            label = None if labels is None else int(labels[index])
            p_value = None if p_values is None else float(p_values[index])
            # What is NaN has none.
            if p_value is not None and np.isnan(p_value):
                p_value = None
            yield {
                "accepted": bool(accepted[index]),
                "label": label,
                "score": float(scores[index]),
                "p_value": p_value,
                "reference": references[index[0]],
                "position": index[1:] or None,
            }

    def _write(self, lines):
        content = memoryview(b"".join(lines))
        if not content:
            return
        number = self._file.fileno()
        try:
            written = 0
            while written < len(content):
                written += os.write(number, content[written:])
            if self.sync:
                os.fsync(number)
            self._size += len(content)
            self._next += len(lines)
        except BaseException:
            # Nothing may follow half a line.
            try:
                os.truncate(number, self._size)
            except OSError:
                # Opening it again will repair it.
                self._release()
            raise

    def _rotate(self):
        os.fsync(self._file.fileno())
        mode = os.fstat(self._file.fileno()).st_mode & 0o7777
        # Windows renames no file that is open.
        self._file.close()
        full = decision_files.rotated_path(self.path, self._first)
        try:
            if full.exists():
                # As a copy of this file that somebody put there.
                raise FileExistsError(
                    f"{full} exists already. Move it away, and open the log "
                    "again."
                )
            os.rename(self.path, full)
            # The next file is for the eyes of the same people.
            self.path.touch(mode)
            self.path.chmod(mode)
            self._open()
        except BaseException:
            self._release()
            raise

    def _open(self):
        first = None
        if self.path.exists():
            first = decision_files.first_record(self.path)
        self._first = self._next if first is None else first.number
        self._file = self.path.open("ab", buffering=0)
        self._size = os.fstat(self._file.fileno()).st_size
        _sync_folder(self.path.parent)

    def _require_open(self):
        if self._process != os.getpid():
            raise ValueError(
                "A log belongs to the process that opened it. Received: "
                f"process {os.getpid()} in the place of {self._process}. Open "
                "a log of its own, with another path, in every process."
            )
        if self._file is None:
            raise ValueError(
                "The log is closed. Received: decisions. Open it again: "
                f"`DecisionLog({str(self.path)!r}, rule)`."
            )

    def _release(self):
        if self._file is not None:
            self._file.close()
        self._file = None
        self._held.close()


def _certificate(rule):
    if isinstance(rule, RejectionRule):
        return rule.certificate()
    if not isinstance(rule, Mapping) or rule.get("format") != storage.FORMAT:
        raise ValueError(
            "`rule` must be a fitted rule of `keras_halo.rejection`, or its "
            f"certificate. Received: rule={rule!r:.100}. "
            '`keras_halo.read_certificate("guarded.keras")` reads that of a '
            "guarded model."
        )
    certificate = dict(rule)
    storage.check_intact(certificate, "The certificate")
    return certificate


def _references(references, count):
    found = list_of_references(references)
    wrong = [value for value in found if not is_reference(value)]
    if len(found) == count and not wrong:
        return found
    received = f"{len(found)} references"
    if wrong:
        received += f", among them {wrong[0]!r:.100}"
    raise ValueError(
        f"`references` must be integers or strings of at most {MAX_REFERENCE} "
        f"characters, one for each of {count} inputs. Received: {received}. "
        "Leave them out where inputs have no names."
    )


def _sync_folder(folder):
    """Makes sure that the names of files are on the disk."""
    # Windows opens no folders, and some file systems sync none.
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
