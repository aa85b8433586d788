"""Finds the last layer of a classifier, and what enters it."""

import math

import keras
import numpy as np
from keras import layers, ops

from keras_halo.layers.halo_dense import HALODense
from keras_halo.layers.halo_similarity import HALOSimilarity
from keras_halo.utils.keras_private import history_of
from keras_halo.workflows.graph import (
    embedding_of,
    free_name,
    input_structure,
)

# What a classifier may do to its logits before it emits them.
_ACTIVATIONS = ("linear", "softmax", "sigmoid", "log_softmax")

# What leaves logits as they are when a model predicts.
_PASSED = (
    layers.Identity,
    layers.Dropout,
    layers.SpatialDropout1D,
    layers.SpatialDropout2D,
    layers.SpatialDropout3D,
    layers.AlphaDropout,
    layers.GaussianDropout,
    layers.GaussianNoise,
    layers.Softmax,
)

# The same as operations that are no layers, by the names of their classes.
_PASSED_OPERATIONS = ("Softmax", "LogSoftmax", "Sigmoid", "Identity")

_CONVOLUTIONS = (layers.Conv1D, layers.Conv2D, layers.Conv3D)


class OldHead:
    """The layer that made logits of embeddings.

    Args:
        layer: `keras.layers.Dense`, a convolution of size one, or `HALODense`.
        units: Integer, how many logits it makes.
        is_sigmoid: Boolean, whether every logit becomes a probability by
            itself. Defaults to `False`.
    """

    def __init__(self, layer, units, is_sigmoid=False):
        self.layer, self.units = layer, units
        self.is_sigmoid = is_sigmoid or units == 1

    def linear_map(self):
        """Kernel `(D, units)` and bias `(units,)` of the logits, in float64.

        `None` for weights of few bits.
        """
        if isinstance(self.layer, HALODense):
            centroids = np.asarray(
                ops.convert_to_numpy(self.layer.centroids), "float64"
            )
            centroids = centroids - centroids.mean(axis=0)
            dim = centroids.shape[-1]
            gamma = float(ops.convert_to_numpy(self.layer.temperature))
            bias = -gamma * np.square(centroids).mean(axis=-1)
            return 2.0 * gamma / dim * centroids.T, bias
        if getattr(self.layer, "quantization_mode", None):
            return None
        kernel = np.asarray(ops.convert_to_numpy(self.layer.kernel))
        kernel = kernel.astype("float64").reshape(-1, self.units)
        bias = np.zeros(self.units)
        if self.layer.use_bias:
            bias = np.asarray(ops.convert_to_numpy(self.layer.bias), "float64")
        return kernel, bias

    def answers(self, embeddings):
        """The classes of embeddings, or `None` for weights of few bits.

        Args:
            embeddings: Array of shape `(N, D)`.
        """
        linear = self.linear_map()
        if linear is None:
            return None
        logits = embeddings @ linear[0] + linear[1]
        if self.units == 1:
            return (logits[:, 0] > 0.0).astype("int64")
        return logits.argmax(axis=-1)

    def probabilities(self, logits):
        """Distributions over the classes that logits stand for.

        Args:
            logits: Array of shape `(N, units)`.

        Returns:
            Array of shape `(N, K)`, of two classes for one unit. Where every
            class has a sigmoid of its own, they are scaled to a sum of one.
        """
        logits = np.asarray(logits, "float64")
        if self.units == 1:
            logits = np.concatenate([np.zeros_like(logits), logits], axis=-1)
        elif self.is_sigmoid:
            logits = -np.logaddexp(0.0, -logits)
        top = logits.max(axis=-1, keepdims=True)
        exponentials = np.exp(logits - top)
        return exponentials / exponentials.sum(axis=-1, keepdims=True)


def embeddings_before_head(model, units=None):
    """Returns what enters the last layer of a classifier, and that layer.

    Args:
        model: Functional or sequential Keras model with one output.
        units: Optional integer, for a model that emits features instead.

    Returns:
        Symbolic tensor of shape `(batch_size, ..., D)`, and `OldHead`; `None`
        in its place with `units`.

    Raises:
        ValueError: If the model has another number of outputs, or does not end
            in what could be a linear layer.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((1, 1, 8)), layers.Conv2D(3, 1), layers.Flatten()]
    ... )
    >>> embeddings, old_head = embeddings_before_head(model)
    >>> embeddings.shape, old_head.units
    ((None, 8), 3)
    """
    outputs = getattr(model, "outputs", None) or []
    if len(outputs) != 1:
        raise ValueError(
            "Expected a built functional or sequential model with one output. "
            f"Received: model {getattr(model, 'name', model)!r} of type "
            f"{type(model).__name__} with {len(outputs)} symbolic outputs. "
            "Select one with `keras.Model(model.input, model.outputs[i])`; a "
            "subclassed model has to be written as a functional one."
        )
    if units is not None:
        return outputs[0], None
    embeddings, old_head, shapes = _walk(model, outputs[0])
    if shapes:
        # Where positions are arranged anew, they are before the head as well.
        # They keep their order, so that the last of several shapes is enough.
        positions = (-1 if n is None else n for n in shapes[0])
        embeddings = layers.Reshape(
            (*positions, embeddings.shape[-1]),
            name=free_name(model, "reshaped_features"),
        )(embeddings)
    return embeddings, old_head


def _walk(model, tensor):
    """Embeddings, head, and shapes of positions from the last to the first."""
    shapes, is_sigmoid = [], False
    while True:
        operation, node = history_of(tensor)
        features = node.input_tensors[0] if node.input_tensors else None
        is_sigmoid = is_sigmoid or _is_sigmoid(operation)
        if isinstance(operation, HALODense):
            embeddings = embedding_of(operation, features, model)
            head = OldHead(operation, operation.units)
            break
        if isinstance(operation, layers.Dense):
            _check_activation(operation)
            embeddings = features
            head = OldHead(operation, operation.units, is_sigmoid)
            break
        if isinstance(operation, _CONVOLUTIONS):
            _check_convolution(operation)
            _check_activation(operation)
            embeddings = features
            head = OldHead(operation, operation.filters, is_sigmoid)
            break
        if isinstance(operation, keras.Model) and getattr(
            operation, "outputs", None
        ):
            inner, head = embeddings_before_head(operation)
            head.is_sigmoid = head.is_sigmoid or is_sigmoid
            embedder = keras.Model(
                input_structure(operation),
                inner,
                name=free_name(model, "up_to_head"),
            )
            embeddings = embedder(*node.arguments.args)
            break
        if isinstance(operation, (layers.Reshape, layers.Flatten)):
            shapes.append(tensor.shape)
        elif isinstance(operation, layers.Activation):
            _check_activation(operation)
        elif not (
            isinstance(operation, _PASSED)
            or type(operation).__name__ in _PASSED_OPERATIONS
        ):
            raise _no_classifier(model, operation)
        _check_axis(operation, tensor)
        tensor = features
    return embeddings, head, [_positions(s, embeddings, head) for s in shapes]


def _positions(shape, embeddings, head):
    """The shape of positions in `(batch_size, *positions, K)`, checked."""
    before = math.prod(n or -1 for n in embeddings.shape[1:-1])
    after = math.prod(n or -1 for n in shape[1:-1])
    known = None not in (*embeddings.shape[1:], *shape[1:])
    if shape[-1] != head.units or (known and before != after):
        raise ValueError(
            "A `Reshape` or `Flatten` after the last layer must leave classes "
            f"on the last axis. Received: {head.units} classes in the shape "
            f"{shape} from features of shape {embeddings.shape}. Convert the "
            "model that ends in its logits: `keras.Model(model.input, "
            "model.get_layer(name).output)`."
        )
    return shape[1:-1]


def _no_classifier(model, operation):
    if isinstance(operation, HALOSimilarity):
        return ValueError(
            "The model must end in a classifier. Received: two towers that end "
            f"in {operation.name!r} of type {type(operation).__name__}. "
            "`HALOSimilarity.to_head(keys)` makes a `HALODense` of keys: put "
            "it on the tower of the queries."
        )
    return ValueError(
        "The model must end in `keras.layers.Dense`, in a convolution of size "
        "one, or in `keras_halo.HALODense`; softmax, `Activation`, `Identity`, "
        "dropout, `Reshape` and `Flatten` may follow. Received: "
        f"{operation.name!r} of type {type(operation).__name__} at the end of "
        f"model {model.name!r}. If the model emits features, say how many "
        "classes there are: `units=`. If it computes logits by hand, convert "
        "the part of it that ends in features, `keras.Model(model.input, "
        "model.get_layer(name).output)`, in that way."
    )


def _is_sigmoid(operation):
    name = getattr(getattr(operation, "activation", None), "__name__", "")
    return "sigmoid" in (name, type(operation).__name__.lower())


def _check_convolution(layer):
    one = all(n == 1 for n in (*layer.kernel_size, *layer.strides))
    if not (one and layer.groups == 1 and layer.data_format == "channels_last"):
        raise ValueError(
            "A convolution is a linear layer on every position if its size, "
            "its strides and its groups are 1 and channels come last. "
            f"Received: layer {layer.name!r} with kernel_size="
            f"{layer.kernel_size}, strides={layer.strides}, groups="
            f"{layer.groups}, data_format={layer.data_format!r}. Convert the "
            "part of the model that ends in features, with `units=`."
        )


def _check_axis(operation, tensor):
    """Refuses a softmax over anything but the classes."""
    if type(operation).__name__ not in ("Softmax", "LogSoftmax"):
        return
    axes = operation.axis
    axes = tuple(axes) if isinstance(axes, (list, tuple)) else (axes,)
    if axes not in ((-1,), (len(tensor.shape) - 1,)):
        raise ValueError(
            "A softmax at the end of a classifier must be over the classes, "
            f"the last axis. Received: {operation.name!r} with axis="
            f"{operation.axis} on a tensor of shape {tensor.shape}, which "
            "compares other things and changes which class is largest. "
            "Convert the model that ends in its logits: `keras.Model("
            "model.input, model.get_layer(name).output)`."
        )


def _check_activation(layer):
    name = getattr(layer.activation, "__name__", str(layer.activation))
    if name not in _ACTIVATIONS:
        raise ValueError(
            "The last layer of a classifier has softmax, sigmoid or no "
            f"activation. Received: layer {layer.name!r} with activation "
            f"{name!r}. Convert the model that ends in its logits; if these "
            "are features, say how many classes there are: `units=`."
        )
