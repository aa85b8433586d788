"""HALOSoftmax turns packed scores into plain probabilities."""

import keras
import numpy as np
import pytest
from helpers import float64, naive_softmax, packed, to_numpy
from keras.src import testing

from keras_halo import HALODense, HALOSoftmax

POLICIES = {
    "float32": "float32",
    "mixed_float16": "float32",
    "mixed_bfloat16": "float32",
    "bfloat16": "float32",
    "float16": "float32",
    "float64": "float64",
}


class HALOSoftmaxLayerTest(testing.TestCase):
    def test_keras_layer_checks(self):
        rng = np.random.default_rng(0)
        scores = packed(rng.normal(size=(4, 6)), rng.normal(size=(5, 6)))
        for policy, dtype in POLICIES.items():
            for abstain, width in ((True, 6), (False, 5)):
                with self.subTest(policy=policy, abstain=abstain):
                    with float64():
                        self.run_layer_test(
                            HALOSoftmax,
                            init_kwargs={"abstain": abstain, "dtype": policy},
                            input_data=scores.astype(dtype),
                            expected_output_shape=(4, width),
                            expected_output_dtype=dtype,
                            expected_num_trainable_weights=0,
                            expected_num_non_trainable_weights=0,
                            supports_masking=True,
                            run_training_check=False,
                        )


@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 3, 4)])
@pytest.mark.parametrize("abstain", [True, False])
def test_probabilities(shape, abstain):
    rng = np.random.default_rng(0)
    scores = packed(rng.normal(size=(*shape, 6)), rng.normal(size=(5, 6)))
    probabilities = to_numpy(HALOSoftmax(abstain=abstain)(scores))
    logits = scores[..., : 5 + abstain].astype("float64")
    np.testing.assert_allclose(
        probabilities, naive_softmax(logits), rtol=1e-5, atol=1e-7
    )
    np.testing.assert_allclose(probabilities.sum(axis=-1), 1.0, rtol=1e-5)


def test_appended_to_a_trained_model_without_touching_it():
    model = keras.Sequential([keras.layers.Input((6,)), HALODense(5)])
    deployed = keras.Sequential([*model.layers, HALOSoftmax()])
    x = np.random.default_rng(0).normal(size=(3, 6)).astype("float32")
    np.testing.assert_allclose(
        deployed.predict(x, verbose=0),
        to_numpy(HALOSoftmax()(model.predict(x, verbose=0))),
        rtol=1e-6,
    )
    assert len(model.layers) == 1


def test_under_mixed_precision_the_scores_are_not_cast_down():
    keras.config.set_dtype_policy("mixed_float16")
    rng = np.random.default_rng(0)
    scores = packed(rng.normal(size=(4, 6)), rng.normal(size=(5, 6)))
    probabilities = to_numpy(HALOSoftmax()(scores))
    assert probabilities.dtype == "float32"
    np.testing.assert_allclose(
        probabilities, naive_softmax(scores[:, :6].astype("float64")), rtol=1e-5
    )


def test_scores_that_are_too_narrow_are_refused():
    with pytest.raises(ValueError, match="at least 8 columns.*HALODense"):
        HALOSoftmax()(np.zeros((2, 5), "float32"))
