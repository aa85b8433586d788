"""Turns a trained classifier into one whose HALO head fits what it knows."""

import contextlib

import keras
import numpy as np
from keras import ops

from keras_halo.layers.halo_dense import HALODense
from keras_halo.ops import evidence, packing
from keras_halo.ops.labels import class_indices
from keras_halo.utils.batches import check_readable, labelled_data
from keras_halo.workflows.graph import embedding_of, free_name, input_structure
from keras_halo.workflows.predicting import embedded_batches

# What a classifier may do to its logits before it emits them.
_ACTIVATIONS = ("linear", "softmax", "sigmoid")

# How many embeddings the biases of the head are placed by.
_SAMPLE_SIZE = 4096

# Directions in which training data do not vary would be blown up without
# bound: every direction gets at least this share of the average variance.
_MIN_SHRINKAGE = 0.1


def convert_head(
    model,
    x,
    y=None,
    label_smoothing=None,
    batch_size=None,
    sample_weight=None,
    abstain_rate=0.01,
    **kwargs,
):
    """Replaces the head of a trained classifier by a HALO head that fits it.

    The new model starts from what the old one knows and can say "I don't know"
    at once; a few epochs with `HALOLoss` do the rest. One pass over the data
    measures, in the space that enters the head, the mean of every class and the
    covariance around these means. A `Dense` in between, trainable like any
    other, turns that space such that the classes become the unit Gaussians that
    HALO expects, with the origin amidst them; the means become the
    centroids. So the converted model answers as linear discriminant analysis
    on these embeddings does, and its squared radii are about one.

    The new model shares all other layers with the given one, which keeps
    working as it did; fine-tuning the new model trains the layers of both. To
    keep the old one, convert `keras.models.clone_model(model)` with the weights
    of `model`.

    A head for two classes with one unit becomes `HALODense(2)`.

    **A model that has a HALO head** gets another one. The radial term gives the
    residuals of a class their length and leaves their directions free;
    whitened, they vary alike in every direction, which is what squared radii go
    by. Temperature and biases start anew, those of the old head are left
    behind.

    **Back to plain probabilities.** Put `HALOSoftmax` on top, with
    `abstain=False` for as many columns as before; a binary classifier with one
    column again is the second of them, P(class 1):

    ```python
    probabilities = keras_halo.HALOSoftmax(abstain=False)(converted.output)
    plain = keras.Model(converted.input, probabilities)            # (B, K)
    binary = keras.Model(converted.input, probabilities[..., 1:])  # (B, 1)
    ```

    Formula:

    ```python
    S = mean over x of outer(x - mean_y, x - mean_y)
    S = (1 - shrinkage) * S + shrinkage * trace(S) / D * identity
    W = a * inverse_square_root(S), such that mean(|W @ (x - mean_y)|^2) = 1
    embedding = W @ (x - mean(mean_k))
    centroids = W @ (mean_k - mean(mean_k))
    ```

    with the oracle approximating shrinkage, at least 0.1.

    Args:
        model: A trained functional or sequential model with one output that
            ends in `keras.layers.Dense`, with softmax, sigmoid or no
            activation; an `Activation` or `Softmax` layer may follow. Or one
            that ends in `HALODense`. A model inside of it may hold these
            layers.
        x: Training inputs, whatever `model.predict` takes; or, without `y`, a
            dataset of batches `(x, y)` or `(x, y, sample_weight)`: a
            `tf.data.Dataset`, a `torch.utils.data.DataLoader`, a
            `keras.utils.PyDataset` or a generator. A few hundred samples a
            class are enough.
        y: Labels, integers of shape `(N, ...)` or `(N, ..., 1)`, or one-hot of
            shape `(N, ..., K)`; for one unit 0 or 1.
        label_smoothing: Float in `[0, 1)`, that of a head with
            `abstain_rate=None`. Defaults to `None`, as in `HALODense`.
        batch_size: Integer, as in `model.predict`. Defaults to 32.
        sample_weight: Optional weights of shape `(N,)` or `(N, ...)`. What
            has a weight of zero is left out, whatever its label, such as
            padding; every other weight counts as one. Defaults to `None`.
        abstain_rate: As in `HALODense`. The biases are placed by the evidence
            of up to 4,096 samples of the given data, drawn at random. Defaults
            to `0.01`.
        **kwargs: Further arguments of `HALODense`, such as `learn_gamma` and
            `name`.

    Returns:
        `keras.Model` with the inputs of `model` that emits packed scores. It
        is to be compiled with `HALOLoss`.

    Raises:
        ValueError: If the model does not end as described, labels are out of
            range or missing, a class has no sample, or embeddings are not
            finite. The given model is never changed.

    Example:

    >>> rng = np.random.default_rng(0)
    >>> x, y = rng.normal(size=(60, 4)).astype("float32"), np.arange(60) % 3
    >>> x[np.arange(60), y] += 9.0
    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(3, activation="softmax")]
    ... )
    >>> converted = convert_head(model, x, y)
    >>> scores = converted.predict(x, verbose=0)
    >>> bool(np.mean(keras_halo.decode_predictions(scores).labels == y) > 0.95)
    True

    References:

    - Raphael Pisoni, "I don't know!": Teaching neural networks to abstain
      with the HALO-Loss, 2026.
    - Yilun Chen, Ami Wiesel, Yonina C. Eldar, Alfred O. Hero, Shrinkage
      Algorithms for MMSE Covariance Estimation, 2010.
    """
    embeddings, units = _before_head(model)
    dim = embeddings.shape[-1]
    if dim is None or dim < 2:
        raise ValueError(
            "The last layer must receive embeddings of at least 2 "
            f"components. Received: embeddings of shape {embeddings.shape}. "
            "Put a wider layer before it and train the model again."
        )
    num_classes = max(units, 2)
    data = labelled_data(x, y, sample_weight)
    check_readable(data, "x")
    # Bad arguments show here, before the data are read.
    head = HALODense(
        num_classes,
        embedding_dim=None,
        abstain_rate=abstain_rate,
        label_smoothing=label_smoothing,
        **kwargs,
    )
    inputs = input_structure(model)
    moments = ClassMoments(num_classes, dim)
    sample = _Sample(_SAMPLE_SIZE)
    embedder = keras.Model(inputs, embeddings)
    found = embedded_batches(embedder, data, batch_size)
    with contextlib.closing(found) as batches:
        for embedded, labels in batches:
            moments.update(embedded, labels)
            sample.update(np.asarray(embedded).reshape(-1, dim))
    means, covariance = moments.result()
    transform, center = whitening(means, covariance, moments.total)
    whitened = keras.layers.Dense(dim, name=free_name(model, "halo_embedding"))
    converted = keras.Model(inputs, head(whitened(embeddings)))
    whitened.set_weights([transform.T, -transform @ center])
    head.centroids.assign((means - center) @ transform.T)
    if abstain_rate is not None:
        parts = packing.unpack(head((sample.rows - center) @ transform.T))
        head.assign_evidence(
            ops.convert_to_numpy(
                evidence.class_evidence(
                    parts.logits, parts.squared_norm, head.temperature
                )
            )
        )
    return converted


class _Sample:
    """Rows drawn at random from batches, each with the same probability."""

    def __init__(self, size):
        self.size = size
        self.rng = np.random.default_rng(0)
        self.rows, self.keys = None, np.zeros(0)

    def update(self, rows):
        keys = np.concatenate([self.keys, self.rng.random(len(rows))])
        if self.rows is not None:
            rows = np.concatenate([self.rows, rows])
        kept = np.argsort(keys)[: self.size]
        self.rows, self.keys = rows[kept], keys[kept]


class ClassMoments:
    """Means of classes and the covariance around them, batch by batch.

    Embeddings are summed around the first one seen, in float64: sums around a
    far-off origin would cancel.

    Args:
        num_classes: Integer, the number `K` of classes.
        dim: Integer, the size `D` of an embedding.

    Example:

    >>> moments = ClassMoments(2, 2)
    >>> moments.update(np.array([[1.0, 0.0], [3.0, 0.0]]), np.array([0, 0]))
    >>> moments.update(np.array([[5.0, 5.0]]), np.array([1]))
    >>> means, covariance = moments.result()
    >>> means.tolist()
    [[2.0, 0.0], [5.0, 5.0]]
    >>> covariance.round(4).tolist()
    [[0.6667, 0.0], [0.0, 0.0]]
    """

    def __init__(self, num_classes, dim):
        self.counts = np.zeros(num_classes)
        self.sums = np.zeros((num_classes, dim))
        self.products = np.zeros((dim, dim))
        self.shift = None

    @property
    def total(self):
        """Number of embeddings seen."""
        return int(self.counts.sum())

    def update(self, embeddings, labels):
        """Adds a batch.

        Args:
            embeddings: Array of shape `(..., D)`.
            labels: Integers of shape `(...)` or `(..., 1)`, or one-hot of
                shape `(..., K)`.

        Raises:
            ValueError: If the labels do not fit, or an embedding is not
                finite.
        """
        embeddings = np.asarray(embeddings, "float64")
        num_classes, dim = self.sums.shape
        labels = class_indices(labels, num_classes, embeddings.shape[:-1])
        embeddings, labels = embeddings.reshape(-1, dim), labels.reshape(-1)
        if not np.isfinite(embeddings).all():
            raise ValueError(
                "The embeddings that enter the last layer must be finite. "
                f"Received: {int((~np.isfinite(embeddings)).sum())} of "
                f"{embeddings.size} values are not. Look for NaN in the "
                "inputs, or in the weights of the model."
            )
        if self.shift is None and len(embeddings):
            self.shift = embeddings[0]
        embeddings = embeddings - self.shift if len(embeddings) else embeddings
        np.add.at(self.sums, labels, embeddings)
        self.counts += np.bincount(labels, minlength=num_classes)
        self.products += embeddings.T @ embeddings

    def result(self):
        """Means of shape `(K, D)` and the pooled covariance `(D, D)`.

        Raises:
            ValueError: If a class has no sample.
        """
        empty = np.flatnonzero(self.counts == 0)
        if empty.size:
            raise ValueError(
                "Every class needs at least one sample, to have a mean. "
                f"Received: {self.total} samples, none of class "
                f"{empty[0]}"
                + (f" and of {empty.size - 1} others" if empty[1:].size else "")
                + ". Pass data of all classes that the model was trained on."
            )
        means = self.sums / self.counts[:, None]
        within = self.products - (means * self.counts[:, None]).T @ means
        return means + self.shift, within / self.total


def whitening(means, covariance, count):
    """The map that makes classes unit Gaussians around the origin.

    Args:
        means: Array of shape `(K, D)`.
        covariance: Array of shape `(D, D)`, pooled within the classes.
        count: Integer, how many samples the covariance is of.

    Returns:
        Tuple of a `(D, D)` matrix `W`, symmetric, and the center, of shape
        `(D,)`: the mean of the means. `W @ (x - center)` are the embeddings.

    Example:

    >>> transform, center = whitening(
    ...     np.array([[0.0, 2.0], [4.0, 2.0]]), 9.0 * np.eye(2), 100
    ... )
    >>> transform.round(4).tolist(), center.tolist()
    ([[0.3333, 0.0], [0.0, 0.3333]], [2.0, 2.0])
    """
    center = means.mean(axis=0)
    dim = len(center)
    average = np.trace(covariance) / dim
    if not average > 0.0:
        # Every sample sits on the mean of its class: only the scale of the
        # means is known.
        average = np.square(means - center).mean() or 1.0
        return np.eye(dim) / np.sqrt(average), center
    rho = max(oracle_shrinkage(covariance, count), _MIN_SHRINKAGE)
    shrunk = (1.0 - rho) * covariance + rho * average * np.eye(dim)
    values, vectors = np.linalg.eigh(shrunk)
    transform = (vectors / np.sqrt(values)) @ vectors.T
    # Shrinkage makes the residuals smaller than one; undo that on average.
    residual = np.sum((transform @ covariance) * transform) / dim
    return transform / np.sqrt(residual), center


def oracle_shrinkage(covariance, count):
    """Oracle approximating shrinkage of a covariance towards a multiple of I.

    Formula:

    ```python
    rho = ((1 - 2 / D) * trace(S @ S) + trace(S) ** 2) / (
        (n + 1 - 2 / D) * (trace(S @ S) - trace(S) ** 2 / D)
    )
    ```

    bounded by one.

    Args:
        covariance: Array `S` of shape `(D, D)`.
        count: Integer `n`, the number of samples.

    Returns:
        Float in `[0, 1]`.

    Example:

    >>> oracle_shrinkage(np.eye(3), 10)
    1.0

    References:

    - Yilun Chen, Ami Wiesel, Yonina C. Eldar, Alfred O. Hero, Shrinkage
      Algorithms for MMSE Covariance Estimation, 2010.
    """
    dim = len(covariance)
    squares = np.sum(covariance * covariance)
    trace = np.trace(covariance) ** 2
    numerator = (1.0 - 2.0 / dim) * squares + trace
    denominator = (count + 1.0 - 2.0 / dim) * (squares - trace / dim)
    if numerator >= denominator:
        return 1.0
    return float(numerator / denominator)


def _before_head(model):
    """The symbolic input of the head, and its number of units."""
    outputs = getattr(model, "outputs", None) or []
    if len(outputs) != 1:
        raise ValueError(
            "Expected a built functional or sequential model with one output. "
            f"Received: model {getattr(model, 'name', model)!r} of type "
            f"{type(model).__name__} with {len(outputs)} symbolic outputs. "
            "Select one with `keras.Model(model.input, model.outputs[i])`; a "
            "subclassed model has to be written as a functional one."
        )
    tensor = outputs[0]
    while True:
        layer, node_index, _ = tensor._keras_history
        node = layer._inbound_nodes[node_index]
        if isinstance(layer, HALODense):
            features = node.input_tensors[0]
            return embedding_of(layer, features, model), layer.units
        if isinstance(layer, keras.layers.Dense):
            _check_activation(layer)
            return node.input_tensors[0], layer.units
        if isinstance(layer, keras.Model) and getattr(layer, "outputs", None):
            embeddings, units = _before_head(layer)
            inner = keras.Model(
                input_structure(layer),
                embeddings,
                name=free_name(model, "up_to_head"),
            )
            return inner(*node.arguments.args), units
        if not isinstance(layer, keras.layers.Softmax):
            if not isinstance(layer, keras.layers.Activation):
                break
            _check_activation(layer)
        tensor = node.input_tensors[0]
    raise ValueError(
        "The model must end in `keras.layers.Dense`, which an `Activation` or "
        "`Softmax` layer may follow, or in `keras_halo.HALODense`. Received: "
        f"a layer {layer.name!r} of type {type(layer).__name__} at the end of "
        f"model {model.name!r}. Put a `keras_halo.HALODense` where its logits "
        "are computed by hand; of two towers, `HALOSimilarity.to_head(keys)` "
        "makes one."
    )


def _check_activation(layer):
    name = getattr(layer.activation, "__name__", str(layer.activation))
    if name not in _ACTIVATIONS:
        raise ValueError(
            "The last `Dense` of a classifier has softmax, sigmoid or no "
            f"activation. Received: layer {layer.name!r} with activation "
            f"{name!r}. Convert the model that ends in its logits."
        )
