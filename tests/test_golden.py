"""Parity with numbers of the published method, computed in float64."""

import contextlib
import functools
import json
import pathlib

import numpy as np
import pytest
from helpers import float64, jit, to_numpy, value_and_gradients
from keras import ops

from keras_halo.losses import halo_loss
from keras_halo.ops import geometry, packing
from keras_halo.ops.targets import distilled_targets, smoothed_targets

CASES = json.loads(
    (pathlib.Path(__file__).parent / "data" / "golden.json").read_text()
)["cases"]
NAMES = [
    f"K{case['num_classes']}-D{case['embedding_dim']}"
    f"-{'distilled' if case['distill'] else 'plain'}"
    f"-{'soft' if case['soft_labels'] else 'hard'}"
    f"-smoothing{case['label_smoothing']}"
    for case in CASES
]

PRECISIONS = {
    "float32": {"values": 1e-5, "gradients": 1e-4},
    "float64": {"values": 1e-11, "gradients": 1e-10},
}


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def case(name):
    return CASES[NAMES.index(name)]


@pytest.fixture(params=list(PRECISIONS))
def dtype(request):
    return request.param


def _pack(case, embeddings, centroids, raw_gamma):
    gamma = geometry.to_temperature(raw_gamma)
    return packing.pack(
        geometry.class_logits(embeddings, geometry.centered(centroids), gamma),
        geometry.abstain_bias(
            case["embedding_dim"],
            case["num_classes"],
            case["label_smoothing"],
        ),
        geometry.mean_square(embeddings),
        gamma,
        case["embedding_dim"],
    )


def _quantities(case, labels, *weights):
    """Everything the golden file has, from embeddings and weights."""
    scores = _pack(case, *weights)
    parts = packing.unpack(scores)
    smoothing = case["label_smoothing"]
    if case["distill"]:
        targets = distilled_targets(
            labels,
            parts.logits,
            parts.squared_norm,
            parts.temperature,
            smoothing,
        )
    else:
        targets = smoothed_targets(labels, smoothing)
    radii = geometry.squared_radii(
        parts.logits, parts.squared_norm, parts.temperature
    )
    radial = geometry.radial_nll(radii, parts.embedding_dim)
    return {
        "loss": halo_loss(labels, scores, smoothing, case["distill"]),
        "cross_entropy": geometry.cross_entropy(
            targets, parts.logits, parts.abstain_logit
        )[..., 0],
        "squared_radii": radii,
        "radial_nll": ops.sum(labels * radial, axis=-1),
        "probabilities": ops.softmax(packing.answer_logits(scores)),
        "soft_targets": targets,
    }


@functools.cache
def _computed(name, dtype):
    """The quantities and gradients of one case, compiled once."""
    case = CASES[NAMES.index(name)]
    *weights, labels = [
        np.asarray(case[key], dtype)
        for key in ("embeddings", "centroids", "raw_gamma", "labels")
    ]

    def mean_loss(*weights):
        losses = halo_loss(
            ops.convert_to_tensor(labels),
            _pack(case, *weights),
            case["label_smoothing"],
            case["distill"],
        )
        return ops.sum(losses) / len(labels)

    with float64() if dtype == "float64" else contextlib.nullcontext():
        tensors = [ops.convert_to_tensor(w) for w in (labels, *weights)]
        values = jit(functools.partial(_quantities, case))(*tensors)
        values = {key: to_numpy(value) for key, value in values.items()}
        _, gradients = value_and_gradients(mean_loss, *weights)
    assert all(value.dtype == dtype for value in values.values())
    return values, gradients


def _below_floor(case):
    """Samples that sit on their centroid, as the golden cases each have one."""
    labels = np.asarray(case["labels"])
    radii = np.asarray(case["squared_radii"])
    return np.any((labels > 0) & (radii < geometry.RADIUS_FLOOR), axis=-1)


def _assert_close(actual, expected, tolerance, allowance=0.0):
    actual, expected = to_numpy(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    excess = np.abs(actual - expected) - tolerance * (1 + np.abs(expected))
    assert np.all(excess <= allowance), np.max(excess)


def _conditioning(case, dtype):
    """What rounding of `r^2` may add to the radial term of each sample.

    On a centroid the radial term has the slope `v / floor`, up to 500, in an
    `r^2` that is the difference of terms of the size of `|x|^2`: there, and
    only there, four units in the last place of these terms exceed 1e-5.
    """
    slope = case["volume_coefficient"] / geometry.RADIUS_FLOOR
    norms = np.mean(np.square(case["embeddings"]), axis=-1)
    rounding = 4 * np.finfo(dtype).eps * (1 + norms)
    return np.where(_below_floor(case), slope * rounding, 0.0)


def test_every_kind_of_case_is_there():
    kinds = {
        (c["distill"], c["soft_labels"], c["label_smoothing"] > 0)
        for c in CASES
    }
    assert kinds == {
        (True, False, True),
        (False, False, True),
        (True, False, False),
        (True, True, True),
        (False, True, True),
    }
    assert all(_below_floor(c).any() for c in CASES)


def test_constants(case):
    embedding_dim = case["embedding_dim"]
    assert geometry.shell(embedding_dim) == pytest.approx(case["shell"])
    gamma = geometry.initial_temperature(embedding_dim)
    assert gamma == pytest.approx(case["gamma_init"], rel=1e-14)
    raw = geometry.inverse_softplus(gamma)
    assert raw == pytest.approx(case["raw_gamma"], rel=1e-14)
    bias = geometry.abstain_bias(
        embedding_dim, case["num_classes"], case["label_smoothing"]
    )
    assert bias == pytest.approx(case["abstain_bias"], rel=1e-13)


@pytest.mark.parametrize(
    "quantity",
    [
        "loss",
        "cross_entropy",
        "squared_radii",
        "radial_nll",
        "probabilities",
        "soft_targets",
    ],
)
def test_values(case, name, dtype, quantity):
    values, _ = _computed(name, dtype)
    _assert_close(
        values[quantity],
        case[quantity],
        PRECISIONS[dtype]["values"],
        _conditioning(case, dtype)
        if quantity in ("loss", "radial_nll")
        else 0.0,
    )


def test_gradients_of_the_mean_loss(case, name, dtype):
    _, gradients = _computed(name, dtype)
    for gradient, weight in zip(
        gradients, ("embeddings", "centroids", "raw_gamma"), strict=True
    ):
        expected = case[f"mean_loss_grad_{weight}"]
        _assert_close(gradient, expected, PRECISIONS[dtype]["gradients"])
