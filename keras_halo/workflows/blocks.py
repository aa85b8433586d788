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
    return blocks_and_features(model, features)[0]


def blocks_and_features(model, features):
    """Blocks as `find_blocks` returns them, and features computed with them.

    A model inside that was looked into is replaced by one that returns its
    blocks as well. In a file, a layer cannot be part of both: so what comes
    after that model is called again, on the output of its replacement.

    Args:
        model: Functional or sequential Keras model, for names that are free.
        features: Symbolic tensor of it, up to which blocks are looked for.

    Returns:
        Tuple of a list of symbolic tensors, from early to late, and the
        features, which are the same tensor where nothing was replaced.

    Example:

    >>> inner = keras.Sequential([keras.Input((4,)), layers.Dense(8)])
    >>> outer = keras.Sequential([keras.Input((4,)), inner, layers.Dense(3)])
    >>> blocks, features = blocks_and_features(outer, inner(outer.inputs[0]))
    >>> [block.shape for block in blocks], features.shape
    ([(None, 8)], (None, 8))
    """
    ends, (features,) = _rebuilt(model, [features])
    return ends, features


def _rebuilt(model, tensors):
    """Ends of blocks, and the tensors computed with what was replaced."""
    found, replaced, replacements = [], {}, {}

    def now(tensor):
        return replaced.get(id(tensor), tensor)

    for operation, node in _in_order(tensors):
        arguments = keras.tree.map_structure(now, node.arguments.args)
        outputs = node.output_tensors
        if _is_graph(operation):
            if id(operation) not in replacements:
                name = free_name(model, f"blocks_{len(replacements) + 1}")
                replacements[id(operation)] = _with_blocks(operation, name)
            replacement, count, places = replacements[id(operation)]
            results = _listed(replacement(*arguments))
            found.extend((None, tensor) for tensor in results[:count])
            results = [results[place] for place in places]
        elif any(id(tensor) in replaced for tensor in node.input_tensors):
            keywords = keras.tree.map_structure(now, node.arguments.kwargs)
            results = keras.tree.flatten(operation(*arguments, **keywords))
            found.extend((operation, tensor) for tensor in results)
        else:
            found.extend((operation, tensor) for tensor in outputs)
            continue
        replaced |= zip(map(id, outputs), results, strict=True)
    ends, tensors = _ends(found), [now(tensor) for tensor in tensors]
    # Flattened maps know where something is, which averages do not.
    operation, features = _without_dropout(tensors[0])
    if not (
        isinstance(operation, _AVERAGES) or any(features is end for end in ends)
    ):
        ends.append(features)
    return ends, tensors


def _with_blocks(model, name):
    """A model that returns the blocks of another one and its outputs.

    With it come the number of blocks, which are returned first, and the places
    of the outputs: one that is a block by itself is returned once.
    """
    ends, outputs = _rebuilt(model, model.outputs)
    tensors, places = list(ends), []
    for output in outputs:
        same = [i for i, tensor in enumerate(tensors) if tensor is output]
        if not same:
            same = [len(tensors)]
            tensors.append(output)
        places.append(same[0])
    replacement = keras.Model(input_structure(model), tensors, name=name)
    return replacement, len(ends), places


def _without_dropout(tensor):
    """The operation that made a tensor, and its output, but for dropout."""
    operation, node = history_of(tensor)
    while isinstance(operation, (layers.Dropout, layers.Identity)):
        tensor = node.input_tensors[0]
        operation, node = history_of(tensor)
    return operation, tensor


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


def _in_order(tensors):
    """Operations and calls up to tensors, what is read before its reader."""
    done, pending = {}, [(tensor, False) for tensor in reversed(tensors)]
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
