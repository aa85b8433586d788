import copy
import dataclasses
import json
import math
import os
import pathlib
import platform
import sys
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_halo.layers.guard import method_of
from keras_halo.rejection.rejection_rule import RejectionRule
from keras_halo.rejection.storage import check_path, write_text
from keras_halo.rejection.wording import share, thresholds_in_words
from keras_halo.utils.checks import check_string
from keras_halo.version import __version__
from keras_halo.workflows.guard import read_certificate
from keras_halo.workflows.ood_report import OODReport, markdown_table

_FORMAT = "keras_halo.model_card"
_VERSION = 1

_NOT_GIVEN = "not given"

_COUNTS = {
    "samples": "samples",
    "inputs": "inputs",
    "accepted": "accepted",
    "errors": "wrong",
    "accepted_errors": "wrong and accepted",
    "known": "known samples beside them",
    "known_accepted": "known samples accepted",
}


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """What is known of a model that decides, for those who rely on it.

    Args:
        content: Dictionary that JSON holds. What was not given is `None`.
        tables: String, the tables of the evaluation in Markdown, or `None`.

    Example:

    >>> rule = keras_halo.rejection.CoverageRule(0.9, method=None)
    >>> card = keras_halo.model_card(rule.fit(np.arange(100.0)), name="parts")
    >>> card.to_dict()["calibration"]["accepted"]
    91
    >>> print(card.to_markdown())
    # Model card: parts
    ...
    """

    content: dict[str, Any]
    tables: str | None = dataclasses.field(repr=False, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Returns the content; what was not given is `None`."""
        return copy.deepcopy(self.content)

    def to_json(self) -> str:
        """Returns the content as JSON; what was not given is `null`."""
        return json.dumps(self.content, indent=1, allow_nan=False) + "\n"

    def to_markdown(self) -> str:
        """Returns the card in Markdown; it says what was not given."""
        content = self.content
        sections = {
            "Intended use": [content["intended_use"] or _NOT_GIVEN],
            "Model": _model_lines(content["model"]),
            "Data": _data_lines(content["data"]),
            "Metrics": _metric_parts(content["metrics"], self.tables),
            "Guarantee": _guarantee_parts(content["guarantee"]),
            "Calibration data": _calibration_lines(content["calibration"]),
            "Limits": _limit_lines(content["limits"]),
            "Versions": [
                f"- {name}: {_text(version)}"
                for name, version in content["versions"].items()
            ],
        }
        parts = [f"# Model card: {_text(content['name'])}"]
        for title, lines in sections.items():
            parts += [f"## {title}", "\n".join(lines)]
        return "\n\n".join(parts) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the card as a file, as a whole or not at all.

        Args:
            path: String or path that ends in `.md` or `.json`.

        Raises:
            ValueError: If it ends otherwise.
            OSError: If the folder does not exist or cannot be written to.
        """
        check_path(path)
        forms = {".md": self.to_markdown, ".json": self.to_json}
        suffix = pathlib.Path(path).suffix
        if suffix not in forms:
            raise ValueError(
                "Expected a path that ends in .md or .json. Received: "
                f"path={os.fspath(path)!r}."
            )
        write_text(forms[suffix](), path)


def model_card(
    source: keras.Model | RejectionRule | str | os.PathLike[str],
    report: OODReport | None = None,
    name: str | None = None,
    intended_use: str | None = None,
    data: Mapping[str, str] | None = None,
    limits: str | None = None,
) -> ModelCard:
    """Collects what is known of a guarded model, for those who rely on it.

    Guarantee, limits and calibration counts come from the certificate, metrics
    from the report, and words from you. Nothing else is said: what was not
    given is named as such. The same arguments give the same card.

    Args:
        source: Model of `keras_halo.guard`, the path of its `.keras` file, or
            a fitted rule.
        report: What `keras_halo.evaluate_ood` found for the model that is
            guarded. If it used the score of the rule, the card also tells what
            the rule accepts of the data of the report. Defaults to `None`.
        name: String. Defaults to `None`.
        intended_use: String, what the model is for, and what not. Defaults to
            `None`.
        data: Dictionary from the name of a data set, such as `"training"`, to
            a description: where it is from, how much, how it was chosen.
            Defaults to `None`.
        limits: String, limits known to you, beside those of the rule. Defaults
            to `None`.

    Returns:
        `ModelCard`, with `to_markdown()`, `to_json()`, `to_dict()` and
        `save(path)`.

    Raises:
        ValueError: If the model has no guard, the rule is not fitted, the
            report is of a model with other classes, or an argument is of
            another kind.
        OSError: If there is no such file.

    Example:

    >>> x, y = np.random.default_rng(0).normal(size=(200, 4)), [0, 1] * 100
    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), keras_halo.HALODense(2)]
    ... )
    >>> rule = keras_halo.rejection.CoverageRule(0.9)
    >>> rule = rule.fit(model.predict(x, verbose=0), y)
    >>> report = keras_halo.evaluate_ood(
    ...     model, (x, y), {"far": 9 * x}, verbose=0
    ... )
    >>> card = keras_halo.model_card(
    ...     keras_halo.guard(model, rule),
    ...     report,
    ...     name="parts",
    ...     data={"calibration": "200 parts of March"},
    ... )
    >>> card.to_dict()["metrics"]["decisions"]["known"]["count"]
    200

    References:

    - Margaret Mitchell et al., Model Cards for Model Reporting, 2019.
    """
    certificate = _certificate(source)
    if report is not None:
        _check_report(report, certificate)
    texts = {"name": name, "intended_use": intended_use, "limits": limits}
    for argument, value in texts.items():
        if value is not None:
            check_string(value, argument, "Leave it out where there is none.")
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "name": name,
        "intended_use": intended_use,
        "model": _model(source, certificate),
        "data": {
            "described": _described(data),
            "evaluated": None if report is None else _counts(report),
        },
        "metrics": None if report is None else _metrics(report, certificate),
        "guarantee": {
            "rule": certificate["rule"],
            "arguments": certificate["config"],
            "in_words": certificate["guarantee"],
            "threshold": certificate["threshold"],
            "certificate": certificate["checksum"],
        },
        "calibration": certificate["calibration"],
        "limits": {"of_the_rule": certificate["limits"], "stated": limits},
        "versions": _versions(),
    }
    tables = None if report is None else report.to_markdown()
    return ModelCard(_finite(content), tables)


def _certificate(source):
    if isinstance(source, RejectionRule):
        return source.certificate()
    if not isinstance(source, (keras.Model, str, os.PathLike)):
        raise ValueError(
            "`source` must be a model of `keras_halo.guard`, the path of its "
            f"file, or a fitted rule. Received: source={source!r:.100}."
        )
    return read_certificate(source)


def _check_report(report, certificate):
    if not isinstance(report, OODReport):
        raise ValueError(
            "`report` must be what `keras_halo.evaluate_ood` returned. "
            f"Received: report={report!r:.100}."
        )
    head = certificate["fingerprint"]
    num_classes = report.known.probabilities.shape[-1]
    if head is not None and head["num_classes"] != num_classes:
        raise ValueError(
            "`report` must be of the model that is guarded: expected "
            f"{head['num_classes']} classes. Received: {num_classes}. "
            "Evaluate the model that was given to `keras_halo.guard`."
        )


def _described(data):
    if data is None:
        return None
    if not isinstance(data, Mapping) or not all(
        isinstance(text, str) for pair in data.items() for text in pair
    ):
        raise ValueError(
            "`data` must be a dictionary from the name of a data set to its "
            f"description, both strings. Received: data={data!r:.100}."
        )
    return dict(data)


def _model(source, certificate):
    found = {
        "score": method_of(certificate),
        "head": certificate["fingerprint"],
        "inputs": None,
        "parameters": None,
    }
    if isinstance(source, keras.Model):
        found["parameters"] = int(source.count_params())
        found["inputs"] = [
            {"name": tensor.name, "shape": list(tensor.shape)}
            for tensor in source.inputs
        ]
    return found


def _counts(report):
    return {
        "known": report.known.count,
        "unknown": {result.name: result.count for result in report.unknown},
    }


def _metrics(report, certificate):
    decisions = None
    # Where each class has a threshold, or others in a batch count, a score
    # alone does not tell.
    has_one = not isinstance(certificate["threshold"], list)
    has_one &= certificate.get("judges_singly", True)
    if report.method == method_of(certificate) and has_one:
        accepted = report.known.scores <= certificate["threshold"]
        decisions = {
            "known": {
                "count": report.known.count,
                "accepted": int(accepted.sum()),
                "accepted_errors": int(
                    ((report.known.errors > 0.5) & accepted).sum()
                ),
            },
            "unknown": {
                result.name: {
                    "count": result.count,
                    "accepted": int(
                        (result.scores <= certificate["threshold"]).sum()
                    ),
                }
                for result in report.unknown
            },
        }
    return {
        "evaluation": report.to_dict(),
        "decisions": decisions,
    }


def _versions():
    backend = keras.backend.backend()
    # The backend is there already, under its own name.
    library = sys.modules.get(backend)
    return {
        "keras_halo": __version__,
        "Keras": keras.__version__,
        backend: getattr(library, "__version__", None),
        "NumPy": np.__version__,
        "Python": platform.python_version(),
    }


def _finite(value):
    """The same without numbers that JSON does not have."""
    if isinstance(value, dict):
        return {str(key): _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _text(value):
    """One line of what was given."""
    if value is None or value == "":
        return _NOT_GIVEN
    return " ".join(str(value).split())


def _listed(pairs):
    return [f"- {name}: {_text(value)}" for name, value in pairs]


def _model_lines(model):
    inputs = model["inputs"]
    if inputs is not None:
        shapes = [tuple(one["shape"]) for one in inputs]
        inputs = ", ".join(
            f"`{one['name']}` of shape {shape}"
            for one, shape in zip(inputs, shapes, strict=True)
        )
    parameters = model["parameters"]
    head = model["head"] or {}
    return _listed(
        [
            ("inputs", inputs),
            ("classes", head.get("num_classes")),
            ("parameters", parameters and f"{parameters:,}"),
            ("score", model["score"] and f"`{model['score']}`"),
        ]
    )


def _data_lines(data):
    lines = _listed((data["described"] or {"described": None}).items())
    evaluated = data["evaluated"]
    if evaluated is None:
        return [*lines, *_listed([("evaluated on", None)])]
    sets = {"known inputs": evaluated["known"]}
    sets |= {f"unknown inputs, {k}": n for k, n in evaluated["unknown"].items()}
    return lines + _listed(
        (f"evaluated on {name}", f"{count:,}") for name, count in sets.items()
    )


def _metric_parts(metrics, tables):
    if metrics is None:
        return [_NOT_GIVEN]
    parts = [tables, "", "Decisions of the rule on these data:", ""]
    decisions = metrics["decisions"]
    if decisions is None:
        return [
            *parts,
            f"{_NOT_GIVEN}, since the evaluation used another score",
        ]
    known = decisions["known"]
    rows = [["inputs", "accepted", "wrong among the accepted"]]
    rows.append(
        [
            "known",
            share(known["accepted"], known["count"]),
            share(known["accepted_errors"], known["accepted"]),
        ]
    )
    for name, found in decisions["unknown"].items():
        accepted = found["accepted"]
        # Whatever class is named, an unknown input has none of them.
        rows.append(
            [
                _text(name),
                share(accepted, found["count"]),
                share(accepted, accepted),
            ]
        )
    return [*parts, markdown_table(rows)]


def _guarantee_parts(guarantee):
    arguments = ", ".join(
        f"{name}={value!r}" for name, value in guarantee["arguments"].items()
    )
    return [
        guarantee["in_words"],
        "",
        *_listed(
            [
                ("rule", f"`{guarantee['rule'].split('>')[-1]}({arguments})`"),
                ("threshold", thresholds_in_words(guarantee["threshold"])),
                ("certificate", f"`{guarantee['certificate']}`"),
            ]
        ),
    ]


def _calibration_lines(calibration):
    return _listed(
        (words, None if calibration[name] is None else f"{calibration[name]:,}")
        for name, words in _COUNTS.items()
        # Only rules on outliers know of these.
        if calibration[name] is not None or not name.startswith("known")
    )


def _limit_lines(limits):
    return _listed(
        [
            ("not guaranteed", limits["of_the_rule"]),
            ("stated by the provider", limits["stated"]),
        ]
    )
