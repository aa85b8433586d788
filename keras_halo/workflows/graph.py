"""Finds the head of a Keras model, and what enters it."""

import warnings

import keras
import numpy as np
from keras import ops

from keras_halo.layers.feature_normalization import FeatureNormalization
from keras_halo.layers.halo_dense import HALODense
from keras_halo.layers.precise_dense import PreciseDense
from keras_halo.utils.checks import check_model
from keras_halo.utils.keras_private import flat_layers, history_of


def input_structure(model):
    """The inputs nested as the model takes them: Keras warns otherwise."""
    inputs = model.inputs
    return inputs[0] if len(inputs) == 1 else model.input


def find_head(model):
    """Returns the one `HALODense` layer of a model, however deep it lies.

    Args:
        model: A built Keras model.

    Returns:
        `HALODense`.

    Raises:
        ValueError: If there is none, more than one, or it has no weights yet.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras_halo.HALODense(3)])
    >>> find_head(model).units
    3
    """
    check_model(model)
    heads = [
        layer for layer in flat_layers(model) if isinstance(layer, HALODense)
    ]
    if len(heads) != 1:
        raise ValueError(
            "Expected a model with exactly one `keras_halo.HALODense` layer. "
            f"Received: {len(heads)} of them in model {model.name!r}. "
            + (
                "Make it the last layer of the model; of two towers, "
                "`HALOSimilarity.to_head(keys)` makes one."
                if not heads
                else "Pass a model that has one of these heads only."
            )
        )
    if not heads[0].built:
        raise ValueError(
            "The `HALODense` layer has no weights yet. Received: model "
            f"{model.name!r}, which was not built. Train it first, or load "
            "trained weights."
        )
    return heads[0]


def warn_of_idle_statistics(model):
    """Warns where a head was trained without what it abstains by.

    Args:
        model: Keras model.
    """
    for layer in flat_layers(model):
        if isinstance(layer, HALODense) and _statistics_stand_still(layer):
            warnings.warn(
                f"The head {layer.name!r} was trained, but its running "
                "statistics have seen no batch: it hardly ever abstains. A "
                "loop of your own has to call the model with `training=True`.",
                stacklevel=3,
            )


def warn_of_preprocessor(model):
    """Warns where a model preprocesses inputs before its graph sees them.

    So do the tasks of KerasHub. A model that is made of their graph does not.

    Args:
        model: `keras.Model`.
    """
    preprocessor = getattr(model, "preprocessor", None)
    if preprocessor is not None:
        warnings.warn(
            f"{type(model).__name__} preprocesses what it is given. Its graph "
            "does not, which is all that is used here: pass inputs that are "
            "preprocessed, `x = model.preprocessor(x)`, here and to a model "
            "that this returns.",
            stacklevel=3,
        )


def _statistics_stand_still(head):
    if not head.built or head.abstain_rate is None:
        return False
    # Zero at the start of training.
    is_trained = ops.convert_to_numpy(head.raw_gamma) != 0.0
    return bool(is_trained and ops.convert_to_numpy(head.evidence_count) == 0.0)


def head_tensors(model):
    """The symbolic input and output of the head in the graph of a model.

    Args:
        model: A functional or sequential Keras model with one `HALODense`
            layer, which may lie in a model inside of it.

    Returns:
        Embeddings of shape `(batch_size, ..., D)` and packed scores of shape
        `(batch_size, ..., packed_width)`, both symbolic.

    Raises:
        ValueError: If the model has not exactly one head, or has no graph.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras_halo.HALODense(3)])
    >>> embeddings, scores = head_tensors(model)
    >>> embeddings.shape, scores.shape
    ((None, 128), (None, 9))
    """
    head = find_head(model)
    # A layer may have been called in several graphs: walk back from the
    # outputs of this one instead of asking the layer.
    pending = list(getattr(model, "outputs", None) or [])
    visited = set()
    while pending:
        tensor = pending.pop()
        operation, node = history_of(tensor)
        if node in visited:
            continue
        visited.add(node)
        if operation is head:
            features = node.input_tensors[0]
            return embedding_of(head, features, model), node.output_tensors[0]
        if isinstance(operation, keras.Model) and head in flat_layers(
            operation
        ):
            if not getattr(operation, "outputs", None):
                raise _no_graph(operation)
            inner = keras.Model(
                input_structure(operation),
                head_tensors(operation),
                name=free_name(model, "up_to_head"),
            )
            return inner(*node.arguments.args)
        pending.extend(node.input_tensors)
    raise _no_graph(model)


def _no_graph(model):
    return ValueError(
        "The input of the head cannot be found. Expected a functional or "
        "sequential model with `HALODense` on the way to its outputs. "
        f"Received: model {model.name!r} of type {type(model).__name__}. "
        "For a subclassed model compute the embeddings yourself and use "
        "`keras_halo.layers.ClassGaussians` and its method `adapt`."
    )


def embedding_of(head, features, model):
    """The symbolic embeddings that a head makes of its input.

    They come from layers with copies of the weights of the head: a layer cannot
    be part of another one and stand by itself in the file of one model.

    Args:
        head: `HALODense`, built.
        features: Symbolic tensor of shape `(batch_size, ..., features)`, the
            input of the head.
        model: Keras model that holds the head, for names that are free.

    Returns:
        Symbolic tensor of shape `(batch_size, ..., D)`.
    """
    if head.embedding_dim is None:
        return features
    if head.normalize:
        features = FeatureNormalization(
            name=free_name(model, "feature_normalization"),
            dtype=head.head_dtype,
        )(features)
    embedding = PreciseDense(
        head.centroids.shape[-1],
        name=free_name(model, "embedding"),
        dtype=head.head_dtype,
    )
    embeddings = embedding(features)
    # As NumPy arrays: JAX would give away the buffers of shared ones.
    weights = (head.kernel, head.bias)
    embedding.set_weights([np.array(ops.convert_to_numpy(w)) for w in weights])
    return embeddings


def free_name(model, name):
    """A name that no layer of a model has yet.

    Args:
        model: Keras model.
        name: String, what the name begins with.

    Returns:
        String.

    Example:

    >>> head = keras_halo.HALODense(3, name="head")
    >>> model = keras.Sequential([keras.Input((4,)), head])
    >>> free_name(model, "turned"), free_name(model, "head")
    ('turned', 'head_1')
    """
    taken = {layer.name for layer in flat_layers(model)}
    count = 0
    free = name
    while free in taken:
        count += 1
        free = f"{name}_{count}"
    return free
