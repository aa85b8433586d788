"""Rules as JSON files: readable, checked, and never executed."""

import dataclasses
import hashlib
import json
import math
import os
import pathlib

import numpy as np

FORMAT = "keras_halo.rejection"
VERSION = 1

_WHAT_TO_DO = "Restore the file from a copy, or fit and save the rule again."


def save(rule, fitted, path):
    """Writes a fitted rule; see `RejectionRule.save`."""
    document = {
        "format": FORMAT,
        "version": VERSION,
        "rule": type(rule).__name__,
        "config": rule.get_config(),
        "promise": rule.promise,
        "threshold": fitted.threshold,
        "calibration": dataclasses.asdict(fitted.calibration),
        "fingerprint": fitted.fingerprint
        and dataclasses.asdict(fitted.fingerprint),
        "scores": None if fitted.scores is None else fitted.scores.tolist(),
    }
    document["checksum"] = _checksum(document)
    path = pathlib.Path(path)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_text(
            json.dumps(document, indent=1, allow_nan=False) + "\n", "utf-8"
        )
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def load_rule(path):
    """Loads a rejection rule that `rule.save(path)` wrote.

    Nothing in the file is executed. The checksum protects against damage, not
    against a forger, who can compute one: load rules from where you would load
    a model from.

    Args:
        path: String or path of the file.

    Returns:
        The fitted rule, an instance of the class that was saved.

    Raises:
        ValueError: If the file is damaged, incomplete, has been edited, holds
            no rejection rule or one of a later version of the package.
        OSError: If there is no such file, or it cannot be read.

    Example:

    >>> import tempfile, os
    >>> rule = keras_halo.rejection.CoverageRule(0.9, method=None)
    >>> path = os.path.join(tempfile.mkdtemp(), "rule.json")
    >>> rule.fit(np.arange(100.0)).save(path)
    >>> keras_halo.rejection.load_rule(path).threshold
    90.0
    """
    content = pathlib.Path(path).read_bytes()
    try:
        document = json.loads(
            content.decode("utf-8"),
            parse_float=_finite_float,
            parse_constant=_finite_float,
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is no complete JSON file: {error}. {_WHAT_TO_DO}"
        ) from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(
            f"{path} holds no rejection rule: expected the format {FORMAT!r}. "
            "Pass a file that `rule.save(path)` wrote."
        )
    version = document.get("version")
    if type(version) is not int or version != VERSION:
        raise ValueError(
            f"{path} has version {version!r} of the format; this keras_halo "
            f"reads version {VERSION}. Install a newer keras-halo if the file "
            "was saved by one."
        )
    if document.pop("checksum", None) != _checksum(document):
        raise ValueError(
            f"{path} was damaged or edited after it was saved: its content "
            f"does not match its checksum. {_WHAT_TO_DO}"
        )
    try:
        return _to_rule(document)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} holds no usable rejection rule: {error}. {_WHAT_TO_DO}"
        ) from error


def _to_rule(document):
    # Here, because the rules import this module.
    from keras_halo import rejection
    from keras_halo.rejection.fitted import Calibration, Fingerprint, Fitted

    rules = {
        "ConformalRule": rejection.ConformalRule,
        "CoverageRule": rejection.CoverageRule,
        "FalsePositiveRateRule": rejection.FalsePositiveRateRule,
        "SelectiveRiskRule": rejection.SelectiveRiskRule,
    }
    rule = rules[document["rule"]](**document["config"])
    fingerprint = document["fingerprint"]
    scores = document["scores"]
    fitted = Fitted(
        threshold=document["threshold"],
        calibration=Calibration(**document["calibration"]),
        fingerprint=fingerprint and Fingerprint(**fingerprint),
        scores=None if scores is None else np.array(scores, "float64"),
    )
    if (rule.method is None) != (fingerprint is None):
        raise ValueError("its method does not fit its fingerprint")
    if rule._keeps_scores != (scores is not None):
        raise ValueError("its calibration scores are missing or unexpected")
    rule._fitted = fitted
    return rule


def _checksum(document):
    text = json.dumps(
        document, sort_keys=True, separators=(",", ":"), allow_nan=False
    )
    return "sha256:" + hashlib.sha256(text.encode("utf-8")).hexdigest()


def _finite_float(text):
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it contains the number {text}")
    return value
