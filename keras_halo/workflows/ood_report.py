import dataclasses
from typing import Any

import numpy as np

from keras_halo.metrics import renormalize
from keras_halo.plots import (
    reliability_diagram,
    risk_coverage,
    score_histograms,
)
from keras_halo.plots.drawing import import_pyplot
from keras_halo.utils.types import Axes

# What is not one number: samples, kept for the plots.
_ARRAYS = ("scores", "labels", "probabilities", "errors")

_PERCENT = ("accuracy", "abstention", "ece", "auroc", "aupr", "fpr95")

_UNKNOWN_HEADERS = {
    "name": ("unknown set", ""),
    "count": ("samples", ""),
    "auroc": ("AUROC", ""),
    "aupr_unknown_positive": ("AUPR", "unknown+"),
    "aupr_known_positive": ("AUPR", "known+"),
    "fpr95_known_positive": ("FPR@95", "known+"),
    "fpr95_unknown_positive": ("FPR@95", "unknown+"),
    "abstention_rate": ("abstained", ""),
}

_KNOWN_LABELS = {
    "count": "samples",
    "accuracy": "accuracy, abstained counts as wrong",
    "accuracy_answered": "accuracy where answered",
    "accuracy_forced": "accuracy of the best class",
    "abstention_rate": "abstained",
    "ece_renormalized": "ECE, renormalized",
    "ece_with_abstain": "ECE, with abstain mass",
    "nll_renormalized": "NLL, renormalized",
    "nll_with_abstain": "NLL, with abstain mass",
    "brier_renormalized": "Brier score, renormalized",
    "brier_with_abstain": "Brier score, with abstain mass",
    "aurc": "AURC of the best class by the score",
    "augrc": "AUGRC of the best class by the score",
}

_FOOTNOTES = (
    "AUROC, AUPR, FPR@95, accuracies, ECE and abstained in %.",
    "AUPR is average precision; X+ calls side X positive.",
    "FPR@95 known+: unknown accepted while 95 % of known are (ODIN).",
    "FPR@95 unknown+: known flagged while 95 % of unknown are (OpenOOD v1.5).",
    "Renormalized: class probabilities scaled to sum to one; with abstain",
    "mass: as they are, the probability of abstaining counts as doubt.",
)


class _Result:
    """A frozen record of numbers and of arrays that cannot be written to."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                value.flags.writeable = False

    def to_dict(self) -> dict[str, Any]:
        """Returns the numbers alone, `None` for one that is not defined."""
        return {
            field.name: _json_number(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if field.name not in _ARRAYS
        }


@dataclasses.dataclass(frozen=True, eq=False)
class KnownResult(_Result):
    """How a model does on inputs of the classes it knows.

    `..._renormalized` is computed from class probabilities scaled to sum to
    one, `..._with_abstain` from them as they are, where the probability of
    abstaining is missing from every class.

    Args:
        count: Integer, the number of samples.
        accuracy: Share answered correctly; abstaining counts as wrong, as in
            Keras's `"accuracy"`.
        accuracy_answered: Accuracy where the model did not abstain; NaN if it
            always did.
        accuracy_forced: Share in which the most probable class is right,
            whether or not the model abstained.
        abstention_rate: Share in which abstaining is the most probable answer.
        ece_renormalized: Expected calibration error.
        nll_renormalized: Negative log-likelihood of the labels, in nats.
        brier_renormalized: Brier score, between 0 and 2.
        ece_with_abstain: Expected calibration error.
        nll_with_abstain: Negative log-likelihood of the labels, in nats.
        brier_with_abstain: Brier score.
        aurc: Area under the risk-coverage curve: errors of the most probable
            class, ordered by the score.
        augrc: Area under the generalized risk-coverage curve of the same.
        scores: Array of shape `(count,)`, larger for outliers.
        labels: Array of shape `(count,)`, or `(count, K)` for a distribution.
        probabilities: Array of shape `(count, K)`, with the abstain mass
            missing. However large that is, the best class has the largest.
        errors: Array of shape `(count,)`, 1 where the most probable class is
            wrong.
    """

    count: int
    accuracy: float
    accuracy_answered: float
    accuracy_forced: float
    abstention_rate: float
    ece_renormalized: float
    nll_renormalized: float
    brier_renormalized: float
    ece_with_abstain: float
    nll_with_abstain: float
    brier_with_abstain: float
    aurc: float
    augrc: float
    scores: np.ndarray = dataclasses.field(repr=False)
    labels: np.ndarray = dataclasses.field(repr=False)
    probabilities: np.ndarray = dataclasses.field(repr=False)
    errors: np.ndarray = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True, eq=False)
class UnknownResult(_Result):
    """How well a score tells one set of unknown inputs from the known ones.

    Args:
        name: String, the name of the set.
        count: Integer, the number of samples.
        auroc: Area under the ROC curve.
        aupr_unknown_positive: Average precision, unknown inputs positive.
        aupr_known_positive: Average precision, known inputs positive.
        fpr95_known_positive: Share of unknown inputs accepted at the threshold
            that accepts 95 % of the known ones.
        fpr95_unknown_positive: Share of known inputs flagged at the threshold
            that flags 95 % of the unknown ones.
        abstention_rate: Share in which abstaining is the most probable answer.
        scores: Array of shape `(count,)`, larger for outliers; `None` for a
            mean over sets.
    """

    name: str
    count: int
    auroc: float
    aupr_unknown_positive: float
    aupr_known_positive: float
    fpr95_known_positive: float
    fpr95_unknown_positive: float
    abstention_rate: float
    scores: np.ndarray | None = dataclasses.field(repr=False, default=None)


@dataclasses.dataclass(frozen=True, eq=False)
class OODReport:
    """What `evaluate_ood` found. Printing it gives a table.

    Immutable, and it can be pickled. `report["name"]` is the result of one
    unknown set, and `len(report)` their number.

    Args:
        method: String, the name of the score.
        known: `KnownResult`.
        unknown: Tuple of `UnknownResult`, one a set.
        num_bins: Integer, the bins of the calibration error.

    Example:

    >>> inputs = keras.Input((4,))
    >>> model = keras.Model(inputs, keras_halo.HALODense(2)(inputs))
    >>> x, y = np.eye(4, dtype="float32"), [0, 1, 0, 1]
    >>> report = keras_halo.evaluate_ood(
    ...     model, (x, y), {"far": 9 * x}, verbose=0, num_bins=4
    ... )
    >>> report.unknown[0] is report["far"], len(report)
    (True, 1)
    >>> sorted(report.to_dict())
    ['known', 'mean', 'method', 'num_bins', 'unknown']
    """

    method: str
    known: KnownResult
    unknown: tuple[UnknownResult, ...]
    num_bins: int

    def __getitem__(self, name: str) -> UnknownResult:
        for result in self.unknown:
            if result.name == name:
                return result
        raise KeyError(
            f"No unknown set is called {name!r}. Received sets: "
            f"{[result.name for result in self.unknown]}."
        )

    def __len__(self) -> int:
        return len(self.unknown)

    @property
    def mean(self) -> UnknownResult:
        """`UnknownResult`, the mean over sets, each set counting the same."""
        names = [
            field.name
            for field in dataclasses.fields(UnknownResult)
            if field.name not in ("name", "count", *_ARRAYS)
        ]
        return UnknownResult(
            name="mean",
            count=sum(result.count for result in self.unknown),
            **{
                name: float(np.mean([getattr(r, name) for r in self.unknown]))
                for name in names
            },
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns plain numbers, strings and dictionaries, ready for JSON.

        A number that is not defined is `None`.
        """
        return {
            "method": self.method,
            "num_bins": self.num_bins,
            "known": self.known.to_dict(),
            "unknown": {r.name: r.to_dict() for r in self.unknown},
            "mean": self.mean.to_dict(),
        }

    def to_markdown(self) -> str:
        """Returns the tables in Markdown, conventions stated beneath."""
        known, unknown, footnotes = self.tables()
        return "\n\n".join(
            [
                f"Score: `{self.method}`, larger for unknown inputs",
                markdown_table(unknown),
                markdown_table(known),
                " ".join(footnotes),
            ]
        )

    def __str__(self):
        header, *rows = self._unknown_rows()
        upper, lower = zip(*header, strict=True)
        return "\n".join(
            [
                f"Score: {self.method} (larger for unknown inputs)",
                "",
                *_aligned([upper, lower, *rows], rule_after=2, last_apart=True),
                "",
                *_aligned(
                    [["known set", ""], *self._known_rows()], rule_after=1
                ),
                "",
                *_FOOTNOTES,
            ]
        )

    def plot(self) -> Axes:
        """Draws score histograms of every set, calibration and risk-coverage.

        The threshold in the histograms is the one that accepts 95 % of the
        known inputs.

        Returns:
            A matplotlib `Figure` with `len(report) + 2` axes.

        Raises:
            ImportError: If matplotlib is missing.
        """
        plt = import_pyplot()
        num_axes = len(self) + 2
        num_columns = min(3, num_axes)
        num_rows = -(-num_axes // num_columns)
        figure = plt.figure(
            figsize=(5.2 * num_columns, 4.2 * num_rows), layout="constrained"
        )
        axes = iter(
            figure.add_subplot(num_rows, num_columns, index + 1)
            for index in range(num_axes)
        )
        threshold = float(
            np.quantile(self.known.scores, 0.95, method="inverted_cdf")
        )
        for result in self.unknown:
            ax = score_histograms(
                self.known.scores,
                {result.name: result.scores},
                threshold=threshold,
                ax=next(axes),
            )
            ax.set_title(f"{result.name}: AUROC {100 * result.auroc:.1f} %")
        ax = reliability_diagram(
            self.known.labels,
            renormalize(self.known.probabilities),
            num_bins=self.num_bins,
            ax=next(axes),
        )
        ax.set_title(f"known: {ax.get_title()}, renormalized")
        ax = risk_coverage(
            self.known.errors,
            self.known.scores,
            ax=next(axes),
            label=self.method,
        )
        ax.set_title("known: risk by coverage")
        return figure

    def tables(self) -> tuple[list[list[str]], list[list[str]], list[str]]:
        """Returns the tables as rows of strings, for other forms.

        Returns:
            Tuple: rows of the known set, rows of the unknown sets with the
            header first, and the conventions.
        """
        header, *rows = self._unknown_rows()
        header = [" ".join(words).strip() for words in header]
        known = [["known set", ""], *self._known_rows()]
        return known, [header, *rows], list(_FOOTNOTES)

    def _unknown_rows(self):
        results = [*self.unknown, self.mean]
        return [
            list(_UNKNOWN_HEADERS.values()),
            *(
                [_cell(key, getattr(result, key)) for key in _UNKNOWN_HEADERS]
                for result in results
            ),
        ]

    def _known_rows(self):
        return [
            [label, _cell(key, getattr(self.known, key))]
            for key, label in _KNOWN_LABELS.items()
        ]


def _json_number(value):
    return None if isinstance(value, float) and np.isnan(value) else value


def _cell(key, value):
    if isinstance(value, str):
        # A line break in the name of a set would end the row of a table.
        return " ".join(value.split())
    if isinstance(value, int):
        return f"{value:,}"
    if np.isnan(value):
        return "n/a"
    return f"{100 * value:.1f}" if key.startswith(_PERCENT) else f"{value:.4f}"


def _aligned(rows, rule_after, last_apart=False):
    """Lines of a table, the first column to the left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [
                cell.rjust(width)
                for cell, width in zip(row[1:], widths[1:], strict=True)
            ]
        ).rstrip()
        for row in rows
    ]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    lines.insert(rule_after, rule)
    if last_apart:
        lines.insert(-1, rule)
    return lines


def markdown_table(rows):
    """Returns a table in Markdown, numbers to the right.

    Args:
        rows: List of lists of strings, the header first.

    Returns:
        String.

    Example:

    >>> print(markdown_table([["set", "samples"], ["a|b", "17"]]))
    | set | samples |
    | :-- | --: |
    | a\\|b | 17 |
    """
    escaped = [
        [cell.replace("\\", "\\\\").replace("|", r"\|") for cell in row]
        for row in rows
    ]
    rule = [":--"] + ["--:"] * (len(rows[0]) - 1)
    lines = [escaped[0], rule, *escaped[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)
