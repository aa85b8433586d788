"""A HALO classifier where scikit-learn expects one of its own."""

import warnings

import keras
import numpy as np
import pytest
from helpers import naive_softmax

import keras_halo
from keras_halo import HALODense, HALOLoss, SKLearnClassifier

pytest.importorskip("sklearn", reason="the wrapper is of scikit-learn")

from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import cross_val_predict, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

pytestmark = pytest.mark.slow

FIT = {"epochs": 12, "batch_size": 10, "verbose": 0}
NAMES = np.array(["right", "up", "left"])


def make_model(X, y, learning_rate=0.03, units=None):
    inputs = keras.Input(X.shape[1:])
    x = keras.layers.Dense(8, activation="relu")(inputs)
    model = keras.Model(inputs, HALODense(units or y.shape[1])(x))
    model.compile(keras.optimizers.Adam(learning_rate), loss=HALOLoss())
    return model


def data(num_classes=3, names=NAMES):
    rng = np.random.default_rng(0)
    y = np.arange(60) % num_classes
    centers = np.array([[3.0, 0], [0, 3.0], [-3.0, -3.0]])
    x = centers[y] + 0.3 * rng.normal(size=(60, 2))
    return x.astype("float32"), names[y]


def classifier(**arguments):
    return SKLearnClassifier(make_model, fit_kwargs=dict(FIT), **arguments)


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("names", [NAMES, np.array([7, 3, 5])])
def test_labels_probabilities_and_score(num_classes, names):
    x, y = data(num_classes, names)
    fitted = classifier().fit(x, y)
    scores = fitted.model_.predict(x, verbose=0)
    classes = np.unique(y)
    np.testing.assert_array_equal(fitted.classes_, classes)
    probabilities = fitted.predict_proba(x)
    expected = naive_softmax(scores[:, :num_classes].astype("float64"))
    np.testing.assert_allclose(probabilities, expected, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(probabilities.sum(axis=-1), 1.0, rtol=1e-12)
    labels = fitted.predict(x)
    assert labels.shape == y.shape
    np.testing.assert_array_equal(labels, classes[probabilities.argmax(-1)])
    assert fitted.score(x, y) == np.mean(labels == y) > 0.9
    decision = fitted.decision_function(x)
    if num_classes == 2:
        np.testing.assert_array_equal(decision > 0, labels == classes[1])
    else:
        np.testing.assert_array_equal(classes[decision.argmax(-1)], labels)


@pytest.mark.parametrize(
    ("names", "label"),
    [
        (NAMES, "I don't know"),
        (np.array([7, 3, 5]), -1),
        # What does not fit into the dtype of the labels.
        (np.array([0, 3, 5], "uint8"), -1),
        (np.array([0, 3, 5], "uint8"), 256),
        (np.array([0, 3, 5], "int8"), 999),
    ],
)
def test_abstaining_has_a_label_where_one_is_given(names, label):
    x, y = data(names=names)
    fitted = classifier(abstain_label=label).fit(x, y)
    strange = np.concatenate(
        [
            x,
            40.0
            * np.random.default_rng(1).normal(size=(40, 2)).astype("float32"),
            np.zeros((1, 2), "float32"),
        ]
    )
    labels = fitted.predict(strange)
    decided = keras_halo.decode_predictions(
        fitted.model_.predict(strange, verbose=0)
    ).labels
    names = fitted.classes_.tolist()
    expected = [label if k < 0 else names[k] for k in decided.tolist()]
    assert labels.tolist() == expected
    assert labels.dtype.kind in ("i" if y.dtype.kind == "u" else y.dtype.kind)
    # All of the mass is on classes whether or not the model abstains.
    np.testing.assert_allclose(
        fitted.predict_proba(strange).sum(axis=-1), 1.0, rtol=1e-12
    )
    fitted.model_.layers[-1].abstain_bias.assign(1e6)
    assert (fitted.predict(x) == label).all()
    assert fitted.score(x, y) == 0.0


def test_pipelines_cross_validation_and_scorers():
    x, y = data()
    pipeline = make_pipeline(StandardScaler(), classifier())
    assert cross_val_score(pipeline, x, y, cv=2).min() > 0.8
    for scoring in ("neg_log_loss", "roc_auc_ovr"):
        score = cross_val_score(pipeline, x, y, cv=2, scoring=scoring)
        assert np.isfinite(score).all()
    probabilities = cross_val_predict(
        pipeline, x, y, cv=2, method="predict_proba"
    )
    assert probabilities.shape == (60, 3)


def test_what_calibrates_classifiers_takes_it():
    x, y = data()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        calibrated = CalibratedClassifierCV(classifier(), cv=2).fit(x, y)
    assert calibrated.score(x, y) > 0.8


def test_a_clone_keeps_every_argument():
    first = SKLearnClassifier(
        make_model,
        model_kwargs={"learning_rate": 0.1},
        fit_kwargs={"epochs": 3},
        abstain_label=-1,
    )
    copy = clone(first)
    assert copy.get_params() == first.get_params()
    copy.set_params(fit_kwargs={"epochs": 1, "verbose": 0}, abstain_label=None)
    x, y = data(names=np.array([7, 3, 5]))
    copy.fit(x, y, epochs=2)
    assert len(copy.history_.epoch) == 2
    # An argument of `fit` is for that call alone.
    assert copy.fit_kwargs == {"epochs": 1, "verbose": 0}
    assert first.get_params()["fit_kwargs"] == {"epochs": 3}


def test_a_compiled_model_is_cloned_before_it_is_fitted():
    x, y = data()
    model = make_model(x, np.eye(3)[:1])
    before = model.get_weights()
    fitted = SKLearnClassifier(model, fit_kwargs=dict(FIT)).fit(x, y)
    assert fitted.score(x, y) > 0.8
    for weight, expected in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, expected)


@pytest.mark.parametrize(
    ("names", "label"),
    [
        (NAMES, "up"),
        (NAMES, -1),
        (np.array([7, 3, 5]), 3),
        (np.array([7, 3, 5]), "none"),
    ],
)
def test_an_abstain_label_that_cannot_be_told_is_refused(names, label):
    x, y = data(names=names)
    unfitted = classifier(abstain_label=label)
    with pytest.raises(ValueError, match="`abstain_label` must be of the kind"):
        unfitted.fit(x, y)
    assert not hasattr(unfitted, "model_")


def test_other_outputs_are_refused():
    x, y = data()
    fitted = classifier().fit(x, y)
    fitted.classes_ = fitted.classes_[:2]
    with pytest.raises(ValueError, match="packed scores of 2 classes"):
        fitted.predict(x)
    softmax = keras.Sequential(
        [keras.Input((2,)), keras.layers.Dense(9, activation="softmax")]
    )
    fitted.model_ = softmax
    with pytest.raises(ValueError, match="the output of the model"):
        fitted.predict_proba(x)


def test_it_predicts_after_it_was_fitted_and_on_the_same_features():
    x, y = data()
    unfitted = classifier()
    with pytest.raises(NotFittedError, match="not fitted"):
        unfitted.predict_proba(x)
    fitted = unfitted.fit(x, y)
    with pytest.raises(ValueError, match="is expecting 2 features"):
        fitted.predict(x[:, :1])
