from keras_halo.evaluation.evaluate_ood import evaluate_ood
from keras_halo.evaluation.ood_report import (
    KnownResult,
    OODReport,
    UnknownResult,
)

__all__ = ["KnownResult", "OODReport", "UnknownResult", "evaluate_ood"]
