"""Arrays of any length, and without a row, are answered alike."""

import functools

import keras
import numpy as np
import pytest
from helpers import packed, to_numpy

import keras_halo
from keras_halo import layers, metrics, rejection
from keras_halo.ops.ood_scores import OOD_METHODS
from keras_halo.ops.packing import packed_width


@pytest.mark.parametrize("method", OOD_METHODS)
def test_scores_of_a_part_are_parts_of_the_scores(method):
    rng = np.random.default_rng(0)
    scores = packed(rng.normal(size=(1100, 4)), np.eye(3, 4))
    scores = scores.astype("float32")
    every = keras_halo.ood_score(scores, method)
    for part in (slice(0, 1), slice(7, 90), slice(1000, 1100)):
        np.testing.assert_allclose(
            keras_halo.ood_score(scores[part], method),
            every[part],
            rtol=1e-5,
            atol=1e-5,
        )


@pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="Only JAX compiles every shape."
)
def test_new_lengths_compile_nothing_new(caplog):
    import jax

    rng = np.random.default_rng(0)
    scores = packed(rng.normal(size=(300, 4)), np.eye(3, 4)).astype("float32")

    def read(length):
        keras_halo.decode_predictions(scores[:length])
        keras_halo.ood_score(scores[:length])

    read(300)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for length in rng.integers(1, 300, size=1000):
            read(int(length))
    assert "Compiling" not in caplog.text


# Batches without a row --------------------------------------------------------

RNG = np.random.default_rng(0)
SCORES = packed(RNG.normal(size=(60, 4)), np.eye(3, 4)).astype("float32")
LABELS = RNG.integers(0, 3, size=60)


def guard(make):
    rule = make().fit(SCORES, labels=LABELS)
    return layers.Guard(rule.certificate())


READERS = {
    "softmax": layers.HALOSoftmax,
    "softmax with abstaining": lambda: layers.HALOSoftmax(abstain=True),
    "decision": layers.Decision,
    "decision for each class": lambda: layers.Decision([0.1, 0.2, 0.3]),
    "guard": lambda: guard(rejection.CoverageRule),
    "guard with label sets": lambda: guard(rejection.LabelSetRule),
}
for method in OOD_METHODS:
    READERS |= {
        f"score {method}": functools.partial(layers.OODScore, method),
        f"decision by {method}": functools.partial(layers.Decision, 1, method),
        f"labels by {method}": functools.partial(layers.LabelSet, 1, method),
    }


@pytest.mark.parametrize("shape", [(0,), (0, 5), (2, 0)])
@pytest.mark.parametrize("reader", READERS)
def test_layers_answer_no_rows_with_none(reader, shape):
    layer = READERS[reader]()
    scores = np.zeros((*shape, SCORES.shape[-1]), "float32")
    of_one = keras.tree.flatten(layer(SCORES[:1]))
    of_none = keras.tree.flatten(layer(scores))
    for one, none in zip(of_one, of_none, strict=True):
        assert tuple(none.shape) == (*shape, *one.shape[1:])
        assert none.dtype == one.dtype


def test_gaussians_and_heads_answer_no_rows_with_none():
    embeddings = RNG.normal(size=(60, 4)).astype("float32")
    layer = layers.ClassGaussians(3)
    layer.adapt(embeddings, LABELS)
    assert layer(embeddings, SCORES).shape == (60,)
    assert layer(embeddings[:0], SCORES[:0]).shape == (0,)
    for abstain_rate in (None, 0.1):
        head = keras_halo.HALODense(3, abstain_rate=abstain_rate)
        assert head(embeddings[:0]).shape == (0, packed_width(3))


METRICS = {
    "rate": metrics.AbstentionRate,
    "accuracy": metrics.BestClassAccuracy,
    "top k": lambda: metrics.BestClassTopKAccuracy(2),
    "selective": metrics.SelectiveAccuracy,
    "calibration": metrics.ExpectedCalibrationError,
    "calibration of all": lambda: metrics.ExpectedCalibrationError(
        renormalize=False
    ),
    "Keras": lambda: metrics.ProbabilityMetric(
        keras.metrics.CategoricalAccuracy()
    ),
}


@pytest.mark.parametrize("form", ["integers", "one-hot"])
@pytest.mark.parametrize("metric", METRICS)
def test_a_batch_without_a_row_leaves_metrics_as_they_are(metric, form):
    labels = (
        LABELS if form == "integers" else np.eye(3, dtype="float32")[LABELS]
    )
    expected, metric = METRICS[metric](), METRICS[metric]()
    metric.update_state(labels[:0], SCORES[:0])
    for made in (expected, metric):
        made.update_state(labels, SCORES)
    metric.update_state(labels[:0], SCORES[:0], np.ones(0))
    for one, other in zip(expected.variables, metric.variables, strict=True):
        np.testing.assert_array_equal(*map(to_numpy, (one, other)))
