"""Pictures of what a HALO model knows and does not know.

Every function draws on the matplotlib `Axes` it is given, or on one of a new
figure, and returns it; none of them shows a window or changes a setting of
matplotlib. Text takes the colours of the style in force, so that the pictures
are readable on light and dark backgrounds. Needs matplotlib:
`pip install "keras-halo[tools]"`.
"""

from keras_halo.plots.abstention_over_training import abstention_over_training
from keras_halo.plots.embedding_map import embedding_map
from keras_halo.plots.projection import shell_radius
from keras_halo.plots.reliability_diagram import reliability_diagram
from keras_halo.plots.risk_coverage import risk_coverage
from keras_halo.plots.score_histograms import score_histograms
from keras_halo.plots.stream_evidence import stream_evidence

__all__ = [
    "abstention_over_training",
    "embedding_map",
    "reliability_diagram",
    "risk_coverage",
    "score_histograms",
    "shell_radius",
    "stream_evidence",
]
