"""What holds for every input: symmetries, equalities, gradients, finiteness.

The properties are checked on the layer and the loss that a user calls, in
float64 where two ways of computing are compared, so that a difference is a
mistake and not rounding. Shapes come from short lists: what is drawn is what
fills them.
"""

import functools

import keras
import ml_dtypes
import numpy as np
import pytest
from cases import THOROUGH, for_all
from helpers import float64, to_numpy, value_and_gradients
from hypothesis import strategies as st
from keras import ops

import keras_halo
from keras_halo import (
    HALOContrastiveLoss,
    HALODense,
    HALOLoss,
    HALOSimilarity,
    HALOSoftmax,
)
from keras_halo.losses import halo_loss
from keras_halo.ops import geometry, packing
from keras_halo.ops.targets import distilled_targets, smoothed_targets

# Samples, classes, embedding size.
SHAPES = [(1, 2, 2), (7, 5, 4)]

# Label smoothing, distilled targets, weight of the radial term.
LOSSES = [(0.1, True, 1.0), (0.2, False, 0.5), (0.0, True, 1.0)]

TINY, HUGE = 1e-6, 1e6


def powers(low, high):
    """Numbers of every order of magnitude between two."""
    return st.floats(np.log10(low), np.log10(high)).map(lambda e: 10.0**e)


seeds = st.integers(0, 2**32 - 1)

cases = {
    "shape": st.sampled_from(SHAPES),
    "seed": seeds,
    "scale": powers(1e-2, 1e2),
    "gamma": powers(1e-3, 1e3),
}


def draw(shape, seed, scale, gamma):
    """Embeddings, centroids, raw temperature and integer labels."""
    # Arrays throughout: PyTorch takes a float64 number for a float32 one.
    num_samples, num_classes, dim = shape
    rng = np.random.default_rng(seed)
    return (
        scale * rng.normal(size=(num_samples, dim)),
        scale * rng.normal(size=(num_classes, dim)),
        np.asarray(geometry.inverse_softplus(gamma)),
        rng.integers(0, num_classes, num_samples),
    )


@functools.lru_cache
def head_of(num_classes, dim, dtype, smoothing):
    head = HALODense.reference(num_classes, smoothing, dtype=dtype)
    head.build((None, dim))
    return head


def scores_of(x, centroids, raw_gamma, smoothing=0.1):
    """The layer's own `call`, on arrays that a gradient can be taken of."""
    dtype = keras.backend.standardize_dtype(centroids.dtype)
    head = head_of(*centroids.shape, dtype, smoothing)
    bias = geometry.abstain_bias(*centroids.shape[::-1], smoothing)
    bias = ops.convert_to_tensor(np.asarray(bias, dtype))
    return head.stateless_call([centroids, raw_gamma], [bias], x)[0]


def numpy_scores(x, centroids, raw_gamma):
    return to_numpy(
        scores_of(*map(ops.convert_to_tensor, (x, centroids, raw_gamma)))
    )


@functools.lru_cache
def weighted_loss(
    smoothing, distill, radial_weight, block_size=None, dtype="float64"
):
    """The loss as a function that JAX has to compile only once for a shape."""
    loss = HALOLoss(
        smoothing,
        distill,
        radial_weight,
        block_size=block_size,
        reduction=None,
        dtype=dtype,
    )

    def total(x, centroids, raw_gamma, weights, labels):
        losses = loss(labels, scores_of(x, centroids, raw_gamma, smoothing))
        return ops.sum(losses * weights)

    return total


def evaluate(loss, x, centroids, raw_gamma, labels):
    """Losses of the samples, and gradients of their sum."""
    _, (dx, dcentroids, dgamma, losses) = value_and_gradients(
        weighted_loss(*loss),
        x,
        centroids,
        raw_gamma,
        # The gradient with respect to these is the loss of each sample.
        np.ones(len(x), x.dtype),
        constants=[labels],
    )
    return losses, dx, dcentroids, dgamma


def assert_close(found, expected, rtol=1e-7):
    for one, other in zip(found, expected, strict=True):
        scale = np.abs(other).max(initial=0.0)
        np.testing.assert_allclose(
            one, other, rtol=rtol, atol=rtol * (1 + scale)
        )


def ood_scores(scores):
    return [
        keras_halo.ood_score(scores, method)
        for method in keras_halo.OOD_METHODS
    ]


@for_all(loss=st.sampled_from(LOSSES), **cases)
def test_permuting_the_classes_permutes_the_results(loss, **case):
    with float64():
        x, centroids, raw_gamma, labels = draw(**case)
        order = np.random.default_rng(case["seed"]).permutation(len(centroids))
        # Class `order[i]` is called `i` now.
        renamed = np.argsort(order)[labels]
        losses, dx, dcentroids, dgamma = evaluate(
            loss, x, centroids, raw_gamma, labels
        )
        found = evaluate(loss, x, centroids[order], raw_gamma, renamed)
        assert_close(found, (losses, dx, dcentroids[order], dgamma))

        scores = numpy_scores(x, centroids, raw_gamma)
        permuted = numpy_scores(x, centroids[order], raw_gamma)
        columns = np.append(order, np.arange(len(order), scores.shape[1]))
        assert_close([permuted], [scores[:, columns]])
        assert_close(ood_scores(permuted), ood_scores(scores), rtol=1e-6)
        answers = keras_halo.decode_predictions(scores)
        renamed = keras_halo.decode_predictions(permuted)
        assert_close(
            [renamed.probabilities, renamed.abstain_probability],
            [answers.probabilities[:, order], answers.abstain_probability],
        )


@for_all(loss=st.sampled_from(LOSSES), **cases)
def test_rotating_the_embedding_space_changes_nothing(loss, **case):
    with float64():
        x, centroids, raw_gamma, labels = draw(**case)
        rng = np.random.default_rng(case["seed"])
        rotation, _ = np.linalg.qr(rng.normal(size=(x.shape[1], x.shape[1])))
        losses, dx, dcentroids, dgamma = evaluate(
            loss, x, centroids, raw_gamma, labels
        )
        found = evaluate(
            loss, x @ rotation, centroids @ rotation, raw_gamma, labels
        )
        assert_close(
            found, (losses, dx @ rotation, dcentroids @ rotation, dgamma)
        )
        scores = numpy_scores(x, centroids, raw_gamma)
        rotated = numpy_scores(x @ rotation, centroids @ rotation, raw_gamma)
        assert_close([rotated], [scores])
        assert_close(ood_scores(rotated), ood_scores(scores), rtol=1e-6)


@for_all(loss=st.sampled_from(LOSSES), **cases)
def test_shifting_all_centroids_changes_nothing(loss, **case):
    with float64():
        x, centroids, raw_gamma, labels = draw(**case)
        shift = case["scale"] * np.random.default_rng(case["seed"]).normal(
            size=(1, x.shape[1])
        )
        expected = evaluate(loss, x, centroids, raw_gamma, labels)
        found = evaluate(loss, x, centroids + shift, raw_gamma, labels)
        assert_close(found, expected)
        assert_close(
            [numpy_scores(x, centroids + shift, raw_gamma)],
            [numpy_scores(x, centroids, raw_gamma)],
        )
        # No force moves all centroids together.
        dcentroids = expected[2]
        force = np.abs(dcentroids).sum()
        assert np.abs(dcentroids.sum(axis=0)).max() <= 1e-12 * (1 + force)


@for_all(loss=st.sampled_from(LOSSES), **cases)
def test_integer_one_hot_and_soft_labels_are_the_same(loss, **case):
    with float64():
        x, centroids, raw_gamma, labels = draw(**case)
        # All the mass on one label, made as a mixture: 1 and 0 exactly.
        one_hot = np.eye(len(centroids))[labels]
        results = [
            evaluate(loss, x, centroids, raw_gamma, given)
            for given in (labels, labels[:, None], one_hot)
        ]
        results.append(evaluate((*loss, 2), x, centroids, raw_gamma, labels))
    for found in results[1:]:
        assert_close(found, results[0])


@for_all(loss=st.sampled_from(LOSSES), share=st.floats(0.0, 1.0), **cases)
def test_losses_and_targets_are_linear_in_the_labels(loss, share, **case):
    with float64():
        x, centroids, raw_gamma, labels = draw(**case)
        num_classes = len(centroids)
        soft = np.random.default_rng(case["seed"]).dirichlet(
            np.ones(num_classes), size=len(x)
        )
        pair = np.eye(num_classes)[labels], soft
        mixture = share * pair[0] + (1.0 - share) * pair[1]
        first, second, mixed = (
            evaluate(loss, x, centroids, raw_gamma, given)
            for given in (*pair, mixture)
        )
        assert_close(
            mixed,
            [
                share * one + (1.0 - share) * other
                for one, other in zip(first, second, strict=True)
            ],
        )
        parts = packing.unpack(
            ops.convert_to_tensor(numpy_scores(x, centroids, raw_gamma))
        )

        def targets(given):
            return to_numpy(
                distilled_targets(
                    ops.convert_to_tensor(given),
                    parts.logits,
                    parts.squared_norm,
                    parts.temperature,
                    0.1,
                )
            )

        assert_close(
            [targets(mixture)],
            [share * targets(pair[0]) + (1.0 - share) * targets(pair[1])],
        )
        np.testing.assert_allclose(targets(mixture).sum(axis=-1), 1.0)


@for_all(
    split=st.sampled_from([1, 4]),
    seed=seeds,
    scale=cases["scale"],
    gamma=cases["gamma"],
)
def test_order_and_splits_of_a_batch_do_not_matter(split, **case):
    with float64():
        x, centroids, raw_gamma, labels = draw(SHAPES[1], **case)
        order = np.random.default_rng(case["seed"]).permutation(len(x))
        loss = LOSSES[0]
        losses, dx, dcentroids, dgamma = evaluate(
            loss, x, centroids, raw_gamma, labels
        )
        parts = [
            evaluate(loss, x[rows], centroids, raw_gamma, labels[rows])
            for rows in (order[:split], order[split:])
        ]
    found = [
        np.concatenate([part[0] for part in parts]),
        np.concatenate([part[1] for part in parts]),
        parts[0][2] + parts[1][2],
        parts[0][3] + parts[1][3],
    ]
    assert_close(found, (losses[order], dx[order], dcentroids, dgamma))


@functools.lru_cache
def mean_loss(kind):
    loss = HALOLoss(
        ignore_class=-1 if kind == "ignored" else None,
        reduction="mean_with_sample_weight",
        dtype="float64",
    )
    model = keras.Sequential(
        [
            keras.layers.Masking(dtype="float64"),
            HALODense.reference(5, dtype="float64", name="head"),
        ]
    )
    model.build((None, 4, 4))
    bias = [to_numpy(model.get_layer("head").abstain_bias)]

    def total(x, centroids, raw_gamma, labels, weights):
        if kind == "masked":
            # A layer by itself would drop the mask here; a model keeps it.
            scores, _ = model.stateless_call([centroids, raw_gamma], bias, x)
        else:
            scores = scores_of(x, centroids, raw_gamma)
        weights = weights if kind == "weighted" else None
        return loss(labels, scores, sample_weight=weights)

    return total


@for_all(seed=seeds, scale=cases["scale"], gamma=cases["gamma"])
def test_masked_ignored_and_unweighted_equal_absent(seed, scale, gamma):
    with float64():
        x, centroids, raw_gamma, labels = draw((12, 5, 4), seed, scale, gamma)
        present = np.random.default_rng(seed).permutation(12) < 5

        def mean(kind, x, labels, weights):
            value, (dx, *gradients) = value_and_gradients(
                mean_loss(kind),
                x,
                centroids,
                raw_gamma,
                constants=[labels, weights],
            )
            return value, dx, gradients

        expected, dx, gradients = mean(
            "absent", x[present], labels[present], np.ones(5)
        )
        sequences = {
            "masked": (np.where(present[:, None], x, 0.0), labels),
            "ignored": (x, np.where(present, labels, -1)),
            "weighted": (x, labels),
        }
        for kind, (inputs, given) in sequences.items():
            value, by_inputs, found = mean(
                kind,
                inputs.reshape(3, 4, -1),
                given.reshape(3, 4),
                present.reshape(3, 4).astype("float64"),
            )
            by_inputs = by_inputs.reshape(12, -1)
            assert_close([value, by_inputs[present]], [expected, dx])
            assert_close(found, gradients)
            assert np.all(by_inputs[~present] == 0.0)


@for_all(
    shape=st.sampled_from([(7, 5, 4), (3, 300, 2)]),
    seed=seeds,
    scale=powers(TINY, HUGE),
    gamma=cases["gamma"],
)
def test_probabilities_sum_to_one(**case):
    x, centroids, raw_gamma, _ = draw(**case)
    scores = numpy_scores(
        *(np.asarray(a, "float32") for a in (x, centroids, raw_gamma))
    )
    num_classes = len(centroids)
    whole = to_numpy(ops.softmax(scores))
    np.testing.assert_allclose(whole.sum(axis=-1), 1.0, rtol=1e-5)
    # Ordinary code sees nothing of the geometry.
    assert np.all(whole[:, num_classes + 1 :] == 0.0)
    for abstain in (True, False):
        found = to_numpy(HALOSoftmax(abstain=abstain)(scores))
        assert found.shape[-1] == num_classes + abstain
        assert np.all(found >= 0.0)
        np.testing.assert_allclose(found.sum(axis=-1), 1.0, rtol=1e-5)
    answers = keras_halo.decode_predictions(scores)
    np.testing.assert_allclose(
        answers.probabilities.sum(axis=-1) + answers.abstain_probability,
        1.0,
        rtol=1e-5,
    )


@functools.lru_cache
def loss_with_targets(smoothing, radial_weight):
    """The loss of given targets: what the gradient of HALO is that of."""

    def total(x, centroids, raw_gamma, targets, one_hot):
        scores = scores_of(x, centroids, raw_gamma, smoothing)
        parts = packing.unpack(scores)
        radii = geometry.squared_radii(
            parts.logits, parts.squared_norm, parts.temperature
        )
        radial = geometry.radial_nll(radii, parts.embedding_dim)
        return ops.sum(
            geometry.cross_entropy(targets, parts.logits, parts.abstain_logit)
        ) + radial_weight * ops.sum(one_hot * radial)

    return total


@for_all(
    loss=st.sampled_from(LOSSES),
    shape=cases["shape"],
    seed=seeds,
    scale=powers(0.1, 3.0),
    gamma=powers(0.01, 20.0),
)
def test_gradients_equal_finite_differences(loss, **case):
    smoothing, distill, radial_weight = loss
    with float64():
        x, centroids, raw_gamma, labels = draw(**case)
        _, *gradients = evaluate(loss, x, centroids, raw_gamma, labels)
        one_hot = ops.convert_to_tensor(np.eye(len(centroids))[labels])
        parts = packing.unpack(
            ops.convert_to_tensor(numpy_scores(x, centroids, raw_gamma))
        )
        # No gradient flows into the targets: they stay where they are.
        if distill:
            targets = distilled_targets(
                one_hot,
                parts.logits,
                parts.squared_norm,
                parts.temperature,
                smoothing,
            )
        else:
            targets = smoothed_targets(one_hot, smoothing)
        arrays = [x, centroids, raw_gamma]
        rng = np.random.default_rng(case["seed"])
        for position, gradient in enumerate(gradients):
            direction = rng.normal(size=gradient.shape)
            step = 1e-6 * (case["scale"] if position < 2 else 1.0)
            values = []
            for sign in (1.0, -1.0):
                moved = list(arrays)
                moved[position] = np.asarray(
                    arrays[position] + sign * step * direction
                )
                values.append(
                    to_numpy(
                        loss_with_targets(smoothing, radial_weight)(
                            *map(ops.convert_to_tensor, moved), targets, one_hot
                        )
                    )
                )
            slope = (values[0] - values[1]) / (2.0 * step)
            rounding = 1e-15 * np.abs(values).max() / step
            assert np.sum(gradient * direction) == pytest.approx(
                slope, rel=1e-5, abs=1e-5 + 10.0 * rounding
            )


@for_all(
    shape=st.sampled_from([(1, 2, 2), (7, 5, 4)]),
    seed=seeds,
    gamma=cases["gamma"],
    scale=powers(0.1, 10.0),
)
def test_the_radial_force_vanishes_on_the_shell_and_points_to_it(**case):
    with float64():
        _, centroids, raw_gamma, labels = draw(**case)
        num_samples, dim = case["shape"][0], case["shape"][2]
        own = (centroids - centroids.mean(axis=0))[labels]
        rng = np.random.default_rng(case["seed"])
        direction = rng.normal(size=(num_samples, dim))
        # Of mean square one.
        direction /= np.sqrt(np.mean(direction**2, axis=-1, keepdims=True))

        def force(squared_radius):
            """Gradient of the radial term alone, along the radius."""
            x = own + np.sqrt(squared_radius) * direction
            gradients = [
                evaluate((0.1, True, weight), x, centroids, raw_gamma, labels)[
                    1
                ]
                for weight in (1.0, 0.0)
            ]
            return np.sum((gradients[0] - gradients[1]) * direction, axis=-1)

        shell = geometry.shell(dim)
        scale = 1.0 + case["gamma"] * case["scale"]
        np.testing.assert_allclose(force(shell), 0.0, atol=1e-10 * scale)
        assert np.all(force(2.0 * shell + 0.5) > 0.0)
        if dim > 2:
            assert np.all(force(0.5 * shell) < 0.0)


@for_all(
    shape=st.sampled_from([(7, 5, 4), (3, 300, 2)]),
    seed=seeds,
    scale=powers(TINY, HUGE),
    gamma=cases["gamma"],
    dtype=st.sampled_from(["float32", "float64"]),
)
def test_packed_scores_round_trip_bit_by_bit(dtype, **case):
    with float64():
        x, centroids, raw_gamma, _ = draw(**case)
        scores = numpy_scores(
            *(np.asarray(a, dtype) for a in (x, centroids, raw_gamma))
        )
        assert scores.dtype == dtype
        parts = packing.unpack(ops.convert_to_tensor(scores))
        again = to_numpy(packing.pack(*parts))
        assert np.all(to_numpy(parts.embedding_dim) == x.shape[1])
    np.testing.assert_array_equal(again, scores)


EXTREME_SHAPES = [(3, 2, 2), (3, 7, 64), (2, 5000, 2), (2, 2, 4096)]
if THOROUGH:
    EXTREME_SHAPES += [(2, 5000, 4096), (64, 10, 3), (1, 1000, 128)]


@functools.lru_cache
def loss_of_precision(loss, block_size, precision):
    total = weighted_loss(*loss, block_size, "float32")
    if precision == "float32":
        return total
    return lambda x, *rest: total(ops.cast(x, precision), *rest)


@for_all(
    shape=st.sampled_from(EXTREME_SHAPES),
    seed=seeds,
    norm=st.just(0.0) | powers(TINY, HUGE),
    centroid_norm=st.just(0.0) | powers(TINY, HUGE),
    coinciding=st.booleans(),
    on_centroid=st.booleans(),
    gamma=cases["gamma"],
    loss=st.sampled_from([*LOSSES, (0.9, True, 1.0)]),
    labels=st.sampled_from(["integer", "one-hot", "soft", "blocks"]),
    precision=st.sampled_from(["float32", "float16", "bfloat16"]),
)
def test_losses_and_gradients_are_finite_for_every_finite_input(
    shape,
    seed,
    norm,
    centroid_norm,
    coinciding,
    on_centroid,
    gamma,
    loss,
    labels,
    precision,
):
    num_samples, num_classes, dim = shape
    rng = np.random.default_rng(seed)

    def vectors(count, norm):
        drawn = rng.normal(size=(count, dim))
        return norm * drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)

    if coinciding:
        centroids = np.repeat(vectors(1, centroid_norm), num_classes, axis=0)
    else:
        centroids = vectors(num_classes, centroid_norm)
    integers = rng.integers(0, num_classes, num_samples)
    x = vectors(num_samples, norm)
    if on_centroid:
        x = (centroids - centroids.mean(axis=0))[integers]
    # What the format of the input can hold, in that format's own numbers.
    largest = float(ml_dtypes.finfo(precision).max)
    x = np.clip(x, -largest, largest).astype(precision).astype("float32")
    given = integers
    if labels == "one-hot":
        given = np.eye(num_classes, dtype="float32")[integers]
    elif labels == "soft":
        given = rng.dirichlet(np.full(num_classes, 0.1), size=num_samples)
        given = given.astype("float32")
    block_size = max(1, num_classes // 3) if labels == "blocks" else None

    def gradients(precision):
        return value_and_gradients(
            loss_of_precision(loss, block_size, precision),
            x,
            centroids.astype("float32"),
            np.float32(geometry.inverse_softplus(gamma)),
            np.ones(num_samples, "float32"),
            constants=[given],
        )

    value, (dx, dcentroids, dgamma, losses) = gradients(precision)
    assert np.isfinite(value)
    for array in (dcentroids, dgamma, losses):
        assert np.all(np.isfinite(array))
    if precision != "float32":
        # A 16-bit gradient has to be infinite where the true one exceeds the
        # format; that is what Keras's loss scaling is there for.
        _, (exact, *_) = gradients("float32")
        assert np.all(np.isfinite(exact))
        dx = dx[np.abs(exact) < 0.99 * largest]
    assert np.all(np.isfinite(dx))


@functools.lru_cache
def similarity_of(dim, smoothing, bidirectional, dtype):
    layer = HALOSimilarity(smoothing, bidirectional=bidirectional, dtype=dtype)
    layer.build([(None, dim), (None, dim)])
    return layer


def pair_scores(queries, keys, raw_gamma, smoothing=0.1, bidirectional=True):
    dtype = keras.backend.standardize_dtype(raw_gamma.dtype)
    layer = similarity_of(keys.shape[-1], smoothing, bidirectional, dtype)
    return layer.stateless_call([raw_gamma], [], [queries, keys])[0]


@functools.lru_cache
def pair_loss(smoothing, distill, radial_weight, precision="float64"):
    """The loss of two towers, of both directions of every pair."""
    dtype = "float64" if precision == "float64" else "float32"
    loss = HALOContrastiveLoss(
        smoothing, distill, radial_weight, reduction=None, dtype=dtype
    )

    def total(queries, keys, raw_gamma, weights, ids):
        queries, keys = (ops.cast(x, precision) for x in (queries, keys))
        losses = loss(ids, pair_scores(queries, keys, raw_gamma, smoothing))
        return ops.sum(losses * weights)

    return total


@for_all(
    loss=st.sampled_from(LOSSES[:2]),
    seed=seeds,
    scale=cases["scale"],
    gamma=cases["gamma"],
)
def test_two_towers_have_the_same_symmetries(loss, **case):
    with float64():
        # As many keys as queries; some ids come twice.
        queries, keys, raw_gamma, ids = draw((5, 5, 4), **case)
        rng = np.random.default_rng(case["seed"])

        def results(queries, keys, ids):
            _, (dqueries, dkeys, dgamma, losses) = value_and_gradients(
                pair_loss(*loss),
                queries,
                keys,
                raw_gamma,
                np.ones((5, 2)),
                constants=[ids],
            )
            return losses, dqueries, dkeys, dgamma

        expected = results(queries, keys, ids)
        order = rng.permutation(5)
        assert_close(
            results(queries[order], keys[order], ids[order]),
            [*(array[order] for array in expected[:3]), expected[3]],
        )
        rotation, _ = np.linalg.qr(rng.normal(size=(4, 4)))
        losses, dqueries, dkeys, dgamma = expected
        assert_close(
            results(queries @ rotation, keys @ rotation, ids),
            (losses, dqueries @ rotation, dkeys @ rotation, dgamma),
        )
        # The other direction of the pairs is that of exchanged towers.
        losses, dkeys, dqueries, dgamma = results(keys, queries, ids)
        assert_close((losses[:, ::-1], dqueries, dkeys, dgamma), expected)
        # Queries see the keys around their mean.
        shift = case["scale"] * rng.normal(size=(1, 4))
        assert_close(
            *(
                [
                    to_numpy(
                        pair_scores(
                            *map(
                                ops.convert_to_tensor,
                                (queries, moved, raw_gamma),
                            ),
                            bidirectional=False,
                        )
                    )
                ]
                for moved in (keys + shift, keys)
            )
        )


EXTREME_PAIRS = [(1, 2), (5, 64)]
if THOROUGH:
    EXTREME_PAIRS += [(2, 4096), (64, 2), (256, 512)]


@for_all(
    shape=st.sampled_from(EXTREME_PAIRS),
    seed=seeds,
    norm=st.just(0.0) | powers(TINY, HUGE),
    key_norm=st.just(0.0) | powers(TINY, HUGE),
    coinciding=st.booleans(),
    aligned=st.booleans(),
    gamma=cases["gamma"],
    loss=st.sampled_from([*LOSSES[:2], (0.9, True, 1.0)]),
    precision=st.sampled_from(["float32", "bfloat16"]),
)
def test_two_towers_are_finite_for_every_finite_input(
    shape,
    seed,
    norm,
    key_norm,
    coinciding,
    aligned,
    gamma,
    loss,
    precision,
):
    num_pairs = shape[0]
    rng = np.random.default_rng(seed)

    def vectors(norm):
        drawn = rng.normal(size=shape)
        return norm * drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)

    keys = vectors(key_norm)
    if coinciding:
        keys[:] = keys[:1]
    queries = keys - keys.mean(axis=0) if aligned else vectors(norm)
    value, gradients = value_and_gradients(
        pair_loss(*loss, precision),
        queries.astype("float32"),
        keys.astype("float32"),
        np.float32(geometry.inverse_softplus(gamma)),
        np.ones((num_pairs, 2), "float32"),
        constants=[rng.integers(0, max(2, num_pairs // 2), num_pairs)],
    )
    assert np.isfinite(value)
    for array in gradients:
        assert np.all(np.isfinite(array))


def test_halo_loss_is_what_the_class_computes():
    """The properties above are of the class; this ties the function to it."""
    x, centroids, raw_gamma, labels = draw((7, 5, 4), 0, 1.0, 5.0)
    scores = numpy_scores(
        *(np.asarray(a, "float32") for a in (x, centroids, raw_gamma))
    )
    np.testing.assert_array_equal(
        to_numpy(halo_loss(labels, scores)),
        to_numpy(HALOLoss(reduction=None)(labels, scores)),
    )
