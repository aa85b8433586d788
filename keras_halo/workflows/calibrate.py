"""Refits the temperature and the abstain bias of a trained head."""

import dataclasses
import warnings
from typing import Any

import keras
import numpy as np

from keras_halo.metrics import expected_calibration_error
from keras_halo.ops import geometry, packing
from keras_halo.ops.labels import class_indices
from keras_halo.ops.model_output import read_model_output
from keras_halo.utils.batches import (
    check_readable,
    counted,
    is_dataset,
    labelled_data,
)
from keras_halo.utils.checks import check_batch_size, check_model, check_verbose
from keras_halo.utils.extras import require
from keras_halo.utils.types import Data
from keras_halo.utils.weights import counted_positions
from keras_halo.workflows.collecting import check_labels
from keras_halo.workflows.graph import find_head
from keras_halo.workflows.predicting import predict_answers, scores_shape
from keras_halo.workflows.predictor import Predictor

BIAS_METHODS = ("mistakes", "margin", "keep")

# The temperature is looked for within this factor of its present value.
MAX_FACTOR = 1000.0

_NUM_BINS = 15


@dataclasses.dataclass(frozen=True, eq=False)
class CalibrationReport:
    """What `calibrate` changed, what it gained, and the way back.

    The likelihood and the calibration error are those of the class
    probabilities under the condition that the model does not abstain, on the
    known samples; P(abstain) is their mean probability of abstaining.

    Args:
        old_temperature: Float, the inverse temperature `gamma` before.
        temperature: Float, the same after.
        old_abstain_bias: Float, the bias of the near background before.
        abstain_bias: Float, the same after.
        old_nll: Float, mean negative log-likelihood of the labels before.
        nll: Float, the same after. Never larger, up to rounding.
        old_ece: Float, expected calibration error before: 15 bins of equal
            width, weighted by their counts; fewer if there are fewer samples.
        ece: Float, the same after. Not the objective; it may rise by chance.
        old_abstain_probability: Float, mean P(abstain) before.
        abstain_probability: Float, mean P(abstain) after.
        error_rate: Float, share of the known samples whose most probable
            class is wrong.
    """

    old_temperature: float
    temperature: float
    old_abstain_bias: float
    abstain_bias: float
    old_nll: float
    nll: float
    old_ece: float
    ece: float
    old_abstain_probability: float
    abstain_probability: float
    error_rate: float
    _old_weights: tuple[Any, ...] = dataclasses.field(repr=False)

    def undo(self) -> None:
        """Puts temperature and abstain biases back, to the bit."""
        for variable, value in self._old_weights:
            variable.assign(value)

    def __str__(self):
        rows = [
            ("temperature", self.old_temperature, self.temperature),
            ("abstain bias", self.old_abstain_bias, self.abstain_bias),
            ("NLL", self.old_nll, self.nll),
            ("ECE", self.old_ece, self.ece),
            (
                "P(abstain)",
                self.old_abstain_probability,
                self.abstain_probability,
            ),
        ]
        lines = [f"{'':12}  {'before':>10}  {'after':>10}"]
        lines += [f"{name:12}  {a:10.4f}  {b:10.4f}" for name, a, b in rows]
        return "\n".join(lines)


def calibrate(
    model: keras.Model,
    x: Data,
    y: Any = None,
    unknown: Data = None,
    bias: str = "mistakes",
    batch_size: int | None = None,
    verbose: str | int = "auto",
    sample_weight: Any = None,
) -> CalibrationReport:
    """Refits temperature and abstain bias on validation data, in place.

    The temperature is the one of largest likelihood of the labels among the
    classes; the centroids, and with them every distance and every decision
    between classes, stay. The problem is convex and has one solution.

    The abstain bias cannot be found that way: on known data abstaining only
    ever costs likelihood, and the best bias would be minus infinity. It needs
    to be said when abstaining is right:

    - `bias="mistakes"`, the default: where naming the most probable class
      would be a mistake, which is every misclassified sample and every sample
      of `unknown`. The likelihood of that event has one maximum; there the
      mean P(abstain) over all samples equals the share of mistakes (with half
      a mistake and half a success added, so that it is never 0 or 1). So
      P(abstain) is right on average, *at the share of unknown inputs that
      was given*: pass known and unknown samples in the proportion that is
      expected in use. Without `unknown` it answers for misclassification
      alone, and a good classifier abstains less than before.
    - `bias="margin"`: by the relation of `HALODense` between bias and
      temperature, `b = gamma * (1 - shell) - log(p_hi / p_lo)`, at the new
      temperature: an embedding of unit norm on the shell around its centroid
      prefers its class by the same odds as before.
      Only for a head with `abstain_rate=None`.
    - `bias="keep"`: as it is. The biases of a head that places them by the
      evidence keep their ratio to the temperature, so that no decision
      changes.

    A head with a far background has two biases, which move together. A later
    `fit` places them by the evidence again.

    Formulas, with `a_k = s_k / gamma` and `m` mistakes in `n` samples:

    ```python
    gamma = argmin mean(logsumexp_k(gamma * a_k) - gamma * a_y)
    sum(sigmoid(log_odds_of_abstaining)) = n * (m + 1/2) / (n + 1)
    ```

    Refit on data that the model was not trained on. Positions that the model
    masks do not count. The weights are written
    after everything has been computed; an error leaves them as they were.
    A model with a `ClassGaussians` layer may be given as well: the score of
    that layer follows P(abstain).

    Args:
        model: A trained model with one `HALODense` head, whose output is
            packed scores, or a dictionary that holds them as `"scores"`.
        x: Validation inputs, whatever `model.predict` takes; or, without `y`,
            a dataset of batches `(x, y)` or `(x, y, sample_weight)`, see
            `keras_halo.fit_class_gaussians`.
        y: Labels, integers of shape `(N, ...)` or `(N, ..., 1)`, or one-hot
            of shape `(N, ..., K)`.
        unknown: Optional inputs of no known class, or a dataset of them. Only
            for `bias="mistakes"`. Defaults to `None`.
        bias: `"mistakes"`, `"margin"` or `"keep"`. Defaults to `"mistakes"`.
        batch_size: Integer, as in `model.predict`. Defaults to 32.
        verbose: `"auto"`, 0, 1 or 2, as in `model.predict`.
        sample_weight: Optional weights of shape `(N,)` or `(N, ...)`, those
            of `y`. What has a weight of zero is left out, whatever its label,
            such as padding; every other weight counts as one. None may be
            negative. Defaults to `None`.

    Returns:
        `CalibrationReport`, with the values before and after and `undo()`.

    Raises:
        ValueError: If an argument is unknown, the model has not exactly one
            head or gives no finite packed scores, labels do not fit, or they
            are no more probable than by chance.
        ImportError: If SciPy is missing.

    Example:

    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(500, 4)).astype("float32")
    >>> y = (x[:, 0] + 0.3 * rng.normal(size=500) > 0).astype(int)
    >>> head = keras_halo.HALODense.reference(
    ...     2, centroid_initializer="identity"
    ... )
    >>> model = keras.Sequential([keras.Input((4,)), head])
    >>> calibration = calibrate(model, x, 1 - y, verbose=0)
    >>> calibration.nll < calibration.old_nll
    True
    >>> calibration.undo()

    References:

    - Chuan Guo, Geoff Pleiss, Yu Sun, Kilian Weinberger, On Calibration of
      Modern Neural Networks, 2017.
    """
    special = require("scipy.special")
    optimize = require("scipy.optimize")
    if not isinstance(bias, str) or bias not in BIAS_METHODS:
        raise ValueError(
            f"`bias` must be one of {', '.join(map(repr, BIAS_METHODS))}. "
            f"Received: bias={bias!r}."
        )
    if unknown is not None and bias != "mistakes":
        raise ValueError(
            "`unknown` only serves to find the bias. Received: unknown inputs "
            f'with bias={bias!r}. Use bias="mistakes" or leave them out.'
        )
    check_model(model)
    batch_size = check_batch_size(batch_size)
    verbose = check_verbose(verbose)
    head = find_head(model)

    if bias == "margin" and head.abstain_rate is not None:
        raise ValueError(
            'bias="margin" is for a head with the fixed margin of the '
            "published method. Received: a head with abstain_rate="
            f"{head.abstain_rate}, "
            'which places its biases by the evidence. Use bias="mistakes" or '
            'bias="keep".'
        )

    if unknown is not None:
        check_readable(unknown, "unknown")
    data = labelled_data(x, y, sample_weight)
    shape = scores_shape(model)
    if shape is not None:
        check_labels(data, model, head.units, shape[:-1], 0)
    predictor = Predictor(model)
    mask = None
    if isinstance(data, tuple):
        x, y, sample_weight = data
        scores, mask = _predict(predictor, x, batch_size, verbose)
    else:
        check_readable(data, "x")
        answers = predict_answers(
            predictor, data, "x", "abstain", batch_size, with_labels=True
        )
        scores, y, sample_weight = answers.packed, answers.labels, None
    logits, norms, old_gamma = _parts(scores)
    both, y = counted(
        np.concatenate([logits, norms], -1), y, sample_weight, mask
    )
    logits, norms = both[..., :-1], both[..., -1:]
    if not logits.size:
        raise ValueError(
            "Expected at least one sample with a weight other than zero. "
            "Received: none. Look for what made the weights."
        )
    labels = class_indices(y, logits.shape[-1], logits.shape[:-1]).ravel()
    logits = logits.reshape(-1, logits.shape[-1])
    norms = norms.reshape(-1)
    distances = logits / old_gamma
    gamma = _best_temperature(distances, labels, old_gamma, optimize, special)

    wrong = distances.argmax(axis=-1) != labels
    old = _Biases(float(head.abstain_bias.numpy()))
    if head.abstain_rate is not None:
        old = _Biases(
            old.near,
            float(head.far_bias.numpy()),
            float(head.far_scale.numpy()),
        )
    # A head that follows the evidence follows the temperature likewise: no
    # decision changes with it.
    new = old if old.far is None else old.scaled(gamma / old_gamma)
    if bias == "mistakes":
        odds = new.log_odds(gamma * distances, gamma * norms, special)
        num_mistakes = int(wrong.sum())
        if unknown is not None:
            if is_dataset(unknown) or isinstance(unknown, tuple):
                others = predict_answers(
                    predictor, unknown, "unknown", "abstain", batch_size
                ).packed
            else:
                others, mask = _predict(predictor, unknown, batch_size, verbose)
                if mask is not None:
                    shape = others.shape[:-1]
                    kept = counted_positions(None, shape, "unknown", mask)
                    others = others[kept]
            others, other_norms, _ = _parts(others)
            others = others.reshape(-1, others.shape[-1]) / old_gamma
            more = new.log_odds(
                gamma * others, gamma * other_norms.reshape(-1), special
            )
            odds = np.concatenate([odds, more])
            num_mistakes += len(others)
        new = new.shifted(_best_shift(odds, num_mistakes, optimize, special))
    elif bias == "margin":
        dim = head.centroids.shape[-1]
        at_start = geometry.abstain_bias(dim, head.units, head.margin_smoothing)
        change = gamma - geometry.initial_temperature(dim)
        new = _Biases(at_start + change * (1.0 - geometry.shell(dim)))

    def summary(gamma, biases):
        return _summary(
            gamma * distances,
            biases.log_odds(gamma * distances, gamma * norms, special),
            labels,
            special,
        )

    old_nll, old_ece, old_abstain = summary(old_gamma, old)
    nll, ece, abstain = summary(gamma, new)
    weights = [head.raw_gamma, head.abstain_bias]
    if new.far is not None:
        weights.append(head.far_bias)
    calibration = CalibrationReport(
        old_temperature=old_gamma,
        temperature=gamma,
        old_abstain_bias=old.near,
        abstain_bias=new.near,
        old_nll=old_nll,
        nll=nll,
        old_ece=old_ece,
        ece=ece,
        old_abstain_probability=old_abstain,
        abstain_probability=abstain,
        error_rate=float(wrong.mean()),
        _old_weights=tuple((w, np.array(w.numpy())) for w in weights),
    )
    head.assign_temperature(gamma)
    head.abstain_bias.assign(new.near)
    if new.far is not None:
        head.far_bias.assign(new.far)
    return calibration


@dataclasses.dataclass(frozen=True)
class _Biases:
    """The biases of a head: of the near and, or `None`, the far background."""

    near: float
    far: float | None = None
    far_scale: float = 1.0

    def scaled(self, factor):
        return _Biases(self.near * factor, self.far * factor, self.far_scale)

    def shifted(self, shift):
        far = None if self.far is None else self.far + shift / self.far_scale
        return _Biases(self.near + shift, far, self.far_scale)

    def log_odds(self, logits, norms, special):
        """Log-odds of abstaining, for `gamma * |x|^2` as the norms."""
        abstain = self.near
        if self.far is not None:
            top = logits.max(axis=-1)
            far = top + self.far_scale * (0.5 * norms + self.far - top)
            abstain = np.logaddexp(self.near, far)
        return abstain - special.logsumexp(logits, axis=-1)


def _predict(predictor, x, batch_size, verbose):
    """Packed scores of arrays, checked, and the mask of the model."""
    output, mask = predictor.predict(x, batch_size, verbose)
    scores = read_model_output(output, "the output of the model").scores
    packing.check_packed(scores, argument="model.predict(x)")
    if scores.size == 0:
        raise ValueError("Expected at least one sample. Received: none.")
    return scores, mask


def _parts(scores):
    """Class logits and squared norms in float64, and the temperature."""
    scores = scores.astype("float64")
    parts = packing.unpack(scores)
    gamma = float(parts.temperature[(0,) * scores.ndim])
    return parts.logits, parts.squared_norm, gamma


def _best_temperature(distances, labels, old_gamma, optimize, special):
    # The slope of the convex likelihood rises with gamma: its root is sought.
    own = np.take_along_axis(distances, labels[:, None], axis=-1)[:, 0]

    def slope(log_gamma):
        weights = special.softmax(np.exp(log_gamma) * distances, axis=-1)
        return float(np.mean((weights * distances).sum(axis=-1) - own))

    low, high = np.log(old_gamma) + np.log(MAX_FACTOR) * np.array([-1.0, 1.0])
    if not slope(low) < 0.0:
        raise ValueError(
            "No temperature fits: the labels are no more probable than by "
            "chance. Received: an accuracy of "
            f"{np.mean(distances.argmax(axis=-1) == labels):.3f}. Check that "
            "labels and model number the classes alike."
        )
    if not slope(high) > 0.0:
        warnings.warn(
            "The temperature stays as it is: the likelihood grows with it "
            "without end, because (nearly) every sample is classified "
            f"correctly. Received: {len(labels)} samples. Pass more validation "
            "data, not data that the model was trained on.",
            stacklevel=3,
        )
        return old_gamma
    return float(np.exp(optimize.brentq(slope, low, high, xtol=1e-10)))


def _best_shift(log_odds, num_mistakes, optimize, special):
    """What to add to the log-odds so that they are right on average."""
    target = (num_mistakes + 0.5) / (len(log_odds) + 1.0)

    def excess(shift):
        return float(np.mean(special.expit(log_odds + shift)) - target)

    # Every sigmoid is below the target at one end and above it at the other.
    center = special.logit(target)
    return float(
        optimize.brentq(
            excess,
            center - log_odds.max() - 1.0,
            center - log_odds.min() + 1.0,
            xtol=1e-10,
        )
    )


def _summary(logits, log_odds, labels, special):
    log_p = special.log_softmax(logits, axis=-1)
    nll = -np.take_along_axis(log_p, labels[:, None], axis=-1).mean()
    ece = expected_calibration_error(
        labels, np.exp(log_p), min(_NUM_BINS, len(labels))
    )
    return float(nll), ece, float(special.expit(log_odds).mean())
