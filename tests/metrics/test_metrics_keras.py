"""Metrics on packed scores: streaming, weighted, masked, saved, compiled."""

import functools

import keras
import numpy as np
import pytest
from helpers import float64, jit, naive_softmax, packed, to_numpy
from keras import ops
from keras.src import backend

import keras_halo
from keras_halo import metrics
from keras_halo.metrics.names_of_0_1_0 import Coverage
from keras_halo.metrics.packed_mean import compensated_add
from keras_halo.ops.packing import packed_width

# Keras's confusion matrix asks JAX for int64.
pytestmark = pytest.mark.filterwarnings("ignore:Explicitly requested dtype")

NUM_CLASSES = 3
CENTROIDS = np.array([[2.0, 0, 0, 0], [0, 2.0, 0, 0], [-2.0, -2.0, 0, 0]])

# There are things that metrics of the lowest Keras cannot do on PyTorch.
IS_LOWEST_ON_TORCH = (
    keras.backend.backend() == "torch" and keras.__version__.startswith("3.10.")
)

OWN_METRICS = [
    metrics.ExpectedCalibrationError,
    metrics.AbstentionRate,
    Coverage,
    metrics.SelectiveAccuracy,
    metrics.BestClassAccuracy,
]


def make_batch(num_samples=200, seed=0, shape=()):
    """Packed scores around the boundaries, and labels that often fit them."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, NUM_CLASSES, (num_samples, *shape))
    spread = rng.normal(size=(*labels.shape, 4))
    scores = packed(0.5 * CENTROIDS[labels] + 0.7 * spread, CENTROIDS, 2.0)
    return labels, scores


def result_of(metric, *batches):
    for batch in batches:
        metric.update_state(*batch)
    return float(to_numpy(metric.result()))


def naive_result(metric_class, labels, scores, weights=None):
    """What a metric is, sample by sample in float64."""
    scores = np.asarray(scores, "float64").reshape(
        -1, packed_width(NUM_CLASSES)
    )
    labels = np.asarray(labels).reshape(-1)
    if weights is None:
        weights = np.ones(labels.size)
    total = count = 0.0
    gaps = np.zeros(15)
    edges = np.linspace(0, 1, 16)
    for label, row, weight in zip(labels, scores, weights, strict=True):
        logits = row[:NUM_CLASSES]
        abstained = row[NUM_CLASSES] > logits.max()
        correct = logits.argmax() == label
        confidence = naive_softmax(logits).max()
        index = [c for c in range(15) if edges[c] <= confidence][-1]
        gaps[index] += weight * (correct - confidence)
        if metric_class is metrics.SelectiveAccuracy:
            total += weight * correct * (not abstained)
            count += weight * (not abstained)
        elif metric_class is metrics.BestClassAccuracy:
            total += weight * correct
            count += weight
        else:
            rate = abstained == (metric_class is metrics.AbstentionRate)
            total += weight * rate
            count += weight
    if metric_class is metrics.ExpectedCalibrationError:
        total = np.abs(gaps).sum()
    return total / count


@pytest.fixture(params=OWN_METRICS, ids=lambda metric: metric.__name__)
def metric_class(request):
    return request.param


# The metrics of this package


def test_a_result_is_that_of_a_naive_loop(metric_class):
    for seed in range(5):
        labels, scores = make_batch(seed=seed)
        expected = naive_result(metric_class, labels, scores)
        assert 0.02 < expected < 0.98
        result = result_of(metric_class(), (labels, scores))
        assert result == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("sizes", [(50, 50, 50, 50), (100, 100), (50, 100, 50)])
def test_streaming_is_the_whole_set_in_any_batches_and_order(
    metric_class, sizes
):
    labels, scores = make_batch()
    order = np.random.default_rng(len(sizes)).permutation(len(labels))
    cuts = np.cumsum(sizes)[:-1]
    batches = zip(
        np.split(labels[order], cuts),
        np.split(scores[order], cuts),
        strict=True,
    )
    assert result_of(metric_class(), *batches) == pytest.approx(
        naive_result(metric_class, labels, scores), abs=1e-6
    )


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("num_bins", [15, 10, 1])
def test_streaming_calibration_error_is_the_function_on_the_whole_set(
    renormalize, num_bins
):
    labels, scores = make_batch(800)
    # Ties, equal classes, and certainty.
    scores[:200] = scores[0]
    scores[200:300, :NUM_CLASSES] = 1.0
    scores[300:400, :NUM_CLASSES] = [3e4, 0.0, -3e4]
    metric = metrics.ExpectedCalibrationError(num_bins, renormalize)
    streamed = result_of(
        metric,
        *zip(np.split(labels, 4), np.split(scores, 4), strict=True),
    )
    probabilities = keras_halo.decode_predictions(scores).probabilities
    if renormalize:
        probabilities = metrics.renormalize(probabilities)
    whole = metrics.expected_calibration_error(labels, probabilities, num_bins)
    assert streamed == pytest.approx(whole, abs=1e-6)
    metric.reset_state()
    once = result_of(metric, (labels, scores))
    assert once == pytest.approx(whole, abs=1e-6)


def test_confidence_on_an_edge_belongs_to_the_bin_above():
    # Two equal classes, and certainty: confidence 1/2 and 1 in two bins.
    scores = packed(np.zeros((200, 4)), CENTROIDS[:2])
    scores[100:, 0] += 1e4
    metric = metrics.ExpectedCalibrationError(num_bins=2)
    labels = np.repeat([0, 0, 0, 1], 50)
    assert result_of(metric, (labels, scores)) == pytest.approx(0.0, abs=1e-6)
    # In bins of their own the same gaps do not cancel.
    metric = metrics.ExpectedCalibrationError(num_bins=4)
    assert result_of(metric, (labels, scores)) == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("num_bins", [15, 10, 7, 3])
def test_bins_of_float32_are_those_of_float64(num_bins):
    edges = np.linspace(0, 1, num_bins + 1)[1:-1]
    near = np.concatenate(
        [
            np.nextafter(edges.astype("float32"), np.float32(side))
            for side in (0, 2)
        ]
        + [edges.astype("float32")]
    )
    metric = metrics.ExpectedCalibrationError(num_bins)
    bins = to_numpy(metric._in_bins(ops.convert_to_tensor(near)))
    expected = np.searchsorted(edges, near.astype("float64"), side="right")
    assert bins.argmax(axis=0).tolist() == expected.tolist()
    assert (bins.sum(axis=0) == 1).all()


def test_a_class_that_ties_with_abstaining_is_named():
    labels, scores = make_batch()
    scores[:, NUM_CLASSES] = scores[:, :NUM_CLASSES].max(axis=-1)
    assert result_of(metrics.AbstentionRate(), (labels, scores)) == 0.0
    assert (keras_halo.decode_predictions(scores).labels >= 0).all()


def test_results_agree_with_decoded_predictions():
    labels, scores = make_batch()
    predictions = keras_halo.decode_predictions(scores)
    answered = ~predictions.abstained
    batch = (labels, scores)
    assert result_of(Coverage(), batch) == pytest.approx(
        answered.mean(), abs=1e-6
    )
    assert result_of(metrics.AbstentionRate(), batch) == pytest.approx(
        1 - answered.mean(), abs=1e-6
    )
    assert result_of(metrics.SelectiveAccuracy(), batch) == pytest.approx(
        (predictions.labels == labels)[answered].mean(), abs=1e-6
    )


def test_every_form_of_labels_gives_the_same_result(metric_class):
    labels, scores = make_batch()
    expected = result_of(metric_class(), (labels, scores))
    one_hot = np.eye(NUM_CLASSES, dtype="float32")[labels]
    for form in (
        labels[:, None],
        labels.astype("uint8"),
        labels.astype("float32"),
        one_hot,
        one_hot.astype("int64"),
        ops.convert_to_tensor(labels),
    ):
        assert result_of(metric_class(), (form, scores)) == expected


def test_positions_are_samples(metric_class):
    labels, scores = make_batch(20, shape=(2, 5))
    expected = naive_result(metric_class, labels, scores)
    for form in (labels, labels[..., None], np.eye(NUM_CLASSES)[labels]):
        assert result_of(metric_class(), (form, scores)) == pytest.approx(
            expected, abs=1e-6
        )


def test_soft_labels_count_by_their_mass_in_the_calibration_error():
    _, scores = make_batch()
    probabilities = naive_softmax(scores[:, :NUM_CLASSES].astype("float64"))
    batch = (probabilities.astype("float32"), scores)
    result = result_of(metrics.ExpectedCalibrationError(), batch)
    assert result == pytest.approx(0.0, abs=1e-6)
    # ... while accuracy asks for their most probable class, as in Keras.
    assert result_of(metrics.SelectiveAccuracy(), batch) == 1.0


@pytest.mark.parametrize(
    "weights_of",
    [
        lambda rng: rng.random((40, 5)),
        lambda rng: rng.random((40, 5, 1)),
        lambda rng: rng.random((40, 1)),
        lambda rng: rng.random(40),
        lambda rng: rng.integers(0, 2, (40, 5)),
        lambda rng: 2.5,
    ],
    ids=["(B, T)", "(B, T, 1)", "(B, 1)", "(B,)", "integers", "scalar"],
)
def test_weights_are_broadcast_over_positions(metric_class, weights_of):
    labels, scores = make_batch(40, shape=(5,))
    weights = weights_of(np.random.default_rng(2))
    spread = np.asarray(weights, "float64")
    while spread.ndim < 2:
        spread = spread[..., None]
    spread = np.broadcast_to(spread.reshape(spread.shape[:2]), (40, 5))
    expected = naive_result(metric_class, labels, scores, spread.reshape(-1))
    result = result_of(metric_class(), (labels, scores, weights))
    assert result == pytest.approx(expected, abs=1e-6)


def test_an_integer_weight_repeats_a_sample(metric_class):
    labels, scores = make_batch(100)
    counts = np.random.default_rng(3).permutation(np.repeat(np.arange(5), 20))
    repeated = (np.repeat(labels, counts), np.repeat(scores, counts, axis=0))
    assert result_of(metric_class(), (labels, scores, counts)) == (
        pytest.approx(result_of(metric_class(), repeated), abs=1e-6)
    )


def test_masked_positions_do_not_count_whatever_they_hold(metric_class):
    labels, scores = make_batch(40, shape=(5,))
    mask = np.random.default_rng(4).random((40, 5)) < 0.6
    weights = np.random.default_rng(5).random((40, 5))
    expected = naive_result(
        metric_class, labels, scores, (mask * weights).reshape(-1)
    )
    labels[~mask] = -1
    scores[~mask] = np.nan
    y_pred = ops.convert_to_tensor(scores)
    backend.set_keras_mask(y_pred, ops.convert_to_tensor(mask))
    result = result_of(metric_class(), (labels, y_pred, weights))
    assert result == pytest.approx(expected, abs=1e-6)
    without_weights = result_of(metric_class(), (labels, y_pred))
    assert without_weights == pytest.approx(
        naive_result(metric_class, labels[mask], scores[mask]), abs=1e-6
    )


def test_ignored_labels_do_not_count(metric_class):
    labels, scores = make_batch()
    ignored = np.arange(len(labels)) % 3 == 0
    expected = naive_result(metric_class, labels[~ignored], scores[~ignored])
    labels[ignored] = 255
    for form in (labels, labels[:, None].astype("uint8")):
        result = result_of(metric_class(ignore_class=255), (form, scores))
        assert result == pytest.approx(expected, abs=1e-6)
    for label in (-(2**31), 2**31 - 1):
        labels[ignored] = label
        result = result_of(metric_class(ignore_class=label), (labels, scores))
        assert result == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("outside", [-1, NUM_CLASSES, 255])
def test_labels_out_of_range_are_never_right(outside):
    labels, scores = make_batch()
    labels[:] = outside
    batch = (ops.convert_to_tensor(labels), ops.convert_to_tensor(scores))
    assert result_of(metrics.SelectiveAccuracy(), batch) == 0.0
    assert result_of(metrics.BestClassAccuracy(), batch) == 0.0
    assert result_of(metrics.BestClassTopKAccuracy(k=9), batch) == 0.0
    confidence = naive_softmax(scores[:, :NUM_CLASSES]).max(axis=-1)
    error = result_of(metrics.ExpectedCalibrationError(), batch)
    assert error == pytest.approx(confidence.mean(), abs=1e-5)


def test_labels_are_not_needed_to_count_abstentions():
    _, scores = make_batch()
    rate = result_of(metrics.AbstentionRate(), (None, scores))
    assert result_of(Coverage(), (None, scores)) == pytest.approx(
        1 - rate, abs=1e-6
    )
    for metric in (
        metrics.SelectiveAccuracy(),
        metrics.ProbabilityMetric(keras.metrics.F1Score()),
    ):
        with pytest.raises(ValueError, match="needs labels"):
            metric.update_state(None, scores)


def test_all_abstained_and_no_samples_have_stated_results(metric_class):
    assert np.isnan(to_numpy(metric_class().result()))
    labels, _ = make_batch()
    at_the_origin = packed(np.zeros((200, 4)), CENTROIDS, bias=9.0)
    result = result_of(metric_class(), (labels, at_the_origin))
    if metric_class is metrics.SelectiveAccuracy:
        assert np.isnan(result)
    elif metric_class in (metrics.AbstentionRate, Coverage):
        assert result == float(metric_class is metrics.AbstentionRate)
    else:
        expected = naive_result(metric_class, labels, at_the_origin)
        assert result == pytest.approx(expected, abs=1e-6)
    nothing = result_of(metric_class(), (labels, at_the_origin, np.zeros(200)))
    assert np.isnan(nothing)


def top_k(labels, scores, k):
    """Whether labels are among the k best classes, ties in their order."""
    order = np.argsort(-scores[..., :NUM_CLASSES], axis=-1, kind="stable")
    return np.any(order[..., :k] == labels[..., None], axis=-1)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", [(), (5,)])
@pytest.mark.parametrize("form", ["integers", "one-hot"])
def test_top_k_accuracy_leaves_abstaining_out(k, shape, form):
    labels, scores = make_batch(60, shape=shape)
    # Ties, among them with the label.
    scores[::4, ..., 1] = scores[::4, ..., 0]
    weights = np.random.default_rng(2).random(labels.shape)
    found = top_k(labels, scores, k)
    y = labels if form == "integers" else np.eye(NUM_CLASSES)[labels]
    result = result_of(metrics.BestClassTopKAccuracy(k), (y, scores, weights))
    assert result == pytest.approx(np.average(found, weights=weights), abs=1e-6)
    if k == 1:
        best = result_of(metrics.BestClassAccuracy(), (y, scores, weights))
        assert best == result
    assert (found.mean() == 1.0) == (k >= NUM_CLASSES)


def test_top_k_accuracy_keeps_its_arguments_and_checks_k():
    metric = metrics.BestClassTopKAccuracy(k=2, ignore_class=1, name="mine")
    config = keras.saving.serialize_keras_object(metric)
    copy = keras.saving.deserialize_keras_object(config)
    assert copy.get_config() == metric.get_config()
    assert (copy.k, copy.ignore_class) == (2, 1)
    config = metrics.BestClassTopKAccuracy(k=np.int64(2)).get_config()
    assert type(config["k"]) is int
    for k in (0, 2.5, True, None):
        with pytest.raises(ValueError, match="`k` must be a positive integer"):
            metrics.BestClassTopKAccuracy(k)


def test_all_wrong_is_zero_and_not_nan():
    _, scores = make_batch()
    wrong = (scores[:, :NUM_CLASSES].argmax(axis=-1) + 1) % NUM_CLASSES
    assert result_of(metrics.SelectiveAccuracy(), (wrong, scores)) == 0.0


def test_scores_of_another_layer_do_not_pass_for_a_result(metric_class):
    labels, scores = make_batch()
    for column in (-1, -3, -4):
        others = scores.copy()
        others[7, column] = 0.3
        batch = (labels, ops.convert_to_tensor(others))
        assert np.isnan(result_of(metric_class(), batch))
        with pytest.raises(ValueError, match="hold no packed geometry"):
            metric_class().update_state(labels, others)


def test_shapes_that_do_not_fit_are_refused(metric_class):
    labels, scores = make_batch()
    metric = metric_class(ignore_class=-1)
    with pytest.raises(ValueError, match="Labels do not fit"):
        metric.update_state(labels[:5], scores)
    with pytest.raises(ValueError, match="at least 8 columns"):
        metric.update_state(labels, scores[:, :5])
    with pytest.raises(ValueError, match="one value for every sample"):
        metric.update_state(labels, scores, np.ones(7))
    with pytest.raises(ValueError, match="one value for every sample"):
        metric.update_state(labels, scores, np.ones((200, 2)))
    with pytest.raises(ValueError, match="`ignore_class` needs integer"):
        metric.update_state(np.eye(NUM_CLASSES)[labels], scores)
    # A refusal leaves nothing behind.
    assert np.isnan(to_numpy(metric.result()))


def test_num_bins_is_checked():
    for num_bins in (0, 1.5, None):
        with pytest.raises(ValueError, match="`num_bins` must be a positive"):
            metrics.ExpectedCalibrationError(num_bins)


def test_reset_forgets_everything(metric_class):
    metric = metric_class()
    first, second = make_batch(seed=0), make_batch(seed=1)
    result_of(metric, first)
    metric.reset_state()
    assert result_of(metric, second) == result_of(metric_class(), second)


def test_a_count_beyond_what_float32_holds_stays_right():
    @jit
    def add_ones(total, correction):
        for _ in range(50):
            total, correction = compensated_add(
                total, correction, ops.ones_like(total)
            )
        return total, correction

    total, correction = add_ones(
        ops.convert_to_tensor(np.float32(2.0**25)),
        ops.convert_to_tensor(np.float32(0.0)),
    )
    exact = np.float64(to_numpy(total)) + np.float64(to_numpy(correction))
    assert exact == 2.0**25 + 50
    assert to_numpy(total).dtype == np.float32


def test_many_small_batches_do_not_drift(metric_class):
    labels, scores = make_batch(4)
    weights = np.array([0.1, 0.7, 0.3, 0.9], "float32")
    metric = metric_class()
    # As if a million batches had gone before.
    expected = result_of(metric, (labels, scores, weights))
    for variable in metric.variables:
        variable.assign(variable * 1e6)
    for _ in range(100):
        metric.update_state(labels, scores, weights)
    assert float(to_numpy(metric.result())) == pytest.approx(
        expected, abs=2e-7, nan_ok=True
    )


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_16_bit_policies_change_nothing(metric_class, policy):
    labels, scores = make_batch()
    expected = result_of(metric_class(), (labels, scores))
    keras.config.set_dtype_policy(policy)
    assert result_of(metric_class(), (labels, scores)) == expected
    for dtype in ("float16", keras.DTypePolicy(policy)):
        metric = metric_class(dtype=dtype)
        assert metric.dtype == "float32"
        assert result_of(metric, (labels, scores)) == expected


def test_float64_metrics_compute_in_float64(metric_class):
    labels, scores = make_batch()
    scores = scores.astype("float64")
    weights = np.random.default_rng(2).random(200)
    expected = naive_result(metric_class, labels, scores, weights)
    with float64():
        metric = metric_class(dtype="float64")
        result = result_of(metric, (labels, scores, weights))
        assert keras.backend.standardize_dtype(metric.result().dtype) == (
            "float64"
        )
    assert result == pytest.approx(expected, abs=1e-13)


def test_config_round_trip(metric_class):
    metric = metric_class(ignore_class=2, name="mine", dtype="float32")
    copy = metric_class.from_config(metric.get_config())
    assert copy.get_config() == metric.get_config()
    config = keras.saving.serialize_keras_object(metric)
    assert config["registered_name"] == f"keras_halo>{metric_class.__name__}"
    copy = keras.saving.deserialize_keras_object(config)
    assert copy.get_config() == metric.get_config()
    batch = make_batch()
    assert result_of(copy, batch) == result_of(metric, batch)


def test_calibration_error_keeps_its_arguments():
    metric = metrics.ExpectedCalibrationError(num_bins=7, renormalize=False)
    copy = metrics.ExpectedCalibrationError.from_config(metric.get_config())
    assert (copy.num_bins, copy.renormalize) == (7, False)


# Any Keras metric on the probabilities


def probabilities_of(scores, renormalize=True):
    num_classes = scores.shape[-1] - 6
    if renormalize:
        return naive_softmax(scores[..., :num_classes])
    return naive_softmax(scores[..., : num_classes + 1])[..., :num_classes]


def binary_batch():
    rng = np.random.default_rng(6)
    labels = rng.integers(0, 2, 120)
    x = 0.3 * CENTROIDS[labels] + 0.4 * rng.normal(size=(120, 4))
    return labels, packed(x, CENTROIDS[:2], 2.0)


BINARY_METRICS = [
    keras.metrics.AUC,
    lambda: keras.metrics.AUC(curve="PR"),
    keras.metrics.Precision,
    keras.metrics.Recall,
    keras.metrics.BinaryAccuracy,
    keras.metrics.BinaryCrossentropy,
    keras.metrics.FalsePositives,
    keras.metrics.TrueNegatives,
    lambda: keras.metrics.SensitivityAtSpecificity(0.7),
    lambda: keras.metrics.BinaryIoU(threshold=0.4, dtype="float32"),
]


@pytest.mark.parametrize("make", BINARY_METRICS)
@pytest.mark.parametrize("renormalize", [True, False])
def test_binary_metrics_get_one_probability(make, renormalize):
    labels, scores = binary_batch()
    weights = np.random.default_rng(7).random(120).astype("float32")
    column = probabilities_of(scores, renormalize)[:, 1:]
    for weight in (None, weights):
        expected = result_of(make(), (labels[:, None], column, weight))
        for form in (labels, labels[:, None], np.eye(2)[labels]):
            metric = metrics.ProbabilityMetric(
                make(), renormalize=renormalize, class_id=1
            )
            result = result_of(metric, (form, scores, weight))
            assert result == pytest.approx(expected, abs=1e-6)
    assert np.isfinite(expected)


def test_a_class_is_asked_for_against_the_rest():
    labels, scores = make_batch()
    probabilities = probabilities_of(scores)
    for class_id in range(NUM_CLASSES):
        expected = result_of(
            keras.metrics.AUC(),
            (labels == class_id, probabilities[:, class_id]),
        )
        metric = metrics.ProbabilityMetric(
            keras.metrics.AUC(), class_id=class_id
        )
        result = result_of(metric, (labels, scores))
        assert result == pytest.approx(expected, abs=1e-6)
        assert result > 0.6


CATEGORICAL_METRICS = [
    lambda: keras.metrics.F1Score(average="macro"),
    lambda: keras.metrics.F1Score(average="weighted", threshold=0.5),
    lambda: keras.metrics.FBetaScore(average="micro", beta=2.0),
    lambda: keras.metrics.AUC(multi_label=True),
    lambda: keras.metrics.AUC(multi_label=True, num_labels=NUM_CLASSES),
    lambda: keras.metrics.Precision(class_id=1),
    lambda: keras.metrics.Recall(top_k=2),
    keras.metrics.CategoricalAccuracy,
    keras.metrics.CategoricalCrossentropy,
    lambda: keras.metrics.TopKCategoricalAccuracy(2),
    lambda: keras.metrics.OneHotMeanIoU(NUM_CLASSES, dtype="float32"),
]
SPARSE_METRICS = [
    keras.metrics.SparseCategoricalAccuracy,
    keras.metrics.SparseCategoricalCrossentropy,
    lambda: keras.metrics.SparseTopKCategoricalAccuracy(2),
    lambda: keras.metrics.MeanMetricWrapper(
        keras.losses.sparse_categorical_crossentropy
    ),
    lambda: keras.metrics.MeanIoU(
        NUM_CLASSES, sparse_y_pred=False, dtype="float32"
    ),
]


@pytest.mark.parametrize("make", CATEGORICAL_METRICS + SPARSE_METRICS)
def test_metrics_of_many_classes_get_labels_in_the_form_they_take(make):
    labels, scores = make_batch()
    weights = np.random.default_rng(8).random(200).astype("float32")
    one_hot = np.eye(NUM_CLASSES, dtype="float32")[labels]
    taken = labels if make in SPARSE_METRICS else one_hot
    probabilities = probabilities_of(scores)
    for weight in (None, weights):
        expected = result_of(make(), (taken, probabilities, weight))
        for form in (labels, labels[:, None], one_hot):
            metric = metrics.ProbabilityMetric(make())
            result = result_of(metric, (form, scores, weight))
            assert result == pytest.approx(expected, abs=1e-6)
    assert 0.2 < expected < 1.0 or "entropy" in metric.name


def test_mean_iou_gets_classes_where_it_asks_for_them():
    labels, scores = make_batch(20, shape=(4, 3))
    named = probabilities_of(scores).argmax(axis=-1)
    expected = result_of(keras.metrics.MeanIoU(NUM_CLASSES), (labels, named))
    metric = metrics.ProbabilityMetric(keras.metrics.MeanIoU(NUM_CLASSES))
    assert result_of(metric, (labels[..., None], scores)) == expected
    one_hot = np.eye(NUM_CLASSES)[labels]
    metric = metrics.ProbabilityMetric(
        keras.metrics.MeanIoU(NUM_CLASSES, sparse_y_true=False)
    )
    assert result_of(metric, (one_hot, scores)) == expected


def test_the_form_of_labels_can_be_stated():
    def agreement(y_true, y_pred):
        return ops.sum(ops.cast(y_true, y_pred.dtype) * y_pred, axis=-1)

    labels, scores = make_batch()
    probabilities = probabilities_of(scores)
    metric = metrics.ProbabilityMetric(
        keras.metrics.MeanMetricWrapper(agreement, name="agreement"),
        one_hot_labels=True,
    )
    assert result_of(metric, (labels, scores)) == pytest.approx(
        probabilities[np.arange(200), labels].mean(), abs=1e-6
    )

    def first_is_zero(y_true, y_pred):
        return ops.equal(ops.cast(y_true, "int32"), 0)

    metric = metrics.ProbabilityMetric(
        keras.metrics.MeanMetricWrapper(first_is_zero, name="zeros"),
        one_hot_labels=False,
    )
    one_hot = np.eye(NUM_CLASSES)[labels]
    assert result_of(metric, (one_hot, scores)) == pytest.approx(
        (labels == 0).mean(), abs=1e-6
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.metrics.F1Score(average="macro"),
        keras.metrics.SparseCategoricalAccuracy,
        lambda: keras.metrics.MeanIoU(NUM_CLASSES),
    ],
)
def test_wrapped_metrics_honour_masks_ignored_labels_and_batches(make):
    labels, scores = make_batch(40, shape=(5,))
    fate = np.random.default_rng(9).permutation(np.arange(200) % 4)
    mask, ignored = (fate > 0).reshape(40, 5), (fate == 1).reshape(40, 5)
    counted = mask & ~ignored
    expected = result_of(
        metrics.ProbabilityMetric(make()), (labels[counted], scores[counted])
    )
    labels[~mask] = -1
    labels[ignored] = 255
    metric = metrics.ProbabilityMetric(make(), ignore_class=255)
    for rows in np.split(np.arange(40), 4):
        y_pred = ops.convert_to_tensor(scores[rows])
        backend.set_keras_mask(y_pred, ops.convert_to_tensor(mask[rows]))
        metric.update_state(labels[rows], y_pred)
    assert float(to_numpy(metric.result())) == pytest.approx(expected, abs=1e-6)


def test_out_of_range_labels_are_never_right_for_wrapped_metrics():
    labels, scores = make_batch()
    labels[:] = -1
    labels[100:] = 255
    batch = (ops.convert_to_tensor(labels), ops.convert_to_tensor(scores))
    for metric in (
        keras.metrics.SparseCategoricalAccuracy(),
        keras.metrics.F1Score(average="macro"),
        keras.metrics.Precision(),
    ):
        assert result_of(metrics.ProbabilityMetric(metric), batch) == 0.0
    metric = keras.metrics.TruePositives()
    assert (
        result_of(metrics.ProbabilityMetric(metric, class_id=1), batch) == 0.0
    )


def test_wrapped_metrics_are_reset():
    metric = metrics.ProbabilityMetric(keras.metrics.F1Score(average="macro"))
    first, second = make_batch(seed=0), make_batch(seed=1)
    expected = result_of(
        metrics.ProbabilityMetric(keras.metrics.F1Score(average="macro")),
        second,
    )
    result_of(metric, first)
    metric.reset_state()
    assert result_of(metric, second) == expected


def test_wrapped_config_round_trip():
    metric = metrics.ProbabilityMetric(
        keras.metrics.AUC(num_thresholds=50, name="area"),
        renormalize=False,
        class_id=2,
        ignore_class=0,
    )
    assert metric.name == "area"
    config = keras.saving.serialize_keras_object(metric)
    copy = keras.saving.deserialize_keras_object(config)
    assert copy.get_config() == metric.get_config()
    assert copy.metric.num_thresholds == 50
    batch = make_batch()
    assert result_of(copy, batch) == result_of(metric, batch)
    metric = metrics.ProbabilityMetric(
        keras.metrics.F1Score(), one_hot_labels=True, name="mine"
    )
    copy = metrics.ProbabilityMetric.from_config(metric.get_config())
    assert (copy.one_hot_labels, copy.name) == (True, "mine")


def test_wrapper_refuses():
    auc = keras.metrics.AUC()
    with pytest.raises(ValueError, match="must be a `keras.Metric`"):
        metrics.ProbabilityMetric("auc")
    with pytest.raises(ValueError, match="`class_id` must be a non-negative"):
        metrics.ProbabilityMetric(auc, class_id=-1)
    with pytest.raises(ValueError, match="Give one of the two"):
        metrics.ProbabilityMetric(auc, class_id=1, one_hot_labels=True)
    with pytest.raises(ValueError, match="`BinaryIoU` asks about one class"):
        metrics.ProbabilityMetric(keras.metrics.BinaryIoU())
    with pytest.raises(ValueError, match="below the number of classes, 3"):
        metrics.ProbabilityMetric(auc, class_id=3).update_state(*make_batch())


# In a model


def make_model():
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(4, kernel_initializer="identity"),
            keras_halo.HALODense.reference(
                NUM_CLASSES,
                centroid_initializer=keras.initializers.Identity(2.0),
            ),
        ]
    )
    rng = np.random.default_rng(10)
    labels = rng.integers(0, NUM_CLASSES, 200)
    x = 0.8 * np.eye(NUM_CLASSES, 4)[labels] + 0.6 * rng.normal(size=(200, 4))
    return model, x.astype("float32"), labels


def make_metrics():
    # `fit` cannot try out the function that it counts by at even ones.
    uneven = [0.15, 0.3, 0.6, 0.8]
    thresholds = uneven if IS_LOWEST_ON_TORCH else None
    area = keras.metrics.AUC(thresholds=thresholds, name="auc")
    return [
        metrics.ExpectedCalibrationError(num_bins=5),
        metrics.AbstentionRate(),
        Coverage(),
        metrics.SelectiveAccuracy(),
        metrics.ProbabilityMetric(keras.metrics.F1Score(average="macro")),
        metrics.ProbabilityMetric(area, class_id=1),
    ]


def compile_with_metrics(model, **options):
    model.compile(
        "adam",
        loss=keras_halo.HALOLoss(),
        metrics=["accuracy", *make_metrics()],
        weighted_metrics=[metrics.SelectiveAccuracy(name="weighted")],
        **options,
    )


def check_evaluation(model, x, labels, weights=None):
    """The logs of `evaluate` are the metrics on the whole of `predict`."""
    logs = model.evaluate(
        x,
        labels,
        sample_weight=weights,
        batch_size=50,
        verbose=0,
        return_dict=True,
    )
    scores = model.predict(x, batch_size=50, verbose=0)
    for metric in make_metrics():
        expected = result_of(metric, (labels, scores))
        assert logs[metric.name] == pytest.approx(expected, abs=1e-6)
        assert 0.0 < expected < 1.0
    assert logs["weighted"] == pytest.approx(
        result_of(metrics.SelectiveAccuracy(), (labels, scores, weights)),
        abs=1e-6,
    )
    return logs


@pytest.mark.slow
def test_fit_and_evaluate_report_the_metrics():
    model, x, labels = make_model()
    compile_with_metrics(model)
    weights = np.linspace(0.1, 2.0, 200).astype("float32")
    stop = keras.callbacks.EarlyStopping(
        monitor="val_expected_calibration_error"
    )
    history = model.fit(
        x,
        labels,
        sample_weight=weights,
        epochs=2,
        batch_size=50,
        verbose=0,
        validation_data=(x, labels, weights),
        callbacks=[stop],
    ).history
    for name in ("expected_calibration_error", "val_auc", "val_f1_score"):
        assert np.isfinite(history[name]).all()
    # Less of the error is better, without being told so.
    assert stop.monitor_op(0.1, 0.2)
    logs = check_evaluation(model, x, labels, weights)
    assert logs["coverage"] + logs["abstention_rate"] == pytest.approx(1.0)


@pytest.mark.slow
def test_one_hot_labels_and_no_compiler():
    model, x, labels = make_model()
    compile_with_metrics(model, jit_compile=False)
    check_evaluation(model, x, np.eye(NUM_CLASSES, dtype="float32")[labels])


@pytest.mark.slow
def test_mixed_precision_model_reports_the_metrics_of_its_float32_scores():
    keras.config.set_dtype_policy("mixed_float16")
    model, x, labels = make_model()
    compile_with_metrics(model)
    check_evaluation(model, x, labels)


@pytest.mark.slow
def test_a_compiled_model_comes_back_with_its_metrics(tmp_path):
    model, x, labels = make_model()
    compile_with_metrics(model)
    model.fit(x, labels, batch_size=50, verbose=0)
    before = check_evaluation(model, x, labels)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    after = check_evaluation(loaded, x, labels)
    assert set(after) == set(before)
    for name, value in before.items():
        assert after[name] == pytest.approx(value, abs=1e-6)


@pytest.mark.slow
def test_masks_of_a_model_reach_the_metrics():
    rng = np.random.default_rng(11)
    tokens = rng.integers(1, 9, (25, 6))
    tokens[:, 4:] = 0
    labels = rng.integers(0, NUM_CLASSES, (25, 6))
    labels[:, 4:] = -1
    model = keras.Sequential(
        [
            keras.layers.Embedding(9, 4, mask_zero=True),
            keras_halo.HALODense.reference(NUM_CLASSES),
        ]
    )
    own = [
        metrics.ExpectedCalibrationError(num_bins=5),
        metrics.SelectiveAccuracy(),
        metrics.ProbabilityMetric(keras.metrics.F1Score(average="macro")),
    ]
    model.compile("sgd", loss=keras_halo.HALOLoss(), metrics=own)
    logs = model.evaluate(
        tokens, labels, batch_size=25, verbose=0, return_dict=True
    )
    scores = model.predict(tokens, batch_size=25, verbose=0)[:, :4]
    for metric in own:
        metric.reset_state()
        result = result_of(metric, (labels[:, :4], scores))
        assert logs[metric.name] == pytest.approx(result, abs=1e-6, nan_ok=True)


def test_callbacks_know_which_way_is_better():
    directions = {
        metrics.ExpectedCalibrationError(): "down",
        metrics.AbstentionRate(): "down",
        Coverage(): "up",
        metrics.SelectiveAccuracy(): "up",
        metrics.BestClassAccuracy(): "up",
        metrics.BestClassTopKAccuracy(): "up",
        metrics.RetrievalRecall(): "up",
        metrics.ProbabilityMetric(keras.metrics.AUC()): "up",
    }
    for metric, direction in directions.items():
        assert metric._direction == direction

    class OfMyOwn(keras.metrics.Mean):
        """One that says nothing of its direction."""

    unknown = metrics.ProbabilityMetric(OfMyOwn())
    assert not hasattr(unknown, "_direction")


@pytest.mark.parametrize(
    "metric",
    [
        keras_halo.metrics.SelectiveAccuracy,
        keras_halo.metrics.ExpectedCalibrationError,
        keras_halo.metrics.BestClassAccuracy,
        functools.partial(keras_halo.metrics.BestClassTopKAccuracy, k=2),
    ],
)
def test_fractional_labels_are_no_classes(metric):
    scores = keras_halo.HALODense(2)(np.eye(2, 3, dtype="float32"))
    y_true = np.array([[0.1], [0.9]], "float32")
    with pytest.raises(ValueError, match="must be integers"):
        metric().update_state(y_true, scores)
    wrong, expected = metric(), metric()
    wrong.update_state(keras.ops.convert_to_tensor(y_true), scores)
    # As labels that belong to no class.
    expected.update_state(np.array([[9], [9]]), scores)
    np.testing.assert_array_equal(wrong.result(), expected.result())


@pytest.mark.parametrize(
    "metric",
    [
        keras_halo.metrics.SelectiveAccuracy,
        keras_halo.metrics.ExpectedCalibrationError,
        keras_halo.metrics.BestClassAccuracy,
        functools.partial(keras_halo.metrics.BestClassTopKAccuracy, k=2),
    ],
)
def test_metrics_take_the_labels_that_the_loss_takes(metric):
    scores = keras_halo.HALODense(3)(np.eye(4, 3, dtype="float32"))
    labels = np.eye(3)[[0, 1, 2, 0]]
    some, kept = metric(), metric()
    some.update_state(labels * [[1], [0], [1], [0]], scores)
    kept.update_state(labels[::2], scores[::2])
    np.testing.assert_allclose(some.result(), kept.result(), rtol=1e-6)
    with pytest.raises(ValueError, match="rows that are not"):
        metric().update_state(np.ones((4, 3)), scores)
    with pytest.raises(ValueError, match="Encode"):
        metric().update_state(np.array(list("abca")), scores)


READ_LABELS = [
    metrics.SelectiveAccuracy,
    metrics.ExpectedCalibrationError,
    metrics.BestClassAccuracy,
    functools.partial(metrics.BestClassTopKAccuracy, k=2),
    *(
        functools.partial(metrics.ProbabilityMetric, make(), **how)
        for make, how in (
            (keras.metrics.CategoricalAccuracy, {}),
            (keras.metrics.SparseCategoricalAccuracy, {}),
            (lambda: keras.metrics.MeanIoU(NUM_CLASSES), {}),
            (keras.metrics.F1Score, {}),
            (keras.metrics.Precision, {"class_id": 1}),
        )
    ),
]

NO_DISTRIBUTIONS = {
    "multi-hot": [1.0, 1.0, 0.0],
    "sum of a half": [0.5, 0.0, 0.0],
    "negative": [1.2, -0.2, 0.0],
    "sum of zero": [1.0, -1.0, 0.0],
    "sum below zero": [-1.0, 0.0, 0.0],
    "NaN": [np.nan, 1.0, 0.0],
    "infinite": [np.inf, 0.0, 0.0],
}


def all_nan(metric):
    return np.isnan(np.asarray(to_numpy(metric.result()))).all()


# Keras says so of weights and counts in integers.
@pytest.mark.filterwarnings("ignore:You are passing weight as `float`")
@pytest.mark.parametrize("row", NO_DISTRIBUTIONS.values(), ids=NO_DISTRIBUTIONS)
@pytest.mark.parametrize("make", READ_LABELS)
def test_labels_in_tensors_that_are_no_distributions_give_nan(make, row):
    labels, scores = make_batch(30)
    good = np.eye(NUM_CLASSES, dtype="float32")[labels]
    bad = good.copy()
    bad[7] = row
    good, bad, scores = map(ops.convert_to_tensor, (good, bad, scores))
    # Copies: what is wrapped is shared by the cases.
    metric = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(make())
    )
    metric.update_state(good, scores)
    expected = to_numpy(metric.result())
    assert np.isfinite(expected).all()
    # What has no weight may hold anything.
    weights = np.ones(30, "float32")
    weights[7] = 0.0
    metric.reset_state()
    metric.update_state(bad, scores, sample_weight=weights)
    assert np.isfinite(to_numpy(metric.result())).all()
    metric.update_state(bad, scores)
    metric.update_state(good, scores)
    assert all_nan(metric)
    metric.reset_state()
    metric.update_state(good, scores)
    np.testing.assert_array_equal(to_numpy(metric.result()), expected)


@pytest.mark.parametrize("dtype", ["int32", "bool", "float32"])
@pytest.mark.parametrize("make", READ_LABELS)
def test_multi_hot_labels_of_every_dtype_give_nan(make, dtype):
    labels, scores = make_batch(30)
    multi_hot = np.eye(NUM_CLASSES)[labels].astype(dtype)
    multi_hot[:, 0] = 1
    metric = make()
    metric.update_state(
        ops.convert_to_tensor(multi_hot), ops.convert_to_tensor(scores)
    )
    assert all_nan(metric)


@pytest.mark.filterwarnings("ignore:You are passing weight as `float`")
def test_scores_of_another_layer_give_nan_in_wrapped_metrics():
    labels, scores = make_batch(30)
    others = scores.copy()
    others[3, -5:] = 0.0
    metric = metrics.ProbabilityMetric(keras.metrics.MeanIoU(NUM_CLASSES))
    weights = (np.arange(30) != 3).astype("float32")
    metric.update_state(labels, ops.convert_to_tensor(others), weights)
    assert np.isfinite(float(metric.result()))
    metric.update_state(labels, ops.convert_to_tensor(others))
    assert all_nan(metric)


@pytest.mark.slow
def test_multi_hot_labels_give_nan_in_fit():
    labels, _ = make_batch(30)
    multi_hot = np.eye(NUM_CLASSES, dtype="float32")[labels]
    multi_hot[3, :] = 1.0
    model = keras.Sequential(
        [keras.Input((4,)), keras_halo.HALODense(NUM_CLASSES)]
    )
    wrapped = metrics.ProbabilityMetric(keras.metrics.MeanIoU(NUM_CLASSES))
    model.compile(
        "sgd",
        keras_halo.HALOLoss(),
        metrics=[metrics.SelectiveAccuracy(), wrapped],
    )
    x = np.ones((30, 4), "float32")
    results = model.evaluate(x, multi_hot, verbose=0)
    assert np.isnan(results).all()
    assert np.isfinite(model.evaluate(x, labels, verbose=0)).all()


def test_a_fractional_label_is_none_to_ignore():
    scores = keras_halo.HALODense(2)(np.eye(2, 3, dtype="float32"))
    y_true = keras.ops.convert_to_tensor(np.array([0.5, 1.0], "float32"))
    results = []
    for ignore_class in (-1, 7):
        metric = keras_halo.metrics.AbstentionRate(ignore_class=ignore_class)
        metric.update_state(y_true, scores, sample_weight=np.array([1.0, 3.0]))
        results.append(float(metric.result()))
    assert results[0] == results[1]


def test_metrics_that_0_1_0_saved_load_under_their_old_names():
    batch = make_batch()
    new = metrics.ProbabilityMetric(keras.metrics.AUC(), class_id=1)
    for name, config, expected in (
        ("OnProbabilities", new.get_config(), result_of(new, batch)),
        ("Coverage", {}, 1.0 - result_of(metrics.AbstentionRate(), batch)),
    ):
        loaded = keras.saving.deserialize_keras_object(
            {
                "module": "keras_halo.metrics",
                "class_name": name,
                "config": config,
                "registered_name": f"keras_halo>{name}",
            }
        )
        assert result_of(loaded, batch) == pytest.approx(expected, abs=1e-6)
        # Saved again, they load again.
        again = keras.saving.deserialize_keras_object(
            keras.saving.serialize_keras_object(loaded)
        )
        assert type(again) is type(loaded)
