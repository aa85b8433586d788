"""What is no use is refused by name, everywhere and before anything happens.

Every public function and class of the package is called as it should be, and
then with each of its arguments spoilt in every way that its kind knows.
"""

import inspect
import json
import pathlib
import tempfile

import keras
import numpy as np
import pytest

import keras_halo
from keras_halo import layers, losses, metrics, plots, rejection, workflows
from keras_halo.ops.packing import packed_width

pytest.importorskip("sklearn", reason="needs scikit-learn")
pytest.importorskip("scipy", reason="needs SciPy")

pytestmark = pytest.mark.slow

N, K, D = 40, 3, 6
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, D)).astype("float32")
Y = np.arange(N) % K
# Far apart: tools warn where a model and its conversion differ by one sample.
X[np.arange(N), Y] += 5.0
ERRORS = np.arange(N) % 5 == 0
PROBABILITIES = np.full((N, K), 1.0 / K)
SCORES = np.linspace(-1.0, 1.0, N)


class Opaque:
    def __repr__(self):
        return "Opaque()"


def monitored():
    """The state of a monitor that has seen nothing."""
    rule = rejection.CoverageRule(method=None).fit(SCORES)
    return rejection.StreamMonitor(rule).fit(SCORES).state


STATE = monitored()

# Bad values by the kind of argument, each with a name.

ANYTHING = {"object": Opaque(), "text": "typo", "function": Opaque}
NUMBERS = {
    **ANYTHING,
    "none": None,
    "list": [0.5],
    "NaN": float("nan"),
    "true": True,
    "complex": 0.5j,
}
INTEGER = {**NUMBERS, "fraction": 2.5, "too small": -7}
BOOLEAN = {**ANYTHING, "none": None, "one": 1, "list": [True]}
SHARE = {**NUMBERS, "too large": 7.0, "too small": -7.0}
POSITIVE = {**NUMBERS, "too small": -7.0, "infinite": float("inf")}
# Arrays of N numbers.
VECTOR = {
    **ANYTHING,
    "none": None,
    "number": 3.0,
    "names": ["cat"] * N,
    "objects": [Opaque()] * N,
    "nones": [None] * N,
    "complex": np.full(N, 1j),
    "ragged": [[1.0], [1.0, 2.0]] * (N // 2),
    "masked": np.ma.masked_less(np.arange(float(N)), 3.0),
    "masked rows": list(np.ma.masked_less(np.ones((N, packed_width(K))), 3.0)),
    "masked numbers": [0.5] * (N - 1) + [np.ma.masked],
    "masked names": np.ma.array(["cat"] * N, mask=Y == 0),
    "huge integers": np.arange(N) + 2**60,
    "large unsigned": np.arange(N, dtype="uint64") + 2**60,
    "Python integers": [2**70] * N,
    "dates": np.array(["2020-01-01"] * N, "datetime64[D]"),
    "three axes": np.zeros((N, 2, 2)),
    "empty": [],
}
LABELS = {**VECTOR, "fractions": np.full(N, 0.5), "negative": -Y - 1}
MATRIX = {**VECTOR, "vector": np.zeros(N), "NaN": np.full((N, K), np.nan)}
WEIGHTS = {
    **VECTOR,
    "dictionary": {"weight": np.ones(N)},
    "NaN": np.full(N, np.nan),
    "negative": -np.ones(N),
    "infinite": np.full(N, np.inf),
    "too few": np.ones(N - 1),
    "too many": np.ones(N + 1),
}
PACKED = {
    **VECTOR,
    "dictionary": {"probabilities": np.zeros((N, K))},
    "probabilities": PROBABILITIES,
    "softmax": np.full((N, packed_width(K)), 1.0 / (packed_width(K))),
    "integers": np.zeros((N, packed_width(K)), "int64"),
    "16 bits": np.zeros((N, packed_width(K)), "float16"),
}
MODEL = {**ANYTHING, "none": None, "layer": keras.layers.Dense(3)}
INPUTS = {
    "none": None,
    "path": "data/train.npz",
    "object": Opaque(),
    "number": 3.0,
    "no axis": np.zeros(()),
    "no rows": np.zeros((0, D), "float32"),
    "masked": np.ma.masked_less(X, 0.0),
    "no arrays": [],
    "list of tuples": [("a", "b")],
    "strings": np.full((N, D), "a"),
    "objects": np.full((N, D), None),
}
# Bad labels and weights beside good inputs, of which no labels are read.
WITH_INPUTS = {
    "a single label": (X, np.array(1)),
    "a number for labels": (X, 1),
    **{
        f"weights: {name}": (X, Y, bad)
        for name, bad in WEIGHTS.items()
        if name not in ("none", "three axes")
    },
}
NAME = {"number": 3, "object": Opaque(), "list": ["a"]}
PATH = {"none": None, "number": 3, "object": Opaque()}
VERBOSE = {
    **ANYTHING,
    "path": "x.npz",
    "none": None,
    "list": [],
    "array": np.ones(2),
    "fraction": 0.5,
    "too large": 3,
    "too small": -1,
}
METHOD = {"text": "typo", "number": 3, "list": ["abstain"], "none": None}


def without(cases, *names):
    return {name: bad for name, bad in cases.items() if name not in names}


def optional(cases):
    return without(cases, "none")


IGNORED = {
    **without(optional(INTEGER), "too small"),
    "beyond int32": 2**31,
    "below int32": -(2**31) - 1,
}


@pytest.fixture(scope="module")
def model():
    # Fixtures of a module are made before those of a test, which set the seed.
    keras.utils.set_random_seed(0)
    inputs = keras.Input((D,))
    head = keras_halo.HALODense(K, 8, name="head")
    model = keras.Model(inputs, head(inputs))
    model.compile(keras.optimizers.Adam(0.02), keras_halo.HALOLoss())
    # Better than by chance, or there is nothing to calibrate.
    model.fit(X, Y, batch_size=20, epochs=10, verbose=0)
    return model


@pytest.fixture(scope="module")
def packed(model):
    return model.predict(X, verbose=0)


def metric_of(make):
    def update(y_true, y_pred, sample_weight):
        metric = make()
        metric.update_state(y_true, y_pred, sample_weight)
        return metric.result()

    return update


def fitted(make):
    """Fits a rule on plain scores, and decides with it."""

    def use(scores, errors, judged, path="no path"):
        rule = make()
        if isinstance(rule, rejection.SelectiveRiskRule):
            rule.fit(scores, errors=errors)
        else:
            rule.fit(scores)
        rule.predict(judged)
        if path != "no path":
            rule.save(path)

    return use


def logged(**arguments):
    """Opens a log in a folder of its own, and adds to it."""
    added = {"references": None, **arguments}
    answers = added.pop("answers", None)
    references = added.pop("references")
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "log.jsonl")
        with rejection.DecisionLog(**{"path": path, **added}) as log:
            if answers is not None:
                log.append(answers, references)


def replayed(model, rule, x, **arguments):
    """Replays a log of its own."""
    guarded = workflows.guard(model, rule)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "log.jsonl")
        with rejection.DecisionLog(path, rule) as log:
            log.append(guarded.predict(X[:5], verbose=0), range(5))
        given = {"log": path, "guarded": guarded, "x": x, **arguments}
        return workflows.replay(**given)


def fitted_jointly(scores, errors, outliers, judged):
    """Fits a rule that needs errors and outliers, and decides with it."""
    rule = rejection.JointRule(0.5, 0.5, 0.8, 0.2, method=None)
    rule.fit(scores, errors=errors, outliers=outliers).predict(judged)


def fitted_by_groups(scores, judged, groups):
    """Fits a rule for each group, and decides with it."""
    rule = rejection.CoverageRule(0.5, method=None)
    rule = rejection.GroupwiseRule(rule, by="group")
    rule.fit(scores, groups=groups).predict(judged, groups=groups)


def classified(model, **arguments):
    """Fits a classifier of scikit-learn."""
    classifier = keras_halo.SKLearnClassifier(model, **arguments)
    classifier.fit(X, Y, epochs=1, verbose=0)


def restored(rule, state):
    """What a monitor says that went on from a state."""
    monitor = rejection.StreamMonitor(rule)
    monitor.restore(state)
    return monitor.status


def kept(rule):
    """A rule on packed scores, fitted with labels."""

    def use(scores, labels):
        rule(method="abstain").fit(scores, labels)

    return use


def of_pairs(make):
    """A loss or a metric of the pairs of two towers."""

    def use(y_true, y_pred, sample_weight):
        if y_pred is None:
            y_pred = keras_halo.HALOSimilarity()([X, X])
        return make()(y_true, y_pred, sample_weight)

    return use


def to_head(keys):
    layer = keras_halo.HALOSimilarity()
    layer.build([(4, D), (4, D)])
    return layer.to_head(keys)


# Name: what is called, its good arguments, and how each can be bad. `...` is
# for what a fixture makes.
METRIC = {"y_true": Y, "y_pred": ..., "sample_weight": None}
# -1 and K belong to no class, which makes an answer wrong.
METRIC_CASES = {
    "y_true": without(LABELS, "negative", "huge integers"),
    "y_pred": PACKED,
    "sample_weight": without(
        optional(WEIGHTS), "NaN", "negative", "infinite", "number"
    ),
}
PAIRS = {"y_true": np.arange(N), "y_pred": None, "sample_weight": None}
PAIR_CASES = {
    # Ids are compared, whatever their size.
    "y_true": {
        **without(VECTOR, "huge integers", "large unsigned"),
        "too few": np.arange(N - 1),
        "booleans": np.arange(N) < 3,
        "scores": np.zeros((N, packed_width(N)), "float32"),
    },
    "y_pred": {
        **optional(PACKED),
        "ids": np.arange(N),
        "too few keys": np.zeros((N, N + 5), "float32"),
    },
    "sample_weight": METRIC_CASES["sample_weight"],
}
# They read no labels.
RATE_CASES = without(METRIC_CASES, "y_true")
PLAIN_RULE = {"scores": SCORES, "errors": ERRORS, "judged": SCORES}
PLAIN_CASES = {
    "scores": without(VECTOR, "three axes"),
    "judged": without(VECTOR, "three axes", "empty"),
}
TWO_VECTORS = {"known": VECTOR, "unknown": VECTOR}
ERROR_CASES = {"errors": VECTOR, "uncertainty": VECTOR}
CALIBRATION_CASES = {
    "labels": LABELS,
    "probabilities": MATRIX,
}
RATED = {"labels": Y, "probabilities": PROBABILITIES}

CALLS = {
    "HALODense": (
        keras_halo.HALODense,
        {"units": K},
        {
            "units": INTEGER,
            "embedding_dim": optional(INTEGER),
            "abstain_rate": optional(SHARE),
            "normalize": BOOLEAN,
            "learn_gamma": BOOLEAN,
            "activation": {"softmax": "softmax", "function": keras.ops.relu},
            "from_logits": {"true": True, "false": False},
            "use_bias": {"true": True, "false": False},
        },
    ),
    "HALODense.reference": (
        keras_halo.HALODense.reference,
        {"units": K},
        {"label_smoothing": optional(SHARE)},
    ),
    "HALODense.assign_temperature": (
        lambda value: to_head(X[:4]).assign_temperature(value),
        {"value": 2.0},
        {"value": {**POSITIVE, "zero": 0.0}},
    ),
    "HALOSimilarity": (
        keras_halo.HALOSimilarity,
        {},
        {
            "label_smoothing": SHARE,
            "learn_gamma": BOOLEAN,
            "bidirectional": BOOLEAN,
        },
    ),
    "HALOSimilarity.to_head": (
        to_head,
        {"keys": X[:4]},
        {"keys": {**MATRIX, "one key": X[:1]}},
    ),
    "HALOSoftmax": (layers.HALOSoftmax, {}, {"abstain": BOOLEAN}),
    "HALOLoss": (
        keras_halo.HALOLoss,
        {},
        {
            "label_smoothing": SHARE,
            "distill": BOOLEAN,
            "radial_weight": POSITIVE,
            "ignore_class": IGNORED,
            "block_size": optional(INTEGER),
        },
    ),
    "HALOLoss.__call__": (
        lambda **arguments: keras_halo.HALOLoss()(**arguments),
        {"y_true": Y, "y_pred": ..., "sample_weight": None},
        {
            "y_true": LABELS,
            "y_pred": PACKED,
            # What Keras allows: one weight for all, and of any sign.
            "sample_weight": without(
                optional(WEIGHTS), "NaN", "negative", "infinite", "number"
            ),
        },
    ),
    "halo_loss": (
        losses.halo_loss,
        {"y_true": Y, "y_pred": ...},
        {
            "y_true": without(LABELS, "fractions", "negative"),
            "y_pred": without(
                PACKED, "softmax", "integers", "16 bits", "probabilities"
            ),
            "label_smoothing": SHARE,
            "distill": BOOLEAN,
            "radial_weight": POSITIVE,
            "ignore_class": IGNORED,
            "block_size": optional(INTEGER),
        },
    ),
    "HALOContrastiveLoss": (
        keras_halo.HALOContrastiveLoss,
        {},
        {
            "label_smoothing": SHARE,
            "distill": BOOLEAN,
            "radial_weight": POSITIVE,
        },
    ),
    "HALOContrastiveLoss.__call__": (
        of_pairs(lambda: keras_halo.HALOContrastiveLoss()),
        PAIRS,
        PAIR_CASES,
    ),
    "RetrievalRecall.update_state": (
        of_pairs(lambda: metrics.RetrievalRecall().update_state),
        PAIRS,
        PAIR_CASES,
    ),
    "pair_labels": (
        keras_halo.pair_labels,
        {"query_ids": np.arange(N)},
        {
            "query_ids": without(VECTOR, "huge integers", "large unsigned"),
            "key_ids": without(
                optional(VECTOR), "huge integers", "large unsigned"
            ),
        },
    ),
    "OODMonitor": (
        keras_halo.OODMonitor,
        {"known": X, "unknown": {"far": X}},
        {
            "known": {**INPUTS, **WITH_INPUTS},
            "unknown": {
                **INPUTS,
                **{
                    f"set of {name}": {"far": bad}
                    for name, bad in {**INPUTS, **WITH_INPUTS}.items()
                },
            },
            "method": without(METHOD, "list"),
            "batch_size": optional(INTEGER),
            "frequency": INTEGER,
        },
    ),
    "evaluate_ood": (
        workflows.evaluate_ood,
        {
            "model": ...,
            "known": (X, Y),
            "unknown": {"far": 9 * X},
            "verbose": 0,
        },
        {
            "model": MODEL,
            "known": {
                **INPUTS,
                **{f"labels: {name}": (X, bad) for name, bad in LABELS.items()},
                **{
                    f"weights: {name}": (X, Y, bad)
                    for name, bad in WEIGHTS.items()
                    if name not in ("none", "three axes")
                },
                **{f"inputs: {name}": (bad, Y) for name, bad in INPUTS.items()},
            },
            "unknown": {
                **INPUTS,
                **{
                    f"set of {name}": {"far": bad}
                    for name, bad in {**INPUTS, **WITH_INPUTS}.items()
                },
            },
            "method": without(METHOD, "list"),
            "batch_size": optional(INTEGER),
            "num_bins": INTEGER,
            "ignore_class": IGNORED,
            "verbose": VERBOSE,
        },
    ),
    "calibrate": (
        workflows.calibrate,
        {"model": ..., "x": X, "y": (Y + ERRORS) % K, "verbose": 0},
        {
            "verbose": VERBOSE,
            "model": MODEL,
            "x": INPUTS,
            "y": LABELS,
            "unknown": optional(INPUTS),
            "bias": METHOD,
            "batch_size": optional(INTEGER),
            "sample_weight": optional(WEIGHTS),
        },
    ),
    "fit_class_gaussians": (
        workflows.fit_class_gaussians,
        {"model": ..., "x": X, "y": Y, "verbose": 0},
        {
            "verbose": VERBOSE,
            "model": MODEL,
            "x": INPUTS,
            "y": LABELS,
            "sample_weight": optional(WEIGHTS),
            "skip_missing": BOOLEAN,
        },
    ),
    "collect_statistics": (
        workflows.collect_statistics,
        {"model": ..., "x": X, "y": Y, "verbose": 0},
        {
            "verbose": VERBOSE,
            "model": MODEL,
            "x": INPUTS,
            "y": LABELS,
            "batch_size": optional(INTEGER),
            "sample_weight": optional(WEIGHTS),
            "pooled": BOOLEAN,
        },
    ),
    "ClassStatistics": (
        keras_halo.ClassStatistics,
        {"num_classes": K, "dim": D},
        {"num_classes": INTEGER, "dim": INTEGER, "pooled": BOOLEAN},
    ),
    "ClassStatistics.update": (
        lambda embeddings, labels: keras_halo.ClassStatistics(K, D).update(
            embeddings, labels
        ),
        {"embeddings": X, "labels": Y},
        {"embeddings": MATRIX, "labels": LABELS},
    ),
    "ClassStatistics.merge": (
        lambda other: keras_halo.ClassStatistics(K, D).merge(other),
        {"other": keras_halo.ClassStatistics(K, D)},
        {
            "other": {
                **ANYTHING,
                "none": None,
                "others": keras_halo.ClassStatistics(K + 1, D),
            }
        },
    ),
    "ClassStatistics.from_state": (
        keras_halo.ClassStatistics.from_state,
        {"state": keras_halo.ClassStatistics(K, D).state()},
        {"state": {**ANYTHING, "none": None, "dictionary": {"counts": [1]}}},
    ),
    "convert_head": (
        workflows.convert_head,
        {"model": ..., "x": X, "y": Y},
        {
            "verbose": VERBOSE,
            "model": MODEL,
            "x": INPUTS,
            "y": LABELS,
            "batch_size": optional(INTEGER),
            "sample_weight": optional(WEIGHTS),
            "abstain_rate": optional(SHARE),
            "units": optional(INTEGER),
        },
    ),
    "add_abstention": (
        workflows.add_abstention,
        {"model": ..., "x": X, "y": Y, "epochs": 0, "verbose": 0},
        {
            "verbose": VERBOSE,
            "model": MODEL,
            "x": INPUTS,
            "y": LABELS,
            "blocks": optional(MODEL),
            "epochs": without(INTEGER, "too small"),
            "batch_size": optional(INTEGER),
            "sample_weight": optional(WEIGHTS),
            "max_features": INTEGER,
        },
    ),
    "SKLearnClassifier": (
        classified,
        {"model": ...},
        {
            "model": {
                **MODEL,
                "uncompiled": keras.Sequential([keras_halo.HALODense(K)]),
                "makes nothing": lambda **given: None,
                "takes other arguments": lambda inputs: None,
                "makes an uncompiled one": lambda **given: keras.Sequential(
                    [keras_halo.HALODense(K)]
                ),
            },
            "model_kwargs": ANYTHING,
            "fit_kwargs": {**ANYTHING, "list": ["epochs"]},
        },
    ),
    "guard": (
        workflows.guard,
        {"model": ..., "rule": ...},
        {"model": MODEL, "rule": {**ANYTHING, "none": None}},
    ),
    "model_card": (
        workflows.model_card,
        {"source": ...},
        {
            "source": without(MODEL, "text"),
            "report": {**ANYTHING, "dictionary": {"known": 1}},
            "name": NAME,
            "intended_use": NAME,
            "data": {**ANYTHING, "numbers": {"training": 7000}},
            "limits": NAME,
        },
    ),
    "replay": (
        replayed,
        {"model": ..., "rule": ..., "x": X},
        {
            "log": PATH,
            "guarded": MODEL,
            "x": without(INPUTS, "masked", "strings", "objects"),
            "references": optional(VECTOR),
            "batch_size": optional(INTEGER),
            "max_differences": INTEGER,
        },
    ),
    "decode_predictions": (
        workflows.decode_predictions,
        {"scores": ...},
        {"scores": without(PACKED, "empty")},
    ),
    "pair_log_odds": (
        workflows.pair_log_odds,
        {"scores": ...},
        {"scores": without(PACKED, "empty")},
    ),
    "ood_score": (
        keras_halo.ood_score,
        {"scores": ...},
        {
            "scores": without(PACKED, "empty"),
            "method": METHOD,
        },
    ),
    "BlockFeatures": (
        layers.BlockFeatures,
        {},
        {
            "spatial_moments": BOOLEAN,
            "data_format": optional(METHOD),
        },
    ),
    "ClassGaussians": (
        layers.ClassGaussians,
        {"units": K},
        {"units": INTEGER},
    ),
    "ClassGaussians.adapt": (
        lambda **arguments: layers.ClassGaussians(K).adapt(**arguments),
        {"embeddings": X, "labels": Y},
        {
            "embeddings": {
                "masked": np.ma.masked_less(X, 0.0),
                "masked rows": list(np.ma.masked_less(X, 0.0)),
            },
            "labels": LABELS,
        },
    ),
    "Decision": (
        layers.Decision,
        {},
        {
            "threshold": optional(NUMBERS),
            "method": METHOD,
        },
    ),
    "Guard": (
        layers.Guard,
        {"certificate": ...},
        {"certificate": {**ANYTHING, "none": None, "empty": {}}},
    ),
    "LabelSet": (
        layers.LabelSet,
        {"threshold": 1.0},
        {"threshold": NUMBERS, "method": optional(METHOD)},
    ),
    "OODScore": (layers.OODScore, {}, {"method": METHOD}),
    # Its arguments are those of Keras.
    "ScoreLayer": (layers.ScoreLayer, {}, {}),
    "FeatureNormalization": (layers.FeatureNormalization, {}, {}),
    "FeatureNormalization.__call__": (
        lambda inputs: layers.FeatureNormalization()(inputs),
        {"inputs": X},
        {"inputs": {"no axis": np.zeros((), "float32")}},
    ),
    **{
        name: (
            getattr(metrics, name),
            {},
            {"ignore_class": IGNORED},
        )
        for name in ("AbstentionRate", "BestClassAccuracy", "SelectiveAccuracy")
    },
    "BestClassTopKAccuracy": (
        metrics.BestClassTopKAccuracy,
        {},
        {
            "k": INTEGER,
            "ignore_class": IGNORED,
        },
    ),
    "RetrievalRecall": (
        metrics.RetrievalRecall,
        {},
        {"k": INTEGER, "direction": METHOD},
    ),
    "ExpectedCalibrationError": (
        metrics.ExpectedCalibrationError,
        {},
        {
            "num_bins": INTEGER,
            "renormalize": BOOLEAN,
            "ignore_class": IGNORED,
        },
    ),
    "PackedMean": (
        metrics.PackedMean,
        {},
        {"ignore_class": IGNORED},
    ),
    "ProbabilityMetric": (
        metrics.ProbabilityMetric,
        {"metric": keras.metrics.AUC()},
        {
            "metric": MODEL,
            "renormalize": BOOLEAN,
            "class_id": optional(INTEGER),
            "one_hot_labels": optional(BOOLEAN),
            "ignore_class": IGNORED,
        },
    ),
    **{
        f"{make.__name__}.update_state": (metric_of(make), METRIC, cases)
        for make, cases in (
            (metrics.AbstentionRate, RATE_CASES),
            (metrics.SelectiveAccuracy, METRIC_CASES),
            (metrics.ExpectedCalibrationError, METRIC_CASES),
        )
    },
    "ProbabilityMetric.update_state": (
        metric_of(
            lambda: metrics.ProbabilityMetric(
                keras.metrics.CategoricalAccuracy()
            )
        ),
        METRIC,
        METRIC_CASES,
    ),
    **{
        name: (
            getattr(metrics, name),
            {"known": SCORES, "unknown": SCORES + 1.0},
            TWO_VECTORS,
        )
        for name in ("auroc", "aupr", "fpr_at_recall")
    },
    "fpr_at_recall, its arguments": (
        metrics.fpr_at_recall,
        {"known": SCORES, "unknown": SCORES},
        {"recall": SHARE, "positive": METHOD},
    ),
    **{
        name: (
            getattr(metrics, name),
            {"errors": ERRORS, "uncertainty": SCORES},
            ERROR_CASES,
        )
        for name in ("aurc", "augrc", "risk_coverage_curve")
    },
    "risk_at_coverage": (
        metrics.risk_at_coverage,
        {"errors": ERRORS, "uncertainty": SCORES},
        {**ERROR_CASES, "coverage": SHARE, "unknown": optional(VECTOR)},
    ),
    "coverage_at_risk": (
        metrics.coverage_at_risk,
        {"errors": ERRORS, "uncertainty": SCORES},
        {**ERROR_CASES, "risk": SHARE, "unknown": optional(VECTOR)},
    ),
    **{
        name: (getattr(metrics, name), RATED, CALIBRATION_CASES)
        for name in (
            "brier_score",
            "classwise_calibration_error",
            "expected_calibration_error",
            "negative_log_likelihood",
            "reliability_bins",
            "smooth_calibration_error",
        )
    },
    "renormalize": (
        metrics.renormalize,
        {"probabilities": PROBABILITIES},
        {"probabilities": MATRIX},
    ),
    "reliability_bins, its bins": (
        metrics.reliability_bins,
        RATED,
        {"num_bins": INTEGER},
    ),
    "abstention_over_training": (
        plots.abstention_over_training,
        {"history": {"known_abstention_rate": [0.5]}},
        {
            "history": {
                **PATH,
                **{
                    f"rates: {name}": {"known_abstention_rate": bad}
                    for name, bad in VECTOR.items()
                },
            },
            "frequency": INTEGER,
            "ax": {"text": "typo", "list": [1]},
        },
    ),
    "embedding_map": (
        plots.embedding_map,
        {"embeddings": X, "labels": Y, "centroids": X[:K]},
        {
            "embeddings": MATRIX,
            "labels": optional(LABELS),
            "centroids": optional(MATRIX),
            "unknown": optional(MATRIX),
            "class_names": {
                "number": 3,
                "text": "abc",
                "too few": ["a"],
                "no axis": np.array("a"),
                "object": Opaque(),
                "objects": [Opaque()] * K,
                "nones": [None] * K,
                "dictionary": dict.fromkeys("abc"),
                "masked": np.ma.array(["a", "b", "c"], mask=[0, 1, 0]),
            },
            "shell_mass": optional(SHARE),
            "max_points": optional(INTEGER),
        },
    ),
    "reliability_diagram": (
        plots.reliability_diagram,
        RATED,
        {**CALIBRATION_CASES, "num_bins": INTEGER},
    ),
    "risk_coverage": (
        plots.risk_coverage,
        {"errors": ERRORS, "uncertainty": SCORES},
        {
            **ERROR_CASES,
            "label": {**NAME, "none": None},
            "ax": {"text": "typo", "list": [1]},
        },
    ),
    "score_histograms": (
        plots.score_histograms,
        {"known": SCORES, "unknown": SCORES},
        {
            **TWO_VECTORS,
            "known": {
                **VECTOR,
                "largest": np.array([-1.7e308, 1.7e308]),
            },
            "threshold": optional(NUMBERS),
            "num_bins": INTEGER,
        },
    ),
    "shell_radius": (
        plots.shell_radius,
        {"embedding_dim": 8},
        {"embedding_dim": INTEGER, "mass": SHARE},
    ),
    "RejectionRule": (
        rejection.RejectionRule,
        {"method": "abstain"},
        {"method": optional(METHOD)},
    ),
    "CoverageRule": (
        rejection.CoverageRule,
        {},
        {
            "coverage": SHARE,
            "delta": {**optional(SHARE), "nothing": 1e-17},
            "method": optional(METHOD),
        },
    ),
    "FalsePositiveRateRule": (
        rejection.FalsePositiveRateRule,
        {},
        {
            "rate": {**SHARE, "nothing": 1e-17},
            "delta": {**optional(SHARE), "nothing": 1e-17},
            "method": optional(METHOD),
        },
    ),
    "ConformalRule": (
        rejection.ConformalRule,
        {},
        {
            "alpha": {**SHARE, "nothing": 1e-17},
            "fdr": BOOLEAN,
            "method": optional(METHOD),
        },
    ),
    "SelectiveRiskRule": (
        rejection.SelectiveRiskRule,
        {"risk": 0.1},
        {
            "risk": {**SHARE, "nothing": 1e-17},
            "delta": {**SHARE, "nothing": 1e-17},
            "method": optional(METHOD),
        },
    ),
    "JointRule": (
        rejection.JointRule,
        {"risk": 0.1, "coverage": 0.5},
        {
            "risk": {**SHARE, "nothing": 1e-17},
            "coverage": SHARE,
            "false_positive_rate": {**optional(SHARE), "nothing": 1e-17},
            "delta": {**SHARE, "nothing": 1e-17},
            "method": optional(METHOD),
        },
    ),
    "GroupwiseRule": (
        rejection.GroupwiseRule,
        {"rule": ...},
        {
            "rule": {**ANYTHING, "none": None, "rule": rejection.CoverageRule},
            "by": {**ANYTHING, "none": None, "list": ["class"]},
        },
    ),
    "GroupwiseRule, used": (
        fitted_by_groups,
        {"scores": SCORES, "judged": SCORES, "groups": Y},
        {
            **PLAIN_CASES,
            "groups": {
                **without(VECTOR, "names"),
                "fractions": np.full(N, 0.5),
                "booleans": Y == 1,
            },
        },
    ),
    "LabelSetRule": (
        rejection.LabelSetRule,
        {},
        {
            "coverage": SHARE,
            "class_conditional": BOOLEAN,
            "delta": {**optional(SHARE), "nothing": 1e-17},
            "method": METHOD,
        },
    ),
    "LabelSetRule, used": (
        kept(lambda method: rejection.LabelSetRule(0.5, method=method)),
        {"scores": ..., "labels": Y},
        {"scores": PACKED, "labels": LABELS},
    ),
    "JointRule, used": (
        fitted_jointly,
        {**PLAIN_RULE, "outliers": SCORES + 1.0},
        {
            **PLAIN_CASES,
            "errors": {**VECTOR, "halves": SCORES},
            "outliers": PLAIN_CASES["scores"],
        },
    ),
    **{
        f"{make.__name__}, used": (
            fitted(lambda make=make: make(method=None)),
            PLAIN_RULE,
            PLAIN_CASES,
        )
        for make in (
            rejection.CoverageRule,
            rejection.FalsePositiveRateRule,
            rejection.ConformalRule,
        )
    },
    "SelectiveRiskRule, used": (
        fitted(lambda: rejection.SelectiveRiskRule(0.5, method=None)),
        PLAIN_RULE,
        {**PLAIN_CASES, "errors": {**VECTOR, "halves": SCORES}},
    ),
    "CoverageRule, on packed scores": (
        kept(rejection.CoverageRule),
        {"scores": ..., "labels": Y},
        {"scores": PACKED, "labels": optional(LABELS)},
    ),
    "save": (
        fitted(lambda: rejection.CoverageRule(0.9, method=None)),
        PLAIN_RULE,
        {"path": PATH},
    ),
    "StreamMonitor": (
        rejection.StreamMonitor,
        {"rule": ...},
        {
            "rule": {**ANYTHING, "none": None},
            "false_alarm": {**SHARE, "nothing": 1e-17},
            "delta": {**SHARE, "nothing": 1e-17},
            "seed": without(INTEGER, "too small"),
        },
    ),
    "StreamMonitor.restore": (
        restored,
        {"rule": ..., "state": STATE},
        {
            "state": {
                **ANYTHING,
                "none": None,
                "array": SCORES,
                "entries": {"counts": [1]},
                "more entries": {**STATE, "more": 1},
                **{
                    f"{entry}: {name}": {**STATE, entry: bad}
                    for entry in STATE
                    for name, bad in without(
                        NUMBERS,
                        # Before the first input, and before an alarm.
                        *(["none"] if STATE[entry] is None else []),
                    ).items()
                },
                "too few counts": {**STATE, "counts": [1]},
            },
        },
    ),
    "merged_status": (
        rejection.merged_status,
        None,
        {
            "monitors": {
                **ANYTHING,
                "none": None,
                "empty": [],
                "no axis": np.zeros(()),
                "numbers": SCORES,
            }
        },
    ),
    "stream_evidence": (
        plots.stream_evidence,
        None,
        {"statuses": {**ANYTHING, "none": None, "empty": []}},
    ),
    "DecisionLog": (
        logged,
        {"rule": ...},
        {
            "path": PATH,
            "rule": {**ANYTHING, "none": None, "dictionary": {"rule": 1}},
            "max_bytes": INTEGER,
            "sync": BOOLEAN,
        },
    ),
    "DecisionLog.append": (
        logged,
        {
            "rule": ...,
            "answers": {"label": np.full(N, -1), "score": np.full(N, 1e9)},
            "references": range(N),
        },
        {
            "answers": {
                **ANYTHING,
                **{
                    f"labels: {name}": {"label": bad, "score": SCORES}
                    for name, bad in without(
                        {**LABELS, "negative": -Y - 2},
                        "huge integers",
                    ).items()
                },
                **{
                    f"scores: {name}": {"label": Y, "score": bad}
                    for name, bad in VECTOR.items()
                },
            },
            # Names are as good as numbers.
            "references": {
                **without(VECTOR, "none", "names"),
                "too few": range(N - 1),
            },
        },
    ),
    "read_decisions": (
        rejection.read_decisions,
        None,
        {"path": {**PATH, "no paths": [], "numbers": [3]}},
    ),
    "load_monitor": (rejection.load_monitor, None, {"path": PATH}),
    "load_rule": (rejection.load_rule, None, {"path": PATH}),
    "read_certificate": (workflows.read_certificate, None, {"source": PATH}),
    "check_packed": (
        keras_halo.ops.packing.check_packed,
        {"scores": ...},
        {"scores": PACKED},
    ),
    "upgrade_scores": (
        keras_halo.ops.packing.upgrade_scores,
        None,
        {"scores": PACKED},
    ),
}

# What is made by the package and not by its users.
MADE = {
    "CalibrationReport",
    "DecisionRecord",
    "Decisions",
    "KnownResult",
    "LabelSets",
    "ModelCard",
    "MonitorStatus",
    "OODReport",
    "Predictions",
    "ReliabilityBins",
    "ReplayDifference",
    "ReplayReport",
    "RiskCoverageCurve",
    "UnknownResult",
}

MODULES = (
    keras_halo,
    keras_halo.callbacks,
    layers,
    losses,
    metrics,
    plots,
    rejection,
    workflows,
)


def test_every_public_function_and_class_is_misused():
    names = {
        name
        for module in MODULES
        for name in module.__all__
        if callable(getattr(module, name))
        and not inspect.ismodule(getattr(module, name))
    }
    assert names - MADE <= set(CALLS)


def test_every_function_that_tells_how_far_it_is_has_its_verbose_misused():
    functions = {
        name: cases
        for name, (function, _, cases) in CALLS.items()
        if function in vars(workflows).values()
        and "verbose" in inspect.signature(function).parameters
    }
    assert len(functions) >= 6
    for name, cases in functions.items():
        assert "verbose" in cases, name


@pytest.fixture(params=CALLS)
def call(request, model, packed):
    """A function, its good arguments, and the bad ones."""
    if request.param in ("score_histograms", "embedding_map") or (
        CALLS[request.param][0].__module__.startswith("keras_halo.plots")
    ):
        pytest.importorskip("matplotlib", reason="needs matplotlib")
    function, good, cases = CALLS[request.param]
    rule = rejection.CoverageRule().fit(packed)
    made = {
        "model": model,
        "y_pred": packed,
        "scores": packed,
        "rule": rule,
        "certificate": rule.certificate(),
        "source": rule,
    }
    if good is not None:
        good = {k: made[k] if v is ... else v for k, v in good.items()}
    return function, good, cases


def test_misuse_is_refused_by_name(call, model):
    function, good, cases = call
    before = [np.array(w) for w in model.get_weights()]
    wrong = []
    for argument, values in cases.items():
        for name, bad in values.items():
            try:
                function(**{**(good or {}), argument: bad})
            except ValueError as error:
                if "Received" not in str(error):
                    wrong.append((argument, name, f"says {str(error)[:200]}"))
            except Exception as error:
                wrong.append((argument, name, f"raises {error!r:.200}"))
            else:
                wrong.append((argument, name, "is taken"))
    assert not wrong, "\n".join(map(str, wrong))
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_is_misused_can_be_used(call):
    function, good, _ = call
    if good is None:
        pytest.skip("needs what another test makes")
    result = function(**good)
    if isinstance(result, workflows.CalibrationReport):
        result.undo()
    if hasattr(result, "figure"):
        import matplotlib.pyplot as plt

        plt.close("all")


# What is taken ---------------------------------------------------------------

# One of NumPy's kinds of number in the place of Python's.
TAKEN = {
    "units": (keras_halo.HALODense, {"units": np.int64(3)}),
    "embedding_dim": (
        keras_halo.HALODense,
        {"units": np.uint8(3), "embedding_dim": np.int32(8)},
    ),
    "abstain_rate": (
        keras_halo.HALODense,
        {"units": 3, "abstain_rate": np.float64(0.25)},
    ),
    "booleans": (
        keras_halo.HALODense,
        {"units": 3, "normalize": np.False_, "learn_gamma": np.bool_(1)},
    ),
    "loss": (
        keras_halo.HALOLoss,
        {
            "label_smoothing": np.float32(0.25),
            "distill": np.True_,
            "radial_weight": np.int64(2),
            "ignore_class": np.int8(-1),
            "block_size": np.int64(16),
        },
    ),
    "towers": (
        keras_halo.HALOSimilarity,
        {"label_smoothing": np.float32(0.5), "bidirectional": np.True_},
    ),
    "gaussians": (layers.ClassGaussians, {"units": np.int16(4)}),
    "decision": (layers.Decision, {"threshold": np.float32(0.5)}),
    "metric": (
        metrics.AbstentionRate,
        {"ignore_class": np.uint8(255)},
    ),
    "bins": (metrics.ExpectedCalibrationError, {"num_bins": np.int64(5)}),
    "class": (
        lambda **arguments: metrics.ProbabilityMetric(
            keras.metrics.AUC(name="auc"), **arguments
        ),
        {"class_id": np.int64(1), "renormalize": np.False_},
    ),
    "coverage": (rejection.CoverageRule, {"coverage": np.float32(0.5)}),
    "conformal": (rejection.ConformalRule, {"fdr": np.True_}),
}


# Rules have no name.
NAMED = set(TAKEN) - {"coverage", "conformal"}


@pytest.mark.parametrize("case", TAKEN)
def test_numbers_of_numpy_are_taken_as_those_of_python(case):
    make, arguments = TAKEN[case]
    made = make(**{"name": "same", **arguments} if case in NAMED else arguments)
    plain = {
        name: value.item() if hasattr(value, "item") else value
        for name, value in arguments.items()
    }
    expected = make(**{"name": "same", **plain} if case in NAMED else plain)
    # As JSON, because a file has to hold it.
    config = json.dumps(made.get_config(), sort_keys=True, default=str)
    assert config == json.dumps(
        expected.get_config(), sort_keys=True, default=str
    )
    for name, value in made.get_config().items():
        assert not isinstance(value, np.generic), name


def test_counts_of_numpy_are_taken_by_functions(model):
    eight = np.int64(8)
    report = workflows.evaluate_ood(
        model,
        (X, Y),
        {"far": 9 * X},
        batch_size=eight,
        num_bins=eight,
        ignore_class=np.int64(-1),
        verbose=0,
    )
    json.dumps(report.to_dict())
    assert type(report.num_bins) is int
    monitor = keras_halo.OODMonitor(
        X, {"far": X}, batch_size=eight, frequency=np.int64(2)
    )
    assert type(monitor.frequency) is int
    bins = metrics.reliability_bins(Y, PROBABILITIES, num_bins=eight)
    assert len(bins.count) == 8
    assert plots.shell_radius(eight) == plots.shell_radius(8)


# Weights that come with a data set -------------------------------------------


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize(
    "tool",
    [
        workflows.calibrate,
        workflows.convert_head,
        workflows.fit_class_gaussians,
        lambda model, data: workflows.evaluate_ood(
            model, data, {"far": X}, verbose=0
        ),
    ],
    ids=["calibrate", "convert_head", "fit_class_gaussians", "evaluate_ood"],
)
def test_weights_of_data_sets_are_checked_too(tool, bad, model):
    weights = np.ones(N)
    weights[3] = bad
    batches = [
        (X[i : i + 20], Y[i : i + 20], weights[i : i + 20]) for i in (0, 20)
    ]
    with pytest.raises(
        ValueError, match="finite.*not negative.*Received: 1 of"
    ):
        tool(model, (batch for batch in batches))


# Towers, and what belongs to other heads --------------------------------------


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(
    "reader",
    [
        layers.OODScore,
        layers.Decision,
        layers.HALOSoftmax,
    ],
)
def test_a_reader_of_two_towers_names_the_way_to_a_head(reader, bidirectional):
    towers = [keras.Input((D,)), keras.Input((D,))]
    layer = keras_halo.HALOSimilarity(bidirectional=bidirectional)
    scores = layer(towers)
    with pytest.raises(ValueError, match="HALOSimilarity.*to_head"):
        reader()(scores)
    for tool in (
        lambda model: workflows.calibrate(model, [X, X], Y),
        lambda model: workflows.fit_class_gaussians(model, [X, X], Y),
        lambda model: workflows.convert_head(model, [X, X], Y),
    ):
        with pytest.raises(ValueError, match="to_head"):
            tool(keras.Model(towers, scores))


@pytest.mark.parametrize("labels", ["integers", "column", "one-hot"])
@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_swapped_arguments_are_named(labels, kind, packed):
    y = {"integers": Y, "column": Y[:, None], "one-hot": np.eye(K)[Y]}[labels]
    for dtype in ("float32", y.dtype.name):
        given = [packed, y.astype(dtype)]
        if kind == "tensor":
            given = [keras.ops.convert_to_tensor(x) for x in given]
        for tool in (
            keras_halo.HALOLoss(),
            metrics.SelectiveAccuracy().update_state,
        ):
            with pytest.raises(ValueError, match="Labels come first"):
                tool(*given)


def test_what_is_after_the_head_or_in_its_place_is_named(packed):
    shifted = packed + 1.0
    shifted[:, -1] = 0.0
    for scores, message in (
        (keras.ops.convert_to_numpy(keras.ops.softmax(packed)), "a softmax"),
        (np.asarray(X[:, :4] @ np.ones((4, 12)), "float32"), "no such head"),
        (shifted, "a layer after it"),
    ):
        with pytest.raises(ValueError, match=message):
            workflows.decode_predictions(scores)
