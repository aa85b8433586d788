"""A trained classifier gets a HALO head and keeps what it knows."""

import warnings

import keras
import numpy as np
import pytest
from helpers import to_numpy

import keras_halo
from keras_halo import HALODense, HALOLoss, HALOSoftmax, convert_head

pytestmark = pytest.mark.slow

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
    model.compile(keras.optimizers.Adam(5e-3), loss)
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

    def variances(model, scaled=False):
        """Of the residuals, along the axes of their covariance."""
        embedder = keras.Model(model.inputs[0], model.layers[-1].input)
        embeddings = embedder.predict(x, verbose=0)
        means = np.array([embeddings[y == k].mean(axis=0) for k in range(10)])
        residuals = embeddings - means[y]
        if scaled:
            residuals /= residuals.std(axis=0)
        return np.linalg.eigvalsh(np.cov(residuals.T))

    assert variances(model).max() > 10.0 * variances(model).min()
    uneven = variances(model, scaled=True)
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
    shrunk = 0.9 * covariance + 0.1 * np.diag(np.diag(covariance))

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


SPREADS = [1.0, 1e2, 1e4]


@pytest.mark.parametrize("spread", SPREADS)
def test_units_of_features_do_not_matter(spread):
    discriminant = pytest.importorskip("sklearn.discriminant_analysis")
    rng = np.random.default_rng(0)
    y = rng.permutation(np.arange(600) % 4)
    factors = rng.normal(size=(12, 12))
    x = rng.normal(size=(4, 12))[y] * 2.0 + rng.normal(size=(600, 12)) @ factors
    x = (x * np.geomspace(1.0, spread, 12)).astype("float32")
    model = keras.Sequential([keras.Input((12,)), keras.layers.Dense(4)])
    with warnings.catch_warnings():
        # The given head was not trained with these units.
        warnings.simplefilter("ignore")
        scores = convert_head(model, x, y, verbose=0).predict(x, verbose=0)
    oracle = discriminant.LinearDiscriminantAnalysis(priors=np.full(4, 0.25))
    expected = oracle.fit(x, y).score(x, y)
    assert np.mean(scores[:, :4].argmax(-1) == y) > expected - 0.03


def test_a_head_that_knows_less_than_the_old_one_says_so():
    # A threshold tells these classes apart, but a fifth of one of them lies so
    # far off that the mean and the variance say little.
    rng = np.random.default_rng(0)
    y = rng.permutation(np.arange(400) % 2)
    x = rng.normal(size=(400, 2)).astype("float32")
    x[:, 0] = np.where(y == 1, 0.3, -0.3)
    x[(y == 1) & (np.arange(400) % 5 == 0), 0] = 60.0
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    model.set_weights([np.array([[-1.0, 1.0], [0, 0]]), np.zeros(2)])
    with pytest.warns(UserWarning, match="the given one in 100.0%"):
        convert_head(model, x, y, verbose=0)


ENDINGS = {
    "dense": lambda x: keras.layers.Dense(3, name="logits")(x),
    "operation": lambda x: keras.ops.softmax(
        keras.layers.Dense(3, name="logits")(x)
    ),
    "identity": lambda x: keras.layers.Identity()(
        keras.layers.Dense(3, name="logits")(x)
    ),
    "dropout": lambda x: keras.layers.Dropout(0.3)(
        keras.layers.Dense(3, name="logits")(x)
    ),
    "convolution": lambda x: keras.layers.Activation("softmax")(
        keras.layers.Flatten()(
            keras.layers.Conv2D(3, 1, name="logits")(
                keras.layers.Dropout(0.2)(keras.layers.Reshape((1, 1, 8))(x))
            )
        )
    ),
    "reshaped convolution": lambda x: keras.layers.Softmax()(
        keras.layers.Reshape((3,))(
            keras.layers.Conv2D(3, 1, use_bias=False, name="logits")(
                keras.layers.Reshape((1, 1, 8))(x)
            )
        )
    ),
    "two shapes": lambda x: keras.layers.Flatten()(
        keras.layers.Reshape((1, 3))(keras.layers.Dense(3, name="logits")(x))
    ),
    "three shapes": lambda x: keras.layers.Softmax(axis=1)(
        keras.layers.Reshape((3,))(
            keras.layers.Softmax(axis=2)(
                keras.layers.Reshape((1, 3))(
                    keras.layers.Flatten()(
                        keras.layers.Dense(3, name="logits")(x)
                    )
                )
            )
        )
    ),
    "convolution over time": lambda x: keras.layers.Reshape((3,))(
        keras.layers.Conv1D(3, 1, name="logits")(
            keras.layers.Reshape((1, 8))(x)
        )
    ),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_is_equal_to_a_dense_converts_like_it(ending):
    rng = np.random.default_rng(0)
    y = np.arange(90) % 3
    x = rng.normal(size=(90, 8)).astype("float32")
    x[np.arange(90), y] += 5.0
    inputs = keras.Input((8,))
    model = keras.Model(inputs, ENDINGS[ending](inputs))
    kernel = np.zeros((8, 3))
    kernel[range(3), range(3)] = 1.0
    layer = model.get_layer("logits")
    layer.set_weights(
        [
            kernel.reshape(w.shape) if len(w.shape) > 1 else np.zeros(3)
            for w in layer.weights
        ]
    )
    head_free = keras.Model(inputs, keras.layers.Identity()(inputs))
    expected = convert_head(head_free, x, y, units=3, verbose=0)
    converted = convert_head(model, x, y, verbose=0)
    assert converted.output_shape == (None, 9)
    np.testing.assert_allclose(
        converted.predict(x, verbose=0),
        expected.predict(x, verbose=0),
        rtol=1e-3,
        atol=1e-3,
    )


def test_pixels_in_rows_keep_their_places():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, size=(20, 4, 5))
    x = (np.eye(6)[y] * 4 + rng.normal(size=(20, 4, 5, 6))).astype("float32")
    inputs = keras.Input((4, 5, 6))
    logits = keras.layers.Conv2D(3, 1)(inputs)
    model = keras.Model(inputs, keras.layers.Reshape((20, 3))(logits))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = convert_head(model, x, y.reshape(20, 20), verbose=0)
    labels = converted.predict(x, verbose=0)[..., :3].argmax(axis=-1)
    assert labels.shape == (20, 20)
    assert np.mean(labels == y.reshape(20, 20)) > 0.9


def test_features_that_do_not_vary_beyond_rounding_are_no_directions():
    rng = np.random.default_rng(0)
    y = np.arange(200) % 2
    x = rng.normal(size=(200, 4)).astype("float32")
    x[:, 0] += 6.0 * y
    # What a network that was hardly trained emits: one value and its rounding.
    x[:, 1] = np.float32(1000.0) + rng.integers(-1, 2, 200) * np.float32(6e-5)
    x[:, 2] = 0.0
    model = keras.Sequential([keras.Input((4,)), keras.layers.Identity()])
    converted = convert_head(model, x, y, units=2, verbose=0)
    kernel = converted.layers[-2].get_weights()[0]
    assert np.abs(kernel).max() < 10.0
    scores = converted.predict(x, verbose=0)
    assert np.isfinite(scores).all()
    assert np.mean(scores[:, :2].argmax(axis=-1) == y) > 0.97


def test_classes_that_lie_far_apart_stay_finite():
    rng = np.random.default_rng(0)
    y = np.arange(100) % 2
    x = rng.normal(size=(100, 3)).astype("float32")
    x[:, 0] = 1e8 * y + rng.normal(size=100)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Identity()])
    converted = convert_head(model, x, y, units=2, verbose=0)
    assert all(np.isfinite(w).all() for w in converted.get_weights())
    scores = converted.predict(x, verbose=0)
    assert np.isfinite(scores).all()
    np.testing.assert_array_equal(scores[:, :2].argmax(axis=-1), y)


class Rounding(keras.layers.Layer):
    """Changes features by what depends on the number of rows.

    As networks round: by the units of their largest values, not by those of the
    features, and otherwise in batches of another size.
    """

    def __init__(self, amount, **kwargs):
        super().__init__(**kwargs)
        self.amount = amount

    def call(self, inputs):
        rows = keras.ops.cast(keras.ops.shape(inputs)[0], "float32")
        noise = keras.ops.sin(37.0 * rows + 1e3 * inputs[:, :1])
        return inputs + noise * keras.ops.convert_to_tensor(
            np.array(self.amount, "float32")
        )


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_features_that_are_rounding_in_all_but_name_are_no_directions(
    batch_size,
):
    rng = np.random.default_rng(0)
    y = np.arange(90) % 2
    x = rng.normal(size=(90, 4)).astype("float32")
    x[:, 0] += 6.0 * y
    # Hundreds of units in the last place of these features themselves.
    x[:, 2:] = 1e-3
    model = keras.Sequential([keras.Input((4,)), Rounding([0, 0, 1e-7, 1e-8])])
    given = (model, x, y)
    converted = convert_head(*given, units=2, batch_size=batch_size, verbose=0)
    kernel = converted.layers[-2].get_weights()[0]
    assert np.abs(kernel).max() < 10.0
    scores = converted.predict(x, batch_size=32, verbose=0)
    np.testing.assert_allclose(
        scores, converted.predict(x, batch_size=7, verbose=0), rtol=1e-3
    )
    assert np.mean(scores[:, :2].argmax(axis=-1) == y) > 0.97
    x[:, :2] = 1e-3
    with pytest.raises(ValueError, match="the same to rounding"):
        convert_head(*given, units=2, batch_size=batch_size, verbose=0)


def test_noise_that_is_more_than_rounding_belongs_to_the_features():
    rng = np.random.default_rng(0)
    y = np.arange(90) % 2
    x = rng.normal(size=(90, 3)).astype("float32")
    x[:, 0] += 6.0 * y
    x[:, 2] *= 1e-4
    noisy = Rounding([0.3, 0.3, 0.0])
    model = keras.Sequential([keras.Input((3,)), noisy])
    converted = convert_head(model, x, y, units=2, verbose=0)
    # The scale of a feature is found however small it is beside the others.
    assert np.abs(converted.layers[-2].get_weights()[0][2]).max() > 5e3


def test_features_below_the_numbers_of_float32_are_no_directions():
    rng = np.random.default_rng(0)
    y = np.arange(90) % 2
    x = rng.normal(size=(90, 3)).astype("float32")
    x[:, 0] += 6.0 * y
    x[:, 2] = 1e-40 * rng.random(90)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Identity()])
    converted = convert_head(model, x, y, units=2, verbose=0)
    assert np.abs(converted.layers[-2].get_weights()[0]).max() < 10.0


@pytest.mark.parametrize("distance", [1e19, 1e20, 1e30])
def test_classes_too_far_apart_for_the_head_are_refused(distance):
    rng = np.random.default_rng(0)
    y = np.arange(100) % 2
    x = rng.normal(size=(100, 3)).astype("float32")
    x[:, 0] = distance * y
    model = keras.Sequential([keras.Input((3,)), keras.layers.Identity()])
    with pytest.raises(ValueError, match="infinite or NaN"):
        convert_head(model, x, y, units=2, verbose=0)


def test_what_is_wrong_with_arrays_shows_before_anything_is_predicted(trained):
    calls = []

    class Watched(keras.layers.Layer):
        def call(self, inputs):
            calls.append(inputs)
            return inputs

    inputs = keras.Input((8,))
    features = Watched()(inputs)
    classifier = keras.Model(inputs, keras.layers.Dense(3)(features))
    halo = keras.Model(inputs, HALODense(3)(features))
    x, y = np.ones((30, 8), "float32"), np.arange(30) % 3
    calls.clear()
    for tool, model in (
        (convert_head, classifier),
        (keras_halo.fit_class_gaussians, halo),
    ):
        for labels, weight, message in (
            (y + 1, None, r"integers in \[0, 3\)"),
            (np.minimum(y, 1), None, "Every class needs at least"),
            (y[:-1], None, "one label for every input"),
            (y, np.ones(29), "sample weights of `x`"),
            (y, np.where(y == 2, 0.0, 1.0), "Every class needs at least"),
        ):
            with pytest.raises(ValueError, match=message):
                tool(model, x, labels, sample_weight=weight, verbose=0)
    assert not calls


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "softmax",
    [
        lambda x: keras.ops.softmax(x, axis=0),
        lambda x: keras.ops.softmax(x, axis=1),
        lambda x: keras.ops.softmax(x, axis=None),
        lambda x: keras.ops.log_softmax(x, axis=-2),
        keras.layers.Softmax(axis=1),
        keras.layers.Softmax(axis=(1, 2)),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_softmax_over_positions_is_no_end_of_a_classifier(softmax, nested):
    inputs = keras.Input((5, 4))
    model = keras.Model(inputs, softmax(keras.layers.Dense(3)(inputs)))
    if nested:
        outer = keras.Input((5, 4))
        model = keras.Model(outer, model(outer))
    with pytest.raises(ValueError, match="over the classes"):
        convert_head(model, np.ones((20, 5, 4)), np.ones((20, 5)), verbose=0)


def test_what_cannot_be_converted_is_refused(digits, trained):
    x, y = (part[:300] for part in digits)
    inputs = keras.Input((64,))
    hidden = trained.layers[0](inputs)
    dense = keras.layers.Dense(10)
    refused = {
        "must end in `keras.layers.Dense`.*`units=`": keras.Model(
            inputs, keras.layers.LayerNormalization()(dense(hidden))
        ),
        "its strides and its groups": keras.Model(
            inputs,
            keras.layers.Conv1D(2, 3)(keras.layers.Reshape((8, 4))(hidden)),
        ),
        "leave classes on the last axis": keras.Model(
            inputs,
            keras.layers.Flatten()(
                keras.layers.Conv1D(2, 1)(keras.layers.Reshape((8, 4))(hidden))
            ),
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
    with pytest.raises(ValueError, match="at least 1 sample.*3: 0"):
        convert_head(trained, x[y != 3], y[y != 3])
    # Not behind a ReLU, which turns NaN to zero on TensorFlow.
    linear = keras.Sequential([keras.Input((64,)), keras.layers.Dense(10)])
    with pytest.raises(ValueError, match="must be finite"):
        convert_head(linear, np.full_like(x, np.nan), y)
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        convert_head(trained, x, y, label_smoothing=2.0)
    with pytest.raises(ValueError, match="the same to rounding"):
        convert_head(linear, np.ones_like(x), y)
    for tool in (convert_head, keras_halo.add_abstention):
        with pytest.raises(ValueError, match="features as they are"):
            tool(trained, x, y, embedding_dim=16)
    with pytest.raises(ValueError, match="how many classes there are, 10"):
        keras_halo.add_abstention(trained, x, y, units=3)


def _guard(model, x, y, verbose):
    rule = keras_halo.rejection.CoverageRule(0.9)
    return keras_halo.guard(model, rule.fit(model.predict(x, verbose=verbose)))


GRAPH_READERS = {
    convert_head: keras.layers.Dense,
    keras_halo.add_abstention: keras.layers.Dense,
    keras_halo.fit_class_gaussians: HALODense,
    keras_halo.collect_statistics: HALODense,
    _guard: HALODense,
}


@pytest.mark.parametrize("tool", GRAPH_READERS)
def test_a_preprocessor_that_is_left_behind_is_named(tool):
    class Task(keras.Model):
        """As those of KerasHub: a graph, and what comes before it."""

        def __init__(self):
            inputs = keras.Input((4,))
            features = keras.layers.Dense(8, activation="relu")(inputs)
            super().__init__(inputs, GRAPH_READERS[tool](3)(features))
            self.preprocessor = keras.layers.Rescaling(1 / 255.0)

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 4)).astype("float32"), np.arange(60) % 3
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tool(Task(), x, y, verbose=0)
    messages = [str(w.message) for w in caught]
    assert any("model.preprocessor(x)" in message for message in messages)


def test_networks_of_one_batch_size_are_converted():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(96, 3)).astype("float32"), np.arange(96) % 2
    x[:, 0] += 6.0 * y
    x[:, 2] *= 1e-4
    inputs = keras.Input(batch_shape=(32, 3))
    model = keras.Model(inputs, keras.layers.Identity()(inputs))
    converted = convert_head(model, x, y, units=2, verbose=0)
    scores = converted.predict(x, verbose=0)
    assert np.mean(scores[:, :2].argmax(axis=-1) == y) > 0.97
