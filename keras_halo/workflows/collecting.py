"""One pass over labelled data, for what is fitted to embeddings."""

import contextlib

import keras
import numpy as np
from keras import ops

from keras_halo.ops.class_statistics import check_counts
from keras_halo.ops.labels import class_indices
from keras_halo.utils.batches import count_batches, counted_positions
from keras_halo.workflows.predicting import embedded_batches
from keras_halo.workflows.predictor import may_mask


def check_labels(data, model, num_classes, rank, least, option=""):
    """Refuses labels and weights of arrays before anything is predicted.

    Args:
        data: As `labelled_data` returns it. Datasets are checked as they come.
        model: Keras model of the data. One that may mask positions tells which
            of their labels count only when it predicts.
        num_classes: Integer, the number `K` of classes.
        rank: Integer, how many axes one label a sample or position has.
        least: Integer, how many samples every class needs; 0 for no check.
        option: String, see `check_counts`. Defaults to `""`.

    Raises:
        ValueError: If labels or weights do not fit, or a class has too few.
    """
    if not isinstance(data, tuple) or (rank > 1 and may_mask(model)):
        return
    _, y, sample_weight = data
    y = np.asarray(ops.convert_to_numpy(y))
    shape = y.shape[:rank]
    if sample_weight is not None:
        weights = ops.convert_to_numpy(sample_weight)
        y = y[counted_positions(weights, shape, "x")]
        shape = y.shape[:1]
    labels = class_indices(y, num_classes, shape)
    counts = np.bincount(labels.ravel(), minlength=num_classes)
    check_counts(counts, least, option)


def collect(embedder, data, batch_size, verbose, *updates):
    """Hands the embeddings and labels of what counts on, batch by batch.

    Args:
        embedder: Keras model from inputs to embeddings.
        data: As `labelled_data` returns it.
        batch_size: Optional integer, for arrays.
        verbose: `"auto"`, 0, 1 or 2, as in `model.predict`.
        *updates: Functions of embeddings of shape `(..., D)` and labels.

    Raises:
        ValueError: If there are no data, or labels or weights do not fit.
    """
    total = count_batches(data, batch_size)
    progress = keras.utils.Progbar(
        total, verbose=1 if verbose == "auto" else verbose
    )
    seen = 0
    found = embedded_batches(embedder, data, batch_size)
    with contextlib.closing(found) as batches:
        for embeddings, labels in batches:
            for update in updates:
                update(embeddings, labels)
            seen += 1
            progress.update(seen)
    if not seen:
        raise ValueError(
            "Expected at least one batch. Received: no data. Check the path "
            "of the data, or the condition that selected from it."
        )
    if total is None:
        progress.update(seen, finalize=True)
