import contextlib

import keras
import numpy as np

from keras_halo.layers.class_gaussians import ClassGaussians
from keras_halo.utils.batches import (
    check_readable,
    count_batches,
    counted,
    labelled_data,
)
from keras_halo.workflows.graph import find_head, head_tensors, input_structure
from keras_halo.workflows.predicting import embedded_batches


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


def _embed(embedder, x, y, sample_weight, batch_size, verbose):
    """Embeddings and labels of what counts, as NumPy arrays."""
    data = labelled_data(x, y, sample_weight)
    if isinstance(data, tuple):
        x, y, sample_weight = data
        embeddings = embedder.predict(x, batch_size=batch_size, verbose=verbose)
        return counted(embeddings, y, sample_weight)
    x = data
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
