import math
from collections.abc import Sequence
from typing import Any

from keras_halo.plots import drawing
from keras_halo.utils.checks import as_number
from keras_halo.utils.types import Axes


def stream_evidence(
    statuses: Sequence[Any],
    ax: Axes = None,
    false_alarm: float = 0.01,
) -> Axes:
    """Draws the evidence of a monitor that its inputs have changed.

    As long as nothing changes the evidence drifts downwards. It climbs to the
    dashed line, where the monitor raises its alarm, once unknown inputs come.

    Args:
        statuses: List of what `monitor.update` returned, in order.
        ax: Optional matplotlib `Axes` to draw on. Defaults to `None`, the axes
            of a new figure.
        false_alarm: Float in `(0, 1)`, that of the monitor. Defaults to
            `0.01`.

    Returns:
        The `Axes`.

    Raises:
        ValueError: If there is no status.
        ImportError: If matplotlib is missing.

    Example:

    >>> rng = np.random.default_rng(0)
    >>> known = rng.normal(size=1000)
    >>> rule = keras_halo.rejection.CoverageRule(method=None).fit(known)
    >>> monitor = keras_halo.rejection.StreamMonitor(rule).fit(known)
    >>> statuses = [
    ...     monitor.update(rng.normal(size=50) + 2.0 * (i > 5))
    ...     for i in range(8)
    ... ]
    >>> ax = keras_halo.plots.stream_evidence(statuses)
    >>> [line.get_label() for line in ax.get_lines()]
    ['evidence', 'alarm at 1 %', 'alarm']
    """
    if not isinstance(statuses, (list, tuple)) or not (
        statuses and all(hasattr(s, "alarm_at") for s in statuses)
    ):
        raise ValueError(
            "`statuses` must be a list of what `monitor.update` returned. "
            f"Received: {statuses!r:.100}."
        )
    false_alarm = as_number(
        false_alarm, "false_alarm", lambda v: 0.0 < v < 1.0, "in (0, 1)"
    )
    ax = drawing.axes_or_new(ax)
    ax.plot(
        [status.inputs for status in statuses],
        [status.evidence for status in statuses],
        color=drawing.KNOWN_COLOR,
        lw=1.8,
        label="evidence",
    )
    ax.axhline(
        -math.log10(false_alarm),
        color=drawing.text_color(),
        linestyle="--",
        lw=1.0,
        label=f"alarm at {100 * false_alarm:g} %",
    )
    alarm_at = statuses[-1].alarm_at
    if alarm_at is not None:
        ax.axvline(alarm_at, **drawing.unknown_style(0), label="alarm")
    ax.set(xlabel="inputs", ylabel="evidence of a change (powers of ten)")
    ax.legend(loc="best", frameon=False)
    return ax
