"""Checks of arguments that several parts of the package take."""

import keras


def check_units(units):
    """Raises `ValueError` unless `units` is an integer of at least 2."""
    if not isinstance(units, int) or isinstance(units, bool) or units < 2:
        raise ValueError(
            "`units` is the number of classes and must be an integer of at "
            "least 2: the centroid of a single class would coincide with the "
            f"origin, where abstaining sits. Received: units={units}. For a "
            "yes-or-no question use units=2."
        )


def check_label_smoothing(label_smoothing):
    """Raises `ValueError` unless `label_smoothing` is in `[0, 1)`."""
    # Written so that NaN fails.
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(
            "`label_smoothing` must be in [0, 1). Received: "
            f"label_smoothing={label_smoothing}. Use 0 to switch it off."
        )


def check_block_size(block_size):
    """Raises `ValueError` unless `block_size` is `None` or positive."""
    if block_size is None:
        return
    if (
        not isinstance(block_size, int)
        or isinstance(block_size, bool)
        or block_size < 1
    ):
        raise ValueError(
            "`block_size` must be a positive integer, or `None` for all "
            f"classes at once. Received: block_size={block_size}."
        )


def check_floating(dtype, layer):
    """Raises `ValueError` unless embeddings of a dtype suit a layer."""
    dtype = keras.backend.standardize_dtype(dtype)
    if "float" not in dtype:
        raise ValueError(
            f"`{type(layer).__name__}` takes embeddings in floating point. "
            f"Received: dtype={dtype}. Cast the input to float32, or put the "
            "network that computes embeddings before the head."
        )
