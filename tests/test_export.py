"""Every way out of Python carries the scores and the decisions with it.

Formats whose package is missing are skipped; `tox -e export-jax` (or `torch`,
`tensorflow`) has them all.
"""

import keras
import numpy as np
import pytest
from digits import known_and_unknown
from formats import BACKEND, FORMATS, litert, openvino
from helpers import to_numpy

import keras_halo
from keras_halo import HALODense, HALOLoss, HALOSoftmax, layers
from keras_halo.layers.decision import rounded_down
from keras_halo.rejection import CoverageRule, GroupwiseRule, LabelSetRule

# What converters warn of is their own affair.
pytestmark = pytest.mark.filterwarnings("ignore")

NAMES = ["label", "own", "fitted_label", "probabilities", "ood", "fitted"]
NAMES.append("scores")


def digits():
    """Training data of the digits 0 to 4; 500 of these and 500 other ones."""
    x_known, y_known, x_unknown = known_and_unknown()
    x_new = np.concatenate([x_known[-500:], x_unknown[:500]])
    assert len(x_new) == 1000
    return x_known[:-500], y_known[:-500], x_new


def train(policy):
    """A small convnet with a HALO head, trained under a dtype policy."""
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(policy)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1), name="image"),
            keras.layers.Conv2D(16, 3, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(16),
            HALODense(5),
        ]
    )
    keras.config.set_dtype_policy("float32")
    model.compile(keras.optimizers.Adam(5e-3), loss=HALOLoss())
    x, y, _ = digits()
    model.fit(x, y, batch_size=64, epochs=30, verbose=0)
    return model


def with_decisions(model):
    """The model with everything that can be decided inside of the graph."""
    x, y, x_new = digits()
    fitted = keras_halo.fit_class_gaussians(model, x, y, verbose=0)
    answers = fitted.predict(x, verbose=0)
    rule = CoverageRule(0.9).fit(answers["scores"])
    fitted_rule = CoverageRule(0.9, method=None).fit(answers["ood"])
    scores, ood = fitted.output["scores"], fitted.output["ood"]
    outputs = [
        rule.to_layer(name="label")(scores),
        layers.Decision(name="own")(scores),
        fitted_rule.to_layer(name="fitted_label")(scores, ood),
        HALOSoftmax(name="probabilities")(scores),
        layers.OODScore(name="ood")(scores),
        ood,
        scores,
    ]
    deployed = keras.Model(fitted.inputs[0], outputs)
    # Keras refuses to export what was never called outside of `predict`.
    deployed(x_new[:1])
    expected = dict(zip(NAMES, deployed.predict(x_new, verbose=0), strict=True))
    # What the rules and functions say, who work on NumPy arrays.
    answers = fitted.predict(x_new, verbose=0)
    packed = answers["scores"]
    accepted = fitted_rule.predict(answers["ood"]).accepted
    outside = {
        "label": rule.predict(packed).labels,
        "own": keras_halo.decode_predictions(packed).labels,
        "fitted_label": np.where(accepted, np.argmax(packed[:, :5], -1), -1),
    }
    return deployed, x_new, expected, outside


@pytest.fixture(scope="module")
def trained():
    return train("float32")


@pytest.fixture(scope="module")
def deployed(trained):
    return with_decisions(trained)


def assert_same(outputs, expected, what, rtol=1e-4):
    """The same decisions, and scores as near as float32 is."""
    for name, value in zip(NAMES, outputs, strict=True):
        value, reference = to_numpy(value), expected[name]
        if name in ("label", "own", "fitted_label"):
            differing = int((value != reference).sum())
            assert differing == 0, f"{what}: {differing} of {name} differ"
        else:
            assert value.dtype == "float32", (what, name)
            np.testing.assert_allclose(
                value, reference, rtol=rtol, atol=rtol, err_msg=f"{what} {name}"
            )


@pytest.mark.slow
def test_the_graph_decides_as_rules_and_functions_do(deployed):
    _, _, expected, outside = deployed
    for name, labels in outside.items():
        np.testing.assert_array_equal(expected[name], labels)
        # There is something to decide, and the unknown are rejected more. All
        # of them may be: the fitted score is that good.
        rejected = expected[name] == -1
        assert 0 < rejected[:500].mean() < rejected[500:].mean()


@pytest.mark.parametrize("export", FORMATS, ids=lambda f: f.__name__)
def test_the_same_decisions_on_a_thousand_inputs(export, deployed, tmp_path):
    model, x, expected, _ = deployed
    run = export(model, tmp_path)
    outputs = [to_numpy(output) for output in run(x)]
    assert_same(outputs, expected, export.__name__)
    # The columns of geometry, of the order of -1e12, are still exact.
    packed = outputs[NAMES.index("scores")]
    assert (packed[:, -5:] < -(2.0**40)).all()
    decoded = keras_halo.decode_predictions(packed)
    np.testing.assert_array_equal(decoded.labels, expected["own"])
    assert decoded.embedding_dim == 128
    # Any number of inputs.
    for n in (1, 7):
        few = {name: value[:n] for name, value in expected.items()}
        assert_same(run(x[:n]), few, f"{export.__name__}, {n} inputs")


@pytest.mark.slow
@pytest.mark.parametrize("export", FORMATS, ids=lambda f: f.__name__)
def test_a_head_on_the_features_of_all_blocks(export, tmp_path):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 1), name="image")
    early = keras.layers.Conv2D(8, 3, activation="relu")(inputs)
    late = keras.layers.Conv2D(12, 3, activation="relu")(early)
    embedding = keras.layers.Dense(6)(keras.layers.Flatten()(late))
    features = layers.BlockFeatures()([early, late, embedding])
    scores = HALODense(5)(keras.layers.Dense(16)(features))
    model = keras.Model(inputs, [scores, features])
    x = digits()[2]
    model(x[:1])
    expected = model.predict(x, verbose=0)
    run = export(model, tmp_path)
    for n in (len(x), 1, 7):
        outputs = [to_numpy(output) for output in run(x[:n])]
        for output, reference in zip(outputs, expected, strict=True):
            assert output.dtype == "float32"
            np.testing.assert_allclose(
                output, reference[:n], rtol=1e-4, atol=1e-4
            )
        # Temperature and size of the embedding are exact.
        np.testing.assert_array_equal(outputs[0][:, -2:], expected[0][:n, -2:])


RULES = {
    "coverage": lambda: CoverageRule(0.9),
    "by class": lambda: GroupwiseRule(CoverageRule(0.9)),
    "label sets": lambda: LabelSetRule(0.9, method="abstain"),
}


def p_values_of(scores, certificate):
    """P-values by the table of a certificate, one score after the other."""
    ranks, n = certificate["ranks"], certificate["calibration"]["samples"]
    # Rounded down, as the layer compares them in float32.
    entries = [rounded_down(entry, "float32") for entry in ranks["entries"]]
    table = list(zip(entries, ranks["counts"], strict=True))
    return np.array(
        [
            (1 + sum(count for entry, count in table if score <= entry))
            / (n + 1)
            for score in scores
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("export", FORMATS, ids=lambda f: f.__name__)
def test_a_guarded_model_decides_alike_outside(export, rule, trained, tmp_path):
    x, y, x_new = digits()
    rule = RULES[rule]().fit(trained.predict(x, verbose=0), y)
    certificate = rule.certificate()
    guarded = keras_halo.guard(trained, rule)
    guarded(x_new[:1])
    expected = guarded.predict(x_new, verbose=0)
    if BACKEND == "torch" and export is openvino:
        # PyTorch's tracer refuses the dictionary.
        answers = [guarded.output[name] for name in sorted(expected)]
        guarded = keras.Model(guarded.inputs[0], answers)
        guarded(x_new[:1])
    run = export(guarded, tmp_path)
    outputs = run(x_new)
    if isinstance(outputs, dict):
        outputs = [outputs[name] for name in sorted(expected)]
    # A format without names keeps the order of the alphabet.
    outputs = dict(zip(sorted(expected), map(to_numpy, outputs), strict=True))
    if "p_value" in expected:
        # Steps of the score: where rounding moves a score past one, the p-value
        # is that of the score that was emitted.
        expected["p_value"] = p_values_of(outputs["score"], certificate)
    for name, output in outputs.items():
        if name == "label":
            np.testing.assert_array_equal(output, expected[name])
        else:
            np.testing.assert_allclose(
                output, expected[name], rtol=1e-4, atol=1e-4, err_msg=name
            )
    rejected = expected["label"] == -1
    assert rejected[:500].mean() < 0.5 < rejected[500:].mean()


@pytest.fixture(scope="module")
def deployed_float16():
    return with_decisions(train("mixed_float16"))


@pytest.mark.slow
@pytest.mark.parametrize("export", FORMATS, ids=lambda f: f.__name__)
def test_a_mixed_precision_model_keeps_its_float32_head(
    export, deployed_float16, tmp_path
):
    model, x, expected, _ = deployed_float16
    run = export(model, tmp_path)
    if export is litert:
        # Its convolutions know no float16; the converter leaves TensorFlow's.
        with pytest.raises(RuntimeError, match="Select TensorFlow op"):
            run(x)
        return
    outputs = [to_numpy(out) for out in run(x)]
    for name, value in zip(NAMES, outputs, strict=True):
        if name in ("label", "own", "fitted_label"):
            # A runtime may round the 16 bits of the backbone otherwise.
            assert (value == expected[name]).mean() >= 0.99, name
        else:
            assert value.dtype == "float32", name
            assert np.isfinite(value).all(), name
    # Nothing of the geometry went through 16 bits, whose largest is 65504.
    decoded = keras_halo.decode_predictions(outputs[-1])
    reference = keras_halo.decode_predictions(expected["scores"])
    np.testing.assert_allclose(
        decoded.temperature, reference.temperature, rtol=1e-6
    )
    assert decoded.embedding_dim == 128


@pytest.mark.slow
def test_quantizing_the_backbone_leaves_the_head_alone(trained, tmp_path):
    # A copy, so that the other tests find the model as it was trained.
    model = keras.models.clone_model(trained)
    model.set_weights(trained.get_weights())
    _, _, x = digits()
    head = model.layers[-1]
    weights = [to_numpy(weight) for weight in head.weights]
    before = keras_halo.decode_predictions(model.predict(x, verbose=0))
    model.quantize("int8")
    assert [layer.dtype_policy.name for layer in model.layers[-2:]] == [
        "int8_from_float32",
        "float32",
    ]
    for old, new in zip(weights, head.weights, strict=True):
        assert to_numpy(new).dtype == "float32"
        np.testing.assert_array_equal(old, to_numpy(new))
    scores = model.predict(x, verbose=0)
    assert scores.dtype == "float32"
    same = np.mean(
        keras_halo.decode_predictions(scores).labels == before.labels
    )
    print(f"{same:.1%} of the answers are as before on {BACKEND}")
    assert same >= 0.98
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(
        loaded.predict(x, verbose=0), scores, rtol=1e-5, atol=1e-4
    )
