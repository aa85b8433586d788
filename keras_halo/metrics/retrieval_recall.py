from typing import Any

import keras
from keras import ops

from keras_halo.metrics.packed_mean import PackedMean
from keras_halo.ops import packing
from keras_halo.ops.labels import ids_and_scores
from keras_halo.ops.tensors import max_of_rows
from keras_halo.utils.checks import as_integer
from keras_halo.utils.keras_private import mask_of, set_direction
from keras_halo.utils.types import DType, Tensor
from keras_halo.utils.weights import weights_of_positions


@keras.saving.register_keras_serializable(package="keras_halo")
class RetrievalRecall(PackedMean):
    """How often a query finds a key of its own id among the best `k`.

    Recall@k of two towers, within each batch: what `"accuracy"` is meant to
    be, which compares ids with positions in the batch. Labels are the ids that
    `HALOContrastiveLoss` takes, predictions the packed scores of
    `HALOSimilarity`, of one direction or of both.

    The candidates of a query are the keys of its batch. The larger a batch is,
    the harder the task: compare results of one batch size only. For a fixed
    gallery use `HALOSimilarity.to_head` and `BestClassTopKAccuracy`.

    Formula:

    ```python
    same = ids[:, None] == ids[None, :]
    ahead_i = sum_{j: not same_ij} (s_ij >= max_{j: same_ij} s_ij)
    recall = mean_i(ahead_i < k)
    ```

    Args:
        k: Positive integer, how many keys are looked at. Defaults to `1`.
        direction: `"both"`, `"queries"` or `"keys"`: which of the two
            directions of a layer with `bidirectional=True` count, queries that
            look for keys or keys that look for queries. Scores of one
            direction are always those of queries. Defaults to `"both"`.
        name: Optional name for the metric instance. Defaults to
            `"recall_at_{k}"`.
        dtype: The dtype of the metric's computations; 16-bit dtypes are raised
            to float32. Defaults to `None`, which means
            `keras.config.floatx()`.

    Whether the model abstains does not matter: a query that is told that
    nothing matches has a best key all the same. Keys of other ids that tie with
    the best match are ahead of it: towers that have collapsed, to which all
    pairs are the same, find nothing.

    `fit` makes tensors of ids, which on JAX have 32 bits: those that differ in
    higher bits alone become the same there, in silence. Number wider ones
    before, `ids = np.unique(ids, return_inverse=True)[1]`.

    The result is NaN before the first pair that counts, and if a row that
    counts holds no packed scores.

    Raises:
        ValueError: If an argument is out of range, or ids and scores do not
            fit.

    Example:

    >>> pairs = np.eye(3, 8, dtype="float32")
    >>> scores = keras_halo.HALOSimilarity(bidirectional=True)([pairs, pairs])
    >>> metric = keras_halo.metrics.RetrievalRecall(k=1)
    >>> metric.update_state(np.array([17, 5, 17]), scores)
    >>> float(metric.result())
    1.0
    """

    def __init__(
        self,
        k: int = 1,
        direction: str = "both",
        name: str | None = None,
        dtype: DType = None,
    ) -> None:
        k = as_integer(k, "k", 1)
        if direction not in ("both", "queries", "keys"):
            raise ValueError(
                "`direction` must be 'both', 'queries' or 'keys'. Received: "
                f"direction={direction!r}."
            )
        super().__init__(name=name or f"recall_at_{k}", dtype=dtype)
        self.k = k
        self.direction = direction
        set_direction(self, "up")

    def update_state(
        self, y_true: Any, y_pred: Tensor, sample_weight: Any = None
    ) -> None:
        """Adds a batch.

        Args:
            y_true: Ids, integers of shape `(B,)` or `(B, 1)`.
            y_pred: Packed scores of shape `(B, packed_width)`, or
                `(B, 2, packed_width)` of both directions.
            sample_weight: Optional weights of shape `(B,)`, or `(B, 2)` to
                weigh the directions by themselves. Defaults to `None`.
        """
        mask = mask_of(y_pred)
        labels, y_pred = ids_and_scores(
            y_true,
            y_pred,
            self.dtype,
            "For a fixed gallery use `HALOSimilarity.to_head` and "
            "`keras_halo.metrics.BestClassTopKAccuracy`.",
        )
        y_pred = ops.cast(y_pred, self.dtype)
        ones = ops.ones_like(y_pred[..., 0])
        weights = weights_of_positions(sample_weight, mask, ones)
        if weights is None:
            weights = ones
        if len(y_pred.shape) == 2:
            self._add(labels, y_pred, weights)
            return
        for index, name in enumerate(("queries", "keys")):
            if self.direction in ("both", name):
                self._add(labels, y_pred[:, index], weights[:, index])

    def _add(self, labels, scores, weights):
        logits = scores[..., : -packing.NUM_EXTRA_COLUMNS]
        is_match = labels > 0.0
        best = max_of_rows(ops.where(is_match, logits, -float("inf")))
        is_ahead = ops.logical_and(logits >= best, ops.logical_not(is_match))
        ahead = ops.sum(ops.cast(is_ahead, "int32"), axis=-1)
        # A batch of one pair is too narrow to be unpacked.
        if scores.shape[-1] != packing.packed_width(1):
            is_packed = packing.unpack(scores).embedding_dim[..., 0] >= 2.0
            weights = ops.where(
                ops.logical_or(is_packed, ops.equal(weights, 0.0)),
                weights,
                float("nan"),
            )
        self.add(ops.cast(ahead < self.k, self.dtype), weights)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        # Ids are compared; none stands for nothing.
        del config["ignore_class"]
        return {**config, "k": self.k, "direction": self.direction}
