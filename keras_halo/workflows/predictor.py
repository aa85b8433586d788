"""Predictions of a model together with the mask that Keras gave them."""

import contextlib
import warnings

import keras

from keras_halo.ops.model_output import read_model_output
from keras_halo.utils.batches import check_numbers
from keras_halo.utils.keras_private import flat_layers, mask_of


class Predictor:
    """Predicts what a model answers, and which positions of it count.

    A model that was given padding knows it: `Embedding(mask_zero=True)` and
    `Masking` make a mask that travels with the tensors, and that losses and
    metrics honour. `model.predict` drops it; here it is returned beside what
    `model.predict` returns. Models without a layer that can make a mask are
    asked as they are. So are models that predict in a way of their own, such as
    tasks that preprocess their inputs: no mask is taken of them.

    One predictor serves any number of batches and data sets of a model, which
    is compiled once.

    Args:
        model: Keras model.
        read: Optional function from the outputs of the model to the tensor
            whose mask is meant. Defaults to `None`, which means the packed
            scores among them.

    Example:

    >>> inputs = keras.Input((None,), dtype="int32")
    >>> x = keras.layers.Embedding(9, 4, mask_zero=True)(inputs)
    >>> model = keras.Model(inputs, keras_halo.HALODense(3)(x))
    >>> scores, mask = Predictor(model).predict_on_batch(np.array([[5, 0]]))
    >>> scores.shape, mask.tolist()
    ((1, 2, 9), [[True, False]])
    """

    def __init__(self, model, read=None):
        self.model = model
        self._read = _packed_scores if read is None else read
        self._masked = None
        self._has_warned = False

    def predict_on_batch(self, x):
        """Returns predictions and a boolean mask, or `None` without one.

        Args:
            x: Inputs, as in `model.predict_on_batch`.
        """
        return self._predict("predict_on_batch", x)

    def predict(self, x, batch_size=None, verbose="auto"):
        """Returns predictions and a boolean mask, or `None` without one.

        Args:
            x: Arrays, as in `model.predict`.
            batch_size: Optional integer. Defaults to `None`, which means 32.
            verbose: As in `model.predict`. Defaults to `"auto"`.
        """
        return self._predict(
            "predict", x, batch_size=batch_size, verbose=verbose
        )

    def _predict(self, method, x, **kwargs):
        own = own_predictions(self.model)
        if own:
            self._warn_of_masks()
            if method not in own and "predict" in own:
                # Whatever `predict` does to its inputs is done to these too.
                method = "predict"
                kwargs = {"batch_size": _num_rows(x), "verbose": 0}
        elif method == "predict":
            check_numbers(x)
        if own or not may_mask(self.model):
            return getattr(self.model, method)(x, **kwargs), None
        has_own_step = (
            type(self.model).predict_step is not keras.Model.predict_step
        )
        if has_own_step or not self.model.built:
            output = getattr(self.model, method)(x, **kwargs)
        found, masks = getattr(self._with_mask(), method)(x, **kwargs)
        mask = masks[0].astype(bool) if masks else None
        return (output if has_own_step else found), mask

    def _warn_of_masks(self):
        if self._has_warned or not _makes_masks(self.model):
            return
        self._has_warned = True
        warnings.warn(
            f"{type(self.model).__name__} predicts in a way of its own, so "
            "that its masks cannot be told: padding counts like everything "
            "else. Give it a `sample_weight` of zero, or pass the model of its "
            "graph, `keras.Model(model.inputs, model.outputs)`, with inputs as "
            "that takes them.",
            stacklevel=2,
        )

    def _with_mask(self):
        if self._masked is None:
            strategy = getattr(self.model, "distribute_strategy", None)
            scope = contextlib.nullcontext()
            if strategy is not None:
                scope = strategy.scope()
            with scope:
                self._masked = _WithMask(self.model, self._read)
            self._masked.run_eagerly = self.model.run_eagerly
            self._masked.jit_compile = self.model.jit_compile
        return self._masked


class _WithMask(keras.Model):
    """Answers as a model does, and with the mask in a list; empty if none."""

    def __init__(self, model, read):
        # TensorFlow takes no name that begins with an underscore.
        super().__init__(name="with_mask")
        self.model = model
        self.read = read

    def call(self, inputs):
        outputs = self.model(inputs, training=False)
        try:
            mask = mask_of(self.read(outputs))
        except ValueError:
            # Who reads the outputs says what is wrong with them.
            mask = None
        return outputs, [] if mask is None else [mask]


def _packed_scores(outputs):
    return read_model_output(outputs).scores


def own_predictions(model):
    """Names of the methods by which a class predicts otherwise than Keras.

    Args:
        model: Keras model.

    Returns:
        Tuple of some of `"predict"` and `"predict_on_batch"`.

    Example:

    >>> own_predictions(keras.Sequential())
    ()
    """
    return tuple(
        name
        for name in ("predict", "predict_on_batch")
        if getattr(type(model), name) is not getattr(keras.Model, name)
    )


def _num_rows(x):
    return len(keras.tree.flatten(x)[0])


def _makes_masks(model):
    return any(
        isinstance(layer, keras.layers.Masking)
        or getattr(layer, "mask_zero", False)
        for layer in flat_layers(model)
    )


def may_mask(model):
    """Whether a model has a layer that can make a mask.

    Args:
        model: Keras model.

    Returns:
        Boolean: true for `Embedding(mask_zero=True)`, `Masking` and `Lambda`,
        and for classes of others, which may do anything.

    Example:

    >>> dense = keras.layers.Dense(3)
    >>> may_mask(keras.Sequential([keras.Input((4,)), dense]))
    False
    >>> masking = keras.layers.Masking()
    >>> may_mask(keras.Sequential([keras.Input((2, 4)), masking, dense]))
    True
    """
    return _makes_masks(model) or any(
        isinstance(layer, keras.layers.Lambda)
        or type(layer).__module__.partition(".")[0]
        not in ("keras", "keras_halo")
        for layer in flat_layers(model)
    )
