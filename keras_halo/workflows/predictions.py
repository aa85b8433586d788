import dataclasses

import numpy as np
from keras import ops

from keras_halo.ops import geometry, packing
from keras_halo.ops.labels import ABSTAINED
from keras_halo.ops.model_output import finite_rows, read_model_output
from keras_halo.utils.shapes import with_few_lengths
from keras_halo.utils.types import Array, ArrayLike, Scores


@dataclasses.dataclass(frozen=True, eq=False)
class Predictions:
    """What a HALO model says of each sample, decoded from packed scores.

    Immutable: the fields cannot be set and their arrays cannot be written to.

    Args:
        labels: Integer array of shape `(...)`: the most probable class, or -1
            where abstaining is more probable than every class.
        probabilities: Array of shape `(..., K)`, the probabilities of the
            classes. With `abstain_probability` they sum to one.
        abstain_probability: Array of shape `(...)`, the probability of "I
            don't know".
        squared_radius: Array of shape `(..., K)`, the mean squared distance of
            the embedding to the centroid of every class. A typical member of
            a class has `1 - 2 / embedding_dim`.
        squared_norm: Array of shape `(...)`, the mean squared distance of the
            embedding to the origin.
        temperature: Array of shape `(...)`, the inverse temperature `gamma`:
            distances are multiplied by it.
        embedding_dim: Integer, the size of the embedding; 0 for no rows.
        best_class: Integer array of shape `(...)`: the most probable class,
            whether or not the model abstains; -1 in a row that holds NaN. Not
            `argmax(probabilities)`: where abstaining has all of the mass,
            these are zero.

    References:

    - Raphael Pisoni, "I don't know!": Teaching neural networks to abstain
      with the HALO-Loss, 2026.
    """

    labels: np.ndarray
    probabilities: np.ndarray
    abstain_probability: np.ndarray
    squared_radius: np.ndarray
    squared_norm: np.ndarray
    temperature: np.ndarray
    embedding_dim: int
    best_class: np.ndarray

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                value.flags.writeable = False

    @property
    def abstained(self) -> Array:
        """Boolean array of shape `(...)`, true where the model abstained."""
        return self.labels == ABSTAINED

    def __len__(self) -> int:
        return len(self.labels)


def decode_predictions(scores: Scores) -> Predictions:
    """Decodes packed scores, e.g. of `model.predict`, into a readable result.

    Args:
        scores: Packed scores with shape `(..., packed_width)`, as `HALODense`
            emits them: a NumPy array or what converts to one. Or what a model
            of `keras_halo.fit_class_gaussians` returned.

    Returns:
        `Predictions`: labels with -1 for abstained, class probabilities,
        probability of abstaining, squared radii, squared norm, temperature,
        embedding size and the best class. A row that holds NaN is abstained
        on, with a warning: its probability of abstaining is one, its radii are
        NaN.

    Raises:
        ValueError: If the array holds no packed scores, or mixes embeddings of
            different sizes.

    Example:

    >>> head = keras_halo.HALODense.reference(3)
    >>> scores = head(np.zeros((2, 8), "float32"))
    >>> predictions = keras_halo.decode_predictions(scores)
    >>> predictions.labels.tolist(), predictions.embedding_dim
    ([-1, -1], 8)
    """
    scores = ops.convert_to_numpy(read_model_output(scores).scores)
    if not scores.size:
        return _unread(scores.shape)
    finite = finite_rows(scores)
    if not finite.any():
        return _unread(scores.shape)
    if not finite.all():
        # Any row of the same head takes the place of what cannot be read.
        scores = np.where(finite[..., None], scores, scores[finite][0])
    packing.check_packed(scores)
    parts = packing.unpack(scores)
    radii, probabilities = (
        found.reshape(*scores.shape[:-1], -1)
        for found in with_few_lengths(
            _radii_and_probabilities, scores.reshape(-1, scores.shape[-1])
        )
    )
    embedding_dims = np.unique(parts.embedding_dim)
    if embedding_dims.size > 1:
        raise ValueError(
            "`scores` mixes embeddings of different sizes. Expected the "
            "output of one model. Received: embedding sizes "
            f"{embedding_dims.astype(int).tolist()}. Decode the output of each "
            "model by itself."
        )
    # Copies: arrays of a backend may not be written to. Rounding may leave a
    # zero slightly negative; a distance is not.
    probabilities = np.array(probabilities)
    radii = np.maximum(radii, 0.0)
    norms = _per_sample(parts.squared_norm)
    probabilities[~finite] = np.eye(probabilities.shape[-1])[-1]
    radii[~finite] = norms[~finite] = np.nan
    num_classes = probabilities.shape[-1] - 1
    abstained = np.argmax(probabilities, axis=-1) == num_classes
    # Of logits: where abstaining is far ahead, probabilities underflow.
    best_class = np.where(finite, np.argmax(parts.logits, axis=-1), ABSTAINED)
    return Predictions(
        labels=np.where(abstained, ABSTAINED, best_class),
        probabilities=probabilities[..., :-1],
        abstain_probability=probabilities[..., -1],
        squared_radius=radii,
        squared_norm=norms,
        temperature=_per_sample(parts.temperature),
        embedding_dim=int(embedding_dims[0]),
        best_class=best_class,
    )


def pair_log_odds(scores: ArrayLike) -> Array:
    """Computes log-odds of every class, or key, against abstaining alone.

    For the scores of `keras_halo.HALOSimilarity` this tells of each pair by
    itself whether it is aligned, whatever else the gallery holds: where it is
    negative, "nothing matches" is the better answer. Its sigmoid is the
    probability of the pair if abstaining is the only alternative. Larger for
    pairs that belong together; negate it to have a score that is larger for
    outliers.

    Formula:

    ```python
    log_odds_k = s_k - b
    ```

    Args:
        scores: NumPy array (or what converts to one) of packed scores with
            shape `(..., packed_width)`.

    Returns:
        Array of shape `(..., K)`.

    Raises:
        ValueError: If the array holds NaN, infinite values or no packed
            scores.

    Example:

    >>> texts = np.eye(3, 8, dtype="float32")
    >>> scores = keras_halo.HALOSimilarity()([texts, texts])
    >>> (pair_log_odds(scores) > 0).tolist()
    [[True, False, False], [False, True, False], [False, False, True]]
    """
    scores = ops.convert_to_numpy(read_model_output(scores).scores)
    packing.check_packed(scores)
    parts = packing.unpack(scores)
    return parts.logits - parts.abstain_logit


def _radii_and_probabilities(rows):
    parts = packing.unpack(ops.convert_to_tensor(rows))
    radii = geometry.squared_radii(
        parts.logits, parts.squared_norm, parts.temperature
    )
    probabilities = ops.softmax(
        packing.answer_logits(ops.convert_to_tensor(rows))
    )
    return ops.convert_to_numpy(radii), ops.convert_to_numpy(probabilities)


def _unread(shape):
    """What is said where there are no rows, or none that can be read."""
    num_classes = packing.count_classes(shape)
    unknown = np.full(shape[:-1], np.nan, "float32")
    by_class = (*shape[:-1], num_classes)
    return Predictions(
        labels=np.full(shape[:-1], ABSTAINED),
        probabilities=np.zeros(by_class, "float32"),
        abstain_probability=np.ones(shape[:-1], "float32"),
        squared_radius=np.full(by_class, np.nan, "float32"),
        squared_norm=unknown,
        temperature=unknown.copy(),
        embedding_dim=0,
        best_class=np.full(shape[:-1], ABSTAINED),
    )


def _per_sample(column):
    return np.array(ops.convert_to_numpy(column)[..., 0])
