"""
Title: Do two runs of the benchmark rank the detectors alike?
Description: Rank correlation and differences between tables of `ood.py`.

A short setting, or another backend on other hardware, is of use if it says the
same. Of every detector that both sides have measured on the same network, the
mean AUROC over the unknown sets is compared, itself a mean over the seeds; of
every training accuracy and ECE, from the `known.csv` beside each table.

    python benchmarks/agreement.py benchmarks/results/quick-detectors.csv \\
        --with benchmarks/results/gpu-detectors.csv

Needs `keras-halo[tools]`.
"""

import argparse
import collections
import csv
import sys

import numpy as np
from scipy import stats

# What both sides must have in common; a shorter training may be compared.
TRAINING = ("dataset", "network", "hold_out", "trained")
KNOWN = ("accuracy", "ece")


def rows_of(path):
    """Rows of a table: what training a row is of, and the row, a dictionary."""
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            yield tuple(row[key] for key in TRAINING), row


def read(path):
    """Mean AUROC in % by detector, and what each detector keeps."""
    auroc, storage = collections.defaultdict(dict), {}
    for training, row in rows_of(path):
        detector = *training, row["detector"]
        case = row["seed"], row["unknown"]
        auroc[detector][case] = 100 * float(row["auroc"])
        storage[detector] = int(row["storage"])
    return auroc, storage


def read_known(path):
    """Accuracy and ECE of the test images in %, a list of seeds by training.

    Args:
        path: String, the table of detectors; that of known images lies beside
            it.
    """
    figures = collections.defaultdict(list)
    for training, row in rows_of(
        path.removesuffix("detectors.csv") + "known.csv"
    ):
        if row["images"] == "test":
            figures[training].append([100 * float(row[key]) for key in KNOWN])
    return figures


def compare(left, right):
    """Mean AUROC on both sides, over the unknown sets that both have."""
    rows = {}
    for detector in left.keys() & right.keys():
        sides = [left[detector], right[detector]]
        unknown_sets = [{unknown for _, unknown in side} for side in sides]
        common = set.intersection(*unknown_sets)
        if common:
            rows[detector] = [
                np.mean([v for (_, name), v in side.items() if name in common])
                for side in sides
            ]
    return rows


def print_detectors(rows, storage):
    """Prints how far the two sides of `rows` agree, by kinds of detectors."""
    groups = {
        "all": list(rows),
        "without post-hoc state, or a temperature": [
            d for d in rows if storage[d] <= 1
        ],
        "fitted": [d for d in rows if storage[d] > 1],
    }
    trainings = sorted({detector[-2] for detector in rows})
    print(f"{len(trainings)} trainings: {', '.join(trainings)}\n")
    print(
        "| detectors | number | rank correlation | mean difference | largest |"
    )
    print("|---|---|---|---|---|")
    for name, detectors in groups.items():
        if len(detectors) < 3:
            print(f"| {name} | {len(detectors)} | | | |")
            continue
        a, b = np.array([rows[d] for d in detectors]).T
        difference = np.abs(a - b)
        print(
            f"| {name} | {len(detectors)} "
            f"| {stats.spearmanr(a, b).statistic:.2f} "
            f"| {difference.mean():.2f} | {difference.max():.1f} |"
        )


def print_known(left, right):
    """Prints the means of accuracy and ECE of every training on both sides."""
    trainings = [training for training in left if training in right]
    means = np.array(
        [[np.mean(s[t], axis=0) for s in (left, right)] for t in trainings]
    )
    print("\n| trained | accuracy | with | ECE | with |\n|---|---|---|---|---|")
    for training, figures in zip(trainings, means, strict=True):
        cells = [f"{value:.2f}" for value in figures.T.ravel()]
        print(f"| {training[-1]} | {' | '.join(cells)} |")
    largest = np.abs(means[:, 0] - means[:, 1]).max(axis=0)
    cells = [f"{value:.2f}" for value in largest]
    print(f"| largest difference | {' | | '.join(cells)} | |")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("file", help="detectors.csv of one side")
    parser.add_argument(
        "--with",
        dest="other",
        required=True,
        metavar="FILE",
        help="detectors.csv of the other side",
    )
    parsed = parser.parse_args(arguments)
    try:
        (left, storage), (right, _) = read(parsed.file), read(parsed.other)
        known = read_known(parsed.file), read_known(parsed.other)
    except (OSError, KeyError, ValueError) as error:
        sys.exit(
            "agreement.py: expected files `detectors.csv` as ood.py writes "
            f"them, each with its `known.csv` beside it, got {error!r}"
        )
    rows = compare(left, right)
    if not rows:
        sys.exit(
            "agreement.py: expected detectors that both sides have measured "
            "on a common unknown set, got none; look at the columns "
            f"{', '.join(TRAINING)}, detector and unknown"
        )
    print_detectors(rows, storage)
    print_known(*known)


if __name__ == "__main__":
    main()
