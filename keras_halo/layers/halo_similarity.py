from typing import Any

import keras
from keras import ops

from keras_halo.layers.halo_dense import HALODense
from keras_halo.layers.temperature_layer import TemperatureLayer
from keras_halo.ops import geometry, packing
from keras_halo.ops.head import saturated
from keras_halo.ops.head_smoothing import note_label_smoothing
from keras_halo.utils.checks import (
    as_boolean,
    check_floating,
    check_label_smoothing,
    number_array,
)
from keras_halo.utils.shapes import axis_length
from keras_halo.utils.types import ArrayLike, Shape, Tensor


def similarity_scores(queries, keys, temperature, label_smoothing):
    """Packed scores of queries whose classes are a batch of keys.

    Formula:

    ```python
    c = keys - mean(keys, axis=0)
    s = gamma * (2 * dot(queries, transpose(c)) / D - mean(c ** 2, axis=-1))
    packed = [s | b | neutral(|queries|^2, gamma, D, background, layout)]
    ```

    with `b` the `abstain_bias` of `keras_halo.ops.geometry` of as many classes
    as there are keys.

    Args:
        queries: Tensor of shape `(B, D)`.
        keys: Tensor of shape `(K, D)`. `K` may be known only when the graph
            runs.
        temperature: Tensor `gamma`, a scalar.
        label_smoothing: Float in `[0, 1)`.

    Returns:
        Tensor of shape `(B, packed_width)`.

    Example:

    >>> keys = ops.array([[1.0, 1.0], [-1.0, -1.0]])
    >>> scores = similarity_scores(keys[:1], keys, ops.array(2.0), 0.1)
    >>> ops.convert_to_numpy(scores)[:, :2].tolist()
    [[2.0, -6.0]]
    """
    dim = keys.shape[-1]
    keys = geometry.centered(keys)
    return packing.pack(
        logits=geometry.class_logits(queries, keys, temperature),
        abstain_logit=geometry.abstain_bias(
            dim, axis_length(keys, 0), label_smoothing
        ),
        squared_norm=geometry.mean_square(queries),
        temperature=temperature,
        embedding_dim=dim,
        background=packing.smoothing_background(label_smoothing),
    )


@keras.saving.register_keras_serializable(package="keras_halo")
class HALOSimilarity(TemperatureLayer):
    """Compares two batches of embeddings and can say that nothing matches.

    Joins the two towers of a CLIP-like model. For every query, such as an
    image, the classes are the keys of the batch, such as its captions: their
    embeddings take the place of the centroids of `HALODense`, and "no key of
    these" is the abstain class at their mean. Gradients reach both towers. The
    output is packed scores, so that losses, metrics and
    `keras_halo.decode_predictions` work on it as for a classifier with as many
    classes as keys; label -1 means that nothing matches.

    The usual contrastive softmax has to choose a key also for a query that has
    none. Here the abstain class is what a pair has to beat:
    `keras_halo.pair_log_odds` tells of every pair by how much it does, and
    `keras_halo.ood_score(scores, "abstain")` of every query. The margin of the
    abstain class is a cautious one, that of a classifier; where it decides
    about rejection, fit a threshold to aligned pairs
    (`keras_halo.rejection`).

    **Towers.** Distances leave the norm of embeddings free, so that some pairs
    are sharper than others for no reason. Rejection, which compares across
    queries, gains from towers that end on a sphere, as the cosine of other
    contrastive losses does: `UnitNormalization()` and
    `Rescaling((0.5 * D) ** 0.5)`, whose mean square is 0.5, with
    `HALOContrastiveLoss(radial_weight=0.0)`: on a sphere the radial term has
    nothing to keep from collapsing. Without these layers keep the term.

    **Training.** With `bidirectional=True` one output holds both directions,
    queries to keys and keys to queries, and `fit` takes one array of ids. Pairs
    of the same id count as matches of each other; where all differ,
    `np.arange(len(x))` does.

    ```python
    scores = keras_halo.HALOSimilarity(bidirectional=True)([image, text])
    model = keras.Model([images, captions], scores)
    model.compile("adam", keras_halo.HALOContrastiveLoss())
    model.fit([x_images, x_captions], ids, batch_size=128)
    ```

    For two outputs, call one layer twice, so that they share the temperature:

    ```python
    similarity = keras_halo.HALOSimilarity()
    outputs = {
        "image_to_text": similarity([image, text]),
        "text_to_image": similarity([text, image]),
    }
    model.fit(x, {"image_to_text": ids, "text_to_image": ids})
    ```

    `HALOLoss` trains a direction from labels of any other kind, such as
    `keras_halo.pair_labels(query_ids, key_ids)`.

    **Inference.** `model.predict` on pairs compares within each batch only, and
    needs a number of pairs that `batch_size` divides: a smaller last batch has
    fewer classes. For a fixed gallery compute its embeddings once and call
    `to_head`, or call the layer on all of them:
    `similarity([queries, gallery])`. The origin, where abstaining sits, is the
    mean of the keys that are given: that of the batch in training, that of the
    gallery then. The larger and the more like the
    training data a gallery is, the better the two agree.

    The layer computes and emits float32 whatever the dtype policy (float64
    under a float64 policy), also in a mixed-precision model.

    Formula:

    ```python
    c = keys - mean(keys, axis=0)
    gamma = softplus(raw_gamma)
    s = gamma * (2 * dot(queries, transpose(c)) / D - mean(c ** 2, axis=-1))
    outputs = [s | b | neutral(|queries|^2, gamma, D, background, layout)]
    b = abstain_bias(D, K)
    ```

    Args:
        label_smoothing: Float in `[0, 1)`. The label smoothing of the loss,
            from which the abstain class gets its margin. Give the loss the
            same value. Defaults to `0.1`.
        learn_gamma: Boolean, whether the temperature is trained. Defaults to
            `True`.
        bidirectional: Boolean. `True` emits the scores of both directions,
            stacked; there have to be as many keys as queries. Defaults to
            `False`.
        **kwargs: Base layer keyword arguments, such as `name` and `dtype`.

    Input shape:
        List of two tensors of floats: queries of shape `(B, D)` and keys of
        shape `(K, D)`, `D >= 2`. Components beyond `1e12` in magnitude are
        saturated. A batch with a single key teaches nothing, but is no error:
        the last one of an epoch may be that small.

    Output shape:
        `(B, packed_width)`; with `bidirectional=True`, `(B, 2, packed_width)`:
        queries to keys first, then keys to queries.

    Raises:
        ValueError: If `label_smoothing` is outside `[0, 1)`, the input is not
            two matrices of floats with the same, defined number of columns, at
            least 2, or the batches differ in size with `bidirectional=True`.

    Example:

    >>> rng = np.random.default_rng(0)
    >>> texts = rng.normal(size=(3, 8)).astype("float32")
    >>> images = np.concatenate([texts, np.zeros((1, 8), "float32")])
    >>> scores = keras_halo.HALOSimilarity()([images, texts])
    >>> tuple(scores.shape)
    (4, 9)
    >>> keras_halo.decode_predictions(scores).labels.tolist()
    [0, 1, 2, -1]

    References:

    - Raphael Pisoni, "I don't know!": Teaching neural networks to abstain
      with the HALO-Loss, 2026.
    - Alec Radford et al., Learning Transferable Visual Models From Natural
      Language Supervision, 2021.
    """

    def __init__(
        self,
        label_smoothing: float = 0.1,
        learn_gamma: bool = True,
        bidirectional: bool = False,
        **kwargs: Any,
    ) -> None:
        label_smoothing = check_label_smoothing(label_smoothing)
        bidirectional = as_boolean(bidirectional, "bidirectional")
        super().__init__(learn_gamma=learn_gamma, **kwargs)
        self.label_smoothing = label_smoothing
        self.bidirectional = bidirectional

    def build(self, input_shape: Shape) -> None:
        dim = self._check_shapes(input_shape)
        self._add_temperature(dim)
        spec = keras.layers.InputSpec(ndim=2, axes={-1: dim})
        self.input_spec = [spec, spec]
        self.built = True

    def call(self, inputs: Tensor) -> Tensor:
        self._check_shapes([x.shape for x in inputs])
        queries, keys = (self._as_embeddings(x) for x in inputs)
        scores = self._score(queries, keys)
        if self.bidirectional:
            scores = ops.stack([scores, self._score(keys, queries)], axis=1)
        note_label_smoothing(scores, self.label_smoothing)
        return scores

    def _as_embeddings(self, x):
        check_floating(x.dtype, self)
        return saturated(ops.cast(x, self.head_dtype))

    def _score(self, queries, keys):
        return similarity_scores(
            queries, keys, self.temperature, self.label_smoothing
        )

    def to_head(self, keys: ArrayLike, **kwargs: Any) -> HALODense:
        """Makes a `HALODense` whose classes are the keys of a fixed gallery.

        The head answers as the layer does, and goes wherever a head does:
        `HALOSoftmax`, `layers.OODScore`, `calibrate`, `rejection`, `export`.
        With the embeddings of class names as keys, the query tower becomes a
        classifier that was never trained on those classes.

        Args:
            keys: Array of shape `(K, D)`, at least two embeddings.
            **kwargs: Base layer keyword arguments, such as `name`.

        Returns:
            `HALODense` with `K` units, built.

        Raises:
            ValueError: If the keys are not such embeddings, or the layer has
                not been built.

        Example:

        >>> similarity = keras_halo.HALOSimilarity()
        >>> gallery = np.eye(4, dtype="float32")
        >>> scores = similarity([gallery, gallery])
        >>> head = similarity.to_head(gallery)
        >>> bool(ops.all(ops.abs(head(gallery) / scores - 1.0) < 1e-5))
        True
        """
        if not self.built:
            raise ValueError(
                "The `HALOSimilarity` layer has no temperature yet. Received: "
                f"layer {self.name!r}, which was not built. Train it first, or "
                "load trained weights."
            )
        keys = number_array(keys, "keys")
        dim = self.input_spec[0].axes[-1]
        if keys.ndim != 2 or len(keys) < 2 or keys.shape[-1] != dim:
            raise ValueError(
                "Expected a gallery of shape (K, "
                f"{dim}) with K of at least 2. Received: shape={keys.shape}. "
                "Pass what the tower of the keys predicts."
            )
        head = HALODense.reference(
            len(keys),
            label_smoothing=self.label_smoothing,
            learn_gamma=self.learn_gamma,
            **{"dtype": self.head_dtype, **kwargs},
        )
        head.build((None, dim))
        # Already centred: the head rounds relative to what it is given.
        head.centroids.assign(keys - keys.mean(axis=0, dtype="float64"))
        # Relative to the same start: the embeddings are of one size.
        head.raw_gamma.assign(
            ops.convert_to_tensor(self.raw_gamma)
            + (self.gamma_origin - head.gamma_origin)
        )
        return head

    def _check_shapes(self, shapes):
        """Returns the size of the embeddings."""
        expected = (
            "`HALOSimilarity` takes a list of two tensors, queries of shape "
            "(B, D) and keys of shape (K, D), with D defined and at least 2"
        )
        shapes = [shape for shape in shapes or () if _is_shape(shape)]
        if len(shapes) != 2 or any(len(shape) != 2 for shape in shapes):
            raise ValueError(
                f"{expected}. Received: shapes {shapes}. Call it as "
                "`similarity([queries, keys])`."
            )
        (num_queries, dim), (num_keys, key_dim) = shapes
        if dim is None or dim < 2 or dim != key_dim:
            raise ValueError(
                f"{expected}. Received: shapes {shapes}. End both towers in "
                "`keras.layers.Dense(embedding_dim)`."
            )
        sizes = {num_queries, num_keys} - {None}
        if self.bidirectional and len(sizes) > 1:
            raise ValueError(
                "With `bidirectional=True` there have to be as many keys as "
                f"queries. Received: shapes {shapes}. Compare batches of "
                "different size in one direction, `similarity([queries, "
                "keys])` with `bidirectional=False`."
            )
        return dim

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        self._check_shapes(input_shape)
        (num_queries, _), (num_keys, _) = input_shape
        if self.bidirectional:
            num_queries = num_keys = num_queries or num_keys
        width = None if num_keys is None else packing.packed_width(num_keys)
        middle = (2,) if self.bidirectional else ()
        return (num_queries, *middle, width)

    def compute_output_spec(self, inputs: Tensor) -> Any:
        for x in inputs:
            check_floating(x.dtype, self)
        # The base class would announce the 16-bit compute dtype of a mixed
        # policy, which is not what `call` returns.
        return keras.KerasTensor(
            self.compute_output_shape([x.shape for x in inputs]),
            dtype=self.head_dtype,
        )

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "label_smoothing": self.label_smoothing,
            "bidirectional": self.bidirectional,
        }


def _is_shape(shape):
    return not isinstance(shape, int) and shape is not None
