"""What answering costs when the least sure answers are held back.

Uncertainty is larger for less sure answers; any score for outliers will do.
Only its order counts. Samples of equal uncertainty are one group, accepted or
held back together, so that no result depends on the order of the samples.
"""

import collections

import numpy as np

from keras_halo.utils.checks import finite_vector
from keras_halo.utils.types import ArrayLike

RiskCoverageCurve = collections.namedtuple(
    "RiskCoverageCurve", ["coverage", "risk", "threshold"]
)
RiskCoverageCurve.__doc__ = """Risk among the accepted samples, by coverage.

Args:
    coverage: Array of shape `(T,)`, increasing and ending in 1: the share of
        samples with `uncertainty <= threshold`.
    risk: Array of shape `(T,)`, the mean error of those samples.
    threshold: Array of shape `(T,)`, the distinct uncertainties, increasing.
"""


def risk_coverage_curve(
    errors: ArrayLike, uncertainty: ArrayLike
) -> RiskCoverageCurve:
    """Risk and coverage at every threshold that the uncertainties allow.

    Formula:

    ```python
    coverage(t) = mean(uncertainty <= t)
    risk(t) = mean(errors[uncertainty <= t])
    ```

    Args:
        errors: 1-D array, what each answer costs: booleans or 0 and 1 for
            right and wrong, or any loss.
        uncertainty: 1-D array of the same length, larger for less sure.

    Returns:
        `RiskCoverageCurve` with one point for each distinct uncertainty.

    Raises:
        ValueError: If an array is empty, not 1-D, or not finite, or their
            lengths differ.

    Example:

    >>> curve = risk_coverage_curve([0, 1, 1, 0], [0.1, 0.7, 0.9, 0.7])
    >>> curve.coverage.tolist(), curve.risk.round(2).tolist()
    ([0.25, 0.75, 1.0], [0.0, 0.33, 0.5])

    References:

    - Yonatan Geifman, Ran El-Yaniv, Selective classification for deep neural
      networks, 2017.
    """
    threshold, size, total = _tied_groups(errors, uncertainty)
    accepted = np.cumsum(size)
    return RiskCoverageCurve(
        coverage=accepted / accepted[-1],
        risk=np.cumsum(total) / accepted,
        threshold=threshold,
    )


def aurc(errors: ArrayLike, uncertainty: ArrayLike) -> float:
    """Area under the risk-coverage curve.

    The mean risk over the `N` coverages `1/N, 2/N, ..., 1`. Within a group of
    tied samples no order is better than another: the result is the mean over
    all of their orders, which is what spreading the errors of the group evenly
    over it gives.

    Formula:

    ```python
    aurc = mean_n(sum(e[:n]) / n)    for n = 1, ..., N
    ```

    with the errors `e` in order of increasing uncertainty, each replaced by
    the mean of its tied group.

    Args:
        errors: 1-D array, what each answer costs: booleans or 0 and 1 for
            right and wrong, or any loss.
        uncertainty: 1-D array of the same length, larger for less sure.

    Returns:
        Float; smaller is better.

    Raises:
        ValueError: If an array is empty, not 1-D, or not finite, or their
            lengths differ.

    Example:

    >>> aurc([0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4])
    0.20833333333333331

    References:

    - Yonatan Geifman, Guy Uziel, Ran El-Yaniv, Bias-reduced uncertainty
      estimation for deep neural classifiers, 2019.
    """
    _, size, total = _tied_groups(errors, uncertainty)
    spread = np.repeat(total / size, size)
    accepted = np.arange(1, spread.size + 1)
    return float(np.mean(np.cumsum(spread) / accepted))


def augrc(errors: ArrayLike, uncertainty: ArrayLike) -> float:
    """Area under the generalized risk-coverage curve.

    The generalized risk is the share of *all* samples that are accepted and
    wrong. Unlike the risk among the accepted ones it does not give the first
    few samples a weight without bound, which makes the area the better
    behaved successor of `aurc`.

    Formula:

    ```python
    augrc = integral of mean(errors * (uncertainty <= t)) over coverage(t)
    ```

    by the trapezoidal rule from the point `(0, 0)` through one point for each
    distinct uncertainty. For errors of 0 and 1 that is
    `(1 - auroc) * accuracy * (1 - accuracy) + (1 - accuracy) ** 2 / 2`, where
    `auroc` tells wrong from right answers by their uncertainty.

    Args:
        errors: 1-D array, what each answer costs: booleans or 0 and 1 for
            right and wrong, or any loss.
        uncertainty: 1-D array of the same length, larger for less sure.

    Returns:
        Float; smaller is better, and at most half for errors of 0 and 1.

    Raises:
        ValueError: If an array is empty, not 1-D, or not finite, or their
            lengths differ.

    Example:

    >>> augrc([0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4])
    0.125

    References:

    - Jeremias Traub et al., Overcoming common flaws in the evaluation of
      selective classification systems, 2024.
    """
    _, size, total = _tied_groups(errors, uncertainty)
    num_samples = size.sum()
    upper = np.cumsum(total) / num_samples
    middle = upper - 0.5 * total / num_samples
    return float(np.sum(middle * size) / num_samples)


def _tied_groups(errors, uncertainty):
    """Distinct uncertainties, the size and the total error of each group."""
    errors = finite_vector(errors, "errors")
    uncertainty = finite_vector(uncertainty, "uncertainty")
    if errors.size != uncertainty.size:
        raise ValueError(
            "`errors` and `uncertainty` must have one entry for each sample. "
            f"Received: {errors.size} errors and {uncertainty.size} "
            "uncertainties. Pass both for the same samples."
        )
    threshold, group, size = np.unique(
        uncertainty, return_inverse=True, return_counts=True
    )
    return threshold, size, np.bincount(group, weights=errors)
