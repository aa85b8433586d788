"""HALODense behaves as a Keras layer does, and says what it cannot do."""

import keras
import numpy as np
import pytest
from helpers import float64, packed, to_numpy
from keras import ops
from keras.src import testing

from keras_halo import HALODense, HALOLoss, geometry, packing

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
                                "label_smoothing": 0.2,
                                # On TensorFlow Keras cannot add a float64
                                # penalty to the float32 loss of these checks.
                                "centroid_regularizer": (
                                    None if dtype == "float64" else "l2"
                                ),
                                "centroid_constraint": "max_norm",
                                "dtype": policy,
                            },
                            input_shape=input_shape,
                            expected_output_shape=(*input_shape[:-1], 9),
                            expected_output_dtype=dtype,
                            expected_num_trainable_weights=2,
                            expected_num_non_trainable_weights=1,
                            expected_num_losses=int(dtype != "float64"),
                            supports_masking=True,
                        )

    def test_keras_layer_checks_with_fixed_temperature(self):
        self.run_layer_test(
            HALODense,
            init_kwargs={"units": 3, "learn_gamma": False},
            input_shape=(4, 6),
            expected_num_trainable_weights=1,
            expected_num_non_trainable_weights=2,
            expected_num_losses=0,
        )


def _built(units=5, embedding_dim=6, **kwargs):
    layer = HALODense(units, **kwargs)
    layer.build((None, embedding_dim))
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
        )
        np.testing.assert_allclose(
            to_numpy(layer(x)), expected, rtol=1e-12, atol=1e-12
        )


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
    assert keras.Model(inputs, outputs).output_shape == (None, 4, 7)
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
        label_smoothing=0.02,
        learn_gamma=False,
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
        "label_smoothing": 0.02,
        "learn_gamma": False,
        "name": "head",
    }.items():
        assert config[key] == value


@pytest.mark.parametrize("units", [1, 0, -3, 2.0, "10", None, True])
def test_units_below_two_or_no_integer_are_refused(units):
    with pytest.raises(
        ValueError, match=f"at least 2.*Received: units={units}"
    ):
        HALODense(units)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan")])
def test_label_smoothing_out_of_range_is_refused(smoothing):
    with pytest.raises(ValueError, match=r"in \[0, 1\).*Received"):
        HALODense(3, label_smoothing=smoothing)


@pytest.mark.parametrize("embedding_dim", [1, None])
def test_embedding_size_below_two_or_undefined_is_refused(embedding_dim):
    layer = HALODense(3)
    with pytest.raises(ValueError, match="at least 2.*Received.*Dense"):
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
