"""Detectors fitted after training, on features and logits of a network.

scikit-learn does the neighbours and the covariances. ViM and GEN follow the
formulas of their articles; libraries that have them want torchvision, or one
particular backend. Scores are larger for outliers.

References:

- Weitang Liu, Xiaoyun Wang, John Owens, Yixuan Li, Energy-based
  Out-of-distribution Detection, 2020.
- Dan Hendrycks et al., Scaling Out-of-Distribution Detection for Real-World
  Settings, 2022. (The largest logit.)
- Yiyou Sun, Yifei Ming, Xiaojin Zhu, Yixuan Li, Out-of-Distribution Detection
  with Deep Nearest Neighbors, 2022.
- Kimin Lee, Kibok Lee, Honglak Lee, Jinwoo Shin, A Simple Unified Framework
  for Detecting Out-of-Distribution Samples and Adversarial Attacks, 2018.
- Maximilian Mueller, Matthias Hein, Mahalanobis++: Improving OOD Detection via
  Feature Normalization, 2025.
- Haoqi Wang, Zhizhong Li, Litong Feng, Wayne Zhang, ViM: Out-Of-Distribution
  with Virtual-logit Matching, 2022.
- Xixi Liu, Yaroslava Lochman, Christopher Zach, GEN: Pushing the Limits of
  Softmax-Based Out-of-Distribution Detection, 2023.
- Chuan Guo, Geoff Pleiss, Yu Sun, Kilian Weinberger, On Calibration of Modern
  Neural Networks, 2017.
"""

import collections

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, logsumexp, softmax
from sklearn.covariance import EmpiricalCovariance
from sklearn.neighbors import NearestNeighbors

from keras_halo.ops.class_statistics import ClassStatistics

# Queries that the search for neighbours answers at a time.
_CHUNK = 2000

Detector = collections.namedtuple(
    "Detector", ["score", "storage", "reads"], defaults=["features"]
)
Detector.__doc__ = """A score, and what it needs besides the network.

Args:
    score: Function of features `(N, F)` and logits `(N, K)`, which returns
        `N` scores.
    storage: Integer, how many numbers the fit has to keep.
    reads: String, which features: those of the last layer, `"features"`, or
        of all blocks, `"blocks"`.
"""


def fit_temperature(logits, labels):
    """The temperature of largest likelihood of the labels."""
    logits = np.asarray(logits, "float64")

    def nll(log_temperature):
        log_p = log_softmax(logits / np.exp(log_temperature), axis=-1)
        return -log_p[np.arange(len(labels)), labels].mean()

    found = minimize_scalar(nll, bounds=(-6.0, 6.0), method="bounded")
    return float(np.exp(found.x))


def max_probability(logits):
    """Negative log-probability of the best class, exact near probability 1."""
    return -log_softmax(np.asarray(logits, "float64"), axis=-1).max(axis=-1)


def energy(logits):
    return -logsumexp(np.asarray(logits, "float64"), axis=-1)


def generalized_entropy(logits, exponent=0.1):
    """GEN with the exponent of the article, over all classes."""
    p = softmax(np.asarray(logits, "float64"), axis=-1)
    # One minus a probability near 1, without the rounding of the difference.
    rest = np.stack(
        [np.delete(p, k, axis=-1).sum(axis=-1) for k in range(p.shape[-1])],
        axis=-1,
    )
    return ((p * rest) ** exponent).sum(axis=-1)


def logit_detectors(temperature):
    """Detectors that read logits alone, and keep at most a temperature."""
    return {
        "max probability": Detector(lambda f, z: max_probability(z), 0),
        "max probability, scaled": Detector(
            lambda f, z: max_probability(z / temperature), 1
        ),
        "max logit": Detector(lambda f, z: -z.max(axis=-1), 0),
        "energy": Detector(lambda f, z: energy(z), 0),
        "energy, scaled": Detector(lambda f, z: energy(z / temperature), 1),
        "GEN": Detector(lambda f, z: generalized_entropy(z), 0),
    }


def nearest_neighbours(features, k=50):
    """Distance of unit-length features to the k-th nearest of training."""
    index = NearestNeighbors(n_neighbors=min(k, len(features)))
    index.fit(_unit_length(features))

    def score(features, logits):
        queries = _unit_length(features)
        return np.concatenate(
            [
                index.kneighbors(queries[start : start + _CHUNK])[0][:, -1]
                for start in range(0, len(queries), _CHUNK)
            ]
        )

    return Detector(score, features.size)


def _unit_length(features):
    norms = np.linalg.norm(features, axis=-1, keepdims=True)
    return features / np.maximum(norms, 1e-12)


def mahalanobis(features, labels, num_classes):
    """Squared distance to the nearest class mean, one covariance for all."""
    features = np.asarray(features, "float64")
    means = np.stack(
        [features[labels == k].mean(axis=0) for k in range(num_classes)]
    )
    fitted = EmpiricalCovariance(assume_centered=True)
    fitted.fit(features - means[labels])
    # The distance is Euclidean in whitened features, and found in a fortieth
    # of the time there. Eigenvectors serve also where features never vary.
    variances, directions = np.linalg.eigh(fitted.precision_)
    whitening = directions * np.sqrt(np.maximum(variances, 0.0))
    white_means = means @ whitening

    def score(features, logits):
        white = np.asarray(features, "float64") @ whitening
        return np.min(
            [((white - mean) ** 2).sum(axis=-1) for mean in white_means],
            axis=0,
        )

    return Detector(score, means.size + fitted.precision_.size)


def class_gaussians(features, labels, num_classes):
    """Negative log density of the nearest class, one covariance for each."""
    statistics = ClassStatistics(num_classes, features.shape[-1])
    statistics.update(features, labels)
    means, scales = statistics.means, statistics.scales()
    covariances = np.stack(
        [statistics.covariance(k, scales) for k in range(num_classes)]
    )
    factors = np.linalg.inv(np.linalg.cholesky(covariances))
    log_volumes = 0.5 * np.linalg.slogdet(covariances)[1]

    def score(features, logits):
        costs = [
            0.5 * (((features - mean) @ factor.T) ** 2).sum(axis=-1) + volume
            for mean, factor, volume in zip(
                means, factors, log_volumes, strict=True
            )
        ]
        return np.min(costs, axis=0)

    storage = means.size + covariances.size + log_volumes.size
    return Detector(score, storage)


def on_unit_length(fit, features, *arguments):
    """A detector fitted to features of length one, however long they are."""
    detector = fit(_unit_length(features), *arguments)
    return Detector(
        lambda features, logits: detector.score(_unit_length(features), logits),
        detector.storage,
    )


def virtual_logit(features, logits, kernel, bias):
    """ViM: the residual outside of a principal space as one more logit.

    Args:
        features: Array of shape `(N, F)`, of training data.
        logits: Array of shape `(N, K)`, of the same.
        kernel: Array of shape `(F, K)`, weights of the last layer.
        bias: Array of shape `(K,)`.
    """
    features = np.asarray(features, "float64")
    # The point at which all logits vanish.
    origin = -np.linalg.pinv(kernel.T.astype("float64")) @ bias
    centered = features - origin
    # Eigenvalues ascend: the first half of the directions is the residual.
    directions = np.linalg.eigh(centered.T @ centered)[1]
    residual = directions[:, : features.shape[-1] - features.shape[-1] // 2]
    scale = (
        logits.max(axis=-1).mean()
        / np.linalg.norm(centered @ residual, axis=-1).mean()
    )

    def score(features, logits):
        norm = np.linalg.norm((features - origin) @ residual, axis=-1)
        return scale * norm + energy(logits)

    return Detector(score, origin.size + residual.size + 1)


def fit_all(features, logits, labels, kernel, bias, temperature):
    """Every detector for a network that ends in a linear layer."""
    num_classes = logits.shape[-1]
    return {
        **logit_detectors(temperature),
        "k-NN": nearest_neighbours(features),
        "Mahalanobis": mahalanobis(features, labels, num_classes),
        "class Gaussians": class_gaussians(features, labels, num_classes),
        "Mahalanobis, unit": on_unit_length(
            mahalanobis, features, labels, num_classes
        ),
        "class Gaussians, unit": on_unit_length(
            class_gaussians, features, labels, num_classes
        ),
        "ViM": virtual_logit(features, logits, kernel, bias),
    }


def fit_on_blocks(blocks, labels, num_classes):
    """The detectors of features on what all blocks of the network say.

    Args:
        blocks: Array of shape `(N, F)`, of training data.
        labels: Integers of shape `(N,)`.
        num_classes: Integer.
    """
    fitted = {
        "k-NN, blocks": nearest_neighbours(blocks),
        "Mahalanobis, blocks": mahalanobis(blocks, labels, num_classes),
        "class Gaussians, blocks": class_gaussians(blocks, labels, num_classes),
    }
    return {name: d._replace(reads="blocks") for name, d in fitted.items()}
