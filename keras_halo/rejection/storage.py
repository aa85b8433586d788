"""Rules as JSON files: readable, checked, and never executed."""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import secrets
from typing import Any

import keras
import numpy as np

from keras_halo.rejection.fitted import (
    CalibrationCounts,
    Fingerprint,
    Fitted,
    Group,
    Ranks,
)

FORMAT = "keras_halo.rejection"
VERSION = 2

# Version 1 named a rule by its class, and called the guarantee a promise.
_OLDEST_VERSION = 1

_WHAT_TO_DO = "Restore the file from a copy, or fit and save the rule again."


def save(rule, fitted, path):
    """Writes a fitted rule; see `RejectionRule.save`."""
    write(certificate(rule, fitted), path)


def write(document, path):
    """Writes a document as a file; see `write_text`."""
    write_text(json.dumps(document, indent=1) + "\n", path)


def write_text(text, path):
    """Writes a text file, as a whole or not at all.

    Args:
        text: String.
        path: String or path, the file to write.

    Raises:
        ValueError: If the path is none of a file.
        OSError: If the folder does not exist or cannot be written to.
    """
    # A link stays one, and leads to the new content.
    path = writable_path(path)
    mode = path.stat().st_mode & 0o7777 if path.exists() else None
    # A name of its own for every call, whatever thread or process it is in,
    # and a short one: that of the file may be as long as names can be.
    unfinished = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        # Who may not read the file may not read it while it is written.
        unfinished.touch(0o666 if mode is None else 0o600, exist_ok=False)
        unfinished.write_text(text, "utf-8")
        if mode is not None:
            unfinished.chmod(mode)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def writable_path(path):
    """The file that a path leads to, which need not exist.

    Args:
        path: String or path, links are followed.

    Returns:
        `pathlib.Path`.

    Raises:
        ValueError: If the path is none of a file, or a link to itself.
        OSError: If the folder does not exist.

    Example:

    >>> writable_path("rule.json").name
    'rule.json'
    """
    check_path(path)
    path = pathlib.Path(os.path.realpath(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"The folder {path.parent} does not exist. Make it before writing "
            "there."
        )
    # What is still a link leads round in a circle.
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ValueError(
            f"Expected the path of a file. Received: {path}, which is "
            + ("a link to itself." if path.is_symlink() else "none.")
            + " Pass another path, or remove what is there."
        )
    return path


def certificate(rule, fitted):
    """What a fitted rule guarantees and learned; see `RejectionRule`."""
    document = {
        "format": FORMAT,
        "version": VERSION,
        "rule": registered_name(rule),
        "config": rule.get_config(),
        "method": rule.method,
        "guarantee": rule.guarantee,
        "limits": rule.limits,
        "threshold": fitted.threshold,
        "calibration": dataclasses.asdict(fitted.calibration),
        "fingerprint": fitted.fingerprint
        and dataclasses.asdict(fitted.fingerprint),
        "scores": _listed(fitted.scores),
        "ranks": fitted.ranks and dataclasses.asdict(fitted.ranks),
    }
    if rule.gives_sets:
        document["label_sets"] = True
    if not rule.judges_singly:
        document["judges_singly"] = False
    if fitted.groups is not None:
        document["groups"] = [
            {
                "name": group.name,
                "calibration": dataclasses.asdict(group.calibration),
                "scores": _listed(group.scores),
            }
            for group in fitted.groups
        ]
    try:
        return signed(document)
    except TypeError as error:
        raise ValueError(
            f"The arguments of {rule!r} cannot be saved: {error}. Expected "
            "what JSON holds, such as a float in the place of a NumPy number."
        ) from error


def signed(document):
    """A document with its checksum.

    Args:
        document: Dictionary that JSON holds.

    Example:

    >>> sorted(signed({"format": "mine"}))
    ['checksum', 'format']
    """
    return {**document, "checksum": _checksum(document)}


def load_rule(path: str | os.PathLike[str]) -> Any:
    """Loads a rejection rule that `rule.save(path)` wrote.

    Nothing in the file is executed. The checksum protects against damage, not
    against a forger, who can compute one: load rules from where you would load
    a model from.

    Args:
        path: String or path of the file.

    Returns:
        The fitted rule, an instance of the class that was saved. A class of
        your own must be registered before.

    Raises:
        ValueError: If the file is damaged, incomplete, has been edited, holds
            no rejection rule, one of an unknown class or of a later version of
            the package.
        OSError: If there is no such file, or it cannot be read.

    Example:

    >>> import tempfile, os
    >>> rule = keras_halo.rejection.CoverageRule(0.9, method=None)
    >>> path = os.path.join(tempfile.mkdtemp(), "rule.json")
    >>> rule.fit(np.arange(100.0)).save(path)
    >>> keras_halo.rejection.load_rule(path).predict([89.0, 91.0]).accepted
    array([ True, False])
    """
    document = read(path, FORMAT, "rejection rule", "`rule.save(path)`")
    version = document.get("version")
    if type(version) is not int or not _OLDEST_VERSION <= version <= VERSION:
        raise ValueError(
            f"{path} has version {version!r} of the format; this keras_halo "
            f"reads versions {_OLDEST_VERSION} to {VERSION}. Install a newer "
            "keras-halo if the file was saved by one."
        )
    check_intact(document, path)
    return restored(document, path)


def read(path, kind, what, writer):
    """Reads a document of a kind from a file, without checking its content.

    Args:
        path: String or path of the file.
        kind: String, the format that the document has to name.
        what: String, what the document is to hold, for errors.
        writer: String, what writes such files, for errors.

    Returns:
        Dictionary.

    Raises:
        ValueError: If it is no JSON, or of another kind.
        OSError: If there is no such file, or it cannot be read.
    """
    check_path(path)
    content = pathlib.Path(path).read_bytes()
    try:
        # Some editors begin a file with a byte-order mark.
        document = parse(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is no complete JSON file: {error}. {_WHAT_TO_DO}"
        ) from error
    if not isinstance(document, dict) or document.get("format") != kind:
        raise ValueError(
            f"{path} holds no {what}: expected the format {kind!r}. Pass a "
            f"file that {writer} wrote."
        )
    return document


def parse(text):
    """Reads JSON without numbers that are not finite, and without repeats.

    Args:
        text: String.

    Returns:
        What it holds.

    Raises:
        ValueError: If it is no such JSON.

    Example:

    >>> parse('{"score": NaN}')
    Traceback (most recent call last):
        ...
    ValueError: it contains the number NaN
    """
    return json.loads(
        text,
        parse_float=_finite_float,
        parse_constant=_finite_float,
        object_pairs_hook=_without_repeats,
    )


def restored(document, path):
    """The rule of a document that is intact.

    Args:
        document: Dictionary, what `certificate` returned.
        path: What an error names as the source.

    Returns:
        The fitted rule.

    Raises:
        ValueError: If it holds no usable rule.
    """
    try:
        return _to_rule(document, document["version"])
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise ValueError(
            f"{path} holds no usable rejection rule: {error}. {_WHAT_TO_DO}"
        ) from error


def check_intact(document, path):
    """Raises `ValueError` unless a document is what its checksum says.

    Args:
        document: Dictionary, what `certificate` returned.
        path: What an error names as the source.
    """
    content = {k: v for k, v in document.items() if k != "checksum"}
    try:
        intact = document.get("checksum") == _checksum(content)
    except (ValueError, RecursionError):
        # Nested, or integers with more digits, than any rule has.
        intact = False
    if not intact:
        raise ValueError(
            f"{path} was damaged or edited after it was saved: its content "
            f"does not match its checksum. {_WHAT_TO_DO}"
        )


def registered_name(rule):
    """The name that a rule's class is registered by.

    Args:
        rule: A rule.

    Returns:
        String.

    Raises:
        ValueError: If its class is not registered.
    """
    name = keras.saving.get_registered_name(type(rule))
    if keras.saving.get_registered_object(name) is not type(rule):
        raise ValueError(
            f"The class {type(rule).__name__} is not registered, so that the "
            "file could not be loaded. Decorate it with "
            '`@keras.saving.register_keras_serializable(package="...")`.'
        )
    return name


def unfitted(name, config):
    """A rule of a registered class.

    Args:
        name: String, the registered name of the class.
        config: Dictionary, the constructor arguments.

    Raises:
        ValueError: If there is no such class.
    """
    cls = keras.saving.get_registered_object(name)
    # The rules import this module, so their base is known by what it can do.
    if not hasattr(cls, "find_threshold"):
        raise ValueError(
            f"its class {name!r} is not known. Import the module that "
            "registers it with `keras.saving.register_keras_serializable`"
        )
    return cls(**config)


def _to_rule(document, version):
    name = document["rule"]
    if version == 1:
        name = f"keras_halo>{name}"
    rule = unfitted(name, document["config"])
    fingerprint = document["fingerprint"]
    scores = document["scores"]
    ranks = document.get("ranks")
    groups = document.get("groups")
    fitted = Fitted(
        threshold=document["threshold"],
        calibration=CalibrationCounts(**document["calibration"]),
        fingerprint=fingerprint and Fingerprint(**fingerprint),
        scores=_array(scores),
        ranks=ranks and Ranks(**ranks),
        groups=groups if groups is None else [_to_group(g) for g in groups],
    )
    if (rule.method is None) != (fingerprint is None):
        raise ValueError("its method does not fit its fingerprint")
    if rule.keeps_scores != (scores is not None):
        raise ValueError("its calibration scores are missing or unexpected")
    rule.restore(fitted)
    return rule


def _to_group(document):
    return Group(
        document["name"],
        CalibrationCounts(**document["calibration"]),
        _array(document["scores"]),
    )


def _listed(scores):
    return None if scores is None else scores.tolist()


def _array(scores):
    return None if scores is None else np.array(scores, "float64")


def _checksum(document):
    text = json.dumps(
        document, sort_keys=True, separators=(",", ":"), allow_nan=False
    )
    return "sha256:" + hashlib.sha256(text.encode("utf-8")).hexdigest()


def check_path(path):
    """Raises `ValueError` unless this can be the path of a file."""
    if not isinstance(path, (str, os.PathLike)) or "\0" in str(path):
        raise ValueError(
            "Expected the path of a file, a string or `pathlib.Path` without "
            f"NUL characters. Received: path={path!r:.100}."
        )


def _without_repeats(pairs):
    document = dict(pairs)
    if len(document) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = sorted({n for n in names if names.count(n) > 1})
        raise ValueError(f"it holds {', '.join(repeated)} more than once")
    return document


def _finite_float(text):
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it contains the number {text}")
    return value
