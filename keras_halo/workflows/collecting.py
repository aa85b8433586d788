"""One pass over labelled data, for what is fitted to embeddings."""

import contextlib

import keras
import numpy as np
from keras import ops

from keras_halo.ops.class_statistics import (
    ROUNDINGS,
    check_counts,
    epsilon,
)
from keras_halo.ops.labels import class_indices, fitting_labels
from keras_halo.utils.batches import count_batches
from keras_halo.utils.weights import counted_positions
from keras_halo.workflows.predicting import embedded_batches, inference_mode
from keras_halo.workflows.predictor import Predictor, may_mask

# How many inputs are predicted once more to measure rounding.
_REPEATED = 16


def check_labels(
    data,
    model,
    num_classes,
    positions,
    least,
    option="",
    where="x",
    read=class_indices,
):
    """Refuses labels and weights of arrays before anything is predicted.

    Args:
        data: As `labelled_data` returns it. Datasets are checked as they come.
        model: Keras model of the data. One that may mask positions tells which
            of their labels count only when it predicts.
        num_classes: Integer, the number `K` of classes.
        positions: Tuple, the shape `(batch_size, ...)` of one label a sample
            or position. Lengths may be `None`.
        least: Integer, how many samples every class needs; 0 where some may
            have none, `None` where all may.
        option: String, see `check_counts`. Defaults to `""`.
        where: String, the name by which an error calls the data. Defaults to
            `"x"`.
        read: Function of labels, `num_classes` and the shape of one label a
            position, which returns checked labels. Defaults to
            `class_indices`.

    Raises:
        ValueError: If labels or weights do not fit, or a class has too few.
    """
    # `TextVectorization` makes another shape than its graph says.
    if not isinstance(data, tuple) or any(
        tensor.dtype == "string" for tensor in model.inputs
    ):
        return
    _, y, sample_weight = data
    y = np.asarray(ops.convert_to_numpy(y))
    shape = _filled(positions, y.shape)
    fitting_labels(y, shape, num_classes, f"`{where}`")
    if len(shape) > 1 and may_mask(model):
        return
    if sample_weight is not None:
        weights = ops.convert_to_numpy(sample_weight)
        y = y[counted_positions(weights, shape, where)]
        shape = y.shape[:1]
        if least is not None and not y.size:
            raise ValueError(
                f"`{where}` must hold at least one sample with a weight other "
                "than zero. Received: none. Look for what made the weights."
            )
    labels = read(y, num_classes, shape)
    if not least:
        return
    counts = np.bincount(labels.ravel(), minlength=num_classes)
    check_counts(counts, least, option)


def _filled(positions, shape):
    """Positions with lengths that are not known taken from a shape."""
    known = (*shape, *(None for _ in positions))
    return tuple(
        known[axis] if length is None else length
        for axis, length in enumerate((None, *positions[1:]))
    )


def collect(embedder, data, batch_size, verbose, *updates):
    """Hands the embeddings and labels of what counts on, batch by batch.

    Args:
        embedder: Keras model from inputs to embeddings.
        data: As `labelled_data` returns it.
        batch_size: Optional integer, for arrays.
        verbose: `"auto"`, 0, 1 or 2, as in `model.predict`.
        *updates: Functions of embeddings of shape `(..., D)` and labels.

    Returns:
        `Repetition` of the first inputs.

    Raises:
        ValueError: If there are no data, or labels or weights do not fit.
    """
    total = count_batches(data, batch_size)
    progress = keras.utils.Progbar(
        total, verbose=1 if verbose == "auto" else verbose
    )
    seen = 0
    predictor = Predictor(embedder, read=lambda embeddings: embeddings)
    repetition = Repetition(predictor)
    found = embedded_batches(predictor, data, batch_size, repetition.keep)
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
    return repetition


class Repetition:
    """Predicts inputs again, one by one, to see what rounding does to them.

    What a network computes carries the rounding of its largest intermediate
    values, which a feature does not show. In a batch of another size they are
    summed in another order.

    Args:
        predictor: `Predictor` of a model from inputs to features.
    """

    def __init__(self, predictor):
        self._predictor = predictor
        self._inputs = self._features = None

    def keep(self, inputs, features):
        """Keeps some of the first inputs, and the features found of them."""
        if self._inputs is None:
            self._inputs = keras.tree.map_structure(
                lambda array: array[:_REPEATED], inputs
            )
            self._features = np.array(features[:_REPEATED])

    def resolution(self, deviations, resolution):
        """What must be exceeded by the deviation of a feature that varies.

        Nothing is predicted where no feature varies so little that rounding
        could be all of it. What differs by more, as with dropout that stays
        on, is no rounding.

        Args:
            deviations: Array of shape `(D,)`.
            resolution: Array of shape `(D,)`, what is known without a
                repetition.

        Returns:
            Array of shape `(D,)`.
        """
        features = self._features
        largest = float(np.abs(features).max(initial=0.0))
        limit = largest * np.sqrt(epsilon(features.dtype))
        doubtful = (deviations > resolution) & (deviations < limit)
        # Batches of one size, as of a stateful network, have no other size.
        fixed = any(
            tensor.shape[0] is not None
            for tensor in self._predictor.model.inputs
        )
        if fixed or not doubtful.any():
            return resolution
        measured = ROUNDINGS * self._differences().astype("float64")
        return np.maximum(resolution, np.minimum(measured, limit))

    def _differences(self):
        """The largest difference of each feature, of shape `(D,)`."""
        # What came alone is given company.
        copies = 2 if len(self._features) == 1 else 1
        again = []
        with inference_mode(self._predictor.model):
            for i in range(len(self._features)):
                inputs = keras.tree.map_structure(
                    lambda array, i=i: np.concatenate(
                        [array[i : i + 1]] * copies
                    ),
                    self._inputs,
                )
                found, _ = self._predictor.predict_on_batch(inputs)
                again.append(found[:1])
        apart = np.abs(np.concatenate(again) - self._features)
        return apart.reshape(-1, apart.shape[-1]).max(axis=0)
