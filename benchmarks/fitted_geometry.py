"""
Title: Fitted geometry against the isotropic joint score
Description: Outlier detection by a Gaussian per class, fitted after training.

A small convolutional network with a HALO head is trained on Fashion-MNIST.
Two scores then tell known from unknown images: the joint score of
`keras_halo.ood_score`, which takes every class for a ball, and the score of
`keras_halo.layers.ClassGaussians`, whose Gaussians are fitted to the training
embeddings in one pass.

The form of the fitted score was chosen with `--select`, which also prints the
AUROC of candidate forms: known are images held out of training, unknown are
synthetic images (smooth noise, rectangles, rotations, mixtures and collages).
Neither the test images nor any of the six sets that are reported take part.

    python benchmarks/fitted_geometry.py --mnist mnist.npz
    python benchmarks/fitted_geometry.py --select
    python benchmarks/fitted_geometry.py --quick

Fashion-MNIST comes from `keras.datasets`. MNIST is a file with an array `x` of
shape `(N, 28, 28)`, or `x_test` as in the file that `keras.datasets.mnist`
downloads; without it that set is left out.
"""

import argparse
import time

import keras
import numpy as np
from images import (
    as_images,
    corrupted_images,
    read_images,
    synthetic_images,
)
from keras import layers
from networks import convnet
from sklearn.metrics import roc_auc_score

import keras_halo
from keras_halo.ops.class_statistics import ClassStatistics, shrunk
from keras_halo.ops.ood_scores import ood_score
from keras_halo.workflows.fit_class_gaussians import fit_class_gaussians
from keras_halo.workflows.graph import head_tensors

NUM_CLASSES = 10


def known_images(num_train, num_validation, num_test):
    (x, y), (x_test, y_test) = keras.datasets.fashion_mnist.load_data()
    held_out = slice(50_000, 50_000 + num_validation)
    return {
        "train": (as_images(x[:num_train]), y[:num_train]),
        "validation": (as_images(x[held_out]), y[held_out]),
        "test": (as_images(x_test[:num_test]), y_test[:num_test]),
    }


def train(x, y, embedding_dim, epochs, distill):
    """The small convnet with an embedding and a HALO head."""
    backbone = convnet(x.shape[1:])
    embeddings = layers.Dense(embedding_dim)(backbone.output)
    scores = keras_halo.HALODense.reference(NUM_CLASSES)(embeddings)
    model = keras.Model(backbone.input, scores)
    batch_size = 128
    steps = epochs * -(-len(x) // batch_size)
    rate = keras.optimizers.schedules.CosineDecay(2e-3, steps)
    model.compile(
        keras.optimizers.Adam(rate),
        loss=keras_halo.HALOLoss(distill=distill),
        metrics=["accuracy"],
    )
    model.fit(x, y, batch_size=batch_size, epochs=epochs, verbose=2)
    return model


def auroc(known, unknown):
    labels = np.repeat([0, 1], [len(known), len(unknown)])
    return 100.0 * roc_auc_score(labels, np.concatenate([known, unknown]))


METHODS = {"isotropic joint": "joint", "fitted": "fitted"}


def report(model, known, unknown):
    """Reports of both scores on every set of unknown images."""
    return {
        name: keras_halo.evaluate_ood(
            model, known, unknown, method=method, batch_size=500, verbose=0
        )
        for name, method in METHODS.items()
    }


def candidates(embeddings, scores, means, covariances):
    """Every form of the fitted score that was considered."""
    odds = ood_score(scores, "abstain")
    terms = {
        "density alone": 0.0,
        "- log(1 - P(abstain))": np.logaddexp(0.0, odds),
        "+ log-odds / 2": 0.5 * odds,
        "+ log-odds": odds,
        "+ 2 log-odds": 2.0 * odds,
    }
    dim = means.shape[-1]
    differences = embeddings[:, None] - means
    forms = {}
    for covariance_name, covariance in covariances.items():
        squares = np.einsum(
            "nki,kij,nkj->nk",
            differences,
            np.linalg.inv(covariance),
            differences,
        )
        determinant = 0.5 * np.linalg.slogdet(covariance)[1]
        radial = dim * keras.ops.convert_to_numpy(
            keras_halo.ops.geometry.radial_nll(
                keras.ops.convert_to_tensor(squares / dim), dim
            )
        )
        costs = {
            "distance": 0.5 * squares,
            "density": 0.5 * squares + determinant,
            "radial density": radial + determinant,
        }
        for cost_name, cost in costs.items():
            reduced = {
                "nearest": cost.min(axis=-1),
                "mixture": -np.logaddexp.reduce(-cost, axis=-1),
            }
            for reduction, value in reduced.items():
                for term_name, term in terms.items():
                    key = (covariance_name, cost_name, reduction, term_name)
                    forms[" · ".join(key)] = value + term
    return forms


def select(model, train_set, known, unknown):
    """Mean AUROC of every candidate over synthetic outliers."""
    tap = keras.Model(model.inputs[0], head_tensors(model))

    def run(x):
        return tap.predict(x, batch_size=500, verbose=0)

    x, y = train_set
    embeddings = run(x)[0]
    statistics = ClassStatistics(NUM_CLASSES, embeddings.shape[-1])
    statistics.update(embeddings, y)
    means, scales = statistics.means, statistics.scales()
    per_class = np.stack(
        [statistics.covariance(k, scales) for k in range(NUM_CLASSES)]
    )
    pooled = shrunk(statistics.pooled_covariance(), len(y), scales)[0]
    covariances = {
        "per class": per_class,
        "pooled": np.repeat(pooled[None], NUM_CLASSES, axis=0),
    }
    of_known = candidates(*run(known), means, covariances)
    table = {name: {} for name in of_known}
    for set_name, x in unknown.items():
        for name, values in candidates(*run(x), means, covariances).items():
            table[name][set_name] = auroc(of_known[name], values)
    return table


def print_markdown(rows, columns):
    print("| " + " | ".join(["seed", "score", *columns, "mean"]) + " |")
    print("|---|---|" + "---|" * (len(columns) + 1))
    for seed, name, values in rows:
        cells = [f"{values[c]:.1f}" for c in columns]
        mean = np.mean([values[c] for c in columns])
        print(f"| {seed} | {name} | " + " | ".join(cells) + f" | {mean:.1f} |")


def print_selection(tables):
    print("| form | " + " | ".join(map(str, tables)) + " | mean |")
    print("|---|" + "---|" * (len(tables) + 1))
    names = next(iter(tables.values()))
    means = {
        name: [np.mean(list(t[name].values())) for t in tables.values()]
        for name in names
    }
    for name in sorted(means, key=lambda name: -np.mean(means[name])):
        cells = [f"{value:.1f}" for value in means[name]]
        mean = np.mean(means[name])
        print(f"| {name} | " + " | ".join(cells) + f" | {mean:.2f} |")


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--mnist", help="npz file with MNIST images")
    parser.add_argument("--embedding-dim", type=int, default=10)
    parser.add_argument("--plain", action="store_true", help="distill=False")
    parser.add_argument("--num-train", type=int, default=20_000)
    parser.add_argument("--num-test", type=int, default=5_000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--select", action="store_true")
    parser.add_argument("--figure", help="where to save plots of one seed")
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds = arguments.seeds[:1]
        arguments.num_train, arguments.num_test = 2_000, 500
        arguments.epochs = 1
    return arguments


def main():
    arguments = parse_arguments()
    known = known_images(arguments.num_train, 1_000, arguments.num_test)
    rng = np.random.default_rng(0)
    unknown = corrupted_images(known["test"][0], rng)
    if arguments.mnist:
        mnist = read_images(arguments.mnist)[: arguments.num_test]
        unknown = {"MNIST": mnist, **unknown}
    synthetic = synthetic_images(known["validation"][0], rng)

    rows, selections = [], {}
    for seed in arguments.seeds:
        keras.utils.set_random_seed(seed)
        start = time.time()
        x, y = known["train"]
        model = train(
            x, y, arguments.embedding_dim, arguments.epochs, not arguments.plain
        )
        trained = time.time()
        fitted = fit_class_gaussians(model, x, y, batch_size=500, verbose=0)
        print(
            f"seed {seed}: trained in {trained - start:.0f} s, "
            f"fitted in {time.time() - trained:.1f} s",
            flush=True,
        )
        if arguments.select:
            selections[seed] = select(
                model, known["train"], known["validation"][0], synthetic
            )
        reports = report(fitted, known["test"], unknown)
        for name, of_score in reports.items():
            if seed == arguments.seeds[0]:
                print(of_score)
                if arguments.figure and name == "fitted":
                    of_score.plot().savefig(arguments.figure, dpi=80)
            aurocs = {key: 100.0 * of_score[key].auroc for key in unknown}
            rows.append((seed, name, aurocs))
    if arguments.select:
        print_selection(selections)
    print_markdown(rows, list(unknown))


if __name__ == "__main__":
    main()
