"""Finds the blocks of a network: where it is done with something."""

import keras
from keras import layers

from keras_halo.utils.keras_private import history_of
from keras_halo.workflows.graph import free_name, input_structure

# Tensors that say what another one says already, the inputs included.
_REPEATING = (
    layers.InputLayer,
    layers.Normalization,
    layers.Rescaling,
    layers.Resizing,
    layers.ZeroPadding1D,
    layers.ZeroPadding2D,
    layers.ZeroPadding3D,
    layers.Cropping1D,
    layers.Cropping2D,
    layers.Cropping3D,
    layers.MaxPooling1D,
    layers.MaxPooling2D,
    layers.MaxPooling3D,
    layers.AveragePooling1D,
    layers.AveragePooling2D,
    layers.AveragePooling3D,
    layers.Dropout,
    layers.Flatten,
    layers.Identity,
    layers.Reshape,
)

_AVERAGES = (
    layers.GlobalAveragePooling1D,
    layers.GlobalAveragePooling2D,
    layers.GlobalAveragePooling3D,
)

# How many of the residual sums of a transformer are read.
_NUM_SUMS = 4


def find_blocks(model, features):
    """Returns the tensors in which blocks of a network end.

    These are the last feature map of every resolution, the last vector of every
    width, and, of sequences of which all have one shape, such as in a
    transformer, four of the residual sums, the last among them. What only
    averages or rearranges another one is left out, but for the features
    themselves where they are a map that was flattened.

    Args:
        model: Functional or sequential Keras model, for names that are free.
        features: Symbolic tensor of it, up to which blocks are looked for.

    Returns:
        List of symbolic tensors, from early to late.

    Example:

    >>> inputs = keras.Input((8, 8, 1))
    >>> early = layers.Conv2D(4, 3, padding="same")(inputs)
    >>> late = layers.Conv2D(6, 3)(layers.MaxPooling2D()(early))
    >>> features = layers.GlobalAveragePooling2D()(late)
    >>> model = keras.Model(inputs, layers.Dense(2)(features))
    >>> [block.shape for block in find_blocks(model, features)]
    [(None, 8, 8, 4), (None, 2, 2, 6)]
    """
    closed = []
    while True:
        ends, opened = _found(model, features, closed)
        # In a file, a layer cannot be part of two models: what is read inside
        # of a model cannot be, where its output is needed as well.
        read = [operation for end in ends for operation, _ in _in_order(end)]
        shared = [o for o in opened if any(o is other for other in read)]
        if not shared:
            return ends
        closed += shared


def _found(model, features, closed):
    """Ends of blocks, and the models inside that were looked into."""
    found, opened = [], []
    for operation, node in _in_order(features):
        if _is_graph(operation) and not any(operation is o for o in closed):
            inner = find_blocks(operation, operation.outputs[0])
            if inner:
                opened.append(operation)
                taps = keras.Model(
                    input_structure(operation),
                    inner,
                    name=free_name(model, f"blocks_{len(opened)}"),
                )
                tensors = taps(*node.arguments.args)
                found.extend((None, tensor) for tensor in _listed(tensors))
            continue
        found.extend((operation, tensor) for tensor in node.output_tensors)
    ends = _ends(found)
    # Flattened maps know where something is, which averages do not.
    if not (_is_average(features) or any(features is end for end in ends)):
        ends.append(features)
    return ends, opened


def _is_average(tensor):
    """Whether a tensor is the mean of a map over its positions."""
    operation, node = history_of(tensor)
    while isinstance(operation, (layers.Dropout, layers.Identity)):
        operation, node = history_of(node.input_tensors[0])
    return isinstance(operation, _AVERAGES)


def _ends(found):
    last, sums, vectors = {}, {}, {}
    for place, (operation, tensor) in enumerate(found):
        shape = tuple(tensor.shape)
        if (
            len(shape) < 2
            or shape[-1] is None
            or not keras.backend.is_float_dtype(tensor.dtype)
            or isinstance(operation, (*_REPEATING, *_AVERAGES))
        ):
            continue
        if len(shape) == 2:
            vectors[shape] = place
        elif len(shape) == 3 and isinstance(operation, layers.Add):
            sums.setdefault(shape, []).append(place)
        elif any(n != 1 for n in shape[1:-1]):
            # A resolution, however many channels it has at its end.
            last[shape[1:-1]] = place
    chosen = {*vectors.values()}
    for shape, places in sums.items():
        step = -(-len(places) // _NUM_SUMS)
        chosen.update(places[::-1][::step])
        # Layers after the last sum add little to it.
        last.pop(shape[1:-1], None)
    chosen.update(last.values())
    return [found[place][1] for place in sorted(chosen)]


def _in_order(tensor):
    """Operations and calls up to a tensor, what is read before its reader."""
    done, pending = {}, [(tensor, False)]
    while pending:
        tensor, ready = pending.pop()
        operation, node = history_of(tensor)
        if node in done:
            continue
        if ready:
            done[node] = operation
            continue
        pending.append((tensor, True))
        pending.extend((read, False) for read in reversed(node.input_tensors))
    return [(operation, node) for node, operation in done.items()]


def _is_graph(operation):
    return isinstance(operation, keras.Model) and bool(
        getattr(operation, "outputs", None)
    )


def _listed(tensors):
    return list(tensors) if isinstance(tensors, (list, tuple)) else [tensors]
