"""Fitted Gaussians against SciPy and scikit-learn, and inside of models."""

import re
import tracemalloc

import keras
import numpy as np
import pytest
from helpers import packed, to_numpy, value_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

import keras_halo
from keras_halo import HALODense
from keras_halo.layers import ClassGaussians
from keras_halo.layers.class_gaussians import gaussian_constants, gaussian_nll
from keras_halo.ops.class_statistics import oracle_shrinkage
from keras_halo.ops.labels import class_indices
from keras_halo.ops.ood_scores import ood_score
from keras_halo.workflows.fit_class_gaussians import fit_class_gaussians
from keras_halo.workflows.graph import find_head, head_tensors

stats = pytest.importorskip("scipy.stats")
covariance = pytest.importorskip("sklearn.covariance")


def clusters(n=300, num_classes=3, dim=4, seed=0):
    """Embeddings of classes that are ellipsoids of their own, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % num_classes)
    centers = 2 * rng.normal(size=(num_classes, dim))
    shapes = rng.normal(size=(num_classes, dim, dim))
    noise = rng.normal(size=(n, dim))
    x = centers[labels] + np.einsum("ni,nij->nj", noise, shapes[labels])
    return x.astype("float32"), labels


def small_model(dim=4, num_classes=3, inputs=4):
    return keras.Sequential(
        [
            keras.Input((inputs,)),
            keras.layers.Dense(dim, name="embedding"),
            keras_halo.HALODense.reference(num_classes),
        ]
    )


def oracle(embeddings, labels, queries):
    """Negative log densities by scikit-learn and SciPy, class by class."""
    embeddings = embeddings.astype("float64")
    classes = np.unique(labels)
    means = np.stack([embeddings[labels == k].mean(axis=0) for k in classes])
    residuals = embeddings - means[np.searchsorted(classes, labels)]
    scales = np.sqrt(np.square(residuals).mean(axis=0))
    columns = []
    for k, mean in zip(classes, means, strict=True):
        own = residuals[labels == k] / scales
        # scikit-learn leaves out terms of order 1 / D: only the target is its.
        rho = oracle_shrinkage(own.T @ own / len(own), len(own))
        shrunk = covariance.shrunk_covariance(own.T @ own / len(own), rho)
        columns.append(
            -stats.multivariate_normal.logpdf(
                queries, mean, shrunk * np.outer(scales, scales)
            )
        )
    return np.stack(columns, axis=-1)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(0.1, 10.0))
def test_densities_are_those_of_scipy(seed, scale):
    rng = np.random.default_rng(seed)
    factors = rng.normal(size=(3, 5, 5)) + 3 * np.eye(5)
    covariances = scale * factors @ np.swapaxes(factors, -1, -2)
    means = rng.normal(size=(3, 5))
    x = scale * rng.normal(size=(7, 5))
    cholesky = np.linalg.cholesky(covariances)
    nll = gaussian_nll(
        *(
            ops.convert_to_tensor(a.astype("float32"))
            for a in (x, *gaussian_constants(means, np.linalg.inv(cholesky)))
        )
    )
    expected = [
        -stats.multivariate_normal.logpdf(x, m, c)
        for m, c in zip(means, covariances, strict=True)
    ]
    np.testing.assert_allclose(
        to_numpy(nll), np.transpose(expected), rtol=1e-4, atol=1e-4
    )


def test_score_is_density_of_the_nearest_class_joined_with_abstaining():
    x, y = clusters()
    layer = ClassGaussians(3)
    layer.adapt(x, y)
    rng = np.random.default_rng(1)
    queries = (3 * rng.normal(size=(20, 4))).astype("float32")
    scores = packed(queries, rng.normal(size=(3, 4)))
    predictions = keras_halo.decode_predictions(scores)
    abstain = predictions.abstain_probability.astype("float64")
    expected = oracle(x, y, queries).min(axis=-1)
    expected += np.log(abstain) - np.log1p(-abstain)
    np.testing.assert_allclose(
        to_numpy(layer(queries, scores)), expected, rtol=1e-3, atol=1e-3
    )


def test_classes_without_samples_can_be_left_out():
    x, y = clusters()
    model = small_model()
    kept = y != 1
    with pytest.raises(ValueError, match="1: 0.*skip_missing=True"):
        fit_class_gaussians(model, x[kept], y[kept], verbose=0)
    fitted = fit_class_gaussians(
        model, x[kept], y[kept], verbose=0, skip_missing=True
    )
    embeddings, scores = keras.Model(
        model.inputs[0], head_tensors(model)
    ).predict(x, verbose=0)
    expected = oracle(embeddings[kept], y[kept], embeddings).min(axis=-1)
    odds = ood_score(scores, "abstain")
    np.testing.assert_allclose(
        fitted.predict(x, verbose=0)["ood"],
        expected + odds,
        rtol=1e-3,
        atol=1e-3,
    )
    with pytest.raises(ValueError, match="at least 2 samples"):
        fit_class_gaussians(model, x[:2], [0, 1], verbose=0, skip_missing=True)


def test_the_memory_of_a_fit_does_not_grow_with_the_data():
    model = keras.Sequential(
        [keras.Input((64,)), HALODense(4, embedding_dim=None)]
    )
    x = np.random.default_rng(0).normal(size=(20_000, 64)).astype("float32")
    y = np.arange(len(x)) % 4
    fit_class_gaussians(model, x[:512], y[:512], 512, verbose=0)
    peaks = []
    for n in (1_000, 20_000):
        tracemalloc.start()
        fit_class_gaussians(model, x[:n], y[:n], 500, verbose=0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # The embeddings of all samples would be 5 MB.
    assert peaks[1] - peaks[0] < 1_000_000


@pytest.mark.parametrize(("num_classes", "dim"), [(4, 256), (64, 64)])
def test_the_memory_of_a_fit_is_what_is_said_before(num_classes, dim, capsys):
    model = keras.Sequential(
        [keras.Input((dim,)), HALODense(num_classes, embedding_dim=None)]
    )
    rng = np.random.default_rng(0)
    y = np.arange(2 * num_classes) % num_classes
    x = rng.normal(size=(len(y), dim)).astype("float32")
    fit_class_gaussians(model, x, y, verbose=0)
    assert not capsys.readouterr().out
    tracemalloc.start()
    fit_class_gaussians(model, x, y, verbose=2)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    said = re.search(r"dimensions: ([\d.]+) MB", capsys.readouterr().out)
    # What a backend takes for the layer is not traced.
    assert 0.5 < peak / (1e6 * float(said.group(1))) < 2.0


def test_fewer_samples_than_dimensions_are_enough():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(4, 50)).astype("float32"), np.array([0, 0, 1, 1])
    layer = ClassGaussians(2)
    layer.adapt(x, y)
    scores = packed(100 * x, rng.normal(size=(2, 50)))
    assert np.isfinite(to_numpy(layer(100 * x, scores))).all()


def test_a_class_without_extent_stays_finite():
    x, y = clusters()
    x[y == 1] = x[y == 1][0]
    layer = ClassGaussians(3)
    layer.adapt(x, y)
    scores = packed(x, np.eye(4)[:3])
    assert np.isfinite(to_numpy(layer(x, scores))).all()


def test_extremes_are_finite_with_finite_gradients():
    x, y = clusters()
    layer = ClassGaussians(3)
    layer.adapt(x, y)
    queries = np.concatenate([0 * x[:2], 1e-6 * x[:2], x[:2], 1e6 * x[:2]])
    scores = packed(queries, np.eye(4)[:3])
    value, gradients = value_and_gradients(
        lambda e, s: ops.sum(layer(e, s)), queries, scores
    )
    assert np.isfinite(value)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    far = to_numpy(layer(queries, scores))
    assert far[6:].min() > far[:6].max()


def test_ellipsoids_are_seen_where_a_ball_is_not_left():
    rng = np.random.default_rng(3)
    y = np.arange(2000) % 2
    centers = np.array([[2.0, 2.0, 0, 0], [-2.0, -2.0, 0, 0]])
    x = centers[y] + rng.normal(size=(2000, 4)) * [0.05, 0.05, 1.4, 1.4]
    # At the same distance from the centroid as members, but out of the plane.
    out = centers[y] + rng.normal(size=(2000, 4)) * [1.4, 1.4, 0.05, 0.05]
    layer = ClassGaussians(2)
    layer.adapt(x[:1000], y[:1000])

    def auroc(score):
        known, unknown = score(x[1000:]), score(out[1000:])
        return np.mean(unknown[:, None] > known[None])

    def fitted(e):
        e = e.astype("float32")
        return to_numpy(layer(e, packed(e, centers)))

    def isotropic(e):
        return ood_score(packed(e, centers), "radius")

    assert auroc(fitted) > 0.97
    assert auroc(isotropic) < 0.6


@pytest.mark.parametrize("kind", ["integer", "column", "one-hot", "list"])
def test_labels_in_every_form_fit_the_same(kind):
    x, y = clusters()
    labels = {
        "integer": y,
        "column": y[:, None].astype("float32"),
        "one-hot": np.eye(3)[y],
        "list": y.tolist(),
    }[kind]
    np.testing.assert_array_equal(class_indices(labels, 3, (300,)), y)
    model = fit_class_gaussians(small_model(), x, labels, verbose=0)
    assert np.isfinite(model.predict(x[:5], verbose=0)["ood"]).all()


def test_a_fitted_model_has_the_scores_of_the_given_one():
    x, y = clusters()
    model = small_model()
    fitted = fit_class_gaussians(model, x, y, verbose=0)
    np.testing.assert_allclose(
        fitted.predict(x[:7], verbose=0)["scores"],
        model.predict(x[:7], verbose=0),
        rtol=1e-6,
    )


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow",
    reason="a SavedModel needs TensorFlow",
)
def test_fitted_model_is_exported(tmp_path):
    import tensorflow as tf

    x, y = clusters()
    fitted = fit_class_gaussians(small_model(), x, y, verbose=0)
    fitted.export(tmp_path / "exported", verbose=False)
    exported = tf.saved_model.load(str(tmp_path / "exported"))
    served = exported.serve(x[:7])
    for name, expected in fitted.predict(x[:7], verbose=0).items():
        np.testing.assert_allclose(served[name], expected, rtol=1e-4, atol=1e-4)


def test_only_statistics_are_stored():
    x, y = clusters()
    fitted = fit_class_gaussians(small_model(), x, y, verbose=0)
    layer = fitted.get_layer("class_gaussians")
    assert layer.count_params() == 3 * (4 * 4 + 4 + 1) + 4
    assert layer.trainable_weights == []


def test_datasets_fit_as_arrays_do():
    x, y = clusters()
    model = small_model()
    expected = fit_class_gaussians(model, x, y, verbose=0)

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            part = slice(100 * index, 100 * (index + 1))
            return x[part], y[part]

    generator = ((x[i::3], y[i::3], np.ones(100)) for i in range(3))
    batches = [[x[i::3], y[i::3]] for i in range(3)]
    for data in (Batches(), generator, batches):
        fitted = fit_class_gaussians(model, data, verbose=0)
        np.testing.assert_allclose(
            fitted.predict(x[:9], verbose=0)["ood"],
            expected.predict(x[:9], verbose=0)["ood"],
            rtol=1e-3,
        )


def as_filtered_tf_dataset(x, y):
    tf = pytest.importorskip("tensorflow", reason="needs TensorFlow")
    dataset = tf.data.Dataset.from_tensor_slices((x, y))
    return dataset.filter(lambda x, y: y >= 0).batch(32)


def as_iterable_loader(x, y):
    torch = pytest.importorskip("torch", reason="needs PyTorch")

    class Rows(torch.utils.data.IterableDataset):
        def __iter__(self):
            return zip(map(torch.as_tensor, x), y.tolist(), strict=True)

    return torch.utils.data.DataLoader(Rows(), batch_size=32)


@pytest.mark.parametrize("read", [as_filtered_tf_dataset, as_iterable_loader])
def test_datasets_whose_length_is_not_known_fit(read):
    x, y = clusters()
    model = small_model()
    expected = fit_class_gaussians(model, x, y, verbose=0)
    fitted = fit_class_gaussians(model, read(x, y), verbose=0)
    np.testing.assert_allclose(
        fitted.predict(x[:9], verbose=0)["ood"],
        expected.predict(x[:9], verbose=0)["ood"],
        rtol=1e-3,
    )


@pytest.mark.slow
@pytest.mark.parametrize("one_hot", [False, True])
def test_padding_has_no_part_in_the_fit(one_hot):
    x, y = clusters()
    model = small_model()
    expected = fit_class_gaussians(model, x, y, verbose=0)
    padded_x = np.concatenate([x, np.full((60, 4), 50.0, "float32")])
    if one_hot:
        padded_y = np.concatenate([np.eye(3)[y], np.zeros((60, 3))])
    else:
        padded_y = np.concatenate([y, np.full(60, -1)])
    weight = np.concatenate([np.full(300, 0.5), np.zeros(60)])
    data = (padded_x, padded_y)
    for fitted in (
        fit_class_gaussians(model, *data, verbose=0, sample_weight=weight),
        fit_class_gaussians(model, (*data, weight), verbose=0),
    ):
        np.testing.assert_allclose(
            fitted.predict(x[:9], verbose=0)["ood"],
            expected.predict(x[:9], verbose=0)["ood"],
            rtol=1e-3,
        )
    with pytest.raises(ValueError, match="sample weights of `x`"):
        fit_class_gaussians(model, *data, verbose=0, sample_weight=weight[1:])
    with pytest.raises(ValueError, match="belongs to arrays"):
        fit_class_gaussians(model, data, verbose=0, sample_weight=weight)


@pytest.mark.slow
def test_a_model_of_models_that_comes_from_a_file_fits(tmp_path):
    x, y = clusters()
    keras.backend.clear_session()
    inputs = [keras.Input((4,)) for _ in range(3)]
    body = keras.Model(inputs[0], keras.layers.Dense(4)(inputs[0]))
    head = keras.Model(inputs[1], keras_halo.HALODense.reference(3)(inputs[1]))
    keras.Model(inputs[2], head(body(inputs[2]))).save(tmp_path / "model.keras")
    # As in a fresh process: names are given from the first one again.
    keras.backend.clear_session()
    model = keras.models.load_model(tmp_path / "model.keras")
    fitted = fit_class_gaussians(model, x, y, verbose=0)
    np.testing.assert_allclose(
        fitted.predict(x[:5], verbose=0)["scores"],
        model.predict(x[:5], verbose=0),
        rtol=1e-5,
    )
    converted = keras_halo.convert_head(model, x, y)
    assert converted.predict(x[:5], verbose=0).shape == (5, 9)


def test_token_heads_get_a_score_a_token():
    x, y = clusters(n=300)
    x, y = x.reshape(100, 3, 4), y.reshape(100, 3)
    model = keras.Sequential(
        [keras.Input((3, 4)), keras_halo.HALODense.reference(3)]
    )
    fitted = fit_class_gaussians(model, x, y, verbose=0)
    assert fitted.predict(x[:5], verbose=0)["ood"].shape == (5, 3)
    flat = fit_class_gaussians(
        keras.Sequential([keras.Input((4,)), find_head(model)]),
        x.reshape(300, 4),
        y.reshape(300),
        verbose=0,
    )
    np.testing.assert_allclose(
        flat.predict(x[:5].reshape(15, 4), verbose=0)["ood"],
        fitted.predict(x[:5], verbose=0)["ood"].ravel(),
        rtol=1e-4,
        atol=1e-4,
    )


def test_head_is_found_in_every_kind_of_graph():
    x = clusters()[0][:3]
    plain = small_model()
    wrapped = keras.Sequential([keras.Input((4,)), plain])
    softmaxed = keras.Model(
        plain.inputs[0], keras_halo.HALOSoftmax()(plain.outputs[0])
    )
    late = keras.Sequential(
        [keras.layers.Dense(4), keras_halo.HALODense.reference(3)]
    )
    late.build((None, 4))
    for model in (plain, wrapped, softmaxed, late):
        embeddings, scores = keras.Model(
            model.inputs[0], head_tensors(model)
        ).predict(x, verbose=0)
        assert embeddings.shape == (3, 4)
        np.testing.assert_allclose(
            to_numpy(find_head(model)(embeddings)), scores, rtol=1e-5, atol=1e-5
        )
    np.testing.assert_allclose(
        wrapped.predict(x, verbose=0), plain.predict(x, verbose=0), rtol=1e-5
    )


def test_fitting_again_after_more_training_replaces_the_layer():
    x, y = clusters()
    fitted = fit_class_gaussians(small_model(), x, y, verbose=0)
    again = fit_class_gaussians(fitted, x + 1.0, y, verbose=0)
    assert not np.allclose(
        fitted.get_layer("class_gaussians").shift.numpy(),
        again.get_layer("class_gaussians").shift.numpy(),
    )


def test_layer_under_mixed_precision_answers_float32():
    keras.config.set_dtype_policy("mixed_float16")
    x, y = clusters()
    fitted = fit_class_gaussians(small_model(), x, y, verbose=0)
    ood = fitted(x[:3])["ood"]
    assert keras.backend.standardize_dtype(ood.dtype) == "float32"
    assert np.isfinite(to_numpy(ood)).all()


def test_a_layer_that_was_not_fitted_answers_nan():
    x, _ = clusters()
    scores = packed(x, np.eye(4)[:3])
    assert np.isnan(to_numpy(ClassGaussians(3)(x, scores))).all()


def test_bad_input_is_refused_and_changes_nothing():
    x, y = clusters()
    layer = ClassGaussians(3)
    layer.adapt(x, y)
    before = [weight.numpy() for weight in layer.weights]
    with pytest.raises(ValueError, match=r"number of samples\): 2: 0"):
        layer.adapt(x, np.minimum(y, 1))
    lonely = np.where(y == 2, 0, y)
    lonely[0] = 2
    with pytest.raises(ValueError, match=r"samples\): 2: 1"):
        layer.adapt(x, lonely)
    with pytest.raises(ValueError, match="must be finite.*enters the head"):
        layer.adapt(np.where(x > 0, np.nan, x), y)
    with pytest.raises(ValueError, match="all the same"):
        layer.adapt(np.ones_like(x), y)
    with pytest.raises(ValueError, match="embeddings of size 4"):
        layer.adapt(np.concatenate([x, x], axis=-1), y)
    with pytest.raises(ValueError, match="Labels must be integers in"):
        layer.adapt(x, y + 1)
    with pytest.raises(ValueError, match="Expected one-hot labels"):
        layer.adapt(x, np.full((300, 3), 1 / 3))
    with pytest.raises(ValueError, match="Labels do not fit"):
        layer.adapt(x, y[:-1])
    # A string would be true whatever it says.
    with pytest.raises(ValueError, match="`skip_missing` must be True or"):
        layer.adapt(x, y, skip_missing="no")
    for weight, value in zip(layer.weights, before, strict=True):
        np.testing.assert_array_equal(weight.numpy(), value)
    with pytest.raises(ValueError, match="input and the output"):
        ClassGaussians(4)(x, packed(x, np.eye(4)[:3]))
    with pytest.raises(ValueError, match="`units`"):
        ClassGaussians(1)


def test_models_that_do_not_fit_are_refused():
    x, y = clusters()

    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__()
            self.head = keras_halo.HALODense.reference(3)

        def call(self, inputs):
            return self.head(inputs)

    subclassed = Subclassed()
    with pytest.raises(ValueError, match="no weights yet"):
        fit_class_gaussians(subclassed, x, y)
    subclassed(x)
    with pytest.raises(ValueError, match="For a subclassed model"):
        fit_class_gaussians(subclassed, x, y)
    inputs = keras.Input((4,))
    held = keras.Model(inputs, subclassed(inputs))
    with pytest.raises(ValueError, match="model .* of type Subclassed"):
        fit_class_gaussians(held, x, y)
    headless = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    with pytest.raises(ValueError, match="exactly one `keras_halo.HALODense`"):
        fit_class_gaussians(headless, x, y)
    with pytest.raises(ValueError, match="Labels are missing"):
        fit_class_gaussians(small_model(), x)
    with pytest.raises(ValueError, match="dataset of batches"):
        fit_class_gaussians(small_model(), [x], verbose=0)
    with pytest.raises(ValueError, match="dataset of batches"):
        fit_class_gaussians(small_model(), [], verbose=0)
