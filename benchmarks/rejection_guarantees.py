"""How often rules break their guarantee, and how much they keep.

Draws calibration sets from populations whose error probability is known for
every score, lets each procedure choose a threshold, and compares the true risk
of that threshold with the guarantee. Prints a Markdown table: mean share of
inputs kept, and how often the guarantee was broken, in percent. Needs
`keras-halo[rejection]`.

    python benchmarks/rejection_guarantees.py --draws 1000

With `--deployments` it counts how often guarantees are broken that hold
together, for each group, or for sets of labels, over ten populations with ties,
discrete scores, rare classes and rare errors:

    python benchmarks/rejection_guarantees.py --deployments 100000

With `--mapie` it compares what joint rules answer with what the Learn then Test
procedure of MAPIE answers at the same guarantees; `pip install mapie`:

    python benchmarks/rejection_guarantees.py --mapie 100
"""

import argparse
import dataclasses
import math
import warnings
from collections.abc import Callable

import keras
import numpy as np
from scipy import stats

from keras_halo.ops import ood_scores, packing
from keras_halo.rejection import (
    CoverageRule,
    GroupwiseRule,
    JointRule,
    LabelSetRule,
    bounds,
)

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


@dataclasses.dataclass(frozen=True)
class Population:
    """Inputs of which everything is known.

    Args:
        error_rate: Error probability of a known input by its quantile.
        score: What the score makes of a quantile; not decreasing.
        limit: Quantile at which the requirements of the joint rule just hold.
        outliers: Power that makes quantiles of outliers: `F(q) = q ** power`.
        shares: Shares of three groups, or classes.
        powers: What the quantiles of each group are raised to.
        step: To what multiple logits of the classes are rounded, or `None`.
    """

    error_rate: Callable
    score: Callable
    limit: float
    outliers: float
    shares: tuple
    powers: tuple
    step: float | None = None


def _in_steps(number):
    return lambda u: np.ceil(number * u) / number


def _with_atom(low, high):
    return lambda u: np.where((u > low) & (u <= high), high, u)


EVEN, RARE, RAREST = (0.4, 0.3, 0.3), (0.7, 0.2, 0.1), (0.9, 0.06, 0.04)
DEPLOYED = {
    "errors grow": Population(
        lambda u: 0.3 * u**4, lambda u: u, 0.8, 8.0, EVEN, (1, 2, 0.5)
    ),
    "barely too many everywhere": Population(
        lambda u: np.full_like(u, 0.0502),
        lambda u: u,
        0.8,
        3.0,
        EVEN,
        (1, 1, 1),
    ),
    "worst at the lowest scores": Population(
        POPULATIONS["worst at the lowest scores"],
        lambda u: u,
        0.65,
        5.0,
        RARE,
        (0.5, 1, 6),
    ),
    "risk crosses twice": Population(
        lambda u: np.select(
            [u < 0.2, u < 0.4, u < 0.6], [0.03, 0.08, 0.01], 0.12
        ),
        lambda u: u,
        0.7,
        6.0,
        RARE,
        (3, 1, 1),
    ),
    "ten distinct scores": Population(
        lambda u: 0.3 * u**3, _in_steps(10), 0.8, 6.0, RARE, (1, 2, 3), 2.0
    ),
    "two distinct scores": Population(
        lambda u: 0.2 * u**2, _in_steps(2), 0.5, 2.0, EVEN, (1, 2, 3), 8.0
    ),
    "half share one score": Population(
        lambda u: 0.2 * (u > 0.6),
        _with_atom(0.1, 0.6),
        0.8,
        6.0,
        RARE,
        (1, 2, 0.5),
        4.0,
    ),
    "most share the highest score": Population(
        lambda u: 0.1 * u, _with_atom(0.3, 1.0), 0.3, 4.0, EVEN, (1, 1, 4), 6.0
    ),
    "errors are rare": Population(
        lambda u: 0.01 * u**6, lambda u: u, 0.9, 20.0, RAREST, (1, 4, 8)
    ),
    "most answers are wrong": Population(
        lambda u: 0.2 + 0.6 * u, lambda u: u, 0.6, 4.0, RAREST, (0.5, 1, 2)
    ),
}

# How much each requirement is looser than what holds at the limit. Where all
# are tight, only the very threshold at the limit keeps them.
SLACK = (
    {"coverage": 0.15, "false_positive_rate": 0.2},
    {"coverage": 0.15, "risk": 0.05},
    {"coverage": 0.15},
    {"risk": 0.1, "false_positive_rate": 0.2},
    {},
)


class Quantiles:
    """Up to which quantile a threshold accepts."""

    def __init__(self, score):
        self.scores = score((np.arange(GRID) + 0.5) / GRID)

    def __call__(self, threshold):
        return np.searchsorted(self.scores, threshold, side="right") / GRID


class JointTask:
    """What joint rules are asked for in one population, and what is true."""

    def __init__(self, population):
        self.population = population
        grid = (np.arange(GRID) + 0.5) / GRID
        risks = np.cumsum(population.error_rate(grid))
        self.risks = risks / np.arange(1, GRID + 1)
        self.quantile_of = Quantiles(population.score)
        limit = population.score(np.array([population.limit]))[0]
        self.at_limit = self.truth(limit)

    def truth(self, threshold):
        quantile = self.quantile_of(threshold)
        return {
            "risk": self.risks[max(round(quantile * GRID) - 1, 0)],
            "coverage": quantile,
            "false_positive_rate": quantile**self.population.outliers,
        }

    def wanted(self, place):
        slack = SLACK[place % len(SLACK)]
        return {
            name: value + (-1 if name == "coverage" else 1) * slack.get(name, 0)
            for name, value in self.at_limit.items()
        }

    def draw(self, rng):
        """Scores of known inputs, which answers are wrong, and outliers."""
        u = rng.random(1000)
        wrong = rng.random(1000) < self.population.error_rate(u)
        outliers = rng.random(500) ** (1.0 / self.population.outliers)
        score = self.population.score
        return score(u), wrong, score(outliers)

    def breaks(self, threshold, wanted):
        true = self.truth(threshold)
        return (
            true["risk"] > wanted["risk"] + 1e-9
            or true["coverage"] < wanted["coverage"] - 1e-9
            or true["false_positive_rate"]
            > wanted["false_positive_rate"] + 1e-9
        )


def joint_deployments(population, number, delta, rng):
    """How many joint rules were fitted and how many broke a guarantee."""
    task = JointTask(population)
    fitted = broken = 0
    for place in range(number):
        wanted = task.wanted(place)
        rule = JointRule(**wanted, delta=delta, method=None)
        try:
            threshold, _ = rule.find_threshold(*task.draw(rng))
        except ValueError:
            continue
        fitted += 1
        broken += task.breaks(threshold, wanted)
    return fitted, broken


def mapie_threshold(drawn, wanted, delta, fwer_method):
    """The threshold of MAPIE's Learn then Test, or `None`."""
    from mapie.risk_control import BinaryClassificationController, BinaryRisk

    scores, wrong, outliers = drawn
    right, outlier = 1, 2
    kinds = np.where(wrong, 0, right)
    kinds = np.concatenate([kinds, np.full(len(outliers), outlier)])
    coverage = BinaryRisk(
        lambda y, accepted: accepted == 1,
        lambda y, accepted: y != outlier,
        higher_is_better=True,
    )
    risks = {
        "risk": BinaryRisk(
            lambda y, accepted: y != right,
            lambda y, accepted: (accepted == 1) & (y != outlier),
            higher_is_better=False,
        ),
        "coverage": coverage,
        "false_positive_rate": BinaryRisk(
            lambda y, accepted: accepted == 1,
            lambda y, accepted: y == outlier,
            higher_is_better=False,
        ),
    }
    controller = BinaryClassificationController(
        # It accepts what is at least its threshold.
        lambda x: np.stack([x, 1.0 - x], axis=-1),
        [risks[name] for name in wanted],
        [float(level) for level in wanted.values()],
        confidence_level=1.0 - delta,
        best_predict_param_choice=coverage,
        fwer_method=fwer_method,
    )
    x = np.concatenate([scores, outliers])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if fwer_method == "split_fixed_sequence":
            # The order of its tests comes from every other sample.
            controller.learn_fixed_sequence_order(x[::2], kinds[::2])
            x, kinds = x[1::2], kinds[1::2]
        controller.calibrate(x, kinds)
    found = controller.best_predict_param
    # Scores in steps may equal it.
    return None if found is None else 1.0 - found + 1e-9


def compare_with_mapie(draws, delta):
    """Prints what share of inputs is answered, by procedure."""
    methods = ("bonferroni_holm", "split_fixed_sequence")
    names = ["`JointRule`", *(f"MAPIE, {name}" for name in methods)]
    print("Answered, % of inputs on average over draws, and (broken, %).")
    print()
    print("| population |", " | ".join(names), "|")
    print("|---|" + "---|" * len(names))
    for seed, (title, population) in enumerate(DEPLOYED.items()):
        task = JointTask(population)
        answered, broken = np.zeros((2, len(names)))
        rng = np.random.default_rng(seed)
        for place in range(draws):
            wanted, drawn = task.wanted(place), task.draw(rng)
            rule = JointRule(**wanted, delta=delta, method=None)
            try:
                thresholds = [rule.find_threshold(*drawn)[0]]
            except ValueError:
                thresholds = [None]
            thresholds += [
                mapie_threshold(drawn, wanted, delta, name) for name in methods
            ]
            for column, threshold in enumerate(thresholds):
                if threshold is not None:
                    answered[column] += task.quantile_of(threshold)
                    broken[column] += task.breaks(threshold, wanted)
        cells = [
            f"{100 * share / draws:.1f} ({100 * wrong / draws:.1f})"
            for share, wrong in zip(answered, broken, strict=True)
        ]
        print(f"| {title} | {' | '.join(cells)} |", flush=True)


def group_deployments(population, number, delta, rng):
    """How many rules by group were fitted, and broken, by group."""
    quantile_of = Quantiles(population.score)
    powers = np.array(population.powers, float)
    fitted, broken = 0, np.zeros(3, int)
    for _ in range(number):
        groups = rng.choice(3, 500, p=population.shares)
        quantiles = rng.random(500) ** (1.0 / powers[groups])
        rule = CoverageRule(0.8, None, delta)
        rule = GroupwiseRule(rule, by="group")
        try:
            rule.fit(population.score(quantiles), groups=groups)
        except ValueError:
            continue
        limits = np.array(list(rule.thresholds.values()))
        fitted += 1
        broken += quantile_of(limits) ** powers < 0.8 - 1e-9
    return fitted, broken.max()


def pool_of(population, rng, size=20_000):
    """Packed scores and labels of a population, of which samples are drawn."""
    labels = rng.choice(3, size, p=population.shares)
    spread = np.array(population.powers)[labels, None]
    logits = 4.0 * np.eye(3)[labels] + spread * rng.normal(size=(size, 3))
    if population.step:
        logits = population.step * np.round(logits / population.step)
    scores = packing.pack(
        keras.ops.convert_to_tensor(logits, "float32"),
        0.0,
        keras.ops.convert_to_tensor(1.0 + rng.random((size, 1)), "float32"),
        2.0,
        8,
    )
    return keras.ops.convert_to_numpy(scores), labels


def set_deployments(population, number, delta, rng, class_conditional):
    """How many rules of label sets were fitted, and broken, by class."""
    scores, labels = pool_of(population, rng)
    own = ood_scores.label_scores(
        scores[:, :3], ood_scores.ood_score(scores, "max_probability")
    )[np.arange(len(labels)), labels]
    members = [labels >= 0]
    if class_conditional:
        members = [labels == k for k in range(3)]
    own = [np.sort(own[member].astype("float64")) for member in members]
    fitted, broken = 0, np.zeros(len(own), int)
    for _ in range(number):
        drawn = rng.integers(0, len(labels), 500)
        rule = LabelSetRule(0.8, class_conditional, delta)
        try:
            rule.fit(scores[drawn], labels[drawn])
        except ValueError:
            continue
        if class_conditional:
            limits = rule.thresholds.values()
        else:
            limits = [rule.threshold]
        fitted += 1
        for place, (of_class, limit) in enumerate(
            zip(own, limits, strict=True)
        ):
            kept = np.searchsorted(of_class, limit, side="right")
            broken[place] += kept / len(of_class) < 0.8
    return fitted, broken.max()


RULES = {
    "`JointRule`": joint_deployments,
    "`GroupwiseRule(CoverageRule)`, worst group": group_deployments,
    "`LabelSetRule`": lambda *a: set_deployments(*a, False),
    "`LabelSetRule`, worst class": lambda *a: set_deployments(*a, True),
}


def count_deployments(deployments, delta):
    """Prints how often each rule broke its guarantee, by population."""
    number = deployments // len(DEPLOYED)
    print(f"Broken of fitted rules, {number} deployments of each population.")
    print(f"A guarantee may be broken in {100 * delta:g} % of deployments.")
    print()
    print("| population |", " | ".join(RULES), "|")
    print("|---|" + "---|" * len(RULES))
    worst = np.zeros(len(RULES))
    totals = np.zeros((len(RULES), 2), int)
    for seed, (name, population) in enumerate(DEPLOYED.items()):
        cells = []
        for place, count in enumerate(RULES.values()):
            rng = np.random.default_rng([seed, place])
            fitted, broken = count(population, number, delta, rng)
            worst[place] = max(worst[place], broken / number)
            totals[place] += fitted, broken
            cells.append(
                f"{broken} of {fitted} ({100 * broken / number:.2f} %)"
            )
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    cells = [
        f"{broken} of {fitted} ({100 * broken / number / len(DEPLOYED):.2f} %)"
        for fitted, broken in totals
    ]
    print(f"| all | {' | '.join(cells)} |")
    cells = [f"{100 * share:.2f} %" for share in worst]
    error = math.sqrt(delta * (1.0 - delta) / number)
    print(f"| worst, ± {100 * error:.2f} | {' | '.join(cells)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--draws",
        type=int,
        default=1000,
        help="how often each procedure for a selective risk is tried",
    )
    parser.add_argument("--delta", type=float, default=0.05)
    parser.add_argument(
        "--deployments",
        type=int,
        default=0,
        help="count broken guarantees of so many deployments of each rule "
        "instead",
    )
    parser.add_argument(
        "--mapie",
        type=int,
        default=0,
        help="compare so many joint rules of each population with MAPIE's "
        "Learn then Test instead; needs `mapie`",
    )
    arguments = parser.parse_args()
    if arguments.mapie:
        compare_with_mapie(arguments.mapie, arguments.delta)
        return
    if arguments.deployments:
        count_deployments(arguments.deployments, arguments.delta)
        return
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
