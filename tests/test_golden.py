"""Parity with numbers that were computed without the package.

`golden.json` has those of the published method, in float64. Those of the head
with its far background, of the loss and of every score are in
`golden_current.json`: `data/make_golden.py` writes it, with sixty digits.
"""

import contextlib
import functools
import json
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
from helpers import float64, jit, to_numpy, value_and_gradients
from keras import ops

from keras_halo.losses import halo_loss
from keras_halo.ops import geometry, head, packing
from keras_halo.ops.ood_scores import OOD_METHODS, ood_score
from keras_halo.ops.targets import distilled_targets, smoothed_targets

DATA = pathlib.Path(__file__).parent / "data"

CASES = json.loads((DATA / "golden.json").read_text())["cases"]
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


CURRENT = {
    "K{num_classes}-D{embedding_dim}".format(**case): case
    for case in json.loads((DATA / "golden_current.json").read_text())["cases"]
}


@pytest.fixture(params=list(CURRENT))
def current(request):
    return request.param


def _current_scores(case, x, centroids, raw_gamma):
    """Packed scores without and with a far background."""
    gamma = geometry.to_temperature(raw_gamma)
    bias, far_bias, far_scale = (
        ops.convert_to_tensor(np.asarray(case[key], _dtype(x)))
        for key in ("bias", "far_bias", "far_scale")
    )
    near = head.packed_scores(x, centroids, gamma, bias)
    return near, head.with_far_background(near, far_bias, far_scale)


def _dtype(x):
    return keras.backend.standardize_dtype(x.dtype)


def _current_loss(case, labels, scores):
    return halo_loss(labels, scores, case["label_smoothing"], case["distill"])


def _current_quantities(case, x, centroids, raw_gamma, labels, integers):
    near, far = _current_scores(case, x, centroids, raw_gamma)
    parts = packing.unpack(far)
    # The first of the inputs have labels.
    known = far[: len(case["labels"])]
    smoothing = case["label_smoothing"]
    if case["distill"]:
        of_known = packing.unpack(known)
        targets = distilled_targets(
            labels,
            of_known.logits,
            of_known.squared_norm,
            of_known.temperature,
            smoothing,
        )
    else:
        targets = smoothed_targets(labels, smoothing)
    # As rows of one array, so that each score is compiled once.
    both = ops.concatenate([near, far], axis=0)
    return {
        "logits": parts.logits,
        "squared_norm": parts.squared_norm[:, 0],
        "gamma": parts.temperature[0, 0],
        "far_radius": parts.far_radius[0, 0],
        "squared_radii": geometry.squared_radii(
            parts.logits, parts.squared_norm, parts.temperature
        ),
        "targets": targets,
        "loss": _current_loss(case, labels, known),
        "loss of integers": _current_loss(case, integers, known),
        "abstain_logit": packing.unpack(both).abstain_logit[:, 0],
        **{method: ood_score(both, method) for method in OOD_METHODS},
    }


@functools.cache
def _computed_now(name, dtype):
    """What the package says of one case, and gradients, compiled once."""
    case = CURRENT[name]
    x, centroids, raw_gamma, labels = (
        np.asarray(array, dtype)
        for array in (
            case["embeddings"] + case["extremes"],
            case["centroids"],
            case["raw_gamma"],
            case["labels"],
        )
    )
    integers = labels.argmax(axis=-1).astype("int32")

    def mean_loss(*weights):
        _, scores = _current_scores(case, *weights)
        losses = _current_loss(case, ops.convert_to_tensor(labels), scores)
        return ops.sum(losses) / len(labels)

    with float64() if dtype == "float64" else contextlib.nullcontext():
        quantities = functools.partial(_current_quantities, case)
        # Where single operations are compiled anyway.
        if keras.backend.backend() == "jax":
            quantities = jit(quantities)
        values = quantities(
            *map(
                ops.convert_to_tensor,
                (x, centroids, raw_gamma, labels, integers),
            )
        )
        values = {key: to_numpy(value) for key, value in values.items()}
        _, gradients = value_and_gradients(
            mean_loss, x[: len(labels)], centroids, raw_gamma
        )
    assert all(value.dtype == dtype for value in values.values())
    return values, gradients


def _rounding(case, dtype):
    """What rounding may add to a squared radius, for every input.

    It is the difference of terms of the size of `|x|^2`, of which one is
    divided by a temperature that is kept to a share of one, not of itself.
    """
    size = 1.0 + np.array(case["squared_norm"])
    return 4 * np.finfo(dtype).eps * size * (1.0 + 1.0 / case["gamma"])


def _radial_slope(case):
    """A bound of the slopes of `R` and of the radial tail, times `D`."""
    nearest = np.min(case["squared_radii"], axis=-1)
    return case["embedding_dim"] * (
        0.5 + 0.5 / np.maximum(nearest, geometry.RADIUS_FLOOR)
    )


@pytest.mark.parametrize("name", ["gamma", "far_radius", "training_bias"])
def test_current_constants(current, dtype, name):
    case = CURRENT[current]
    if name == "training_bias":
        found = geometry.abstain_bias(
            case["embedding_dim"], case["num_classes"], case["label_smoothing"]
        )
    else:
        found = _computed_now(current, dtype)[0][name]
    _assert_close(found, case[name], PRECISIONS[dtype]["values"])


@pytest.mark.parametrize(
    "quantity",
    [
        "logits",
        "squared_norm",
        "squared_radii",
        "targets",
    ],
)
def test_current_outputs(current, dtype, quantity):
    case = CURRENT[current]
    allowance = 0.0
    if quantity == "squared_radii":
        allowance = _rounding(case, dtype)[:, None]
    _assert_close(
        _computed_now(current, dtype)[0][quantity],
        case[quantity],
        PRECISIONS[dtype]["values"],
        allowance,
    )


def _by_background(case, key):
    """What is known of the scores without, and then with a far background."""
    return [*case[f"near_{key}"], *case[f"far_{key}"]]


def test_current_abstain_logits(current, dtype):
    _assert_close(
        _computed_now(current, dtype)[0]["abstain_logit"],
        _by_background(CURRENT[current], "abstain_logit"),
        PRECISIONS[dtype]["values"],
    )


def test_current_loss(current, dtype):
    case = CURRENT[current]
    values, _ = _computed_now(current, dtype)
    labels = np.array(case["labels"])
    allowance = (_rounding(case, dtype) * _radial_slope(case))[: len(labels)]
    tolerance = PRECISIONS[dtype]["values"]
    _assert_close(values["loss"], case["loss"], tolerance, allowance)
    if labels.max(axis=-1).min() == 1.0:
        _assert_close(
            values["loss of integers"], case["loss"], tolerance, allowance
        )


def test_current_gradients(current, dtype):
    case = CURRENT[current]
    _, gradients = _computed_now(current, dtype)
    for gradient, weight in zip(
        gradients, ("embeddings", "centroids", "raw_gamma"), strict=True
    ):
        expected = case[f"gradient_of_{weight}"]
        _assert_close(gradient, expected, PRECISIONS[dtype]["gradients"])


# A closed form stands for the logarithm of `erfc`, to seven digits; PyTorch's
# softplus jumps by 2e-9 at 20.
EXACT_TO = {"radius": 1e-6, "joint": 3e-9, "max_probability": 3e-9}


@pytest.mark.parametrize("background", ["near", "far"])
@pytest.mark.parametrize("method", OOD_METHODS)
def test_current_scores(current, dtype, method, background):
    case = CURRENT[current]
    near, far = np.split(_computed_now(current, dtype)[0][method], 2)
    found = near if background == "near" else far
    assert np.isfinite(found).all()
    expected = case[f"{background}_scores"][method]
    # At the origin the gap has no direction to be the gap of.
    known = np.full(len(expected), True)
    if method == "gap":
        known = np.array(case["squared_norm"]) > 0
    expected = np.array(expected, "float64")[known]
    rounding = _rounding(case, dtype)[known]
    allowance = rounding * case["gamma"]
    if method in ("joint", "radius"):
        allowance += rounding * _radial_slope(case)[known]
    elif method == "gap":
        # Of a short embedding. What is added to its square bounds the slope.
        squared_norm = np.array(case["squared_norm"])[known]
        allowance += np.abs(expected) * (rounding + 1e-12) / squared_norm
    _assert_close(
        found[known],
        expected,
        max(PRECISIONS[dtype]["values"], EXACT_TO.get(method, 0.0)),
        allowance,
    )


@pytest.mark.any_backend
def test_current_numbers_cover_every_score_and_setting():
    for case in CURRENT.values():
        assert set(case["near_scores"]) == set(OOD_METHODS)
    kinds = {(c["distill"], c["label_smoothing"] > 0) for c in CURRENT.values()}
    assert kinds == {(True, True), (False, True), (False, False)}
    for case in CURRENT.values():
        radii = np.array(case["squared_radii"])
        assert radii.min() < geometry.RADIUS_FLOOR and radii.max() > 1e5


@pytest.mark.any_backend
def test_current_numbers_are_what_their_script_writes(tmp_path):
    subprocess.run(
        [sys.executable, str(DATA / "make_golden.py"), str(tmp_path)],
        check=True,
        timeout=120,
    )
    written = json.loads((tmp_path / "golden_current.json").read_text())
    written = dict(_numbers(written["cases"]))
    kept = dict(_numbers(list(CURRENT.values())))
    assert len(kept) > 1000
    assert written == pytest.approx(kept, rel=1e-12, abs=0.0)


def _numbers(value, path=()):
    """Every number in nested lists and dictionaries, with its place."""
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _numbers(item, (*path, key))
    elif value is not None:
        yield path, value
