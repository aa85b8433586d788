"""The packed scores: one tensor that carries a HALO head's whole answer.

A Keras loss sees `y_pred` and nothing else, yet the radial term needs the
embedding's norm, the inverse temperature and the embedding size. The head
therefore emits one tensor of more columns than classes,

```
[ s_1 ... s_K | a | neutral(|x|^2) | neutral(gamma) | neutral(D)
                  | neutral(background) | neutral(layout) ]
```

with `neutral(u) = -2^40 * (1 + u)`. The columns after `a` are so negative that
a softmax gives them probability exactly zero and neither an argmax nor a top-k
ever picks them. Code written for ordinary logits keeps working on packed
scores.

Scaling by a power of two is undone without loss, adding one is not: in float32
a value `u` comes back to within `6e-8 * (1 + u)`. So a temperature below one
has a relative error of up to `6e-8 / gamma`, and so has the squared norm of an
embedding near the origin. Where more digits are needed, read
`head.temperature`, or compute under a float64 policy.

`a` is the logit of abstaining, and `background` says what it stands for:

- `kappa`, above zero: also for a far background, which begins there.
- `-(1 / 2 + e / 4)`: for the origin alone, with the margin that the published
  method takes from a label smoothing `e`. A loss with another one would be
  wrong, and is refused. `e` is held in steps of `2^-22`, and comes back as it
  is held.
- zero: for the origin alone, and nothing is known of its margin. So it is in
  scores of 0.1.0, and in those that were packed before `e` was.

The last column tells packed scores of this layout from those of keras_halo
0.1.0, which had `K + 4` columns and ended in `neutral(D)`: it holds
`1 / 4 + 2^-13`, and no embedding size is below 2. `upgrade_scores` converts old
arrays. In bfloat16 that number would be `1 / 4`, so that packed scores that
were rounded on the way, whatever they were cast to afterwards, are none.

This module alone knows the layout.
"""

import collections
import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_halo.ops.tensors import max_of_rows, min_of_rows
from keras_halo.utils.checks import check_finite, number_array
from keras_halo.utils.shapes import axis_length
from keras_halo.utils.types import Array, ArrayLike, DType, Tensor

# Abstain logit and the neutral columns.
NUM_EXTRA_COLUMNS = 6

_NUM_NEUTRAL = NUM_EXTRA_COLUMNS - 1

# What the last column holds. A later layout takes another power of two below
# one and the same addend: no embedding size is taken for it, and 16 bits lose
# it.
_LAYOUT = 0.25 + 2.0**-13

# Abstain logit and three neutral columns, as keras_halo 0.1.0 had them.
OLD_EXTRA_COLUMNS = 4

# The smallest packed scores: two classes.
MIN_COLUMNS = 2 + NUM_EXTRA_COLUMNS

_NEUTRAL_SCALE = 2.0**40

# What the background column holds for a label smoothing: multiples of 2^-24
# between -3/4 and -1/2, which float32 keeps to the last bit.
_SMOOTHING_STEP = 2.0**-22
_NO_SMOOTHING, _ALL_SMOOTHING = -0.5, -0.75

_WHAT_TO_DO = (
    "The last layer of the model must be `keras_halo.HALODense`; with two "
    "towers it is the head that `HALOSimilarity.to_head(keys)` makes."
)

_ABOUT_TOWERS = (
    "The classes of `keras_halo.HALOSimilarity` are the keys of a batch, so "
    "that their number is not known. Give its queries to the head of a fixed "
    "gallery, `similarity.to_head(keys)`, which is a `keras_halo.HALODense` "
    "for the last layer of the model."
)


class PackedScores(
    collections.namedtuple(
        "PackedScores",
        [
            "logits",
            "abstain_logit",
            "squared_norm",
            "temperature",
            "embedding_dim",
            "background",
        ],
    )
):
    """The parts of packed scores.

    Args:
        logits: Shape `(..., K)`, the class logits `s`.
        abstain_logit: Shape `(..., 1)`, the logit `a` of abstaining.
        squared_norm: Shape `(..., 1)`, the mean square `|x|^2` of the
            embedding.
        temperature: Shape `(..., 1)`, the inverse temperature `gamma`.
        embedding_dim: Shape `(..., 1)`, the size `D` of the embedding; zero in
            a row that holds no packed scores.
        background: Shape `(..., 1)`, what the logit of abstaining stands for,
            as one number: see `has_far_background`, `far_radius` and
            `label_smoothing`.
    """

    __slots__ = ()

    @property
    def has_far_background(self) -> Tensor:
        """Booleans of shape `(..., 1)`: whether there is a far background."""
        return self.background > 0.0

    @property
    def far_radius(self) -> Tensor:
        """Shape `(..., 1)`, where the far background begins, `kappa`.

        Half of the squared norm beyond the evidence for the best class. Zero
        without a far background.
        """
        return _where(self.has_far_background, self.background, 0.0)

    @property
    def label_smoothing(self) -> Tensor:
        """Shape `(..., 1)`, from which the head takes its fixed margin.

        NaN where it takes none, or does not say from which.
        """
        share = (_NO_SMOOTHING - self.background) * (
            1.0 / (_NO_SMOOTHING - _ALL_SMOOTHING)
        )
        return _where(_holds_smoothing(self.background), share, math.nan)

    def may_train_with(self, label_smoothing: float) -> Tensor:
        """Tells where a loss with this label smoothing fits the head.

        Args:
            label_smoothing: Float in `[0, 1)`, that of the loss.

        Returns:
            Booleans of shape `(..., 1)`: true where the head takes no margin
            from a label smoothing, does not say from which, or from the same.
        """
        same = self.background == smoothing_background(label_smoothing)
        return same | (self.background >= 0.0)


def _where(condition, x, other):
    where = np.where if isinstance(condition, np.ndarray) else ops.where
    return where(condition, x, other)


def _holds_smoothing(background):
    return (background <= _NO_SMOOTHING) & (background > _ALL_SMOOTHING)


def smoothing_background(label_smoothing: float) -> float:
    """Returns the `background` of a head with the margin of the paper.

    Args:
        label_smoothing: Float in `[0, 1)`, from which it takes the margin.

    Returns:
        Float. Label smoothings that differ by less than `2^-22` may have the
        same; zero has one of its own.

    Example:

    >>> smoothing_background(0.0), smoothing_background(0.25)
    (-0.5, -0.5625)
    """
    steps = round(label_smoothing / _SMOOTHING_STEP)
    if label_smoothing > 0.0:
        steps = min(max(steps, 1), round(1.0 / _SMOOTHING_STEP) - 1)
    width = _ALL_SMOOTHING - _NO_SMOOTHING
    return _NO_SMOOTHING + width * (steps * _SMOOTHING_STEP)


def packed_width(num_classes: int) -> int:
    """Returns the number of columns of packed scores.

    Args:
        num_classes: Integer, the number `K` of classes.

    Returns:
        Integer, `num_classes` and the columns that are no class.

    Example:

    >>> packed_width(10)
    16
    """
    return num_classes + NUM_EXTRA_COLUMNS


def count_classes(scores: Tensor) -> Any:
    """Returns the number of classes in packed scores.

    Args:
        scores: Tensor or array of shape `(..., packed_width)`; or a tuple, its
            shape. With a tensor `K` may be known only when a graph runs: where
            the classes are a batch of keys.

    Returns:
        Integer, `K`; or a scalar tensor of the dtype of `scores` where it is
        known only when a graph runs.

    Raises:
        ValueError: If the width leaves fewer than two classes, or is unknown
            in a shape.

    Example:

    >>> count_classes((5, 16)), count_classes(ops.zeros((5, 16)))
    (10, 10)
    """
    shape = getattr(scores, "shape", scores)
    width = shape[-1] if len(shape) else None
    if width is None and len(shape) and shape is not scores:
        return axis_length(scores, -1) - NUM_EXTRA_COLUMNS
    if width is None or width < MIN_COLUMNS:
        raise ValueError(
            "Expected packed scores of shape `(..., num_classes + "
            f"{NUM_EXTRA_COLUMNS})` with at least {MIN_COLUMNS} columns. "
            f"Received: shape={tuple(shape)}. "
            + (_ABOUT_TOWERS if width is None else _WHAT_TO_DO)
        )
    return width - NUM_EXTRA_COLUMNS


def _to_neutral(value):
    return (value + 1.0) * -_NEUTRAL_SCALE


def _from_neutral(column):
    return column / -_NEUTRAL_SCALE - 1.0


def pack(
    logits: Tensor,
    abstain_logit: Tensor,
    squared_norm: Tensor,
    temperature: Tensor,
    embedding_dim: int | Tensor,
    background: Tensor = 0.0,
) -> Tensor:
    """Joins logits and geometry into packed scores.

    Formula:

    ```python
    packed = [s | a | neutral(|x|^2, gamma, D, background, layout)]
    neutral(u) = -2^40 * (1 + u)
    ```

    Args:
        logits: Tensor of shape `(..., K)`, float32 or float64.
        abstain_logit: Scalar, or tensor of shape `(..., 1)`.
        squared_norm: Tensor of shape `(..., 1)`.
        temperature: Scalar, or tensor of shape `(..., 1)`.
        embedding_dim: Scalar, or tensor of shape `(..., 1)`.
        background: Scalar, or tensor of shape `(..., 1)`: where the far
            background begins, or the `smoothing_background` of a head without
            one. Defaults to zero: without one, and nothing more is known.

    Returns:
        Tensor of shape `(..., packed_width)`.

    Example:

    >>> logits = ops.array([[2.0, -6.0]])
    >>> packed = pack(logits, -1.0, ops.array([[1.0]]), 2.0, 2)
    >>> tuple(packed.shape)
    (1, 8)
    >>> int(ops.argmax(packed, axis=-1)[0])
    0
    """
    ones = ops.ones_like(squared_norm)
    return ops.concatenate(
        [
            logits,
            ones * abstain_logit,
            _to_neutral(squared_norm),
            ones * _to_neutral(temperature),
            ones * _to_neutral(embedding_dim),
            ones * _to_neutral(background),
            ones * _to_neutral(_LAYOUT),
        ],
        axis=-1,
    )


def unpack(scores: Tensor) -> PackedScores:
    """Splits packed scores into logits and geometry; the inverse of `pack`.

    Args:
        scores: Tensor of shape `(..., packed_width)`.

    Returns:
        `PackedScores`.

    Raises:
        ValueError: If the width is known and leaves fewer than two classes.

    Example:

    >>> logits = ops.array([[2.0, -6.0]])
    >>> packed = pack(logits, -1.0, ops.array([[1.0]]), 2.0, 2)
    >>> float(unpack(packed).temperature[0, 0])
    2.0
    """
    count_classes(scores)
    geometry = _from_neutral(scores[..., -_NUM_NEUTRAL:])
    parts = _split(scores, geometry)
    is_packed = geometry[..., 4:5] == _LAYOUT
    return parts._replace(
        embedding_dim=_where(is_packed, parts.embedding_dim, 0.0)
    )


def _split(scores, geometry):
    return PackedScores(
        logits=scores[..., :-NUM_EXTRA_COLUMNS],
        abstain_logit=scores[..., -NUM_EXTRA_COLUMNS:-_NUM_NEUTRAL],
        squared_norm=geometry[..., 0:1],
        temperature=geometry[..., 1:2],
        embedding_dim=geometry[..., 2:3],
        background=geometry[..., 3:4],
    )


def with_abstaining(
    scores: Tensor, abstain_logit: Tensor, far_radius: Tensor
) -> Tensor:
    """Puts another logit of abstaining into packed scores.

    Args:
        scores: Tensor of packed scores with shape `(..., packed_width)`.
        abstain_logit: Tensor of shape `(..., 1)`.
        far_radius: Tensor of shape `(..., 1)`.

    Returns:
        Tensor like `scores`.

    Example:

    >>> scores = pack(ops.array([[2.0, -6.0]]), -1.0, ops.ones((1, 1)), 2.0, 2)
    >>> scores = with_abstaining(scores, ops.zeros((1, 1)), ops.ones((1, 1)))
    >>> parts = unpack(scores)
    >>> float(parts.abstain_logit[0, 0]), float(parts.far_radius[0, 0])
    (0.0, 1.0)
    """
    return ops.concatenate(
        [
            scores[..., :-NUM_EXTRA_COLUMNS],
            abstain_logit,
            scores[..., -_NUM_NEUTRAL:-2],
            _to_neutral(far_radius),
            scores[..., -1:],
        ],
        axis=-1,
    )


def pack_gradient(
    logits: Tensor,
    abstain_logit: Tensor,
    squared_norm: Tensor,
    temperature: Tensor,
) -> Tensor:
    """Gradient with respect to packed scores from that of their parts.

    The chain rule through `unpack`. The embedding size and the background are
    constants.

    Args:
        logits: Tensor of shape `(..., K)`, the gradient of the class logits.
        abstain_logit: Tensor of shape `(..., 1)`.
        squared_norm: Tensor of shape `(..., 1)`.
        temperature: Tensor of shape `(..., 1)`.

    Returns:
        Tensor of shape `(..., packed_width)`.

    Example:

    >>> one = ops.ones((1, 1))
    >>> gradient = pack_gradient(ops.ones((1, 2)), one, one, one)
    >>> (ops.convert_to_numpy(gradient) * 2**40).tolist()[0][3:]
    [-1.0, -1.0, 0.0, 0.0, 0.0]
    """
    return ops.concatenate(
        [
            logits,
            abstain_logit,
            squared_norm / -_NEUTRAL_SCALE,
            temperature / -_NEUTRAL_SCALE,
            # Embedding size, background and layout.
            ops.concatenate([ops.zeros_like(squared_norm)] * 3, axis=-1),
        ],
        axis=-1,
    )


def unpack_gradient(scores: Tensor) -> PackedScores:
    """Gradients of the parts from that with respect to packed scores.

    The chain rule through `pack`.

    Args:
        scores: Tensor of shape `(..., packed_width)`, a gradient.

    Returns:
        `PackedScores` of gradients.

    Example:

    >>> one = ops.ones((1, 1))
    >>> gradient = pack_gradient(ops.ones((1, 2)), one, one, one)
    >>> float(unpack_gradient(gradient).temperature[0, 0])
    1.0
    """
    return _split(scores, scores[..., -_NUM_NEUTRAL:] * -_NEUTRAL_SCALE)


def answer_logits(scores: Tensor) -> Tensor:
    """Returns the logits of the `K` classes and of abstaining, in that order.

    Args:
        scores: Tensor of shape `(..., packed_width)`.

    Returns:
        Tensor of shape `(..., K + 1)`.

    Raises:
        ValueError: If the width is unknown or leaves fewer than two classes.

    Example:

    >>> logits = ops.array([[2.0, -6.0]])
    >>> packed = pack(logits, -1.0, ops.array([[1.0]]), 2.0, 2)
    >>> ops.convert_to_numpy(answer_logits(packed)).tolist()
    [[2.0, -6.0, -1.0]]
    """
    return scores[..., : count_classes(scores.shape) + 1]


def best_class(scores: Tensor, members: Tensor = None) -> Tensor:
    """Returns the most probable class, without regard to abstaining.

    Not `ops.argmax`: on TensorFlow Keras makes it of operations on bits that
    converters to ONNX and OpenVINO do not know.

    Args:
        scores: Tensor of shape `(..., packed_width)`, without NaN.
        members: Boolean tensor of shape `(..., K)`, the classes that are
            looked at, or `None` for all. Defaults to `None`.

    Returns:
        int32 tensor of shape `(...)`, the first of equal ones; -1 where no
        class is looked at.

    Example:

    >>> logits = ops.array([[-6.0, 2.0]])
    >>> packed = pack(logits, 5.0, ops.array([[1.0]]), 2.0, 2)
    >>> ops.convert_to_numpy(best_class(packed)).tolist()
    [1]
    """
    num_classes = count_classes(scores.shape)
    logits = scores[..., :num_classes]
    classes = ops.arange(0, num_classes, dtype="int32")
    if members is None:
        is_best = logits >= max_of_rows(logits)
        return min_of_rows(ops.where(is_best, classes, num_classes))[..., 0]
    logits = ops.where(members, logits, -math.inf)
    is_best = ops.logical_and(members, logits >= max_of_rows(logits))
    found = min_of_rows(ops.where(is_best, classes, num_classes))[..., 0]
    return ops.where(found < num_classes, found, -1)


def check_precision(dtype: DType, argument: str = "scores") -> None:
    """Raises `ValueError` for packed scores in 16 bits.

    `float16` overflows in the columns of the geometry, `bfloat16` keeps two
    digits of them.

    Args:
        dtype: A dtype, of whatever library.
        argument: String, the name by which an error calls the scores.

    Example:

    >>> check_precision("float16")
    Traceback (most recent call last):
        ...
    ValueError: `scores` are packed scores in float16, which cannot hold ...
    """
    dtype = keras.backend.standardize_dtype(dtype)
    if dtype in ("float16", "bfloat16"):
        raise ValueError(
            f"`{argument}` are packed scores in {dtype}, which cannot hold "
            "their geometry. Expected float32 or float64. Received: "
            f"dtype={dtype}. A layer after the "
            "head casts them under a 16-bit policy: leave it out, or give it "
            '`dtype="float32"`; do not cast what `predict` returned.'
        )


def may_be_packed(array: Array) -> bool:
    """Tells packed scores from probabilities and logits, by their last column.

    Args:
        array: NumPy array of any shape.

    Returns:
        Boolean. `check_packed` says whether all of it is right.

    Example:

    >>> may_be_packed(np.ones((2, 9)))
    False
    """
    return bool(
        array.ndim
        and array.size
        and array.shape[-1] >= MIN_COLUMNS
        and (array[..., -1] <= -_NEUTRAL_SCALE).all()
    )


def check_packed(scores: Array, argument: str = "scores") -> None:
    """Checks that a NumPy array holds packed scores, by value.

    Args:
        scores: Array of shape `(..., packed_width)`.
        argument: String, the name by which an error calls the array.

    Raises:
        ValueError: If these are no numbers, or the width, a non-finite value,
            or the columns of geometry show that the array did not come from a
            HALO head.

    Example:

    >>> check_packed(np.zeros((1, 16)))
    Traceback (most recent call last):
        ...
    ValueError: The last 5 columns of `scores` hold no packed geometry ...
    """
    scores = number_array(scores, argument)
    check_precision(scores.dtype, argument)
    shape = scores.shape
    if _are_old(scores):
        raise ValueError(
            f"`{argument}` are packed scores of keras_halo 0.1.0, which had "
            f"{OLD_EXTRA_COLUMNS} columns beside those of the classes. "
            f"Received: shape={shape}. Predict again with the loaded model, "
            "or convert them with `keras_halo.ops.packing.upgrade_scores`."
        )
    count_classes(shape)
    check_finite(scores, argument)
    columns = np.asarray(scores[..., -_NUM_NEUTRAL:], "float64")
    squared_norm, temperature, embedding_dim, background, layout = (
        _from_neutral(columns[..., column]) for column in range(_NUM_NEUTRAL)
    )
    packed = _is_geometry(squared_norm, temperature, embedding_dim)
    packed &= (background >= 0.0) | _holds_smoothing(background)
    packed &= layout == _LAYOUT
    if not packed.all():
        raise ValueError(
            f"The last {_NUM_NEUTRAL} columns of `{argument}` hold no packed "
            f"geometry in {int((~packed).sum())} of {packed.size} rows. "
            "Expected packed scores of shape `(..., num_classes + "
            f"{NUM_EXTRA_COLUMNS})`. Received: shape={shape}, "
            f"such a row ends in {columns[~packed][0]}. "
            + _diagnosis(np.asarray(scores, "float64"))
        )


def _diagnosis(scores):
    """What an array that holds no packed scores may be, and what to do."""
    sums = scores.sum(axis=-1)
    if (scores >= 0.0).all() and (np.abs(sums - 1.0) < 1e-2).all():
        return (
            "They are probabilities: the model ends in a softmax. Leave it "
            f"out, or put `keras_halo.HALOSoftmax` there. {_WHAT_TO_DO}"
        )
    if np.any(np.abs(_from_neutral(scores[..., -1]) - _LAYOUT) < 2.0**-7):
        return (
            "They were rounded to 16 bits on the way, which their geometry "
            "does not survive. Leave out the layer after the head that casts "
            'them under a 16-bit policy, or give it `dtype="float32"`.'
        )
    return (
        "Either the model has no such head, or a layer after it changes what "
        f"it emits. {_WHAT_TO_DO}"
    )


def _is_geometry(squared_norm, temperature, embedding_dim):
    return (
        (squared_norm >= 0.0)
        & (temperature > 0.0)
        & (embedding_dim >= 2.0)
        & (embedding_dim == np.round(embedding_dim))
    )


def _are_old(scores):
    """Whether an array holds packed scores of keras_halo 0.1.0."""
    shape = scores.shape
    if not shape or shape[-1] < 2 + OLD_EXTRA_COLUMNS or not scores.size:
        return False
    columns = np.asarray(scores[..., -3:], "float64")
    geometry = (_from_neutral(columns[..., column]) for column in range(3))
    return bool(_is_geometry(*geometry).all())


def upgrade_scores(scores: ArrayLike) -> Array:
    """Converts packed scores that keras_halo 0.1.0 computed.

    Args:
        scores: NumPy array of shape `(..., K + 4)`, as a head of keras_halo
            0.1.0 predicted it.

    Returns:
        NumPy array of shape `(..., packed_width)` with the same logits and
        geometry.

    Raises:
        ValueError: If the array does not hold such scores.

    Example:

    >>> old = -(2.0**40) * np.array([[0, 0, 0, 2.0, 3.0, 9.0]])
    >>> upgrade_scores(old).shape
    (1, 8)
    """
    scores = number_array(scores, "scores")
    if not _are_old(scores):
        raise ValueError(
            "Expected packed scores of keras_halo 0.1.0, an array of shape "
            f"(..., num_classes + {OLD_EXTRA_COLUMNS}). Received: "
            f"shape={scores.shape}. Scores of later versions need no "
            "conversion."
        )
    ones = np.ones_like(scores[..., :1])
    return np.concatenate(
        [scores, ones * _to_neutral(0.0), ones * _to_neutral(_LAYOUT)], axis=-1
    )
