"""HALO for Keras 3: classifiers that can say "I don't know"."""

from keras_halo import (
    callbacks,
    geometry,
    layers,
    losses,
    metrics,
    packing,
    plots,
    rejection,
)
from keras_halo.calibration import Calibration, calibrate
from keras_halo.callbacks import OODMonitor
from keras_halo.conversion import convert_head
from keras_halo.evaluation import OODReport, evaluate_ood
from keras_halo.fitting import fit_class_gaussians
from keras_halo.labels import matches
from keras_halo.layers import HALODense, HALOSimilarity, HALOSoftmax
from keras_halo.losses import HALOContrastiveLoss, HALOLoss
from keras_halo.ood import OOD_METHODS, ood_score
from keras_halo.predictions import (
    Predictions,
    decode_predictions,
    pair_log_odds,
)
from keras_halo.version import __version__

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
    "__version__",
    "calibrate",
    "callbacks",
    "convert_head",
    "decode_predictions",
    "evaluate_ood",
    "fit_class_gaussians",
    "geometry",
    "layers",
    "losses",
    "matches",
    "metrics",
    "ood_score",
    "packing",
    "pair_log_odds",
    "plots",
    "rejection",
]
