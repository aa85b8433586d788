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
from keras_halo.ops.class_statistics import ClassStatistics
from keras_halo.ops.labels import pair_labels
from keras_halo.ops.ood_scores import OOD_METHODS, ood_score
from keras_halo.version import __version__

# From the modules: the docs take a function for the module of its name.
from keras_halo.workflows.add_abstention import add_abstention
from keras_halo.workflows.calibrate import CalibrationReport, calibrate
from keras_halo.workflows.collect_statistics import collect_statistics
from keras_halo.workflows.convert_head import convert_head
from keras_halo.workflows.evaluate_ood import evaluate_ood
from keras_halo.workflows.fit_class_gaussians import fit_class_gaussians
from keras_halo.workflows.guard import guard, read_certificate
from keras_halo.workflows.model_card import model_card
from keras_halo.workflows.ood_report import OODReport
from keras_halo.workflows.predictions import (
    Predictions,
    decode_predictions,
    pair_log_odds,
)
from keras_halo.workflows.replay import replay
from keras_halo.workflows.sklearn_classifier import SKLearnClassifier

__all__ = [
    "OOD_METHODS",
    "CalibrationReport",
    "ClassStatistics",
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
    "collect_statistics",
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
