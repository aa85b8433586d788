"""Fits what is measured after training, and finds where in a model to do so."""

import contextlib

import keras
import numpy as np
from keras import ops

from keras_halo.evaluation.batches import (
    check_readable,
    count_batches,
    counted_positions,
    read_batches,
)
from keras_halo.evaluation.predicting import inference_mode
from keras_halo.layers.class_gaussians import ClassGaussians
from keras_halo.layers.feature_normalization import FeatureNormalization
from keras_halo.layers.halo_dense import HALODense


def fit_class_gaussians(
    model, x, y=None, batch_size=None, verbose="auto", sample_weight=None
):
    """Appends an out-of-distribution score that is fitted to training data.

    One pass over the data computes the embeddings that enter the head; the
    mean and the covariance of every class are then stored in a
    `keras_halo.layers.ClassGaussians` layer on top of the model. The new model
    shares layers and weights with the given one and holds no training data.
    It is an ordinary Keras model: `save`, `load_model`, `export` and `predict`
    work as for any other. If `model` is trained further, fit again.

    Formula:

    ```python
    scores = head(embeddings)
    ood = (
        min_k(-log N(embeddings; mean_k, cov_k))
        + log(P(abstain) / (1 - P(abstain)))
    )
    ```

    Memory: the embeddings of the whole pass are collected, 4 bytes times the
    number of samples times `D`, and twice that in float64 during the fit.

    Args:
        model: A trained functional or sequential model with one `HALODense`
            head.
        x: Training inputs, whatever `model.predict` takes; or, without `y`,
            a dataset of batches `(x, y)` or `(x, y, sample_weight)`: a
            `tf.data.Dataset`, a `torch.utils.data.DataLoader`, a
            `keras.utils.PyDataset` or a generator. Data that is augmented
            should not be: the extent of a class is measured.
        y: Labels, integers of shape `(N, ...)` or `(N, ..., 1)`, or one-hot
            of shape `(N, ..., K)`.
        batch_size: Integer, as in `model.predict`. Defaults to 32.
        verbose: `"auto"`, 0, 1 or 2, as in `model.predict`.
        sample_weight: Optional weights of shape `(N,)` or `(N, ...)`. What
            has a weight of zero is left out, whatever its label, such as
            padding; every other weight counts as one. Defaults to `None`.

    Returns:
        `keras.Model` with the inputs of `model` and the outputs
        `{"scores": packed scores, "ood": scores of shape (batch_size, ...)}`.

    Raises:
        ValueError: If the model has not exactly one head or is subclassed,
            labels do not fit, a class has fewer than two samples, or
            embeddings are not finite. The given model is never changed.
        ImportError: If scikit-learn is missing.

    Example:

    >>> rng = np.random.default_rng(0)
    >>> x, y = rng.normal(size=(60, 4)), np.arange(60) % 3
    >>> model = keras.Sequential([keras.Input((4,)), keras_halo.HALODense(3)])
    >>> model = fit_class_gaussians(model, x, y, verbose=0)
    >>> ood = model.predict(np.array([[0.0] * 4, [9.0] * 4]), verbose=0)["ood"]
    >>> bool(ood[1] > ood[0])
    True

    References:

    - Kimin Lee, Kibok Lee, Honglak Lee, Jinwoo Shin, A Simple Unified
      Framework for Detecting Out-of-Distribution Samples and Adversarial
      Attacks, 2018.
    """
    embeddings, scores = head_tensors(model)
    layer = ClassGaussians(find_head(model).units, name="class_gaussians")
    # Built before the pass, so that what cannot work fails at once.
    ood = layer(embeddings, scores)
    inputs = input_structure(model)
    embedder = keras.Model(inputs, embeddings)
    layer.adapt(*_embed(embedder, x, y, sample_weight, batch_size, verbose))
    return keras.Model(inputs, {"scores": scores, "ood": ood})


def input_structure(model):
    """The inputs nested as the model takes them: Keras warns otherwise."""
    inputs = model.inputs
    return inputs[0] if len(inputs) == 1 else model.input


def _embed(embedder, x, y, sample_weight, batch_size, verbose):
    """Embeddings and labels of what counts, as NumPy arrays."""
    if y is not None:
        embeddings = embedder.predict(x, batch_size=batch_size, verbose=verbose)
        return counted(embeddings, ops.convert_to_numpy(y), sample_weight)
    if isinstance(x, np.ndarray) or ops.is_tensor(x):
        raise ValueError(
            "Labels are missing. Received: an array as `x` and y=None. Pass "
            "`y`, or a dataset of batches `(x, y)`."
        )
    check_weights_have_labels(sample_weight, y)
    if isinstance(x, list):
        # Batches, and not the arrays of a model with many inputs.
        wrong = [b for b in x if not isinstance(b, (tuple, list))]
        if wrong or not x:
            raise ValueError(
                "Without `y`, `x` must be a dataset of batches `(x, y)`. "
                "Received: a list "
                + (f"of {type(wrong[0]).__name__}." if wrong else "of nothing.")
            )
        x = (tuple(batch) for batch in x)
    check_readable(x, "x")
    collected = []
    total = count_batches(x, batch_size)
    progress = keras.utils.Progbar(
        total, verbose=1 if verbose == "auto" else verbose
    )
    found = embedded_batches(embedder, x, batch_size)
    with contextlib.closing(found) as batches:
        for batch in batches:
            collected.append(batch)
            progress.update(len(collected))
    if not collected:
        raise ValueError("Expected at least one batch. Received: no data.")
    if total is None:
        progress.update(len(collected), finalize=True)
    embeddings, labels = zip(*collected, strict=True)
    return np.concatenate(embeddings), np.concatenate(labels)


def check_weights_have_labels(sample_weight, y):
    """Raises `ValueError` for weights beside a dataset, which has its own."""
    if sample_weight is not None and y is None:
        raise ValueError(
            "`sample_weight` belongs to arrays `x` and `y`. Received: y=None. "
            "Let the dataset yield batches `(x, y, sample_weight)`."
        )


def embedded_batches(embedder, data, batch_size):
    """Embeddings and labels of what counts, batch by batch; to be closed.

    Args:
        embedder: Keras model from inputs to embeddings.
        data: Arrays or a dataset with labels, see `read_batches`.
        batch_size: Optional integer, for arrays.

    Yields:
        Pairs of NumPy arrays, see `counted`.

    Raises:
        ValueError: If labels are missing, or they or weights do not fit.
    """
    with (
        inference_mode(embedder),
        contextlib.closing(read_batches(data, batch_size)) as batches,
    ):
        for batch, labels, weights in batches:
            if labels is None:
                raise ValueError(
                    "Labels are missing. Received: `x` without labels and "
                    "y=None. Pass `y`, or a dataset of batches `(x, y)`."
                )
            yield counted(embedder.predict_on_batch(batch), labels, weights)


def counted(values, labels, sample_weight):
    """Leaves out what has a weight of zero, such as padding.

    Args:
        values: Array of shape `(B, ..., D)`.
        labels: Array of shape `(B, ...)`, `(B, ..., 1)` or `(B, ..., K)`.
        sample_weight: Weights of shape `(B,)` or `(B, ...)`, or `None`.

    Returns:
        Values and labels, as they are where there are no weights, otherwise
        with a single axis in place of `(B, ...)`.

    Raises:
        ValueError: If weights or labels do not fit.

    Example:

    >>> counted(np.eye(2), np.array([0, -1]), [1.0, 0.0])
    (array([[1., 0.]]), array([0]))
    """
    if sample_weight is None:
        return values, labels
    kept = counted_positions(
        ops.convert_to_numpy(sample_weight), values.shape[:-1], "x"
    )
    labels = np.asarray(ops.convert_to_numpy(labels))
    if labels.shape[: kept.ndim] != kept.shape:
        raise ValueError(
            "Expected one label for every sample or position, of shape "
            f"{kept.shape}. Received: labels of shape {labels.shape}."
        )
    return values[kept], labels[kept]


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
    heads = [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, HALODense)
    ]
    if len(heads) != 1:
        raise ValueError(
            "Expected a model with exactly one `keras_halo.HALODense` layer. "
            f"Received: {len(heads)} of them in model {model.name!r}. "
            + (
                "Make it the last layer of the model."
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


def head_tensors(model):
    """The symbolic input and output of the head in the graph of a model.

    Args:
        model: A functional or sequential Keras model with one `HALODense`
            layer, which may lie in a model inside of it.

    Returns:
        Embeddings of shape `(batch_size, ..., D)` and packed scores of shape
        `(batch_size, ..., K + 6)`, both symbolic.

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
        operation, node_index, _ = tensor._keras_history
        if (operation, node_index) in visited:
            continue
        visited.add((operation, node_index))
        node = operation._inbound_nodes[node_index]
        if operation is head:
            features = node.input_tensors[0]
            return embedding_of(head, features, model), node.output_tensors[0]
        if (
            isinstance(operation, keras.Model)
            and head in operation._flatten_layers()
        ):
            inner = keras.Model(
                input_structure(operation),
                head_tensors(operation),
                name=free_name(model, "up_to_head"),
            )
            return inner(*node.arguments.args)
        pending.extend(node.input_tensors)
    raise ValueError(
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
    embedding = keras.layers.Dense(
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
    taken = {layer.name for layer in model._flatten_layers()}
    count = 0
    free = name
    while free in taken:
        count += 1
        free = f"{name}_{count}"
    return free
