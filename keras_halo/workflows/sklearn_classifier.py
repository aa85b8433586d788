import copy
import functools
import inspect
from typing import Any

import keras
import numpy as np

from keras_halo.ops import packing
from keras_halo.utils.checks import check_model
from keras_halo.utils.extras import require
from keras_halo.utils.types import Array, ArrayLike


class SKLearnClassifier(keras.wrappers.SKLearnClassifier):
    """Makes a model that ends in a HALO head a classifier of scikit-learn.

    Takes the place of `keras.wrappers.SKLearnClassifier`, which takes the
    columns of packed scores for classes. Training is the same. What comes out
    is what scikit-learn expects: labels as `fit` was given them, probabilities
    of shape `(N, K)` with rows that sum to one, and accuracy as the score. So
    pipelines, cross-validation, and libraries for conformal prediction can use
    it.

    With `abstain_label`, `predict` answers this label where the model
    abstains. `score` then counts abstaining as an error. Probabilities are
    those of the classes under the condition that the model answers, whether or
    not it does.

    Formula:

    ```python
    predict_proba = softmax([s_1, ..., s_K])
    decision_function = [s_1, ..., s_K]     # s_2 - s_1 for two classes
    ```

    Args:
        model: A compiled `keras.Model`, which is cloned before it is fitted,
            or a callable that returns one, called with `X`, one-hot labels `y`
            and `model_kwargs`. The model ends in `HALODense(y.shape[1])` and
            its loss is `HALOLoss()`.
        warm_start: Boolean, whether fitting goes on from the weights of the
            given model. Defaults to `False`.
        model_kwargs: Optional dictionary of arguments for a callable `model`.
            Defaults to `None`.
        fit_kwargs: Optional dictionary of arguments of `model.fit`, such as
            `{"epochs": 20, "verbose": 0}`. Defaults to `None`.
        abstain_label: Optional label, such as -1 or `"unknown"`, of the kind
            that `y` has and none of its classes. Defaults to `None`: `predict`
            always names a class.

    Attributes:
        model_: The fitted `keras.Model`, for everything else that keras_halo
            does: `keras_halo.ood_score(classifier.model_.predict(x))`.
        classes_: Array of shape `(K,)`, the labels.
        history_: What `model.fit` returned.

    Raises:
        ImportError: If scikit-learn is not installed.
        ValueError: On fitting, if `model` is neither a compiled model nor
            makes one, or arguments are no dictionary. If the output of the
            model is no packed scores of as many
            classes as there are labels, or `abstain_label` is a class or of
            another kind than the labels.

    Example:

    >>> def make_model(X, y):
    ...     inputs = keras.Input(X.shape[1:])
    ...     outputs = keras_halo.HALODense(y.shape[1])(inputs)
    ...     model = keras.Model(inputs, outputs)
    ...     model.compile("adam", loss=keras_halo.HALOLoss())
    ...     return model
    >>> classifier = keras_halo.SKLearnClassifier(
    ...     make_model, fit_kwargs={"epochs": 2, "verbose": 0}
    ... )
    >>> x = np.array([[0.0, 1.0], [1.0, 0.0], [0.1, 1.0], [1.0, 0.1]])
    >>> classifier = classifier.fit(x, np.array(["up", "right"] * 2))
    >>> classifier.predict_proba(x).shape
    (4, 2)
    """

    def __init__(
        self,
        model: Any,
        warm_start: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        fit_kwargs: dict[str, Any] | None = None,
        abstain_label: Any = None,
    ) -> None:
        super().__init__(
            model,
            warm_start=warm_start,
            model_kwargs=model_kwargs,
            fit_kwargs=fit_kwargs,
        )
        self.abstain_label = abstain_label

    def __sklearn_clone__(self) -> "SKLearnClassifier":
        # That of Keras forgets `fit_kwargs`.
        parameters = self.get_params(deep=False)
        if not callable(self.model) or isinstance(self.model, keras.Model):
            parameters["model"] = copy.deepcopy(self.model)
        parameters["fit_kwargs"] = copy.copy(self.fit_kwargs)
        return type(self)(**parameters)

    def fit(
        self, X: ArrayLike, y: ArrayLike, **kwargs: Any
    ) -> "SKLearnClassifier":
        """Fits the model.

        Args:
            X: Array of shape `(N, features)`.
            y: Labels of shape `(N,)`, numbers or strings.
            **kwargs: Arguments of `model.fit`, which go before `fit_kwargs`.

        Returns:
            The classifier itself.
        """
        _check_abstain_label(self.abstain_label, np.unique(y))
        model, fit_kwargs = self.model, self.fit_kwargs
        _check_kwargs(self.model_kwargs, "model_kwargs")
        _check_kwargs(fit_kwargs, "fit_kwargs")
        _check_source(model, self.model_kwargs or {})
        if not isinstance(model, keras.Model):
            self.model = functools.partial(_made, model)
        # Into which Keras would write the arguments.
        self.fit_kwargs = None
        try:
            return super().fit(X, y, **{**(fit_kwargs or {}), **kwargs})
        finally:
            self.model, self.fit_kwargs = model, fit_kwargs

    def predict(self, X: ArrayLike) -> Array:
        """Names the most probable class, or `abstain_label`.

        Args:
            X: Array of shape `(N, features)`.

        Returns:
            Array of shape `(N,)`, labels as given to `fit`.
        """
        logits, abstain_logit = self._logits(X)
        labels = self.classes_[logits.argmax(axis=-1)]
        if self.abstain_label is None:
            return labels
        abstained = abstain_logit > logits.max(axis=-1)
        # An array of its own dtype: `np.where` would cast a Python integer to
        # that of the labels, -1 to 255 for `uint8`.
        return np.where(abstained, np.asarray(self.abstain_label), labels)

    def predict_proba(self, X: ArrayLike) -> Array:
        """Probabilities of the classes, under the condition of an answer.

        Args:
            X: Array of shape `(N, features)`.

        Returns:
            Float64 array of shape `(N, K)`, in the order of `classes_`.
        """
        logits, _ = self._logits(X)
        exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return exponentials / exponentials.sum(axis=-1, keepdims=True)

    def decision_function(self, X: ArrayLike) -> Array:
        """Logits of the classes, as scorers of scikit-learn read them.

        Args:
            X: Array of shape `(N, features)`.

        Returns:
            Float64 array of shape `(N, K)`; `(N,)`, positive for the second
            class, where there are two.
        """
        logits, _ = self._logits(X)
        if logits.shape[-1] == 2:
            return logits[:, 1] - logits[:, 0]
        return logits

    def _logits(self, x):
        validation = require("sklearn.utils.validation")
        validation.check_is_fitted(self)
        if hasattr(validation, "validate_data"):
            x = validation.validate_data(self, x, reset=False)
        else:
            # Before scikit-learn 1.6 it was a method.
            x = self._validate_data(x, reset=False)
        scores = self.model_.predict(x, verbose=0)
        packing.check_packed(scores, argument="the output of the model")
        num_classes = packing.count_classes(scores.shape)
        if scores.ndim != 2 or num_classes != len(self.classes_):
            raise ValueError(
                f"Expected packed scores of {len(self.classes_)} classes, one "
                "row a sample. Received: output of shape "
                f"{scores.shape}. Let the model end in "
                f"`HALODense({len(self.classes_)})`."
            )
        logits = packing.answer_logits(scores).astype("float64")
        return logits[:, :-1], logits[:, -1]


def _check_source(model, model_kwargs):
    """Raises `ValueError` unless this is a compiled model or makes one."""
    if isinstance(model, keras.Model):
        _check_compiled(model)
        return
    # Layers can be called, but make no model.
    makes = callable(model) and not isinstance(model, keras.Layer)
    if makes:
        try:
            inspect.signature(model).bind(X=None, y=None, **model_kwargs)
        except TypeError:
            makes = False
        except ValueError:
            # Functions of C may have no signature.
            pass
    if not makes:
        raise ValueError(
            "`model` must be a compiled `keras.Model`, or a function of `X`, "
            "`y` and `model_kwargs` that returns one. Received: "
            f"model={model!r:.100}, model_kwargs={model_kwargs!r:.100}. Pass "
            "the function itself, such as `def make_model(X, y)`."
        )


def _made(make, /, **arguments):
    """The model that a function makes, checked."""
    model = make(**arguments)
    check_model(model)
    _check_compiled(model)
    return model


def _check_compiled(model):
    parts = ("compiled", "loss", "optimizer")
    missing = [part for part in parts if not getattr(model, part, None)]
    if missing:
        raise ValueError(
            "`model` must be compiled, with a loss and an optimizer. Received: "
            f"a model without {missing}. Call "
            '`model.compile("adam", loss=keras_halo.HALOLoss())` first.'
        )


def _check_kwargs(given, argument):
    if given is not None and not isinstance(given, dict):
        raise ValueError(
            f"`{argument}` must be a dictionary or None. Received: "
            f"{argument}={given!r:.100}. Write arguments as "
            '`{"epochs": 20}`.'
        )


def _check_abstain_label(label, classes):
    if label is None:
        return
    are_strings = classes.dtype.kind in "OUST"
    if isinstance(label, str) != are_strings or label in classes.tolist():
        raise ValueError(
            "`abstain_label` must be of the kind of the labels, and none of "
            f"them. Received: abstain_label={label!r} for labels such as "
            f"{classes[0]!r}. Take -1 for numbers, 'unknown' for strings."
        )
