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
from keras_halo.evaluation import OODReport, evaluate_ood
from keras_halo.fitting import fit_class_gaussians
from keras_halo.layers import HALODense, HALOSoftmax
from keras_halo.losses import HALOLoss
from keras_halo.ood import OOD_METHODS, ood_score
from keras_halo.predictions import Predictions, decode_predictions
from keras_halo.version import __version__

__all__ = [
    "OOD_METHODS",
    "Calibration",
    "HALODense",
    "HALOLoss",
    "HALOSoftmax",
    "OODMonitor",
    "OODReport",
    "Predictions",
    "__version__",
    "calibrate",
    "callbacks",
    "decode_predictions",
    "evaluate_ood",
    "fit_class_gaussians",
    "geometry",
    "layers",
    "losses",
    "metrics",
    "ood_score",
    "packing",
    "plots",
    "rejection",
]
