"""
Title: Out-of-distribution detection and calibration, HALO and its baselines
Description: Everything trained alike, measured alike, in one command.

Every method trains the same network on the same images in the same order,
augmented alike, for as many epochs, with as many seeds. A tenth of the
training images is kept for validation: temperatures are fitted to them, and
`choose by` in the table is measured on them and on synthetic outliers, so that
settings can be chosen without a look at what is reported.

    python benchmarks/ood.py --dataset fashion_mnist --seeds 3
    python benchmarks/ood.py --dataset fashion_mnist --ood mnist
    python benchmarks/ood.py --dataset fashion_mnist --ood letters.npz
    python benchmarks/ood.py --dataset fashion_mnist --hold-out 8 9
    python benchmarks/ood.py --quick --jobs 4
    python benchmarks/ood.py --finished-only
    python benchmarks/ood.py --list

Each trained network and each evaluation is a file in the output folder, there
as a whole or not at all; so is a first phase that several methods share. The
same command again trains and evaluates what is missing; `--ood` with another
set evaluates again and trains nothing. Which backend runs it, `KERAS_BACKEND`
says. Needs `keras-halo[tools]`.
"""

import argparse
import concurrent.futures
import hashlib
import os
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
from networks import NETWORKS
from ood_bench import data, figures, report, runs, store
from ood_bench.methods import CENTRAL, METHODS, TRIED
from ood_bench.settings import Evaluation, Settings, UnknownImages

# What `--quick` and `--smoke` change, unless it is given.
QUICK = {
    "seeds": 1,
    "epochs": 14,
    "num_test": 2_000,
    "methods": list(CENTRAL),
}
SMOKE = {
    "dataset": "digits",
    "seeds": 1,
    "epochs": 3,
    "batch_size": 32,
    "hold_out": [8, 9],
    "methods": [
        "cross-entropy",
        "cross-entropy-D32",
        "IsoMax+",
        "HALO",
        "HALO-normalized",
        "HALO-plain-to-distilled",
        "HALO-converted",
        "HALO-D32-whitened",
        # Each begins where one of the two before began.
        "HALO-converted-blocks",
        "HALO-D32-blocks",
        "cross-entropy-blocks",
    ],
}
DEFAULTS = {
    "dataset": "fashion_mnist",
    "networks": ["convnet"],
    "methods": [name for name in METHODS if name not in TRIED],
    "seeds": 3,
    "epochs": 30,
    "batch_size": 128,
    "optimizer": "adam",
    "learning_rate": 2e-3,
    "num_train": 0,
    "num_validation": 0,
    "num_test": 0,
    "hold_out": [],
    "output": "ood_results",
}


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    # Defaults are filled in later: which ones depends on the other options.
    parser.add_argument("--dataset", choices=tuple(data.DATASETS))
    parser.add_argument("--networks", nargs="+", choices=tuple(NETWORKS))
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=tuple(METHODS),
        help="default: all but " + ", ".join(TRIED),
    )
    parser.add_argument("--seeds", type=int, help="how many, default 3")
    parser.add_argument("--epochs", type=int, help="default 30")
    parser.add_argument("--batch-size", type=int, help="default 128")
    parser.add_argument("--optimizer", choices=tuple(runs.OPTIMIZERS))
    parser.add_argument("--learning-rate", type=float, help="default 2e-3")
    parser.add_argument("--num-train", type=int, help="default 0: all")
    parser.add_argument("--num-validation", type=int, help="default 0: a tenth")
    parser.add_argument("--num-test", type=int, help="default 0: all")
    parser.add_argument(
        "--hold-out", type=int, nargs="+", help="classes nobody trains on"
    )
    parser.add_argument(
        "--ood",
        nargs="+",
        default=[],
        metavar="[NAME=]SOURCE",
        help="more unknown images: a data set, or an npz file that holds an\n"
        "array `x` or `x_test`",
    )
    parser.add_argument("--no-augmentation", action="store_true")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="runs at a time, default 1; small networks do not fill the cores",
    )
    parser.add_argument("--output", help="folder, default ood_results")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one seed, fewer epochs, methods and images to test",
    )
    parser.add_argument(
        "--smoke", action="store_true", help="8 x 8 digits, for seconds"
    )
    missing = parser.add_mutually_exclusive_group()
    missing.add_argument(
        "--expect-finished",
        action="store_true",
        help="fail if a run is missing, instead of making it",
    )
    missing.add_argument(
        "--finished-only",
        action="store_true",
        help="tables and figures of the runs that are finished, and no other;\n"
        "also while another process makes them",
    )
    parser.add_argument(
        "--list", action="store_true", help="print the methods and stop"
    )
    parsed = parser.parse_args(arguments)
    defaults = {
        **DEFAULTS,
        **(QUICK if parsed.quick else {}),
        **(SMOKE if parsed.smoke else {}),
    }
    for name, value in defaults.items():
        if getattr(parsed, name) is None:
            setattr(parsed, name, value)
    return parsed


def plan(arguments):
    """The settings of every run, and how all of them are evaluated."""
    extra = []
    for entry in arguments.ood:
        name, _, source = entry.rpartition("=")
        name = name or os.path.splitext(os.path.basename(source))[0]
        digest = None
        if source not in data.DATASETS:
            try:
                with open(source, "rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                sys.exit(
                    "ood.py: --ood must be an npz file or one of "
                    f"{sorted(data.DATASETS)}, got {source!r}: {error}"
                )
        extra.append(UnknownImages(name, source, digest))
    evaluation = Evaluation(arguments.num_test, tuple(extra))
    settings = [
        Settings(
            dataset=arguments.dataset,
            network=network,
            method=method,
            seed=seed,
            epochs=arguments.epochs,
            batch_size=arguments.batch_size,
            optimizer=arguments.optimizer,
            learning_rate=arguments.learning_rate,
            num_train=arguments.num_train,
            num_validation=arguments.num_validation,
            hold_out=tuple(sorted(arguments.hold_out)),
            augment=not arguments.no_augmentation,
            backend=keras.backend.backend(),
        )
        # A seed of all methods before the next one: an early look compares.
        for network in arguments.networks
        for seed in range(arguments.seeds)
        for method in arguments.methods
    ]
    return settings, evaluation


def share_cores(jobs):
    """Lets each of the runs at a time have its part of the cores.

    With a thread for every core in every run they are in each other's way.

    Args:
        jobs: Integer, how many runs at a time.
    """
    threads = str(max((os.cpu_count() or 1) // jobs, 1))
    for name in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS"):
        os.environ.setdefault(name, threads)


def find_missing(folder, planned, evaluation):
    """The settings of the runs that have no whole result on disk."""
    return [
        settings
        for settings in planned
        if store.load(runs.result_path(folder, settings, evaluation)) is None
    ]


def execute(folder, planned, missing, evaluation, jobs):
    """Makes what is missing; returns the records and arrays of all runs."""
    start = time.perf_counter()
    finished = []

    def make(settings):
        left = ""
        if finished:
            minutes = (time.perf_counter() - start) / len(finished) / 60
            minutes *= len(missing) - len(finished)
            left = f", about {minutes:.0f} min left"
        rank = missing.index(settings) + 1
        # In one piece: `print` writes the end of a line after the line.
        line = f"[{rank}/{len(missing)}] {settings.title}{left}\n"
        print(line, end="", flush=True)
        trained = runs.run(folder, settings, evaluation)
        finished.append(settings)
        return trained

    # A thread waits for a run, which has a process of its own.
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        num_trained = sum(pool.map(make, missing))
    print(
        f"{len(planned)} runs: {num_trained} trained, {len(missing)} "
        f"evaluated, {len(planned) - len(missing)} found finished"
    )
    return [
        (settings, *store.load(runs.result_path(folder, settings, evaluation)))
        for settings in planned
    ]


def main(arguments=None):
    """Runs the command line, and returns the results of all runs."""
    command = sys.argv if arguments is None else ["ood.py", *arguments]
    arguments = parse_arguments(arguments)
    if arguments.list:
        width = max(map(len, METHODS)) + 2
        for name, method in METHODS.items():
            print(f"{name:{width}}{method}")
        return None
    if arguments.jobs < 1:
        sys.exit(f"ood.py: --jobs must be at least 1, got {arguments.jobs}")
    planned, evaluation = plan(arguments)
    # Bad arguments show here, and not after the first training.
    try:
        images = data.load(planned[0], evaluation)
        sets = data.unknown_sets(images, evaluation)
    except ValueError as error:
        sys.exit(f"ood.py: {error}")
    print(
        f"{len(planned)} runs on {arguments.dataset}, "
        f"{len(images.train[0]):,} images to train, "
        f"{len(images.validation[0]):,} to validate, "
        f"{len(images.test[0]):,} to test, {images.num_classes} classes\n"
        f"unknown: {', '.join(sets)}",
        flush=True,
    )
    del images, sets
    folder = os.path.join(arguments.output, "runs")
    os.makedirs(folder, exist_ok=True)
    missing = find_missing(folder, planned, evaluation)
    if missing and arguments.expect_finished:
        sys.exit(f"{len(missing)} of {len(planned)} runs are missing")
    if arguments.finished_only:
        print(f"{len(missing)} of {len(planned)} runs are missing, left out")
        planned = [settings for settings in planned if settings not in missing]
        missing = []
        if not planned:
            sys.exit(f"ood.py: no run in {folder} is finished")
    share_cores(arguments.jobs)
    results = execute(folder, planned, missing, evaluation, arguments.jobs)
    text = report.write(arguments.output, results, command)
    figures.draw(arguments.output, results)
    print(f"\n{text}\nTables and figures are in {arguments.output}.")
    return results


if __name__ == "__main__":
    main()
