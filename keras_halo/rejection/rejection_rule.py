import os
from collections.abc import Iterator
from typing import Any, Self

import numpy as np

from keras_halo.layers.decision import Decision
from keras_halo.ops import ood_scores
from keras_halo.rejection import bounds, storage
from keras_halo.rejection.decisions import Decisions, decisions_of
from keras_halo.rejection.fitted import CalibrationCounts, Fitted, Ranks
from keras_halo.rejection.readings import Reading, read_errors, read_scores
from keras_halo.rejection.wording import share
from keras_halo.utils.types import Array, ArrayLike, Scores


class RejectionRule:
    """Base of the rules that turn scores into decisions with a guarantee.

    An input is accepted when its score is at most `threshold`. The label of an
    accepted input is its most probable class, also where the model by itself
    would have abstained: the rule takes the place of the model's own
    threshold, or its guarantee would not hold. The label of a rejected input is
    -1.

    Calibration data must be drawn as the inputs to come will be, and must not
    have been used in training. Scores of any rank are taken; every position
    (a pixel, a token) then counts as one sample of the calibration data, and
    decisions have the shape of the positions. Positions of one input are not
    independent of each other, hence a guarantee that follows from so many
    samples holds only as far as they are; for one that holds by the number of
    inputs calibrate on a single random position of each, or on one score an
    input with `method=None`. `model.predict` drops the mask of padding: pass
    the positions that are none, `scores[kept]`.

    A rule knows from packed scores which head it was fitted on, by the number
    of classes, the size of the embedding, the temperature and the abstain
    logit, and refuses the scores of another. It cannot notice further training
    that leaves all four as they are.

    Args:
        method: String, the score that packed scores are judged by, one of
            `keras_halo.OOD_METHODS`; `"fitted"` for the score that a model of
            `keras_halo.fit_class_gaussians` emits; or `None` if plain scores
            are passed, larger for outliers, of any origin.

    A rule of your own names its constructor arguments in `parameters`, finds a
    threshold in `find_threshold` and says in `state_guarantee` what holds.
    Registered with `keras.saving.register_keras_serializable`, it saves and
    loads as the others do.

    Attributes:
        parameters: Tuple of strings, the constructor arguments beside
            `method`. Each is an attribute that JSON can hold.
        judges_singly: Boolean, whether an input is accepted exactly where its
            own score is at most the threshold. A rule that overrides `accepts`
            has to say. Defaults to `True`.
        fitted_on_known: Boolean, whether the samples of `fit` are known
            inputs, so that their scores give p-values. Defaults to `True`.
        keeps_scores: Boolean, whether all calibration scores are kept and
            saved, as `calibration_scores`. Defaults to `False`.
        gives_sets: Boolean, whether `predict` gives sets of labels. Defaults
            to `False`.
        sample_name: String, what the samples of `fit` are, in the words of
            `summary`. Defaults to `"known samples"`.

    Example:

    >>> @keras.saving.register_keras_serializable(package="mine")
    ... class MedianRule(keras_halo.rejection.RejectionRule):
    ...     def __init__(self, method="abstain"):
    ...         super().__init__(method)
    ...
    ...     def find_threshold(self, scores, wrong):
    ...         return float(np.median(scores)), None
    ...
    ...     def state_guarantee(self):
    ...         return "Keeps half of the calibration data. Nothing else."
    >>> rule = MedianRule(method=None).fit([1.0, 2.0, 9.0])
    >>> rule.predict([1.5, 3.0]).accepted.tolist()
    [True, False]
    """

    parameters = ()
    judges_singly = True
    fitted_on_known = True
    keeps_scores = False
    gives_sets = False
    sample_name = "known samples"

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "accepts" in cls.__dict__ and "judges_singly" not in cls.__dict__:
            raise TypeError(
                f"{cls.__name__} overrides `accepts` and does not say whether "
                "it still accepts exactly what is at most the threshold. Set "
                "`judges_singly = False`: no layer can decide as it does then."
            )

    def __init__(self, method: str | None) -> None:
        if method is not None:
            ood_scores.check_method(method, allow_fitted=True)
        self.method = method
        self._fitted = None

    def __setattr__(self, name, value):
        # A guarantee that was measured must not change its words.
        if name != "_fitted" and self.__dict__.get("_fitted") is not None:
            raise AttributeError(
                f"`{name}` cannot be set: the guarantee of a fitted rule holds "
                "for the arguments it was fitted with. Make a new rule and fit "
                "it."
            )
        super().__setattr__(name, value)

    def fit(
        self,
        scores: Scores,
        labels: ArrayLike | None = None,
        errors: ArrayLike | None = None,
    ) -> Self:
        """Fits the rule on calibration data of known inputs.

        Args:
            scores: What `model.predict` returned: packed scores of shape
                `(..., packed_width)`, or the dictionary of a fitted model; with
                `method=None` plain scores of shape `(...)`.
            labels: Integers of shape `(...)` or `(..., 1)`, or one-hot of
                shape `(..., K)`. Needs packed scores. With labels or errors
                `summary` tells the error rate of what is accepted. Defaults
                to `None`.
            errors: Booleans of shape `(...)`, true where the prediction is
                wrong, instead of `labels`. Defaults to `None`.

        Returns:
            The rule itself.

        Raises:
            ValueError: If the input is not usable or too small for the
                guarantee; the rule stays as it was.
        """
        reading = read_scores(scores, self.method)
        self.learn(reading, read_errors(reading, labels, errors))
        return self

    def learn(self, reading: Reading, wrong: Array | None) -> None:
        """Fits the rule on what was read.

        Args:
            reading: `keras_halo.rejection.readings.Reading`.
            wrong: Boolean array of shape `(...)`, where the prediction is
                wrong, or `None`.
        """
        found = self.find_threshold(
            reading.scores.ravel(), None if wrong is None else wrong.ravel()
        )
        if not isinstance(found, tuple) or len(found) != 2:
            raise ValueError(
                "`find_threshold` must return the threshold and the scores to "
                f"keep, or `None` for these. Received: {found!r}."
            )
        self._remember(reading, float(found[0]), found[1], wrong)

    def _remember(
        self,
        reading,
        threshold,
        scores=None,
        wrong=None,
        accepted=None,
        groups=None,
        **counts,
    ):
        if accepted is None:
            accepted = reading.scores <= threshold
        if wrong is not None:
            counts["errors"] = int(wrong.sum())
            counts["accepted_errors"] = int((wrong & accepted).sum())
        calibration = CalibrationCounts(
            samples=reading.scores.size,
            inputs=len(reading.scores),
            accepted=int(accepted.sum()),
            **counts,
        )
        ranks = None
        if self.fitted_on_known:
            entries, counts = bounds.table_of_ranks(reading.scores.ravel())
            ranks = Ranks(entries.tolist(), counts.tolist())
        self._fitted = Fitted(
            threshold, calibration, reading.fingerprint, scores, ranks, groups
        )

    @property
    def learned(self) -> Any:
        """What the rule learned, for `restore`."""
        return self._require_fitted()

    def restore(self, fitted: Any) -> None:
        """Takes over what a rule learned that was saved.

        Args:
            fitted: `keras_halo.rejection.fitted.Fitted`.
        """
        self._fitted = fitted

    def predict(self, scores: Scores) -> Decisions:
        """Decides which inputs are accepted.

        Another batch size or compiler may move scores by a few units in the
        last place of float32. Thresholds are placed so that inputs which share
        a score stay together; a single one whose score is that near to the
        threshold may be decided otherwise.

        Args:
            scores: Scores of the kind and the model that the rule was fitted
                on: packed of shape `(..., packed_width)`, or plain of shape
                `(...)`.

        Returns:
            `Decisions`: `accepted`, `labels` with -1 for rejected, `scores`,
            each of shape `(...)`. Rows that hold NaN are rejected, with a
            warning; their score is NaN.

        Raises:
            ValueError: If the rule is not fitted, or the scores are not usable
                or come from another model.
        """
        reading = self.read(scores)
        return decisions_of(reading, self.accepts_reading(reading))

    def accepts_reading(self, reading: Reading) -> Array:
        """Decides what was read; rows that are not finite are rejected.

        Args:
            reading: What `read` returned.

        Returns:
            Boolean array of shape `(...)`.
        """
        # Whatever a rule makes of NaN.
        return self.accepts(reading.scores) & np.isfinite(reading.scores)

    def to_layer(self, **kwargs: Any) -> Decision:
        """Makes a layer that decides as the rule does, inside a model.

        Append it to the model that the rule was fitted on, so that the
        decision goes wherever the model is exported to. The layer answers with
        the labels of `predict`; it does not look for scores of another model,
        which `predict` refuses.

        Scores that another compiler computes may differ in the last digits,
        so an input whose score is that near to the threshold may be decided
        otherwise.

        Args:
            **kwargs: Base layer keyword arguments, such as `name`.

        Returns:
            `keras_halo.layers.Decision`. With `method="fitted"` it takes the
            dictionary of the fitted model; with `method=None` the packed
            scores, which hold the labels, and the score to judge:
            `layer(scores, ood)`.

        Raises:
            ValueError: If the rule is not fitted, or its decision on one input
                depends on others.

        Example:

        >>> rng = np.random.default_rng(0)
        >>> model = keras.Sequential(
        ...     [keras.Input((4,)), keras_halo.HALODense(3)]
        ... )
        >>> scores = model.predict(rng.normal(size=(100, 4)), verbose=0)
        >>> rule = keras_halo.rejection.CoverageRule(0.9).fit(scores)
        >>> deployed = keras.Sequential([model, rule.to_layer()])
        >>> x = rng.normal(size=(50, 4))
        >>> labels = rule.predict(model.predict(x, verbose=0)).labels
        >>> np.array_equal(deployed.predict(x, verbose=0), labels)
        True
        """
        self.require_judging_singly()
        return Decision(self.threshold, self.method, **kwargs)

    def require_judging_singly(self) -> None:
        """Raises `ValueError` where a decision depends on other inputs."""
        if not self.judges_singly:
            raise ValueError(
                f"What {self!r} decides depends on more than the score and the "
                "threshold, such as the others in the batch, and a layer "
                "judges each input by itself. Use a rule that does too, or "
                "`rule.predict` on what the exported model answers."
            )

    def certificate(self) -> dict[str, Any]:
        """Returns what the rule guarantees and learned.

        It is what `save` writes, and what a model of `keras_halo.guard`
        carries.

        Returns:
            Dictionary that JSON holds: `"rule"` and `"config"`, its
            `"guarantee"` and `"limits"` in words, `"threshold"`,
            `"calibration"` counts, the `"fingerprint"` of the head, a
            `"checksum"`, and scores where the rule keeps them. A rule with
            several thresholds has a list of these, and `"groups"` with the
            name and the counts of each.

        Raises:
            ValueError: If the rule is not fitted, or its class not registered.
        """
        return storage.certificate(self, self._require_fitted())

    @property
    def threshold(self) -> float:
        """Float, the largest score that is accepted."""
        fitted = self._require_fitted()
        if fitted.groups is not None:
            raise ValueError(
                "Expected one threshold for all inputs. Received: "
                f"{self!r}, which has several. Use `rule.thresholds`."
            )
        return fitted.threshold

    @property
    def guarantee(self) -> str:
        """String, what the rule guarantees, in one or two sentences."""
        guarantee = self.state_guarantee()
        if self._fitted is None:
            return guarantee
        calibration = self._fitted.calibration
        if calibration.samples != calibration.inputs:
            guarantee += (
                f" This counts the {calibration.samples} positions of "
                f"{calibration.inputs} inputs as independent samples."
            )
        return guarantee

    @property
    def limits(self) -> str:
        """String, what the rule does not guarantee."""
        return self.state_limits()

    def summary(self) -> str:
        """Describes the rule, its guarantee, and its calibration.

        Returns:
            String of a few lines.

        Raises:
            ValueError: If the rule is not fitted.
        """
        calibration = self._require_fitted().calibration
        return "\n".join(
            [
                repr(self),
                f"Guarantee: {self.guarantee}",
                f"Not guaranteed: {self.limits}",
                f"Calibration: {calibration.samples} {self.sample_name}, "
                + ", ".join(self.describe_calibration(calibration))
                + ".",
            ]
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Saves the fitted rule with its guarantee as a JSON file.

        The file is replaced as a whole or not at all. It carries a checksum;
        `keras_halo.rejection.load_rule` refuses it once it is damaged.

        Args:
            path: String or path, the file to write.

        Raises:
            ValueError: If the rule is not fitted.
        """
        storage.save(self, self._require_fitted(), path)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor arguments as a dictionary."""
        return {
            name: getattr(self, name) for name in (*self.parameters, "method")
        }

    def __repr__(self):
        arguments = ", ".join(
            f"{name}={value!r}" for name, value in self.get_config().items()
        )
        return f"{type(self).__name__}({arguments})"

    def find_threshold(
        self, scores: Array, wrong: Array | None
    ) -> tuple[float, Array | None]:
        """Finds the threshold; to be overridden.

        Args:
            scores: Vector of finite scores, float64.
            wrong: Boolean vector, where the prediction is wrong, or `None`.

        Returns:
            Tuple: the largest score to accept, a float, and the sorted scores
            if the rule keeps them, otherwise `None`. Take
            `keras_halo.rejection.bounds.threshold_above` where the scores may
            have ties.
        """
        raise NotImplementedError

    def state_guarantee(self) -> str:
        """Says what the rule guarantees; to be overridden.

        Returns:
            String, one or two sentences.
        """
        raise NotImplementedError

    def state_limits(self) -> str:
        """Says what the rule does not guarantee; may be overridden.

        Returns:
            String, one or two sentences.
        """
        return (
            "How many unknown inputs are rejected, and anything once inputs "
            "differ from the calibration data."
        )

    def accepts(self, scores: Array) -> Array:
        """Decides by scores; may be overridden.

        Args:
            scores: float64 array of any shape.

        Returns:
            Boolean array of this shape.
        """
        return scores <= self.threshold

    @property
    def calibration_scores(self) -> Array | None:
        """Sorted vector of the calibration scores, or `None` if not kept."""
        return self._require_fitted().scores

    def describe_calibration(self, calibration: Any) -> Iterator[str]:
        """Yields what `summary` tells of the calibration; may be overridden.

        Args:
            calibration: The counts `samples`, `inputs`, `accepted`, and,
                where they are known, `errors` and `accepted_errors`.

        Yields:
            Strings, parts of one sentence.
        """
        accepted = calibration.accepted
        yield f"{share(accepted, calibration.samples)} accepted"
        if calibration.errors is not None:
            yield (
                f"{share(calibration.errors, calibration.samples)} wrong, "
                f"{share(calibration.accepted_errors, accepted)} among the "
                "accepted"
            )

    def read(self, scores: Scores) -> Reading:
        """Reads new scores as the rule judges them.

        Args:
            scores: As in `predict`.

        Returns:
            `keras_halo.rejection.readings.Reading`; NaN for rows that are not
            finite.

        Raises:
            ValueError: See `predict`.
        """
        fitted = self._require_fitted()
        reading = read_scores(scores, self.method, to_judge=True)
        if None not in (fitted.fingerprint, reading.fingerprint):
            self.check_head(reading.fingerprint)
        return reading

    def check_head(self, fingerprint: Any) -> None:
        """Raises `ValueError` unless the rule was fitted on this head.

        Args:
            fingerprint: `keras_halo.rejection.fitted.Fingerprint`.
        """
        self._require_fitted().fingerprint.check_same(fingerprint)

    def _require_fitted(self):
        if self._fitted is None:
            raise ValueError(
                f"The {type(self).__name__} has not been fitted. Call "
                "`rule.fit(scores)` on calibration data first, or load a "
                "fitted rule with `keras_halo.rejection.load_rule(path)`."
            )
        return self._fitted

    def samples_needed(self) -> int:
        """Says how many samples the guarantee takes; may be overridden.

        Returns:
            Integer, the smallest number of calibration samples that may do.
        """
        return 1

    def require_samples(self, received: int, needed: int | None = None) -> None:
        """Raises `ValueError` where there are fewer samples than needed.

        Args:
            received: Integer.
            needed: Integer, or `None` for `samples_needed`. Defaults to
                `None`.
        """
        if needed is None:
            needed = self.samples_needed()
        if received < needed:
            raise ValueError(
                f"{self!r} needs at least {needed} calibration samples for "
                f"its guarantee. Received: {received}. Collect "
                f"{needed - received} more, or ask for less."
            )
