import warnings
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

from keras_halo import metrics
from keras_halo.utils.batches import check_readable, count_batches
from keras_halo.utils.checks import as_integer, check_batch_size
from keras_halo.utils.types import Data
from keras_halo.workflows.predicting import (
    check_score_method,
    check_sets,
    predict_answers,
)
from keras_halo.workflows.predictor import Predictor

# `<name>_auroc` of a set with one of these names would be another quantity.
RESERVED_NAMES = ("known", "ood", "val")

_KEYS = ("auroc", "fpr95", "abstention_rate")


class OODMonitor(keras.callbacks.Callback):
    """Measures at epoch ends how well a model tells unknown inputs.

    The numbers are added to the `logs` of the epoch, so that they appear in the
    progress bar, in the `History` that `fit` returns and in TensorBoard, and
    can be monitored by the callbacks that come *after* this one in the list:

    - `ood_auroc`, `ood_fpr95`, `ood_abstention_rate`: means over the unknown
      sets;
    - `<name>_auroc`, `<name>_fpr95`, `<name>_abstention_rate` of each set;
    - `known_abstention_rate`.

    `fpr95` is the share of unknown inputs accepted at the threshold that
    accepts 95 % of the known ones. The abstention rate is the share in which
    abstaining is the most probable answer.

    Positions that the model masks do not count, as in `evaluate_ood`.

    Training is not disturbed: the weights after it are the same as without the
    monitor, and where a model diverges the numbers are NaN, with a warning. The
    first batch of every set is tried before the first epoch, so that a mistake
    shows at once.

    Args:
        known: Inputs of the known classes, held out from training: an array, a
            tuple whose first entry is one, a `tf.data.Dataset`, torch
            `DataLoader` or `keras.utils.PyDataset`. Labels are not looked at.
        unknown: Dictionary of name to inputs of no known class.
        method: The score, as in `keras_halo.evaluate_ood`. Defaults to
            `"abstain"`.
        batch_size: Optional integer, the batch size for arrays. Defaults to
            `None`, which means 32.
        frequency: Integer: measure at the end of every `frequency`-th epoch.
            In the epochs between, the logs repeat the last measurement, NaN
            before the first one; give `EarlyStopping` a `frequency` of 1.
            Defaults to `1`.

    Raises:
        ValueError: At construction if an argument is not one of those listed,
            a set is a generator (which can be read only once) or infinite; at
            the begin of training if a set is empty or the model cannot take it
            or emits no packed scores.

    Example:

    >>> inputs = keras.Input((4,))
    >>> model = keras.Model(inputs, keras_halo.HALODense(2)(inputs))
    >>> model.compile("sgd", loss=keras_halo.HALOLoss())
    >>> x = np.eye(4, dtype="float32")
    >>> monitor = keras_halo.OODMonitor(x, {"far": 9 * x})
    >>> stop = keras.callbacks.EarlyStopping("ood_auroc", mode="max")
    >>> history = model.fit(
    ...     x, np.array([0, 1, 0, 1]), callbacks=[monitor, stop], verbose=0
    ... )
    >>> [key for key in history.history if key.startswith("far")]
    ['far_abstention_rate', 'far_auroc', 'far_fpr95']
    """

    def __init__(
        self,
        known: Data,
        unknown: Mapping[str, Data],
        method: str | Callable[..., Any] = "abstain",
        batch_size: int | None = None,
        frequency: int = 1,
    ) -> None:
        super().__init__()
        check_score_method(method)
        check_sets(unknown, reserved=RESERVED_NAMES)
        frequency = as_integer(
            frequency, "frequency", 1, ", a number of epochs"
        )
        batch_size = check_batch_size(batch_size)
        sets = {f"unknown[{name!r}]": data for name, data in unknown.items()}
        for where, data in {"known": known, **sets}.items():
            check_readable(data, where, again=True)
            count_batches(data)
        self.known = known
        self.unknown = dict(unknown)
        self.method = method
        self.batch_size = batch_size
        self.frequency = frequency
        self._predictor = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._measured = self._unmeasured()
        known = self._answers(None, max_batches=1)
        for name in self.unknown:
            self._compare(known, self._answers(name, max_batches=1))

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        if logs is None:
            return
        if (epoch + 1) % self.frequency == 0:
            try:
                self._measured = self.measure()
            except ValueError as error:
                # Training that has gone wrong keeps its history.
                warnings.warn(
                    f"Nothing could be measured in epoch {epoch + 1}: {error}",
                    stacklevel=2,
                )
                self._measured = self._unmeasured()
        # In every epoch, for callbacks that read the names in the first one.
        logs.update(self._measured)

    def _unmeasured(self):
        names = [f"ood_{key}" for key in _KEYS]
        names.append("known_abstention_rate")
        names += [f"{name}_{key}" for name in self.unknown for key in _KEYS]
        return dict.fromkeys(names, float("nan"))

    def measure(self) -> dict[str, float]:
        """Measures the model as it is now.

        Returns:
            Dictionary of name to float, the keys that go into the logs.
        """
        known = self._answers(None)
        by_set = {
            name: self._compare(known, self._answers(name))
            for name in self.unknown
        }
        measured = {
            f"ood_{key}": float(np.mean([v[key] for v in by_set.values()]))
            for key in _KEYS
        }
        measured["known_abstention_rate"] = float(known.abstained.mean())
        for name, values in by_set.items():
            for key in sorted(values):
                measured[f"{name}_{key}"] = values[key]
        return measured

    def _answers(self, name, **kwargs):
        """Answers on the unknown set with that name, `None` for the known."""
        model = self.model
        if self._predictor is None or self._predictor.model is not model:
            self._predictor = Predictor(model)
        return predict_answers(
            self._predictor,
            self.known if name is None else self.unknown[name],
            "known" if name is None else f"unknown[{name!r}]",
            self.method,
            self.batch_size,
            **kwargs,
        )

    def _compare(self, known, unknown):
        return {
            "auroc": metrics.auroc(known.score, unknown.score),
            "fpr95": metrics.fpr_at_recall(
                known.score, unknown.score, positive="known"
            ),
            "abstention_rate": float(unknown.abstained.mean()),
        }
