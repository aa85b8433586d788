"""Every metric of Keras on packed scores: which are right, and how.

A metric that a new Keras brings fails here until it is classified, in the
table below and in that of `docs/faq.md`.
"""

import inspect
import pathlib
import re

import keras
import numpy as np
import pytest
from helpers import naive_softmax, packed, to_numpy
from keras import ops

import keras_halo
from keras_halo.metrics import ProbabilityMetric

# Keras's confusion matrix asks JAX for int64.
pytestmark = pytest.mark.filterwarnings("ignore:Explicitly requested dtype")

FAQ = pathlib.Path(__file__).parents[2] / "docs" / "faq.md"

CENTROIDS = np.array([[2.0, 0, 0], [0, 2.0, 0], [0, 0, 2.0]])


def example(num_classes=3):
    """Labels, packed scores on some of which the model abstains, softmax."""
    rng = np.random.default_rng(5)
    labels = np.arange(40) % num_classes
    centroids = CENTROIDS[:num_classes]
    x = 0.4 * centroids[labels] + 0.5 * rng.normal(size=(40, 3))
    scores = packed(x, centroids, 2.0, -0.1)
    logits = scores[:, :num_classes].astype("float64")
    abstained = scores[:, num_classes] > logits.max(axis=-1)
    assert 5 < abstained.sum() < 30
    return labels, scores, naive_softmax(logits)


def of_argmax(labels, scores):
    answers = scores[:, : scores.shape[-1] - 5].argmax(axis=-1)
    return np.mean(answers == labels)


def top_2(y, p):
    return np.mean(
        [label in row.argsort()[-2:] for label, row in zip(y, p, strict=True)]
    )


def counts(y, p):
    """True and false positives, false and true negatives of class 1."""
    is_it, found = y == 1, p[:, 1] > 0.5
    return (
        np.sum(is_it & found),
        np.sum(~is_it & found),
        np.sum(is_it & ~found),
        np.sum(~is_it & ~found),
    )


def f_score(beta):
    def truth(y, p):
        scores = []
        for k in range(3):
            is_it, found = y == k, p.argmax(-1) == k
            hits = np.sum(is_it & found)
            precision, recall = hits / found.sum(), hits / is_it.sum()
            scores.append(
                (1 + beta**2)
                * precision
                * recall
                / (beta**2 * precision + recall)
            )
        return scores

    return truth


def intersections(y, found):
    ks = range(3)
    return [
        np.sum((y == k) & (found == k)) / np.sum((y == k) | (found == k))
        for k in ks
    ]


def at_thresholds(wanted, of, reached=0.5):
    """The best of one rate where another one reaches a half."""

    def truth(y, p):
        rates = []
        for threshold in np.linspace(0, 1, 201)[1:-1]:
            is_it, found = y == 1, p[:, 1] > threshold
            hits = np.sum(is_it & found)
            rates.append(
                {
                    "recall": hits / is_it.sum(),
                    "precision": hits / max(found.sum(), 1),
                    "specificity": np.mean(~found[~is_it]),
                }
            )
        return max(r[wanted] for r in rates if r[of] >= reached)

    return truth


def area(y, p):
    known, others = p[y == 1, 1], p[y != 1, 1]
    above = np.mean(known[:, None] > others) + 0.5 * np.mean(
        known[:, None] == others
    )
    return above


def cross_entropy(y, p):
    return -np.log(p[np.arange(len(y)), y]).mean()


def binary_cross_entropy(y, p):
    q = np.where(y == 1, p[:, 1], 1 - p[:, 1])
    return -np.log(q).mean()


ONE = {"class_id": 1}

# They read the largest column: abstaining is an answer, and always wrong.
AS_THEY_ARE = ("CategoricalAccuracy", "SparseCategoricalAccuracy")

# Arguments of the metric and of the wrapper, and what the result has to be,
# of labels and of the probabilities of the classes.
WRAPPED = {
    "AUC": ({}, ONE, area),
    "BinaryAccuracy": (
        {},
        ONE,
        lambda y, p: np.mean((y == 1) == (p[:, 1] > 0.5)),
    ),
    "BinaryCrossentropy": ({}, ONE, binary_cross_entropy),
    "BinaryIoU": (
        {"target_class_ids": [1]},
        ONE,
        lambda y, p: counts(y, p)[0] / sum(counts(y, p)[:3]),
    ),
    "CategoricalCrossentropy": ({}, {}, cross_entropy),
    "F1Score": ({}, {}, f_score(1)),
    "FBetaScore": ({"beta": 2.0}, {}, f_score(2)),
    "FalseNegatives": ({}, ONE, lambda y, p: counts(y, p)[2]),
    "FalsePositives": ({}, ONE, lambda y, p: counts(y, p)[1]),
    "IoU": (
        {"num_classes": 3, "target_class_ids": [1]},
        {},
        lambda y, p: intersections(y, p.argmax(-1))[1],
    ),
    "KLDivergence": ({}, {}, cross_entropy),
    "MeanIoU": (
        {"num_classes": 3, "sparse_y_pred": False},
        {},
        lambda y, p: np.mean(intersections(y, p.argmax(-1))),
    ),
    "OneHotIoU": (
        {"num_classes": 3, "target_class_ids": [1]},
        {},
        lambda y, p: intersections(y, p.argmax(-1))[1],
    ),
    "OneHotMeanIoU": (
        {"num_classes": 3},
        {},
        lambda y, p: np.mean(intersections(y, p.argmax(-1))),
    ),
    "Precision": (
        {},
        ONE,
        lambda y, p: counts(y, p)[0] / sum(counts(y, p)[:2]),
    ),
    "PrecisionAtRecall": (
        {"recall": 0.5},
        ONE,
        at_thresholds("precision", "recall"),
    ),
    "Recall": (
        {},
        ONE,
        lambda y, p: counts(y, p)[0] / np.sum(y == 1),
    ),
    "RecallAtPrecision": (
        {"precision": 0.5},
        ONE,
        at_thresholds("recall", "precision"),
    ),
    "SensitivityAtSpecificity": (
        {"specificity": 0.5},
        ONE,
        at_thresholds("recall", "specificity"),
    ),
    "SparseCategoricalCrossentropy": ({}, {}, cross_entropy),
    "SparseTopKCategoricalAccuracy": ({"k": 2}, {}, top_2),
    "SpecificityAtSensitivity": (
        {"sensitivity": 0.5},
        ONE,
        at_thresholds("specificity", "recall"),
    ),
    "TopKCategoricalAccuracy": ({"k": 2}, {}, top_2),
    "TrueNegatives": ({}, ONE, lambda y, p: counts(y, p)[3]),
    "TruePositives": ({}, ONE, lambda y, p: counts(y, p)[0]),
}

# Made for other outputs than probabilities of classes.
NEVER = (
    "Accuracy",
    "CategoricalHinge",
    "ConcordanceCorrelation",
    "CosineSimilarity",
    "Hinge",
    "LogCoshError",
    "Mean",
    "MeanAbsoluteError",
    "MeanAbsolutePercentageError",
    "MeanMetricWrapper",
    "MeanSquaredError",
    "MeanSquaredLogarithmicError",
    "Metric",
    "PearsonCorrelation",
    "Poisson",
    "R2Score",
    "RootMeanSquaredError",
    "SquaredHinge",
    "Sum",
)


def metrics_of_keras():
    return {
        name
        for name, thing in inspect.getmembers(keras.metrics, inspect.isclass)
        if issubclass(thing, keras.Metric)
    }


def existing(names):
    """Those that the installed Keras has: older ones lack some."""
    return sorted(metrics_of_keras().intersection(names))


def result_of(metric, labels, outputs):
    metric.update_state(
        ops.convert_to_tensor(labels), ops.convert_to_tensor(outputs)
    )
    return np.asarray(to_numpy(metric.result()), "float64")


def forms_of(labels, num_classes=3):
    return labels, np.eye(num_classes, dtype="float32")[labels]


def test_every_metric_of_keras_is_classified():
    classified = {*AS_THEY_ARE, *WRAPPED, *NEVER}
    assert len(classified) == len(AS_THEY_ARE) + len(WRAPPED) + len(NEVER)
    assert metrics_of_keras() - classified == set()


@pytest.mark.skipif(not FAQ.exists(), reason="the pages are not here")
def test_the_table_in_the_documentation_is_this_one():
    text = FAQ.read_text("utf-8")
    rows = re.findall(r"^\| (`.*) \| (.*) \| (.*) \|$", text, re.M)
    found = {}
    for names, as_they_are, wrapped in rows:
        for name in re.findall(r"`(\w+)`", names):
            if name[0].isupper() and name not in found:
                found[name] = as_they_are.split(":")[0], wrapped.split(":")[0]
    for name in AS_THEY_ARE:
        assert found[name] == ("right", "the best class, abstaining or not")
    for name in WRAPPED:
        assert found[name] == ("wrong", "right")
    for name in NEVER:
        assert found[name] == ("wrong", "wrong")


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("name", AS_THEY_ARE)
def test_metrics_that_read_the_largest_column_count_abstaining_as_an_error(
    name, num_classes
):
    labels, scores, probabilities = example(num_classes)
    form = forms_of(labels, num_classes)["Sparse" not in name]
    metric = getattr(keras.metrics, name)
    np.testing.assert_allclose(
        result_of(metric(), form, scores), of_argmax(labels, scores), rtol=1e-6
    )
    np.testing.assert_allclose(
        result_of(ProbabilityMetric(metric()), form, scores),
        np.mean(probabilities.argmax(-1) == labels),
        rtol=1e-6,
    )


@pytest.mark.parametrize("name", existing(WRAPPED))
def test_wrapped_metrics_are_right_and_bare_ones_are_not(name):
    arguments, how, truth = WRAPPED[name]
    metric = getattr(keras.metrics, name)
    labels, scores, probabilities = example()
    expected = truth(labels, probabilities)
    for form in forms_of(labels):
        found = result_of(
            ProbabilityMetric(metric(**arguments), **how), form, scores
        )
        # Keras sorts what the areas are of into bins.
        atol = 0.01 if name == "AUC" else 1e-5
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=atol)
        try:
            bare = result_of(metric(**arguments), form, scores)
        except Exception:  # Whatever a backend says of shapes.
            continue
        assert bare.shape != np.shape(expected) or not np.allclose(
            bare, expected, rtol=1e-3
        )


# They look for the largest columns.
OF_THE_ORDER = [
    *AS_THEY_ARE,
    *("SparseTopKCategoricalAccuracy", "TopKCategoricalAccuracy"),
    *("IoU", "MeanIoU", "OneHotIoU", "OneHotMeanIoU"),
    *("F1Score", "FBetaScore"),
]


@pytest.mark.parametrize("ahead", [0.0, 30.0, 100.0, 1000.0])
@pytest.mark.parametrize("name", OF_THE_ORDER)
def test_the_order_of_classes_outlasts_abstaining_far_ahead(name, ahead):
    arguments, how, _ = WRAPPED.get(name, ({}, {}, None))
    metric = getattr(keras.metrics, name)
    labels, scores, _ = example()
    of_answers = ProbabilityMetric(metric(**arguments), **how)
    expected = result_of(of_answers, labels, scores)
    scores[:, 3] += ahead
    with_doubt = ProbabilityMetric(
        metric(**arguments), renormalize=False, **how
    )
    found = result_of(with_doubt, labels, scores)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("ahead", [30.0, 1000.0])
@pytest.mark.parametrize(
    "name", ["CategoricalCrossentropy", "SparseCategoricalCrossentropy"]
)
def test_cross_entropies_are_finite_where_abstaining_is_far_ahead(name, ahead):
    labels, scores, _ = example()
    scores[:, 3] += ahead
    metric = getattr(keras.metrics, name)()
    wrapped = ProbabilityMetric(metric, renormalize=False)
    assert np.isfinite(result_of(wrapped, labels, scores))


def test_masks_of_classes_read_the_logits():
    labels, scores, _ = example()
    metric = keras.metrics.MeanIoU(3)  # with `sparse_y_pred=True`
    wrapped = ProbabilityMetric(metric, renormalize=False)
    scores[:, 3] += 1000.0
    found = scores[:, :3].argmax(-1)
    expected = np.mean(intersections(labels, found))
    np.testing.assert_allclose(
        result_of(wrapped, labels, scores), expected, rtol=1e-5
    )


@pytest.mark.parametrize("name", ["Accuracy", "Mean", "Sum"])
def test_metrics_without_a_meaning_for_probabilities_are_refused(name):
    with pytest.raises(ValueError, match="BestClassAccuracy"):
        ProbabilityMetric(getattr(keras.metrics, name)())


@pytest.mark.slow
@pytest.mark.parametrize("alias", ["accuracy", "acc"])
@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("form", ["integers", "column", "one-hot"])
def test_the_word_accuracy(alias, num_classes, form):
    labels, scores, _ = example(num_classes)
    y = {
        "integers": labels,
        "column": labels[:, None],
        "one-hot": np.eye(num_classes, dtype="float32")[labels],
    }[form]
    width = scores.shape[-1]
    model = keras.Sequential(
        [keras.Input((width,)), keras.layers.Activation("linear")]
    )
    model.compile(loss=keras_halo.HALOLoss(), metrics=[alias])
    results = model.evaluate(scores, y, verbose=0, return_dict=True)
    np.testing.assert_allclose(
        results[alias], of_argmax(labels, scores), rtol=1e-6
    )
