"""Gradients derived by hand, and the way around them.

A gradient of one's own is a vector-Jacobian product. Transforms that need
anything else, such as forward mode, cannot use it: functions that have one
come with a plain form of themselves, which backends differentiate as they do
any other.
"""

import contextlib
from collections.abc import Iterator

import keras
from keras import ops

from keras_halo.utils.keras_private import (
    in_torch_transform,
    is_torch_compiling,
)
from keras_halo.utils.precision import full_precision

# One entry for every open scope. No context variable, which `torch.compile`
# cannot trace; in another thread a scope changes no number.
_SCOPES = []


@contextlib.contextmanager
def plain_gradients() -> Iterator[None]:
    """Makes head and loss of operations that any transform can take apart.

    Head and loss have gradients derived by hand, which save time and memory.
    JAX cannot push tangents through these (`jax.jvp`, `jax.jacfwd`,
    `jax.linearize`). Within this scope every layer and loss that is called, or
    traced, is differentiated by the backend instead. Values and gradients are
    the same; a step with very many classes takes half as long again, and four
    times the memory.

    On PyTorch, forward mode by `torch.autograd.forward_ad` and gradients that
    `torch.autograd` vectorizes (`vectorize=True`, `is_grads_batched=True`) need
    it, too. Nothing else does: `grad`, `vmap`, `jacrev` and `hessian` of JAX
    work as they are, the transforms of `torch.func` are noticed, and TensorFlow
    takes apart every gradient.

    What `jax.jit` has traced before stays as it was traced: enter the scope
    inside the function, or before its first call.

    Returns:
        A context manager.

    Example:

    >>> from keras_halo.ops import plain_gradients
    >>> scores = keras_halo.HALODense(3)(np.ones((2, 8), "float32"))
    >>> loss = keras_halo.HALOLoss()
    >>> with plain_gradients():
    ...     plain = loss(np.array([0, 2]), scores)
    >>> bool(ops.abs(plain - loss(np.array([0, 2]), scores)) < 1e-5)
    True
    """
    _SCOPES.append(True)
    try:
        yield
    finally:
        _SCOPES.pop()


def _needs_plain():
    if _SCOPES:
        return True
    if keras.backend.backend() != "torch":
        return False
    # Its transforms refuse the gradient of Keras, which writes into tensors.
    return in_torch_transform()


def _keeps_for_backward(x):
    """Whether there will be a backward pass, of operations one by one."""
    return (
        keras.backend.backend() == "torch"
        and x.requires_grad
        and not is_torch_compiling()
    )


def _is_recorded(x):
    """Whether PyTorch records what is done now with a tensor of a gradient."""
    # A view alone requires a gradient whether or not anything is recorded.
    return (x[:0] * 1.0).requires_grad


def with_gradient(function, gradient, plain, both=None):
    """Joins a function of tensors with its vector-Jacobian product.

    The first three have to get every tensor as an input, labels included: JAX
    calls them again when the trace in which a closure was made is long over.

    Args:
        function: Callable, `function(*inputs)` returns a tensor.
        gradient: Callable, `gradient(inputs, upstream)` returns a tuple with
            one tensor for every input, or `None` where it has no gradient.
        plain: Callable like `function` that writes into no tensor and that the
            backend can differentiate.
        both: Callable, `both(*inputs)` returns what `function` returns and a
            function of `upstream` that is called at most once, for what
            `gradient` returns. PyTorch, which compiles nothing, is spared what
            the two have in common. Defaults to `None`, without it.

    Returns:
        Callable like `function`.
    """

    def both_once(*inputs):
        output, slopes = both(*inputs)
        kept = [slopes]

        def backward(*args, upstream):
            with full_precision():
                # A second pass, or a derivative of this one, starts anew.
                if kept and not _is_recorded(args[0]):
                    return kept.pop()(upstream)
                return gradient(args, upstream)

        return output, backward

    @ops.custom_gradient
    def joined(*inputs):
        if both is not None and _keeps_for_backward(inputs[0]):
            return both_once(*inputs)

        def backward(*args, upstream=None):
            # PyTorch passes the inputs on, the others pass upstream alone.
            if upstream is not None:
                with full_precision():
                    return gradient(args, upstream)
            (upstream,) = args
            if hasattr(upstream, "dense_shape"):
                # On TensorFlow what gathers rows passes the gradient of these
                # rows alone, which most operations turn into a tensor.
                upstream = ops.squeeze(ops.expand_dims(upstream, 0), 0)
            return gradient(inputs, upstream)

        return function(*inputs), backward

    def chosen(*inputs):
        if _needs_plain():
            return plain(*inputs)
        try:
            return joined(*inputs)
        except TypeError as error:
            if "custom_vjp" not in str(error):
                raise
            raise TypeError(
                "Head and loss of keras_halo have gradients derived by hand, "
                "through which JAX cannot push tangents. Expected reverse mode "
                "(`jax.grad`, `jax.jacrev`). Received: forward mode (`jax.jvp`,"
                " `jax.jacfwd`, `jax.linearize`). Call the model within `with "
                "keras_halo.ops.plain_gradients():`."
            ) from error

    return chosen
