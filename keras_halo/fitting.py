"""Fits what is measured after training, and finds where in a model to do so."""

import keras
import numpy as np
from keras import ops

from keras_halo.layers.class_gaussians import ClassGaussians
from keras_halo.layers.halo_dense import HALODense


def fit_class_gaussians(model, x, y=None, batch_size=None, verbose="auto"):
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
            an iterable of batches `(x, y)`: a `tf.data.Dataset`, a
            `torch.utils.data.DataLoader` or a `keras.utils.PyDataset`. Data
            that is augmented should not be: the extent of a class is
            measured.
        y: Labels, integers of shape `(N, ...)` or `(N, ..., 1)`, or one-hot
            of shape `(N, ..., K)`.
        batch_size: Integer, as in `model.predict`. Defaults to 32.
        verbose: `"auto"`, 0, 1 or 2, as in `model.predict`.

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
    layer.adapt(*_embed(embedder, x, y, batch_size, verbose))
    return keras.Model(inputs, {"scores": scores, "ood": ood})


def input_structure(model):
    """The inputs nested as the model takes them: Keras warns otherwise."""
    inputs = model.inputs
    return inputs[0] if len(inputs) == 1 else model.input


def _embed(embedder, x, y, batch_size, verbose):
    """Embeddings and labels, as NumPy arrays."""
    if y is not None:
        embeddings = embedder.predict(x, batch_size=batch_size, verbose=verbose)
        return embeddings, ops.convert_to_numpy(y)
    if isinstance(x, np.ndarray) or ops.is_tensor(x):
        raise ValueError(
            "Labels are missing. Received: an array as `x` and y=None. Pass "
            "`y`, or a dataset of batches `(x, y)`."
        )
    collected = []
    total = len(x) if hasattr(x, "__len__") else None
    progress = keras.utils.Progbar(
        total, verbose=1 if verbose == "auto" else verbose
    )
    for batch in _batches(x, total):
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            raise ValueError(
                "Without `y`, `x` must be an iterable of batches `(x, y)`. "
                f"Received: a batch of type {type(batch).__name__}."
            )
        embeddings = embedder.predict_on_batch(batch[0])
        collected.append((embeddings, ops.convert_to_numpy(batch[1])))
        progress.update(len(collected))
    if not collected:
        raise ValueError("Expected at least one batch. Received: no data.")
    if total is None:
        progress.update(len(collected), finalize=True)
    embeddings, labels = zip(*collected, strict=True)
    return np.concatenate(embeddings), np.concatenate(labels)


def _batches(x, total):
    if isinstance(x, keras.utils.PyDataset):
        # It has no end of its own: indexing may go on for ever.
        return (x[i] for i in range(total))
    return iter(x)


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
        `(batch_size, ..., K + 4)`, both symbolic.

    Raises:
        ValueError: If the model has not exactly one head, or has no graph.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras_halo.HALODense(3)])
    >>> embeddings, scores = head_tensors(model)
    >>> embeddings.shape, scores.shape
    ((None, 4), (None, 7))
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
            return node.input_tensors[0], node.output_tensors[0]
        if (
            isinstance(operation, keras.Model)
            and head in operation._flatten_layers()
        ):
            inner = keras.Model(
                input_structure(operation), head_tensors(operation)
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
