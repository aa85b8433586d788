"""What the tests need from a backend and keras.ops does not offer."""

import contextlib
import functools

import keras
import numpy as np


def value_and_gradients(function, *arrays, constants=()):
    """Value and gradients of a scalar function of arrays, as NumPy arrays.

    The function is called with the arrays, and the constants after them.
    """
    backend = keras.backend.backend()
    constants = [keras.ops.convert_to_tensor(array) for array in constants]
    if backend == "jax":
        import jax

        value, gradients = _compiled_by_jax(function, len(arrays))(
            *[jax.numpy.asarray(array) for array in arrays], *constants
        )
    elif backend == "torch":
        import torch

        tensors = [torch.tensor(array, requires_grad=True) for array in arrays]
        value = function(*tensors, *constants)
        value.backward()
        gradients = [tensor.grad for tensor in tensors]
    else:
        import tensorflow as tf

        tensors = [tf.constant(array) for array in arrays]
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            value = function(*tensors, *constants)
        gradients = tape.gradient(value, tensors)
    return to_numpy(value), [to_numpy(gradient) for gradient in gradients]


@functools.lru_cache(maxsize=64)
def _compiled_by_jax(function, num_arrays):
    # JAX compiles once for every function object and shape.
    import jax

    return jax.jit(
        jax.value_and_grad(function, argnums=tuple(range(num_arrays)))
    )


def to_numpy(x):
    return keras.ops.convert_to_numpy(x)


def jit(function):
    """The function compiled by the backend, where it has a compiler for it."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return jax.jit(function)
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=True)
    return function


def float64():
    """A context in which float64 arrays stay float64."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.enable_x64(True)
    return contextlib.nullcontext()


def naive_softmax(logits):
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def packed(
    embeddings,
    centroids,
    gamma=4.0,
    bias=-1.0,
    dtype="float32",
    smoothing=None,
):
    """Packed scores by the book: written out column by column in NumPy.

    Without a far background, and where `smoothing` is given with the margin
    that a head takes from it.
    """
    x = np.asarray(embeddings, "float64")
    c = np.asarray(centroids, "float64")
    c = c - c.mean(axis=0)
    norm = (x**2).mean(axis=-1)
    radii = ((x[..., None, :] - c) ** 2).mean(axis=-1)
    background = 0.0
    if smoothing is not None:
        background = -0.5 - np.round(smoothing * 2.0**22) / 2.0**24
    rest = np.stack(
        [
            np.full_like(norm, bias),
            -(2.0**40) * (1.0 + norm),
            np.full_like(norm, -(2.0**40) * (1.0 + gamma)),
            np.full_like(norm, -(2.0**40) * (1.0 + x.shape[-1])),
            np.full_like(norm, -(2.0**40) * (1.0 + background)),
            # The number of the layout.
            np.full_like(norm, -(2.0**40) * (1.25 + 2.0**-13)),
        ],
        axis=-1,
    )
    logits = gamma * (norm[..., None] - radii)
    return np.concatenate([logits, rest], axis=-1).astype(dtype)


def second_derivative(function, array, direction):
    """Gradient of `dot(gradient of function, direction)`, as NumPy array."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        def slope(x):
            return (jax.grad(function)(x) * direction).sum()

        return to_numpy(jax.jit(jax.grad(slope))(jax.numpy.asarray(array)))
    if backend == "torch":
        import torch

        x = torch.tensor(array, requires_grad=True)
        (gradient,) = torch.autograd.grad(function(x), x, create_graph=True)
        slope = (gradient * torch.tensor(direction)).sum()
        return to_numpy(torch.autograd.grad(slope, x)[0])
    import tensorflow as tf

    x = tf.constant(array)
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            value = function(x)
        slope = tf.reduce_sum(inner.gradient(value, x) * direction)
    return to_numpy(outer.gradient(slope, x))
