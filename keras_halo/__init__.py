"""HALO for Keras 3: classifiers that can say "I don't know"."""

from keras_halo import (
    callbacks,
    layers,
    losses,
    metrics,
    ops,
    plots,
    rejection,
    workflows,
)
from keras_halo.callbacks import OODMonitor
from keras_halo.layers import HALODense, HALOSimilarity, HALOSoftmax
from keras_halo.losses import HALOContrastiveLoss, HALOLoss
from keras_halo.ops.labels import matches
from keras_halo.ops.ood_scores import OOD_METHODS, ood_score
from keras_halo.version import __version__
from keras_halo.workflows import (
    Calibration,
    OODReport,
    Predictions,
    SKLearnClassifier,
    calibrate,
    convert_head,
    decode_predictions,
    evaluate_ood,
    fit_class_gaussians,
    pair_log_odds,
)

__all__ = [
    "OOD_METHODS",
    "Calibration",
    "HALOContrastiveLoss",
    "HALODense",
    "HALOLoss",
    "HALOSimilarity",
    "HALOSoftmax",
    "OODMonitor",
    "OODReport",
    "Predictions",
    "SKLearnClassifier",
    "__version__",
    "calibrate",
    "callbacks",
    "convert_head",
    "decode_predictions",
    "evaluate_ood",
    "fit_class_gaussians",
    "layers",
    "losses",
    "matches",
    "metrics",
    "ood_score",
    "ops",
    "pair_log_odds",
    "plots",
    "rejection",
    "workflows",
]


def __dir__():
    return sorted(__all__)
