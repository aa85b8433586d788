import math
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_halo.layers.score_layer import ScoreLayer
from keras_halo.ops import ood_scores, packing
from keras_halo.ops.labels import ABSTAINED
from keras_halo.ops.model_output import FITTED
from keras_halo.ops.tensors import max_of_rows
from keras_halo.utils.checks import as_number
from keras_halo.utils.types import Shape, Tensor


@keras.saving.register_keras_serializable(package="keras_halo")
class Decision(ScoreLayer):
    """Turns packed scores into labels, with -1 for "I don't know".

    Append it to a trained model to deploy the decision with the model, in
    whatever format the model is exported to: who runs it needs no threshold
    and no rule. `rule.to_layer()` makes the layer that decides as a fitted
    rule of `keras_halo.rejection` does.

    Without a threshold the labels are those of `keras_halo.decode_predictions`:
    the model abstains by itself, where that is more probable than every class.
    With a threshold, the most probable class is the answer wherever the score
    is at most the threshold, also where the model by itself would abstain.
    A row of packed scores that holds NaN or an infinite value is rejected,
    whatever `ood` says of it, and so is an `ood` that is none.

    The layer cannot tell from which model its threshold comes: append it to
    the very model that the rule was fitted on.

    Formula:

    ```python
    label = argmax_k s_k
    threshold=None:   accepted = max_k s_k >= a
    otherwise:        accepted = ood_score <= threshold
    list:             accepted = ood_score <= threshold[argmax_k s_k]
    outputs = where(accepted, label, -1)
    ```

    Args:
        threshold: Float, the largest score that is accepted; a list of `K`
            floats for one threshold for each class that may be the most
            probable one; `None` for the model's own decision. Defaults to
            `None`.
        method: String, one of `keras_halo.OOD_METHODS`, the score that the
            threshold is meant for; `"fitted"` if the layer is called on the
            dictionary of a model of `keras_halo.fit_class_gaussians`; `None`
            if a score of another origin is passed as second argument. Defaults
            to `"abstain"`.
        **kwargs: Base layer keyword arguments, such as `name` and `dtype`.

    Call arguments:
        scores: Packed scores, a tensor of shape
            `(batch_size, ..., packed_width)`, or the dictionary of a model of
            `keras_halo.fit_class_gaussians`. With `method="fitted"` its entry
            `"ood"` is compared with the threshold.
        ood: Tensor of shape `(batch_size, ...)`, larger for outliers. Only,
            and always, with `method=None`.

    Output shape:
        `(batch_size, ...)`, int32: the class, or -1 for rejected.

    Raises:
        ValueError: If `threshold` is not finite or no threshold for each
            class, `method` is not known, the
            scores have fewer than 8 columns, or `ood` is missing, of another
            shape, or given without `method=None`.

    Example:

    >>> head = keras_halo.HALODense.reference(
    ...     2, centroid_initializer="identity"
    ... )
    >>> scores = head(np.array([[5, 0, 0, 0], [0, 0, 0, 0.0]], "float32"))
    >>> ops.convert_to_numpy(keras_halo.layers.Decision()(scores)).tolist()
    [0, -1]
    >>> decision = keras_halo.layers.Decision(threshold=2.0, method="nearest")
    >>> ops.convert_to_numpy(decision(scores)).tolist()
    [-1, 0]
    """

    def __init__(
        self,
        threshold: float | list[float] | None = None,
        method: str | None = "abstain",
        **kwargs: Any,
    ) -> None:
        threshold = _read_threshold(threshold)
        if method is not None:
            ood_scores.check_method(method, allow_fitted=True)
        elif threshold is None:
            raise ValueError(
                "`method=None` compares scores that are passed in with a "
                "threshold. Received: threshold=None. Give one, or leave both "
                "out for the model's own decision."
            )
        super().__init__(**kwargs)
        self.threshold = threshold
        self.method = method
        self.supports_masking = True

    @property
    def reads_fitted_score(self) -> bool:
        return self.method == FITTED

    def build(self, scores_shape: Shape, ood_shape: Shape = None) -> None:
        self._check_shapes(*self._both(scores_shape, ood_shape))
        self.built = True

    def _both(self, scores, ood):
        """Packed scores and the given score, or their shapes."""
        if not self.reads_fitted_score:
            return scores, ood
        is_dictionary = isinstance(scores, Mapping)
        if not is_dictionary or not {"scores", "ood"} <= set(scores):
            raise ValueError(
                "With `method='fitted'` the layer takes a dictionary with the "
                "entries 'scores' and 'ood'. Received: "
                + (
                    f"the entries {sorted(scores)}."
                    if is_dictionary
                    else "no dictionary."
                )
                + " Call it on the output of the model that the rule was "
                "fitted on."
            )
        return scores["scores"], scores["ood"]

    def _check_shapes(self, scores_shape, ood_shape):
        num_classes = packing.count_classes(scores_shape)
        if isinstance(self.threshold, list) and (
            len(self.threshold) != num_classes
        ):
            raise ValueError(
                "`threshold` must hold one number for each of the "
                f"{num_classes} classes. Received: {len(self.threshold)} "
                "numbers. Use the layer on the model that the rule was fitted "
                "on."
            )
        if self.method != FITTED and (ood_shape is None) != (
            self.method is not None
        ):
            raise ValueError(
                "A score is passed as second argument with `method=None`, and "
                f"only then. Received: method={self.method!r} and "
                + (
                    "no score. Call it as `decision(scores, ood)`."
                    if ood_shape is None
                    else "a score. Leave one of them out."
                )
            )
        if ood_shape is not None and not _fit(scores_shape[:-1], ood_shape):
            raise ValueError(
                "`ood` must hold one score for every row of packed scores. "
                f"Received: packed scores of shape {tuple(scores_shape)}, "
                f"`ood` of shape {tuple(ood_shape)}. Expected the shape "
                f"{tuple(scores_shape[:-1])}."
            )

    def call(self, scores: Tensor, ood: Tensor = None) -> Tensor:
        scores, ood = self._both(scores, ood)
        self._check_shapes(scores.shape, None if ood is None else ood.shape)
        scores = ops.cast(scores, self.head_dtype)
        labels = packing.best_class(scores)
        # Written so that NaN is rejected.
        if self.threshold is None:
            answers = packing.answer_logits(scores)
            best = max_of_rows(answers[..., :-1])[..., 0]
            accepted = best >= answers[..., -1]
            judged = best
        else:
            judged = self._judged(scores, ood)
            limits = self._limits()
            if isinstance(self.threshold, list):
                limits = self._of_class(limits, labels)
            accepted = judged <= limits
        accepted = ops.logical_and(accepted, self._is_usable(scores, judged))
        return ops.where(accepted, labels, ops.full_like(labels, ABSTAINED))

    def _limits(self):
        if not isinstance(self.threshold, list):
            return rounded_down(self.threshold, self.head_dtype)
        limits = [rounded_down(t, self.head_dtype) for t in self.threshold]
        return ops.convert_to_tensor(np.array(limits), self.head_dtype)

    def _of_class(self, limits, labels):
        # Not `ops.take`: PyTorch's way to ONNX does not know what Keras makes
        # it of.
        classes = ops.arange(0, len(self.threshold), dtype="int32")
        is_class = ops.equal(ops.expand_dims(labels, -1), classes)
        return ops.sum(ops.where(is_class, limits, 0.0), axis=-1)

    def _is_usable(self, scores, judged):
        """Whether the score and all of its row of packed scores are finite."""
        # A sum, since not every exporter knows `all`.
        finite = self._is_finite(scores)
        faults = ops.sum(ops.where(finite, 0.0, 1.0), axis=-1)
        return ops.logical_and(faults < 0.5, self._is_finite(judged))

    def _is_finite(self, values):
        # As comparisons: not every exporter knows `isfinite`.
        largest = float(np.finfo(self.head_dtype).max)
        return ops.logical_and(values >= -largest, values <= largest)

    def _judged(self, scores, given):
        if self.method in (None, FITTED):
            return ops.cast(given, self.head_dtype)
        return ood_scores.ood_score(scores, self.method)

    def _members(self, scores, given):
        """Whether each label is at most its threshold, where one is meant."""
        judged = self._judged(scores, given)
        logits = packing.unpack(scores).logits
        members = ood_scores.label_scores(logits, judged) <= self._limits()
        usable = ops.expand_dims(self._is_usable(scores, judged), -1)
        return ops.logical_and(members, usable)

    def compute_output_shape(
        self, scores_shape: Shape, ood_shape: Shape = None
    ) -> Shape:
        return tuple(self._both(scores_shape, ood_shape)[0][:-1])

    def compute_mask(
        self, inputs: Tensor, previous_mask: Tensor = None
    ) -> Tensor:
        if isinstance(previous_mask, Mapping):
            return previous_mask["scores"]
        return previous_mask

    def compute_output_spec(self, scores: Tensor, ood: Tensor = None) -> Any:
        scores, ood = self._both(scores, ood)
        self._check_shapes(scores.shape, None if ood is None else ood.shape)
        return keras.KerasTensor(tuple(scores.shape[:-1]), dtype="int32")

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "threshold": self.threshold,
            "method": self.method,
        }


def rounded_down(value, dtype):
    """The largest number of a dtype that is at most a given one.

    A float32 score is at most a float64 threshold exactly where it is at most
    this; the nearest number of float32 could be above the threshold.

    Args:
        value: Float.
        dtype: String, a dtype of NumPy.

    Returns:
        Float.

    Example:

    >>> rounded_down(0.1, "float32") <= 0.1 < float(np.float32(0.1))
    True
    """
    with np.errstate(over="ignore"):
        rounded = np.dtype(dtype).type(value)
    if float(rounded) > value:
        rounded = np.nextafter(rounded, rounded.dtype.type(-math.inf))
    return float(rounded)


def _read_threshold(threshold):
    """`None`, a float, or a list of floats; raises `ValueError` otherwise."""
    if threshold is None:
        return None
    # There are two classes at least.
    if isinstance(threshold, (list, tuple)) and len(threshold) > 1:
        return [
            _as_threshold(value, f"threshold[{index}]", "")
            for index, value in enumerate(threshold)
        ]
    return _as_threshold(
        threshold,
        "threshold",
        ", a list of one for each class, or `None` for the model's own "
        "decision",
    )


def _as_threshold(value, argument, alternatives):
    return as_number(
        value,
        argument,
        math.isfinite,
        f"a finite number{alternatives}",
        "Fit a rule of `keras_halo.rejection` and use `rule.to_layer()`.",
    )


def _fit(expected, shape):
    return len(expected) == len(shape) and all(
        a is None or b is None or a == b
        for a, b in zip(expected, shape, strict=True)
    )
