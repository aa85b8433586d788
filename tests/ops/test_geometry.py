"""The formulas against naive loops, their limits and their invariances."""

import numpy as np
import pytest
from helpers import float64, naive_softmax, to_numpy, value_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_halo.ops import geometry
from keras_halo.ops.targets import distilled_targets, smoothed_targets

SIZES = {
    "batch": st.integers(1, 5),
    "num_classes": st.integers(2, 7),
    "embedding_dim": st.integers(2, 9),
    "seed": st.integers(0, 2**16),
}


def _draw(batch, num_classes, embedding_dim, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(batch, embedding_dim)).astype("float32")
    c = rng.normal(size=(num_classes, embedding_dim)).astype("float32")
    return x, c


def _logits(x, c, gamma):
    return geometry.class_logits(
        ops.convert_to_tensor(x),
        geometry.centered(ops.convert_to_tensor(c)),
        ops.convert_to_tensor(np.float32(gamma)),
    )


@pytest.mark.parametrize("embedding_dim", [2, 3, 10, 64, 4096])
def test_shell_is_the_mode_of_the_chi_square(embedding_dim):
    squared = np.linspace(1e-4, 3.0, 300001) * embedding_dim
    log_density = (embedding_dim / 2 - 1) * np.log(squared) - squared / 2
    mode = squared[np.argmax(log_density)] / embedding_dim
    expected = max(geometry.shell(embedding_dim), 1e-4)
    assert mode == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("value", [1e-6, 1e-3, 1.0, 17.0, 800.0])
def test_inverse_softplus(value):
    raw = np.float64(geometry.inverse_softplus(value))
    assert np.logaddexp(raw, 0.0) == pytest.approx(value, rel=1e-9)


def test_temperature_stays_positive():
    raw = ops.convert_to_tensor(np.array([-1e4, -40.0, 0.0, 1e4], "float32"))
    gamma = to_numpy(geometry.to_temperature(raw))
    np.testing.assert_allclose(gamma, [1e-6, 1e-6, np.log(2.0), 1e4], rtol=1e-6)


@pytest.mark.parametrize("raw", [-3.0, 0.0, 19.9, 20.1, 30.0])
def test_temperature_is_smooth_to_the_last_digits(raw):
    with float64():
        gamma, (slope,) = value_and_gradients(
            geometry.to_temperature, np.asarray(raw)
        )
    assert gamma == pytest.approx(np.logaddexp(raw, 0.0), rel=1e-14)
    assert slope == pytest.approx(1.0 / (1.0 + np.exp(-raw)), rel=1e-14)


def test_abstain_bias_gives_the_odds_of_the_smoothed_label():
    # An embedding of unit squared norm on the shell around its centroid.
    embedding_dim, num_classes, smoothing = 12, 7, 0.1
    gamma = geometry.initial_temperature(embedding_dim)
    logit = gamma * (1.0 - geometry.shell(embedding_dim))
    bias = geometry.abstain_bias(embedding_dim, num_classes, smoothing)
    p_hi = 1 - smoothing + smoothing / num_classes
    p_lo = smoothing / num_classes
    assert np.exp(logit - bias) == pytest.approx(p_hi / p_lo)


@settings(max_examples=15, deadline=None)
@given(gamma=st.floats(0.1, 50.0), **SIZES)
def test_logits_are_pairwise_distances_up_to_a_shift(
    batch, num_classes, embedding_dim, seed, gamma
):
    x, c = _draw(batch, num_classes, embedding_dim, seed)
    logits = to_numpy(_logits(x, c, gamma))
    centered = c - c.mean(axis=0)
    distances = ((x[:, None] - centered[None]) ** 2).mean(axis=-1)
    shift = gamma * (x**2).mean(axis=-1, keepdims=True)
    np.testing.assert_allclose(
        logits, shift - gamma * distances, rtol=1e-4, atol=1e-4 * gamma
    )


@settings(max_examples=15, deadline=None)
@given(**SIZES)
def test_squared_radii_undo_the_logits(batch, num_classes, embedding_dim, seed):
    x, c = _draw(batch, num_classes, embedding_dim, seed)
    radii = geometry.squared_radii(
        _logits(x, c, 8.0), geometry.mean_square(ops.convert_to_tensor(x)), 8.0
    )
    centered = c - c.mean(axis=0)
    expected = ((x[:, None] - centered[None]) ** 2).mean(axis=-1)
    np.testing.assert_allclose(to_numpy(radii), expected, atol=2e-5)


def test_logits_of_any_rank_are_those_of_the_rows():
    x, c = _draw(24, 3, 5, seed=0)
    flat = to_numpy(_logits(x, c, 3.0))
    stacked = to_numpy(_logits(x.reshape(2, 3, 4, 5), c, 3.0))
    assert stacked.shape == (2, 3, 4, 3)
    np.testing.assert_allclose(stacked.reshape(24, 3), flat, rtol=1e-5)


@pytest.mark.parametrize("embedding_dim", [2, 3, 10, 512])
def test_radial_term_is_the_chi_square_density(embedding_dim):
    stats = pytest.importorskip("scipy.stats")
    radii = np.array([0.01, 0.3, 0.9, 1.0, 4.0])
    nll = to_numpy(
        geometry.radial_nll(ops.convert_to_tensor(radii), embedding_dim)
    )
    reference = -stats.chi2.logpdf(radii * embedding_dim, embedding_dim)
    constant = reference[2] / embedding_dim - nll[2]
    np.testing.assert_allclose(
        nll + constant, reference / embedding_dim, rtol=1e-4, atol=1e-4
    )


def test_radial_gradient_vanishes_on_the_shell_and_pushes_towards_it():
    embedding_dim = 10
    shell = geometry.shell(embedding_dim)
    radii = np.array([0.5 * shell, shell, 2.0 * shell], "float32")
    _, (gradient,) = value_and_gradients(
        lambda r: ops.sum(geometry.radial_nll(r, embedding_dim)), radii
    )
    assert gradient[0] < 0 < gradient[2]
    assert gradient[1] == pytest.approx(0.0, abs=1e-6)


def test_floored_log_continues_as_the_tangent():
    floor = geometry.RADIUS_FLOOR
    radii = np.array([-1e-3, 0.0, 0.5 * floor, 2 * floor, 1.0], "float32")
    values, (gradient,) = (
        to_numpy(geometry.floored_log(ops.convert_to_tensor(radii))),
        value_and_gradients(lambda r: ops.sum(geometry.floored_log(r)), radii)[
            1
        ],
    )
    tangent = np.log(floor) + (radii - floor) / floor
    expected = np.where(
        radii > floor, np.log(np.maximum(radii, floor)), tangent
    )
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    slopes = 1.0 / np.maximum(radii, floor)
    np.testing.assert_allclose(gradient, slopes, rtol=1e-5)


def test_floored_log_has_no_step_at_the_floor():
    floor = np.float32(geometry.RADIUS_FLOOR)
    around = np.array(
        [np.nextafter(floor, np.float32(0)), floor, np.nextafter(floor, 1)],
        "float32",
    )
    values = to_numpy(geometry.floored_log(ops.convert_to_tensor(around)))
    np.testing.assert_allclose(values, np.log(floor), rtol=1e-6)


def _naive_distilled(labels, logits, norm, gamma, smoothing):
    """The definition: a softmax for every label that has mass."""
    targets = np.zeros_like(logits)
    for i, distribution in enumerate(labels):
        for y, mass in enumerate(distribution):
            z = np.minimum(logits[i] - gamma * norm[i], 0.0) / smoothing
            z[y] = 0.0
            targets[i] += mass * naive_softmax(z)
    return targets


@settings(max_examples=15, deadline=None)
@given(smoothing=st.floats(0.01, 0.99), soft=st.booleans(), **SIZES)
def test_distilled_targets_follow_the_definition(
    batch, num_classes, embedding_dim, seed, smoothing, soft
):
    x, c = _draw(batch, num_classes, embedding_dim, seed)
    rng = np.random.default_rng(seed)
    labels = rng.dirichlet(np.ones(num_classes), size=batch)
    if not soft:
        labels = np.eye(num_classes)[labels.argmax(axis=-1)]
    labels = labels.astype("float32")
    logits = _logits(x, c, 0.5)
    norm = geometry.mean_square(ops.convert_to_tensor(x))
    targets = to_numpy(
        distilled_targets(
            ops.convert_to_tensor(labels), logits, norm, 0.5, smoothing
        )
    )
    expected = _naive_distilled(
        labels,
        to_numpy(logits).astype("float64"),
        to_numpy(norm).astype("float64"),
        0.5,
        smoothing,
    )
    np.testing.assert_allclose(targets, expected, atol=1e-5)
    np.testing.assert_allclose(targets.sum(axis=-1), 1.0, rtol=1e-5)


def test_no_gradient_flows_into_distilled_targets():
    x, c = _draw(3, 4, 5, seed=1)
    labels = ops.convert_to_tensor(np.eye(4, dtype="float32")[[0, 1, 3]])

    def weighted(x, c):
        logits = _logits(x, c, 1.0)
        norm = geometry.mean_square(x)
        targets = distilled_targets(labels, logits, norm, 1.0, 0.3)
        # Zero times the inputs, or TensorFlow has nothing to differentiate.
        nothing = 0.0 * (ops.sum(x) + ops.sum(c))
        return ops.sum(targets * ops.arange(4, dtype="float32")) + nothing

    _, gradients = value_and_gradients(weighted, x, c)
    assert all(np.all(gradient == 0.0) for gradient in gradients)


@pytest.mark.parametrize("distill", [True, False])
def test_without_smoothing_the_target_is_the_label(distill):
    x, c = _draw(3, 4, 5, seed=2)
    labels = ops.convert_to_tensor(np.eye(4, dtype="float32")[[0, 1, 3]])
    logits = _logits(x, c, 1.0)
    targets = (
        distilled_targets(labels, logits, 1.0, 1.0, 0.0)
        if distill
        else smoothed_targets(labels, 0.0)
    )
    np.testing.assert_array_equal(to_numpy(targets), to_numpy(labels))


def test_cross_entropy_gradient_is_p_minus_q():
    x, c = _draw(4, 5, 6, seed=3)
    logits = to_numpy(_logits(x, c, 2.0))
    targets = np.eye(5, dtype="float32")[[0, 1, 2, 4]] * 0.7 + 0.3 / 5
    bias = np.full((4, 1), 0.5, "float32")

    def total(logits):
        return ops.sum(
            geometry.cross_entropy(
                ops.convert_to_tensor(targets),
                logits,
                ops.convert_to_tensor(bias),
            )
        )

    _, (gradient,) = value_and_gradients(total, logits)
    p = naive_softmax(np.concatenate([logits, bias], axis=-1))[:, :-1]
    np.testing.assert_allclose(gradient, p - targets, atol=1e-6)


def test_rotation_and_shift_change_nothing():
    x, c = _draw(6, 4, 8, seed=4)
    rotation, _ = np.linalg.qr(np.random.default_rng(4).normal(size=(8, 8)))
    rotation = rotation.astype("float32")
    logits = to_numpy(_logits(x, c, 5.0))
    rotated = to_numpy(_logits(x @ rotation, c @ rotation, 5.0))
    shifted = to_numpy(_logits(x, c + 3.0, 5.0))
    np.testing.assert_allclose(rotated, logits, atol=1e-4)
    np.testing.assert_allclose(shifted, logits, atol=1e-4)


@pytest.mark.parametrize("num_features", [3, 256, 1024, 1600])
def test_normalized_features_have_a_bounded_length(num_features):
    rng = np.random.default_rng(num_features)
    x = np.maximum(rng.normal(size=(50, num_features)), 0.0).astype("float32")
    x[:, 0] = 1.0
    normalized = to_numpy(
        geometry.normalized_features(ops.convert_to_tensor(x))
    )
    factor = (np.pi * max(num_features / 256, 1.0)) ** 0.5
    expected = x / (np.abs(x).mean(-1, keepdims=True) + 0.1) / factor
    np.testing.assert_allclose(normalized, expected, rtol=1e-5)
    x *= 1e4
    normalized = to_numpy(
        geometry.normalized_features(ops.convert_to_tensor(x))
    )
    np.testing.assert_allclose(
        np.abs(normalized).mean(-1), 1.0 / factor, rtol=1e-3
    )
    if num_features >= 256:
        squared = np.square(normalized).sum(axis=-1).mean()
        assert squared == pytest.approx(256.0, rel=0.1)


def test_short_features_stay_short():
    x = np.random.default_rng(0).normal(size=(5, 8)).astype("float32")
    short, shorter = (
        to_numpy(geometry.normalized_features(ops.convert_to_tensor(f * x)))
        for f in (1e-4, 1e-5)
    )
    np.testing.assert_allclose(short, 10.0 * shorter, rtol=2e-3)
    np.testing.assert_allclose(short, 1e-3 * x / np.sqrt(np.pi), rtol=2e-3)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-4, 0.1, 0.5, 3.0, 1e12])
def test_gradients_of_features_are_bounded(magnitude):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 7))
    x *= magnitude / np.abs(x).mean(axis=-1, keepdims=True)
    factors = rng.normal(size=(4, 7))

    def total(x):
        normalized = geometry.normalized_features(x)
        return ops.sum(normalized * ops.convert_to_tensor(factors))

    with float64():
        _, (gradient,) = value_and_gradients(total, x)
    # By the quotient rule, row by row.
    mean = np.abs(x).mean(axis=-1, keepdims=True) + 0.1
    along = (factors * x).sum(axis=-1, keepdims=True)
    slope = (factors - along * np.sign(x) / (7 * mean)) / mean / np.sqrt(np.pi)
    np.testing.assert_allclose(gradient, slope, rtol=1e-9, atol=1e-12)
    # Ten: one over the magnitude up to which features stay short.
    bound = np.abs(factors) + np.abs(factors).max(axis=-1, keepdims=True)
    assert np.all(np.abs(gradient) <= 10.0 * bound / np.sqrt(np.pi))
