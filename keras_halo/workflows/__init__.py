"""What is done with a whole model."""

from keras_halo.workflows.add_abstention import add_abstention
from keras_halo.workflows.calibrate import CalibrationReport, calibrate
from keras_halo.workflows.collect_statistics import collect_statistics
from keras_halo.workflows.convert_head import convert_head
from keras_halo.workflows.evaluate_ood import evaluate_ood
from keras_halo.workflows.fit_class_gaussians import fit_class_gaussians
from keras_halo.workflows.guard import guard, read_certificate
from keras_halo.workflows.model_card import ModelCard, model_card
from keras_halo.workflows.ood_report import (
    KnownResult,
    OODReport,
    UnknownResult,
)
from keras_halo.workflows.predictions import (
    Predictions,
    decode_predictions,
    pair_log_odds,
)
from keras_halo.workflows.replay import (
    ReplayDifference,
    ReplayReport,
    replay,
)
from keras_halo.workflows.sklearn_classifier import SKLearnClassifier

__all__ = [
    "CalibrationReport",
    "KnownResult",
    "ModelCard",
    "OODReport",
    "Predictions",
    "ReplayDifference",
    "ReplayReport",
    "SKLearnClassifier",
    "UnknownResult",
    "add_abstention",
    "calibrate",
    "collect_statistics",
    "convert_head",
    "decode_predictions",
    "evaluate_ood",
    "fit_class_gaussians",
    "guard",
    "model_card",
    "pair_log_odds",
    "read_certificate",
    "replay",
]
