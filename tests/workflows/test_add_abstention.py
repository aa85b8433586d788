"""Any trained classifier learns to say that it does not know."""

import re
import tracemalloc
import warnings

import keras
import numpy as np
import pytest
from keras import layers

import keras_halo
from keras_halo import add_abstention
from keras_halo.metrics import auroc
from keras_halo.ops import packing
from keras_halo.workflows.add_abstention import (
    _best_count,
    _targets,
    _with_background,
    principal_components,
)
from keras_halo.workflows.blocks import find_blocks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def digits():
    datasets = pytest.importorskip("sklearn.datasets")
    data = datasets.load_digits()
    return (data.images[..., None] / 16.0).astype("float32"), data.target


def small_convnet():
    inputs = keras.Input((8, 8, 1))
    x = layers.Conv2D(16, 3, padding="same", activation="relu")(inputs)
    x = layers.MaxPooling2D()(x)
    x = layers.Conv2D(32, 3, padding="same", activation="relu")(x)
    x = layers.Dropout(0.2)(layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, layers.Dense(10, activation="softmax")(x))


def small_perceptron():
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.BatchNormalization(),
            layers.Dense(32, activation="relu"),
            layers.Dense(10),
            layers.Softmax(),
        ]
    )


def small_lstm():
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Reshape((8, 8)),
            layers.LSTM(32, return_sequences=True),
            layers.LSTM(32),
            layers.Dense(10, activation="softmax"),
        ]
    )


def small_transformer():
    inputs = keras.Input((8, 8, 1))
    x = layers.Dense(24)(layers.Reshape((8, 8))(inputs))
    for _ in range(2):
        x = layers.Add()([x, layers.MultiHeadAttention(2, 12)(x, x)])
        y = layers.Dense(48, activation="relu")(layers.LayerNormalization()(x))
        x = layers.Add()([x, layers.Dense(24)(y)])
    x = layers.Flatten()(layers.LayerNormalization()(x))
    return keras.Model(inputs, layers.Dense(10, activation="softmax")(x))


def pretrained_inside():
    """A backbone that is a model by itself, as in transfer learning."""
    inputs = keras.Input((8, 8, 1))
    x = layers.Conv2D(16, 3, padding="same", activation="relu")(inputs)
    x = layers.Conv2D(32, 3, strides=2, activation="relu")(x)
    backbone = keras.Model(inputs, x, name="backbone")
    outer = keras.Input((8, 8, 1))
    x = layers.GlobalAveragePooling2D()(backbone(outer))
    return keras.Model(outer, layers.Dense(10, activation="softmax")(x))


def pretrained_below():
    """A backbone whose features other layers read before the last one."""
    inputs = keras.Input((8, 8, 1))
    x = layers.Conv2D(16, 3, padding="same", activation="relu")(inputs)
    backbone = keras.Model(
        inputs, layers.Conv2D(32, 3, strides=2, activation="relu")(x)
    )
    outer = keras.Input((8, 8, 1))
    x = layers.GlobalAveragePooling2D()(backbone(outer))
    x = layers.Dense(48, activation="relu")(x) * 2.0
    return keras.Model(outer, layers.Dense(10)(layers.Dropout(0.1)(x)))


def linear_classifier(num_features, units):
    """A classifier whose inputs are its features, in the layer `features`."""
    inputs = keras.Input((num_features,))
    features = layers.Identity(name="features")(inputs)
    return keras.Model(inputs, layers.Dense(units)(features))


NETWORKS = {
    function.__name__: function
    for function in (
        small_convnet,
        small_perceptron,
        small_lstm,
        small_transformer,
        pretrained_inside,
        pretrained_below,
    )
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_trained_classifier_learns_to_abstain(digits, name, tmp_path):
    x, y = digits
    train, test = slice(1300), slice(1300, None)
    keras.utils.set_random_seed(0)
    model = NETWORKS[name]()
    model.compile(
        keras.optimizers.Adam(5e-3),
        keras.losses.SparseCategoricalCrossentropy(
            from_logits=name == "pretrained_below"
        ),
    )
    model.fit(x[train], y[train], batch_size=100, epochs=12, verbose=0)
    answers = model.predict(x[test], verbose=0)
    weights = model.get_weights()
    flags = [layer.trainable for layer in model.layers]

    guarded = add_abstention(model, x[train], y[train], verbose=0)

    for before, after in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)
    assert flags == [layer.trainable for layer in model.layers]
    assert model.compiled
    scores = guarded.predict(x[test], verbose=0)
    answered = keras_halo.decode_predictions(scores)
    given = np.mean(answers.argmax(axis=-1) == y[test])
    right = np.mean(scores[:, :10].argmax(axis=-1) == y[test])
    assert given > 0.7
    assert right >= given - 0.002
    assert answered.abstained.mean() < 0.3
    noise = np.random.default_rng(0).normal(0.3, 1.0, size=(300, 8, 8, 1))
    noise = noise.astype("float32")
    area = auroc(
        keras_halo.ood_score(scores),
        keras_halo.ood_score(guarded.predict(noise, verbose=0)),
    )
    assert area > 0.95
    guarded.save(tmp_path / "guarded.keras")
    loaded = keras.saving.load_model(tmp_path / "guarded.keras")
    np.testing.assert_allclose(
        loaded.predict(x[test], verbose=0), scores, rtol=1e-5, atol=1e-5
    )


def test_blocks_are_where_something_ends(digits):
    shapes = {
        "small_convnet": [(8, 8, 16), (4, 4, 32)],
        "small_perceptron": [(64,), (32,)],
        "small_transformer": [*[(8, 24)] * 4, (192,)],
        "pretrained_inside": [(8, 8, 16), (3, 3, 32)],
        "pretrained_below": [(8, 8, 16), (3, 3, 32), (48,)],
    }
    for name, expected in shapes.items():
        model = NETWORKS[name]()
        features = keras_halo.workflows.last_layer.embeddings_before_head(
            model
        )[0]
        found = find_blocks(model, features)
        assert [block.shape[1:] for block in found] == expected, name


@pytest.mark.parametrize(
    "build",
    [
        lambda: keras.applications.MobileNetV2((32, 32, 3), 0.35, weights=None),
        lambda: keras.applications.ResNet50V2(
            input_shape=(32, 32, 3), weights=None
        ),
        lambda: keras.applications.DenseNet121(
            input_shape=(32, 32, 3), weights=None, classes=10
        ),
    ],
    ids=["MobileNetV2", "ResNet50V2", "DenseNet121"],
)
def test_blocks_of_keras_applications_are_their_stages(build):
    model = build()
    features = keras_halo.workflows.last_layer.embeddings_before_head(model)[0]
    found = find_blocks(model, features)
    sizes = [block.shape[1] for block in found if len(block.shape) == 4]
    assert 4 <= len(sizes) <= 6
    assert sizes == sorted(sizes, reverse=True)
    assert sum(block.shape[-1] for block in found) < 6000


def test_answers_of_the_given_model_are_learned_beside_the_labels():
    probabilities = np.array([[0.5, 0.5], [1.0, 0.0]])
    np.testing.assert_allclose(
        _targets(probabilities, np.array([0, 1])),
        [[0.875, 0.125], [0.25, 0.75]],
    )


@pytest.mark.parametrize(
    "units, activation",
    [(1, None), (1, "sigmoid"), (3, None), (3, "softmax"), (3, "sigmoid")],
)
def test_answers_are_read_off_the_last_layer(units, activation):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(units)])
    if activation is not None:
        model.add(layers.Activation(activation))
    x = np.random.default_rng(0).normal(size=(20, 4)).astype("float32")
    _, head = keras_halo.workflows.last_layer.embeddings_before_head(model)
    kernel, bias = head.linear_map()
    found = head.probabilities(x @ kernel + bias)
    if units == 1:
        outputs = keras.ops.convert_to_numpy(model(x))
        if activation is None:
            outputs = 1.0 / (1.0 + np.exp(-outputs))
        expected = np.concatenate([1.0 - outputs, outputs], axis=-1)
    else:
        expected = keras.ops.convert_to_numpy(model(x)).astype("float64")
        if activation is None:
            expected = np.exp(expected)
        expected /= expected.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_models_inside_of_one_are_read_and_saved(digits, tmp_path):
    x, y = digits
    inputs = keras.Input((8, 8, 1))
    tensor = inputs
    for channels in (4, 6, 8):
        stage = keras.Sequential(
            [
                keras.Input((*tensor.shape[1:],)),
                layers.Conv2D(channels, 3, activation="relu"),
            ]
        )
        tensor = stage(tensor)
    outputs = layers.Dense(10)(layers.GlobalAveragePooling2D()(tensor))
    model = keras.Model(inputs, outputs)
    guarded = add_abstention(model, x[:200], y[:200], epochs=0, verbose=0)
    scores = guarded.predict(x[:50], verbose=0)
    guarded.save(tmp_path / "guarded.keras")
    loaded = keras.saving.load_model(tmp_path / "guarded.keras")
    np.testing.assert_allclose(
        loaded.predict(x[:50], verbose=0), scores, rtol=1e-5, atol=1e-5
    )


def test_layers_can_be_named_and_many_features_are_reduced(digits):
    x, y = digits
    keras.utils.set_random_seed(0)
    model = small_convnet()
    first = model.layers[1]
    guarded = add_abstention(
        model,
        x[:300],
        y[:300],
        blocks=[first.name, model.layers[3].output],
        epochs=0,
        max_features=24,
        abstain_rate=0.05,
        verbose=0,
    )
    assert guarded.layers[-1].abstain_rate == 0.05
    joined = guarded.get_layer("halo_features").output.shape[-1]
    assert joined == 24
    # What the head learned from, and what speaks for the background alone.
    components = guarded.get_layer("halo_reduction").units
    assert guarded.layers[-2].units <= joined + components
    scores = guarded.predict(x[:300], verbose=0)
    assert np.mean(scores[:, :10].argmax(axis=-1) == y[:300]) > 0.7
    # Once more on top of itself: names stay apart.
    again = add_abstention(guarded, x[:300], y[:300], epochs=0, verbose=0)
    assert again.predict(x[:3], verbose=0).shape == (3, 16)


@pytest.mark.parametrize("constant", [False, True])
def test_components_beside_the_embedding_change_the_far_evidence_alone(
    constant,
):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(200, 10)).astype("float32")
    if constant:
        # Inputs of one length: there is nothing to tell them apart by.
        rows[:, :4] /= np.linalg.norm(rows[:, :4], axis=-1, keepdims=True)
    kernel = rng.normal(size=(10, 6)).astype("float32")
    bias = rng.normal(size=6).astype("float32")
    head = keras_halo.HALODense(3, embedding_dim=None)
    head.build((None, 6))
    head.assign_temperature(2.5)
    scores = keras.ops.convert_to_numpy(head(rows @ kernel + bias))
    wider = keras_halo.HALODense(3, embedding_dim=None)
    kernel, bias, wider = _with_background(
        kernel, bias, head, wider, scores, rows[:, :4]
    )

    old = packing.unpack(scores)
    new = packing.unpack(
        keras.ops.convert_to_numpy(
            wider((rows @ kernel + bias).astype("float32"))
        )
    )
    np.testing.assert_allclose(new.logits, old.logits, rtol=1e-3, atol=1e-4)
    best = old.logits.max(axis=-1)
    lengths = np.square(rows[:, :4]).sum(axis=-1)
    # As long as new inputs are.
    new_lengths = lengths / (1.0 - lengths / 200)
    spread = new_lengths.std()
    if constant:
        spread = 0.01 * new_lengths.mean()
    weight = 0.5 * best.std() / spread
    far = -0.5 * (new.temperature * new.squared_norm)[:, 0]
    expected = -0.5 * 2.5 * old.squared_norm[:, 0] - weight * lengths
    np.testing.assert_allclose(far, expected, rtol=1e-3)
    # A class is where its squared radii are one.
    radii = new.squared_norm[:, 0] - best / new.temperature[:, 0]
    radii += 2.0 * weight * (new_lengths - lengths) / new.temperature[:, 0]
    np.testing.assert_allclose(radii.mean(), 1.0, rtol=1e-3)
    # On the data it abstains as seldom as it should.
    assert np.mean(new.abstain_logit[:, 0] < best) > 0.9


def test_lengths_of_few_samples_are_those_of_new_inputs():
    """A third as many components as samples: the samples look all alike."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(2300, 100)).astype("float32")
    kernel, bias = principal_components(rows[:300], 100)
    components = rows @ kernel + bias
    features = rng.normal(size=(2300, 6)).astype("float32")
    joined = np.concatenate([components, features], axis=-1)
    head = keras_halo.HALODense(3, embedding_dim=None)
    head.build((None, 6))
    kernel, bias, wider = _with_background(
        np.eye(106)[:, 100:],
        np.zeros(6),
        head,
        keras_halo.HALODense(3, embedding_dim=None),
        keras.ops.convert_to_numpy(head(features[:300])),
        components[:300],
    )
    parts = packing.unpack(
        keras.ops.convert_to_numpy(
            wider((joined @ kernel + bias).astype("float32"))
        )
    )
    far = parts.logits.max(axis=-1, keepdims=True)
    far = (far - 0.5 * parts.temperature * parts.squared_norm)[300:]
    mean, variance = (
        keras.ops.convert_to_numpy(v)[1]
        for v in (wider.evidence_mean, wider.evidence_variance)
    )
    np.testing.assert_allclose(mean, far.mean(), atol=0.5 * far.std())
    np.testing.assert_allclose(np.sqrt(variance), far.std(), rtol=0.3)


def test_unknown_directions_are_seen_that_tell_no_classes_apart():
    """Features that say nothing of the classes say what is none of them."""
    rng = np.random.default_rng(0)
    y = np.arange(3000) % 4
    x = rng.normal(size=(3000, 128)).astype("float32")
    x[np.arange(3000), y] += 4.0
    model = linear_classifier(128, 4)
    kernel = np.zeros((128, 4))
    kernel[:4] = 4.0 * np.eye(4)
    model.layers[-1].set_weights([kernel, np.zeros(4)])
    unknown = x[:500].copy()
    unknown[:, 4:] *= 1.5
    areas = {}
    for rate in (None, 0.01):
        guarded = add_abstention(
            model, x, y, ["features"], epochs=0, abstain_rate=rate, verbose=0
        )
        known = guarded.predict(x[500:], verbose=0)
        areas[rate] = auroc(
            keras_halo.ood_score(known),
            keras_halo.ood_score(guarded.predict(unknown, verbose=0)),
        )
        if rate is None:
            logits = known[:, :4]
        else:
            np.testing.assert_allclose(
                known[:, :4], logits, rtol=1e-3, atol=5e-3
            )
    assert areas[None] < 0.8
    assert areas[0.01] > 0.95


def test_as_many_features_are_kept_as_help_with_new_samples():
    rng = np.random.default_rng(0)
    labels = np.arange(600) % 4
    # Four components tell the classes apart, the others are noise.
    rows = rng.normal(size=(600, 256))
    rows[np.arange(600), labels] += 3.0
    assert _best_count(rows, labels, 4) <= 64
    # All of them tell a little.
    centroids = rng.normal(size=(4, 256))
    rows = rng.normal(size=(6000, 256)) + 0.3 * centroids[np.arange(6000) % 4]
    assert _best_count(rows, np.arange(6000) % 4, 4) == 256
    # Too few samples of a class to hold any out.
    assert _best_count(rows[:4], np.arange(4), 4) == 256


def test_more_features_than_samples_are_not_memorised(digits):
    order = np.random.default_rng(0).permutation(1797)
    x, y = (values[order] for values in digits)
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same", activation="relu"),
            layers.Flatten(),
            layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile(
        keras.optimizers.Adam(3e-3), "sparse_categorical_crossentropy"
    )
    model.fit(x[:500], y[:500], epochs=20, verbose=0)
    guarded = add_abstention(model, x[:500], y[:500], verbose=0)
    given = model.predict(x[1000:], verbose=0).argmax(axis=-1)
    scores = guarded.predict(x[1000:], verbose=0)
    right = scores[:, :10].argmax(axis=-1) == y[1000:]
    assert right.mean() > np.mean(given == y[1000:]) - 0.02
    answered = ~keras_halo.decode_predictions(scores).abstained
    assert answered.mean() > 0.5


def test_a_sigmoid_unit_becomes_two_classes(digits):
    x, y = digits
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 1))
    hidden = layers.Dense(32, activation="relu")(layers.Flatten()(inputs))
    model = keras.Model(inputs, layers.Dense(1, activation="sigmoid")(hidden))
    model.compile(keras.optimizers.Adam(1e-2), "binary_crossentropy")
    model.fit(x[:500], y[:500] % 2, epochs=10, verbose=0)
    guarded = add_abstention(model, x[:500], y[:500] % 2, verbose=0)
    labels = guarded.predict(x[:500], verbose=0)[:, :2].argmax(axis=-1)
    assert np.mean(labels == y[:500] % 2) > 0.9


def test_principal_components_are_those_of_scikit_learn():
    decomposition = pytest.importorskip("sklearn.decomposition")
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(200, 30)) @ np.diag(np.geomspace(1, 1e-3, 30))
    rows = (rows @ rng.normal(size=(30, 30))).astype("float32")
    kernel, bias = principal_components(rows, 4)
    scaled = (rows - rows.mean(axis=0)) / rows.std(axis=0)
    expected = decomposition.PCA(4, whiten=True).fit_transform(scaled)
    # scikit-learn divides by one sample less.
    expected *= np.sqrt(200 / 199)
    found = rows @ kernel + bias
    signs = np.sign((found * expected).sum(axis=0))
    np.testing.assert_allclose(found * signs, expected, rtol=0.02, atol=0.02)


def test_features_that_do_not_vary_beyond_rounding_are_no_components():
    rng = np.random.default_rng(0)
    y = np.arange(300) % 3
    x = rng.normal(size=(300, 206)).astype("float32")
    x[np.arange(300), y] += 5.0
    x[:, 6:] = np.float32(1000.0)
    x[:, 6:] += rng.integers(-1, 2, (300, 200)) * np.float32(6e-5)
    model = linear_classifier(206, 3)
    with warnings.catch_warnings():
        # The given head was not trained.
        warnings.simplefilter("ignore")
        guarded = keras_halo.add_abstention(
            model, x, y, blocks=["features"], epochs=0, verbose=0
        )
    kernel = guarded.get_layer("halo_reduction").get_weights()[0]
    # Beside such features the others are a thousandth in length.
    assert np.abs(kernel).max() < 1e4
    assert np.abs(kernel[6:206]).max() == 0.0


def test_memory_is_what_is_said_before(capsys):
    rng = np.random.default_rng(0)
    y = np.arange(8000) % 4
    x = rng.normal(size=(8000, 600)).astype("float32")
    x[np.arange(8000), y] += 5.0
    model = linear_classifier(600, 4)
    with warnings.catch_warnings():
        # The given head was not trained.
        warnings.simplefilter("ignore")
        tracemalloc.start()
        add_abstention(
            model, x, y, ["features"], 0, max_features=100, verbose=2
        )
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    said = re.search(r"at most ([\d.]+) MB", capsys.readouterr().out)
    # Arrays of the backend are not traced; programs and graphs are.
    assert peak < 1.1 * float(said[1]) * 8 * 1e6


def test_what_cannot_be_done_is_refused(digits):
    x, y = digits
    model = small_convnet()
    tokens = keras.Sequential([keras.Input((5, 4)), layers.Dense(3)])
    headless = keras.Model(model.inputs[0], model.layers[1].output)
    refused = {
        "one answer a sample": (tokens, x, y, {}),
        "`units=`": (headless, x, y, {}),
        "name layers of the model": (model, x, y, {"blocks": ["nobody"]}),
        "must be a list": (model, x, y, {"blocks": "conv2d"}),
        "`epochs` must be": (model, x, y, {"epochs": -1}),
        "`max_features` must be": (model, x, y, {"max_features": 1.5}),
        "at least 1 sample": (model, x[y < 9], y[y < 9], {}),
        "one label for every input": (model, x, y[1:], {}),
    }
    for message, (given, inputs, labels, arguments) in refused.items():
        with pytest.raises(ValueError, match=message):
            add_abstention(given, inputs, labels, verbose=0, **arguments)
