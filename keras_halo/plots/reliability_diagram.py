from keras_halo.metrics import expected_calibration_error, reliability_bins
from keras_halo.plots import drawing
from keras_halo.utils.types import ArrayLike, Axes


def reliability_diagram(
    labels: ArrayLike,
    probabilities: ArrayLike,
    num_bins: int = 15,
    ax: Axes = None,
) -> Axes:
    """Draws how often a model is right against how sure it says it is.

    Samples are put into bins of equal width by their confidence, the largest
    probability. Each bin that is not empty gives a point at its mean
    confidence and its accuracy, and a line to the diagonal, where the two
    would agree: points below it are overconfident. The bars, and the areas of
    the points, show the share of samples in each bin; the expected calibration
    error is the mean length of the lines, weighted by the bars.

    Args:
        labels: Integers of shape `(N,)` or `(N, 1)`, or a distribution of
            shape `(N, K)`.
        probabilities: Array of shape `(N, K)`, the probabilities of the
            classes. As they are, the mass on abstaining counts as doubt;
            `keras_halo.metrics.renormalize` takes it out. Or packed scores, of
            which the classes alone are judged.
        num_bins: Integer, the number of bins, at most `N`. Defaults to `15`.
        ax: Optional matplotlib `Axes` to draw on. Defaults to `None`, the axes
            of a new figure.

    Returns:
        The `Axes`.

    Raises:
        ValueError: If labels and probabilities do not fit each other, or there
            are fewer samples than bins.
        ImportError: If matplotlib is missing.

    Example:

    >>> ax = keras_halo.plots.reliability_diagram(
    ...     [0, 1, 1], [[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]], num_bins=3
    ... )
    >>> ax.get_xlabel(), ax.get_ylabel()
    ('confidence', 'accuracy')

    References:

    - Chuan Guo, Geoff Pleiss, Yu Sun, Kilian Weinberger, On Calibration of
      Modern Neural Networks, 2017.
    """
    bins = reliability_bins(labels, probabilities, num_bins=num_bins)
    error = expected_calibration_error(labels, probabilities, num_bins=num_bins)
    ax = drawing.axes_or_new(ax)
    filled = bins.count > 0
    confidence, accuracy = bins.confidence[filled], bins.accuracy[filled]
    share = bins.count / bins.count.sum()
    text_color = drawing.text_color()
    ax.bar(
        bins.edges[:-1],
        share,
        width=bins.edges[1:] - bins.edges[:-1],
        align="edge",
        color=text_color,
        alpha=0.18,
        linewidth=0,
        label="share of samples",
    )
    ax.plot([0, 1], [0, 1], "--", color=text_color, linewidth=1, alpha=0.7)
    ax.vlines(
        confidence,
        confidence,
        accuracy,
        color=drawing.PALETTE[1],
        linewidth=2,
        label="gap",
    )
    ax.plot(confidence, accuracy, color=drawing.KNOWN_COLOR, alpha=0.5)
    ax.scatter(
        confidence,
        accuracy,
        # Bins of a few samples are unreliable.
        s=12.0 + 130.0 * share[filled],
        color=drawing.KNOWN_COLOR,
        label="accuracy",
        zorder=3,
    )
    ax.set(
        xlim=(-0.02, 1.02),
        ylim=(-0.02, 1.02),
        xlabel="confidence",
        ylabel="accuracy",
        title=f"ECE {100 * error:.2g} %",
        aspect="equal",
    )
    ax.legend(loc="best", framealpha=0.6)
    return ax
