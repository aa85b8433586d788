"""Metrics against those of TorchUncertainty, on random cases.

Each test says what the two have to agree in. TorchUncertainty computes in
float32, integrates risk over coverage from the first accepted sample on, and
lets outliers cost `ood_cost` and errors `1 - ood_cost`, where here both cost 1.
"""

import importlib
import importlib.util
import sys
import types

import numpy as np
import pytest

from keras_halo import metrics

if importlib.util.find_spec("torch_uncertainty") is None:
    pytest.skip(
        "TorchUncertainty is not installed: `tox -e oracles`",
        allow_module_level=True,
    )
import torch

CASES = range(200)


def peer(module):
    """A module of metrics, without what its package imports beside it."""
    name = "torch_uncertainty"
    for part in ("", ".metrics", ".metrics.classification"):
        package = name + part
        if package not in sys.modules:
            spec = importlib.util.find_spec(package)
            bare = types.ModuleType(package)
            bare.__path__ = list(spec.submodule_search_locations)
            sys.modules[package] = bare
    return importlib.import_module(f"{name}.metrics.classification.{module}")


class Draw:
    """Errors of known inputs, and scores of these and of unknown ones."""

    def __init__(self, case):
        rng = np.random.default_rng(case)
        num_known, num_unknown = rng.integers(5, 300, 2)
        self.errors = rng.random(num_known) < rng.uniform(0.02, 0.6)
        # Distinct also in float32: of ties the two average differently.
        scores = rng.permutation(num_known + num_unknown) + 0.0
        scores[:num_known] -= rng.uniform(0.0, num_unknown) * ~self.errors
        scores = np.argsort(np.argsort(scores)) + 0.0
        self.known, self.unknown = np.split(scores, [num_known])

    def of(self, metric):
        metric.update(
            torch.tensor(np.concatenate([self.known, self.unknown])),
            torch.tensor(
                np.concatenate([self.errors, np.zeros(len(self.unknown))])
            ),
            torch.tensor(np.arange(self.size) >= len(self.known)),
        )
        return float(metric.compute())

    @property
    def size(self):
        return len(self.known) + len(self.unknown)

    @property
    def curve(self):
        return metrics.risk_coverage_curve(
            self.errors, self.known, self.unknown
        )


def over_coverage(curve, values):
    """The area from the first accepted sample on, for a width of one."""
    width = curve.coverage[-1] - curve.coverage[0]
    return np.trapezoid(values, curve.coverage) / width


def test_scod_areas_are_those_of_torch_uncertainty():
    scod = peer("scod_risk_coverage")
    for draw in map(Draw, CASES):
        curve = draw.curve
        np.testing.assert_allclose(
            over_coverage(curve, curve.risk),
            2.0 * draw.of(scod.SCODAURC(ood_cost=0.5)),
            rtol=2e-5,
        )
        np.testing.assert_allclose(
            over_coverage(curve, curve.risk * curve.coverage),
            2.0 * draw.of(scod.SCODAUGRC(ood_cost=0.5)),
            rtol=2e-5,
        )


def test_areas_differ_from_these_by_their_ends_alone():
    """A mean over coverages, and an area from coverage zero on."""
    for draw in map(Draw, CASES):
        curve, n = draw.curve, draw.size
        ends = 0.5 * (curve.risk[0] + curve.risk[-1])
        np.testing.assert_allclose(
            n * metrics.aurc(draw.errors, draw.known, draw.unknown),
            (n - 1) * over_coverage(curve, curve.risk) + ends,
            rtol=1e-12,
        )
        first = 0.5 * curve.risk[0] / n**2
        np.testing.assert_allclose(
            metrics.augrc(draw.errors, draw.known, draw.unknown),
            over_coverage(curve, curve.risk * curve.coverage) * (1 - 1 / n)
            + first,
            rtol=1e-12,
        )


@pytest.mark.parametrize("level", [0.05, 0.2, 0.5])
def test_coverage_at_a_risk_is_that_of_torch_uncertainty(level):
    """Where outliers cost as much as errors, half of ours is theirs."""
    metric = peer("scod_risk_coverage").SCODCovAtxRisk
    for draw in map(Draw, CASES):
        # A level that no risk equals: rounding must not decide.
        risk = level + 1e-5
        theirs = draw.of(metric(risk_threshold=0.5 * risk, ood_cost=0.5))
        ours = metrics.coverage_at_risk(
            draw.errors, draw.known, risk, draw.unknown
        )
        assert ours == pytest.approx(0.0 if np.isnan(theirs) else theirs)


@pytest.mark.parametrize("level", [0.1, 0.5, 0.8])
def test_risk_at_a_coverage_is_that_of_torch_uncertainty(level):
    metric = peer("scod_risk_coverage").SCODRiskAtxCov
    for draw in map(Draw, CASES):
        coverage = level + 1e-5
        theirs = draw.of(metric(cov_threshold=coverage, ood_cost=0.5))
        ours = metrics.risk_at_coverage(
            draw.errors, draw.known, coverage, draw.unknown
        )
        assert ours == pytest.approx(2.0 * theirs, rel=2e-6)


def probabilities_and_labels(case):
    rng = np.random.default_rng(case)
    num_samples, num_classes = rng.integers(50, 500), rng.integers(2, 9)
    logits = rng.normal(0.0, 2.0, (num_samples, num_classes))
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    labels = np.array([rng.choice(num_classes, p=row) for row in p])
    # Sharper than they are right, in some cases.
    p = p ** rng.uniform(0.5, 3.0)
    return (p / p.sum(axis=-1, keepdims=True)).astype("float32"), labels


def test_class_wise_error_is_that_of_torch_uncertainty():
    metric = peer("calibration.classwise_calibration_error")
    for case in CASES:
        p, labels = probabilities_and_labels(case)
        theirs = metric.ClasswiseCalibrationError(p.shape[1], num_bins=15)
        theirs.update(torch.tensor(p), torch.tensor(labels))
        ours = metrics.classwise_calibration_error(labels, p, num_bins=15)
        assert ours == pytest.approx(float(theirs.compute()), abs=2e-6)


def test_smooth_error_is_that_of_torch_uncertainty():
    """With the reflected kernel of the article, where none is very sure.

    Their grid of about 500 points counts a confidence on its last point half,
    because it is not reflected: with many answers surer than 99.9 % their error
    is larger by a tenth and more than the integral, which
    `test_smooth_error_is_that_of_its_definition` checks.
    """
    metric = peer("calibration.smooth_calibration_error")
    for case in CASES:
        p, labels = probabilities_and_labels(case)
        unsure = p.max(axis=-1) < 0.99
        p, labels = p[unsure], labels[unsure]
        theirs = metric.SmoothCalibrationError("reflected", eps=1e-5)
        theirs.refine_steps = 30
        theirs.update(torch.tensor(p), torch.tensor(labels))
        ours = metrics.smooth_calibration_error(labels, p)
        assert ours == pytest.approx(float(theirs.compute()), rel=0.01)
