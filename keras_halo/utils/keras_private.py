"""The one place that reads what Keras, and PyTorch, do not publish.

Everything here is in Keras 3.10 and in every release since. Where a later one
breaks, it breaks here.
"""

import sys

from keras.src import backend
from keras.src.trainers import data_adapters
from keras.src.utils import io_utils


def mask_of(tensor):
    """Returns the mask that Keras carries on a tensor, or `None`.

    Args:
        tensor: Tensor, array, or anything else, which has none.

    Example:

    >>> mask_of(np.zeros(3)) is None
    True
    """
    return backend.get_keras_mask(tensor)


def set_mask(tensor, mask):
    """Puts a mask on a tensor, for the layers and losses that read it.

    Args:
        tensor: Tensor.
        mask: Boolean tensor.

    Example:

    >>> tensor = ops.zeros(2)
    >>> set_mask(tensor, ops.array([True, False]))
    >>> ops.convert_to_numpy(mask_of(tensor)).tolist()
    [True, False]
    """
    backend.set_keras_mask(tensor, mask=mask)


def history_of(tensor):
    """Returns where a symbolic tensor comes from.

    Args:
        tensor: `keras.KerasTensor` of a functional graph.

    Returns:
        Tuple: the layer or operation that made it, and the node, which is that
        one of its calls that did.

    Example:

    >>> layer = keras.layers.Dense(2)
    >>> x = keras.Input((3,))
    >>> maker, node = history_of(layer(x))
    >>> maker is layer, node.input_tensors[0] is x
    (True, True)
    """
    operation, node_index, _ = tensor._keras_history
    return operation, inbound_nodes(operation)[node_index]


def inbound_nodes(operation):
    """Returns the nodes of a layer or operation, one for each symbolic call.

    Args:
        operation: Keras layer or operation.

    Returns:
        List of nodes, which have `input_tensors`, `output_tensors` and
        `arguments`.

    Example:

    >>> len(inbound_nodes(keras.layers.Dense(2)))
    0
    """
    return operation._inbound_nodes


def flat_layers(model):
    """Returns a model or layer and all layers inside it, however deep.

    Args:
        model: Keras model or layer.

    Returns:
        List of layers, that of `model` first.

    Example:

    >>> inner = keras.Sequential([keras.layers.Dense(2, name="deep")])
    >>> model = keras.Sequential([keras.Input((3,)), inner])
    >>> "deep" in [layer.name for layer in flat_layers(model)]
    True
    """
    return list(model._flatten_layers())


def own_variables(layer):
    """Returns the variables of a layer without those of layers inside it.

    Random seeds do not count: Keras saves them by themselves.

    Args:
        layer: Keras layer.

    Returns:
        List of variables, in the order in which Keras saves them.

    Example:

    >>> layer = keras.layers.Dense(2)
    >>> layer.build((None, 3))
    >>> [variable.name for variable in own_variables(layer)]
    ['kernel', 'bias']
    """
    return layer._trainable_variables + layer._non_trainable_variables


def leave_out_of_remat(layer):
    """Takes a layer out of `keras.RematScope`.

    Args:
        layer: Keras layer, at the end of its base class's `__init__`.

    Example:

    >>> leave_out_of_remat(keras.layers.Dense(2))
    """
    layer._remat_mode = None


def direction_of(metric):
    """Returns whether callbacks take more for better, as a metric says.

    Args:
        metric: `keras.Metric`.

    Returns:
        `"up"`, `"down"`, or `None` for a metric that does not say.

    Example:

    >>> direction_of(keras.metrics.BinaryAccuracy())
    'up'
    """
    return getattr(metric, "_direction", None)


def set_direction(metric, direction):
    """Tells callbacks whether more of a metric is better.

    Args:
        metric: `keras.Metric`.
        direction: `"up"`, `"down"`, or `None` to leave it to the callbacks.

    Example:

    >>> metric = keras.metrics.Mean()
    >>> set_direction(metric, "down")
    >>> direction_of(metric)
    'down'
    """
    if direction is not None:
        metric._direction = direction


def function_of(metric):
    """Returns the function that a metric averages, or `None`.

    Args:
        metric: `keras.Metric`.

    Example:

    >>> function_of(keras.metrics.BinaryAccuracy()).__name__
    'binary_accuracy'
    """
    return getattr(metric, "_fn", None)


def data_adapter(x, y=None, sample_weight=None, batch_size=None):
    """Returns Keras's reader of arrays and data sets of every kind.

    Args:
        x: Arrays, or a data set that yields its own labels.
        y: Optional labels, for arrays.
        sample_weight: Optional weights, for arrays.
        batch_size: Optional integer, for arrays.

    Example:

    >>> data_adapter(np.zeros((70, 3)), batch_size=32).num_batches
    3
    """
    return data_adapters.get_data_adapter(
        x, y, sample_weight=sample_weight, batch_size=batch_size
    )


def is_tf_dataset(data):
    """Whether data are a `tf.data.Dataset`, without importing TensorFlow.

    Example:

    >>> is_tf_dataset(np.zeros(3))
    False
    """
    return data_adapters.is_tf_dataset(data)


def is_torch_dataloader(data):
    """Whether data are a `DataLoader` of PyTorch, without importing it.

    Example:

    >>> is_torch_dataloader(np.zeros(3))
    False
    """
    return data_adapters.is_torch_dataloader(data)


def print_message(text):
    """Prints as Keras does: to the log where that is switched on.

    Args:
        text: String.

    Example:

    >>> print_message("1/1 noise")
    1/1 noise
    """
    io_utils.print_msg(text)


def in_torch_transform():
    """Tells whether a transform of `torch.func` is running.

    PyTorch publishes no way to ask.

    Example:

    >>> in_torch_transform()
    False
    """
    torch = sys.modules.get("torch")
    return torch is not None and torch._C._are_functorch_transforms_active()


def is_torch_compiling():
    """Tells whether `torch.compile` or `torch.export` is tracing.

    Example:

    >>> is_torch_compiling()
    False
    """
    torch = sys.modules.get("torch")
    return torch is not None and torch.compiler.is_compiling()
