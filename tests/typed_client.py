"""Every public name as users write it, for `scripts/check_release.py`."""

# pyright: strict
# Keras has no types of its own: what pyright guesses of its classes is partly
# unknown, and so is what it inherits from them.
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

import keras_halo
from keras_halo import (
    OOD_METHODS,
    CalibrationReport,
    HALOContrastiveLoss,
    HALODense,
    HALOLoss,
    HALOSimilarity,
    HALOSoftmax,
    OODMonitor,
    OODReport,
    Predictions,
    callbacks,
    layers,
    losses,
    metrics,
    ops,
    plots,
    rejection,
    workflows,
)

version: str = keras_halo.__version__
x = np.zeros((5, 8), "float32")
y = np.zeros(5, "int64")
scores = np.zeros((5, 16), "float32")

# Layers and losses.
head = HALODense(10, learn_gamma=False, dtype="mixed_float16")
published = HALODense.reference(10, label_smoothing=0.1)
published_again: HALODense = HALODense.reference(10)
model = keras.Sequential([keras.layers.Dense(64), head])
model.compile("adam", loss=HALOLoss(label_smoothing=0.1, ignore_class=255))
deployed = keras.Sequential([model, HALOSoftmax(abstain=False)])
similarity = HALOSimilarity(bidirectional=True, name="similarity")
gallery: HALODense = similarity.to_head(x, name="gallery")
contrastive = HALOContrastiveLoss(0.1, distill=False, radial_weight=0.5)
head_config: dict[str, Any] = head.get_config()
loss_config: dict[str, Any] = contrastive.get_config()
loss = HALOLoss()(y, scores, sample_weight=np.ones(5))
each = losses.halo_loss(y, scores, block_size=2048)
blocks = layers.BlockFeatures(spatial_moments=False)
gaussians = layers.ClassGaussians(10)
normalization = layers.FeatureNormalization(name="normalization")
decision_by_score = layers.Decision(1.5, method="nearest")
score_layer = layers.OODScore("gap")


class Evidence(layers.ScoreLayer):
    scores_index = 1

    def call(self, weights: Any, scores: Any) -> Any:
        return weights * scores[..., 0]


evidence = Evidence(name="evidence", dtype="float32")
in_precision: str = evidence.head_dtype
weighed = evidence(np.ones(5), scores=scores)
same: list[type[object]] = [
    layers.HALODense,
    layers.HALOSimilarity,
    layers.HALOSoftmax,
    losses.HALOContrastiveLoss,
    losses.HALOLoss,
    callbacks.OODMonitor,
    workflows.CalibrationReport,
    workflows.OODReport,
    workflows.Predictions,
]

# Predictions and scores.
predictions: Predictions = keras_halo.decode_predictions(scores)
of_fitted = keras_halo.decode_predictions({"scores": scores, "ood": scores[0]})
labels: NDArray[Any] = predictions.labels
abstained: NDArray[Any] = predictions.abstained
embedding_dim: int = predictions.embedding_dim
probabilities = predictions.probabilities
score: NDArray[Any] = keras_halo.ood_score(scores, method="nearest")
every: list[NDArray[Any]] = [
    keras_halo.ood_score(scores, method) for method in OOD_METHODS
]
log_odds: NDArray[Any] = keras_halo.pair_log_odds(scores)
pairs = keras_halo.pair_labels([3, 5, 3], dtype="float64")

# Rejection.
rule = rejection.CoverageRule(0.95, delta=0.05).fit(scores)
same_class: rejection.CoverageRule = rule
decisions: rejection.Decisions = rule.predict(scores)
accepted: NDArray[Any] = decisions.accepted
rejected: NDArray[Any] = decisions.rejected
decided: NDArray[Any] | None = decisions.labels
coverage: float = decisions.coverage
number: int = len(decisions)
decision: layers.Decision = rule.to_layer(name="label")
text: str = rule.summary() + rule.guarantee
threshold: float = rule.threshold
guarded: keras.Model = keras_halo.guard(model, rule)
guarantee: object = keras_halo.read_certificate("guarded.keras")["guarantee"]
guard_layer = layers.Guard(rule.certificate())
bound: float = rule.coverage_bound(delta=0.05)
rule.save("rule.json")
loaded: rejection.RejectionRule = rejection.load_rule("rule.json")
conformal = rejection.ConformalRule(0.05, fdr=True).fit(scores)
p_values: NDArray[Any] = conformal.p_values(scores)
monitor = rejection.StreamMonitor(rule, false_alarm=0.01).fit(scores)
status: rejection.MonitorStatus = monitor.update(scores, labels=y)
alarm_at: int | None = status.alarm_at
risk: tuple[float, float] = status.risk
monitor.save("monitor.json")
monitor_again: rejection.StreamMonitor = rejection.load_monitor("monitor.json")
monitor_again.restore(monitor.state)
together: rejection.MonitorStatus = rejection.merged_status([monitor])
with rejection.DecisionLog("log.jsonl", rule, sync=True) as log:
    logged: range = log.append(decisions, references=["a.png"])
records: list[rejection.DecisionRecord] = list(
    rejection.read_decisions("log.jsonl", skip_damaged=True)
)
all_records = list(rejection.read_decisions(["a.jsonl", "b.jsonl"]))
logged_score: float = records[0].score
replayed: workflows.ReplayReport = keras_halo.replay("log.jsonl", guarded, x)
replayed_again = workflows.replay("log.jsonl", guarded, x, references=["a.png"])
difference: workflows.ReplayDifference = replayed.differences[0]
all_the_same: bool = replayed.same
selective = rejection.SelectiveRiskRule(0.05).fit(scores, labels=y)
outliers = rejection.FalsePositiveRateRule(0.05, method=None)
outliers.fit([0.5, 1.0], known=[0.1])
by_class = rejection.GroupwiseRule(rejection.CoverageRule(0.9)).fit(scores, y)
thresholds: dict[str | int, float] = by_class.thresholds
of_first: rejection.RejectionRule = by_class.rules[0]
by_group = rejection.GroupwiseRule(rule, by="group").fit(scores, groups=y)
by_group_decisions: rejection.Decisions = by_group.predict(scores, groups=y)
set_rule = rejection.LabelSetRule(0.9, class_conditional=True).fit(scores, y)
sets: rejection.LabelSets = set_rule.predict(scores)
members: NDArray[Any] = sets.members
held: NDArray[Any] = sets.contain(y)
sizes: NDArray[Any] = sets.sizes
set_layer: layers.LabelSet = set_rule.to_layer(name="set")
joint = rejection.JointRule(risk=0.02, coverage=0.8, false_positive_rate=0.1)
joint.fit(scores, labels=y, outliers=scores)
false_positives: float = outliers.false_positive_bound()


class MedianRule(rejection.RejectionRule):
    def __init__(self, method: str | None = "abstain") -> None:
        super().__init__(method)

    def find_threshold(
        self, scores: NDArray[Any], wrong: NDArray[Any] | None
    ) -> tuple[float, NDArray[Any] | None]:
        return float(np.median(scores)), None

    def state_guarantee(self) -> str:
        return "Keeps half of the calibration data."


# Workflows.
calibration: CalibrationReport = keras_halo.calibrate(model, x, y, verbose=0)
nll: float = calibration.nll
calibration.undo()
report: OODReport = keras_halo.evaluate_ood(model, (x, y), {"noise": x})
known: workflows.KnownResult = report.known
noise: workflows.UnknownResult = report.unknown[0]
auroc_of_noise: float = noise.auroc
table: str = report.to_markdown()
numbers: dict[str, Any] = report.to_dict()
mean: workflows.UnknownResult = report.mean
one: workflows.UnknownResult = report["noise"]
card: workflows.ModelCard = keras_halo.model_card(guarded, report, name="a")
card_again = workflows.model_card("guarded.keras", data={"training": "mine"})
card_text: str = card.to_markdown() + card.to_json()
card.save("card.md")
monitor = OODMonitor((x, y), {"noise": x}, method="gen", frequency=2)
measured: Mapping[str, float] = monitor.measure()

# Metrics.
model.compile(
    "adam",
    loss=HALOLoss(),
    metrics=[
        metrics.AbstentionRate(),
        metrics.BestClassAccuracy(),
        metrics.BestClassTopKAccuracy(k=3),
        metrics.RetrievalRecall(k=5),
        metrics.SelectiveAccuracy(ignore_class=255),
        metrics.ExpectedCalibrationError(num_bins=10),
        metrics.ProbabilityMetric(keras.metrics.AUC(), class_id=1),
    ],
)


class FirstLogit(metrics.PackedMean):
    reads_labels = False

    def values_and_weights(self, samples: Any, weights: Any) -> tuple[Any, Any]:
        return samples.logits[..., 0], weights


first_logit = FirstLogit(ignore_class=255, name="first_logit")
first_logit.update_state(y, scores, sample_weight=np.ones(5))
floats: list[float] = [
    metrics.auroc([0.1], [0.2]),
    metrics.aupr([0.1], [0.2], positive="known"),
    metrics.fpr_at_recall([0.1], [0.2], recall=0.9),
    metrics.aurc([0, 1], [0.1, 0.2]),
    metrics.augrc([False, True], [0.1, 0.2], unknown=[0.3]),
    metrics.risk_at_coverage([0, 1], [0.1, 0.2], coverage=0.5),
    metrics.coverage_at_risk([0, 1], [0.1, 0.2], risk=0.1),
    metrics.brier_score(y, probabilities),
    metrics.negative_log_likelihood(y, probabilities),
    metrics.expected_calibration_error(y, probabilities, num_bins=5),
    metrics.classwise_calibration_error(y, probabilities, num_bins=5),
    metrics.smooth_calibration_error(y, probabilities),
]
bins: metrics.ReliabilityBins = metrics.reliability_bins(y, probabilities)
curve: metrics.RiskCoverageCurve = metrics.risk_coverage_curve([0], [0.1])
conditional: NDArray[Any] = metrics.renormalize(probabilities)

# Plots.
ax = plots.abstention_over_training({"abstention_rate": [0.1]}, frequency=1)
plots.embedding_map(x, labels=y, class_names=["a"], shell_mass=None, ax=ax)
plots.reliability_diagram(y, probabilities, ax=ax)
plots.risk_coverage([0, 1], [0.1, 0.2], label="model")
plots.stream_evidence([status], false_alarm=0.01)
plots.score_histograms([0.1], {"noise": [0.2]}, threshold=0.15)
radius: float = plots.shell_radius(64, mass=0.9)

# Mathematics.
gamma: float = ops.geometry.initial_temperature(64)
shell: float = ops.geometry.shell(64)
logits = ops.geometry.class_logits(x, x, gamma)
soft = ops.targets.smoothed_targets(x, 0.1)
parts: ops.packing.PackedScores = ops.packing.unpack(scores)
packed = ops.packing.pack(logits, -1.0, x[:, :1], gamma, 8)
upgraded: NDArray[Any] = ops.packing.upgrade_scores(scores)
ops.packing.check_packed(scores, argument="scores")

# Models that come back, and what is left of the workflows.
abstaining: keras.Model = keras_halo.add_abstention(model, x, y, verbose=0)
converted: keras.Model = keras_halo.convert_head(model, x, y, verbose=0)
fitted: keras.Model = keras_halo.fit_class_gaussians(model, x, y, verbose=0)
statistics: keras_halo.ClassStatistics = keras_halo.collect_statistics(
    model, x, y, verbose=0
)
state: dict[str, NDArray[Any]] = statistics.state()
statistics.merge(keras_halo.ClassStatistics.from_state(state))
new_statistics = keras_halo.ClassStatistics(10, 64, pooled=True)
new_statistics.update(x, y)
fitted_on_shards = keras_halo.fit_class_gaussians(model, statistics)
collected_again = workflows.collect_statistics(model, x, y)
abstaining_again = workflows.add_abstention(model, x, y)
converted_again = workflows.convert_head(model, x, y)
guarded_twice = workflows.guard(model, rule)
certificate = workflows.read_certificate(guarded_twice)
fitted_again = workflows.fit_class_gaussians(model, x, y)
workflows_again = (
    workflows.calibrate,
    workflows.decode_predictions,
    workflows.evaluate_ood,
    workflows.pair_log_odds,
)

# What scikit-learn and the transforms of backends see.
classifier = keras_halo.SKLearnClassifier(model, abstain_label=-1)
proba: NDArray[Any] = classifier.fit(x, y).predict_proba(x)
same_classifier = workflows.SKLearnClassifier(model)
with ops.plain_gradients():
    pass
