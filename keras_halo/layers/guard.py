import functools
import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_halo.layers.decision import Decision, rounded_down
from keras_halo.ops import packing
from keras_halo.utils.types import Tensor

# What the layer reads of a certificate.
_ENTRIES = {"calibration", "config", "ranks", "threshold"}


def method_of(certificate):
    """Returns the name of the score that a rule judges by.

    Args:
        certificate: Dictionary, what `rule.certificate()` returns.

    Example:

    >>> method_of({"config": {"method": "abstain"}})
    'abstain'
    """
    # A rule that wraps another says it apart from its own arguments.
    return certificate.get("method") or certificate["config"]["method"]


@keras.saving.register_keras_serializable(package="keras_halo")
class Guard(Decision):
    """Decides as a fitted rule does, and carries the certificate of the rule.

    `keras_halo.guard` appends it to a model. The label is that of the layer
    `rule.to_layer()`; beside it stands what it was decided by.

    Formula:

    ```python
    probabilities = softmax([s_1, ..., s_K, a])[:K]
    p_value = (1 + #{calibration scores >= score}) / (n + 1)
    ```

    Args:
        certificate: Dictionary, what `rule.certificate()` returns.
        **kwargs: Base layer keyword arguments, such as `name`.

    Call arguments:
        scores: Packed scores, a tensor of shape
            `(batch_size, ..., packed_width)`; of a model of
            `keras_halo.fit_class_gaussians` its dictionary.

    Output shape:
        Dictionary: `"label"`, int32 of shape `(batch_size, ...)`, -1 for
        rejected; `"probabilities"`, of shape `(batch_size, ..., K)`, what is
        missing to one is the probability of abstaining; `"score"`, of shape
        `(batch_size, ...)`, larger for outliers, NaN where a row holds what is
        not finite; and `"p_value"` like it, the chance that a known input
        scores as high, unless the rule was fitted on outliers. With a
        `LabelSetRule` also `"label_set"`, booleans of shape
        `(batch_size, ..., K)`; the label is the most probable one in the set.

    Raises:
        ValueError: If `certificate` is none.

    Example:

    >>> rng = np.random.default_rng(0)
    >>> head = keras_halo.HALODense(3)
    >>> scores = ops.convert_to_numpy(head(rng.normal(size=(100, 4))))
    >>> rule = keras_halo.rejection.CoverageRule(0.9).fit(scores)
    >>> answers = keras_halo.layers.Guard(rule.certificate())(scores)
    >>> sorted(answers)
    ['label', 'p_value', 'probabilities', 'score']
    """

    def __init__(self, certificate: dict[str, Any], **kwargs: Any) -> None:
        if not isinstance(certificate, dict) or not _ENTRIES.issubset(
            certificate
        ):
            raise ValueError(
                "`certificate` must be what `rule.certificate()` returns. "
                f"Received: certificate={certificate!r:.100}. Use "
                "`keras_halo.guard(model, rule)`."
            )
        super().__init__(
            certificate["threshold"],
            # Files of earlier versions name it among the arguments alone.
            method_of(certificate),
            **kwargs,
        )
        self.certificate = certificate
        # It takes a mask and passes none on: an answer is a decision.
        self.supports_masking = True

    @property
    def _gives_sets(self):
        return self.certificate.get("label_sets", False)

    def build(self, scores_shape: Any) -> None:
        super().build(scores_shape)

    def call(
        self, scores: Tensor, training: bool | None = None
    ) -> dict[str, Tensor]:
        if training is True:
            raise ValueError(
                "A guarded model decides as its rule was fitted, without "
                "dropout and without following what it judges. Received: "
                "training=True. Call it without, or use `predict`."
            )
        packed, given = self._both(scores, None)
        packed = ops.cast(packed, self.head_dtype)
        judged = self._judged(packed, given)
        # As the rule says of what it cannot read.
        score = ops.where(self._is_usable(packed, judged), judged, math.nan)
        members = None
        if self._gives_sets:
            members = self._members(packed, given)
            label = packing.best_class(packed, members)
        else:
            label = super().call(scores)
        probabilities = ops.softmax(packing.answer_logits(packed))
        answers = {
            "label": label,
            "probabilities": probabilities[..., :-1],
            "score": score,
        }
        if members is not None:
            answers["label_set"] = members
        if self.certificate["ranks"]:
            answers["p_value"] = self._p_value(score)
        return answers

    def _p_value(self, score):
        ranks = self.certificate["ranks"]
        entries = _rounded_entries(tuple(ranks["entries"]), self.head_dtype)
        entries = ops.convert_to_tensor(entries, self.head_dtype)
        counts = ops.convert_to_tensor(
            np.array(ranks["counts"]), self.head_dtype
        )
        is_as_high = ops.less_equal(ops.expand_dims(score, -1), entries)
        as_high = ops.sum(ops.where(is_as_high, counts, 0.0), axis=-1)
        num_samples = self.certificate["calibration"]["samples"]
        return (as_high + 1.0) / (num_samples + 1.0)

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> Any:
        return None

    def compute_output_shape(self, scores_shape: Any) -> Any:
        scores_shape = tuple(self._both(scores_shape, None)[0])
        shape = scores_shape[:-1]
        shapes = {
            "label": shape,
            "probabilities": (*shape, packing.count_classes(scores_shape)),
            "score": shape,
        }
        if self._gives_sets:
            shapes["label_set"] = shapes["probabilities"]
        if self.certificate["ranks"]:
            shapes["p_value"] = shape
        return shapes

    def compute_output_spec(self, scores: Any) -> Any:
        packed, given = self._both(scores, None)
        self._check_shapes(packed.shape, None if given is None else given.shape)
        shapes = self.compute_output_shape(
            {"scores": packed.shape, "ood": given.shape}
            if given is not None
            else packed.shape
        )
        dtypes = {"label": "int32", "label_set": "bool"}
        return {
            name: keras.KerasTensor(
                shape, dtype=dtypes.get(name, self.head_dtype)
            )
            for name, shape in shapes.items()
        }

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        # Both stand in the certificate.
        del config["threshold"], config["method"]
        return {**config, "certificate": self.certificate}


@functools.lru_cache(maxsize=64)
def _rounded_entries(entries, dtype):
    """Scores that compare with those of a dtype as they do in float64.

    Kept, since eager PyTorch asks for them in every batch.
    """
    return np.array([rounded_down(entry, dtype) for entry in entries], dtype)
