"""A trained classifier gets a HALO head and keeps what it knows."""

import keras
import numpy as np
import pytest
from helpers import to_numpy
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_halo
from keras_halo import HALODense, HALOLoss, HALOSoftmax, convert_head
from keras_halo.workflows.convert_head import (
    ClassMoments,
    oracle_shrinkage,
    whitening,
)

NUM_TRAINING = 1200


@pytest.fixture(scope="module")
def digits():
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_digits(return_X_y=True)
    return (x / 16.0).astype("float32"), y


def _network(*head, loss="sparse_categorical_crossentropy"):
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(32, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.1),
            *head,
        ]
    )
    model.compile(keras.optimizers.Adam(5e-3), loss, metrics=["accuracy"])
    return model


@pytest.fixture(scope="module")
def trained(digits):
    x, y = digits
    keras.utils.set_random_seed(0)
    model = _network(keras.layers.Dense(10, activation="softmax"))
    model.fit(x[:NUM_TRAINING], y[:NUM_TRAINING], epochs=8, verbose=0)
    return model


def _accuracy(model, x, y):
    """Accuracy of the best class, which is what both models can name."""
    scores = model.predict(x, verbose=0)
    return np.mean(scores[:, :10].argmax(axis=-1) == y)


def test_converted_and_fine_tuned_models_are_as_accurate(
    digits, trained, tmp_path
):
    x, y = digits
    train, test = slice(NUM_TRAINING), slice(NUM_TRAINING, None)
    before = trained.predict(x[test], verbose=0)
    original = _accuracy(trained, x[test], y[test])
    assert original > 0.9

    converted = convert_head(trained, x[train], y[train])
    assert isinstance(converted.layers[-1], HALODense)
    np.testing.assert_array_equal(trained.predict(x[test], verbose=0), before)
    # The backbone is the same one, not a copy.
    assert converted.layers[1] is trained.layers[0]

    embedder = keras.Model(trained.inputs[0], trained.layers[-2].output)
    known = embedder.predict(x[train], verbose=0)
    means = np.array([known[y[train] == k].mean(axis=0) for k in range(10)])
    unseen = embedder.predict(x[test], verbose=0)
    distances = np.square(unseen[:, None] - means).sum(axis=-1)
    nearest_mean = np.mean(distances.argmin(axis=-1) == y[test])
    at_once = _accuracy(converted, x[test], y[test])
    assert at_once >= nearest_mean - 0.01
    assert at_once >= original - 0.02

    predictions = keras_halo.decode_predictions(
        converted.predict(x[train], verbose=0)
    )
    assert predictions.abstained.mean() < 0.05
    own = predictions.squared_radius[np.arange(NUM_TRAINING), y[train]]
    assert own.mean() == pytest.approx(1.0, rel=1e-3)

    # A copy, so that the other tests find the backbone as it was trained.
    weights = converted.get_weights()
    converted = keras.models.clone_model(converted)
    converted.set_weights(weights)
    converted.compile(
        keras.optimizers.Adam(1e-3), HALOLoss(), metrics=["accuracy"]
    )
    converted.fit(x[train], y[train], epochs=4, verbose=0)
    assert _accuracy(converted, x[test], y[test]) >= original - 0.01

    converted.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(
        loaded.predict(x[test], verbose=0),
        converted.predict(x[test], verbose=0),
    )


def test_a_halo_head_gives_way_to_one_whose_residuals_are_round(digits):
    x, y = (part[:NUM_TRAINING] for part in digits)
    test = slice(NUM_TRAINING, None)
    keras.utils.set_random_seed(0)
    model = _network(
        keras.layers.Dense(16),
        HALODense(10, embedding_dim=None, name="head"),
        loss=HALOLoss(),
    )
    model.fit(x, y, epochs=8, verbose=0)
    before = model.predict(digits[0][test], verbose=0)

    converted = convert_head(model, x, y, name="head")

    def variances(model):
        """Of the residuals, along the axes of their covariance."""
        embedder = keras.Model(model.inputs[0], model.layers[-1].input)
        embeddings = embedder.predict(x, verbose=0)
        means = np.array([embeddings[y == k].mean(axis=0) for k in range(10)])
        return np.linalg.eigvalsh(np.cov((embeddings - means[y]).T))

    uneven = variances(model)
    assert uneven.max() > 10.0 * uneven.min()
    # Alike but for the tenth that is replaced by the average.
    expected = uneven / (0.9 * uneven + 0.1 * uneven.mean())
    np.testing.assert_allclose(
        variances(converted), np.sort(expected / expected.mean()), rtol=0.02
    )
    assert _accuracy(converted, digits[0][test], digits[1][test]) >= (
        np.mean(before[:, :10].argmax(axis=-1) == digits[1][test]) - 0.03
    )
    converted.compile(keras.optimizers.Adam(1e-3), HALOLoss())
    assert np.isfinite(converted.train_on_batch(x[:32], y[:32]))


def test_a_head_with_an_embedding_of_its_own_is_converted(digits):
    x, y = (part[:NUM_TRAINING] for part in digits)
    keras.utils.set_random_seed(0)
    model = _network(HALODense(10, embedding_dim=24), loss=HALOLoss())
    model.fit(x, y, epochs=8, verbose=0)
    weights = model.get_weights()
    converted = convert_head(model, x, y)
    assert converted.layers[-1].centroids.shape[-1] == 24
    assert _accuracy(converted, x, y) >= _accuracy(model, x, y) - 0.03
    converted.compile(keras.optimizers.Adam(1e-2), HALOLoss())
    converted.train_on_batch(x[:32], y[:32])
    # The embedding was copied: the given model stays as it is.
    for before, after in zip(
        weights[-2:], model.get_weights()[-2:], strict=True
    ):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("abstain_rate", [0.01, 0.2])
def test_the_biases_of_a_converted_head_are_those_of_its_data(
    digits, trained, abstain_rate
):
    x, y = (part[:NUM_TRAINING] for part in digits)
    converted = convert_head(trained, x, y, abstain_rate=abstain_rate)
    answers = converted.predict(x, verbose=0)[:, :11].argmax(axis=-1)
    assert np.mean(answers == 10) <= abstain_rate
    far = 30.0 * np.random.default_rng(0).normal(size=(200, *x.shape[1:]))
    answers = converted.predict(far, verbose=0)[:, :11].argmax(axis=-1)
    assert np.mean(answers == 10) > 0.95


def test_decisions_are_those_of_discriminant_analysis(digits, trained):
    """Of the same shrunk covariance, written with scikit-learn's solver."""
    discriminant = pytest.importorskip("sklearn.discriminant_analysis")
    x, y = digits
    x, y = x[:NUM_TRAINING], y[:NUM_TRAINING]
    embedder = keras.Model(trained.inputs[0], trained.layers[-2].output)
    known = embedder.predict(x, verbose=0).astype("float64")
    covariance = np.mean(
        [
            np.outer(r, r)
            for k in range(10)
            for r in known[y == k] - known[y == k].mean(axis=0)
        ],
        axis=0,
    )
    shrunk = 0.9 * covariance + 0.1 * np.trace(covariance) / 32 * np.eye(32)

    class Given:
        def fit(self, residuals):
            # It is asked once for every class; each is given the pooled one.
            self.covariance_ = shrunk
            return self

    from sklearn.base import BaseEstimator

    estimator = type("Estimator", (Given, BaseEstimator), {})()
    oracle = discriminant.LinearDiscriminantAnalysis(
        solver="lsqr", covariance_estimator=estimator, priors=np.full(10, 0.1)
    ).fit(known, y)
    scores = convert_head(trained, x, y).predict(x, verbose=0)
    assert np.mean(scores[:, :10].argmax(-1) == oracle.predict(known)) > 0.998


@pytest.mark.parametrize("head", ["logits", "activation", "softmax", "nested"])
def test_every_way_to_end_a_classifier_converts_to_the_same_model(
    digits, trained, head
):
    x, y = (part[:300] for part in digits)
    dense = keras.layers.Dense(
        10, activation=None if head != "nested" else "softmax"
    )
    after = {
        "activation": [keras.layers.Activation("softmax")],
        "softmax": [keras.layers.Softmax()],
    }
    model = keras.Sequential(
        [*trained.layers[:-1], dense, *after.get(head, [])]
    )
    model.build((None, 64))
    if head == "nested":
        inputs = keras.Input((64,))
        model = keras.Model(inputs, model(inputs))
    expected = convert_head(trained, x, y)
    np.testing.assert_allclose(
        convert_head(model, x, y).predict(x, verbose=0)[:, :11],
        expected.predict(x, verbose=0)[:, :11],
        rtol=1e-3,
        atol=1e-3,
    )


@pytest.mark.parametrize("labels", ["column", "one_hot", "dataset"])
def test_labels_of_every_kind_give_the_same_head(digits, trained, labels):
    x, y = (part[:300] for part in digits)
    expected = convert_head(trained, x, y).layers[-1].centroids
    if labels == "dataset":

        class Batches(keras.utils.PyDataset):
            def __len__(self):
                return 3

            def __getitem__(self, i):
                part = slice(100 * i, 100 * i + 100)
                return x[part], y[part]

        converted = convert_head(trained, Batches())
    else:
        given_labels = y[:, None] if labels == "column" else np.eye(10)[y]
        converted = convert_head(trained, x, given_labels)
    np.testing.assert_allclose(
        to_numpy(converted.layers[-1].centroids),
        to_numpy(expected),
        rtol=1e-3,
        atol=1e-3,
    )


def test_a_sigmoid_unit_becomes_two_classes_and_goes_back(digits):
    x, y = digits
    odd = (y % 2).astype("float32")
    model = _network(
        keras.layers.Dense(1, activation="sigmoid"), loss="binary_crossentropy"
    )
    model.fit(x[:NUM_TRAINING], odd[:NUM_TRAINING], epochs=8, verbose=0)
    converted = convert_head(model, x[:NUM_TRAINING], odd[:NUM_TRAINING, None])
    assert converted.output_shape == (None, 8)
    probabilities = HALOSoftmax(abstain=False)(converted.output)
    plain = keras.Model(converted.inputs[0], probabilities[..., 1:])
    unseen, expected = x[NUM_TRAINING:], odd[NUM_TRAINING:] == 1
    one = plain.predict(unseen, verbose=0)
    assert one.shape == (len(unseen), 1)
    assert np.all((one >= 0) & (one <= 1))
    original = np.mean(
        (model.predict(unseen, verbose=0)[:, 0] > 0.5) == expected
    )
    assert np.mean((one[:, 0] > 0.5) == expected) >= original - 0.02


def test_token_classifiers_convert():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, size=(40, 5))
    x = (np.eye(6)[labels] * 3 + rng.normal(size=(40, 5, 6))).astype("float32")
    model = keras.Sequential([keras.Input((5, 6)), keras.layers.Dense(3)])
    scores = convert_head(model, x, labels).predict(x, verbose=0)
    assert scores.shape == (40, 5, 9)
    assert np.mean(scores[..., :3].argmax(-1) == labels) > 0.9


def test_padding_has_no_part_in_the_head():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, size=(40, 5))
    x = (np.eye(6)[y] * 3 + rng.normal(size=(40, 5, 6))).astype("float32")
    model = keras.Sequential([keras.Input((5, 6)), keras.layers.Dense(3)])
    expected = convert_head(model, x[:30], y[:30]).get_weights()
    weight = np.ones((40, 5))
    weight[30:] = 0.0
    y[30:] = -1
    for converted in (
        convert_head(model, x, y, sample_weight=weight),
        convert_head(model, (x, y, weight), batch_size=7),
    ):
        for a, b in zip(converted.get_weights(), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="belongs to arrays"):
        convert_head(model, (x, y), sample_weight=weight)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    batches=st.integers(1, 4),
    offset=st.sampled_from([0.0, 1e4]),
)
def test_moments_do_not_depend_on_the_batches(seed, batches, offset):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(24, 3)) + offset
    y = rng.permutation(np.arange(24) % 3)
    moments = ClassMoments(3, 3)
    for part in np.array_split(np.arange(24), batches):
        moments.update(x[part], y[part])
    means, covariance = moments.result()
    expected = np.array([x[y == k].mean(axis=0) for k in range(3)])
    residuals = x - expected[y]
    np.testing.assert_allclose(means, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(
        covariance, residuals.T @ residuals / 24, atol=1e-10
    )


def test_shrinkage_is_that_of_scikit_learn_up_to_its_terms_of_order_one_by_d():
    covariance_module = pytest.importorskip("sklearn.covariance")
    x = np.random.default_rng(0).normal(size=(60, 40)) * np.arange(1, 41)
    x -= x.mean(axis=0)
    _, expected = covariance_module.oas(x, assume_centered=True)
    assert oracle_shrinkage(x.T @ x / 60, 60) == pytest.approx(
        expected, rel=0.05
    )


def test_whitening_survives_what_does_not_vary():
    means = np.array([[1.0, 0.0, 2.0], [3.0, 0.0, 2.0]])
    for covariance in (np.zeros((3, 3)), np.diag([1.0, 0.0, 0.0])):
        transform, center = whitening(means, covariance, 50)
        assert np.isfinite(transform).all() and np.abs(transform).max() < 10
        np.testing.assert_array_equal(center, [2.0, 0.0, 2.0])
    transform, _ = whitening(means[:1], np.zeros((3, 3)), 1)
    np.testing.assert_array_equal(transform, np.eye(3))


def test_what_cannot_be_converted_is_refused(digits, trained):
    x, y = (part[:300] for part in digits)
    inputs = keras.Input((64,))
    hidden = trained.layers[0](inputs)
    dense = keras.layers.Dense(10)
    refused = {
        "must end in `keras.layers.Dense`": keras.Model(
            inputs, keras.layers.Dropout(0.1)(dense(hidden))
        ),
        "softmax, sigmoid or no": keras.Model(inputs, hidden),
        "one output": keras.Model(inputs, [hidden, dense(hidden)]),
        "built functional": keras.Sequential([keras.layers.Dense(3)]),
        "at least 2": keras.Model(
            inputs, keras.layers.Dense(10)(keras.layers.Dense(1)(hidden))
        ),
    }
    for message, model in refused.items():
        with pytest.raises(ValueError, match=message):
            convert_head(model, x, y)
    with pytest.raises(ValueError, match="Labels are missing"):
        convert_head(trained, x)
    with pytest.raises(ValueError, match=r"integers in \[0, 10\)"):
        convert_head(trained, x, y + 1)
    with pytest.raises(ValueError, match="one sample.*none of class 3"):
        convert_head(trained, x[y != 3], y[y != 3])
    # Not behind a ReLU, which turns NaN to zero on TensorFlow.
    linear = keras.Sequential([keras.Input((64,)), keras.layers.Dense(10)])
    with pytest.raises(ValueError, match="must be finite"):
        convert_head(linear, np.full_like(x, np.nan), y)
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        convert_head(trained, x, y, label_smoothing=2.0)
