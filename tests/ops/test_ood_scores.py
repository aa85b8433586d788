"""Out-of-distribution scores against loops in NumPy, SciPy and extremes."""

import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from helpers import float64, jit, packed, to_numpy, value_and_gradients
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from keras import ops

import keras_halo
from keras_halo.layers import OODScore
from keras_halo.ops.ood_scores import OOD_METHODS, ood_score, radial_tail

stats = pytest.importorskip("scipy.stats")


def naive_scores(embedding, centroids, gamma, bias):
    """All scores of one embedding, from distances, one class at a time."""
    dim = len(embedding)
    centroids = centroids - centroids.mean(axis=0)
    radii = [np.mean((embedding - c) ** 2) for c in centroids]
    logits = [-gamma * r for r in radii]
    logits.append(bias - gamma * np.mean(embedding**2))
    top = max(logits)
    weights = [np.exp(logit - top) for logit in logits]
    odds = weights[-1] / sum(weights[:-1])
    radial = [0.5 * r - (0.5 - 1 / dim) * np.log(r) for r in radii]
    lower = stats.chi2.cdf(dim * min(radii), dim)
    upper = stats.chi2.sf(dim * min(radii), dim)
    return {
        "joint": np.log1p(odds) + dim * min(radial),
        "abstain": np.log(odds),
        "radius": -np.log(2 * min(lower, upper)),
        "energy": gamma * min(radii)
        - np.log(sum(np.exp(gamma * (min(radii) - r)) for r in radii)),
        "max_probability": -np.log(max(weights[:-1]) / sum(weights)),
        "nearest": min(radii),
        **naive_baselines(
            np.array(logits[:-1]) + gamma * np.mean(embedding**2),
            np.array(weights[:-1]) / sum(weights[:-1]),
            gamma * np.sqrt(np.mean(embedding**2)),
        ),
    }


def naive_baselines(logits, probabilities, length):
    return {
        "max_logit": -logits.max(),
        "logit_gap": np.mean(np.sort(logits)[:-1]) - logits.max(),
        "gap": -(logits.max() - logits.mean()) / length,
        # Not 1 - p, of which nothing is left where p is nearly one.
        "gen": sum(
            (p * np.delete(probabilities, k).sum()) ** 0.1
            for k, p in enumerate(probabilities)
        ),
    }


# Above the floor of the radial term and where a loop in float64 holds.
TOLERANCE = {"radius": 0.08}


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    # Few widths, because JAX compiles every operation for every shape.
    num_classes=st.sampled_from([2, 7]),
    dim=st.integers(2, 40),
    spread=st.floats(0.3, 2.0),
    gamma=st.floats(0.1, 20.0),
    bias=st.floats(-5.0, 5.0),
)
def test_methods_agree_with_a_loop(seed, num_classes, dim, spread, gamma, bias):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(3, dim)) * spread
    centroids = rng.normal(size=(num_classes, dim))
    expected = [naive_scores(row, centroids, gamma, bias) for row in x]
    # The loop knows no floor of the logarithm.
    assume(min(row["nearest"] for row in expected) > 1e-3)
    with float64():
        scores = packed(x, centroids, gamma, bias, dtype="float64")
        for method in OOD_METHODS:
            np.testing.assert_allclose(
                ood_score(scores, method),
                [row[method] for row in expected],
                rtol=1e-3,
                atol=TOLERANCE.get(method, 2e-3),
                err_msg=method,
            )


@pytest.mark.parametrize("method", OOD_METHODS)
def test_float32_agrees_with_a_loop(method):
    rng = np.random.default_rng(1)
    x, centroids = rng.normal(size=(20, 16)), rng.normal(size=(5, 16))
    expected = [naive_scores(row, centroids, 9.0, -1.0)[method] for row in x]
    scores = packed(x, centroids, 9.0, -1.0)
    np.testing.assert_allclose(
        ood_score(scores, method), expected, rtol=1e-3, atol=6e-3
    )


@pytest.mark.parametrize("method", OOD_METHODS)
def test_rotations_change_nothing(method):
    rng = np.random.default_rng(2)
    x, centroids = rng.normal(size=(20, 8)), rng.normal(size=(5, 8))
    rotation, _ = np.linalg.qr(rng.normal(size=(8, 8)))
    np.testing.assert_allclose(
        ood_score(packed(x @ rotation, centroids @ rotation), method),
        ood_score(packed(x, centroids), method),
        rtol=1e-3,
        atol=1e-3,
    )


@pytest.mark.parametrize("dim", [2, 3, 10, 64, 512, 4096])
def test_radial_tail_has_the_error_that_is_stated(dim):
    around = 1 + np.sqrt(2 / dim) * np.linspace(-8, 8, 801)
    radii = np.concatenate([np.geomspace(1e-3, 1e3, 801), around])
    radii = radii[radii >= 1e-3].astype("float32")
    chi2 = stats.chi2(dim)
    d = dim * radii.astype("float64")
    expected = -np.log(2) - np.minimum(chi2.logcdf(d), chi2.logsf(d))
    # Where SciPy's own logarithm underflows there is nothing to compare to.
    exact = np.isfinite(expected)
    tail = to_numpy(radial_tail(ops.convert_to_tensor(radii), dim))
    error = np.abs(tail - expected)[exact]
    bound = max(0.16 / dim, 1e-4) + 1e-5 * expected[exact]
    assert exact.sum() > 800
    assert (error < bound).all()
    probability_error = np.abs(np.exp(-tail) - np.exp(-expected))
    assert probability_error.max() < max(0.008 / dim, 1e-5)


def test_radial_tail_is_a_p_value_of_gaussian_members():
    rng = np.random.default_rng(3)
    radii = rng.chisquare(10, size=20_000) / 10
    p = np.exp(-to_numpy(radial_tail(ops.convert_to_tensor(radii), 10)))
    assert stats.kstest(p, "uniform").statistic < 0.02


@pytest.fixture(scope="module")
def extremes():
    """Packed scores of embeddings and heads far outside of what is usual."""
    rng = np.random.default_rng(4)
    dim, num_classes = 6, 4
    centroids = rng.normal(size=(num_classes, dim))
    directions = rng.normal(size=(4, dim))
    x = [size * directions for size in (0.0, 1e-6, 1e2, 1e6)]
    # Also exactly on a centroid, where the radius is zero or rounds below.
    x = np.concatenate([*x, centroids - centroids.mean(axis=0)])
    return np.concatenate(
        [
            packed(x, centroids, gamma, bias)
            for gamma in (1e-3, 4.0, 200.0)
            for bias in (-1e4, 0.0, 1e4)
        ]
    )


@pytest.mark.parametrize("method", OOD_METHODS)
def test_extremes_are_finite_with_finite_gradients(method, extremes):
    assert np.isfinite(ood_score(extremes, method)).all()
    _, (gradient,) = value_and_gradients(
        lambda s: ops.sum(ood_score(s, method)), extremes
    )
    assert np.isfinite(gradient).all()


def test_gradient_of_the_joint_score_is_a_difference_quotient():
    rng = np.random.default_rng(5)
    with float64():
        scores = packed(
            rng.normal(size=(1, 6)), rng.normal(size=(4, 6)), dtype="float64"
        )
        for method in OOD_METHODS:
            _, (gradient,) = value_and_gradients(
                lambda s, m=method: ops.sum(ood_score(s, m)), scores
            )
            for column in range(5):
                step = np.zeros_like(scores)
                step[0, column] = 1e-5
                up, down = (
                    ood_score(scores + sign * step, method)[0]
                    for sign in (1, -1)
                )
                np.testing.assert_allclose(
                    gradient[0, column], (up - down) / 2e-5, atol=1e-4
                )


def test_scores_keep_resolution_where_probabilities_saturate():
    bias = np.array([-400.0, -300.0, 300.0, 400.0])
    scores = np.repeat(packed(np.ones((1, 4)), np.eye(4)), 4, axis=0)
    scores[:, 4] = bias
    assert (np.diff(ood_score(scores, "abstain")) > 50).all()
    joint = ood_score(scores, "joint")
    assert joint[3] - joint[2] == pytest.approx(100, rel=1e-3)
    confident = np.repeat(packed(np.ones((1, 4)), np.eye(4)), 2, axis=0)
    confident[:, :5] = [[30, 0, 0, 0, 0], [40, 0, 0, 0, 0]]
    doubt = ood_score(confident, "max_probability")
    np.testing.assert_allclose(doubt, 4 * np.exp([-30.0, -40.0]), rtol=1e-3)


def test_the_generalized_entropy_of_sure_inputs_is_exact():
    scores = np.repeat(packed(np.ones((1, 4)), np.eye(4)), 4, axis=0)
    lead = np.array([8.0, 16.0, 40.0, 200.0])
    scores[:, :4] = [[top, 0.0, -1.0, 0.0] for top in lead]
    # Where the others are next to nothing, each adds what it is itself, and
    # the best class what they are together.
    parts = np.exp([0.0, -1.0, 0.0])
    expected = np.exp(-0.1 * lead) * (sum(parts**0.1) + sum(parts) ** 0.1)
    found = ood_score(scores, "gen")
    np.testing.assert_allclose(found[1:], expected[1:], rtol=2e-6)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-3)


def test_far_and_central_inputs_are_outliers_of_the_joint_score():
    centroids = np.diag([4.0, 4.0, 4.0, 4.0])
    member = centroids - centroids.mean(axis=0) + 0.7
    inside = ood_score(packed(member, centroids), "joint")
    outside = np.array([np.zeros(4), 40 * np.ones(4), [40, 0, 0, 0]])
    scores = ood_score(packed(outside, centroids), "joint")
    assert scores.min() > inside.max()


def test_the_stated_blind_spots_are_there():
    centroids = np.diag([4.0, 4.0, 4.0, 4.0])
    centered = centroids - centroids.mean(axis=0)
    member, far = centered[:1] + 0.7, 40 * centered[:1]
    both = packed(np.concatenate([member, far]), centroids)
    for method in ("abstain", "max_probability"):
        near_score, far_score = ood_score(both, method)
        assert far_score <= near_score
    for method in ("joint", "radius", "energy", "nearest"):
        near_score, far_score = ood_score(both, method)
        assert far_score > near_score
    on_centroid = packed(np.concatenate([member, centered[:1]]), centroids)
    near_score, on_score = ood_score(on_centroid, "nearest")
    assert on_score < near_score
    near_score, on_score = ood_score(on_centroid, "radius")
    assert on_score > near_score


def test_the_logit_gap_ranks_as_the_largest_logit():
    rng = np.random.default_rng(10)
    x, centroids = 3 * rng.normal(size=(50, 6)), rng.normal(size=(4, 6))
    with float64():
        scores = packed(x, centroids, gamma=2.5, dtype="float64")
        gap = ood_score(scores, "logit_gap")
        largest = ood_score(scores, "max_logit")
    # Centred centroids make the mean of the logits the same for every input.
    mean = -2.5 * centroids.var(axis=0).mean()
    np.testing.assert_allclose(gap, (largest + mean) * 4 / 3, atol=1e-10)
    assert largest.std() > 1


def test_the_logit_gap_of_a_tie_is_zero():
    scores = packed(np.zeros((1, 4)), 3 * np.eye(4))
    assert ood_score(scores, "logit_gap") == 0.0
    assert ood_score(scores, "max_logit") > 1.0


def test_abstain_is_the_probability_that_decode_predictions_gives():
    rng = np.random.default_rng(6)
    scores = packed(rng.normal(size=(9, 5)), rng.normal(size=(3, 5)))
    odds = np.exp(ood_score(scores, "abstain"))
    np.testing.assert_allclose(
        odds / (1 + odds),
        keras_halo.decode_predictions(scores).abstain_probability,
        rtol=1e-4,
    )


@pytest.mark.parametrize("method", OOD_METHODS)
def test_kinds_and_ranks_of_input(method):
    rng = np.random.default_rng(7)
    scores = packed(rng.normal(size=(2, 3, 5)), rng.normal(size=(4, 5)))
    array = ood_score(scores, method)
    assert isinstance(array, np.ndarray)
    assert array.shape == (2, 3)
    tensor = ood_score(ops.convert_to_tensor(scores), method)
    assert ops.is_tensor(tensor)
    np.testing.assert_allclose(to_numpy(tensor), array, rtol=1e-5, atol=1e-5)
    compiled = jit(lambda s: ood_score(s, method))
    np.testing.assert_allclose(
        to_numpy(compiled(ops.convert_to_tensor(scores))),
        array,
        rtol=1e-4,
        atol=1e-4,
    )
    # To the last bit: a threshold may be the score of one of them.
    np.testing.assert_array_equal(ood_score(scores.tolist(), method), array)
    assert ood_score(scores[0, 0], method).shape == ()
    assert ood_score(scores[:0], method).shape == (0, 3)
    symbolic = ood_score(keras.KerasTensor(scores.shape), method)
    assert tuple(symbolic.shape) == (2, 3)


def test_bad_input_is_refused():
    scores = packed(np.ones((2, 5)), np.eye(5))
    with pytest.raises(ValueError, match="`method` must be one of 'abstain'"):
        ood_score(scores, "mahalanobis")
    with pytest.raises(ValueError, match="`method` must be one of"):
        OODScore(method=None)
    with pytest.raises(ValueError, match="must be finite"):
        ood_score(np.where(scores > -1e6, np.nan, scores))
    with pytest.raises(ValueError, match="no packed geometry"):
        ood_score(np.ones((2, 9)))
    with pytest.raises(ValueError, match="at least 8 columns"):
        ood_score(np.ones((2, 5)))
    with pytest.raises(ValueError, match="at least 8 columns"):
        OODScore()(keras.KerasTensor((2, 5)))


IN_A_NEW_PROCESS = """
import json, sys
import keras, numpy as np
import keras_halo
model = keras.models.load_model(sys.argv[1])
x = np.load(sys.argv[2])
outputs = model.predict(x, verbose=0)
print(json.dumps({k: np.asarray(v).tolist() for k, v in outputs.items()}))
"""


def in_a_new_process(model, x, folder):
    """Outputs of a model that was saved, loaded and run by a new Python."""
    model.save(folder / "model.keras")
    np.save(folder / "x.npy", x)
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            IN_A_NEW_PROCESS,
            str(folder / "model.keras"),
            str(folder / "x.npy"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "KERAS_BACKEND": keras.backend.backend()},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
def test_layers_in_a_functional_model_survive_a_new_process(tmp_path):
    rng = np.random.default_rng(8)
    inputs = keras.Input((6,))
    scores = keras_halo.HALODense(4)(keras.layers.Dense(8)(inputs))
    # With what was fitted after the training.
    fitted = keras_halo.fit_class_gaussians(
        keras.Model(inputs, scores),
        rng.normal(size=(64, 6)).astype("float32"),
        np.arange(64) % 4,
        verbose=0,
    )
    scores = fitted.output["scores"]
    outputs = {method: OODScore(method)(scores) for method in OOD_METHODS}
    model = keras.Model(fitted.inputs, {**fitted.output, **outputs})
    x = rng.normal(size=(5, 6)).astype("float32")
    before = model.predict(x, verbose=0)
    for method in OOD_METHODS:
        np.testing.assert_allclose(
            before[method],
            ood_score(before["scores"], method),
            rtol=1e-4,
            atol=1e-4,
        )
    after = in_a_new_process(model, x, tmp_path)
    for name, value in before.items():
        np.testing.assert_allclose(after[name], value, rtol=1e-5, atol=1e-5)


def test_layer_under_mixed_precision_answers_float32():
    keras.config.set_dtype_policy("mixed_float16")
    inputs = keras.Input((6,))
    model = keras.Model(inputs, OODScore()(keras_halo.HALODense(3)(inputs)))
    score = model(np.ones((2, 6), "float32"))
    assert keras.backend.standardize_dtype(score.dtype) == "float32"
    assert keras.backend.standardize_dtype(model.output.dtype) == "float32"
    assert np.isfinite(to_numpy(score)).all()


def test_layer_passes_the_checks_of_keras():
    from keras.src import testing

    scores = packed(np.ones((2, 5)), np.eye(5))

    class Check(testing.TestCase):
        def test_layer(self):
            self.run_layer_test(
                OODScore,
                init_kwargs={"method": "energy"},
                input_data=scores,
                expected_output_shape=(2,),
                expected_num_trainable_weights=0,
                expected_num_non_trainable_weights=0,
                supports_masking=True,
                run_mixed_precision_check=False,
                run_training_check=False,
            )

    outcome = Check("test_layer").run()
    assert outcome.wasSuccessful(), outcome.failures + outcome.errors
