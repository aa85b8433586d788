import numpy as np

from keras_halo.metrics import aurc, risk_coverage_curve
from keras_halo.plots import drawing
from keras_halo.utils.checks import check_string, to_array
from keras_halo.utils.types import ArrayLike, Axes

_GID = "keras_halo_risk_coverage"


def risk_coverage(
    errors: ArrayLike,
    uncertainty: ArrayLike,
    ax: Axes = None,
    label: str = "risk",
) -> Axes:
    """Draws the error rate among the samples kept against the share kept.

    Samples are kept from the least uncertain on. The dashed line of the same
    colour is the best that any order of the same samples could do: no error
    until all correct ones are kept. Call it again with the same `ax` to
    compare uncertainties or models.

    Formula:

    ```python
    coverage(t) = mean(uncertainty <= t)
    risk(t) = mean(errors[uncertainty <= t])
    ```

    Args:
        errors: Array of shape `(N,)`, 1 or `True` where the prediction is
            wrong, or any loss.
        uncertainty: Array of shape `(N,)`, larger for less certain, such as
            `keras_halo.ood_score`.
        ax: Optional matplotlib `Axes` to draw on. Defaults to `None`, the axes
            of a new figure.
        label: String, the name of the curve in the legend. Defaults to
            `"risk"`.

    Returns:
        The `Axes`.

    Raises:
        ValueError: If errors and uncertainty do not fit each other, or
            `label` is no string.
        ImportError: If matplotlib is missing.

    Example:

    >>> ax = keras_halo.plots.risk_coverage([0, 0, 1], [0.1, 0.2, 0.9])
    >>> ax.get_xlabel()
    'coverage (share of samples kept)'

    References:

    - Yonatan Geifman, Ran El-Yaniv, Selective Classification for Deep Neural
      Networks, 2017.
    """
    check_string(label, "label", "Leave it out for 'risk'.")
    curve = risk_coverage_curve(errors, uncertainty)
    area = aurc(errors, uncertainty)
    ax = drawing.axes_or_new(ax)
    drawn = [line for line in ax.get_lines() if line.get_gid() == _GID]
    color = drawing.PALETTE[len(drawn) % len(drawing.PALETTE)]
    ax.plot(
        curve.coverage,
        curve.risk,
        # A single point makes no line.
        marker="o" if len(curve.risk) == 1 else None,
        color=color,
        linewidth=2,
        label=f"{label} (AURC {area:.3g})",
        gid=_GID,
    )
    coverage, risk = _best_curve(to_array(errors, "errors"))
    ax.plot(
        coverage,
        risk,
        color=color,
        linestyle="--",
        linewidth=1,
        alpha=0.8,
        label=None if drawn else "best order possible",
    )
    ax.set(
        xlim=(0, 1.01),
        xlabel="coverage (share of samples kept)",
        ylabel="risk (error rate among them)",
    )
    # `auto=None`: a curve that is drawn later may still need more room.
    ax.set_ylim(bottom=0, auto=None)
    ax.legend(loc="best", framealpha=0.6)
    return ax


def _best_curve(errors):
    kept = np.arange(1, len(errors) + 1)
    return kept / len(errors), np.cumsum(np.sort(errors)) / kept
