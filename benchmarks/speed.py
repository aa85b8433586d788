"""
Title: The price of saying "I don't know"
Description: HALO head and loss against Dense and cross-entropy, side by side.

Every figure is a ratio of times taken in turns in one process: in each round
every method runs for about as long, so that whatever else the machine does
meets all of them. The table gives the median of the rounds' ratios and the
range that holds the middle 80 % of them. Memory is that of separate processes.

    KERAS_BACKEND=jax python benchmarks/speed.py
    KERAS_BACKEND=torch python benchmarks/speed.py --only step --compile
    KERAS_BACKEND=tensorflow python benchmarks/speed.py --quick

`HALODense` makes an embedding of its own. Networks, and steps "with an
embedding", are compared with two `Dense` layers of the same sizes and Keras's
cross-entropy. Other steps are those of the published head,
`HALODense.reference`, whose input is the embedding: they are compared with one
`Dense`, and with the pairwise form of the method, which takes the difference of
every embedding and every centroid.
JAX and TensorFlow compile the step, PyTorch runs it eagerly, as Keras does by
default; `--compile` compiles it there, too, as `jit_compile=True` does.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import layers, ops
from networks import convnet, resnet18

from keras_halo import (
    HALODense,
    HALOLoss,
    decode_predictions,
    guard,
    ood_score,
)
from keras_halo.ops import geometry, packing
from keras_halo.rejection import CoverageRule

BACKEND = keras.backend.backend()
SIZES = ((256, 10, 10), (256, 512, 1000), (64, 768, 50_000))
# Features in the place of an embedding.
EMBEDDED_SIZES = ((256, 128, 10), (256, 512, 1000))
GROWTH = (10, 100, 1_000, 10_000, 50_000, 100_000, 200_000)
GROWTH_BATCH, GROWTH_DIM = 64, 128
# Classes at a time, where memory is short.
BLOCK_SIZE = 1024
DENSE, DENSE_ONE_HOT, HALO, PLAIN, ONE_HOT, BLOCKS, NAIVE, PRODUCT = (
    "Dense + cross-entropy",
    "Dense + cross-entropy, one-hot labels",
    "HALO",
    "HALO, plain targets",
    "HALO, one-hot labels",
    f"HALO, in blocks of {BLOCK_SIZE}",
    "HALO, pairwise differences",
    "matrix products alone",
)
TWO_DENSE, WITH_EMBEDDING = (
    "Dense + Dense + cross-entropy",
    "HALO, with its embedding",
)

# For the loss in blocks: here the scores are what takes the memory.
MANY_CLASSES = (512, 32, 200_000)

# The pairwise form holds B x K x D numbers; beyond this many it is left out.
MAX_PAIRWISE = 2**28


class PairwiseHALODense(HALODense):
    """The head by the definition: the difference of all pairs."""

    def call(self, inputs):
        centroids = ops.convert_to_tensor(self.centroids)
        centroids = centroids - ops.mean(centroids, axis=0, keepdims=True)
        differences = ops.expand_dims(inputs, 1) - centroids
        radii = ops.mean(ops.square(differences), axis=-1)
        norm = ops.mean(ops.square(inputs), axis=-1, keepdims=True)
        gamma = self.temperature
        return packing.pack(
            logits=gamma * (norm - radii),
            abstain_logit=ops.convert_to_tensor(self.abstain_bias),
            squared_norm=norm,
            temperature=gamma,
            embedding_dim=centroids.shape[-1],
        )


class Products(layers.Layer):
    """The three products of a linear layer's step, and nothing else."""

    def __init__(self, units):
        super().__init__()
        self.units = units

    def build(self, input_shape):
        self.kernel = self.add_weight(
            shape=(input_shape[-1], self.units), name="kernel"
        )

    def call(self, inputs):
        return ops.matmul(inputs, self.kernel)


def sum_of_scores(y_true, y_pred):
    return ops.sum(y_pred)


def head_and_loss(method, units, dtype="float32"):
    if method == DENSE:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        return layers.Dense(units), loss
    if method == TWO_DENSE:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        embedding = layers.Dense(geometry.default_embedding_dim(units))
        return keras.Sequential([embedding, layers.Dense(units)]), loss
    if method == WITH_EMBEDDING:
        return HALODense(units, dtype=dtype), HALOLoss()
    if method == DENSE_ONE_HOT:
        loss = keras.losses.CategoricalCrossentropy(from_logits=True)
        return layers.Dense(units), loss
    if method == PRODUCT:
        return Products(units), sum_of_scores
    if method == NAIVE:
        return PairwiseHALODense.reference(units), HALOLoss()
    return HALODense.reference(units, dtype=dtype), HALOLoss(
        distill=method != PLAIN,
        block_size=BLOCK_SIZE if method == BLOCKS else None,
    )


def compiled_step(layer, loss, on_torch=False):
    """A function of inputs and labels: the loss and every gradient."""
    # The head follows the evidence, as in `fit`.
    training = {"training": True} if type(layer) is HALODense else {}
    if BACKEND == "jax":
        import jax

        def value(weights, constants, x, y):
            scores, updated = layer.stateless_call(
                weights, constants, x, **training
            )
            return loss(y, scores), updated

        gradient = jax.jit(
            jax.value_and_grad(value, argnums=(0, 2), has_aux=True)
        )
        weights = [v.value for v in layer.trainable_variables]
        constants = [v.value for v in layer.non_trainable_variables]

        def step(x, y):
            return jax.block_until_ready(gradient(weights, constants, x, y))

    elif BACKEND == "tensorflow":
        import tensorflow as tf

        @tf.function(jit_compile=True)
        def gradient(x, y):
            with tf.GradientTape() as tape:
                tape.watch(x)
                value = loss(y, layer(x, **training))
            sources = [x, *(v.value for v in layer.trainable_variables)]
            return value, tape.gradient(value, sources)

        def step(x, y):
            value, gradients = gradient(x, y)
            return value.numpy(), gradients

    else:
        parameters = [v.value for v in layer.trainable_variables]

        def objective(x, y):
            return loss(y, layer(x, **training))

        if on_torch:
            import torch

            # Many variants of one function, on purpose.
            torch._dynamo.config.recompile_limit = 1000
            objective = torch.compile(objective)

        def step(x, y):
            x = x.detach().requires_grad_()
            for parameter in parameters:
                parameter.grad = None
            value = objective(x, y)
            value.backward()
            return value

    return step


def make_step(method, batch, dim, units, dtype="float32", on_torch=False):
    rng = np.random.default_rng(0)
    layer, loss = head_and_loss(method, units, dtype)
    x = ops.convert_to_tensor(rng.normal(size=(batch, dim)).astype("float32"))
    x = ops.cast(x, layer.compute_dtype)
    y = rng.integers(0, units, batch).astype("int32")
    if method in (DENSE_ONE_HOT, ONE_HOT):
        y = np.eye(units, dtype="float32")[y]
    y = ops.convert_to_tensor(y)
    layer.build(x.shape)
    step = compiled_step(layer, loss, on_torch)
    return lambda: step(x, y)


def interleaved(functions, rounds, seconds):
    """Seconds a call for every function and round, taken in turns."""
    repeats = {}
    for name, function in functions.items():
        function()
        start = time.perf_counter()
        count = 0
        while time.perf_counter() - start < seconds or not count:
            function()
            count += 1
        repeats[name] = count
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                function()
            elapsed = time.perf_counter() - start
            times[name].append(elapsed / repeats[name])
    return {name: np.array(values) for name, values in times.items()}


def ratios(times, reference=DENSE):
    """Median, 10 % and 90 % quantile of the rounds' ratios."""
    return {
        name: np.quantile(values / times[reference], [0.5, 0.1, 0.9])
        for name, values in times.items()
        if name != reference
    }


def show(title, times, reference=DENSE):
    base = np.median(times[reference]) * 1e3
    print(f"| {title} | {reference} | {base:.3g} ms | |")
    for name, (middle, low, high) in ratios(times, reference).items():
        print(f"| {title} | {name} | {middle:.2f} | {low:.2f} to {high:.2f} |")
    sys.stdout.flush()


def bench_step(arguments):
    for size in SIZES[:1] if arguments.quick else SIZES:
        methods = [DENSE, HALO, PLAIN, PRODUCT]
        if np.prod(size) <= MAX_PAIRWISE:
            methods.append(NAIVE)
        functions = {
            method: make_step(method, *size, on_torch=arguments.compile)
            for method in methods
        }
        title = f"head + loss step {size}"
        show(title, interleaved(functions, arguments.rounds, 0.1))
        if size[2] > 10_000:
            continue
        functions = {
            method: make_step(method, *size, on_torch=arguments.compile)
            for method in (DENSE_ONE_HOT, ONE_HOT)
        }
        times = interleaved(functions, arguments.rounds, 0.1)
        show(title, times, DENSE_ONE_HOT)
    for size in EMBEDDED_SIZES[:1] if arguments.quick else EMBEDDED_SIZES:
        functions = {
            method: make_step(method, *size, on_torch=arguments.compile)
            for method in (TWO_DENSE, WITH_EMBEDDING)
        }
        times = interleaved(functions, arguments.rounds, 0.1)
        show(f"head + loss step {size}, with an embedding", times, TWO_DENSE)


def bench_mixed(arguments):
    """What it costs that the head computes in float32 on 16-bit inputs."""
    size = SIZES[0] if arguments.quick else SIZES[1]
    functions = {
        f"HALO, {dtype}": make_step(HALO, *size, dtype, arguments.compile)
        for dtype in ("float32", "mixed_float16", "mixed_bfloat16")
    }
    times = interleaved(functions, arguments.rounds, 0.1)
    show(f"head + loss step {size}", times, "HALO, float32")


def classifier(backbone, method):
    """A network with a head for 10 classes."""
    head, loss = head_and_loss(method, 10)
    model = keras.Model(backbone.input, head(backbone.output))
    model.compile(keras.optimizers.SGD(1e-3), loss)
    return model


def bench_training(arguments):
    rng = np.random.default_rng(0)
    networks = {"convnet, batch 128": (convnet, 128, (28, 28, 1))}
    if not arguments.quick:
        networks["ResNet-18, batch 64"] = (resnet18, 64, (32, 32, 3))
    for title, (build, batch, shape) in networks.items():
        x = rng.normal(size=(batch, *shape)).astype("float32")
        y = rng.integers(0, 10, batch)
        functions = {}
        for method in (TWO_DENSE, WITH_EMBEDDING):
            model = classifier(build(shape), method)
            functions[method] = lambda model=model, x=x, y=y: (
                model.train_on_batch(x, y)
            )
        times = interleaved(functions, arguments.rounds, 0.3)
        show(f"training step, {title}", times, TWO_DENSE)


def bench_inference(arguments):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1024, 28, 28, 1)).astype("float32")
    models = {
        method: classifier(convnet(x.shape[1:]), method)
        for method in (TWO_DENSE, WITH_EMBEDDING)
    }

    def scores(method):
        return models[method].predict(x, batch_size=256, verbose=0)

    rule = CoverageRule(0.95).fit(scores(WITH_EMBEDDING))
    guarded = guard(models[WITH_EMBEDDING], rule)
    functions = {
        "predict + softmax": lambda: ops.convert_to_numpy(
            ops.softmax(scores(TWO_DENSE))
        ),
        "predict + score": lambda: ood_score(scores(WITH_EMBEDDING)),
        "predict + decode": lambda: decode_predictions(scores(WITH_EMBEDDING)),
        "predict of a guarded model": lambda: guarded.predict(
            x, batch_size=256, verbose=0
        ),
    }
    times = interleaved(functions, arguments.rounds, 0.3)
    show("inference, convnet, 1024 images", times, "predict + softmax")


def peak_memory(method, batch, dim, units, of_loss=False):
    """Peak MiB of a process that does the step, over that before it.

    With `of_loss` the step begins with scores that are there before it, and
    ends with their gradient.
    """
    command = [sys.executable, __file__, "--child"]
    command.append(json.dumps([method, batch, dim, units, of_loss]))
    output = subprocess.run(
        command, check=True, capture_output=True, text=True
    ).stdout
    return float(output.split()[-1])


def peak():
    """Peak memory of this process so far, in MiB."""
    if os.path.exists("/proc/self/status"):
        # `getrusage` starts at the peak of the process that started this one.
        with open("/proc/self/status") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["VmHWM"].split()[0]) / 2**10
    import resource

    unit = 2**20 if platform.system() == "Darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def make_loss_step(method, batch, units):
    """The loss alone, and its gradient, on scores that took no other array."""
    _, loss = head_and_loss(method, units)
    width = units if method == DENSE else packing.packed_width(units)
    # One number that is valid in every column: that of an embedding's size 2.
    column = packing.pack(ops.zeros((1, 2)), 0.0, ops.ones((1, 1)), 1.0, 2)
    scores = ops.full((batch, width), float(column[0, -1]), dtype="float32")
    step = compiled_step(layers.Identity(), loss)
    y = ops.convert_to_tensor(np.arange(batch, dtype="int32") % units)
    return lambda: step(scores, y)


def child(method, batch, dim, units, of_loss):
    # What a backend allocates once, it allocates here.
    make_step(method, 8, 8, 8)()
    before = peak()
    if of_loss:
        # As many classes, so that the step is compiled alike; twice, because
        # the first compilation of a kind leaves most behind.
        for small in (8, 16):
            make_loss_step(method, small, units)()
        step = make_loss_step(method, batch, units)
        before = peak()
    else:
        step = make_step(method, batch, dim, units)
    for _ in range(3):
        step()
    print(peak() - before)


def bench_memory(arguments):
    size = (64, 128, 50_000) if arguments.quick else SIZES[2]
    title = f"peak memory of the step {size}"
    used = {
        method: np.array([peak_memory(method, *size) for _ in range(3)])
        for method in (DENSE, HALO)
    }
    base = np.median(used[DENSE])
    ratio = used[HALO] / base
    print(f"| {title} | {DENSE} | {base:.0f} MiB | |")
    print(
        f"| {title} | {HALO} | {np.median(ratio):.2f} "
        f"| {ratio.min():.2f} to {ratio.max():.2f} |",
        flush=True,
    )
    if arguments.quick:
        return
    logits = MANY_CLASSES[0] * MANY_CLASSES[2] * 4 / 2**20
    for title, method, counted in (
        ("step", DENSE, 0),
        ("step", HALO, 0),
        ("step", BLOCKS, 0),
        # Beside the scores, which are there, and their gradient.
        ("loss on given scores", DENSE, 1),
        ("loss on given scores", HALO, 1),
        ("loss on given scores", BLOCKS, 1),
    ):
        extra = [
            peak_memory(method, *MANY_CLASSES, of_loss=bool(counted)) / logits
            - counted
            for _ in range(3)
        ]
        print(
            f"| memory of the {title} {MANY_CLASSES}, over that of the logits "
            f"| {method} | {np.median(extra):.2f} "
            f"| {min(extra):.2f} to {max(extra):.2f} |",
            flush=True,
        )


def bench_growth(arguments):
    counts = GROWTH[:3] if arguments.quick else GROWTH
    curves = {DENSE: [], HALO: []}
    for units in counts:
        functions = {
            method: make_step(method, GROWTH_BATCH, GROWTH_DIM, units)
            for method in curves
        }
        times = interleaved(functions, arguments.rounds, 0.1)
        size = (GROWTH_BATCH, GROWTH_DIM, units)
        show(f"growth {size}", times)
        for method, values in times.items():
            curves[method].append(np.quantile(values, [0.5, 0.1, 0.9]))
    large = np.array(counts) >= 1_000
    if large.sum() > 1:
        slopes = {
            method: np.polyfit(
                np.array(counts)[large], np.array(curve)[large, 0], 1
            )[0]
            for method, curve in curves.items()
        }
        ratio = slopes[HALO] / slopes[DENSE]
        print(f"| growth: slope in K | {HALO} | {ratio:.2f} | |")
    if arguments.figure:
        draw(counts, curves, arguments.figure)


def draw(counts, curves, path):
    from matplotlib import pyplot as plt

    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for (method, curve), marker in zip(curves.items(), "os", strict=True):
        middle, low, high = 1e3 * np.array(curve).T
        ax.plot(counts, middle, marker=marker, label=method)
        ax.fill_between(counts, low, high, alpha=0.2)
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="number of classes K",
        ylabel="head + loss step, ms",
        title=f"{BACKEND}, batch {GROWTH_BATCH}, D = {GROWTH_DIM}",
    )
    ax.grid(alpha=0.3)
    ax.legend()
    figure.savefig(path, dpi=100)


PARTS = {
    "step": bench_step,
    "mixed": bench_mixed,
    "training": bench_training,
    "inference": bench_inference,
    "memory": bench_memory,
    "growth": bench_growth,
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=tuple(PARTS), default=tuple(PARTS)
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--figure", help="where to save the growth curve")
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    parser.add_argument(
        "--compile", action="store_true", help="compile the step on PyTorch"
    )
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return
    if arguments.quick:
        arguments.rounds = 3
    print(
        f"{BACKEND}, Keras {keras.__version__}, {platform.machine()}, "
        f"{os.cpu_count()} cores\n"
    )
    print("| what | method | time, or ratio of it | 80 % of the rounds |")
    print("|---|---|---|---|", flush=True)
    for part in arguments.only:
        PARTS[part](arguments)


if __name__ == "__main__":
    main()
