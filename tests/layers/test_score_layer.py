"""ScoreLayer is the base of layers of one's own that read packed scores."""

import keras
import numpy as np
import pytest
from helpers import packed, to_numpy
from keras import ops
from keras.src import testing

import keras_halo
from keras_halo import HALODense, layers
from keras_halo.ops import packing

RNG = np.random.default_rng(0)
X = RNG.normal(size=(12, 6)).astype("float32")
SCORES = packed(X, RNG.normal(size=(5, 6)))


@keras.saving.register_keras_serializable(package="score_layer")
class Margin(layers.ScoreLayer):
    """How far the second best class lies behind the best, times a weight."""

    def __init__(self, scale=1.0, **kwargs):
        super().__init__(**kwargs)
        self.scale = scale
        self.supports_masking = True

    def build(self, input_shape):
        # Of a shape that only packed scores of today have.
        self.kernel = self.add_weight(
            shape=(packing.count_classes(input_shape),),
            initializer=keras.initializers.Constant(self.scale),
            dtype=self.head_dtype,
            autocast=False,
        )

    def call(self, inputs):
        logits = packing.unpack(inputs).logits * self.kernel
        best = ops.top_k(logits, 2)[0]
        return best[..., 0] - best[..., 1]

    def compute_output_shape(self, input_shape):
        return tuple(input_shape[:-1])

    def get_config(self):
        return {**super().get_config(), "scale": self.scale}


@keras.saving.register_keras_serializable(package="score_layer")
class Weighed(layers.ScoreLayer):
    """Reads something else first, and packed scores by another name."""

    scores_index = 1

    def call(self, weights, packed):
        return weights * packing.unpack(packed).squared_norm[..., 0]


def margins(scores, scale=1.0):
    ordered = np.sort(scores[..., :-6].astype("float64"), axis=-1)
    return scale * (ordered[..., -1] - ordered[..., -2])


class MarginLayerTest(testing.TestCase):
    def test_keras_layer_checks(self):
        for policy in ("float32", "mixed_float16", "mixed_bfloat16"):
            with self.subTest(policy=policy):
                self.run_layer_test(
                    Margin,
                    init_kwargs={"scale": 2.0, "dtype": policy},
                    input_data=SCORES,
                    expected_output_shape=(12,),
                    expected_output_dtype="float32",
                    expected_num_trainable_weights=1,
                    expected_num_non_trainable_weights=0,
                    supports_masking=True,
                    run_training_check=False,
                )


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_a_layer_of_ones_own_saves_and_answers_the_same(policy, tmp_path):
    inputs = keras.Input((6,))
    scores = HALODense(3)(inputs)
    weights = keras.Input(())
    model = keras.Model(
        [inputs, weights],
        {
            "scores": scores,
            "margin": Margin(2.0, dtype=policy)(scores),
            "weighed": Weighed(dtype=policy)(weights, scores),
        },
    )
    # As training would have left it.
    margin = next(x for x in model.layers if isinstance(x, Margin))
    margin.kernel.assign([3.0, 3.0, 3.0])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert [type(x) for x in loaded.layers] == [type(x) for x in model.layers]
    x = [X, np.arange(12, dtype="float32")]
    expected = model.predict(x, verbose=0)
    np.testing.assert_allclose(
        expected["margin"], margins(expected["scores"], 3.0), rtol=1e-4
    )
    norms = packing.unpack(expected["scores"]).squared_norm[:, 0]
    np.testing.assert_allclose(expected["weighed"], x[1] * norms, rtol=1e-5)
    answers = loaded.predict(x, verbose=0)
    for name, values in expected.items():
        np.testing.assert_array_equal(answers[name], values)


def test_it_is_built_from_its_own_configuration_as_it_was():
    layer = Margin()
    layer.build((None, 11))
    again = Margin.from_config(layer.get_config())
    again.build_from_config(layer.get_build_config())
    assert tuple(again.kernel.shape) == (5,)


def test_call_gets_the_packed_scores_of_a_dictionary():
    fitted = {"scores": SCORES, "ood": np.zeros(12, "float32")}
    weights = np.arange(12, dtype="float32")
    for found in (Margin()(fitted), Margin()(inputs=fitted)):
        np.testing.assert_allclose(
            to_numpy(found), margins(SCORES), rtol=1e-4, atol=1e-4
        )
    expected = to_numpy(Weighed()(weights, SCORES))
    for found in (
        Weighed()(weights, fitted),
        Weighed()(weights, packed=fitted),
        Weighed()(weights=weights, packed=fitted),
    ):
        np.testing.assert_array_equal(to_numpy(found), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scores_in_16_bits_are_refused_however_they_are_passed(dtype):
    scores = ops.cast(ops.convert_to_tensor(SCORES), dtype)
    weights = np.ones(12, "float32")
    for call in (
        lambda: Margin()(scores),
        lambda: Margin()(inputs=scores),
        lambda: Weighed()(weights, scores),
        lambda: Weighed()(weights, packed=scores),
    ):
        with pytest.raises(ValueError, match=f"packed scores in {dtype}"):
            call()


def test_a_layer_of_any_arguments_reads_scores():
    class Columns(layers.ScoreLayer):
        scores_index = 1

        def call(self, *tensors):
            return tensors[1][..., 0]

    found = Columns()(np.ones((12, 1), "float32"), SCORES)
    np.testing.assert_array_equal(to_numpy(found), SCORES[:, 0])


def test_every_reader_of_packed_scores_has_this_base():
    for reader in (
        keras_halo.HALOSoftmax,
        layers.ClassGaussians,
        layers.Decision,
        layers.LabelSet,
        layers.OODScore,
    ):
        assert issubclass(reader, layers.ScoreLayer)
