from keras_halo.layers.block_features import BlockFeatures
from keras_halo.layers.class_gaussians import ClassGaussians
from keras_halo.layers.decision import Decision
from keras_halo.layers.feature_normalization import FeatureNormalization
from keras_halo.layers.guard import Guard
from keras_halo.layers.halo_dense import HALODense
from keras_halo.layers.halo_similarity import HALOSimilarity
from keras_halo.layers.halo_softmax import HALOSoftmax
from keras_halo.layers.label_set import LabelSet
from keras_halo.layers.ood_score import OODScore
from keras_halo.layers.score_layer import ScoreLayer

__all__ = [
    "BlockFeatures",
    "ClassGaussians",
    "Decision",
    "FeatureNormalization",
    "Guard",
    "HALODense",
    "HALOSimilarity",
    "HALOSoftmax",
    "LabelSet",
    "OODScore",
    "ScoreLayer",
]
