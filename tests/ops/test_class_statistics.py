"""Statistics of classes: the same however the data are cut."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_halo.ops.class_statistics import (
    ClassStatistics,
    check_counts,
    oracle_shrinkage,
    shrunk,
    whitening,
)


def _data(seed=0, n=240, num_classes=3, dim=5, offset=0.0):
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % num_classes)
    x = 3.0 * rng.normal(size=(num_classes, dim))[y] + offset
    return x + rng.normal(size=(n, dim)) @ rng.normal(size=(dim, dim)), y


def _of(x, y, pooled=False, num_classes=3):
    statistics = ClassStatistics(num_classes, x.shape[-1], pooled)
    statistics.update(x, y)
    return statistics


def _assert_same(one, other):
    np.testing.assert_array_equal(one.counts, other.counts)
    for name in ("means", "scatter"):
        a, b = getattr(one, name), getattr(other, name)
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12 * abs(a).max())
    np.testing.assert_array_equal(one.resolution, other.resolution)


@pytest.mark.parametrize("pooled", [False, True])
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    num_parts=st.integers(1, 8),
    offset=st.sampled_from([0.0, 1e3]),
)
def test_shards_in_any_order_give_what_one_pass_gives(
    pooled, seed, num_parts, offset
):
    x, y = _data(seed, offset=offset)
    expected = _of(x, y, pooled)
    residuals = x - np.stack([x[y == k].mean(axis=0) for k in range(3)])[y]
    np.testing.assert_allclose(
        expected.pooled_covariance(),
        residuals.T @ residuals / len(x),
        rtol=1e-9,
        atol=1e-9,
    )
    rng = np.random.default_rng(seed)
    parts = np.array_split(rng.permutation(len(x)), num_parts)
    batched = ClassStatistics(3, 5, pooled)
    merged = ClassStatistics(3, 5, pooled)
    for part in parts:
        batched.update(x[part], y[part])
        # As they come from another machine.
        file = io.BytesIO()
        np.savez(file, **_of(x[part], y[part], pooled).state())
        file.seek(0)
        merged.merge(ClassStatistics.from_state(np.load(file)))
    scale = max(1.0, offset)
    for statistics in (batched, merged):
        np.testing.assert_array_equal(statistics.counts, expected.counts)
        np.testing.assert_allclose(
            statistics.means, expected.means, rtol=1e-12, atol=1e-12
        )
        np.testing.assert_allclose(
            statistics.scatter,
            expected.scatter,
            rtol=1e-12 * scale,
            atol=1e-12 * scale * abs(expected.scatter).max(),
        )


def test_parts_without_a_class_and_empty_ones_merge():
    x, y = _data()
    expected = _of(x, y)
    merged = ClassStatistics(3, 5)
    merged.update(x[:0], y[:0])
    for k in range(3):
        merged.merge(_of(x[y == k], y[y == k]))
    merged.merge(ClassStatistics(3, 5))
    _assert_same(merged, expected)


def test_more_samples_than_one_product_takes_are_the_same():
    x, y = _data(n=9000)
    expected = ClassStatistics(3, 5)
    for start in range(0, 9000, 100):
        expected.update(x[start : start + 100], y[start : start + 100])
    _assert_same(_of(x, y), expected)


def test_covariances_do_not_depend_on_units():
    x, y = _data()
    units = np.array([1.0, 1e-6, 1e3, 1e9, 2.0])
    plain, scaled = _of(x, y), _of(x * units, y)
    for k in range(3):
        np.testing.assert_allclose(
            scaled.covariance(k, scaled.scales()),
            plain.covariance(k, plain.scales()) * np.outer(units, units),
            rtol=1e-9,
        )
    transform, center = whitening(plain)
    again, center_again = whitening(scaled)
    # The same distances; the axes may turn.
    np.testing.assert_allclose(
        np.square((x - center) @ transform.T).sum(axis=-1),
        np.square((x * units - center_again) @ again.T).sum(axis=-1),
        rtol=1e-8,
    )


def test_shrinkage_is_that_of_scikit_learn_up_to_its_terms_of_order_one_by_d():
    covariance_module = pytest.importorskip("sklearn.covariance")
    x = np.random.default_rng(0).normal(size=(60, 40)) * np.arange(1, 41)
    x -= x.mean(axis=0)
    _, expected = covariance_module.oas(x, assume_centered=True)
    assert oracle_shrinkage(x.T @ x / 60, 60) == pytest.approx(
        expected, rel=0.05
    )


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_what_does_not_vary_beyond_rounding_has_no_scale_of_its_own(dtype):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 4)).astype(dtype)
    x[:, 1] = 0.0
    x[:, 2] = np.asarray(900.0, dtype)
    x[::2, 2] = np.nextafter(x[0, 2], np.asarray(0.0, dtype))
    scales = _of(x, np.arange(50) % 2, num_classes=2).scales()
    np.testing.assert_allclose(scales[1:3], np.median(scales[[0, 3]]))
    assert _of(np.ones((50, 4), dtype), np.arange(50) % 3).scales() is None


def test_whitening_survives_what_does_not_vary():
    for x in ([[1.0, 0.0, 2.0], [3.0, 0.0, 2.0]] * 4, [[1.0, 0, 2], [3, 0, 2]]):
        x = np.array(x)
        statistics = _of(x, np.arange(len(x)) % 2, num_classes=2)
        transform, center = whitening(statistics)
        assert np.isfinite(transform).all() and np.abs(transform).max() < 10
        np.testing.assert_array_equal(center, [2.0, 0.0, 2.0])
    with pytest.raises(ValueError, match="the same to rounding"):
        whitening(_of(np.ones((6, 3)), np.arange(6) % 3))


def test_a_floor_keeps_every_covariance_invertible():
    covariance, _ = shrunk(np.zeros((3, 3)), 1000, np.ones(3))
    assert np.linalg.eigvalsh(covariance).min() > 0.0


def test_what_does_not_fit_is_refused_and_changes_nothing():
    x, y = _data()
    statistics = _of(x, y)
    before = statistics.state()
    refused = {
        "integers in": lambda: statistics.update(x, y + 1),
        "must be finite": lambda: statistics.update(x * np.nan, y),
        "of shape `": lambda: statistics.update(x[:, :2], y),
        "Statistics merge": lambda: statistics.merge(ClassStatistics(4, 5)),
        "pooled=True": lambda: statistics.merge(ClassStatistics(3, 5, True)),
        "without": lambda: ClassStatistics.from_state({"counts": [1]}),
        "of shapes": lambda: ClassStatistics.from_state(
            {**before, "means": np.zeros(3)}
        ),
        "damaged": lambda: ClassStatistics.from_state(
            {**before, "counts": -before["counts"]}
        ),
    }
    for message, call in refused.items():
        with pytest.raises(ValueError, match=message):
            call()
    for name, value in statistics.state().items():
        np.testing.assert_array_equal(value, before[name])


def test_an_error_names_a_few_classes_of_many():
    with pytest.raises(ValueError, match="4: 0, and 995 more") as error:
        check_counts(np.zeros(1000, int), 2)
    assert len(str(error.value)) < 300
