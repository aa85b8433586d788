"""HALODense behaves as a Keras layer does, and says what it cannot do."""

import keras
import numpy as np
import pytest
from helpers import float64, packed, to_numpy, value_and_gradients
from keras import ops
from keras.src import testing

from keras_halo import HALODense, HALOLoss
from keras_halo.ops import geometry, packing

POLICIES = {
    "float32": "float32",
    "mixed_float16": "float32",
    "mixed_bfloat16": "float32",
    "bfloat16": "float32",
    "float16": "float32",
    "float64": "float64",
}


class HALODenseLayerTest(testing.TestCase):
    def test_keras_layer_checks(self):
        for policy, dtype in POLICIES.items():
            for input_shape in ((4, 6), (2, 3, 6)):
                with self.subTest(policy=policy, input_shape=input_shape):
                    with float64():
                        self.run_layer_test(
                            HALODense,
                            init_kwargs={
                                "units": 5,
                                "embedding_dim": 8,
                                "abstain_rate": 0.1,
                                # On TensorFlow Keras cannot add a float64
                                # penalty to the float32 loss of these checks.
                                "centroid_regularizer": (
                                    None if dtype == "float64" else "l2"
                                ),
                                "centroid_constraint": "max_norm",
                                "dtype": policy,
                            },
                            input_shape=input_shape,
                            expected_output_shape=(*input_shape[:-1], 11),
                            expected_output_dtype=dtype,
                            expected_num_trainable_weights=4,
                            expected_num_non_trainable_weights=7,
                            expected_num_losses=int(dtype != "float64"),
                            supports_masking=True,
                        )

    def test_keras_layer_checks_of_the_published_head(self):
        self.run_layer_test(
            HALODense,
            init_kwargs={
                "units": 3,
                "embedding_dim": None,
                "abstain_rate": None,
                "label_smoothing": 0.2,
                "learn_gamma": False,
            },
            input_shape=(4, 6),
            expected_num_trainable_weights=1,
            expected_num_non_trainable_weights=2,
            expected_num_losses=0,
        )


def _built(units=5, embedding_dim=6, **kwargs):
    """The head of the published method."""
    layer = HALODense.reference(units, **kwargs)
    layer.build((None, embedding_dim))
    return layer


def _head(units=3, num_features=4, **kwargs):
    """A head as a user makes it, small."""
    layer = HALODense(units, **{"embedding_dim": 8, **kwargs})
    layer.build((None, num_features))
    return layer


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6), (2, 3, 4, 6)])
def test_output_is_the_packed_scores_of_the_book(shape):
    layer = _built()
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    expected = packed(
        x,
        to_numpy(layer.centroids),
        gamma=geometry.initial_temperature(6),
        bias=geometry.abstain_bias(6, 5, 0.1),
        smoothing=0.1,
    )
    np.testing.assert_allclose(
        to_numpy(layer(x)), expected, rtol=1e-5, atol=1e-4
    )
    assert layer.compute_output_shape(shape) == expected.shape


@pytest.mark.parametrize("smoothing", [0.0, 0.02, 0.5])
def test_abstain_bias_follows_the_label_smoothing(smoothing):
    layer = _built(label_smoothing=smoothing)
    assert float(layer.abstain_bias.value) == pytest.approx(
        geometry.abstain_bias(6, 5, smoothing), rel=1e-6
    )


def test_weights_and_their_names():
    layer = _built()
    assert [w.name for w in layer.trainable_weights] == [
        "centroids",
        "raw_gamma",
    ]
    assert [w.name for w in layer.non_trainable_weights] == ["abstain_bias"]
    assert tuple(layer.centroids.shape) == (5, 6)
    assert to_numpy(layer.temperature) == pytest.approx(
        geometry.initial_temperature(6), rel=1e-6
    )


@pytest.mark.parametrize("policy", POLICIES)
def test_weights_and_output_are_never_below_float32(policy):
    with float64():
        layer = HALODense(5, dtype=policy)
        output = layer(np.ones((2, 6), "float32"))
        symbolic = layer(keras.KerasTensor((None, 6), dtype="float32"))
        expected = POLICIES[policy]
        assert keras.backend.standardize_dtype(output.dtype) == expected
        assert symbolic.dtype == expected
        assert {w.dtype for w in layer.weights} == {expected}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_low_precision_inputs_are_raised_before_anything_is_squared(dtype):
    # 300 squared times 6 overflows float16.
    x = ops.cast(np.full((2, 6), 300.0), dtype)
    layer = _built(dtype=f"mixed_{dtype}")
    parts = packing.unpack(layer(x))
    np.testing.assert_allclose(to_numpy(parts.squared_norm), 9e4, rtol=1e-2)
    np.testing.assert_array_equal(
        to_numpy(layer(x)), to_numpy(layer(ops.cast(x, "float32")))
    )


def test_float64_is_float64_to_the_last_digits():
    with float64():
        layer = _built(dtype="float64")
        x = np.random.default_rng(0).normal(size=(4, 6))
        expected = packed(
            x,
            to_numpy(layer.centroids),
            gamma=geometry.initial_temperature(6),
            bias=geometry.abstain_bias(6, 5, 0.1),
            dtype="float64",
            smoothing=0.1,
        )
        np.testing.assert_allclose(
            to_numpy(layer(x)), expected, rtol=1e-12, atol=1e-12
        )


@pytest.mark.slow
def test_mixed_precision_model_trains():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = keras.Sequential(
        [keras.layers.Input((4,)), keras.layers.Dense(6), HALODense(3)]
    )
    assert model.layers[0].compute_dtype == "bfloat16"
    assert model.layers[1].output.dtype == "float32"
    model.compile("sgd", HALOLoss(), metrics=["accuracy"])
    history = model.fit(
        np.random.default_rng(0).normal(size=(12, 4)),
        np.arange(12) % 3,
        verbose=0,
    )
    assert np.isfinite(history.history["loss"][0])


def test_mask_passes_through():
    x = np.ones((2, 4, 6), "float32")
    x[:, 2:] = 0.0
    inputs = keras.layers.Input((4, 6))
    outputs = HALODense(3)(keras.layers.Masking()(inputs))
    assert keras.Model(inputs, outputs).output_shape == (None, 4, 9)
    layer = _built(3)
    mask = np.any(x != 0, axis=-1)
    assert layer.compute_mask(x, mask) is mask


def test_regularizer_sees_the_raw_centroids():
    layer = _built(centroid_regularizer=keras.regularizers.L2(0.5))
    penalty = 0.5 * np.sum(np.square(to_numpy(layer.centroids)))
    assert to_numpy(layer.losses[0]) == pytest.approx(penalty, rel=1e-5)


def test_config_round_trip():
    layer = HALODense(
        7,
        embedding_dim=12,
        abstain_rate=0.02,
        normalize=False,
        learn_gamma=False,
        kernel_initializer="orthogonal",
        kernel_regularizer="l2",
        centroid_initializer="orthogonal",
        centroid_regularizer="l2",
        centroid_constraint="non_neg",
        name="head",
        dtype="mixed_bfloat16",
    )
    revived = keras.layers.deserialize(keras.layers.serialize(layer))
    assert revived.get_config() == layer.get_config()
    config = layer.get_config()
    for key, value in {
        "units": 7,
        "embedding_dim": 12,
        "abstain_rate": 0.02,
        "normalize": False,
        "learn_gamma": False,
        "name": "head",
    }.items():
        assert config[key] == value


@pytest.mark.parametrize("units", [1, 0, -3, 2.0, "10", None, True])
def test_units_below_two_or_no_integer_are_refused(units):
    with pytest.raises(
        ValueError, match=f"at least 2.*Received: units={units!r}"
    ):
        HALODense(units)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan")])
def test_label_smoothing_out_of_range_is_refused(smoothing):
    with pytest.raises(ValueError, match=r"in \[0, 1\).*Received"):
        HALODense.reference(3, label_smoothing=smoothing)


@pytest.mark.parametrize("embedding_dim", [1, None])
def test_embedding_size_below_two_or_undefined_is_refused(embedding_dim):
    layer = HALODense(3, embedding_dim=None)
    with pytest.raises(ValueError, match="at least 2.*Received.*head"):
        layer.build((None, embedding_dim))
    assert not layer.built
    assert layer.weights == []


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool"])
def test_integer_inputs_are_refused(dtype):
    with pytest.raises(ValueError, match=f"floating point.*dtype={dtype}"):
        HALODense(3)(np.ones((2, 6)).astype(dtype))
    with pytest.raises(ValueError, match=f"floating point.*dtype={dtype}"):
        HALODense(3)(keras.KerasTensor((None, 6), dtype=dtype))


def test_activity_regularizer_is_refused():
    with pytest.raises(ValueError, match="no `activity_regularizer`"):
        HALODense(3, activity_regularizer="l2")


def test_inputs_of_another_size_are_refused_once_built():
    layer = _built()
    with pytest.raises(ValueError, match="expected axis -1"):
        layer(np.ones((2, 7), "float32"))


# The embedding of the head ----------------------------------------------------


@pytest.mark.parametrize(
    ("units", "dim"), [(2, 128), (64, 128), (65, 256), (150, 512), (5000, 1024)]
)
def test_the_size_of_the_embedding_follows_the_number_of_classes(units, dim):
    layer = HALODense(units)
    layer.build((None, 3))
    assert tuple(layer.centroids.shape) == (units, dim)


@pytest.mark.parametrize("normalize", [True, False])
def test_the_head_embeds_normalizes_and_measures_by_the_book(normalize):
    layer = _head(5, 6, normalize=normalize)
    x = np.random.default_rng(0).normal(size=(7, 6)).astype("float32")
    layer.bias.assign(np.linspace(-1.0, 1.0, 8))
    layer.abstain_bias.assign(0.5)
    layer.far_bias.assign(-6.0)
    layer.far_scale.assign(1.5)
    features = x
    if normalize:
        magnitude = np.abs(x).mean(-1, keepdims=True) + 0.1
        features = x / (np.sqrt(np.pi) * magnitude)
    embedded = features @ to_numpy(layer.kernel)
    embedded += np.linspace(-1.0, 1.0, 8)
    gamma = geometry.initial_temperature(8)
    expected = packed(embedded, to_numpy(layer.centroids), gamma)
    norm = np.square(embedded).mean(axis=-1)
    top = expected[:, :5].max(axis=-1)
    far = top + 1.5 * (gamma * norm / 2 - 6.0 - top)
    expected[:, 5] = np.logaddexp(0.5, far)
    expected[:, -2] = -(2.0**40) * (1.0 + 6.0 / gamma)
    np.testing.assert_allclose(
        to_numpy(layer(x)), expected, rtol=1e-5, atol=1e-4
    )


def test_long_features_of_any_scale_get_the_same_scores():
    layer = _head()
    x = np.random.default_rng(0).normal(size=(5, 4)).astype("float32")
    expected = to_numpy(layer(1e6 * x))
    for scale in (1e7, 1e9, 1e11):
        np.testing.assert_allclose(
            to_numpy(layer(scale * x)), expected, rtol=1e-4, atol=1e-4
        )


def test_short_features_get_the_scores_of_nothing():
    layer = _head()
    x = np.random.default_rng(0).normal(size=(5, 4)).astype("float32")
    np.testing.assert_allclose(
        to_numpy(layer(1e-7 * x)), to_numpy(layer(0.0 * x)), atol=1e-4
    )


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-7, 1e12, 3e38])
def test_scores_and_gradients_of_extreme_features_are_finite(value):
    layer = _head()

    def total(x):
        return ops.sum(HALOLoss(reduction=None)(np.array([0, 2]), layer(x)))

    x = np.full((2, 4), value, "float32")
    result, (gradient,) = value_and_gradients(total, x)
    assert np.isfinite(result)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("size", [1, 0, -2, 2.5, "large", True])
def test_a_size_of_the_embedding_that_is_none_is_refused(size):
    with pytest.raises(ValueError, match="at least 2.*Received"):
        HALODense(3, embedding_dim=size)


def test_an_embedding_too_small_for_the_centroids_warns():
    layer = HALODense(10, embedding_dim=4)
    with pytest.warns(UserWarning, match="at least 9"):
        layer.build((None, 3))


def test_label_smoothing_of_the_head_belongs_to_the_published_one():
    with pytest.raises(ValueError, match="belongs to the loss"):
        HALODense(3, label_smoothing=0.1)
    assert HALODense(3, abstain_rate=None, label_smoothing=0.2)


@pytest.mark.parametrize(
    "rate", [-0.01, 0.5, 1, float("nan"), "0.1", True, [0.1]]
)
def test_an_abstain_rate_out_of_range_is_refused(rate):
    with pytest.raises(ValueError, match=r"in \[0, 0.5\).*Received"):
        HALODense(3, abstain_rate=rate)


# The running statistics -------------------------------------------------------


def _blobs(count=600, num_classes=3, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, num_classes, count)
    x = rng.normal(size=(count, 6)).astype("float32")
    x[np.arange(count), y] += 4.0
    return x, y


def _statistics(layer):
    return [
        to_numpy(w)
        for w in layer.non_trainable_weights
        if w.name.startswith(("evidence", "abstain", "far"))
    ]


def test_training_and_inference_score_alike():
    layer = _head()
    x = np.random.default_rng(0).normal(size=(40, 4)).astype("float32")
    before = to_numpy(layer(x))
    # The scores of the batch that moves the statistics are from before.
    np.testing.assert_array_equal(to_numpy(layer(x, training=True)), before)
    assert np.abs(to_numpy(layer(x)) - before).max() > 0.1


def test_statistics_move_in_training_alone():
    layer = _head()
    x = np.ones((4, 4), "float32")
    start = _statistics(layer)
    layer(x)
    layer(x, training=False)
    layer.trainable = False
    layer(x, training=True)
    for before, after in zip(start, _statistics(layer), strict=True):
        np.testing.assert_array_equal(before, after)
    layer.trainable = True
    layer(x, training=True)
    assert float(to_numpy(layer.evidence_count)) == 1.0


@pytest.mark.slow
def test_a_trained_head_abstains_from_few_known_and_from_what_lies_far():
    keras.utils.set_random_seed(0)
    x, y = _blobs()
    model = keras.Sequential(
        [
            keras.layers.Input((6,)),
            keras.layers.Dense(32, activation="relu"),
            HALODense(3, normalize=False),
        ]
    )
    model.compile(keras.optimizers.Adam(0.01), HALOLoss(), metrics=["accuracy"])
    model.fit(x, y, batch_size=50, epochs=15, verbose=0)
    new, labels = _blobs(seed=1)
    answers = model.predict(new, verbose=0)[:, :4].argmax(axis=-1)
    assert np.mean(answers == 3) <= 0.03
    assert np.mean(answers == labels) >= 0.9
    far = np.random.default_rng(2).normal(size=(200, 6)) * 40.0
    scores = model.predict(far, verbose=0)
    assert np.mean(scores[:, :4].argmax(axis=-1) == 3) >= 0.99


@pytest.mark.slow
def test_a_network_that_has_learned_nothing_yet_does_not_abstain():
    # Dropout makes the evidence of training batches vary more than that of new
    # inputs, by little, but so little is all there is.
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(640, 20)).astype("float32")
    small = keras.initializers.RandomNormal(stddev=0.01)
    model = keras.Sequential(
        [
            keras.layers.Input((20,)),
            keras.layers.Dense(64, "relu", kernel_initializer=small),
            keras.layers.Dropout(0.5),
            HALODense(2),
        ]
    )
    model.compile("adam", HALOLoss())
    model.fit(x, rng.integers(2, size=640), batch_size=32, verbose=0)
    new = rng.normal(size=(500, 20)).astype("float32")
    answers = model.predict(new, verbose=0)[:, :3].argmax(axis=-1)
    assert np.mean(answers == 2) <= 0.02


def test_masked_positions_do_not_count():
    x = np.random.default_rng(0).normal(size=(2, 5, 4)).astype("float32")
    mask = np.array([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]], bool)
    first, second = _head(), _head()
    second.set_weights(first.get_weights())
    first(x, training=True, mask=ops.convert_to_tensor(mask))
    second(x[mask], training=True)
    for a, b in zip(_statistics(first), _statistics(second), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [0, 1])
def test_batches_of_no_and_of_one_row_leave_the_statistics_sane(rows):
    layer = _head()
    x = np.random.default_rng(0).normal(size=(20, 4)).astype("float32")
    layer(x, training=True)
    before = _statistics(layer)
    layer(x[:rows], training=True)
    for a, b in zip(before, _statistics(layer), strict=True):
        assert np.isfinite(b).all()
        if rows == 0:
            np.testing.assert_array_equal(a, b)


def test_rows_of_nan_leave_the_statistics_sane():
    layer = _head()
    x = np.random.default_rng(0).normal(size=(20, 4)).astype("float32")
    x[3] = np.nan
    layer(x, training=True)
    assert float(to_numpy(layer.evidence_count)) == 1.0
    for values in _statistics(layer):
        assert np.isfinite(values).all()


@pytest.mark.slow
def test_the_statistics_are_saved_and_go_on(tmp_path):
    keras.utils.set_random_seed(0)
    x, y = _blobs(100)
    model = keras.Sequential([keras.layers.Input((6,)), HALODense(3)])
    model.compile("adam", HALOLoss())
    model.fit(x, y, epochs=2, verbose=0)
    path = tmp_path / "model.keras"
    model.save(path)
    again = keras.models.load_model(path)
    np.testing.assert_allclose(
        again.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-6
    )
    losses = [
        m.fit(x, y, epochs=1, shuffle=False, verbose=0).history["loss"]
        for m in (model, again)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    for a, b in zip(
        _statistics(model.layers[-1]),
        _statistics(again.layers[-1]),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


# What keras_halo 0.1.0 saved --------------------------------------------------


@pytest.mark.parametrize("name", ["kernel_initializer", "kernel_regularizer"])
def test_a_head_without_a_kernel_refuses_what_belongs_to_one(name):
    value = {"kernel_initializer": "zeros", "kernel_regularizer": "l2"}[name]
    for make in (HALODense.reference, lambda *a, **k: HALODense(*a, None, **k)):
        with pytest.raises(ValueError, match=f"`{name}` belongs.*centroid_"):
            make(3, **{name: value})
    # A file from when it was ignored loads as what it was.
    config = HALODense(3, None).get_config()
    layer = HALODense.from_config({**config, name: value})
    assert layer.get_config() == config


@pytest.mark.parametrize(
    "activation", ["softmax", "relu", keras.activations.softmax]
)
def test_an_activation_in_the_second_place_is_named(activation):
    with pytest.raises(ValueError, match="takes no `activation`.*HALOSoftmax"):
        HALODense(3, activation)
    with pytest.raises(ValueError, match="`embedding_dim` must be"):
        HALODense(3, "large")


def test_a_configuration_of_0_1_0_is_the_published_head():
    config = HALODense.reference(4, label_smoothing=0.05).get_config()
    for key in (
        "version",
        "embedding_dim",
        "abstain_rate",
        "normalize",
        "kernel_initializer",
        "kernel_regularizer",
    ):
        del config[key]
    layer = HALODense.from_config(config)
    assert layer.embedding_dim is None
    assert layer.abstain_rate is None
    assert layer.label_smoothing == 0.05
    # Saved again it stays what it is.
    assert (
        HALODense.from_config(layer.get_config()).get_config()["version"] == 1
    )


def test_old_weights_in_a_new_head_name_the_cure(tmp_path):
    old = keras.Sequential([keras.layers.Input((8,)), _built(3, 8)])
    path = tmp_path / "old.weights.h5"
    layer = old.layers[-1]
    raw_gamma = geometry.inverse_softplus(7.0)
    layer.gamma_origin = 0.0
    layer.raw_gamma.assign(raw_gamma)
    old.save_weights(path)
    new = keras.Sequential([keras.layers.Input((8,)), HALODense(3)])
    with pytest.raises(ValueError, match=r"0\.1\.0.*HALODense\.reference"):
        new.load_weights(path)
    reference = keras.Sequential(
        [keras.layers.Input((8,)), HALODense.reference(3)]
    )
    reference.load_weights(path)
    temperature = reference.layers[-1].temperature
    assert to_numpy(temperature) == pytest.approx(7.0, rel=1e-5)


def test_a_later_version_is_refused():
    config = {**HALODense(3).get_config(), "version": 3}
    with pytest.raises(ValueError, match="version=3.*newer"):
        HALODense.from_config(config)
