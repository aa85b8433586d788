"""Two towers: scores between batches, their labels, loss, and training."""

import keras
import numpy as np
import pytest
from helpers import (
    float64,
    jit,
    naive_softmax,
    packed,
    to_numpy,
    value_and_gradients,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops
from keras.src import backend

import keras_halo
from keras_halo import HALOContrastiveLoss, HALOLoss, HALOSimilarity
from keras_halo.layers.halo_similarity import similarity_scores
from keras_halo.metrics import RetrievalRecall
from keras_halo.ops import geometry, packing

D = 6
POLICIES = {
    "float32": "float32",
    "mixed_float16": "float32",
    "mixed_bfloat16": "float32",
    "bfloat16": "float32",
    "float64": "float64",
}


def _pairs(queries=5, keys=5, seed=0, dtype="float32"):
    rng = np.random.default_rng(seed)
    q, k = rng.normal(size=(queries, D)), rng.normal(size=(keys, D))
    # A mean that is not zero, so that centring is seen.
    return q.astype(dtype), (k + 0.5).astype(dtype)


def _by_the_book(queries, keys, gamma=None, smoothing=0.1, dtype="float64"):
    """Packed scores from float64 loops over the pairs."""
    dim = queries.shape[-1]
    if gamma is None:
        gamma = geometry.initial_temperature(dim)
    return packed(
        queries,
        keys,
        gamma=gamma,
        bias=geometry.abstain_bias(dim, len(keys), smoothing),
        dtype=dtype,
        smoothing=smoothing,
    )


def _naive_loss(same, scores, smoothing=0.1, distill=True, radial_weight=1.0):
    """The loss of one direction by the book, query by query."""
    losses = []
    for is_match, row in zip(same, scores.astype("float64"), strict=True):
        s, b = row[:-6], row[-6]
        norm, gamma, size = row[-5:-2] / -(2.0**40) - 1.0
        radii = norm - s / gamma
        log_p = np.log(naive_softmax(np.append(s, b)))[:-1]
        loss = 0.0
        for y in np.flatnonzero(is_match):
            if distill:
                z = np.minimum(s - gamma * norm, 0.0) / smoothing
                z[y] = 0.0
                q = naive_softmax(z)
            else:
                q = np.eye(len(s))[y] * (1 - smoothing) + smoothing / len(s)
            radial = radii[y] / 2 - (0.5 - 1 / size) * np.log(radii[y])
            loss += -(q * log_p).sum() + radial_weight * radial
        losses.append(loss / is_match.sum())
    return np.array(losses)


@pytest.mark.parametrize("keys", [5, 3])
def test_scores_are_those_of_the_book_in_both_directions(keys):
    q, k = _pairs(keys=keys)
    similarity = HALOSimilarity()
    for a, b in ((q, k), (k, q)):
        scores = to_numpy(similarity([a, b]))
        np.testing.assert_allclose(
            scores, _by_the_book(a, b), rtol=1e-4, atol=1e-4
        )
        assert similarity.compute_output_shape([a.shape, b.shape]) == (
            scores.shape
        )
    assert len(similarity.weights) == 1


def test_bidirectional_scores_are_those_of_both_directions():
    q, k = _pairs()
    one_way, both = HALOSimilarity(), HALOSimilarity(bidirectional=True)
    expected = np.stack(
        [to_numpy(one_way([q, k])), to_numpy(one_way([k, q]))], axis=1
    )
    np.testing.assert_array_equal(to_numpy(both([q, k])), expected)
    assert both.compute_output_shape([q.shape, k.shape]) == expected.shape


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_abstain_bias_follows_the_number_of_keys(smoothing):
    for keys in (2, 7):
        q, k = _pairs(keys=keys)
        layer = HALOSimilarity(label_smoothing=smoothing)
        bias = to_numpy(packing.unpack(layer([q, k])).abstain_logit)
        np.testing.assert_allclose(
            bias, geometry.abstain_bias(D, keys, smoothing), rtol=1e-6
        )
    as_tensor = geometry.abstain_bias(
        D, ops.convert_to_tensor(7.0, "float32"), smoothing
    )
    np.testing.assert_allclose(to_numpy(as_tensor), bias[0, 0], rtol=1e-6)


@pytest.mark.parametrize("policy", POLICIES)
def test_output_is_never_below_float32(policy):
    expected = POLICIES[policy]
    with float64():
        layer = HALOSimilarity(dtype=policy)
        q, k = _pairs(dtype=expected)
        output = layer([q, k])
        symbolic = layer(
            [keras.KerasTensor((None, D)), keras.KerasTensor((None, D))]
        )
        assert keras.backend.standardize_dtype(output.dtype) == expected
        assert symbolic.dtype == expected
        assert symbolic.shape == (None, None)
        assert {w.dtype for w in layer.weights} == {expected}
        digits = 1e-11 if expected == "float64" else 1e-4
        np.testing.assert_allclose(
            to_numpy(output), _by_the_book(q, k), rtol=digits, atol=digits
        )


def test_symbolic_shapes():
    def shape(queries, keys, **kwargs):
        layer = HALOSimilarity(**kwargs)
        return layer(
            [keras.KerasTensor((queries, D)) for queries in (queries, keys)]
        ).shape

    assert shape(None, 7) == (None, 13)
    assert shape(3, None) == (3, None)
    assert shape(None, None, bidirectional=True) == (None, 2, None)
    assert shape(4, None, bidirectional=True) == (4, 2, 10)


@pytest.mark.parametrize("distill", [True, False])
def test_gradients_reach_queries_keys_and_temperature(distill):
    q, k = _pairs(dtype="float64")
    ids = np.array([0, 1, 0, 2, 3])
    same = ids[:, None] == ids[None]
    gamma = np.array(9.0)

    def loss(q, k, gamma):
        total = 0.0
        for a, b in ((q, k), (k, q)):
            scores = similarity_scores(a, b, gamma, 0.1)
            # The reductions of Keras round to float32 on PyTorch.
            each = HALOContrastiveLoss(
                distill=distill, reduction=None, dtype="float64"
            )(ids, scores)
            total = total + ops.sum(each) / len(ids)
        return total

    def frozen(q, k, gamma, targets):
        """The loss by the book for soft targets that stay as they are."""
        total = 0.0
        for (a, b), q_soft in zip(((q, k), (k, q)), targets, strict=True):
            row = _by_the_book(a, b, gamma=gamma)
            s = row[:, :-5]
            log_p = s - np.logaddexp.reduce(s, axis=-1, keepdims=True)
            c = b - b.mean(axis=0)
            radii = ((a[:, None] - c[None]) ** 2).mean(axis=-1)
            radial = radii / 2 - (0.5 - 1 / D) * np.log(radii)
            labels = same / same.sum(axis=-1, keepdims=True)
            each = -(q_soft * log_p[:, :-1]).sum(-1) + (labels * radial).sum(-1)
            total += each.mean()
        return total

    def soft_targets():
        labels = same / same.sum(axis=-1, keepdims=True)
        if not distill:
            return [0.9 * labels + 0.1 / len(q)] * 2
        result = []
        for a, b in ((q, k), (k, q)):
            c = b - b.mean(axis=0)
            z = -gamma * ((a[:, None] - c[None]) ** 2).mean(axis=-1) / 0.1
            rows = []
            for label, distance in zip(labels, z, strict=True):
                row = np.zeros(len(q))
                for y in np.flatnonzero(label):
                    own = distance.copy()
                    own[y] = 0.0
                    row += label[y] * naive_softmax(own)
                rows.append(row)
            result.append(np.array(rows))
        return result

    targets = soft_targets()
    arrays = [q, k, gamma]
    with float64():
        value, gradients = value_and_gradients(loss, *arrays)
    assert value == pytest.approx(frozen(*arrays, targets), rel=1e-9)
    for index, gradient in enumerate(gradients):
        expected = np.zeros_like(arrays[index])
        for position in np.ndindex(expected.shape):
            ends = []
            for step in (1e-5, -1e-5):
                moved = [array.copy() for array in arrays]
                moved[index][position] += step
                ends.append(frozen(*moved, targets))
            expected[position] = (ends[0] - ends[1]) / 2e-5
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e12, 1e38])
def test_scores_losses_and_gradients_stay_finite(scale):
    q, k = _pairs()

    def loss(q, k):
        both = HALOSimilarity(bidirectional=True)
        both.build([q.shape, k.shape])
        return HALOContrastiveLoss()(np.arange(5), both([q, k]))

    for arrays in ((scale * q, k), (scale * q, scale * k)):
        value, gradients = value_and_gradients(
            loss, *(array.astype("float32") for array in arrays)
        )
        assert np.isfinite(value)
        assert all(np.isfinite(gradient).all() for gradient in gradients)


ids_strategy = st.lists(st.integers(-3, 3), min_size=1, max_size=8)


@settings(max_examples=50, deadline=None)
@given(queries=ids_strategy, keys=ids_strategy)
def test_matches_are_even_over_the_keys_of_the_same_id(queries, keys):
    labels = keras_halo.pair_labels(queries, keys)
    assert labels.shape == (len(queries), len(keys))
    for query, row in zip(queries, labels, strict=True):
        count = keys.count(query)
        expected = [(key == query) / max(count, 1) for key in keys]
        np.testing.assert_allclose(row, expected, rtol=1e-6)


def test_matches_of_tensors_columns_and_large_ids():
    # Equal once rounded to float32.
    ids = np.array([2**24, 2**24 + 1, 2**24], "int32")
    expected = [[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]]
    for given_ids in (
        ids,
        ids[:, None],
        ops.convert_to_tensor(ids),
        ops.convert_to_tensor(ids[:, None]),
    ):
        np.testing.assert_array_equal(
            to_numpy(keras_halo.pair_labels(given_ids)), expected
        )
    scores = HALOSimilarity()(_pairs(3, 3))
    loss = HALOContrastiveLoss(reduction=None)
    np.testing.assert_array_equal(
        to_numpy(loss(ids, scores)), to_numpy(loss([7, 8, 7], scores))
    )


@pytest.mark.parametrize("distill", [True, False])
def test_contrastive_loss_with_repeated_ids_is_that_of_the_book(distill):
    q, k = _pairs()
    ids = np.array([4, 9, 4, 2, 4])
    same = ids[:, None] == ids[None]
    scores = HALOSimilarity(bidirectional=True)([q, k])
    losses = to_numpy(
        HALOContrastiveLoss(distill=distill, reduction=None)(ids, scores)
    )
    for direction, (a, b) in enumerate(((q, k), (k, q))):
        np.testing.assert_allclose(
            losses[:, direction],
            _naive_loss(same, _by_the_book(a, b), distill=distill),
            rtol=1e-4,
        )


def test_halo_loss_takes_positions_one_hot_and_matches():
    q, k = _pairs(4, 7)
    scores = HALOSimilarity()([q, k])
    positions = np.array([6, 0, 3, 3])
    loss = HALOLoss(reduction=None)
    expected = _naive_loss(np.eye(7)[positions], _by_the_book(q, k))
    for labels in (
        positions,
        np.eye(7)[positions],
        keras_halo.pair_labels(positions, np.arange(7)),
    ):
        np.testing.assert_allclose(
            to_numpy(loss(labels, scores)), expected, rtol=1e-4
        )


@pytest.mark.parametrize("distill", [True, False])
def test_a_query_without_a_match_does_not_count(distill):
    q, k = _pairs(3, 5)
    labels = keras_halo.pair_labels([0, 77, 2], np.arange(5))
    losses = to_numpy(
        HALOLoss(distill=distill, reduction=None)(
            labels, HALOSimilarity()([q, k])
        )
    )
    assert losses[1] == 0.0
    assert losses[0] != 0.0 and losses[2] != 0.0


def test_a_batch_of_one_pair_has_no_loss_and_no_gradient():
    q, k = _pairs(1, 1)

    def loss(q, k):
        scores = similarity_scores(q, k, ops.convert_to_tensor(9.0), 0.1)
        return HALOContrastiveLoss()(np.array([3]), scores)

    value, gradients = value_and_gradients(loss, q, k)
    assert value == 0.0
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0.0)


def test_compiled_and_eager_scores_agree():
    q, k = _pairs()
    layer = HALOSimilarity(bidirectional=True)
    expected = to_numpy(layer([q, k]))
    compiled = jit(lambda q, k: layer([q, k]))
    np.testing.assert_allclose(
        to_numpy(compiled(ops.convert_to_tensor(q), ops.convert_to_tensor(k))),
        expected,
        rtol=1e-5,
        atol=1e-5,
    )


def _towers(bidirectional=True, on_sphere=False, dtype=None):
    images, texts = (
        keras.Input((20,), name="image"),
        keras.Input((12,), name="text"),
    )
    embedded = [
        keras.layers.Dense(12, name=name, dtype=dtype)(x)
        for name, x in (("image_tower", images), ("text_tower", texts))
    ]
    if on_sphere:
        embedded = [
            keras.layers.Rescaling(6**0.5, dtype=dtype)(
                keras.layers.UnitNormalization(dtype=dtype)(x)
            )
            for x in embedded
        ]
    similarity = HALOSimilarity(
        bidirectional=bidirectional, name="similarity", dtype=dtype
    )
    if bidirectional:
        outputs = similarity(embedded)
    else:
        outputs = {
            "image_to_text": similarity(embedded),
            "text_to_image": similarity(embedded[::-1]),
        }
    return keras.Model([images, texts], outputs)


def _data(pairs=21, concepts=8, seed=0):
    """Pairs that share a hidden cause, some of them the same one."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(concepts, 12))
    ids = rng.integers(0, concepts, size=pairs)
    images = hidden[ids] @ rng.normal(size=(12, 20)) / 4
    texts = hidden[ids] + 0.1 * rng.normal(size=(pairs, 12))
    return [images.astype("float32"), texts.astype("float32")], ids


@pytest.mark.slow
@pytest.mark.parametrize("bidirectional", [True, False])
def test_fit_follows_the_book_batch_by_batch(bidirectional):
    x, ids = _data()
    model = _towers(bidirectional)
    # No step, so that every batch sees the same weights.
    model.compile(keras.optimizers.SGD(0.0), HALOContrastiveLoss())
    y = ids
    if not bidirectional:
        y = {"image_to_text": ids, "text_to_image": ids}
    # The last batch of 21 holds five pairs.
    history = model.fit(x, y, batch_size=8, shuffle=False, verbose=0).history
    towers = [model.get_layer(f"{name}_tower") for name in ("image", "text")]
    embedded = [
        to_numpy(tower(part)) for tower, part in zip(towers, x, strict=True)
    ]
    expected = []
    for start in range(0, 21, 8):
        q, k = (e[start : start + 8] for e in embedded)
        batch_ids = ids[start : start + 8]
        same = batch_ids[:, None] == batch_ids[None]
        both = [
            _naive_loss(same, _by_the_book(a, b)).mean()
            for a, b in ((q, k), (k, q))
        ]
        expected.append((len(q), np.mean(both) if bidirectional else sum(both)))
    sizes, losses = zip(*expected, strict=True)
    assert history["loss"][0] == pytest.approx(
        np.average(losses, weights=sizes), rel=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize("last", [1, 2])
def test_training_survives_a_tiny_last_batch(last):
    x, ids = _data(pairs=8 + last)
    model = _towers()
    model.compile(keras.optimizers.Adam(1e-2), HALOContrastiveLoss())
    history = model.fit(x, ids, batch_size=8, epochs=2, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert all(np.isfinite(to_numpy(w)).all() for w in model.weights)
    assert np.isfinite(model.evaluate(x, ids, batch_size=8, verbose=0))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_towers_learn_to_retrieve_and_to_reject(policy, tmp_path):
    x, ids = _data(pairs=200, concepts=32)
    model = _towers(on_sphere=True, dtype=policy)
    model.compile(
        keras.optimizers.Adam(0.01), HALOContrastiveLoss(radial_weight=0.0)
    )
    model.fit(x, ids, batch_size=64, epochs=40, verbose=0)

    similarity = model.get_layer("similarity")
    image_tower, text_tower = (
        keras.Model(*ends)
        for ends in zip(model.inputs, similarity.input, strict=True)
    )
    seen, first = np.unique(ids, return_index=True)
    gallery = text_tower.predict(x[1][first], verbose=0)
    queries = image_tower.predict(x[0], verbose=0)
    temperature = to_numpy(similarity.temperature)
    assert abs(temperature - geometry.initial_temperature(12)) > 0.01

    scores = to_numpy(similarity.to_head(gallery)(queries))
    one_way = HALOSimilarity()
    one_way.build([(None, 12), (None, 12)])
    one_way.raw_gamma.assign(similarity.raw_gamma)
    np.testing.assert_allclose(
        scores, to_numpy(one_way([queries, gallery])), rtol=1e-4, atol=1e-3
    )
    known = keras_halo.decode_predictions(scores)
    assert np.mean(seen[known.probabilities.argmax(-1)] == ids) > 0.95
    pairs = keras_halo.pair_log_odds(scores)
    same = ids[:, None] == seen
    assert keras_halo.metrics.auroc(-pairs[same], -pairs[~same]) > 0.95
    # The same queries, with half of what they look for gone.
    half = to_numpy(similarity.to_head(gallery[::2])(queries))
    odds = keras_halo.ood_score(half, "abstain")
    aligned = np.isin(ids, seen[::2])
    assert keras_halo.metrics.auroc(odds[aligned], odds[~aligned]) > 0.9

    model.save(tmp_path / "towers.keras")
    loaded = keras.saving.load_model(tmp_path / "towers.keras")
    assert isinstance(loaded.loss, HALOContrastiveLoss)
    np.testing.assert_array_equal(
        loaded.predict([part[:8] for part in x], verbose=0),
        model.predict([part[:8] for part in x], verbose=0),
    )


def test_pair_log_odds_are_logits_above_that_of_abstaining():
    q, k = _pairs()
    scores = to_numpy(HALOSimilarity()([q, k]))
    odds = keras_halo.pair_log_odds(scores)
    answers = naive_softmax(scores[:, :-5].astype("float64"))
    np.testing.assert_allclose(
        1 / (1 + np.exp(-odds)),
        answers[:, :-1] / (answers[:, :-1] + answers[:, -1:]),
        rtol=1e-5,
    )


def test_sample_weights_weigh_both_directions_of_a_pair():
    q, k = _pairs()
    scores = HALOSimilarity(bidirectional=True)([q, k])
    ids, weights = np.arange(5), np.array([0.0, 1.0, 2.0, 0.5, 0.0])
    each = to_numpy(HALOContrastiveLoss(reduction=None)(ids, scores))
    loss = HALOContrastiveLoss(reduction="sum")
    weighted = to_numpy(loss(ids, scores, sample_weight=weights))
    assert weighted == pytest.approx((weights[:, None] * each).sum(), rel=1e-5)


@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 2)])
def test_weights_of_pairs_are_those_of_both_directions(shape):
    pairs = np.random.default_rng(0).normal(size=(3, 8)).astype("float32")
    layer = HALOSimilarity(bidirectional=True)
    scores = layer([pairs, pairs[::-1]])
    loss = HALOContrastiveLoss(reduction=None)
    weights = np.arange(np.prod(shape), dtype="float32").reshape(shape)
    each = to_numpy(loss(np.arange(3), scores))
    weighted = to_numpy(loss(np.arange(3), scores, sample_weight=weights))
    by_pair = weights.reshape(3, -1)
    np.testing.assert_allclose(weighted, each * by_pair, rtol=1e-5)


def test_config_round_trips():
    layer = HALOSimilarity(
        label_smoothing=0.02, learn_gamma=False, bidirectional=True, name="s"
    )
    revived = keras.layers.deserialize(keras.layers.serialize(layer))
    assert revived.get_config() == layer.get_config()
    assert revived.bidirectional and not revived.learn_gamma
    loss = HALOContrastiveLoss(0.02, distill=False, radial_weight=0.5)
    revived = keras.losses.deserialize(keras.losses.serialize(loss))
    assert revived.get_config() == loss.get_config()
    assert revived.label_smoothing == 0.02 and revived.radial_weight == 0.5


def test_each_loss_has_its_own_arguments_and_no_other():
    common = ["name", "reduction", "label_smoothing", "distill"]
    common += ["radial_weight", "dtype"]
    assert set(HALOContrastiveLoss().get_config()) == set(common)
    assert set(HALOLoss().get_config()) == {
        *common,
        "ignore_class",
        "block_size",
    }
    assert not isinstance(HALOContrastiveLoss(), HALOLoss)
    # Before, it had these two all the same, and they were not saved.
    assert not hasattr(HALOContrastiveLoss(), "ignore_class")
    assert not hasattr(HALOContrastiveLoss(), "block_size")
    with pytest.raises(ValueError, match="`radial_weight`.*Received"):
        HALOContrastiveLoss(radial_weight=-1.0)
    with pytest.raises(ValueError, match="`label_smoothing`.*Received"):
        HALOContrastiveLoss(1.0)


def test_a_fixed_temperature_is_not_trained():
    layer = HALOSimilarity(learn_gamma=False)
    layer.build([(None, D), (None, D)])
    assert layer.trainable_weights == [] and len(layer.weights) == 1


@pytest.mark.parametrize(
    "shapes",
    [
        [(4, 6)],
        [(4, 6), (4, 6), (4, 6)],
        [(4, 6), (4, 5)],
        [(4, 1), (4, 1)],
        [(4, 3, 6), (4, 3, 6)],
        [(6,), (6,)],
        [(4, None), (4, None)],
    ],
)
def test_shapes_that_are_no_two_batches_of_embeddings_are_refused(shapes):
    with pytest.raises(ValueError, match="list of two tensors.*Received"):
        HALOSimilarity().compute_output_shape(shapes)
    with pytest.raises(ValueError, match="list of two tensors.*Received"):
        HALOSimilarity()([keras.KerasTensor(shape) for shape in shapes])


def test_other_bad_arguments_are_refused():
    q, k = _pairs(4, 5)
    with pytest.raises(ValueError, match="as many keys as queries"):
        HALOSimilarity(bidirectional=True)([q, k])
    with pytest.raises(ValueError, match="list of two tensors"):
        HALOSimilarity()(q)
    with pytest.raises(ValueError, match="floating point.*dtype=int32"):
        HALOSimilarity()([q.astype("int32"), k])
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        HALOSimilarity(label_smoothing=1.0)
    with pytest.raises(ValueError, match="was not built"):
        HALOSimilarity().to_head(k)
    layer = HALOSimilarity()
    scores = layer([q, k])
    for gallery in (k[:1], k[:, :3], k[0]):
        with pytest.raises(ValueError, match="gallery of shape.*Received"):
            layer.to_head(gallery)
    with pytest.raises(ValueError, match="Expected ids.*pair_labels"):
        HALOContrastiveLoss()(np.arange(4), scores)
    with pytest.raises(ValueError, match="Expected ids.*Received: 3 ids"):
        HALOContrastiveLoss()(np.arange(3), layer([k, k]))
    for ids in (3, np.eye(5)):
        with pytest.raises(ValueError, match="Ids say.*Received"):
            HALOContrastiveLoss()(ids, layer([k, k]))
    with pytest.raises(ValueError, match="no packed geometry"):
        keras_halo.pair_log_odds(np.zeros((2, 9), "float32"))


@pytest.mark.parametrize(
    "kind", ["array", "tensor", "names", "loss", "booleans", "boolean tensor"]
)
def test_ids_that_are_no_integers_are_refused(kind):
    ids = np.array([16777216.0, 16777217.0], "float64")
    if kind == "names":
        ids = np.array(["a", "b"])
    if kind.startswith("boolean"):
        ids = np.array([True, False])
    if kind == "boolean tensor":
        ids = ops.convert_to_tensor(ids)
    if kind == "tensor":
        ids = ops.convert_to_tensor(ids.astype("float32"))
    read = keras_halo.pair_labels
    if kind == "loss":
        pairs = np.eye(2, 4, dtype="float32")
        scores = keras_halo.HALOSimilarity()([pairs, pairs])

        def read(ids):
            keras_halo.HALOContrastiveLoss()(ids, scores)

    with pytest.raises(ValueError, match="Ids must be integers"):
        read(ids)


@pytest.mark.parametrize("kind", ["array", "tensor"])
@pytest.mark.parametrize("read", ["loss", "recall"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_scores_in_the_place_of_ids_are_told(kind, read, bidirectional):
    pairs = np.eye(4, dtype="float32")
    scores = HALOSimilarity(bidirectional=bidirectional)([pairs, pairs])
    ids = np.arange(4)
    if kind == "array":
        scores = to_numpy(scores)
    else:
        ids = ops.convert_to_tensor(ids)
    use = {
        "loss": HALOContrastiveLoss(),
        "recall": RetrievalRecall().update_state,
    }[read]
    with pytest.raises(ValueError, match="Ids come first"):
        use(scores, ids)


def naive_recall(ids, scores, k, weights):
    """Recall@k, query by query."""
    found = []
    for row, own in zip(scores, ids, strict=True):
        logits = row[: len(ids)]
        best = max(logits[j] for j in range(len(ids)) if ids[j] == own)
        ahead = logits[(ids != own) & (logits >= best)]
        found.append(len(ahead) < k)
    return np.average(found, weights=weights)


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("direction", ["both", "queries", "keys"])
@pytest.mark.parametrize("weighted", [False, True])
def test_recall_knows_ids(k, direction, weighted):
    rng = np.random.default_rng(0)
    metric = RetrievalRecall(k, direction)
    rows = []
    for size in (12, 7):
        queries = rng.normal(size=(size, 6)).astype("float32")
        keys = queries + 1.5 * rng.normal(size=(size, 6)).astype("float32")
        # Not their positions, far beyond float32, and some of them twice.
        ids = 2**25 + 3 * rng.integers(0, 6, size)
        weights = rng.random((size, 2)).astype("float32") if weighted else None
        scores = HALOSimilarity(bidirectional=True)([queries, keys])
        metric.update_state(ids, scores, weights)
        scores = to_numpy(scores)
        for index, name in enumerate(("queries", "keys")):
            if direction in ("both", name):
                part = np.ones(size) if weights is None else weights[:, index]
                found = naive_recall(ids, scores[:, index], k, part)
                rows.append((found, part.sum()))
    found, counts = np.transpose(rows)
    expected = np.average(found, weights=counts)
    np.testing.assert_allclose(float(metric.result()), expected, rtol=1e-5)
    assert 0.2 < expected <= 1.0


def test_recall_of_pairs_that_are_found_is_one_where_accuracy_is_not():
    pairs = 3.0 * np.eye(4, dtype="float32")
    ids = np.array([17, 5, 2, 1])
    scores = to_numpy(HALOSimilarity()([pairs, pairs]))
    assert (scores.argmax(axis=-1) == np.arange(4)).all()
    accuracy = keras.metrics.SparseCategoricalAccuracy()
    accuracy.update_state(ids, scores)
    recall = RetrievalRecall()
    recall.update_state(ids, scores)
    # It takes ids for positions, of which one is right by chance.
    assert float(accuracy.result()) == 0.25
    assert float(recall.result()) == 1.0


def test_recall_in_fit_of_several_batches_and_back_from_its_config():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, 6)).astype("float32")
    ids = rng.integers(0, 1000, 16)
    inputs = [keras.Input((6,)), keras.Input((6,))]
    outputs = HALOSimilarity(bidirectional=True)(inputs)
    model = keras.Model(inputs, outputs)
    metric = RetrievalRecall(2, "queries")
    config = keras.saving.serialize_keras_object(metric)
    copy = keras.saving.deserialize_keras_object(config)
    assert copy.get_config() == metric.get_config()
    assert copy.name == "recall_at_2"
    model.compile("sgd", HALOContrastiveLoss(), metrics=[copy])
    logs = model.evaluate(
        [x, x[::-1]], ids, batch_size=8, verbose=0, return_dict=True
    )
    expected = []
    for rows in (slice(0, 8), slice(8, 16)):
        scores = to_numpy(model([x[rows], x[::-1][rows]]))[:, 0]
        expected.append(naive_recall(ids[rows], scores, 2, np.ones(8)))
    np.testing.assert_allclose(
        logs["recall_at_2"], np.mean(expected), rtol=1e-5
    )


def test_recall_honours_masks_and_tells_scores_of_others():
    pairs = np.random.default_rng(0).normal(size=(5, 6)).astype("float32")
    ids = np.arange(5)
    keep = np.array([True, False, True, True, False])
    scores = to_numpy(HALOSimilarity()([pairs, pairs[[1, 0, 2, 3, 4]]]))
    broken = scores.copy()
    broken[1] = np.nan
    masked = ops.convert_to_tensor(broken)
    backend.set_keras_mask(masked, ops.convert_to_tensor(keep))
    metric = RetrievalRecall()
    metric.update_state(ids, masked)
    expected = naive_recall(ids, scores, 1, keep.astype(float))
    np.testing.assert_allclose(float(metric.result()), expected)
    metric.update_state(ids, broken)
    assert np.isnan(float(metric.result()))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_recall_of_towers_that_have_collapsed_is_zero(bidirectional):
    pairs = np.ones((6, 8), "float32")
    scores = HALOSimilarity(bidirectional=bidirectional)([pairs, pairs])
    ids = np.array([3, 1, 4, 1, 5, 9])
    for k, expected in ((1, 0.0), (4, 0.0), (5, 2 / 6), (np.int64(6), 1.0)):
        metric = RetrievalRecall(k)
        metric.update_state(ids, scores)
        assert float(metric.result()) == pytest.approx(expected)
        assert type(metric.get_config()["k"]) is int
    # Keys that tie and match are found all the same.
    metric = RetrievalRecall()
    metric.update_state(np.full(6, 7), scores)
    assert float(metric.result()) == 1.0


def test_wide_ids_of_an_array_beside_a_tensor_are_compared_or_refused():
    wide = (np.arange(4) + 1) * 2**32
    tensor = ops.convert_to_tensor(np.arange(4, dtype="int32"))
    for pair in ((wide, tensor), (tensor, wide)):
        if keras.backend.backend() == "jax":
            # As int32 all of them would be zero, which is an id of the tensor.
            with pytest.raises(ValueError, match="int32.*np.unique"):
                keras_halo.pair_labels(*pair)
        else:
            assert not to_numpy(keras_halo.pair_labels(*pair)).any()
    np.testing.assert_array_equal(
        to_numpy(keras_halo.pair_labels(np.arange(4), tensor)), np.eye(4)
    )
    np.testing.assert_array_equal(keras_halo.pair_labels(wide), np.eye(4))


def test_recall_of_one_pair_is_one():
    metric = RetrievalRecall()
    assert np.isnan(float(metric.result()))
    x = np.ones((1, 6), "float32")
    metric.update_state(np.array([9]), HALOSimilarity()([x, x]))
    assert float(metric.result()) == 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RetrievalRecall(0), "`k` must be a positive integer"),
        (lambda: RetrievalRecall(True), "`k` must be a positive integer"),
        (lambda: RetrievalRecall(1, "up"), "`direction` must be"),
        (
            lambda: RetrievalRecall().update_state(
                np.arange(3), np.zeros((4, 10), "float32")
            ),
            "Expected ids of shape",
        ),
        (
            lambda: RetrievalRecall().update_state(
                np.array([0.5, 1.5]), np.zeros((2, 8), "float32")
            ),
            "Ids must be integers",
        ),
        (
            lambda: RetrievalRecall().update_state(np.arange(3), None),
            "`y_pred` must be an array of real numbers",
        ),
        (
            lambda: RetrievalRecall().update_state(
                np.arange(3), np.zeros((3, 9), "float32"), np.ones(2)
            ),
            "Expected `sample_weight` to have one value",
        ),
    ],
)
def test_recall_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
