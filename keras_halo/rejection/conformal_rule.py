from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from keras_halo.rejection import bounds
from keras_halo.rejection.readings import check_fraction
from keras_halo.rejection.rejection_rule import RejectionRule
from keras_halo.rejection.wording import percent
from keras_halo.utils.checks import as_boolean
from keras_halo.utils.extras import require
from keras_halo.utils.types import Array, Scores


@keras.saving.register_keras_serializable(package="keras_halo")
class ConformalRule(RejectionRule):
    """Rejects inputs that rank too high among calibration data to be known.

    Every input gets a p-value, the chance that a known input scores as high:
    its rank among the calibration scores of known inputs. Rejecting where
    `p <= alpha` raises a false alarm for a known input with probability at
    most `alpha`, calibration set and input both random: the decisions of
    `CoverageRule(1 - alpha)`, with a p-value for each.

    With `fdr=True` the p-values of all inputs (and positions) in one call of
    `predict` are judged together by the procedure of Benjamini and Hochberg:
    among the inputs it rejects, on average over calibration sets and batches
    at most `alpha` are known (the share counts as zero where none is
    rejected). The more outliers a batch holds, the lower the p-value that
    suffices; a batch without any is left alone with probability `1 - alpha`
    at least. As no p-value is below `1 / (n + 1)`, a batch of `B` inputs with
    fewer than `B / (alpha * (n + 1))` outliers has all of them accepted:
    calibrate on several times `B / alpha` samples to find single ones. The
    control of false discoveries is proved for scores without ties; ties only
    make p-values larger. So does rounding: a calibration score counts as
    higher where it is lower by less than another batch size or compiler may
    move it.

    Formula:

    ```python
    p(s) = (1 + #{i : calibration_scores[i] >= s}) / (n + 1)
    rejected = p <= alpha                                     # fdr=False
    rejected = benjamini_hochberg(p) <= alpha                 # fdr=True
    ```

    Args:
        alpha: Float in `(0, 1)`, the rate of false alarms, or of false
            discoveries. Defaults to `0.05`.
        method: String, one of `keras_halo.OOD_METHODS`, for packed scores;
            `None` for plain scores. Defaults to `"abstain"`.
        fdr: Boolean, whether to control false discoveries of whole batches
            instead of false alarms of single inputs. Defaults to `False`.

    Raises:
        ValueError: If an argument is out of range. `fit` raises it if there
            are fewer than `1 / alpha - 1` calibration samples.

    Example:

    >>> rule = ConformalRule(0.1, method=None).fit(np.arange(99.0))
    >>> rule.p_values([49.0, 500.0]).tolist()
    [0.51, 0.01]
    >>> rule.predict([49.0, 500.0]).accepted.tolist()
    [True, False]

    References:

    - Stephen Bates, Emmanuel Candes, Lihua Lei, Yaniv Romano, Matteo Sesia,
      Testing for Outliers with Conformal p-values, 2023.
    - Yoav Benjamini, Yosef Hochberg, Controlling the False Discovery Rate: A
      Practical and Powerful Approach to Multiple Testing, 1995.
    """

    parameters = ("alpha", "fdr")
    keeps_scores = True

    def __init__(
        self,
        alpha: float = 0.05,
        method: str | None = "abstain",
        fdr: bool = False,
    ) -> None:
        super().__init__(method)
        self.alpha = check_fraction("alpha", alpha)
        self.fdr = as_boolean(fdr, "fdr", "The level is `alpha` in both cases.")

    @property
    def threshold(self) -> float:
        """Float, the largest score that is accepted.

        With `fdr=True` inputs up to it are accepted in every batch; what else
        is accepted depends on the batch.
        """
        return super().threshold

    def p_values(self, scores: Scores) -> Array:
        """Computes the conformal p-value of each input.

        Args:
            scores: Scores of the kind and the model that the rule was fitted
                on: packed of shape `(..., packed_width)`, or plain of shape
                `(...)`.

        Returns:
            Array of shape `(...)`, small for outliers, at least `1 / (n + 1)`.

        Raises:
            ValueError: If the rule is not fitted, or the scores are not usable
                or come from another model.
        """
        reading = self.read(scores)
        return bounds.conformal_p_values(
            reading.scores, self.calibration_scores
        )

    @property
    def judges_singly(self) -> bool:
        return not self.fdr

    def samples_needed(self) -> int:
        return bounds.samples_for_coverage(1.0 - self.alpha)

    def find_threshold(
        self, scores: Array, wrong: Array | None
    ) -> tuple[float, Array | None]:
        coverage = 1.0 - self.alpha
        self.require_samples(len(scores))
        scores = np.sort(scores)
        rank = bounds.coverage_rank(len(scores), coverage)
        threshold = bounds.threshold_above(float(scores[rank - 1]), scores)
        return threshold, scores

    def accepts(self, scores: Array) -> Array:
        if not self.fdr:
            return super().accepts(scores)
        # What is not finite is rejected, and must not make others easier to
        # reject.
        judged = np.isfinite(scores)
        accepted = np.zeros(scores.shape, bool)
        if judged.any():
            p_values = bounds.conformal_p_values(
                scores[judged], self.calibration_scores
            )
            adjusted = require("scipy.stats").false_discovery_control(
                p_values, method="bh"
            )
            accepted[judged] = adjusted > self.alpha
        return accepted

    def state_guarantee(self) -> str:
        if self.fdr:
            return (
                f"On average at most {percent(self.alpha)} of the inputs that "
                "are rejected in a batch are known inputs."
            )
        return (
            f"On average at most {percent(self.alpha)} of known inputs to come "
            "are rejected."
        )

    def describe_calibration(self, calibration: Any) -> Iterator[str]:
        if not self.fdr:
            yield from super().describe_calibration(calibration)
            return
        yield f"smallest p-value {1.0 / (calibration.samples + 1.0):.3g}"
