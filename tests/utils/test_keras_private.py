"""What Keras does not publish does what the package takes it to do."""

import keras
import numpy as np
import pytest
from helpers import jit, to_numpy
from keras import ops

from keras_halo.utils import keras_private as private

BACKEND = keras.backend.backend()


def test_a_mask_is_what_was_put_or_what_keras_made():
    tensor = ops.ones((2, 3))
    assert private.mask_of(tensor) is None
    mask = ops.array([[True, False, True], [False, False, True]])
    private.set_mask(tensor, mask)
    np.testing.assert_array_equal(
        to_numpy(private.mask_of(tensor)), to_numpy(mask)
    )
    embedded = keras.layers.Embedding(5, 4, mask_zero=True)(
        ops.array([[1, 0, 2]])
    )
    found = to_numpy(private.mask_of(embedded))
    assert found.tolist() == [[True, False, True]]
    for other in (np.ones(3), [1.0], None, "text"):
        assert private.mask_of(other) is None


def test_losses_of_keras_read_the_mask_that_was_put():
    y_pred = ops.array([1.0, 2.0, 30.0])
    loss = keras.losses.MeanAbsoluteError(reduction="sum")
    values = ops.expand_dims(y_pred, -1)
    private.set_mask(values, ops.array([True, True, False]))
    assert float(loss(np.zeros((3, 1)), values)) == pytest.approx(1.0 + 2.0)


def test_a_tensor_comes_from_the_call_that_made_it():
    a, b = keras.Input((3,)), keras.Input((3,))
    layer = keras.layers.Dense(2)
    first, second = layer(a), layer(b)
    for output, source in ((first, a), (second, b)):
        maker, node = private.history_of(output)
        assert maker is layer
        assert node.input_tensors[0] is source
        assert node.output_tensors[0] is output
    assert [n.input_tensors[0] for n in private.inbound_nodes(layer)] == [a, b]
    total = first + second
    maker, node = private.history_of(total)
    assert isinstance(maker, keras.Operation) and maker is not layer
    assert list(node.input_tensors) == [first, second]


def test_a_call_with_arrays_is_no_node():
    layer = keras.layers.Dense(2)
    layer(np.ones((1, 3)))
    assert private.inbound_nodes(layer) == []


def test_layers_are_found_however_deep():
    deep = keras.layers.Dense(2, name="deep")
    inner = keras.Sequential([keras.Input((3,)), deep], name="inner")
    middle = keras.Sequential([keras.Input((3,)), inner], name="middle")
    x = keras.Input((3,))
    model = keras.Model(x, keras.layers.Dense(1, name="last")(middle(x)))
    found = private.flat_layers(model)
    assert found[0] is model
    for layer in (middle, inner, deep, model.get_layer("last")):
        assert sum(layer is other for other in found) == 1
    assert private.flat_layers(deep) == [deep]


def test_variables_of_a_layer_are_its_own():
    class Outer(keras.layers.Layer):
        def build(self, input_shape):
            self.scale = self.add_weight(shape=(), name="scale")
            self.count = self.add_weight(
                shape=(), trainable=False, name="count"
            )
            self.seed = keras.random.SeedGenerator(0)
            self.inner = keras.layers.Dense(2)
            self.inner.build(input_shape)

    layer = Outer()
    layer.build((None, 3))
    found = private.own_variables(layer)
    assert [variable.name for variable in found] == ["scale", "count"]
    assert len(layer.variables) > 2
    names = [v.name for v in private.own_variables(layer.inner)]
    assert names == ["kernel", "bias"]


class Counted(keras.layers.Layer):
    """Counts how often it is computed."""

    def __init__(self, left_out):
        super().__init__()
        if left_out:
            private.leave_out_of_remat(self)
        self.calls = 0

    def call(self, inputs):
        self.calls += 1
        return ops.sin(inputs)


@pytest.mark.parametrize("left_out", [True, False])
def test_a_layer_that_is_left_out_is_not_computed_anew(left_out):
    x = np.array([0.5], "float32")
    with keras.RematScope(mode="full"):
        layer = Counted(left_out)
        if BACKEND == "jax":
            import jax

            program = jax.make_jaxpr(jax.grad(lambda x: layer(x).sum()))(x)
            # JAX writes what is computed anew once, and marks it.
            marked = "checkpoint" in str(program) or "remat" in str(program)
            assert marked == (not left_out)
            return
        if BACKEND == "torch":
            import torch

            tensor = torch.tensor(x, requires_grad=True)
            layer(tensor).sum().backward()
            gradient = tensor.grad
        else:
            import tensorflow as tf

            tensor = tf.constant(x)
            with tf.GradientTape() as tape:
                tape.watch(tensor)
                value = tf.reduce_sum(layer(tensor))
            gradient = tape.gradient(value, tensor)
    assert to_numpy(gradient) == pytest.approx(np.cos(x))
    assert layer.calls == (1 if left_out else 2)


@pytest.mark.any_backend
@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_callback_follows_the_direction_of_a_metric(direction):
    @keras.saving.register_keras_serializable(package="tests")
    class Odd(keras.metrics.Mean):
        def __init__(self, name="odd"):
            super().__init__(name)
            private.set_direction(self, direction)

        def update_state(self, y_true, y_pred, sample_weight=None):
            super().update_state(y_pred)

    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile(loss="mse", metrics=[Odd()])
    stop = keras.callbacks.EarlyStopping("val_odd", patience=5)
    data = np.ones((4, 1), "float32"), np.ones((4, 1), "float32")
    model.fit(
        *data, validation_data=data, epochs=1, callbacks=[stop], verbose=0
    )
    better, worse = (1.0, 0.0) if direction == "up" else (0.0, 1.0)
    assert stop.monitor_op(better, worse)
    assert not stop.monitor_op(worse, better)
    assert private.direction_of(Odd()) == direction


@pytest.mark.any_backend
def test_directions_and_functions_that_are_not_there_are_none():
    metric = keras.metrics.Mean()
    private.set_direction(metric, None)
    assert private.direction_of(metric) is None
    assert private.function_of(metric) is None
    accuracy = keras.metrics.BinaryAccuracy()
    assert private.direction_of(accuracy) == "up"
    # What a metric says of itself stays.
    private.set_direction(accuracy, None)
    assert private.direction_of(accuracy) == "up"
    assert private.direction_of(keras.metrics.MeanSquaredError()) == "down"

    def gap(y_true, y_pred):
        return ops.abs(y_true - y_pred)

    wrapper = keras.metrics.MeanMetricWrapper(gap)
    assert private.function_of(wrapper) is gap


def test_arrays_are_read_in_batches():
    x, y = np.arange(10.0).reshape(5, 2), np.arange(5)
    weights = np.arange(5) / 2
    adapter = private.data_adapter(x, y, weights, batch_size=2)
    assert adapter.num_batches == 3
    batches = list(adapter.get_numpy_iterator())
    assert [len(batch[0]) for batch in batches] == [2, 2, 1]
    for position, whole in enumerate((x, y, weights)):
        parts = np.concatenate([batch[position] for batch in batches])
        np.testing.assert_array_equal(parts, whole)


def test_datasets_are_told_apart():
    others = [np.ones(3), [1.0], None, "text", iter([]), {"x": np.ones(3)}]
    for thing in others:
        assert not private.is_tf_dataset(thing)
        assert not private.is_torch_dataloader(thing)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        dataset = tf.data.Dataset.range(3)
        for one in (dataset, dataset.batch(2).prefetch(1)):
            assert private.is_tf_dataset(one)
            assert not private.is_torch_dataloader(one)
        # A tensor of the same library is none.
        assert not private.is_tf_dataset(tf.ones(3))
    if BACKEND == "torch":
        import torch

        loader = torch.utils.data.DataLoader(torch.ones(3))
        assert private.is_torch_dataloader(loader)
        assert not private.is_tf_dataset(loader)
        assert not private.is_torch_dataloader(torch.ones(3))


@pytest.mark.any_backend
def test_messages_go_where_those_of_keras_go(capsys, caplog):
    private.print_message("on the screen")
    assert capsys.readouterr().out == "on the screen\n"
    keras.config.disable_interactive_logging()
    try:
        with caplog.at_level("INFO", logger="absl"):
            private.print_message("in the log")
    finally:
        keras.config.enable_interactive_logging()
    assert capsys.readouterr().out == "" and "in the log" in caplog.text


@pytest.mark.skipif(BACKEND != "torch", reason="of PyTorch alone")
def test_transforms_and_compilers_of_torch_are_noticed():
    import torch

    found = []

    def square(x):
        found.append(private.in_torch_transform())
        return (x * x).sum()

    square(torch.ones(2))
    torch.func.grad(square)(torch.ones(2))
    torch.func.vmap(square)(torch.ones(2, 2))
    square(torch.ones(2))
    assert found == [False, True, True, False]

    def which(x):
        return x + 1.0 if private.is_torch_compiling() else x

    one = torch.ones(1)
    assert which(one).item() == 1.0
    compiled = torch.compile(which, backend="eager", fullgraph=True)
    assert compiled(one).item() == 2.0
    assert not private.is_torch_compiling()


@pytest.mark.skipif(BACKEND == "torch", reason="of other backends")
def test_compilers_of_other_backends_are_not_taken_for_those_of_torch():
    found = []

    @jit
    def function(x):
        found.append(private.in_torch_transform())
        found.append(private.is_torch_compiling())
        return x

    function(ops.ones(2))
    assert found and not any(found)
