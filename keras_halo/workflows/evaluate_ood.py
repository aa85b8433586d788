from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

from keras_halo import metrics
from keras_halo.ops import packing
from keras_halo.ops.labels import check_ignorable
from keras_halo.utils.batches import (
    check_readable,
    count_batches,
    labelled_data,
)
from keras_halo.utils.checks import (
    check_batch_size,
    check_ignore_class,
    check_model,
)
from keras_halo.utils.progress import Progress
from keras_halo.utils.types import Data
from keras_halo.workflows.collecting import check_labels
from keras_halo.workflows.graph import warn_of_idle_statistics
from keras_halo.workflows.ood_report import (
    KnownResult,
    OODReport,
    UnknownResult,
)
from keras_halo.workflows.predicting import (
    check_score_method,
    check_sets,
    name_of_method,
    predict_answers,
    scores_shape,
)
from keras_halo.workflows.predictor import Predictor

# How many nats ahead of the best class abstaining is taken to be at most where
# there are to be probabilities: with more, float64 would hold zeros only.
_MOST_AHEAD = 600.0


def evaluate_ood(
    model: keras.Model,
    known: Data,
    unknown: Mapping[str, Data],
    method: str | Callable[..., Any] = "abstain",
    batch_size: int | None = None,
    verbose: str | int = "auto",
    num_bins: int = 15,
    ignore_class: int | None = None,
) -> OODReport:
    """Measures what a model knows, and whether it knows what it does not.

    Every data set is read once, batch by batch, so that a dataset that
    shuffles itself keeps labels and predictions together. Outputs with more
    axes than samples and columns, of a token or pixel head, are flattened:
    every position counts as a sample. Positions that the model masks
    (`Embedding(mask_zero=True)`, `Masking`) are left out, as loss and metrics
    leave them out, and so is what has a sample weight of zero; other weights
    have no effect.

    Args:
        model: Keras model whose output is packed scores, those of
            `keras_halo.HALODense`; or a dictionary with packed scores under
            `"scores"` and a fitted score under `"ood"`.
        known: Test data of the known classes, with labels: a tuple `(x, y)` or
            `(x, y, sample_weight)` of arrays, or a dataset that yields such
            tuples: `tf.data.Dataset`, torch `DataLoader`,
            `keras.utils.PyDataset` or a generator. Labels are integers or a
            distribution, one-hot or soft.
        unknown: Dictionary of name to data of no known class: an array, or a
            dataset as above. Labels are not looked at. Several inputs are a
            list or a dictionary; a tuple means `(x, y)`.
        method: The score, larger for outliers: a name that
            `keras_halo.ood_score` knows; `"fitted"` for the model's own entry
            `"ood"`; or a callable that takes packed scores of shape
            `(N, packed_width)` and returns `N` scores. Defaults to `"abstain"`.
        batch_size: Optional integer, the batch size for arrays. Defaults to
            `None`, which means 32.
        verbose: 0 for silence, 1 for a progress bar for each set, 2 for a line
            for each set. `"auto"`, the default, is 1. Where the output is no
            terminal, 1 means 2.
        num_bins: Integer, the number of bins of the calibration error, at most
            the number of known samples. Defaults to `15`.
        ignore_class: Optional integer, the label of known positions to leave
            out, such as -1 or 255 for void pixels. Defaults to `None`.

    Returns:
        `OODReport`: `print` it for a table; `to_dict`, `to_markdown` and
        `plot` are its other forms.

    Raises:
        ValueError: If a set is empty, infinite, or has no name, labels are
            missing or do not fit, the model emits no packed scores or NaN, or
            an argument is not one of those listed.
        ImportError: If scikit-learn is missing.

    Example:

    >>> inputs = keras.Input((4,))
    >>> head = keras_halo.HALODense(2, None, centroid_initializer="identity")
    >>> model = keras.Model(inputs, head(inputs))
    >>> x = 2 * np.array([[1, -1, 0, 0], [-1, 1, 0, 0]] * 10, "float32")
    >>> report = keras_halo.evaluate_ood(
    ...     model, (x, [0, 1] * 10), {"far": 50 * x}, verbose=0
    ... )
    >>> report["far"].auroc, report.known.accuracy
    (1.0, 1.0)

    References:

    - Jingyang Zhang et al., OpenOOD v1.5: Enhanced benchmark for
      out-of-distribution detection, 2023.
    """
    check_model(model)
    check_score_method(method)
    check_sets(unknown)
    batch_size = check_batch_size(batch_size)
    num_bins = metrics.calibration.check_num_bins(num_bins)
    ignore_class = check_ignore_class(ignore_class)
    progress = Progress(verbose, num_sets=1 + len(unknown))
    sets = {f"unknown[{name!r}]": data for name, data in unknown.items()}
    for where, data in {"known": known, **sets}.items():
        check_readable(data, where)
    if isinstance(known, tuple) and len(known) > 1:
        # Labels and weights that are none show before anything is predicted.
        known = labelled_data(known)
        _check_known(known, model, ignore_class)

    warn_of_idle_statistics(model)
    predictor = Predictor(model)

    def answers(data, where, name, **kwargs):
        progress.start(name, count_batches(data, batch_size))
        found = predict_answers(
            predictor,
            data,
            where,
            method,
            batch_size,
            on_batch=progress.step,
            **kwargs,
        )
        progress.finish(len(found.score))
        return found

    known_result = _known_result(
        answers(
            known,
            "known",
            "known",
            with_labels=True,
            ignore_class=ignore_class,
        ),
        num_bins,
    )
    return OODReport(
        method=name_of_method(method),
        known=known_result,
        unknown=tuple(
            _unknown_result(
                name, known_result.scores, answers(data, where, name)
            )
            for (where, data), name in zip(sets.items(), unknown, strict=True)
        ),
        num_bins=min(num_bins, known_result.count),
    )


def _check_known(known, model, ignore_class):
    """Refuses labels and weights of arrays before anything is predicted."""
    shape = scores_shape(model)
    if shape is None:
        return

    def read(labels, num_classes, leading_shape):
        labels = metrics.calibration.read_targets(
            labels, num_classes, leading_shape, ignore_class
        )
        check_ignorable(
            ignore_class,
            labels.ndim == len(leading_shape),
            "`known` with a distribution",
        )
        return labels

    check_labels(
        known,
        model,
        packing.count_classes(shape),
        shape[:-1],
        0,
        where="known",
        read=read,
    )


def _known_result(answers, num_bins):
    labels = answers.labels
    logits = packing.answer_logits(answers.packed).astype("float64")
    # From logits: where abstaining is far ahead, probabilities underflow.
    classes, abstaining = logits[:, :-1], logits[:, -1:]
    best = classes.max(axis=-1, keepdims=True)
    bounded = np.minimum(abstaining, best + _MOST_AHEAD)
    probabilities = _softmax(np.concatenate([classes, bounded], -1))[:, :-1]
    renormalized = _softmax(classes)
    num_bins = min(num_bins, len(logits))

    def calibration(name, p, log_p):
        return {
            f"ece_{name}": metrics.expected_calibration_error(
                labels, p, num_bins
            ),
            f"nll_{name}": float(-_mean_over_labels(labels, log_p)),
            f"brier_{name}": metrics.brier_score(labels, p),
        }

    # Before anything is counted: they check labels and their range.
    calibrations = {
        **calibration("renormalized", renormalized, _log_softmax(classes)),
        **calibration(
            "with_abstain", probabilities, _log_softmax(logits)[:, :-1]
        ),
    }
    correct = _mass_on(labels, classes.argmax(axis=-1))
    answered = ~answers.abstained
    return KnownResult(
        count=len(correct),
        accuracy=float(np.mean(correct * answered)),
        accuracy_answered=float(correct[answered].mean())
        if answered.any()
        else float("nan"),
        accuracy_forced=float(correct.mean()),
        abstention_rate=float(1.0 - answered.mean()),
        **calibrations,
        aurc=metrics.aurc(1.0 - correct, answers.score),
        augrc=metrics.augrc(1.0 - correct, answers.score),
        scores=answers.score,
        labels=labels,
        probabilities=probabilities,
        errors=1.0 - correct,
    )


def _softmax(logits):
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def _log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _mean_over_labels(labels, values):
    """Mean of what there is for the label of each sample."""
    if labels.ndim == 1:
        rows = np.arange(len(labels))
        return np.mean(values[rows, labels.astype("int64")])
    return np.mean(np.sum(labels * values, axis=-1))


def _mass_on(labels, predicted):
    """Mass of each label on the predicted class: 0 or 1 for integer labels."""
    if labels.ndim == 1:
        return (labels == predicted).astype("float64")
    mass = np.take_along_axis(labels, predicted[:, None], axis=-1)[:, 0]
    return mass.astype("float64")


def _unknown_result(name, known_scores, answers):
    score = answers.score
    return UnknownResult(
        name=name,
        count=len(score),
        auroc=metrics.auroc(known_scores, score),
        aupr_unknown_positive=metrics.aupr(
            known_scores, score, positive="unknown"
        ),
        aupr_known_positive=metrics.aupr(known_scores, score, positive="known"),
        fpr95_known_positive=metrics.fpr_at_recall(
            known_scores, score, positive="known"
        ),
        fpr95_unknown_positive=metrics.fpr_at_recall(
            known_scores, score, positive="unknown"
        ),
        abstention_rate=float(answers.abstained.mean()),
        scores=score,
    )
