"""decode_predictions: what a user reads off packed scores."""

import dataclasses

import numpy as np
import pytest
from helpers import naive_softmax, packed

import keras_halo
from keras_halo import decode_predictions


def _scores(shape=(20,), seed=0):
    rng = np.random.default_rng(seed)
    centroids = rng.normal(size=(5, 6))
    x = rng.normal(size=(*shape, 6))
    return packed(x, centroids, gamma=4.0, bias=-1.0), x, centroids


@pytest.mark.parametrize("shape", [(20,), (2, 3), (2, 3, 4)])
def test_against_the_book(shape):
    scores, x, centroids = _scores(shape)
    predictions = decode_predictions(scores)
    p = naive_softmax(scores[..., :6].astype("float64"))
    np.testing.assert_allclose(
        predictions.probabilities, p[..., :5], rtol=1e-4, atol=1e-7
    )
    np.testing.assert_allclose(
        predictions.abstain_probability, p[..., 5], rtol=1e-4, atol=1e-7
    )
    best = p.argmax(axis=-1)
    np.testing.assert_array_equal(
        predictions.labels, np.where(best == 5, -1, best)
    )
    np.testing.assert_array_equal(predictions.abstained, best == 5)
    centered = centroids - centroids.mean(axis=0)
    radii = ((x[..., None, :] - centered) ** 2).mean(axis=-1)
    np.testing.assert_allclose(
        predictions.squared_radius, radii, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        predictions.squared_norm, (x**2).mean(axis=-1), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(predictions.temperature, 4.0, rtol=1e-6)
    assert predictions.embedding_dim == 6
    assert predictions.labels.shape == predictions.temperature.shape == shape
    assert len(predictions) == shape[0]


@pytest.mark.parametrize("ahead", [0.0, 30.0, 200.0, 1000.0])
@pytest.mark.parametrize("shape", [(20,), (2, 3)])
def test_the_best_class_is_known_however_far_abstaining_is_ahead(shape, ahead):
    scores = _scores(shape)[0]
    best = scores[..., :5].argmax(axis=-1)
    assert len(np.unique(best)) > 2
    scores[..., 5] += ahead
    predictions = decode_predictions(scores)
    np.testing.assert_array_equal(predictions.best_class, best)
    np.testing.assert_array_equal(
        predictions.labels, np.where(predictions.abstained, -1, best)
    )
    assert ahead < 200.0 or not predictions.probabilities.any()


def test_the_origin_abstains_and_a_centroid_does_not():
    centroids = 2.0 * np.eye(4, 8)
    centered = centroids - centroids.mean(axis=0)
    x = np.concatenate([np.zeros((1, 8)), centered])
    predictions = decode_predictions(
        packed(x, centroids, gamma=40.0, bias=-1.0)
    )
    assert predictions.labels.tolist() == [-1, 0, 1, 2, 3]
    assert np.all(predictions.squared_radius >= 0.0)


def test_the_result_is_immutable():
    predictions = decode_predictions(_scores()[0])
    with pytest.raises(dataclasses.FrozenInstanceError):
        predictions.labels = None
    for field in dataclasses.fields(predictions):
        value = getattr(predictions, field.name)
        if isinstance(value, np.ndarray):
            with pytest.raises(ValueError, match="read-only"):
                value[...] = 0


def test_the_scores_stay_writable():
    scores = _scores()[0]
    decode_predictions(scores)
    scores[0, 0] = 0.0


def test_output_of_a_model_is_taken_as_it_is():
    scores = keras_halo.HALODense.reference(3)(np.zeros((2, 8), "float32"))
    assert decode_predictions(scores).labels.tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (np.zeros((3, 5)), "at least 8 columns"),
        (np.zeros(()), "at least 8 columns"),
        (np.zeros((3, 10)), "no packed geometry in 3 of 3 rows"),
    ],
)
def test_what_is_no_packed_scores_is_refused(scores, message):
    with pytest.raises(ValueError, match=message):
        decode_predictions(scores)


def test_embeddings_of_different_sizes_are_refused():
    other = packed(np.ones((2, 3)), np.eye(5, 3))
    mixed = np.concatenate([_scores()[0], other])
    with pytest.raises(ValueError, match=r"different sizes.*\[3, 6\]"):
        decode_predictions(mixed)


def test_nothing_in_nothing_out():
    predictions = decode_predictions(np.zeros((0, 5, 10), "float32"))
    assert predictions.labels.shape == (0, 5)
    assert predictions.best_class.shape == (0, 5)
    assert predictions.probabilities.shape == (0, 5, 4)
    assert predictions.embedding_dim == 0


def test_a_row_that_is_nan_is_abstained_on_with_a_warning():
    scores = np.repeat(_scores()[0][:1], 3, axis=0)
    expected = decode_predictions(scores)
    scores[1, 2] = np.nan
    with pytest.warns(UserWarning, match="1 of 3 rows hold NaN"):
        predictions = decode_predictions(scores)
    assert predictions.labels[1] == -1
    assert predictions.best_class[1] == -1
    assert predictions.abstain_probability[1] == 1.0
    assert not predictions.probabilities[1].any()
    assert np.isnan(predictions.squared_radius[1]).all()
    for row in (0, 2):
        assert predictions.labels[row] == expected.labels[row]
        np.testing.assert_array_equal(
            predictions.probabilities[row], expected.probabilities[row]
        )


@pytest.mark.parametrize(
    "output",
    [
        None,
        "model.keras",
        {"probabilities": np.zeros((2, 3))},
        np.array([{"scores": 1}]),
        [np.zeros((2, 9)), np.zeros((2, 9))],
        {"scores": np.zeros((2, 9)), "ood": np.zeros(3)},
    ],
)
def test_what_no_model_returns_is_refused_by_name(output):
    with pytest.raises(ValueError, match="Received"):
        decode_predictions(output)
    with pytest.raises(ValueError, match="Received"):
        keras_halo.ood_score(output)


def test_a_single_row_that_is_nan_is_abstained_on_too():
    scores = np.full((1, 10), np.nan, "float32")
    with pytest.warns(UserWarning, match="1 of 1 rows"):
        predictions = decode_predictions(scores)
    assert predictions.labels.tolist() == [-1]
    assert predictions.best_class.tolist() == [-1]
    assert predictions.abstain_probability.tolist() == [1.0]


@pytest.mark.parametrize("ood", [["a", "b"], [1j, 2.0], [[1.0], [1.0, 2.0]]])
def test_a_fitted_score_that_is_no_number_is_refused(ood):
    scores = np.repeat(_scores()[0][:1], 2, axis=0)
    with pytest.raises(ValueError, match="Received"):
        keras_halo.ood_score({"scores": scores, "ood": ood}, "fitted")
