"""Names for what users pass and receive, for type checkers.

Keras publishes no types and tensors have one in each backend, so that `Any`
stands for them, behind names that say what is meant.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

from numpy.typing import ArrayLike, NDArray

# A tensor of whatever backend.
Tensor: TypeAlias = Any

# A shape, or a list of shapes where a layer has several inputs.
Shape: TypeAlias = Any

# Arrays or a dataset: whatever `model.predict` takes.
Data: TypeAlias = Any

# What `keras.initializers.get`, `regularizers.get` and so on take.
Identifier: TypeAlias = Any

# A dtype's name or a `keras.DTypePolicy`.
DType: TypeAlias = Any

# `matplotlib.axes.Axes`, which only the extra `tools` brings.
Axes: TypeAlias = Any

Array: TypeAlias = NDArray[Any]

# Packed scores, or what a model of `keras_halo.fit_class_gaussians` returns.
Scores: TypeAlias = ArrayLike | Mapping[str, Any]
