"""What a user writes, for pyright to check; see `scripts/check_release.py`."""

import keras
import numpy as np

import keras_halo
from keras_halo import HALODense, HALOLoss, HALOSoftmax, layers, rejection

model = keras.Sequential([keras.layers.Dense(64), HALODense(10)])
model.compile("adam", loss=HALOLoss(label_smoothing=0.1))
scores = np.zeros((5, 14), "float32")
predictions = keras_halo.decode_predictions(scores)
labels: np.ndarray = predictions.labels
embedding_dim: int = predictions.embedding_dim
rule = rejection.CoverageRule(0.95, delta=0.05).fit(scores)
accepted: np.ndarray = rule.predict(scores).accepted
decision: layers.Decision = rule.to_layer(name="label")
coverage: float = rule.predict(scores).coverage
head = HALODense(10, learn_gamma=False, dtype="mixed_float16")
deployed = keras.Sequential([model, HALOSoftmax(abstain=False)])
score = keras_halo.ood_score(scores, method="nearest")
fitted = keras_halo.fit_class_gaussians(model, scores, labels)
report = keras_halo.evaluate_ood(model, (scores, labels), {"noise": scores})
text: str = rule.summary()
