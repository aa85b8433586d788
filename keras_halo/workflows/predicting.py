"""Packed scores, out-of-distribution scores and labels of a whole data set."""

import contextlib
import dataclasses
from collections.abc import Mapping

import keras
import numpy as np

from keras_halo.ops import packing
from keras_halo.ops.labels import check_ignorable, fitting_labels
from keras_halo.ops.model_output import (
    FITTED,
    ModelOutput,
    read_model_output,
    require_fitted,
)
from keras_halo.ops.ood_scores import OOD_METHODS, check_method, ood_score
from keras_halo.utils.batches import counted, read_batches
from keras_halo.utils.checks import check_finite, to_array
from keras_halo.utils.weights import counted_positions


@dataclasses.dataclass(frozen=True, eq=False)
class Answers:
    """What a model says of the samples of one data set, flattened.

    Args:
        packed: Array of shape `(N, packed_width)`.
        score: Array of shape `(N,)`, larger for outliers.
        labels: Integers of shape `(N,)`, a distribution of shape `(N, K)`, or
            `None`.
    """

    packed: np.ndarray
    score: np.ndarray
    labels: np.ndarray | None

    @property
    def abstained(self):
        """Boolean array of shape `(N,)`."""
        logits = packing.answer_logits(self.packed)
        return np.argmax(logits, axis=-1) == logits.shape[-1] - 1


def check_score_method(method):
    """Raises `ValueError` unless `method` can score a model's output.

    Args:
        method: A name that `keras_halo.ood_score` knows, `"fitted"`, or a
            callable that makes scores of packed scores.

    Example:

    >>> check_score_method("distance")
    Traceback (most recent call last):
        ...
    ValueError: `method` must be one of 'abstain', ... 'fitted' or a ...
    """
    if callable(method):
        return
    try:
        check_method(method, allow_fitted=True)
    except ValueError:
        names = ", ".join(repr(name) for name in (*OOD_METHODS, FITTED))
        raise ValueError(
            f"`method` must be one of {names} or a callable that takes packed "
            f"scores and returns one score a row. Received: method={method!r}."
        ) from None


def name_of_method(method):
    """Returns the name under which a report states the score.

    Example:

    >>> name_of_method("abstain")
    'abstain'
    """
    if not callable(method):
        return method
    name = getattr(method, "__name__", type(method).__name__)
    # A line break would end the line of a report, a backtick its code.
    return " ".join(str(name).replace("`", "'").split())


def check_sets(unknown, reserved=()):
    """Raises `ValueError` unless `unknown` maps names to data.

    Args:
        unknown: What should be a dictionary of name to data.
        reserved: Names that are taken. Defaults to `()`.

    Example:

    >>> check_sets(np.zeros((3, 2)))
    Traceback (most recent call last):
        ...
    ValueError: `unknown` must be a dictionary of name to inputs or dataset, ...
    """
    if not isinstance(unknown, Mapping) or not unknown:
        raise ValueError(
            "`unknown` must be a dictionary of name to inputs or dataset, with "
            "at least one entry, such as {'noise': x_noise}. Received: "
            + (
                "an empty dictionary."
                if isinstance(unknown, Mapping)
                else f"{type(unknown).__name__}."
            )
        )
    for name in unknown:
        if not isinstance(name, str) or not name.strip() or name in reserved:
            raise ValueError(
                "The names of unknown sets must be strings that are not empty"
                + (f" and none of {tuple(reserved)}" if reserved else "")
                + f". Received: {name!r}. Rename the set."
            )


def scores_shape(model):
    """The shape of the packed scores of a model, or `None`.

    Args:
        model: Keras model. One without a graph says only when it predicts, and
            what is wrong with the outputs of another shows then too.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras_halo.HALODense(3)])
    >>> scores_shape(model)
    (None, 9)
    """
    outputs = getattr(model, "outputs", None)
    if not outputs:
        return None
    output = outputs[0] if len(outputs) == 1 else model.output
    try:
        shape = tuple(read_model_output(output).scores.shape)
        packing.count_classes(shape)
    except ValueError:
        return None
    return shape


def predict_answers(
    predictor,
    data,
    where,
    method,
    batch_size=None,
    with_labels=False,
    ignore_class=None,
    max_batches=None,
    on_batch=None,
):
    """Predicts a data set in one pass, so that labels stay with predictions.

    Args:
        predictor: `Predictor` of a Keras model that emits packed scores.
            Positions that the model masks are left out.
        data: Arrays or a dataset, see `read_batches`.
        where: String, the name by which an error calls the data.
        method: See `check_score_method`.
        batch_size: Optional integer, for arrays. Defaults to `None`.
        with_labels: Boolean, whether labels are needed. Defaults to `False`.
        ignore_class: Optional integer, the label of positions to leave out.
            Defaults to `None`.
        max_batches: Optional integer, how many batches to read. Defaults to
            `None`, which means all.
        on_batch: Optional function called after each batch.

    Returns:
        `Answers`.

    Raises:
        ValueError: If the data are empty, labels are missing or do not fit, or
            the model emits no packed scores, or NaN.
    """
    parts = []
    with (
        inference_mode(predictor.model),
        contextlib.closing(read_batches(data, batch_size)) as batches,
    ):
        for index, (x, y, sample_weight) in enumerate(batches):
            if index == max_batches:
                break
            packed, fitted, mask = _predict_batch(predictor, x, where)
            labels = _flat_labels(y, packed, where) if with_labels else None
            kept = counted_positions(
                sample_weight, packed.shape[:-1], where, mask
            ).ravel()
            kept &= _not_ignored(labels, ignore_class, kept, where)
            parts.append(
                [
                    None if part is None else part[kept]
                    for part in (_flat(packed), fitted, labels)
                ]
            )
            if on_batch is not None:
                on_batch()
    if not sum(len(packed) for packed, _, _ in parts):
        raise ValueError(
            f"`{where}` must hold at least one sample that is neither masked "
            "nor ignored nor of weight zero. Received: none. Check the path of "
            "the data set, or the condition that selected from it."
        )
    packed, fitted, labels = (
        None if column[0] is None else np.concatenate(column)
        for column in zip(*parts, strict=True)
    )
    packing.check_packed(packed, argument=f"model output on {where}")
    return Answers(packed, _score(packed, fitted, method, where), labels)


@contextlib.contextmanager
def inference_mode(model):
    """Takes a torch model out of training mode, as `model.predict` does."""
    if keras.backend.backend() != "torch" or not model.training:
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()


def _predict_batch(predictor, x, where):
    """Packed scores, of a batch of any shape, fitted scores, and the mask."""
    output, mask = predictor.predict_on_batch(x)
    output, fitted = read_model_output(output, f"the output on {where}")
    size = len(keras.tree.flatten(x)[0])
    if len(output) != size:
        # Under a distribution strategy each replica answers the whole batch.
        strategy = getattr(predictor.model, "distribute_strategy", None)
        replicas = getattr(strategy, "num_replicas_in_sync", 1)
        if len(output) != size * replicas:
            raise ValueError(
                f"The model must answer every sample of `{where}`. Received: "
                f"{len(output)} rows for a batch of {size}."
            )
        output = output[:size]
        fitted = None if fitted is None else fitted[:size]
        mask = None if mask is None else mask[:size]
    packing.count_classes(output.shape)
    return output, None if fitted is None else fitted.reshape(-1), mask


def _flat(packed):
    return packed.reshape(-1, packed.shape[-1])


def _flat_labels(y, packed, where):
    """Labels as `(N,)` integers or an `(N, K)` distribution."""
    shape, num_classes = packed.shape[:-1], packing.count_classes(packed.shape)
    if y is None or isinstance(y, (dict, list)):
        raise ValueError(
            f"`{where}` must come with labels that fit the model's "
            f"{num_classes} classes. Received: no labels. Pass a tuple "
            "`(x, y)` or a dataset that yields such tuples."
        )
    labels = fitting_labels(y, shape, num_classes, f"`{where}`")
    return labels.reshape(-1, *labels.shape[len(shape) :])


def _not_ignored(labels, ignore_class, kept, where):
    """Boolean array of shape `(N,)`: what has another label."""
    if ignore_class is None or labels is None:
        return np.ones_like(kept)
    check_ignorable(
        ignore_class, labels.ndim == 1, f"`{where}` with a distribution"
    )
    return labels != ignore_class


def _score(packed, fitted, method, where):
    if method == FITTED:
        score = require_fitted(
            ModelOutput(packed, fitted), f"the output on {where}"
        )
    elif callable(method):
        score = keras.ops.convert_to_numpy(method(packed))
    else:
        score = ood_score(packed, method)
    source = f"scores of method={name_of_method(method)!r} on {where}"
    score = to_array(score, source)
    if score.shape != (len(packed),):
        raise ValueError(
            f"`{source}` must be {len(packed)} finite numbers, one a sample "
            f"and larger for outliers. Received: shape={score.shape}. Return "
            "one number for each row of packed scores."
        )
    check_finite(score, source, "Look for logarithms and quotients of zero.")
    return score


def embedded_batches(predictor, data, batch_size, keep):
    """Embeddings and labels of what counts, batch by batch; to be closed.

    Positions that the model masks do not count.

    Args:
        predictor: `Predictor` of a Keras model from inputs to embeddings.
        data: Arrays or a dataset with labels, see `read_batches`.
        batch_size: Optional integer, for arrays.
        keep: Function that is called with inputs and all of their embeddings.

    Yields:
        Pairs of NumPy arrays, see `counted`.

    Raises:
        ValueError: If labels are missing, or they or weights do not fit.
    """
    with (
        inference_mode(predictor.model),
        contextlib.closing(read_batches(data, batch_size)) as batches,
    ):
        for batch, labels, weights in batches:
            if labels is None:
                raise ValueError(
                    "Labels are missing. Received: `x` without labels and "
                    "y=None. Pass `y`, or a dataset of batches `(x, y)`."
                )
            embeddings, mask = predictor.predict_on_batch(batch)
            keep(batch, embeddings)
            yield counted(embeddings, labels, weights, mask)
