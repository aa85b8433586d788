"""Metrics on whole data sets, against oracles and naive loops."""

import itertools
import math
import sys
import tracemalloc

import cases
import numpy as np
import pytest
from helpers import packed
from hypothesis import given
from hypothesis import strategies as st
from keras import ops

from keras_halo import metrics

NUM_CASES = 1000 if cases.THOROUGH else 200

# What a score may look like: each makes `size` numbers out of a generator.
SCORES = {
    "continuous": lambda rng, size: rng.normal(size=size),
    "ties": lambda rng, size: rng.integers(0, 4, size).astype("float64"),
    "constant": lambda rng, size: np.full(size, rng.normal()),
    "thousands": lambda rng, size: 5e3 + 1e4 * rng.normal(size=size),
    "huge": lambda rng, size: 1e30 * rng.integers(-9, 9, size),
    "overflowing differences": lambda rng, size: (
        1.7e308 * rng.choice([-1.0, 0.5, 1.0], size)
    ),
    "denormal": lambda rng, size: 5e-324 * rng.integers(0, 6, size),
    "mixed": lambda rng, size: rng.choice(
        [-1e30, -1.0, 0.0, 5e-324, 1e-30, 1.0, 4000.0, 1e30], size
    ),
}


def random_scores(seed, sizes):
    """Arrays of scores of one kind, and the generator that made them."""
    rng = np.random.default_rng(seed)
    kind = list(SCORES)[seed % len(SCORES)]
    return rng, [SCORES[kind](rng, size) for size in sizes(rng)]


def two_sides(seed):
    _, sides = random_scores(seed, lambda rng: rng.integers(1, 40, 2))
    return sides


def errors_and_uncertainty(seed, max_size=40):
    rng, (uncertainty,) = random_scores(
        seed, lambda rng: rng.integers(1, max_size + 1, 1)
    )
    if seed % 3 == 0:
        return rng.exponential(size=uncertainty.size), uncertainty
    return rng.random(uncertainty.size) < rng.random(), uncertainty


def random_probabilities(seed, num_classes, num_samples):
    """Labels and probabilities with ties, ones, zeros, and edges of bins."""
    rng = np.random.default_rng(seed)
    kind = seed % 4
    shape = (num_samples, num_classes)
    if kind == 0:
        probabilities = rng.dirichlet(np.ones(num_classes), num_samples)
    elif kind == 1:
        probabilities = np.eye(num_classes)[
            rng.integers(0, num_classes, num_samples)
        ]
    elif kind == 2:
        probabilities = np.full(shape, 1.0 / num_classes)
    else:
        probabilities = (
            rng.multinomial(10, np.ones(num_classes) / num_classes, num_samples)
            / 10
        )
    return rng.integers(0, num_classes, num_samples), probabilities


# Ranking


def naive_auroc(known, unknown):
    wins = sum(
        (u > k) + 0.5 * (u == k) for k, u in itertools.product(known, unknown)
    )
    return wins / (len(known) * len(unknown))


def naive_fpr(known, unknown, recall, positive):
    """Tries every threshold, the strictest first."""
    if positive == "known":
        wanted, other = known, unknown
    else:
        wanted, other = [-s for s in unknown], [-s for s in known]
    for threshold in sorted(set(wanted)):
        if sum(s <= threshold for s in wanted) / len(wanted) >= recall:
            return sum(s <= threshold for s in other) / len(other)
    raise AssertionError("every recall is reached at the largest score")


def squared_up(known, unknown):
    """Labels and scores for scikit-learn, where it can take them."""
    labels = np.repeat([0, 1], [len(known), len(unknown)])
    scores = np.concatenate([known, unknown])
    return labels, scores


@pytest.mark.any_backend
def test_auroc_is_that_of_scikit_learn_and_of_a_naive_loop():
    oracle = pytest.importorskip("sklearn.metrics")
    for seed in range(NUM_CASES):
        known, unknown = two_sides(seed)
        result = metrics.auroc(known, unknown)
        assert result == pytest.approx(naive_auroc(known, unknown)), seed
        if np.abs(known).max() < 1e300:
            labels, scores = squared_up(known, unknown)
            assert result == pytest.approx(
                oracle.roc_auc_score(labels, scores)
            ), seed


@pytest.mark.any_backend
def test_aupr_is_average_precision_of_scikit_learn():
    oracle = pytest.importorskip("sklearn.metrics")
    for seed in range(NUM_CASES):
        known, unknown = two_sides(seed)
        if np.abs(known).max() > 1e300:
            # Differences overflow in the oracle; the order is what counts.
            known, unknown = known / 1e10, unknown / 1e10
        labels, scores = squared_up(known, unknown)
        assert metrics.aupr(known, unknown) == pytest.approx(
            oracle.average_precision_score(labels, scores)
        ), seed
        assert metrics.aupr(known, unknown, "known") == pytest.approx(
            oracle.average_precision_score(1 - labels, -scores)
        ), seed


@pytest.mark.any_backend
@pytest.mark.parametrize("positive", ["known", "unknown"])
def test_fpr_is_that_of_a_naive_loop(positive):
    pytest.importorskip("sklearn")
    for seed in range(NUM_CASES):
        known, unknown = two_sides(seed)
        recall = [0.95, 0.5, 0.8, 1.0, 1e-9][seed % 5]
        expected = naive_fpr(known.tolist(), unknown.tolist(), recall, positive)
        assert metrics.fpr_at_recall(known, unknown, recall, positive) == (
            pytest.approx(expected, abs=1e-12)
        ), seed


@pytest.mark.any_backend
@pytest.mark.parametrize("positive", ["known", "unknown"])
def test_fpr_is_read_off_the_roc_curve_of_scikit_learn(positive):
    oracle = pytest.importorskip("sklearn.metrics")
    for seed in range(NUM_CASES):
        known, unknown = two_sides(seed)
        if np.abs(known).max() > 1e300:
            known, unknown = known / 1e10, unknown / 1e10
        labels, scores = squared_up(known, unknown)
        if positive == "known":
            labels, scores = 1 - labels, -scores
        fpr, tpr, _ = oracle.roc_curve(labels, scores, drop_intermediate=False)
        assert metrics.fpr_at_recall(
            known, unknown, positive=positive
        ) == pytest.approx(fpr[tpr >= 0.95].min(), abs=1e-12), seed


@pytest.mark.any_backend
def test_the_two_conventions_of_fpr_at_recall_by_hand():
    pytest.importorskip("sklearn")
    known = np.arange(100.0)
    unknown = np.concatenate([np.arange(90.0, 95.0), np.full(95, 98.5)])
    # 95 of 100 known are at or below 94, and so are 5 of the unknown.
    assert metrics.fpr_at_recall(known, unknown) == 0.05
    # 95 of 100 unknown are at or above 98.5, and so is 1 of the known.
    assert metrics.fpr_at_recall(known, unknown, positive="unknown") == 0.01


@pytest.mark.any_backend
def test_tied_scores_pass_the_threshold_together():
    pytest.importorskip("sklearn")
    # Half of the known must be accepted: the tie lets in all at once.
    assert metrics.fpr_at_recall([1, 1, 1, 1], [1, 1, 2, 2], 0.5) == 0.5


@pytest.mark.any_backend
def test_scores_of_thousands_stay_apart():
    pytest.importorskip("sklearn")
    known, unknown = [5000.0, 5001.0], [5002.0, 5003.0]
    assert metrics.auroc(known, unknown) == 1.0
    assert metrics.aupr(known, unknown, "known") == 1.0
    assert metrics.fpr_at_recall(known, unknown) == 0.0


@pytest.mark.any_backend
@given(seed=st.integers(0, 10**6))
def test_ranking_depends_on_neither_scale_nor_order(seed):
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(seed)
    known, unknown = rng.integers(0, 9, 12), rng.integers(3, 12, 7)
    for metric in (metrics.auroc, metrics.aupr, metrics.fpr_at_recall):
        result = metric(known, unknown)
        assert result == metric(np.exp(0.1 * known), np.exp(0.1 * unknown))
        assert result == metric(rng.permutation(known), unknown[::-1])


@pytest.mark.any_backend
def test_swapping_the_sides_mirrors_the_ranking():
    pytest.importorskip("sklearn")
    for seed in range(50):
        known, unknown = two_sides(seed)
        assert metrics.auroc(known, unknown) == pytest.approx(
            metrics.auroc(-unknown, -known)
        )
        assert metrics.fpr_at_recall(known, unknown, positive="unknown") == (
            metrics.fpr_at_recall(-unknown, -known)
        )


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "metric", [metrics.auroc, metrics.aupr, metrics.fpr_at_recall]
)
@pytest.mark.parametrize(
    ("known", "unknown", "message"),
    [
        ([], [1.0], "`known` must hold at least one"),
        ([1.0], [], "`unknown` must hold at least one"),
        ([1.0, float("nan")], [1.0], "`known` must be finite. .* 1 of 2"),
        ([1.0], [float("inf")], "`unknown` must be finite"),
        ([[1.0]], [1.0], "`known` must be a 1-D array"),
        (1.0, [1.0], "`known` must be a 1-D array"),
    ],
)
def test_ranking_refuses(metric, known, unknown, message):
    with pytest.raises(ValueError, match=message):
        metric(known, unknown)


@pytest.mark.any_backend
def test_ranking_refuses_arguments():
    with pytest.raises(ValueError, match="`positive` must be one of"):
        metrics.aupr([0.0], [1.0], positive="ood")
    for recall in (0.0, 95, float("nan")):
        with pytest.raises(ValueError, match="`recall` must be in"):
            metrics.fpr_at_recall([0.0], [1.0], recall=recall)


@pytest.mark.any_backend
def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(ImportError, match=r'pip install "keras-halo\[tools\]'):
        metrics.auroc([0.0], [1.0])


def test_tensors_of_the_backend_are_taken():
    pytest.importorskip("sklearn")
    known, unknown = ops.array([0.1, 0.2]), ops.array([0.15, 0.3])
    assert metrics.auroc(known, unknown) == 0.75


# Selective prediction


def naive_risk_coverage(errors, uncertainty):
    points = []
    for threshold in sorted(set(uncertainty)):
        accepted = [
            e
            for e, u in zip(errors, uncertainty, strict=True)
            if u <= threshold
        ]
        points.append(
            (len(accepted) / len(errors), sum(accepted) / len(accepted))
        )
    return points


def naive_aurc(errors):
    """Of errors in an order without ties."""
    risks, total = [], 0.0
    for position, error in enumerate(errors, start=1):
        total += error
        risks.append(total / position)
    return sum(risks) / len(risks)


def naive_augrc(errors, uncertainty):
    area, last_coverage, last_risk = 0.0, 0.0, 0.0
    for coverage, risk in naive_risk_coverage(errors, uncertainty):
        generalized = coverage * risk
        area += (coverage - last_coverage) * (generalized + last_risk) / 2
        last_coverage, last_risk = coverage, generalized
    return area


def spread_over_ties(errors, uncertainty):
    """Errors by increasing uncertainty, each the mean of its tied group."""
    spread = []
    for threshold in sorted(set(uncertainty)):
        group = [
            e
            for e, u in zip(errors, uncertainty, strict=True)
            if u == threshold
        ]
        spread += [sum(group) / len(group)] * len(group)
    return spread


@pytest.mark.any_backend
def test_risk_coverage_curve_is_that_of_a_naive_loop():
    for seed in range(NUM_CASES):
        errors, uncertainty = errors_and_uncertainty(seed)
        curve = metrics.risk_coverage_curve(errors, uncertainty)
        points = naive_risk_coverage(errors.tolist(), uncertainty.tolist())
        np.testing.assert_allclose(
            np.stack([curve.coverage, curve.risk], axis=-1), points, rtol=1e-12
        )
        assert curve.threshold.tolist() == sorted(set(uncertainty.tolist()))


@pytest.mark.any_backend
def test_aurc_is_that_of_a_naive_loop():
    for seed in range(NUM_CASES):
        errors, uncertainty = errors_and_uncertainty(seed)
        spread = spread_over_ties(errors.tolist(), uncertainty.tolist())
        assert metrics.aurc(errors, uncertainty) == pytest.approx(
            naive_aurc(spread)
        ), seed


@pytest.mark.any_backend
def test_aurc_with_ties_is_the_mean_over_the_orders_of_tied_samples():
    for seed in range(NUM_CASES):
        errors, uncertainty = errors_and_uncertainty(seed, max_size=4)
        orders = [
            naive_aurc([float(errors[i]) for i in order])
            for order in itertools.permutations(range(errors.size))
            if uncertainty[list(order)].tolist() == sorted(uncertainty)
        ]
        assert metrics.aurc(errors, uncertainty) == pytest.approx(
            sum(orders) / len(orders)
        ), seed


@pytest.mark.any_backend
def test_augrc_is_that_of_a_naive_loop():
    for seed in range(NUM_CASES):
        errors, uncertainty = errors_and_uncertainty(seed)
        assert metrics.augrc(errors, uncertainty) == pytest.approx(
            naive_augrc(errors.tolist(), uncertainty.tolist())
        ), seed


@pytest.mark.any_backend
def test_augrc_of_wrong_answers_follows_from_auroc_and_accuracy():
    pytest.importorskip("sklearn")
    for seed in range(NUM_CASES):
        errors, uncertainty = errors_and_uncertainty(seed)
        if errors.dtype != bool or errors.all() or not errors.any():
            continue
        accuracy = 1.0 - errors.mean()
        auroc = metrics.auroc(uncertainty[~errors], uncertainty[errors])
        assert metrics.augrc(errors, uncertainty) == pytest.approx(
            (1 - auroc) * accuracy * (1 - accuracy) + (1 - accuracy) ** 2 / 2
        ), seed


@pytest.mark.any_backend
@given(seed=st.integers(0, 10**6))
def test_selective_metrics_do_not_depend_on_the_order_of_samples(seed):
    rng = np.random.default_rng(seed)
    errors, uncertainty = rng.integers(0, 2, 30), rng.integers(0, 5, 30)
    order = rng.permutation(30)
    for metric in (metrics.aurc, metrics.augrc):
        assert metric(errors, uncertainty) == metric(
            errors[order], uncertainty[order]
        )


def naive_at(errors, uncertainty):
    """Coverage and risk of every number of accepted samples, without ties."""
    order = np.argsort(uncertainty)
    risks = np.cumsum(errors[order]) / np.arange(1, len(order) + 1)
    return np.arange(1, len(order) + 1) / len(order), risks


@pytest.mark.any_backend
def test_risk_and_coverage_at_a_point_are_those_of_a_naive_loop():
    rng = np.random.default_rng(0)
    for _ in range(200):
        n = rng.integers(1, 60)
        errors, uncertainty = rng.random(n) < 0.3, rng.normal(size=n)
        coverages, risks = naive_at(errors, uncertainty)
        for share in (0.05, 0.3, 0.8, 1.0):
            # As many as that takes, rounded up.
            number = math.ceil(share * n - 1e-9)
            assert metrics.risk_at_coverage(
                errors, uncertainty, share
            ) == pytest.approx(risks[number - 1])
            kept = coverages[risks <= share]
            assert metrics.coverage_at_risk(
                errors, uncertainty, share
            ) == pytest.approx(max(kept, default=0.0))
    # Ties are accepted together.
    assert metrics.risk_at_coverage([0, 1], [5.0, 5.0], 0.5) == 0.5
    assert metrics.coverage_at_risk([0, 1], [5.0, 5.0], 0.2) == 0.0


@pytest.mark.any_backend
def test_unknown_inputs_are_errors_where_they_are_accepted():
    rng = np.random.default_rng(0)
    errors, uncertainty = rng.random(80) < 0.2, rng.normal(size=80)
    unknown = rng.normal(size=40) + 1.0
    both = (
        np.concatenate([errors, np.ones(40)]),
        np.concatenate([uncertainty, unknown]),
    )
    for metric in (
        metrics.aurc,
        metrics.augrc,
        metrics.risk_at_coverage,
        metrics.coverage_at_risk,
    ):
        value = metric(errors, uncertainty, unknown=unknown)
        assert value == metric(*both)
        assert value != metric(errors, uncertainty)
    curve = metrics.risk_coverage_curve(errors, uncertainty, unknown)
    assert curve.risk[-1] == pytest.approx((errors.sum() + 40) / 120)


@pytest.mark.any_backend
def test_all_right_and_all_wrong_have_defined_areas():
    uncertainty = [0.3, 0.1, 0.2]
    assert metrics.aurc([0, 0, 0], uncertainty) == 0.0
    assert metrics.augrc([0, 0, 0], uncertainty) == 0.0
    assert metrics.aurc([1, 1, 1], uncertainty) == 1.0
    assert metrics.augrc([1, 1, 1], uncertainty) == pytest.approx(0.5)
    # One group: every coverage has the risk of all samples.
    assert metrics.aurc([0, 1], [7.0, 7.0]) == 0.5


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "metric", [metrics.risk_coverage_curve, metrics.aurc, metrics.augrc]
)
@pytest.mark.parametrize(
    ("errors", "uncertainty", "message"),
    [
        ([], [], "`errors` must hold at least one"),
        ([0, 1], [0.5], "2 errors and 1 uncertainties"),
        ([0, 1], [0.5, float("nan")], "`uncertainty` must be finite"),
        ([0, float("inf")], [0.5, 1.0], "`errors` must be finite"),
        ([[0, 1]], [0.5, 1.0], "`errors` must be a 1-D array"),
    ],
)
def test_selective_metrics_refuse(metric, errors, uncertainty, message):
    with pytest.raises(ValueError, match=message):
        metric(errors, uncertainty)


# Calibration


def bin_of(probability, num_bins):
    edges = np.linspace(0.0, 1.0, num_bins + 1)
    for index in range(num_bins):
        if edges[index] <= probability < edges[index + 1]:
            return index
    return num_bins - 1


def naive_ece(labels, probabilities, num_bins):
    gaps = [0.0] * num_bins
    for label, row in zip(labels, probabilities, strict=True):
        confidence = max(row)
        index = bin_of(confidence, num_bins)
        gaps[index] += float(np.argmax(row) == label) - confidence
    return sum(abs(gap) for gap in gaps) / len(labels)


@pytest.mark.any_backend
def test_ece_is_that_of_a_naive_loop():
    for seed in range(NUM_CASES):
        num_bins = [15, 1, 10, 7][(seed // 4) % 4]
        labels, probabilities = random_probabilities(seed, 2 + seed % 3, 20)
        assert metrics.expected_calibration_error(
            labels, probabilities, num_bins
        ) == pytest.approx(
            naive_ece(labels, probabilities, num_bins), abs=1e-12
        ), seed


@pytest.mark.any_backend
def test_classwise_error_is_that_of_a_naive_loop():
    for seed in range(NUM_CASES):
        num_bins = [15, 1, 10, 7][(seed // 4) % 4]
        num_classes = 2 + seed % 3
        labels, probabilities = random_probabilities(seed, num_classes, 20)
        expected = 0.0
        for k in range(num_classes):
            # The class against the rest, whichever of the two is likelier.
            gaps = [0.0] * num_bins
            for label, p in zip(labels, probabilities[:, k], strict=True):
                index = bin_of(p, num_bins)
                gaps[index] += float(label == k) - p
            expected += sum(abs(gap) for gap in gaps) / 20 / num_classes
        assert metrics.classwise_calibration_error(
            labels, probabilities, num_bins
        ) == pytest.approx(expected, abs=1e-12), seed


def naive_smooth_error(labels, probabilities):
    """The definition: a sum over samples and mirror images, on a grid."""
    confidence = probabilities.max(axis=-1)
    residual = (probabilities.argmax(axis=-1) == labels) - confidence
    t = (np.arange(4000) + 0.5) / 4000

    def error(sigma):
        total = np.zeros_like(t)
        for shift in range(-4, 5):
            for sign in (1.0, -1.0):
                images = sign * confidence + 2.0 * shift
                distance = (t[:, None] - images) / sigma
                total += np.exp(-0.5 * distance**2) @ residual
        total /= sigma * math.sqrt(2.0 * math.pi) * len(labels)
        return np.abs(total).mean()

    low, high = 2e-3, 1.0
    for _ in range(20):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if error(middle) > middle else (low, middle)
    return low


@pytest.mark.any_backend
def test_smooth_error_is_that_of_its_definition():
    for seed in range(6):
        labels, probabilities = random_probabilities(4 * seed, 3, 30)
        found = metrics.smooth_calibration_error(labels, probabilities)
        assert found == pytest.approx(
            naive_smooth_error(labels, probabilities), abs=5e-4
        ), seed
        # Two confidences that bins would part.
        nudged = probabilities + 1e-4 * (1.0 / 3.0 - probabilities)
        assert metrics.smooth_calibration_error(
            labels, nudged
        ) == pytest.approx(found, abs=5e-4)


@pytest.mark.any_backend
def test_smooth_error_of_the_extremes():
    wrong, right = [1, 1], [0, 0]
    for p in ([[1.0, 0.0]] * 2, [[0.5, 0.5]] * 2):
        confidence = p[0][0]
        for labels, accuracy in ((wrong, 0.0), (right, 1.0)):
            gap = abs(accuracy - confidence)
            found = metrics.smooth_calibration_error(labels, p)
            assert found == pytest.approx(gap, abs=1e-4)


@pytest.mark.any_backend
@pytest.mark.filterwarnings("ignore")
def test_ece_is_that_of_netcal():
    oracle = pytest.importorskip(
        "netcal.metrics", reason="netcal, which needs torch, is not installed"
    ).ECE
    for seed in range(NUM_CASES):
        labels, probabilities = random_probabilities(seed, 4, 60)
        # netcal takes labels of two values for a binary question.
        labels[:4] = range(4)
        assert metrics.expected_calibration_error(
            labels, probabilities
        ) == pytest.approx(
            oracle(bins=15).measure(probabilities, labels), abs=1e-9
        ), seed


@pytest.mark.any_backend
def test_confidence_zero_and_one_belong_to_the_outer_bins():
    # The mass of abstaining was cut off: these rows need not sum to one.
    probabilities = [[1.0, 0.0], [0.0, 0.0], [0.5, 0.5], [0.2, 0.1]]
    bins = metrics.reliability_bins([0, 0, 1, 0], probabilities, num_bins=4)
    assert bins.count.tolist() == [2, 0, 1, 1]
    assert bins.confidence[[0, 2, 3]].tolist() == [0.1, 0.5, 1.0]
    assert bins.accuracy[[0, 2, 3]].tolist() == [1.0, 0.0, 1.0]
    assert np.isnan(bins.confidence[1])
    assert np.isnan(bins.accuracy[1])
    assert bins.edges.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.any_backend
def test_one_hot_labels_are_integers_and_soft_ones_count_by_their_mass():
    labels, probabilities = random_probabilities(0, 3, 50)
    one_hot = np.eye(3)[labels]
    for metric in (
        metrics.expected_calibration_error,
        metrics.classwise_calibration_error,
        metrics.smooth_calibration_error,
        metrics.brier_score,
        metrics.negative_log_likelihood,
    ):
        expected = metric(labels, probabilities)
        assert metric(one_hot, probabilities) == expected
        assert metric(labels[:, None], probabilities) == expected
    # Probabilities that are the label distribution itself are calibrated.
    for metric in (
        metrics.expected_calibration_error,
        metrics.classwise_calibration_error,
        metrics.smooth_calibration_error,
    ):
        assert metric(probabilities, probabilities) == pytest.approx(
            0.0, abs=1e-12
        )


@pytest.mark.any_backend
def test_brier_and_likelihood_are_those_of_a_naive_loop():
    for seed in range(NUM_CASES):
        labels, probabilities = random_probabilities(seed, 2 + seed % 3, 20)
        brier = nll = 0.0
        for label, row in zip(labels, probabilities, strict=True):
            brier += sum((p - (k == label)) ** 2 for k, p in enumerate(row))
            nll -= math.log(max(row[label], 2.0**-126))
        assert metrics.brier_score(labels, probabilities) == pytest.approx(
            brier / 20
        ), seed
        assert metrics.negative_log_likelihood(
            labels, probabilities
        ) == pytest.approx(nll / 20), seed


@pytest.mark.any_backend
def test_brier_and_likelihood_are_those_of_scikit_learn():
    oracle = pytest.importorskip("sklearn.metrics")
    labels, probabilities = random_probabilities(4, 3, 200)
    assert metrics.negative_log_likelihood(
        labels, probabilities
    ) == pytest.approx(oracle.log_loss(labels, probabilities))
    labels, probabilities = random_probabilities(4, 2, 200)
    # With two classes the sum over classes is twice the binary score.
    assert metrics.brier_score(labels, probabilities) == pytest.approx(
        2 * oracle.brier_score_loss(labels, probabilities[:, 1])
    )


@pytest.mark.any_backend
def test_all_wrong_gives_defined_numbers():
    labels, probabilities = [1, 1], [[1.0, 0.0], [1.0, 0.0]]
    assert metrics.negative_log_likelihood(
        labels, probabilities
    ) == pytest.approx(-math.log(2.0**-126))
    assert metrics.brier_score(labels, probabilities) == 2.0
    assert metrics.expected_calibration_error(labels, probabilities, 2) == 1.0


@pytest.mark.any_backend
def test_renormalize_conditions_on_an_answer():
    rng = np.random.default_rng(0)
    everything = rng.dirichlet(np.ones(4), 20)
    cut = everything[:, :-1]
    np.testing.assert_allclose(
        metrics.renormalize(cut), cut / cut.sum(axis=-1, keepdims=True)
    )
    extremes = np.array([[5e-324, 5e-324], [0.0, 0.0], [1e-30, 3e-30]])
    np.testing.assert_allclose(
        metrics.renormalize(extremes), [[0.5, 0.5], [0.5, 0.5], [0.25, 0.75]]
    )
    assert extremes[1].tolist() == [0.0, 0.0]


GOOD = [[0.9, 0.1], [0.2, 0.8]]


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "metric",
    [
        lambda labels, p: metrics.expected_calibration_error(labels, p, 2),
        lambda labels, p: metrics.classwise_calibration_error(labels, p, 2),
        metrics.smooth_calibration_error,
        metrics.brier_score,
        metrics.negative_log_likelihood,
    ],
    ids=["ece", "classwise", "smooth", "brier", "nll"],
)
@pytest.mark.parametrize(
    ("labels", "probabilities", "message"),
    [
        ([0, 2], GOOD, r"integers in \[0, 2\).* 1 of 2 .* among them 2"),
        ([0, -1], GOOD, "among them -1"),
        ([0, 0.5], GOOD, "among them 0.5"),
        ([0, float("nan")], GOOD, "among them nan"),
        ([0, 1, 1], GOOD, "Labels do not fit"),
        ([[0.5, 0.1], [0.0, 1.0]], GOOD, "must be distributions"),
        ([0, 1], [0.9, 0.1], "the shape `.N, K.`"),
        ([0, 1], [[0.9], [0.1]], "the shape `.N, K.`"),
        ([], np.zeros((0, 2)), "the shape `.N, K.`"),
        ([0, 1], [[0.9, 0.1], [0.9, 0.8]], "1 of 2 rows that do not"),
        ([0, 1], [[0.9, 0.1], [-0.1, 0.8]], "1 of 2 rows that do not"),
        ([0, 1], [[float("nan"), 0.1], [0.1, 0.8]], "must be finite"),
        ([0, 1], [[3.0, -5.0], [0.1, 0.8]], "decode_predictions"),
    ],
)
def test_calibration_refuses(metric, labels, probabilities, message):
    with pytest.raises(ValueError, match=message):
        metric(labels, probabilities)


@pytest.mark.any_backend
def test_fewer_samples_than_bins_are_refused():
    for metric in (
        metrics.expected_calibration_error,
        metrics.classwise_calibration_error,
    ):
        with pytest.raises(
            ValueError, match="2 samples for num_bins=15. Use fewer"
        ):
            metric([0, 1], GOOD)
    for num_bins in (0, -1, 2.5, True, "15"):
        with pytest.raises(ValueError, match="`num_bins` must be a positive"):
            metrics.reliability_bins([0, 1], GOOD, num_bins)


@pytest.mark.any_backend
def test_so_many_classes_that_their_square_fits_no_memory():
    num_classes = 300_000
    p = np.full((2, num_classes), 0.5 / (num_classes - 1))
    p[:, 7] = 0.5
    assert metrics.expected_calibration_error(
        [7, 1], p, num_bins=2
    ) == pytest.approx(0.0)
    assert metrics.negative_log_likelihood([7, 7], p) == pytest.approx(
        math.log(2.0)
    )


@pytest.mark.any_backend
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(
    "name",
    ["brier_score", "negative_log_likelihood", "expected_calibration_error"],
)
def test_calibration_of_a_large_set_takes_less_memory_than_the_set(
    name, soft, dtype
):
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(500, 0.1), size=20_000).astype(dtype)
    labels = p[::-1] if soft else rng.integers(0, 500, size=len(p))
    tracemalloc.start()
    value = getattr(metrics, name)(labels, p)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Labels of the same size are checked and counted besides.
    assert peak < (2.5 if soft else 1.0) * p.nbytes
    # As one whole in float64.
    y = labels if soft else np.eye(500)[labels]
    y, p = y.astype("float64"), p.astype("float64")
    if name == "brier_score":
        expected = ((p - y) ** 2).sum(axis=-1).mean()
    elif name == "negative_log_likelihood":
        logarithms = np.log(np.maximum(p, np.finfo("float32").tiny))
        expected = -(y * logarithms).sum(axis=-1).mean()
    else:
        bins = metrics.reliability_bins(labels, p)
        gaps = np.abs(bins.accuracy - bins.confidence)[bins.count > 0]
        expected = (gaps * bins.count[bins.count > 0]).sum() / len(p)
    np.testing.assert_allclose(value, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "function",
    [
        metrics.expected_calibration_error,
        metrics.classwise_calibration_error,
        metrics.brier_score,
        metrics.negative_log_likelihood,
        lambda y, p: metrics.renormalize(p),
        lambda y, p: metrics.reliability_bins(y, p, num_bins=4)[0],
    ],
)
def test_measures_of_probabilities_read_packed_scores_too(function):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 60)
    scores = packed(rng.normal(size=(60, 5)), rng.normal(size=(4, 5)))
    softmax = np.exp(scores[:, :4].astype("float64"))
    expected = function(labels, softmax / softmax.sum(axis=-1, keepdims=True))
    for output in (scores, {"scores": scores, "ood": scores[:, 0]}):
        np.testing.assert_allclose(
            function(labels, output), expected, rtol=2e-5
        )
    scores[3, -1] = scores[3, -2]
    with pytest.raises(ValueError, match="no packed geometry in 1 of 60 rows"):
        function(labels, scores)
