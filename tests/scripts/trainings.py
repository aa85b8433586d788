"""Ten steps of training a small HALO classifier, in many ways.

    python tests/scripts/trainings.py FOLDER WAY [WAY ...]

writes losses and weights to `FOLDER/WAY.npz`, and what else the way has to
tell to `FOLDER/WAY.json`. Every way starts from the same weights and sees the
same batches, so that the results can be compared. A script, because the number
of devices has to be set before a backend starts.
"""

import json
import os
import pathlib
import sys
import traceback

import keras
import numpy as np
from keras import ops

from keras_halo import (
    HALOContrastiveLoss,
    HALODense,
    HALOLoss,
    HALOSimilarity,
)

NUM_CLASSES, EMBEDDING_DIM, BATCH_SIZE, NUM_STEPS = 8, 6, 16, 10
CENTROIDS = ".*halo_dense/centroids"


def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(BATCH_SIZE * NUM_STEPS, 12)).astype("float32")
    return x, rng.integers(0, NUM_CLASSES, len(x))


def build(num_classes=NUM_CLASSES):
    model = keras.Sequential(
        [
            keras.layers.Input((12,)),
            keras.layers.Dense(16, activation="tanh"),
            keras.layers.Dense(EMBEDDING_DIM),
            HALODense(num_classes, embedding_dim=None, name="halo_dense"),
        ]
    )
    start_from_the_same_weights(model)
    return model


def start_from_the_same_weights(model):
    rng = np.random.default_rng(1)
    for variable in model.trainable_variables:
        if len(variable.shape) == 2:
            variable.assign(
                rng.normal(size=variable.shape).astype("float32") * 0.5
            )


def pairs():
    """Inputs of two towers, and their ids; some come twice in a batch."""
    x, _ = data()
    return [x, x[:, ::-1] + 0.1 * np.roll(x, 1, axis=0)], np.arange(len(x)) // 3


class Gather(keras.layers.Layer):
    """The embeddings of all devices in the place of those of this one."""

    def call(self, x):
        return gathered(x)

    def compute_output_shape(self, input_shape):
        return (None, *input_shape[1:])


def gathered(x):
    """Rows of all devices; a gradient finds its way back to each."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        context = tf.distribute.get_replica_context()
        # It forgets the size of the embeddings.
        return ops.reshape(context.all_gather(x, axis=0), (-1, *x.shape[1:]))
    from torch.distributed.nn.functional import all_gather

    return ops.concatenate(all_gather(x))


def build_towers(gather=False):
    inputs = [keras.layers.Input((12,)) for _ in range(2)]
    embeddings = []
    for x in inputs:
        x = keras.layers.Dense(16, activation="tanh")(x)
        x = keras.layers.Dense(EMBEDDING_DIM)(x)
        embeddings.append(Gather()(x) if gather else x)
    scores = HALOSimilarity(bidirectional=True)(embeddings)
    model = keras.Model(inputs, scores)
    start_from_the_same_weights(model)
    return model


def adam(**settings):
    # With the usual epsilon a gradient twice as large changes nothing, and
    # shares that are added instead of averaged would not be seen.
    return keras.optimizers.Adam(1e-2, epsilon=0.1, **settings)


def fit(
    model, batch_size=BATCH_SIZE, loss=None, settings=None, arrays=None, **how
):
    """Trains, and returns the mean loss after every step."""
    losses = []
    model.compile(adam(**(settings or {})), loss or HALOLoss(), **how)
    model.fit(
        *(arrays or data()),
        batch_size=batch_size,
        shuffle=False,
        verbose=0,
        callbacks=[
            keras.callbacks.LambdaCallback(
                on_train_batch_end=lambda _, logs: losses.append(logs["loss"])
            )
        ],
    )
    return losses


def one_device():
    model = build()
    return model, fit(model), {}


def blocks_of_classes():
    model = build()
    return model, fit(model, loss=HALOLoss(block_size=3)), {}


def gradient_accumulation():
    model = build()
    losses = fit(
        model,
        batch_size=BATCH_SIZE // 2,
        settings={"gradient_accumulation_steps": 2},
    )
    return model, losses[1::2], {}


def rematerialization():
    with keras.RematScope(mode="full"):
        model = build()
        # On TensorFlow Keras recomputes layers in eager steps only, `Dense`
        # as well.
        eagerly = keras.backend.backend() == "tensorflow"
        return model, fit(model, run_eagerly=eagerly), {}


def compiled():
    """XLA on JAX and TensorFlow, `torch.compile` on PyTorch."""
    model = build()
    return model, fit(model, jit_compile=True), {}


def checkpointed_by_jax():
    """`jax.checkpoint` around head and loss, in a loop of one's own."""
    import jax

    model, loss = build(), HALOLoss()
    optimizer = adam()
    optimizer.build(model.trainable_variables)

    @jax.checkpoint
    def loss_of(weights, others, x, y):
        scores, _ = model.stateless_call(weights, others, x)
        return loss(y, scores)

    @jax.jit
    def step(weights, others, slots, x, y):
        value, gradients = jax.value_and_grad(loss_of)(weights, others, x, y)
        return value, *optimizer.stateless_apply(slots, gradients, weights)

    weights, others, slots = (
        [variable.value for variable in variables]
        for variables in (
            model.trainable_variables,
            model.non_trainable_variables,
            optimizer.variables,
        )
    )
    losses = []
    for x, y in batches():
        value, weights, slots = step(weights, others, slots, x, y)
        losses.append(float(value))
    for variable, value in zip(model.trainable_variables, weights, strict=True):
        variable.assign(value)
    return model, running_means(losses), {}


def checkpointed_by_tensorflow():
    """`tf.recompute_grad` around head and loss, in a loop of one's own."""
    import tensorflow as tf

    model, loss = build(), HALOLoss()
    optimizer = adam()
    optimizer.build(model.trainable_variables)
    loss_of = tf.recompute_grad(lambda x, y: loss(y, model(x)))

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            value = loss_of(x, y)
        weights = model.trainable_variables
        gradients = tape.gradient(value, [v.value for v in weights])
        optimizer.apply(gradients, weights)
        return value

    losses = [float(step(*map(tf.constant, batch))) for batch in batches()]
    return model, running_means(losses), {}


def checkpointed_by_torch():
    """`torch.utils.checkpoint` around head and loss, in a loop of one's own."""
    from torch.utils.checkpoint import checkpoint

    model, loss = build(), HALOLoss()

    def loss_of(x, y):
        return checkpoint(
            lambda x, y: loss(y, model(x)),
            ops.convert_to_tensor(x),
            ops.convert_to_tensor(y),
            use_reentrant=False,
        )

    return model, torch_loop(model, loss_of), {}


def torch_loop(model, loss_of, batches_of=None):
    import torch

    optimizer = adam()
    optimizer.build(model.trainable_variables)
    losses = []
    for x, y in (batches_of or batches)():
        model.zero_grad()
        value = loss_of(x, y)
        value.backward()
        with torch.no_grad():
            optimizer.apply([v.value.grad for v in model.trainable_variables])
        losses.append(value.detach())
    return running_means([float(value) for value in losses])


def batches():
    x, y = data()
    for start in range(0, len(x), BATCH_SIZE):
        yield x[start : start + BATCH_SIZE], y[start : start + BATCH_SIZE]


def batches_of_pairs():
    inputs, ids = pairs()
    for start in range(0, len(ids), BATCH_SIZE):
        rows = slice(start, start + BATCH_SIZE)
        yield [x[rows] for x in inputs], ids[rows]


def running_means(losses):
    return np.cumsum(losses) / np.arange(1, len(losses) + 1)


def data_parallel():
    keras.distribution.set_distribution(keras.distribution.DataParallel())
    model = build()
    losses = fit(model)
    return model, losses, shards_of(model)


def towers_on_one_device():
    model = build_towers()
    return model, fit(model, loss=HALOContrastiveLoss(), arrays=pairs()), {}


def towers_data_parallel():
    """Every device sees the keys of the whole batch, with nothing to do."""
    keras.distribution.set_distribution(keras.distribution.DataParallel())
    model = build_towers()
    losses = fit(model, loss=HALOContrastiveLoss(), arrays=pairs())
    return model, losses, {"devices": len(keras.distribution.list_devices())}


def model_parallel(loss=None, key=CENTROIDS):
    mesh = keras.distribution.DeviceMesh((2, 2), ["batch", "classes"])
    layout_map = keras.distribution.LayoutMap(mesh)
    layout_map[key] = ("classes", None)
    keras.distribution.set_distribution(
        keras.distribution.ModelParallel(
            layout_map=layout_map, batch_dim_name="batch"
        )
    )
    model = build()
    losses = fit(model, loss=loss)
    return model, losses, shards_of(model)


def model_parallel_in_blocks():
    return model_parallel(HALOLoss(block_size=3))


def model_parallel_with_a_wrong_key():
    return model_parallel(key="halo_dense/centroid_matrix")


def shards_of(model):
    """How the centroids, and the optimizer's slots for them, lie on devices."""
    shape = tuple(model.layers[-1].centroids.shape)
    found = {
        variable.path: variable.value
        for variable in [*model.variables, *model.optimizer.variables]
        if tuple(variable.shape) == shape
    }
    return {
        path: {
            "devices": len(value.sharding.device_set),
            "spec": [str(axis) for axis in value.sharding.spec],
            "shards": [s.data.shape for s in value.addressable_shards],
            "distinct": len({str(s.index) for s in value.addressable_shards}),
        }
        for path, value in found.items()
    }


def collectives():
    """What devices send to each other in a step with centroids in shards."""
    import re

    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    num_classes = 1024
    model, loss = build(num_classes), HALOLoss()
    mesh = Mesh(np.array(jax.devices()), ["classes"])
    everywhere = NamedSharding(mesh, PartitionSpec())
    by_class = NamedSharding(mesh, PartitionSpec("classes", None))
    layout = [
        by_class if "centroids" in variable.path else everywhere
        for variable in model.trainable_variables
    ]

    def loss_of(weights, others, x, y):
        return loss(y, model.stateless_call(weights, others, x)[0])

    step = jax.jit(
        jax.value_and_grad(loss_of),
        in_shardings=(layout, everywhere, everywhere, everywhere),
        out_shardings=(everywhere, layout),
    )
    x, y = next(batches())
    arguments = (
        [variable.value for variable in model.trainable_variables],
        [variable.value for variable in model.non_trainable_variables],
        x,
        y,
    )
    program = step.lower(*arguments).compile().as_text()
    found = re.findall(
        r"= (.+?) (all-gather|all-reduce|all-to-all|collective-permute|"
        r"reduce-scatter)(?:-start)?\(",
        program,
    )
    value, _ = step(*arguments)
    return (
        model,
        [float(value)],
        {
            "collectives": sorted({f"{name} {shape}" for shape, name in found}),
            "expected": float(loss_of(*arguments)),
            "centroids": [num_classes, EMBEDDING_DIM],
        },
    )


def mirrored():
    import tensorflow as tf

    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        model = build()
        losses = fit(model)
    return model, losses, copies_of(model, strategy)


def copies_of(model, strategy):
    """How many replicas there are, and how far apart their weights."""
    apart = 0.0
    for variable in model.trainable_variables:
        copies = strategy.experimental_local_results(variable.value)
        assert len(copies) == strategy.num_replicas_in_sync
        copies = [copy.numpy() for copy in copies]
        apart = max(apart, float(np.abs(copies[0] - copies[1]).max()))
    return {"replicas": strategy.num_replicas_in_sync, "apart": apart}


def towers_mirrored():
    import tensorflow as tf

    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    count = strategy.num_replicas_in_sync
    with strategy.scope():
        model, loss = build_towers(gather=True), HALOContrastiveLoss()
        optimizer = adam()
        optimizer.build(model.trainable_variables)

    def replica_step(inputs, ids):
        # `ids` are those of the whole batch, share after share.
        with tf.GradientTape() as tape:
            # All have the loss of the whole batch. Keras divides it by their
            # number, and adds their gradients.
            value = loss(ids, model(inputs))
        weights = model.trainable_variables
        gradients = tape.gradient(value, [v.value for v in weights])
        optimizer.apply(gradients, weights)
        return value

    @tf.function
    def step(*batch):
        values = strategy.run(replica_step, args=batch)
        return strategy.reduce("SUM", values, axis=None)

    def shares(array):
        return strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(
                array[context.replica_id_in_sync_group :: count]
            )
        )

    losses = [
        float(
            step(
                [shares(x) for x in inputs],
                tf.constant(
                    np.concatenate([ids[r::count] for r in range(count)])
                ),
            )
        )
        for inputs, ids in batches_of_pairs()
    ]
    return model, running_means(losses), copies_of(model, strategy)


def distributed_data_parallel():
    """One of the processes of PyTorch's DDP; the other runs the same."""

    def loop(model, ddp, own):
        loss = HALOLoss()
        return torch_loop(
            model,
            lambda x, y: loss(y[own], ddp(ops.convert_to_tensor(x[own]))),
        )

    return in_a_process_group(build, loop)


def towers_distributed_data_parallel():
    """The same for two towers, with the embeddings of all processes."""

    def loop(model, ddp, own):
        loss = HALOContrastiveLoss()

        def loss_of(inputs, ids):
            # The loss of the whole batch, in every process.
            scores = ddp([ops.convert_to_tensor(x[own]) for x in inputs])
            return loss(gathered(ops.convert_to_tensor(ids[own])), scores)

        return torch_loop(model, loss_of, batches_of_pairs)

    return in_a_process_group(lambda: build_towers(gather=True), loop)


def in_a_process_group(build, loop):
    import torch

    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group(
        "gloo",
        init_method=pathlib.Path(os.environ["MEETING_POINT"]).as_uri(),
        rank=rank,
        world_size=count,
    )
    model = build()
    # Equal weights are DDP's to bring about, from those of the first process.
    if rank:
        for variable in model.trainable_variables:
            variable.assign(variable * 0.0)
    losses = torch.as_tensor(ddp_loop(model, loop, slice(rank, None, count)))
    torch.distributed.all_reduce(losses)
    torch.distributed.destroy_process_group()
    return model, losses / count, {"processes": count}


def ddp_loop(model, loop, own):
    # A function, so that the wrapper is gone before the process group is: in
    # the other order processes wait for each other now and then.
    import torch

    ddp = torch.nn.parallel.DistributedDataParallel(model)
    return loop(model, ddp, own)


WAYS = {
    function.__name__: function
    for function in (
        one_device,
        blocks_of_classes,
        gradient_accumulation,
        rematerialization,
        compiled,
        checkpointed_by_jax,
        checkpointed_by_tensorflow,
        checkpointed_by_torch,
        data_parallel,
        towers_on_one_device,
        towers_data_parallel,
        model_parallel,
        model_parallel_in_blocks,
        model_parallel_with_a_wrong_key,
        collectives,
        mirrored,
        towers_mirrored,
        distributed_data_parallel,
        towers_distributed_data_parallel,
    )
}


def main(folder, *ways):
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        (cpu,) = tf.config.list_physical_devices("CPU")
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * 2
        )
    folder = pathlib.Path(folder)
    for way in ways:
        keras.utils.set_random_seed(0)
        try:
            model, losses, told = WAYS[way]()
        except Exception:
            # What failed leaves its reason in the place of a result.
            (folder / f"{way}.failed").write_text(traceback.format_exc())
            continue
        finally:
            keras.distribution.set_distribution(None)
            keras.backend.clear_session()
        np.savez(
            folder / f"{way}.npz",
            np.asarray(losses, "float64"),
            # Running statistics see other batches where these are divided.
            *[ops.convert_to_numpy(v) for v in model.trainable_variables],
        )
        (folder / f"{way}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
