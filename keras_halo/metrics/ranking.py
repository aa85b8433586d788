"""How well a score tells known inputs from unknown ones, on a whole data set.

Scores are larger for outliers. Only their order counts: every function is
unchanged by any increasing transformation of the scores, and none squashes
them, so that distances of thousands stay apart.
"""

import numpy as np

from keras_halo.utils.checks import as_number, finite_vector
from keras_halo.utils.extras import require
from keras_halo.utils.types import ArrayLike

SIDES = ("known", "unknown")


def auroc(known: ArrayLike, unknown: ArrayLike) -> float:
    """Computes the area under the ROC curve of unknown against known inputs.

    It is how often an unknown input outscores a known one, the same whichever
    side is called positive.

    Formula:

    ```python
    auroc = P(unknown > known) + P(unknown == known) / 2
    ```

    Args:
        known: 1-D array, the scores of inputs of the known classes.
        unknown: 1-D array, the scores of outliers.

    Returns:
        Float in `[0, 1]`; 0.5 for a score that knows nothing.

    Raises:
        ValueError: If a side is empty, not 1-D, or not finite.

    Example:

    >>> auroc(known=[0.1, 0.2, 0.3], unknown=[0.3, 5000.0])
    0.9166666666666667
    """
    labels, ranks = _labelled_ranks(known, unknown, positive="unknown")
    sklearn_metrics = require("sklearn.metrics")
    false_positive_rate, true_positive_rate, _ = sklearn_metrics.roc_curve(
        labels, ranks
    )
    return float(sklearn_metrics.auc(false_positive_rate, true_positive_rate))


def aupr(
    known: ArrayLike, unknown: ArrayLike, positive: str = "unknown"
) -> float:
    """Computes the area under the precision-recall curve (average precision).

    Unlike `auroc` it depends on how many inputs either side has, and on the
    side that is called positive.

    Formula:

    ```python
    aupr = sum_n (recall_n - recall_{n-1}) * precision_n
    ```

    over the distinct thresholds, without interpolation.

    Args:
        known: 1-D array, the scores of inputs of the known classes.
        unknown: 1-D array, the scores of outliers.
        positive: String, `"unknown"` (often called AUPR-Out) or `"known"`
            (AUPR-In). Defaults to `"unknown"`.

    Returns:
        Float in `[0, 1]`; the share of positives for a score that knows
        nothing.

    Raises:
        ValueError: If a side is empty, not 1-D, or not finite, or `positive`
            is not one of the two sides.

    Example:

    >>> aupr(known=[0.1, 0.4], unknown=[0.3, 0.5])
    0.8333333333333333
    """
    labels, ranks = _labelled_ranks(known, unknown, positive)
    return float(
        require("sklearn.metrics").average_precision_score(labels, ranks)
    )


def fpr_at_recall(
    known: ArrayLike,
    unknown: ArrayLike,
    recall: float = 0.95,
    positive: str = "known",
) -> float:
    """Computes the false positive rate at a recall, by default FPR@95.

    The share of the other side that is let in when a recall must be reached.

    Two conventions share the name "FPR@95", and the same scores can give 20 %
    in one and 77 % in the other. State which one a number follows:

    - `positive="known"`: accept at least 95 % of the known inputs; the share
      of unknown ones that is accepted with them. The convention of ODIN and
      of the papers after it.
    - `positive="unknown"`: detect at least 95 % of the unknown inputs; the
      share of known ones that is flagged with them. The convention of OpenOOD
      v1.5.

    With ties the threshold is the first at which the recall is *at least*
    `recall`; tied inputs pass it together.

    Args:
        known: 1-D array, the scores of inputs of the known classes.
        unknown: 1-D array, the scores of outliers.
        recall: Float in `(0, 1]`. Defaults to `0.95`.
        positive: String, the side whose recall is meant. Defaults to
            `"known"`.

    Returns:
        Float in `[0, 1]`; smaller is better.

    Raises:
        ValueError: If a side is empty, not 1-D, or not finite, `recall` is
            out of range, or `positive` is not one of the two sides.

    Example:

    >>> known, unknown = [0.1, 0.2, 0.3, 0.9], [0.25, 0.8, 0.85, 1.0]
    >>> fpr_at_recall(known, unknown, recall=0.75, positive="known")
    0.25
    >>> fpr_at_recall(known, unknown, recall=1.0, positive="unknown")
    0.5

    References:

    - Shiyu Liang, Yixuan Li, R. Srikant, Enhancing the reliability of
      out-of-distribution image detection in neural networks, 2018.
    - Jingyang Zhang et al., OpenOOD v1.5: Enhanced benchmark for
      out-of-distribution detection, 2023.
    """
    recall = as_number(
        recall,
        "recall",
        lambda share: 0.0 < share <= 1.0,
        "in (0, 1]",
        "Write 95 % as 0.95.",
    )
    labels, ranks = _labelled_ranks(known, unknown, positive)
    sklearn_metrics = require("sklearn.metrics")
    false_positive_rate, true_positive_rate, _ = sklearn_metrics.roc_curve(
        labels, ranks, drop_intermediate=False
    )
    return float(false_positive_rate[np.argmax(true_positive_rate >= recall)])


def _labelled_ranks(known, unknown, positive):
    """Labels (1: positive) and ranks that grow towards the positive side."""
    if not isinstance(positive, str) or positive not in SIDES:
        raise ValueError(
            f"`positive` must be one of {SIDES}. Received: "
            f"positive={positive!r}."
        )
    known = finite_vector(known, "known")
    unknown = finite_vector(unknown, "unknown")
    is_unknown = np.repeat([0, 1], [known.size, unknown.size])
    # Ranks carry the order alone: their differences neither overflow nor
    # vanish, however large or small the scores are.
    _, ranks = np.unique(np.concatenate([known, unknown]), return_inverse=True)
    ranks = ranks.astype("float64")
    if positive == "known":
        return 1 - is_unknown, -ranks
    return is_unknown, ranks
