"""The fused head and loss against the formulas that they stand for."""

import contextlib
import functools

import keras
import numpy as np
import pytest
from helpers import (
    float64,
    packed,
    second_derivative,
    to_numpy,
    value_and_gradients,
)
from keras import ops

from keras_halo import HALODense, HALOLoss
from keras_halo.losses import halo_loss
from keras_halo.ops import geometry, head, packing
from keras_halo.ops.loss import best_block_size, integer_label_losses
from keras_halo.ops.targets import distilled_targets, smoothed_targets

GAMMA, BIAS = 3.0, -0.7
SHAPES = [(1, 2, 2), (5, 3, 4), (4, 17, 6), (33, 4, 3)]
LOSSES = [
    (smoothing, distill, radial_weight)
    for smoothing in (0.0, 0.2)
    for distill in (True, False)
    for radial_weight in (0.0, 1.5)
]


def plain_scores(x, centroids, gamma, bias):
    centroids = geometry.centered(centroids)
    return packing.pack(
        logits=geometry.class_logits(x, centroids, gamma),
        abstain_logit=bias,
        squared_norm=geometry.mean_square(x),
        temperature=gamma,
        embedding_dim=centroids.shape[-1],
    )


def plain_losses(labels, scores, smoothing, distill, radial_weight):
    parts = packing.unpack(scores)
    one_hot = ops.cast(
        ops.convert_to_tensor(np.eye(parts.logits.shape[-1])[labels]),
        scores.dtype,
    )
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
    radii = geometry.squared_radii(
        parts.logits, parts.squared_norm, parts.temperature
    )
    radial = geometry.radial_nll(radii, parts.embedding_dim)
    losses = geometry.cross_entropy(
        targets, parts.logits, parts.abstain_logit
    ) + radial_weight * ops.sum(one_hot * radial, axis=-1, keepdims=True)
    return ops.squeeze(losses, axis=-1)


def losses_of(labels, *arguments, block_size):
    labels = ops.convert_to_tensor(labels)
    if block_size is None:
        return integer_label_losses(labels, *arguments)
    return integer_label_losses(labels, *arguments, block_size)


def arrays(shape, dtype):
    num_samples, num_classes, dim = shape
    rng = np.random.default_rng(sum(shape))
    return (
        rng.normal(size=(num_samples, dim)).astype(dtype),
        rng.normal(size=(num_classes, dim)).astype(dtype) + 0.3,
        np.asarray(GAMMA, dtype),
        np.asarray(BIAS, dtype),
    )


def weights(shape, dtype):
    """Weights of a sum over packed scores, to which every column matters."""
    rng = np.random.default_rng(1)
    array = rng.normal(size=(shape[0], packing.packed_width(shape[1])))
    array[:, -5:] /= 2.0**40
    return array.astype(dtype)


def precision(dtype):
    return float64() if dtype == "float64" else contextlib.nullcontext()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_head_and_its_gradients_are_those_of_the_formulas(shape, dtype):
    rtol = 1e-11 if dtype == "float64" else 2e-5
    with precision(dtype):
        inputs = arrays(shape, dtype)
        factors = ops.convert_to_tensor(weights(shape, dtype))
        results = [
            value_and_gradients(
                lambda *a, f=function: ops.sum(f(*a) * factors), *inputs
            )
            for function in (head.packed_scores, plain_scores)
        ]
    (value, gradients), (expected, plain) = results
    np.testing.assert_allclose(value, expected, rtol=rtol, atol=10 * rtol)
    for gradient, formula in zip(gradients, plain, strict=True):
        assert gradient.dtype == dtype
        assert gradient.shape == formula.shape
        np.testing.assert_allclose(
            gradient, formula, rtol=rtol, atol=rtol * np.abs(formula).max()
        )


def far_by_the_formula(x, centroids, gamma, bias, far_bias, far_scale):
    norm = geometry.mean_square(x)
    logits = plain_scores(x, centroids, gamma, bias)[..., :3]
    top = ops.take_along_axis(
        logits, ops.argmax(logits, axis=-1, keepdims=True), axis=-1
    )
    near = ops.exp(ops.ones_like(norm) * bias)
    far = ops.exp(
        (1 - far_scale) * top + far_scale * (0.5 * gamma * norm + far_bias)
    )
    return plain_scores(x, centroids, gamma, ops.log(near + far))


def fused_far_scores(x, centroids, gamma, bias, far_bias, far_scale):
    scores = head.packed_scores(x, centroids, gamma, bias)
    return head.with_far_background(scores, far_bias, far_scale)


@functools.cache
def weighed(function):
    """The sum of what a function returns, as JAX has to compile it once."""

    def total(x, centroids, gamma, bias, factors, *constants):
        return ops.sum(
            function(x, centroids, gamma, bias, *constants) * factors
        )

    return total


@pytest.mark.parametrize("far_scale", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("far_bias", [-4.0, -1.0, 2.0])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_far_background_and_its_gradients_are_those_of_the_formulas(
    far_bias, far_scale, dtype
):
    rtol = 1e-11 if dtype == "float64" else 2e-5
    with precision(dtype):
        inputs = arrays((5, 3, 4), dtype)
        factors = weights((5, 3), dtype)
        # Where the background begins, and the layout, are constants.
        factors[:, -2:] = 0.0
        far = [np.asarray(value, dtype) for value in (far_bias, far_scale)]
        results = [
            value_and_gradients(
                weighed(function), *inputs, constants=[factors, *far]
            )
            for function in (fused_far_scores, far_by_the_formula)
        ]
        parts = packing.unpack(
            fused_far_scores(*map(ops.convert_to_tensor, (*inputs, *far)))
        )
        # Computed when it is asked for, which takes float64.
        far_radius = to_numpy(parts.far_radius)
    (value, gradients), (expected, plain) = results
    np.testing.assert_allclose(value, expected, rtol=rtol, atol=10 * rtol)
    for gradient, formula in zip(gradients, plain, strict=True):
        np.testing.assert_allclose(
            gradient, formula, rtol=rtol, atol=rtol * np.abs(formula).max()
        )
    np.testing.assert_allclose(
        # The column holds one more than that.
        1.0 + far_radius,
        1.0 + max(-far_bias / GAMMA, 1e-3),
        rtol=1e-6,
    )


@pytest.mark.parametrize("block_size", [None, 2])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("form", ["integers", "one-hot"])
def test_the_loss_of_a_far_background_keeps_to_the_published_margin(
    form, smoothing, block_size
):
    if form == "one-hot" and block_size:
        pytest.skip("blocks take integer labels")
    num_classes, dim = 5, 3
    x, centroids, gamma, _ = arrays((33, num_classes, dim), "float32")
    labels = np.arange(33) % num_classes
    y_true = labels if form == "integers" else np.eye(num_classes)[labels]
    margin = geometry.abstain_bias(dim, num_classes, smoothing)

    def total(x, bias, far_bias=None):
        scores = head.packed_scores(
            x,
            ops.convert_to_tensor(centroids),
            ops.convert_to_tensor(gamma),
            bias,
        )
        if far_bias is not None:
            scale = ops.convert_to_tensor(np.float32(1.5))
            scores = head.with_far_background(scores, far_bias, scale)
        losses = halo_loss(
            ops.convert_to_tensor(y_true),
            scores,
            label_smoothing=smoothing,
            block_size=block_size,
        )
        return ops.sum(losses)

    def loss(*biases):
        # As constants, so that JAX compiles one function for all of them.
        constants = [np.float32(bias) for bias in biases]
        return value_and_gradients(total, x, constants=constants)

    expected, (slope,) = loss(margin)
    # Whatever the head decides by, the loss is the same, and so is its slope.
    for near, far in ((0.0, -5.0), (30.0, 4.0), (-40.0, -0.1)):
        value, (gradient,) = loss(near, far)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("smoothing, distill, radial_weight", LOSSES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_loss_and_its_gradient_are_those_of_the_formulas(
    smoothing, distill, radial_weight, dtype
):
    rtol = 1e-11 if dtype == "float64" else 2e-5
    shape = (33, 5, 3)
    labels = np.arange(shape[0], dtype="int32") % shape[1]
    with precision(dtype):
        scores = to_numpy(
            plain_scores(*map(ops.convert_to_tensor, arrays(shape, dtype)))
        )
        factors = ops.convert_to_tensor(weights(shape, dtype)[:, 0])
        results = [
            value_and_gradients(
                lambda s, f=function: ops.sum(
                    f(labels, s, smoothing, distill, radial_weight) * factors
                ),
                scores,
            )
            for function in (
                lambda y, *rest: integer_label_losses(
                    ops.convert_to_tensor(y), *rest
                ),
                plain_losses,
            )
        ]
    (value, (gradient,)), (expected, (plain,)) = results
    np.testing.assert_allclose(value, expected, rtol=rtol, atol=10 * rtol)
    # The geometry columns are twelve orders of magnitude smaller.
    plain[:, -3:] = 0.0
    for columns in (slice(0, -5), slice(-5, None)):
        formula = plain[:, columns]
        np.testing.assert_allclose(
            gradient[:, columns],
            formula,
            rtol=rtol,
            atol=rtol * np.abs(formula).max(),
        )


@pytest.mark.parametrize("argument", ["embeddings", "centroids"])
@pytest.mark.parametrize(
    ("distill", "block_size"), [(True, None), (False, None), (True, 3)]
)
def test_second_derivatives_are_those_of_the_formulas(
    argument, distill, block_size
):
    shape = (6, 4, 3)
    labels = np.arange(shape[0], dtype="int32") % shape[1]
    with float64():
        x, centroids, gamma, bias = arrays(shape, "float64")
        gamma, bias = ops.convert_to_tensor(gamma), ops.convert_to_tensor(bias)

        def total(array, head, loss):
            pair = [ops.convert_to_tensor(x), ops.convert_to_tensor(centroids)]
            pair[argument == "centroids"] = array
            scores = head(*pair, gamma, bias)
            return ops.sum(loss(labels, scores, 0.2, distill, 1.0))

        array = centroids if argument == "centroids" else x
        direction = np.random.default_rng(2).normal(size=array.shape)
        found, expected = (
            second_derivative(
                lambda a, f=functions: total(a, *f), array, direction
            )
            for functions in (
                (
                    head.packed_scores,
                    functools.partial(losses_of, block_size=block_size),
                ),
                (plain_scores, plain_losses),
            )
        )
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="others keep no graph"
)
@pytest.mark.parametrize(
    ("smoothing", "distill", "block_size"),
    [(0.2, True, None), (0.2, False, None), (0.0, True, None), (0.2, True, 2)],
)
def test_every_backward_pass_over_one_graph_gives_the_same_gradient(
    smoothing, distill, block_size
):
    import torch

    x, centroids, gamma, bias = arrays((6, 5, 3), "float64")
    labels = np.array([0, 1, 2, 3, 4, 7], "int32")  # the last one is no class
    with float64():
        scores = plain_scores(
            *map(ops.convert_to_tensor, (x, centroids, gamma, bias))
        ).requires_grad_()
        losses = losses_of(
            labels, scores, smoothing, distill, 1.0, block_size=block_size
        )
        slope = functools.partial(
            torch.autograd.grad, losses[:5].sum(), scores, retain_graph=True
        )
        (first,), (second,) = slope(), slope()
        (third,) = slope(create_graph=True)
        plain = ops.sum(
            plain_losses(labels[:5], scores[:5], smoothing, distill, 1.0)
        )
        (formula,) = torch.autograd.grad(plain, scores)
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    columns = slice(0, 6)
    np.testing.assert_allclose(
        to_numpy(first[:, columns]),
        to_numpy(formula[:, columns]),
        rtol=1e-10,
        atol=1e-12,
    )
    assert not first[5].any()


@pytest.mark.parametrize("shift", [1.0, 30.0])
def test_a_large_mean_of_the_centroids_costs_what_is_said(shift):
    x, centroids, gamma, bias = arrays((50, 6, 8), "float32")
    expected = to_numpy(
        plain_scores(
            *(ops.convert_to_tensor(a) for a in (x, centroids, gamma, bias))
        )
    )
    found = to_numpy(
        head.packed_scores(
            ops.convert_to_tensor(x),
            ops.convert_to_tensor(centroids + np.float32(shift)),
            ops.convert_to_tensor(gamma),
            ops.convert_to_tensor(bias),
        )
    )
    error = np.abs(found - expected)[:, :6].max()
    eps = np.finfo("float32").eps
    assert error < 8.0 * eps * GAMMA * (1.0 + shift) ** 2


@functools.cache
def losses_and_gradient(dtype, block_size, *arguments):
    """Losses of labels of which two are out of range, and their gradient."""
    shape = (12, 7, 3)
    labels = ops.convert_to_tensor((np.arange(shape[0]) % 9).reshape(3, 4))

    def total(scores, factors):
        losses = integer_label_losses(labels, scores, *arguments, block_size)
        return ops.sum(losses * factors)

    with precision(dtype):
        scores = to_numpy(
            plain_scores(*map(ops.convert_to_tensor, arrays(shape, dtype)))
        ).reshape(3, 4, -1)
        # The gradient of the factors is the losses.
        _, (gradient, losses) = value_and_gradients(
            total, scores, np.ones((3, 4), dtype)
        )
    return losses, gradient


@pytest.mark.parametrize("block_size", [1, 3, 5, 100])
@pytest.mark.parametrize("smoothing, distill, radial_weight", LOSSES[-4:])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_blocks_of_classes_change_nothing(
    smoothing, distill, radial_weight, block_size, dtype
):
    rtol = 1e-12 if dtype == "float64" else 1e-5
    arguments = (smoothing, distill, radial_weight)
    expected, plain = losses_and_gradient(dtype, None, *arguments)
    losses, gradient = losses_and_gradient(dtype, block_size, *arguments)
    assert np.isnan(losses).sum() == 2
    np.testing.assert_allclose(losses, expected, rtol=rtol)
    for columns in (slice(0, -3), slice(-3, None)):
        np.testing.assert_allclose(
            gradient[..., columns],
            plain[..., columns],
            rtol=rtol,
            atol=rtol * np.abs(plain[..., columns]).max(),
        )


@pytest.mark.parametrize(
    ("shape", "on_torch"),
    [
        ((256, 1000), None),
        ((64, 50_000), 4096),
        ((4, 256, 256, 25), None),
        ((2, 256, 256, 154), 32),
        ((0, 25), None),
    ],
)
def test_default_blocks_are_neither_many_nor_narrow(shape, on_torch):
    scores = ops.broadcast_to(
        ops.zeros((1,)), (*shape[:-1], packing.packed_width(shape[-1]))
    )
    expected = on_torch if keras.backend.backend() == "torch" else None
    if expected and scores.device.type != "cpu":
        expected = None
    assert best_block_size(scores) == expected


@pytest.mark.slow
def test_a_loss_in_blocks_trains_and_comes_back():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 4)).astype("float32")
    y = rng.integers(0, 7, 64)
    histories = []
    for block_size in (None, 3):
        keras.utils.set_random_seed(1)
        loss = HALOLoss(block_size=block_size)
        loss = HALOLoss.from_config(loss.get_config())
        assert loss.block_size == block_size
        model = keras.Sequential([keras.Input((4,)), HALODense(7)])
        model.compile("sgd", loss=loss)
        histories.append(model.fit(x, y, epochs=3, verbose=0).history["loss"])
    np.testing.assert_allclose(*histories, rtol=1e-5)


@pytest.mark.parametrize("block_size", [None, 3])
@pytest.mark.parametrize("transformation", ["jit", "checkpoint"])
def test_gradients_of_a_function_that_jax_has_transformed(
    transformation, block_size
):
    jax = pytest.importorskip("jax", reason="transformations of JAX")
    scores = packed(np.eye(4), np.eye(5, 4))
    labels = np.array([0, 1, 4, 2])

    def total(scores, labels):
        return ops.sum(halo_loss(labels, scores, block_size=block_size))

    transformed = getattr(jax, transformation)(total)
    np.testing.assert_allclose(
        jax.grad(transformed)(scores, labels),
        jax.grad(total)(scores, labels),
        rtol=1e-5,
    )


@pytest.mark.parametrize("block_size", [0, -1, 2.5, True])
def test_block_sizes_that_are_none_are_refused(block_size):
    with pytest.raises(ValueError, match="`block_size` must be a positive"):
        HALOLoss(block_size=block_size)


def test_blocks_need_integer_labels():
    scores = np.zeros((2, 9), "float32")
    with pytest.raises(ValueError, match="`block_size` needs integer labels"):
        halo_loss(np.eye(3)[:2], scores, block_size=2)


def masked_rows(scores, mask):
    """Rows by a boolean mask, as each backend has it."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.boolean_mask(scores, mask)
    return scores[mask]


def gathered_rows(scores, rows):
    """Rows by their numbers, as each backend has it."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.gather(scores, rows)
    return scores[rows]


@pytest.mark.parametrize("how", ["take", "index", "mask", "native", "where"])
@pytest.mark.parametrize("head", ["default", "reference"])
def test_gradients_of_gathered_scores(how, head):
    rows = np.array([0, 2, 3])
    labels = np.array([0, 1, 2])
    x = np.random.default_rng(0).normal(size=(6, 5)).astype("float32")
    layer = HALODense(3) if head == "default" else HALODense.reference(3)
    layer.build((None, 5))

    def of_gathered(x):
        scores = layer(x)
        if how == "take":
            scores = ops.take(scores, rows, axis=0)
        elif how == "index":
            scores = ops.stack([scores[int(row)] for row in rows])
        elif how == "mask":
            scores = masked_rows(scores, np.isin(np.arange(6), rows))
        elif how == "native":
            scores = gathered_rows(scores, rows)
        else:
            every = np.zeros(6, int)
            every[rows] = labels
            losses = halo_loss(ops.convert_to_tensor(every), scores)
            kept = ops.convert_to_tensor(np.isin(np.arange(6), rows))
            return ops.sum(ops.where(kept, losses, 0.0))
        return ops.sum(halo_loss(ops.convert_to_tensor(labels), scores))

    def directly(x):
        scores = layer(x)
        return ops.sum(halo_loss(ops.convert_to_tensor(labels), scores))

    _, (gradient,) = value_and_gradients(of_gathered, x)
    _, (expected,) = value_and_gradients(directly, x[rows])
    np.testing.assert_allclose(gradient[rows], expected, rtol=1e-4, atol=1e-6)
    others = np.setdiff1d(np.arange(6), rows)
    np.testing.assert_array_equal(gradient[others], 0.0)
