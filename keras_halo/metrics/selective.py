"""What answering costs when the least sure answers are held back.

Uncertainty is larger for less sure answers; any score for outliers will do.
With that of unknown inputs, to accept one of them is an error too: errors and
outliers are judged in one number ("SCOD", selective classification in the
presence of out-of-distribution data).
Only its order counts. Samples of equal uncertainty are one group, accepted or
held back together, so that no result depends on the order of the samples.
"""

import collections

import numpy as np

from keras_halo.utils.checks import as_number, finite_vector
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
    errors: ArrayLike,
    uncertainty: ArrayLike,
    unknown: ArrayLike | None = None,
) -> RiskCoverageCurve:
    """Computes risk and coverage at every threshold of the uncertainties.

    Formula:

    ```python
    coverage(t) = mean(uncertainty <= t)
    risk(t) = mean(errors[uncertainty <= t])
    ```

    Args:
        errors: 1-D array, what each answer costs: booleans or 0 and 1 for
            right and wrong, or any loss.
        uncertainty: 1-D array of the same length, larger for less sure.
        unknown: Optional 1-D array, the uncertainty of unknown inputs, each of
            which costs 1 where it is accepted. Defaults to `None`.

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
    threshold, size, total = _tied_groups(errors, uncertainty, unknown)
    accepted = np.cumsum(size)
    return RiskCoverageCurve(
        coverage=accepted / accepted[-1],
        risk=np.cumsum(total) / accepted,
        threshold=threshold,
    )


def aurc(
    errors: ArrayLike,
    uncertainty: ArrayLike,
    unknown: ArrayLike | None = None,
) -> float:
    """Computes the area under the risk-coverage curve.

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
        unknown: Optional 1-D array, the uncertainty of unknown inputs, each of
            which costs 1 where it is accepted. Defaults to `None`.

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
    - Guoxuan Xia, Christos-Savvas Bouganis, Augmenting Softmax Information for
      Selective Classification with Out-of-Distribution Data, 2022. (SCOD.)
    """
    _, size, total = _tied_groups(errors, uncertainty, unknown)
    spread = np.repeat(total / size, size)
    accepted = np.arange(1, spread.size + 1)
    return float(np.mean(np.cumsum(spread) / accepted))


def augrc(
    errors: ArrayLike,
    uncertainty: ArrayLike,
    unknown: ArrayLike | None = None,
) -> float:
    """Computes the area under the generalized risk-coverage curve.

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
        unknown: Optional 1-D array, the uncertainty of unknown inputs, each of
            which costs 1 where it is accepted. Defaults to `None`.

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
    _, size, total = _tied_groups(errors, uncertainty, unknown)
    num_samples = size.sum()
    upper = np.cumsum(total) / num_samples
    middle = upper - 0.5 * total / num_samples
    return float(np.sum(middle * size) / num_samples)


def risk_at_coverage(
    errors: ArrayLike,
    uncertainty: ArrayLike,
    coverage: float = 0.8,
    unknown: ArrayLike | None = None,
) -> float:
    """Computes the mean error where at least a share of samples is accepted.

    Formula:

    ```python
    curve.risk[curve.coverage >= coverage][0]
    ```

    Args:
        errors: 1-D array, what each answer costs: booleans or 0 and 1 for
            right and wrong, or any loss.
        uncertainty: 1-D array of the same length, larger for less sure.
        coverage: Float in `(0, 1]`. Defaults to `0.8`.
        unknown: Optional 1-D array, the uncertainty of unknown inputs, each of
            which costs 1 where it is accepted. Defaults to `None`.

    Returns:
        Float, the risk at the lowest threshold that accepts so many.

    Raises:
        ValueError: If an array is empty, not 1-D, or not finite, their lengths
            differ, or `coverage` is out of range.

    Example:

    >>> risk_at_coverage([0, 0, 0, 1], [0.1, 0.2, 0.3, 0.4], coverage=0.75)
    0.0
    """
    coverage = _check_share("coverage", coverage)
    curve = risk_coverage_curve(errors, uncertainty, unknown)
    # 0.07 * 100 is more than seven.
    place = np.argmax(curve.coverage >= coverage - 1e-12)
    return float(curve.risk[place])


def coverage_at_risk(
    errors: ArrayLike,
    uncertainty: ArrayLike,
    risk: float = 0.05,
    unknown: ArrayLike | None = None,
) -> float:
    """Computes the largest share of samples accepted at a mean error.

    It is chosen on the very samples it is measured on, hence no guarantee for
    others: see `keras_halo.rejection.SelectiveRiskRule`.

    Formula:

    ```python
    max(curve.coverage[curve.risk <= risk])
    ```

    Args:
        errors: 1-D array, what each answer costs: booleans or 0 and 1 for
            right and wrong, or any loss.
        uncertainty: 1-D array of the same length, larger for less sure.
        risk: Float in `(0, 1]`. Defaults to `0.05`.
        unknown: Optional 1-D array, the uncertainty of unknown inputs, each of
            which costs 1 where it is accepted. Defaults to `None`.

    Returns:
        Float; larger is better. 0 where the surest answers are too often wrong.

    Raises:
        ValueError: If an array is empty, not 1-D, or not finite, their lengths
            differ, or `risk` is out of range.

    Example:

    >>> coverage_at_risk([0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4], risk=0.4)
    0.75
    """
    risk = _check_share("risk", risk)
    curve = risk_coverage_curve(errors, uncertainty, unknown)
    kept = curve.coverage[curve.risk <= risk + 1e-12]
    return float(kept.max()) if kept.size else 0.0


def _check_share(name, value):
    return as_number(value, name, lambda share: 0.0 < share <= 1.0, "in (0, 1]")


def _tied_groups(errors, uncertainty, unknown):
    """Distinct uncertainties, the size and the total error of each group."""
    errors = finite_vector(errors, "errors")
    uncertainty = finite_vector(uncertainty, "uncertainty")
    if errors.size != uncertainty.size:
        raise ValueError(
            "`errors` and `uncertainty` must have one entry for each sample. "
            f"Received: {errors.size} errors and {uncertainty.size} "
            "uncertainties. Pass both for the same samples."
        )
    if unknown is not None:
        unknown = finite_vector(unknown, "unknown")
        errors = np.concatenate([errors, np.ones(unknown.size)])
        uncertainty = np.concatenate([uncertainty, unknown])
    threshold, group, size = np.unique(
        uncertainty, return_inverse=True, return_counts=True
    )
    return threshold, size, np.bincount(group, weights=errors)
