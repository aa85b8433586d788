"""How much four procedures keep that all guarantee a selective risk.

Draws calibration sets from populations whose error probability is known for
every score, lets each procedure choose a threshold, and compares the true risk
of that threshold with the guarantee. Prints a Markdown table: mean share of
inputs kept, and how often the guarantee was broken, in percent. Needs
`keras-halo[rejection]`.

    python benchmarks/rejection_guarantees.py --draws 1000
"""

import argparse
import math

import numpy as np
from scipy import stats

from keras_halo.rejection import bounds

# Error probability by the quantile of the score.
POPULATIONS = {
    "10 % errors, logistic": lambda u: 1 / (1 + np.exp((1.02 - u) / 0.11)),
    "2 % errors, linear": lambda u: 0.04 * u,
    "good below 20 %": lambda u: np.where(u < 0.2, 0.002, 0.3),
    "worst at the lowest scores": lambda u: np.select(
        [u < 0.05, u < 0.6], [0.12, 0.01], 0.3
    ),
}
SETTINGS = [(300, 0.05), (1000, 0.05), (5000, 0.05), (5000, 0.01)]
GRID = 100_000


def sorted_tests(scores, errors, risk):
    """P-values of the binomial test at every number of accepted samples."""
    totals = np.cumsum(errors[np.argsort(scores)])
    return stats.binom.cdf(totals, np.arange(1, len(totals) + 1), risk)


def binary_search(scores, errors, risk, delta):
    """Geifman and El-Yaniv, 2017: delta shared by the steps of the search."""
    p_values = sorted_tests(scores, errors, risk)
    low, high, best = 1, len(scores), 0
    steps = math.ceil(math.log2(len(scores)))
    for _ in range(steps):
        middle = math.ceil((low + high) / 2)
        if p_values[middle - 1] <= delta / steps:
            best = low = middle
        else:
            high = middle
    return best


def bonferroni(scores, errors, risk, delta):
    """Learn then Test with delta shared by all thresholds."""
    passed = sorted_tests(scores, errors, risk) <= delta / len(scores)
    return int(np.flatnonzero(passed)[-1]) + 1 if passed.any() else 0


def fixed_sequence(scores, errors, risk, delta):
    """Learn then Test upwards from the lowest threshold that can pass."""
    start = min(bounds.samples_for_risk(risk, delta), len(scores))
    failed = sorted_tests(scores, errors, risk)[start - 1 :] > delta
    count = start - 1 + int(np.argmax(failed) if failed.any() else failed.size)
    return count if count >= start else 0


PROCEDURES = {
    "keras_halo": bounds.accepted_at_risk,
    "binary search": binary_search,
    "one start": fixed_sequence,
    "Bonferroni": bonferroni,
}


def simulate(error_rate, n, risk, delta, draws):
    """Mean coverage and rate of broken guarantees of each procedure."""
    quantiles = (np.arange(GRID) + 0.5) / GRID
    true_risk = np.cumsum(error_rate(quantiles)) / np.arange(1, GRID + 1)
    rng = np.random.default_rng(0)
    coverage = {name: [] for name in PROCEDURES}
    broken = {name: [] for name in PROCEDURES}
    for _ in range(draws):
        scores = rng.random(n)
        errors = rng.random(n) < error_rate(scores)
        thresholds = np.concatenate([[0.0], np.sort(scores)])
        for name, procedure in PROCEDURES.items():
            threshold = thresholds[procedure(scores, errors, risk, delta)]
            index = round(threshold * GRID) - 1
            coverage[name].append(threshold)
            broken[name].append(index >= 0 and true_risk[index] > risk)
    return {
        name: (np.mean(coverage[name]), np.mean(broken[name]))
        for name in PROCEDURES
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--delta", type=float, default=0.05)
    arguments = parser.parse_args()
    print("| population | samples | risk |", " | ".join(PROCEDURES), "|")
    print("|---|---|---|" + "---|" * len(PROCEDURES))
    for population, error_rate in POPULATIONS.items():
        for n, risk in SETTINGS:
            results = simulate(
                error_rate, n, risk, arguments.delta, arguments.draws
            )
            cells = [
                f"{100 * kept:.1f} ({100 * broken:.1f})"
                for kept, broken in results.values()
            ]
            row = " | ".join([population, str(n), f"{100 * risk:g} %", *cells])
            print(f"| {row} |", flush=True)


if __name__ == "__main__":
    main()
