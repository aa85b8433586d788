"""Transforms of functions: per-sample gradients, ensembles, forward mode."""

import contextlib

import cases
import keras
import numpy as np
import pytest
from helpers import (
    jit,
    packed,
    second_derivative,
    to_numpy,
    value_and_gradients,
)
from keras import ops

import keras_halo
from keras_halo import HALODense, HALOLoss, HALOSimilarity, layers
from keras_halo.ops import plain_gradients

BACKEND = keras.backend.backend()

# PyTorch warns of what its own forward mode does.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

X = np.random.default_rng(0).normal(size=(5, 6)).astype("float32")
Y = np.arange(5) % 3
HEADS = {"default": HALODense, "reference": HALODense.reference}
LABELS = {
    "integers": (HALOLoss(), Y),
    "blocks": (HALOLoss(block_size=2), Y),
    "plain targets": (HALOLoss(distill=False, label_smoothing=0.2), Y),
    "one-hot": (HALOLoss(), np.eye(3, dtype="float32")[Y]),
}


def stateless_loss(head="default", labels="integers", training=False):
    """A loss as a function of weights, inputs and labels; and its weights."""
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(4, activation="tanh"),
            HEADS[head](3),
        ]
    )
    loss, y = LABELS[labels]
    fixed = [ops.convert_to_tensor(v) for v in model.non_trainable_variables]

    def total(weights, x, y):
        scores, _ = model.stateless_call(weights, fixed, x, training=training)
        return loss(y, scores)

    weights = [
        ops.stop_gradient(ops.convert_to_tensor(v))
        for v in model.trainable_variables
    ]
    return total, weights, ops.convert_to_tensor(X), ops.convert_to_tensor(y)


def gradients(function, weights, *constants):
    """Gradients of a function of many weights, one call a time."""
    arrays = [to_numpy(weight) for weight in weights]
    _, found = value_and_gradients(
        lambda *weights: function(list(weights), *constants), *arrays
    )
    return found


def vectorized(function, stacked):
    """`function(*rows)` for every row of stacked tensors, by a transform."""
    if BACKEND == "jax":
        import jax

        return jax.jit(jax.vmap(function))(*stacked)
    if BACKEND == "torch":
        import torch

        return torch.func.vmap(function)(*stacked)
    import tensorflow as tf

    return tf.vectorized_map(lambda rows: function(*rows), tuple(stacked))


def slopes(function, weights):
    """Gradients inside of a transform."""
    if BACKEND == "jax":
        import jax

        return jax.grad(function)(weights)
    if BACKEND == "torch":
        import torch

        return torch.func.grad(function)(weights)
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(weights)
        value = function(weights)
    return tape.gradient(value, weights)


def assert_close(found, expected, rtol=2e-4):
    scale = max(np.abs(expected).max(), 1e-3)
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * scale)


HEADS_AND_LABELS = pytest.mark.parametrize(
    ("head", "labels"),
    [*(("default", labels) for labels in LABELS), ("reference", "integers")],
)


@pytest.mark.parametrize("training", [False, True])
@HEADS_AND_LABELS
def test_per_sample_gradients(head, labels, training):
    if training and labels != "integers":
        pytest.skip("statistics do not depend on labels")
    total, weights, x, y = stateless_loss(head, labels, training)
    found = vectorized(
        lambda x, y: slopes(lambda w: total(w, x[None], y[None]), weights),
        (x, y),
    )
    for index in (0, 4):
        row = slice(index, index + 1)
        alone = gradients(total, weights, x[row], y[row])
        for of_all, of_one in zip(found, alone, strict=True):
            assert_close(to_numpy(of_all)[index], of_one)


@pytest.mark.parametrize("labels", ["integers", "blocks"])
def test_ensembles(labels):
    total, weights, x, y = stateless_loss(labels=labels)
    members = [ops.stack([w, 1.3 * w + 0.1]) for w in weights]
    found = vectorized(
        lambda *weights: slopes(lambda w: total(w, x, y), list(weights)),
        members,
    )
    for index in range(2):
        alone = gradients(total, [w[index] for w in members], x, y)
        for of_all, of_one in zip(found, alone, strict=True):
            assert_close(to_numpy(of_all)[index], of_one)


def pushed(function, x, direction):
    """The derivative along a direction, in forward mode."""
    if BACKEND == "jax":
        import jax

        return jax.jit(lambda *x: jax.jvp(function, x, (direction,)))(x)[1]
    if BACKEND == "torch":
        import torch

        return torch.func.jvp(function, (x,), (direction,))[1]
    import tensorflow as tf

    with tf.autodiff.ForwardAccumulator(x, direction) as accumulator:
        value = function(x)
    return accumulator.jvp(value)


def forward_mode():
    return plain_gradients() if BACKEND == "jax" else contextlib.nullcontext()


@HEADS_AND_LABELS
def test_forward_mode(head, labels):
    total, weights, x, y = stateless_loss(head, labels)
    direction = ops.flip(x, axis=0)
    with forward_mode():
        found = pushed(lambda x: total(weights, x, y), x, direction)
    (slope,) = gradients(lambda w, y: total(weights, w[0], y), [x], y)
    assert_close(to_numpy(found), np.sum(slope * X[::-1]), rtol=1e-3)


def test_forward_mode_of_two_towers():
    layer = HALOSimilarity()
    layer.build([(None, 6), (None, 6)])
    labels = ops.convert_to_tensor(np.eye(5, dtype="float32"))

    def total(x):
        return HALOLoss()(labels, layer([x, ops.flip(x, axis=1)]))

    x = ops.convert_to_tensor(X)
    with forward_mode():
        found = pushed(total, x, ops.flip(x, axis=0))
    _, (slope,) = value_and_gradients(total, X)
    assert_close(to_numpy(found), np.sum(slope * X[::-1]), rtol=1e-3)


@pytest.mark.skipif(BACKEND != "torch", reason="of PyTorch alone")
def test_vectorized_gradients_of_torch_autograd():
    """What `plain_gradients` is for beside `torch.func`."""
    import torch

    scores = torch.tensor(to_numpy(HALODense(3)(X)))
    labels = torch.arange(len(X)) % 3

    def losses(scores):
        return keras_halo.losses.halo_loss(labels, scores)

    def forward(scores):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(
                scores, torch.ones_like(scores)
            )
            return torch.autograd.forward_ad.unpack_dual(losses(dual)).tangent

    expected = torch.autograd.functional.jacobian(losses, scores)
    with plain_gradients():
        found = torch.autograd.functional.jacobian(
            losses, scores, vectorize=True
        )
        tangents = forward(scores)
    assert_close(to_numpy(found), to_numpy(expected), rtol=1e-4)
    assert_close(
        to_numpy(tangents), to_numpy(expected).sum(axis=(1, 2)), rtol=1e-3
    )


@pytest.mark.parametrize("name", ["jacrev", "jacfwd", "hessian"])
def test_jacobians(name):
    if BACKEND == "tensorflow":
        pytest.skip("these are transforms of JAX and PyTorch")
    total, weights, x, y = stateless_loss()
    library = pytest.importorskip("jax" if BACKEND == "jax" else "torch.func")

    def of_input(x):
        return total(weights, x, y)

    transformed = getattr(library, name)(of_input)
    with forward_mode() if name == "jacfwd" else contextlib.nullcontext():
        found = to_numpy(jit(transformed)(x))
    _, (slope,) = value_and_gradients(of_input, X)
    if name == "hessian":
        # Targets are constants to it: no finite differences.
        slope = second_derivative(of_input, X, X[::-1].copy())
        found = np.einsum("ijkl,kl->ij", found, X[::-1])
    assert_close(found, slope, rtol=1e-3)


@pytest.mark.skipif(BACKEND != "jax", reason="others take apart any gradient")
@pytest.mark.parametrize("name", ["jvp", "jacfwd", "linearize"])
def test_forward_mode_on_jax_says_what_to_do(name):
    import jax

    total, weights, x, y = stateless_loss()

    def of_input(x):
        return total(weights, x, y)

    transforms = {
        "jvp": lambda: jax.jvp(of_input, (x,), (x,)),
        "jacfwd": lambda: jax.jacfwd(of_input)(x),
        "linearize": lambda: jax.linearize(of_input, x)[1](x),
    }
    with pytest.raises(TypeError, match="plain_gradients|custom_vjp"):
        transforms[name]()
    with plain_gradients():
        transforms[name]()


@pytest.mark.parametrize("scale", [1.0, 1e13])
@HEADS_AND_LABELS
def test_plain_gradients_are_those_derived_by_hand(head, labels, scale):
    loss, y = LABELS[labels]
    # Without normalization: what is far out stays there.
    layer = HEADS[head](
        3, **({} if head != "default" else {"normalize": False})
    )
    layer.build((None, 6))
    y = ops.convert_to_tensor(y)
    values = [ops.convert_to_tensor(w) for w in layer.trainable_weights]
    fixed = [ops.convert_to_tensor(w) for w in layer.non_trainable_variables]

    def total(x, *weights):
        return loss(y, layer.stateless_call(list(weights), fixed, x)[0])

    def plainly(x, *weights):
        with plain_gradients():
            return total(x, *weights)

    arrays = [scale * X, *map(to_numpy, values)]
    expected, by_hand = value_and_gradients(total, *arrays)
    value, found = value_and_gradients(plainly, *arrays)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for slope, hand in zip(found, by_hand, strict=True):
        assert np.isfinite(slope).all()
        assert_close(slope, hand)


def test_bad_labels_stay_nan_with_a_gradient_of_zero():
    scores = packed(np.eye(4), np.eye(3, 4))
    labels = ops.convert_to_tensor(np.array([0, 3, 2, -1]))

    def total(scores):
        with plain_gradients():
            losses = HALOLoss(reduction=None)(labels, scores)
        return ops.sum(ops.where(ops.isnan(losses), 0.0, losses))

    value, (slope,) = value_and_gradients(total, scores)
    assert np.isfinite(value)
    np.testing.assert_array_equal(slope[[1, 3]], 0.0)
    assert np.abs(slope[[0, 2]]).max() > 0.1


tensorflow_only = pytest.mark.skipif(
    BACKEND != "tensorflow", reason="an input signature is of TensorFlow"
)


@tensorflow_only
@HEADS_AND_LABELS
def test_a_signature_that_gives_the_rank_alone(head, labels):
    import tensorflow as tf

    layer = HEADS[head](3)
    layer.build((None, 6))
    loss, y = LABELS[labels]
    rank = tf.TensorSpec([None, None], "float32")

    @tf.function(input_signature=[rank])
    def scores_of(x):
        return layer(x, training=True)

    expected = to_numpy(layer(X))
    np.testing.assert_allclose(scores_of(X), expected, rtol=1e-5)

    @tf.function(
        input_signature=[rank, tf.TensorSpec([None] * y.ndim, "float32")]
    )
    def slope_of(scores, y):
        with tf.GradientTape() as tape:
            tape.watch(scores)
            value = loss(y, scores)
        return value, tape.gradient(value, scores)

    if labels == "blocks":
        with pytest.raises(ValueError, match="known number of columns"):
            slope_of(expected, y)
        return
    value, slope = slope_of(expected, y)
    eager, (gradient,) = value_and_gradients(
        lambda s: loss(ops.convert_to_tensor(y), s), expected
    )
    np.testing.assert_allclose(value, eager, rtol=1e-5)
    np.testing.assert_allclose(slope, gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.skipif(BACKEND == "torch", reason="Keras has none on PyTorch")
@pytest.mark.parametrize("head", HEADS)
def test_sparse_inputs(head):
    dense = np.where(X > 0.3, X, 0.0)
    if BACKEND == "jax":
        from jax.experimental import sparse

        x = sparse.BCOO.fromdense(dense)
    else:
        import tensorflow as tf

        x = tf.sparse.from_dense(dense)
    inputs = keras.Input((6,), sparse=True)
    model = keras.Model(inputs, HEADS[head](3)(inputs))
    np.testing.assert_allclose(model(x), model(dense), rtol=1e-5)


# Casting by the surroundings ------------------------------------------------


# The compiler of PyTorch warns of how Keras makes gradients.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(BACKEND != "torch", reason="of PyTorch alone")
@pytest.mark.parametrize(
    "device_dtype, compiled",
    [
        ("bfloat16", False),
        ("float16", False),
        pytest.param(
            "bfloat16",
            True,
            marks=[
                pytest.mark.slow,
                # PyTorch takes a minute to compile as many layers of Keras.
                pytest.mark.skipif(
                    not cases.THOROUGH, reason="with HALO_TESTS=thorough"
                ),
            ],
        ),
    ],
)
def test_autocast_of_torch_ends_at_the_head(device_dtype, compiled):
    import torch

    features = np.random.default_rng(0).normal(size=(4, 5, 5, 3))
    features = ops.convert_to_tensor(features.astype("float32"))
    inputs = keras.Input((5, 5, 3))
    blocks = layers.BlockFeatures()([inputs])
    scores = HALODense(3)(blocks)
    model = keras.Model(
        inputs,
        [
            blocks,
            layers.FeatureNormalization()(blocks),
            scores,
            HALODense.reference(3)(blocks),
            HALOSimilarity()([blocks, blocks]),
            keras_halo.HALOSoftmax()(scores),
            layers.OODScore()(scores),
            layers.Decision()(scores),
        ],
    )
    # Neither the identity nor a cold head: rounding has to show.
    for weight in model.trainable_weights:
        weight.assign(
            np.random.default_rng(1).normal(scale=0.3, size=weight.shape)
        )
    call = torch.compile(model, backend="eager") if compiled else model
    labels = ops.convert_to_tensor([0, 1, 2, 0])
    kernels = [weight.value for weight in model.trainable_weights]

    def answers(surroundings):
        with surroundings:
            outputs = call(features)
            losses = [HALOLoss()(labels, outputs[i]) for i in (2, 3)]
        # Outside, as PyTorch demands.
        gradients = torch.autograd.grad(sum(losses), kernels, allow_unused=True)
        return [*outputs, *losses, *(g for g in gradients if g is not None)]

    expected = answers(contextlib.nullcontext())
    casting = torch.autocast("cpu", dtype=getattr(torch, device_dtype))
    found = answers(casting)
    with casting:
        # It is on: products of others are rounded.
        product = features[0, 0] @ features[0, 0].T
    assert str(product.dtype) == f"torch.{device_dtype}"
    assert len(expected) >= 12
    for a, b in zip(expected, found, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(
            to_numpy(a.detach()), to_numpy(b.detach())
        )


@pytest.mark.skipif(BACKEND != "torch", reason="of PyTorch alone")
def test_autocast_of_torch_ends_at_stateless_calls_and_fitted_embeddings():
    import torch

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 7)).astype("float32"), np.arange(60) % 3
    model = keras.Sequential([keras.Input((7,)), HALODense(3)])
    fitted = keras_halo.fit_class_gaussians(model, x, y, verbose=0)
    converted = keras_halo.convert_head(model, x, y, verbose=0)
    features = ops.convert_to_tensor(x)

    def answers():
        head = model.layers[-1]
        weights = head.trainable_variables, head.non_trainable_variables
        with torch.no_grad():
            found = [
                head.stateless_call(*weights, features)[0],
                *fitted(features).values(),
                converted(features),
            ]
        return [to_numpy(answer) for answer in found]

    expected = answers()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = answers()
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(a, b)
