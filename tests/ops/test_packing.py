"""The layout of packed scores, and what ordinary code makes of it."""

import keras
import numpy as np
import pytest
from helpers import float64, packed, to_numpy, value_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_halo.ops import packing


def _scores(batch=6, num_classes=10, embedding_dim=8, scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    return packed(
        scale * rng.normal(size=(batch, embedding_dim)),
        rng.normal(size=(num_classes, embedding_dim)),
    )


def test_pack_writes_the_columns_of_the_design():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 4)).astype("float32")
    c = rng.normal(size=(3, 4)).astype("float32")
    c -= c.mean(axis=0)
    norm = (x**2).mean(axis=-1, keepdims=True)
    radii = ((x[:, None] - c[None]) ** 2).mean(axis=-1)
    logits = ops.convert_to_tensor(4.0 * (norm - radii))
    scores = packing.pack(logits, -1.0, ops.convert_to_tensor(norm), 4.0, 4)
    expected = packed(x, c, gamma=4.0, bias=-1.0)
    np.testing.assert_allclose(to_numpy(scores), expected, rtol=1e-5, atol=1e-5)


norms = st.floats(0.0, 2.0**40, width=32, allow_subnormal=False)


@settings(max_examples=50, deadline=None)
@given(
    norm=norms,
    gamma=st.floats(2.0**-10, 2.0**10, width=32),
    embedding_dim=st.integers(2, 2**20),
)
def test_round_trip(norm, gamma, embedding_dim):
    column = np.array([[norm]], "float32")
    logits = np.array([[1.5, -2.25]], "float32")
    once = packing.unpack(
        packing.pack(
            ops.convert_to_tensor(logits),
            0.5,
            ops.convert_to_tensor(column),
            ops.convert_to_tensor(np.float32(gamma)),
            embedding_dim,
        )
    )
    np.testing.assert_array_equal(to_numpy(once.logits), logits)
    assert float(once.abstain_logit[0, 0]) == 0.5
    assert int(once.embedding_dim[0, 0]) == embedding_dim
    # Adding one rounds; nothing else does.
    unit = np.finfo("float32").eps
    assert abs(float(once.squared_norm[0, 0]) - norm) <= unit * (1 + norm)
    assert abs(float(once.temperature[0, 0]) - gamma) <= unit * (1 + gamma)
    again = packing.unpack(packing.pack(*once))
    for first, second in zip(once, again, strict=True):
        np.testing.assert_array_equal(to_numpy(first), to_numpy(second))


shares = st.floats(0.0, 1.0, exclude_max=True)


def _with_smoothing(smoothing, dtype="float32"):
    return packing.pack(
        ops.zeros((3, 2), dtype),
        0.5,
        ops.ones((3, 1), dtype),
        4.0,
        8,
        packing.smoothing_background(smoothing),
    )


@settings(max_examples=100, deadline=None)
@given(smoothing=shares, other=shares)
def test_a_label_smoothing_comes_back_and_is_known_again(smoothing, other):
    scores = _with_smoothing(smoothing)
    packing.check_packed(to_numpy(scores))
    parts = packing.unpack(scores)
    np.testing.assert_array_equal(to_numpy(parts.far_radius), 0.0)
    assert not to_numpy(parts.has_far_background).any()
    (found,) = np.unique(to_numpy(parts.label_smoothing))
    assert abs(found - smoothing) <= 2.0**-22 and 0.0 <= found < 1.0
    # Zero is special: its margin is not the limit of small ones.
    assert (found == 0.0) == (smoothing == 0.0)
    np.testing.assert_array_equal(
        to_numpy(packing.pack(*parts)), to_numpy(scores)
    )
    # As it was packed, and cast on the way to a loss in float64.
    for one in (parts, packing.unpack(to_numpy(scores).astype("float64"))):
        assert np.all(to_numpy(one.may_train_with(smoothing)))
        if abs(other - smoothing) > 2.0**-22:
            assert not np.any(to_numpy(one.may_train_with(other)))


@settings(max_examples=50, deadline=None)
@given(smoothing=shares)
def test_precisions_pack_the_same_label_smoothing(smoothing):
    with float64():
        double = _with_smoothing(smoothing, "float64")
        assert keras.backend.standardize_dtype(double.dtype) == "float64"
        single = to_numpy(_with_smoothing(smoothing))
        np.testing.assert_array_equal(to_numpy(double), single)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9999999])
def test_a_label_smoothing_has_probability_zero(smoothing):
    probabilities = to_numpy(ops.softmax(_with_smoothing(smoothing)))
    np.testing.assert_array_equal(probabilities[:, 3:], 0.0)


@pytest.mark.parametrize("kappa", [0.0, 1e-3, 0.5, 30.0])
def test_other_heads_train_with_any_label_smoothing(kappa):
    parts = packing.unpack(
        packing.pack(ops.zeros((3, 2)), 0.5, ops.ones((3, 1)), 4.0, 8, kappa)
    )
    for smoothing in (0.0, 0.1, 0.999):
        assert np.all(to_numpy(parts.may_train_with(smoothing)))
    assert np.isnan(to_numpy(parts.label_smoothing)).all()
    np.testing.assert_allclose(to_numpy(parts.far_radius), kappa, atol=2e-6)
    assert np.all(to_numpy(parts.has_far_background)) == (kappa > 0.0)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("num_classes", [2, 10, 1000])
def test_neutral_columns_get_probability_zero(num_classes, scale):
    scores = ops.convert_to_tensor(
        _scores(num_classes=num_classes, scale=scale)
    )
    probabilities = to_numpy(ops.softmax(scores))
    assert np.all(probabilities[:, num_classes + 1 :] == 0.0)
    np.testing.assert_allclose(
        probabilities[:, : num_classes + 1],
        to_numpy(ops.softmax(packing.answer_logits(scores))),
        rtol=1e-6,
    )


@pytest.mark.parametrize("num_classes", [5, 10, 100])
def test_accuracy_and_top_five_do_not_see_the_neutral_columns(num_classes):
    scores = _scores(batch=200, num_classes=num_classes, seed=1)
    labels = np.random.default_rng(1).integers(0, num_classes, size=200)
    for metric in (
        keras.metrics.SparseCategoricalAccuracy(),
        keras.metrics.SparseTopKCategoricalAccuracy(k=5),
    ):
        whole = float(metric(labels, scores))
        metric.reset_state()
        assert whole == float(metric(labels, scores[:, : num_classes + 1]))
    assert (
        to_numpy(ops.top_k(scores, k=num_classes + 1)[1]).max() <= num_classes
    )


def test_gradients_pass_the_neutral_columns_exactly():
    def through(norm, gamma):
        scores = packing.pack(ops.zeros((3, 2)), 0.0, norm, gamma, 5)
        parts = packing.unpack(scores)
        return ops.sum(parts.squared_norm) + ops.sum(parts.temperature)

    norm = np.array([[0.0], [1.0], [7.0]], "float32")
    _, (by_norm, by_gamma) = value_and_gradients(through, norm, np.float32(2.0))
    np.testing.assert_array_equal(by_norm, np.ones((3, 1)))
    assert by_gamma == 3.0


@pytest.mark.parametrize("value", [1e-6, 1e-3, 0.1, 0.7, 1.0, 3.0, 1e3, 1e6])
def test_geometry_comes_back_to_within_the_rounding_that_is_stated(value):
    values = np.float32(value) * np.linspace(1.0, 1.9, 200, dtype="float32")
    packed = packing.pack(
        ops.zeros((200, 2)),
        0.0,
        ops.convert_to_tensor(values[:, None]),
        ops.convert_to_tensor(values[:, None]),
        2,
    )
    parts = packing.unpack(to_numpy(packed).astype("float64"))
    for found in (parts.temperature, parts.squared_norm):
        error = np.abs(found[:, 0] - values.astype("float64"))
        assert (error <= 6e-8 * (1.0 + values)).all()
        # Below one the relative error grows as is said.
        if value < 0.5:
            assert (error / values).max() > 1e-8 / values.max()


@pytest.mark.parametrize("shape", [(), (3,), (4, 1), (4, 5), (4, None)])
def test_too_narrow_or_undefined_width_is_refused(shape):
    with pytest.raises(ValueError, match="at least 8 columns.*HALODense"):
        packing.count_classes(shape)


def test_check_packed_accepts_scores_of_any_rank():
    packing.check_packed(_scores())
    packing.check_packed(_scores(batch=6).reshape(2, 3, 16))


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_check_packed_refuses_non_finite_values(poison):
    scores = _scores()
    scores[2, 1] = poison
    with pytest.raises(ValueError, match="must be finite.*1 of 96"):
        packing.check_packed(scores)


def test_check_packed_refuses_ordinary_logits():
    logits = np.random.default_rng(0).normal(size=(7, 10))
    with pytest.raises(ValueError, match="`y_pred` hold no packed.*HALODense"):
        packing.check_packed(logits, argument="y_pred")


@pytest.mark.parametrize(
    ("column", "value"),
    [
        (-5, -0.5),
        (-4, 0.0),
        (-3, 1.0),
        (-3, 7.5),
        # Below zero, what a label smoothing in [0, 1) is packed as.
        (-2, -0.25),
        (-2, -0.4999),
        (-2, -0.75),
        (-2, -0.9),
        (-1, 0.5),
        (-1, 2.0),
    ],
)
def test_check_packed_refuses_impossible_geometry(column, value):
    scores = _scores().astype("float64")
    scores[3, column] = -(2.0**40) * (1.0 + value)
    with pytest.raises(ValueError, match="no packed geometry in 1 of 6 rows"):
        packing.check_packed(scores)


# What keras_halo 0.1.0 predicted ----------------------------------------------


def _old_scores():
    """As 0.1.0 packed them: neither a far background nor a layout."""
    return np.delete(_scores(), [-2, -1], axis=-1)


def test_old_scores_are_refused_by_name_and_converted():
    old = _old_scores()
    with pytest.raises(ValueError, match=r"0\.1\.0.*upgrade_scores"):
        packing.check_packed(old)
    upgraded = packing.upgrade_scores(old)
    np.testing.assert_array_equal(upgraded, _scores())
    assert upgraded.dtype == old.dtype
    packing.check_packed(upgraded)


@pytest.mark.parametrize("other", [np.zeros((3, 9)), np.ones(3), np.ones(())])
def test_nothing_but_old_scores_is_converted(other):
    for scores in (other, _scores()):
        with pytest.raises(ValueError, match=r"Expected packed scores of"):
            packing.upgrade_scores(scores)


def test_old_scores_in_a_graph_hold_no_packed_scores():
    # Two classes fewer would be read, if nothing told the layouts apart.
    parts = packing.unpack(ops.convert_to_tensor(_old_scores()))
    np.testing.assert_array_equal(to_numpy(parts.embedding_dim), 0.0)
