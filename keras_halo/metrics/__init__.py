from keras_halo.metrics.abstention_rate import AbstentionRate
from keras_halo.metrics.best_class_accuracy import BestClassAccuracy
from keras_halo.metrics.best_class_top_k_accuracy import BestClassTopKAccuracy
from keras_halo.metrics.calibration import (
    ReliabilityBins,
    brier_score,
    classwise_calibration_error,
    expected_calibration_error,
    negative_log_likelihood,
    reliability_bins,
    renormalize,
)
from keras_halo.metrics.expected_calibration import ExpectedCalibrationError
from keras_halo.metrics.packed_mean import PackedMean
from keras_halo.metrics.probability_metric import ProbabilityMetric
from keras_halo.metrics.ranking import aupr, auroc, fpr_at_recall
from keras_halo.metrics.retrieval_recall import RetrievalRecall
from keras_halo.metrics.selective import (
    RiskCoverageCurve,
    augrc,
    aurc,
    coverage_at_risk,
    risk_at_coverage,
    risk_coverage_curve,
)
from keras_halo.metrics.selective_accuracy import SelectiveAccuracy
from keras_halo.metrics.smooth_calibration import smooth_calibration_error

__all__ = [
    "AbstentionRate",
    "BestClassAccuracy",
    "BestClassTopKAccuracy",
    "ExpectedCalibrationError",
    "PackedMean",
    "ProbabilityMetric",
    "ReliabilityBins",
    "RetrievalRecall",
    "RiskCoverageCurve",
    "SelectiveAccuracy",
    "augrc",
    "aupr",
    "aurc",
    "auroc",
    "brier_score",
    "classwise_calibration_error",
    "coverage_at_risk",
    "expected_calibration_error",
    "fpr_at_recall",
    "negative_log_likelihood",
    "reliability_bins",
    "renormalize",
    "risk_at_coverage",
    "risk_coverage_curve",
    "smooth_calibration_error",
]
