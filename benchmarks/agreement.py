"""
Title: Do two runs of the benchmark rank the detectors alike?
Description: Rank correlation and differences between tables of `ood.py`.

A short setting, or another backend on other hardware, is of use if it says the
same. Of every detector that both sides have measured on the same network, the
mean AUROC over the unknown sets is compared, itself a mean over the seeds.

    python benchmarks/agreement.py benchmarks/results/quick-detectors.csv \\
        --with benchmarks/results/full-detectors.csv \\
               benchmarks/results/start-detectors.csv

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


def read(paths):
    """Mean AUROC in % by detector, and what each detector keeps.

    A training that several files hold is that of the first one.
    """
    auroc, storage, source = collections.defaultdict(dict), {}, {}
    for path in paths:
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                training = tuple(row[key] for key in TRAINING)
                if source.setdefault(training, path) != path:
                    continue
                detector = *training, row["detector"]
                case = row["seed"], row["unknown"]
                auroc[detector][case] = 100 * float(row["auroc"])
                storage[detector] = int(row["storage"])
    return auroc, storage


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


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("files", nargs="+", help="detectors.csv of one side")
    parser.add_argument(
        "--with",
        dest="others",
        nargs="+",
        required=True,
        metavar="FILE",
        help="detectors.csv of the other side",
    )
    parser.add_argument(
        "--without",
        nargs="+",
        default=[],
        metavar="WORD",
        help="leave out detectors that have this word in their names",
    )
    parsed = parser.parse_args(arguments)
    try:
        left, storage = read(parsed.files)
        right, _ = read(parsed.others)
    except (OSError, KeyError, ValueError) as error:
        sys.exit(
            "agreement.py: expected files `detectors.csv` as ood.py writes "
            f"them, got {error!r}"
        )
    rows = {
        detector: row
        for detector, row in compare(left, right).items()
        if not any(word in detector[-1] for word in parsed.without)
    }
    if not rows:
        sys.exit(
            "agreement.py: expected detectors that both sides have measured "
            "on a common unknown set, got none; look at the columns "
            f"{', '.join(TRAINING)}, detector and unknown"
        )
    groups = {
        "all": list(rows),
        "nothing stored, or a temperature": [
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


if __name__ == "__main__":
    main()
