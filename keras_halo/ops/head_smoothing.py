"""Refuses a loss with another label smoothing than its head.

A head with the margin of the published method makes it of a label smoothing,
which the loss has to have as well. Packed scores hold it, but a graph that is
traced, and a GPU, cannot be asked for values. So a layer also notes it beside
the very tensor that it returns, of which the loss that gets this tensor is told
before anything is computed. Where a tensor comes otherwise, such as after a
further operation, the loss is NaN by what the scores hold.
"""

import weakref

import numpy as np

from keras_halo.ops import packing
from keras_halo.ops.model_output import is_symbolic_or_tensor
from keras_halo.ops.tensors import ERRORS_COST_WEIGHTS
from keras_halo.utils.keras_private import is_torch_compiling

_AFTER_FIT = ""
if ERRORS_COST_WEIGHTS:
    _AFTER_FIT = (
        " If this was `fit`, build or load the model again: on JAX an error "
        "within a step leaves a model of Keras without its weights."
    )

# By the `id` of a tensor: a reference to it, and the label smoothing. Tensors
# that JAX traces take no attribute, and comparing them is an operation.
_NOTES = {}


def note_label_smoothing(scores, label_smoothing):
    """Notes from which label smoothing a head that is called takes its margin.

    Args:
        scores: Tensor of packed scores, the one that the layer returns.
        label_smoothing: Float in `[0, 1)`.

    Example:

    >>> scores = ops.zeros((2, 9))
    >>> note_label_smoothing(scores, 0.1)
    >>> check_label_smoothing_of_head(scores, 0.1)
    """
    if is_torch_compiling():
        # A graph that is compiled takes no notes.
        return
    key = id(scores)
    reference = weakref.ref(scores, lambda _: _NOTES.pop(key, None))
    _NOTES[key] = reference, label_smoothing


def check_label_smoothing_of_head(scores, label_smoothing):
    """Raises `ValueError` where the head is known to have another one.

    Args:
        scores: Packed scores, a tensor or a NumPy array.
        label_smoothing: Float in `[0, 1)`, that of the loss.

    Example:

    >>> scores = keras_halo.HALODense.reference(3)(np.ones((2, 8), "float32"))
    >>> check_label_smoothing_of_head(scores, 0.0)
    Traceback (most recent call last):
        ...
    ValueError: Head and loss must have the same `label_smoothing`: ...
    """
    packed = packing.smoothing_background
    for of_head in _label_smoothings_of(scores):
        if packed(of_head) != packed(label_smoothing):
            raise ValueError(
                "Head and loss must have the same `label_smoothing`: a head "
                "with `abstain_rate=None`, and `HALOSimilarity`, take the "
                "margin of the abstain class from it, against which the loss "
                "trains. Received: label_smoothing="
                f"{round(of_head, 6) or of_head} of the head, and "
                f"label_smoothing={label_smoothing} of the loss. Give both "
                f"the same value.{_AFTER_FIT}"
            )


def _label_smoothings_of(scores):
    """Those that are known of the heads which emitted the scores."""
    if is_symbolic_or_tensor(scores):
        if is_torch_compiling():
            return []
        reference, label_smoothing = _NOTES.get(id(scores), (None, None))
        # Another tensor may have got the `id` of one that is gone.
        is_noted = reference is not None and reference() is scores
        return [label_smoothing] if is_noted else []
    scores = np.asarray(scores)
    if scores.shape[-1] < packing.MIN_COLUMNS:
        # The only key of a batch.
        return []
    parts = packing.unpack(scores)
    found = parts.label_smoothing[parts.embedding_dim >= 2.0]
    return np.unique(found[found >= 0.0]).tolist()
