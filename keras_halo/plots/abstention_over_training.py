from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_halo.plots import drawing
from keras_halo.utils.checks import as_integer, finite_vector, number_array
from keras_halo.utils.types import Axes

_SUFFIX = "_abstention_rate"

# What `keras_halo.metrics.AbstentionRate` logs in every epoch.
_OF_METRIC = {
    "abstention_rate": "training",
    "val_abstention_rate": "validation",
}


def abstention_over_training(
    history: Any, ax: Axes = None, frequency: int = 1
) -> Axes:
    """Draws how often a model says "I don't know", epoch by epoch.

    Needs a training with `keras_halo.OODMonitor`, or with the metric
    `keras_halo.metrics.AbstentionRate`: the abstention rate on the known
    inputs should fall to a few percent while that on the unknown sets rises.

    Args:
        history: What `model.fit` returned (a `keras.callbacks.History`), or
            its dictionary `history`.
        ax: Optional matplotlib `Axes` to draw on. Defaults to `None`, the axes
            of a new figure.
        frequency: Integer, the `frequency` of the monitor, which logs what
            it has last measured in every epoch: other epochs are left out.
            Defaults to `1`.

    Returns:
        The `Axes`.

    Raises:
        ValueError: If the history holds no abstention rates.
        ImportError: If matplotlib is missing.

    Example:

    >>> ax = keras_halo.plots.abstention_over_training(
    ...     {
    ...         "known_abstention_rate": [0.9, 0.2, 0.05],
    ...         "noise_abstention_rate": [0.9, 0.7, 0.8],
    ...     }
    ... )
    >>> [line.get_label() for line in ax.get_lines()]
    ['known', 'noise']
    """
    rates = _abstention_rates(history)
    frequency = as_integer(
        frequency, "frequency", 1, ", that of the `keras_halo.OODMonitor`"
    )
    ax = drawing.axes_or_new(ax)
    for name, style in zip(_OF_METRIC.values(), ("--", ":"), strict=True):
        if name in rates:
            values = rates.pop(name)
            _draw(ax, values, 1, name, color=drawing.KNOWN_COLOR, ls=style)
    known = rates.pop("known", None)
    mean = rates.pop("ood", None)
    if known is not None:
        _draw(ax, known, frequency, "known", color=drawing.KNOWN_COLOR, lw=3)
    for index, (name, values) in enumerate(rates.items()):
        _draw(ax, values, frequency, name, **drawing.unknown_style(index))
    # The mean of a single set is that set.
    if mean is not None and len(rates) != 1:
        _draw(
            ax,
            mean,
            frequency,
            "mean of unknown",
            color=drawing.text_color(),
            linestyle=":",
        )
    ax.set(
        ylim=(-0.02, 1.02),
        xlabel="epoch",
        ylabel="abstention rate",
    )
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(loc="best", frameon=False)
    return ax


def _abstention_rates(history):
    logs = getattr(history, "history", history)
    if not isinstance(logs, Mapping):
        raise ValueError(
            "`history` must be what `model.fit` returned, or its dictionary "
            f"`history`. Received: history of type {type(history).__name__}."
        )
    rates = {
        _OF_METRIC.get(key, key.removesuffix(_SUFFIX)): _rates(values, key)
        for key, values in logs.items()
        if key in _OF_METRIC or key.endswith(_SUFFIX)
    }
    if not rates:
        raise ValueError(
            "`history` holds no abstention rates. Expected keys that end in "
            f"'{_SUFFIX}'. Received: keys={sorted(logs)}. Train with "
            "`callbacks=[keras_halo.OODMonitor(known, unknown)]`."
        )
    return rates


def _rates(values, key):
    """Finite numbers; those before a first measurement are NaN."""
    values = number_array(values, key)
    is_missing = np.isnan(values) if values.dtype.kind == "f" else False
    finite_vector(np.where(is_missing, 0.0, values), key)
    return values.astype("float64")


def _draw(ax, values, frequency, name, **style):
    epochs = np.arange(frequency, len(values) + 1, frequency)
    values = values[frequency - 1 :: frequency]
    style = {"lw": 1.8, "marker": "o", "markersize": 3.5, **style}
    ax.plot(epochs, values, label=name, **style)
