"""Out-of-distribution scores against those of PyTorch-OOD.

A HALO head is a linear head whose weights and biases share one set of
centroids, so that what others compute of features and a linear head is known
of packed scores too. Each test says what the two have to agree in.
"""

import importlib
import importlib.util
import sys
import types

import numpy as np
import pytest
from helpers import float64, packed

from keras_halo.ops.ood_scores import ood_score

torch = pytest.importorskip("torch", reason="PyTorch-OOD needs torch")
if importlib.util.find_spec("pytorch_ood") is None:
    pytest.skip("PyTorch-OOD is not installed", allow_module_level=True)

GAMMA, BIAS = 1.5, -2.0


def detector(module, name):
    """A detector, without what its package imports beside it.

    The package loads data sets and pretrained networks, which ask for
    torchvision. Detectors have no use for either.
    """
    for package in ("pytorch_ood", "pytorch_ood.detector"):
        if package not in sys.modules:
            spec = importlib.util.find_spec(package)
            bare = types.ModuleType(package)
            bare.__path__ = list(spec.submodule_search_locations)
            sys.modules[package] = bare
    return getattr(
        importlib.import_module(f"pytorch_ood.detector.{module}"), name
    )


class LinearHead:
    """Features and a random head, for both of the libraries."""

    def __init__(self, features, centroids):
        self.features = features
        self.centroids = centroids - centroids.mean(axis=0)
        self.dim = features.shape[-1]
        self.weights = 2.0 * GAMMA * self.centroids / self.dim
        self.biases = -GAMMA * np.mean(self.centroids**2, axis=-1)
        self.logits = features @ self.weights.T + self.biases
        self.squared_norm = np.mean(features**2, axis=-1)

    def score(self, method, bias=BIAS):
        with float64():
            scores = packed(
                self.features, self.centroids, GAMMA, bias, dtype="float64"
            )
            return ood_score(scores, method)

    def of_logits(self, module, name, logits, **arguments):
        found = detector(module, name)(None, **arguments).predict_logits(
            torch.tensor(logits)
        )
        return found.numpy()

    def of_features(self, module, name):
        """What a detector says that is fitted to features around the origin."""
        linear = torch.nn.Linear(self.dim, len(self.weights))
        with torch.no_grad():
            linear.weight.copy_(torch.tensor(self.weights))
            linear.bias.copy_(torch.tensor(self.biases))
        fitted = detector(module, name)(None, linear)
        features = torch.tensor(self.features)
        fitted.fit_features(torch.cat([features, -features]))
        return fitted.predict_features(features).numpy()


SIZES = [(2, 2), (2, 16), (3, 4), (10, 16), (10, 64)]


@pytest.fixture(params=SIZES, ids=lambda size: "K{}-D{}".format(*size))
def head(request):
    """A head of centroids in no order, and features of many lengths."""
    num_classes, dim = request.param
    rng = np.random.default_rng(num_classes * dim)
    lengths = np.geomspace(0.1, 4.0, 60)[:, None]
    return LinearHead(
        lengths * rng.normal(size=(60, dim)), rng.normal(size=request.param)
    )


@pytest.fixture(params=SIZES, ids=lambda size: "K{}-D{}".format(*size))
def simplex(request):
    """A head whose centroids all have the same distance to each other."""
    num_classes, dim = request.param
    rng = np.random.default_rng(num_classes * dim)
    centroids = np.eye(max(num_classes, dim))[:num_classes]
    # Without the direction of their mean they fit into one dimension less.
    axes = np.linalg.qr((centroids - centroids.mean(axis=0)).T)[0]
    rotation = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    centroids = (centroids @ axes)[:, : num_classes - 1]
    centroids = 2.0 * centroids @ rotation[: num_classes - 1]
    features = rng.normal(size=(60, dim)) * np.geomspace(0.1, 4.0, 60)[:, None]
    return LinearHead(features, centroids)


def test_the_largest_logit(head):
    expected = head.of_logits("maxlogit", "MaxLogit", head.logits)
    np.testing.assert_allclose(head.score("max_logit"), expected, rtol=1e-10)


def test_the_generalized_entropy(head):
    # The peer takes the mean over the classes instead of the sum, and bounds
    # probabilities by 1e-7, which moves what is nearer to zero or one.
    expected = head.of_logits("gen", "GEN", head.logits)
    surest = -head.of_logits("softmax", "MaxSoftmax", head.logits)
    spread = np.ptp(head.logits, axis=-1)
    inside = (surest < 1 - 1e-6) & (spread < -np.log(1e-6))
    assert inside.sum() > 30
    np.testing.assert_allclose(
        head.score("gen")[inside],
        expected[inside] * len(head.weights),
        rtol=1e-9,
    )


def test_the_energy_of_the_logits_is_abstaining(head):
    # The energy of the paper takes the logits as they are. Without a far
    # background the odds of abstaining are that and a constant.
    expected = head.of_logits("energy", "EnergyBased", head.logits)
    np.testing.assert_allclose(
        head.score("abstain"), expected + BIAS, rtol=1e-9, atol=1e-9
    )


def test_the_energy_of_the_distances(head):
    distances = head.logits - GAMMA * head.squared_norm[:, None]
    expected = head.of_logits("energy", "EnergyBased", distances)
    np.testing.assert_allclose(
        head.score("energy"), expected, rtol=1e-9, atol=1e-9
    )


def test_the_largest_softmax_probability(head):
    # The peer says minus the probability where we say minus its logarithm.
    # Where nothing is left for abstaining, it is the softmax of the classes.
    expected = head.of_logits("softmax", "MaxSoftmax", head.logits)
    np.testing.assert_allclose(
        head.score("max_probability", bias=-1e5), -np.log(-expected), atol=1e-9
    )


def test_the_largest_softmax_probability_beside_abstaining(head):
    # As one more class, where it is not the most probable one.
    bias = np.full((len(head.logits), 1), BIAS)
    with_abstaining = np.concatenate([head.logits, bias], axis=-1)
    expected = head.of_logits("softmax", "MaxSoftmax", with_abstaining)
    named = head.logits.max(axis=-1) > BIAS
    assert named.sum() > 30
    np.testing.assert_allclose(
        head.score("max_probability")[named],
        -np.log(-expected[named]),
        atol=1e-9,
    )


def distance_between_weights(head):
    first, second = head.weights[:2]
    return np.linalg.norm(first - second)


def test_the_gap_is_the_distance_to_the_decision_boundaries(simplex):
    # Lengths are root mean squares here, so that the two differ by a factor.
    # Elsewhere the peer weighs each other class by its distance to the best.
    num_classes = len(simplex.weights)
    factor = GAMMA * num_classes / (num_classes - 1)
    factor /= distance_between_weights(simplex) * np.sqrt(simplex.dim)
    np.testing.assert_allclose(
        simplex.score("gap") * factor,
        simplex.of_features("fdbd", "fDBD"),
        rtol=1e-4,
    )


def test_the_logit_gap_is_that_distance_not_divided_by_a_length(simplex):
    # No peer has LogitGap itself.
    lengths = np.linalg.norm(simplex.features, axis=-1)
    np.testing.assert_allclose(
        simplex.score("logit_gap"),
        simplex.of_features("fdbd", "fDBD")
        * lengths
        * distance_between_weights(simplex),
        rtol=1e-4,
    )


def test_the_angle_of_nci_is_the_gap_of_centroids_of_one_length(simplex):
    # As the docstring of `ood_score` says, which has no score for it.
    np.testing.assert_allclose(
        simplex.score("gap") * GAMMA / np.sqrt(simplex.dim),
        simplex.of_features("nci", "NCI"),
        rtol=1e-4,
        atol=1e-6,
    )


def test_the_angle_of_nci_is_another_score_elsewhere():
    # Of packed scores alone it cannot be known: lengths of centroids differ.
    rng = np.random.default_rng(0)
    head = LinearHead(rng.normal(size=(200, 4)), rng.normal(size=(3, 4)))
    ours, peers = head.score("gap"), head.of_features("nci", "NCI")
    best = head.logits.argmax(axis=-1)
    of_one_class = ours[best == 0].argsort()
    assert np.any(np.diff(peers[best == 0][of_one_class]) < -1e-3)
