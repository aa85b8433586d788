"""BlockFeatures against NumPy, at its limits, and inside of models."""

import zipfile

import keras
import numpy as np
import pytest
from cases import for_all
from digits import known_and_unknown
from helpers import float64, to_numpy, value_and_gradients
from hypothesis import strategies as st
from keras import ops
from keras.src import testing

import keras_halo
from keras_halo.layers import BlockFeatures
from keras_halo.layers.block_features import pooled

POLICIES = {
    "float32": "float32",
    "mixed_float16": "float32",
    "mixed_bfloat16": "float32",
    "float16": "float32",
    "float64": "float64",
}


def by_the_book(inputs, spatial_moments=True):
    """What the layer answers, element by element, in float64."""
    maps = [i for i, x in enumerate(inputs) if x.ndim > 2]
    directions, lengths = [], []
    for i, x in enumerate(inputs):
        x = x.astype("float64")
        vectors = []
        for sample in x:
            positions = list(np.ndindex(*sample.shape[:-1]))
            mean = np.mean([sample[p] for p in positions], axis=0)
            parts = [mean]
            if spatial_moments and maps and i == maps[-1]:
                for axis, n in enumerate(sample.shape[:-1]):
                    if n == 1:
                        continue
                    waves = {
                        p: 2**0.5 * np.cos(np.pi * (p[axis] + 0.5) / n)
                        for p in positions
                    }
                    parts.append(
                        np.mean([sample[p] * waves[p] for p in positions], 0)
                    )
            vectors.append(np.concatenate(parts))
        vectors = np.array(vectors)
        length = np.linalg.norm(vectors, axis=-1, keepdims=True)
        directions.append(vectors / length * vectors.shape[-1] ** 0.5)
        lengths.append(np.log(length))
    return np.concatenate([*directions, *lengths], axis=-1)


def images(*shape, seed=0, dtype="float32"):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


class BlockFeaturesLayerTest(testing.TestCase):
    def test_keras_layer_checks(self):
        for policy, dtype in POLICIES.items():
            for spatial_moments, width in (
                (True, 4 + 9 + 5 + 3),
                (False, 4 + 3 + 5 + 3),
            ):
                with (
                    self.subTest(
                        policy=policy, spatial_moments=spatial_moments
                    ),
                    float64(),
                ):
                    self.run_layer_test(
                        BlockFeatures,
                        init_kwargs={
                            "spatial_moments": spatial_moments,
                            "data_format": "channels_last",
                            "dtype": policy,
                        },
                        input_data=[
                            images(2, 6, 4, 4, dtype=dtype),
                            images(2, 3, 2, 3, dtype=dtype),
                            images(2, 5, dtype=dtype),
                        ],
                        expected_output_shape=(2, width),
                        expected_output_dtype=dtype,
                        expected_num_trainable_weights=0,
                        expected_num_non_trainable_weights=0,
                        expected_num_seed_generators=0,
                        expected_num_losses=0,
                        supports_masking=True,
                        run_training_check=False,
                    )


shapes = st.lists(
    st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple),
    min_size=1,
    max_size=4,
)


@for_all(
    shapes=shapes,
    batch=st.integers(1, 4),
    spatial_moments=st.booleans(),
    first=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shapes_are_read_by_the_book(
    shapes, batch, spatial_moments, first, seed
):
    inputs = [
        images(batch, *shape, seed=seed + i) for i, shape in enumerate(shapes)
    ]
    given = [np.moveaxis(x, -1, 1) if first else x for x in inputs]
    layer = BlockFeatures(
        spatial_moments,
        data_format="channels_first" if first else "channels_last",
    )
    outputs = to_numpy(layer(given))
    assert outputs.shape == layer.compute_output_shape([x.shape for x in given])
    # A short vector, such as a mean near zero, has few exact digits.
    np.testing.assert_allclose(
        outputs, by_the_book(inputs, spatial_moments), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("masked", [False, True])
def test_float64_is_exact(masked):
    inputs = [
        images(3, 7, 5, 4, dtype="float64"),
        images(3, 6, dtype="float64"),
    ]
    expected = by_the_book(inputs)
    with float64():
        given = [ops.convert_to_tensor(x) for x in inputs]
        mask = None
        if masked:
            given[0] = ops.pad(given[0], [[0, 0], [0, 2], [0, 0], [0, 0]])
            steps = np.arange(9)[None].repeat(3, 0) < 7
            mask = [ops.convert_to_tensor(steps), None]
        layer = BlockFeatures(data_format="channels_last", dtype="float64")
        outputs = to_numpy(layer(given, mask=mask))
    assert outputs.dtype == "float64"
    np.testing.assert_allclose(outputs, expected, rtol=1e-12)


def test_one_tensor_is_a_list_of_one():
    x = images(3, 4, 4, 2)
    layer = BlockFeatures(data_format="channels_last")
    np.testing.assert_array_equal(
        to_numpy(layer(x)),
        to_numpy(BlockFeatures(data_format="channels_last")([x])),
    )
    assert layer.compute_output_shape([None, 4, 4, 2]) == (None, 7)
    assert layer.compute_output_shape([[None, 4, 4, 2]]) == (None, 7)


@pytest.mark.parametrize("scale", [1e-6, 7.0, 1e6])
def test_a_scale_moves_one_length_and_nothing_else(scale):
    inputs = [images(3, 4, 4, 2), images(3, 5)]
    layer = BlockFeatures(data_format="channels_last")
    before = to_numpy(layer(inputs))
    after = to_numpy(layer([inputs[0], inputs[1] * np.float32(scale)]))
    before[:, -1] += np.log(scale)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


def test_moments_say_where_a_feature_sits():
    x = np.zeros((4, 6, 8, 1), "float32")
    for i, (row, column) in enumerate([(0, 0), (0, 7), (5, 0), (5, 7)]):
        x[i, row, column] = 1.0
    mean, down, across = to_numpy(
        pooled(ops.convert_to_tensor(x), None, True)
    ).T
    np.testing.assert_allclose(mean, 1 / 48, rtol=1e-6)
    np.testing.assert_array_equal(np.sign(down), [1, 1, -1, -1])
    np.testing.assert_array_equal(np.sign(across), [1, -1, 1, -1])
    # What is the same everywhere sits nowhere.
    even = to_numpy(pooled(ops.ones((1, 6, 8, 1)), None, True))
    np.testing.assert_allclose(even, [[1, 0, 0]], atol=1e-6)


def test_only_the_last_map_says_where():
    early, late, vector = images(2, 4, 4, 3), images(2, 3, 3, 2), images(2, 5)
    layer = BlockFeatures(data_format="channels_last")
    turned = np.ascontiguousarray(early[:, ::-1])
    np.testing.assert_allclose(
        to_numpy(layer([early, late, vector])),
        to_numpy(layer([turned, late, vector])),
        rtol=1e-5,
        atol=1e-5,
    )
    assert not np.allclose(
        to_numpy(layer([early, late, vector])),
        to_numpy(layer([early, late[:, ::-1], vector])),
        atol=1e-2,
    )


@for_all(
    steps=st.integers(1, 6),
    padding=st.integers(0, 4),
    rest=st.lists(st.integers(1, 3), max_size=2),
    seed=st.integers(0, 2**16),
)
def test_masked_steps_might_as_well_not_be_there(steps, padding, rest, seed):
    x = images(2, steps, *rest, 4, seed=seed)
    padded = np.concatenate([x, 100 * images(2, padding, *rest, 4)], axis=1)
    mask = np.arange(steps + padding)[None].repeat(2, 0) < steps
    layer = BlockFeatures(data_format="channels_last")
    masked = to_numpy(layer(padded, mask=ops.convert_to_tensor(mask)))
    if steps > 1:
        bare = BlockFeatures(data_format="channels_last")(x)
        np.testing.assert_allclose(masked, to_numpy(bare), rtol=1e-3, atol=1e-3)
    assert np.isfinite(masked).all()


def test_masks_come_from_embeddings_and_stop_here():
    tokens, vector = keras.Input((5,), dtype="int32"), keras.Input((3,))
    embedded = keras.layers.Embedding(9, 4, mask_zero=True)(tokens)
    layer = BlockFeatures(data_format="channels_last")
    features = layer([embedded, vector])
    assert getattr(features, "_keras_mask", None) is None
    model = keras.Model([tokens, vector], features)
    rows = np.array([[3, 4, 0, 0, 0], [3, 4, 5, 6, 7], [0, 0, 0, 0, 0]])
    ones = np.ones((3, 3), "float32")
    short, long, nothing = model.predict([rows, ones], verbose=0)
    x = to_numpy(embedded._keras_history.operation(rows[:1, :2]))
    expected = to_numpy(BlockFeatures(data_format="channels_last")(x))[0]
    np.testing.assert_allclose(short[:8], expected[:8], rtol=1e-4, atol=1e-5)
    assert not np.allclose(long, short, atol=1e-2)
    assert np.isfinite(nothing).all()


@pytest.mark.parametrize("sizes", [(None, None), (None, 4), (6, None)])
def test_sizes_may_be_known_only_when_the_graph_runs(sizes):
    inputs = [keras.Input((*sizes, 3)), keras.Input((*sizes, 2))]
    layer = BlockFeatures(data_format="channels_last")
    model = keras.Model(inputs, layer(inputs))
    assert model.output_shape == (None, 3 + 6 + 2)
    x = [images(5, 6, 4, 3), images(5, 6, 4, 2)]
    np.testing.assert_allclose(
        model.predict(x, verbose=0), by_the_book(x), rtol=1e-3, atol=1e-3
    )


EXTREMES = [0.0, 1e-38, 1e-20, 1e-12, 1.0, 1e12, 1e20, 3e38]


@pytest.mark.parametrize("size", EXTREMES)
def test_extremes_are_finite_with_finite_gradients(size):
    layer = BlockFeatures(data_format="channels_last")
    x = (size * np.sign(images(2, 3, 3, 4))).astype("float32")
    v = (size * np.sign(images(2, 5))).astype("float32")
    layer.build([x.shape, v.shape])
    weights = ops.convert_to_tensor(images(2, 12 + 5 + 2))
    value, gradients = value_and_gradients(
        lambda x, v: ops.sum(weights * layer([x, v])), x, v
    )
    assert np.isfinite(value)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_float16_features_do_not_overflow():
    x = np.full((2, 8, 8, 3), 6e4, "float16")
    layer = BlockFeatures(data_format="channels_last", dtype="mixed_float16")
    outputs = to_numpy(layer([x]))
    assert outputs.dtype == "float32"
    np.testing.assert_allclose(outputs[:, -1], np.log(3**0.5 * 6e4), rtol=1e-5)


@pytest.mark.slow
def test_a_head_on_all_blocks_of_a_trained_network(tmp_path):
    keras.utils.set_random_seed(0)
    x, y, unknown = known_and_unknown()
    train, test = (x[:600], y[:600]), (x[600:], y[600:])

    def accuracy_and_auroc(model):
        known = model.predict(test[0], verbose=0)
        strange = model.predict(unknown, verbose=0)
        auroc = keras_halo.metrics.auroc(
            keras_halo.ood_score(known), keras_halo.ood_score(strange)
        )
        return np.mean(known[:, :5].argmax(-1) == test[1]), auroc

    inputs = keras.Input((8, 8, 1))
    early = keras.layers.Conv2D(16, 3, activation="relu")(inputs)
    late = keras.layers.Conv2D(32, 3, activation="relu")(early)
    embedding = keras.layers.Dense(16)(
        keras.layers.GlobalAveragePooling2D()(late)
    )
    network = keras.Model(inputs, keras_halo.HALODense(5)(embedding))
    network.compile(keras.optimizers.Adam(1e-2), loss=keras_halo.HALOLoss())
    # Until the outcome no longer hangs on how a compiler rounds.
    network.fit(*train, batch_size=100, epochs=30, verbose=0)
    accuracy_before, auroc_before = accuracy_and_auroc(network)

    features = BlockFeatures(data_format="channels_last")(
        [early, late, embedding]
    )
    network.trainable = False
    before = [to_numpy(weight) for weight in network.weights]
    model = keras_halo.convert_head(
        keras.Model(inputs, keras.layers.Dense(5)(features)),
        *train,
    )
    loss = keras_halo.HALOLoss(label_smoothing=0.003, distill=False)
    model.compile(keras.optimizers.Adam(5e-3), loss=loss, metrics=["accuracy"])
    model.fit(*train, batch_size=100, epochs=5, verbose=0)
    for weight, value in zip(network.weights, before, strict=True):
        np.testing.assert_array_equal(to_numpy(weight), value)
    accuracy, auroc = accuracy_and_auroc(model)
    assert accuracy > max(0.93, accuracy_before - 0.02)
    assert auroc > max(0.9, auroc_before)

    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(
        loaded.predict(unknown, verbose=0),
        model.predict(unknown, verbose=0),
        rtol=1e-5,
        atol=1e-4,
    )
    loaded.fit(*train, epochs=1, verbose=0)


@pytest.mark.parametrize("spatial_moments", [False, True])
def test_files_with_the_old_name_of_the_argument_load(
    spatial_moments, tmp_path
):
    inputs = [keras.Input((4, 4, 2)), keras.Input((3, 3, 3))]
    features = BlockFeatures(spatial_moments, "channels_last")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(2)(features))
    model.save(tmp_path / "model.keras")
    # `spatial_moments` was called `places` before.
    with (
        zipfile.ZipFile(tmp_path / "model.keras") as new,
        zipfile.ZipFile(tmp_path / "old.keras", "w") as old,
    ):
        for name in new.namelist():
            content = new.read(name)
            if name == "config.json":
                assert content.count(b'"spatial_moments"') == 1
                content = content.replace(b'"spatial_moments"', b'"places"')
            old.writestr(name, content)
    loaded = keras.models.load_model(tmp_path / "old.keras")
    x = [images(5, 4, 4, 2), images(5, 3, 3, 3)]
    np.testing.assert_array_equal(
        loaded.predict(x, verbose=0), model.predict(x, verbose=0)
    )
    (layer,) = [x for x in loaded.layers if isinstance(x, BlockFeatures)]
    assert layer.spatial_moments is spatial_moments
    assert "places" not in layer.get_config()


def test_bad_input_is_refused():
    layer = BlockFeatures(data_format="channels_last")
    with pytest.raises(ValueError, match="channels are known"):
        layer(keras.Input((4, 4, None)))
    with pytest.raises(ValueError, match="channels are known"):
        layer([keras.Input((4, 4, 3)), keras.Input(())])
    with pytest.raises(ValueError, match="floating point.*int32"):
        layer(np.zeros((2, 4), "int32"))
    with pytest.raises(ValueError, match="empty list"):
        layer.build([])
    with pytest.raises(ValueError, match="`data_format`"):
        BlockFeatures(data_format="channels_middle")
    # Refused calls have settled nothing.
    assert to_numpy(layer(images(2, 4))).shape == (2, 5)
    with pytest.raises(ValueError, match="incompatible|expected"):
        layer(images(2, 5))
