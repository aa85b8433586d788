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
from keras_halo.ops.labels import pair_labels
from keras_halo.ops.ood_scores import OOD_METHODS, ood_score
from keras_halo.version import __version__
from keras_halo.workflows import (
    CalibrationReport,
    OODReport,
    Predictions,
    SKLearnClassifier,
    add_abstention,
    calibrate,
    convert_head,
    decode_predictions,
    evaluate_ood,
    fit_class_gaussians,
    guard,
    model_card,
    pair_log_odds,
    read_certificate,
    replay,
)

__all__ = [
    "OOD_METHODS",
    "CalibrationReport",
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
    "add_abstention",
    "calibrate",
    "callbacks",
    "convert_head",
    "decode_predictions",
    "evaluate_ood",
    "fit_class_gaussians",
    "guard",
    "layers",
    "losses",
    "metrics",
    "model_card",
    "ood_score",
    "ops",
    "pair_labels",
    "pair_log_odds",
    "plots",
    "read_certificate",
    "rejection",
    "replay",
    "workflows",
]


def __dir__():
    return sorted(__all__)
