from collections.abc import Mapping

import numpy as np

from keras_halo.plots import drawing
from keras_halo.utils.checks import as_integer, as_number, finite_vector
from keras_halo.utils.types import ArrayLike, Axes

# Beyond this many times the spread of the known scores, a linear axis would
# squeeze the known ones into a bin or two.
_MAX_LINEAR_SPREADS = 12.0

# Share of the largest score below which a logarithmic axis turns linear.
_MIN_LINEAR = 1e-6

# Differences below this are none: the steps of an axis would fall below the
# smallest normal number, and its transforms overflow.
_TINY = 1e-290

# Beyond this the width of an axis with its margins may be infinite.
_HUGE = 1e300


def score_histograms(
    known: ArrayLike,
    unknown: ArrayLike | Mapping[str, ArrayLike],
    threshold: float | None = None,
    ax: Axes = None,
    num_bins: int = 50,
) -> Axes:
    """Draws how scores of known inputs and of unknown ones are distributed.

    All histograms share their bins, and their heights are shares of the set,
    so that sets of different sizes compare. Where some scores lie far beyond
    the range of the known ones, the axis is linear over that range and
    logarithmic beyond it, with bins of equal width on paper.

    Args:
        known: Scores of shape `(N,)` of inputs of the known classes.
        unknown: Scores of shape `(M,)`, or a dictionary of name to scores.
        threshold: Optional float, the score above which a rule rejects. It is
            drawn, with the direction of rejection. Defaults to `None`.
        ax: Optional matplotlib `Axes` to draw on. Defaults to `None`, the axes
            of a new figure.
        num_bins: Integer, the number of bins. Defaults to `50`.

    Returns:
        The `Axes`.

    Raises:
        ValueError: If a set of scores is empty, not one-dimensional or not
            finite, or the threshold is not finite.
        ImportError: If matplotlib is missing.

    Example:

    >>> ax = keras_halo.plots.score_histograms(
    ...     [1.0, 2.0, 3.0], {"noise": [7.0, 8.0]}, threshold=5.0
    ... )
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['known', 'noise']
    """
    known = finite_vector(known, "known")
    if not isinstance(unknown, Mapping):
        unknown = {"unknown": unknown}
    unknown = {
        name: finite_vector(scores, f"unknown[{name!r}]")
        for name, scores in unknown.items()
    }
    if not unknown:
        raise ValueError(
            "`unknown` must hold at least one set of scores. Received: an "
            "empty dictionary."
        )
    if threshold is not None:
        threshold = as_number(
            threshold, "threshold", np.isfinite, "finite, or `None`"
        )
    num_bins = as_integer(num_bins, "num_bins", 1)
    everything = np.concatenate([known, *unknown.values()])
    shown = everything if threshold is None else [*everything, threshold]
    low, high = float(np.min(shown)), float(np.max(shown))
    if max(-low, high) > _HUGE:
        raise ValueError(
            f"Scores to draw must be below {_HUGE:g} in magnitude: differences "
            "of larger ones are infinite. Received: scores and threshold from "
            f"{low:g} to {high:g}. Draw their logarithms."
        )
    ax = drawing.axes_or_new(ax)
    linear_range = _linear_range(known, low, high)
    if linear_range is not None:
        ax.set_xscale("symlog", linthresh=linear_range, linscale=1.5)
    edges = _edges(ax, low, high, num_bins)

    ax.stairs(
        _shares(known, edges),
        edges,
        fill=True,
        facecolor=(drawing.KNOWN_COLOR, 0.4),
        edgecolor=drawing.KNOWN_COLOR,
        linewidth=1.2,
        label="known",
    )
    for index, (name, scores) in enumerate(unknown.items()):
        ax.stairs(
            _shares(scores, edges),
            edges,
            linewidth=1.8,
            label=name,
            **drawing.unknown_style(index),
        )
    ax.set(
        xlim=(edges[0], edges[-1]),
        xlabel="score (larger: more likely unknown)",
        ylabel="share of the set per bin",
    )
    # Room above the bars for the legend and the name of the threshold.
    ax.set_ylim(0, 1.25 * ax.dataLim.ymax)
    ax.legend(loc="best", frameon=False)
    if threshold is not None:
        _draw_threshold(ax, threshold)
    return ax


def _linear_range(known, low, high):
    """Up to which magnitude the axis is linear, `None` if it is everywhere."""
    inner = np.quantile(known, [0.01, 0.99])
    if high - low <= _MAX_LINEAR_SPREADS * (inner[1] - inner[0]):
        return None
    extreme = max(abs(low), abs(high))
    # The floor keeps the number of decades on the axis readable.
    linear_range = max(float(np.max(np.abs(inner))), _MIN_LINEAR * extreme)
    if linear_range < _TINY or extreme < 10.0 * linear_range:
        return None
    return linear_range


def _edges(ax, low, high, num_bins):
    """Bin edges at equal distances on paper."""
    if high - low < _TINY:
        margin = 0.5 * max(abs(low), 1.0)
        low, high = low - margin, high + margin
    scale = ax.xaxis.get_transform()
    on_paper = np.linspace(
        *scale.transform(np.array([low, high])), num_bins + 1
    )
    edges = scale.inverted().transform(on_paper)
    # Rounding must not leave the extremes out.
    edges[0], edges[-1] = low, high
    return edges


def _shares(scores, edges):
    return np.histogram(scores, edges)[0] / len(scores)


def _draw_threshold(ax, threshold):
    color = drawing.text_color()
    ax.axvline(threshold, color=color, linestyle="--", linewidth=1.5)
    left, right = ax.get_xlim()
    scale = ax.xaxis.get_transform()
    place, start, end = scale.transform(np.array([threshold, left, right]))
    beyond_half = place > (start + end) / 2
    ax.annotate(
        f"rejected above {threshold:.4g} \N{RIGHTWARDS ARROW}",
        (threshold, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(-5 if beyond_half else 5, -4),
        textcoords="offset points",
        ha="right" if beyond_half else "left",
        va="top",
        color=color,
        path_effects=drawing.outlined(ax),
    )
