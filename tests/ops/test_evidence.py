"""Running quantiles settle, from any start, and nothing throws them off."""

import functools

import numpy as np
import pytest
from helpers import jit, to_numpy
from keras import ops

from keras_halo.ops import evidence


def state_at(mean=0.0, variance=0.0, share=0.01, count=0.0):
    pair = np.ones(2, "float32")
    return evidence.EvidenceStatistics(
        *(
            ops.convert_to_tensor(np.asarray(value, "float32"))
            for value in (
                mean * pair,
                variance * pair,
                evidence.initial_offset(share) * pair,
                count,
            )
        )
    )


@functools.lru_cache
def compiled_update(share):
    """One update as a compiled function: thousands of them are made here."""

    def update(mean, variance, offset, count, batch):
        state = evidence.EvidenceStatistics(mean, variance, offset, count)
        return tuple(evidence.updated(state, batch, share))

    return jit(update)


def follow(state, draw, share, batches, size=32):
    update = compiled_update(share)
    for _ in range(batches):
        batch = np.asarray(draw(size), "float32")
        batch = ops.convert_to_tensor(np.stack([batch, 3.0 * batch], axis=-1))
        state = update(*state, batch)
    return evidence.EvidenceStatistics(*state)


def quantiles_of(state):
    mean, variance, offset, _ = map(to_numpy, state)
    return mean + offset * np.sqrt(variance)


SOURCES = {
    "normal": lambda rng: lambda n: rng.normal(12.0, 3.0, n),
    "skewed": lambda rng: lambda n: 12.0 - rng.exponential(3.0, n),
    "two kinds": lambda rng: (
        lambda n: np.where(rng.random(n) < 0.05, 0.0, 12.0) + rng.normal(size=n)
    ),
}


@pytest.mark.any_backend
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("size", [1, 8, 64])
def test_the_wanted_share_lies_below(source, size):
    rng = np.random.default_rng(0)
    draw = SOURCES[source](rng)
    share = 0.03
    batches = 1500 if size == 1 else 600
    state = follow(state_at(share=share), draw, share, batches, size)
    # The quantile moves with every batch: its average is what is right.
    below = []
    for _ in range(40):
        state = follow(state, draw, share, 10, size)
        near, far = quantiles_of(state)
        sample = draw(2000)
        below += [np.mean(sample < near), np.mean(3.0 * sample < far)]
    assert np.mean(below) == pytest.approx(share, abs=0.012)


@pytest.mark.any_backend
@pytest.mark.parametrize("start", [-1e6, -100.0, 0.0, 100.0, 1e6])
@pytest.mark.parametrize("count", [0.0, 1000.0])
def test_it_settles_within_300_batches_from_any_start(start, count):
    rng = np.random.default_rng(1)
    draw = SOURCES["normal"](rng)
    state = state_at(start, 1.0, 0.01, count)
    near, _ = quantiles_of(follow(state, draw, 0.01, 300))
    # One percent of the evidence lies below 5.
    assert 0.001 < np.mean(draw(100_000) < near) < 0.03


@pytest.mark.any_backend
@pytest.mark.parametrize(("size", "batches"), [(128, 50), (16, 400)])
def test_it_keeps_up_with_a_network_that_learns(size, batches):
    rng = np.random.default_rng(4)
    state = state_at()
    for i in range(batches):
        # What a network knows grows until the end, less and less.
        mean = 12.0 * np.sin(0.5 * np.pi * (i + 1) / batches)
        draw = functools.partial(rng.normal, mean, 3.0)
        state = follow(state, draw, 0.01, 1, size)
    near, _ = quantiles_of(state)
    # One percent of the evidence lies below 5, four percent below 6.7, and one
    # in a thousand below 2.7.
    assert 2.7 < near < 6.7


@pytest.mark.any_backend
@pytest.mark.parametrize("outlier", [-1e30, -1e12, -1e4, 1e12, 3e38])
@pytest.mark.parametrize("batches_before", [0, 200])
def test_one_corrupted_sample_does_not_throw_it_off(outlier, batches_before):
    rng = np.random.default_rng(3)
    draw = SOURCES["normal"](rng)
    state = follow(state_at(), draw, 0.01, batches_before)
    batch = draw(32).astype("float32")
    batch[7] = outlier
    batch = ops.convert_to_tensor(np.stack([batch, batch / 3.0], axis=-1))
    state = evidence.updated(state, batch, 0.01)
    for values in map(to_numpy, (*state, evidence.biases(state))):
        assert np.isfinite(values).all()
    near, _ = quantiles_of(follow(state, draw, 0.01, 400))
    assert 0.001 < np.mean(draw(100_000) < near) < 0.03


def test_one_corrupted_sample_is_no_other_network_in_a_batch_of_its_own():
    state = state_at(12.0, 9.0, 0.01, 400.0)
    batch = ops.convert_to_tensor(np.full((1, 2), 1e6, "float32"))
    after = evidence.updated(state, batch, 0.01)
    assert float(to_numpy(after.count)) == 401.0
    reach = evidence.REACH * (1.0 + 3.0)
    moved = to_numpy(after.mean) - to_numpy(state.mean)
    assert (np.abs(moved) <= evidence.MAX_STEP * reach + 1e-3).all()


def test_rows_that_do_not_count_change_nothing():
    rng = np.random.default_rng(2)
    batch = rng.normal(size=(6, 2)).astype("float32")
    expected = evidence.updated(
        state_at(count=5.0, variance=1.0),
        ops.convert_to_tensor(batch[:4]),
        0.01,
    )
    batch[4] = np.nan
    batch[5] = 1e30
    mask = np.array([1, 1, 1, 1, 1, 0], bool)
    result = evidence.updated(
        state_at(count=5.0, variance=1.0),
        ops.convert_to_tensor(batch),
        0.01,
        ops.convert_to_tensor(mask),
    )
    for a, b in zip(result, expected, strict=True):
        np.testing.assert_allclose(to_numpy(a), to_numpy(b), rtol=1e-6)


@pytest.mark.parametrize("rows", [0, 3])
def test_a_batch_without_rows_that_count_changes_nothing(rows):
    state = state_at(2.0, 1.0, 0.01, 7.0)
    batch = ops.convert_to_tensor(np.full((rows, 2), np.nan, "float32"))
    result = evidence.updated(state, batch, 0.01)
    for a, b in zip(result, state, strict=True):
        np.testing.assert_array_equal(to_numpy(a), to_numpy(b))


def test_evidence_is_written_out():
    logits = np.array([[1.0, 4.0], [-3.0, -5.0]], "float32")
    norm = np.array([[2.0], [0.5]], "float32")
    result = evidence.class_evidence(
        ops.convert_to_tensor(logits), ops.convert_to_tensor(norm), 3.0
    )
    np.testing.assert_allclose(
        to_numpy(result), [[4.0, 1.0], [-3.0, -3.75]], rtol=1e-6
    )


def test_the_unit_of_the_far_evidence_is_a_ratio_of_margins():
    def scale(offset, variance):
        state = state_at()._replace(
            offset=ops.convert_to_tensor(np.float32(offset)),
            variance=ops.convert_to_tensor(np.float32(variance)),
        )
        return float(evidence.far_scale(state))

    assert scale([-2.0, -3.0], [9.0, 4.0]) == pytest.approx(1.0)
    assert scale([-3.0, -3.0], [9.0, 4.0]) == pytest.approx(1.5)
    assert scale([-3.0, -3.0], [9.0, 1e4]) == pytest.approx(0.25)
    assert scale([-3.0, -3.0], [9.0, 1e-4]) == pytest.approx(4.0)
    # A margin is never below 1.5 nats.
    assert scale([-1.2, -3.0], [4.0, 0.0]) == pytest.approx(2.0)
    assert scale([0.0, 0.0], [0.0, 0.0]) == 1.0


def test_an_average_known_input_lies_clearly_above_either_background():
    for offset, variance in ((-2.5, 1e-4), (0.0, 4.0), (-8.0, 0.0)):
        state = state_at()._replace(
            mean=ops.convert_to_tensor(np.float32([-1.0, -9.0])),
            offset=ops.convert_to_tensor(np.float32([offset, -2.0])),
            variance=ops.convert_to_tensor(np.float32([variance, 4.0])),
        )
        np.testing.assert_allclose(
            to_numpy(evidence.biases(state)), [-2.5, -14.0], rtol=1e-6
        )
