"""Fits on shards and scores many rows with Dask, on processes of this machine.

    pip install distributed
    export KERAS_BACKEND=torch OMP_NUM_THREADS=1
    python benchmarks/dask_scoring.py FOLDER

Worker processes with one thread each read eight shards of data from files. What
is fitted after training is fitted by shard: class statistics, which merge, and
calibration scores, which are joined. The guarded model is one file, which every
worker loads once; it scores `--rows` rows in chunks, each of which is written
as a whole, and the summaries of the chunks add up to one report. With `--kill`
a worker is killed on the way; Dask runs again what it had not finished.

The script prints the report, and the rows a second for each number in
`--workers`. Dask has the same interface on a cluster: pass its address to
`Client` in the place of `LocalCluster`.
"""

import argparse
import functools
import json
import os
import pathlib
import signal
import time

import keras
import numpy as np
from distributed import Client, LocalCluster, as_completed

import keras_halo
from keras_halo import ClassStatistics, HALODense, HALOLoss
from keras_halo.rejection import CoverageRule

SHARDS, ROWS_A_SHARD = 8, 1000
CLASSES, DIM, BATCH_SIZE = 10, 32, 4096


def centers():
    return 2.0 * np.random.default_rng(0).normal(size=(CLASSES, DIM))


def drawn(seed, count, unknown=0.0):
    """Inputs and labels; a share of the inputs is noise, with the label -1."""
    rng = np.random.default_rng(seed)
    y = rng.integers(CLASSES, size=count)
    x = centers()[y] + rng.normal(size=(count, DIM))
    is_unknown = rng.random(count) < unknown
    x[is_unknown] = 3.0 * rng.normal(size=(is_unknown.sum(), DIM))
    return x.astype("float32"), np.where(is_unknown, -1, y)


@functools.lru_cache(maxsize=2)
def loaded(path):
    """A model; a worker loads it once."""
    return keras.models.load_model(path)


def statistics_of(shard, model):
    with np.load(shard) as data:
        statistics = keras_halo.collect_statistics(
            loaded(model), data["x"], data["y"], 1000, verbose=0
        )
    return statistics.state()


def scores_of(shard, model):
    with np.load(shard) as data:
        return loaded(model).predict(data["x"], 1000, verbose=0)


def score(number, model, folder, size, unknown):
    """Decides on one chunk of rows, and returns a summary."""
    x, y = drawn(1000 + number, size, unknown)
    guarded = loaded(model)
    parts = [
        guarded.predict_on_batch(x[start : start + BATCH_SIZE])
        for start in range(0, size, BATCH_SIZE)
    ]
    labels, p_values = (
        np.concatenate([part[name] for part in parts])
        for name in ("label", "p_value")
    )
    # Written as a whole or not at all.
    target = pathlib.Path(folder, f"{number:06}.npz")
    part = target.with_suffix(f".{os.getpid()}")
    with part.open("wb") as file:
        np.savez(file, label=labels, p_value=p_values)
    part.replace(target)
    known = y >= 0
    return np.array(
        [
            size,
            known.sum(),
            (known & (labels >= 0)).sum(),
            (known & (labels == y)).sum(),
            (~known & (labels < 0)).sum(),
        ]
    )


def train(folder):
    """A small model, and shards for what is fitted after training."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((DIM,)),
            keras.layers.Dense(128, activation="relu"),
            HALODense(CLASSES, embedding_dim=32),
        ]
    )
    model.compile(keras.optimizers.Adam(3e-3), HALOLoss())
    model.fit(*drawn(1, 4000), epochs=3, batch_size=64, verbose=0)
    model.save(folder / "model.keras")
    shards = []
    for number in range(2 * SHARDS):
        shards.append(str(folder / f"shard{number}.npz"))
        x, y = drawn(100 + number, ROWS_A_SHARD)
        np.savez(shards[-1], x=x, y=y)
    return model, shards[:SHARDS], shards[SHARDS:]


def fit(client, model, training, calibration, folder):
    """Fits Gaussians and a rule on shards; writes the guarded model."""
    path = str(folder / "model.keras")
    merged = ClassStatistics(CLASSES, 32)
    jobs = client.map(statistics_of, training, model=path)
    # In the order in which they are done.
    for job in as_completed(jobs):
        merged.merge(ClassStatistics.from_state(job.result()))
    fitted = keras_halo.fit_class_gaussians(model, merged)
    fitted.save(folder / "fitted.keras")
    path = str(folder / "fitted.keras")
    answers = client.gather(client.map(scores_of, calibration, model=path))
    joined = {
        name: np.concatenate([part[name] for part in answers])
        for name in answers[0]
    }
    labels = np.concatenate([np.load(shard)["y"] for shard in calibration])
    rule = CoverageRule(0.95, method="fitted").fit(joined, labels)
    guarded = keras_halo.guard(fitted, rule)
    guarded.save(folder / "guarded.keras")
    return str(folder / "guarded.keras")


def score_all(client, guarded, folder, arguments):
    """Returns the sum of all summaries, and the seconds it took."""
    chunks = -(-arguments.rows // arguments.chunk)
    work = functools.partial(
        score,
        model=guarded,
        folder=str(folder),
        size=arguments.chunk,
        unknown=arguments.unknown,
    )
    # Every worker loads the model before the clock starts.
    client.run(
        lambda: loaded(guarded).predict_on_batch(drawn(0, BATCH_SIZE)[0])
    )
    processes = client.run(os.getpid)
    start = time.perf_counter()
    jobs = client.map(work, range(chunks), pure=False)
    total = 0
    for count, (_, summary) in enumerate(as_completed(jobs, with_results=True)):
        total = total + summary
        if arguments.kill and count == chunks // 3:
            os.kill(next(iter(processes.values())), signal.SIGKILL)
    return total, time.perf_counter() - start


def report(total):
    rows, known, accepted, right, rejected = (int(count) for count in total)
    return {
        "rows": rows,
        "known": known,
        "known accepted": accepted,
        "known answered right": right,
        "unknown rejected": rejected,
        "unknown": rows - known,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--chunk", type=int, default=100_000)
    parser.add_argument("--unknown", type=float, default=0.1)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--kill", action="store_true")
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    model, training, calibration = train(folder)
    rates = {}
    guarded = None
    for count in arguments.workers:
        answers = folder / f"answers{count}"
        answers.mkdir(exist_ok=True)
        with (
            LocalCluster(
                n_workers=count, threads_per_worker=1, dashboard_address=None
            ) as cluster,
            Client(cluster) as client,
        ):
            if guarded is None:
                guarded = fit(client, model, training, calibration, folder)
            total, seconds = score_all(client, guarded, answers, arguments)
        rates[count] = int(total[0]) / seconds
        print(json.dumps(report(total)))
        print(f"{count} workers: {rates[count]:,.0f} rows a second", flush=True)
    first = arguments.workers[0]
    for count in arguments.workers[1:]:
        print(
            f"{count} workers are {rates[count] / rates[first]:.2f} times as "
            f"fast as {first}"
        )
