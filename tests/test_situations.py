"""What people do with models that have other heads, done with this one."""

import copy
import pickle

import keras
import numpy as np
import pytest
from helpers import to_numpy
from keras import ops

import keras_halo
from keras_halo import HALODense, HALOLoss, HALOSoftmax, metrics, rejection
from keras_halo.ops import packing

pytestmark = pytest.mark.slow

X = np.random.default_rng(0).normal(size=(16, 6)).astype("float32")
Y = np.argmax(X[:, :3], axis=-1)
HEADS = {"default": HALODense, "reference": HALODense.reference}


def make_model(head="default"):
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, activation="relu", name="backbone"),
            HEADS[head](3),
        ]
    )


def trained(optimizer, batch_size=8, epochs=3, head="default"):
    model = make_model(head)
    model.compile(optimizer, loss=HALOLoss())
    model.fit(
        X, Y, batch_size=batch_size, epochs=epochs, verbose=0, shuffle=False
    )
    return model


def assert_same_weights(first, second, atol=1e-5):
    for one, other in zip(
        first.trainable_variables, second.trainable_variables, strict=True
    ):
        np.testing.assert_allclose(
            to_numpy(one), to_numpy(other), rtol=1e-4, atol=atol
        )


@pytest.mark.parametrize("head", HEADS)
def test_weight_decay_leaves_the_temperature_where_training_starts(head):
    # A temperature that the decay pulls on loses 1.9 of 15 here.
    temperatures = []
    for weight_decay in (0.0, 0.1):
        optimizer = keras.optimizers.AdamW(1e-2, weight_decay=weight_decay)
        model = make_model(head)
        model.compile(optimizer, loss=HALOLoss())
        # 120 steps of one and the same batch, in one epoch: on TensorFlow
        # epochs take longer than steps.
        steps = [np.tile(a, (120,) + (1,) * (a.ndim - 1)) for a in (X, Y)]
        model.fit(*steps, batch_size=16, shuffle=False, verbose=0)
        temperatures.append(float(to_numpy(model.layers[-1].temperature)))
    assert abs(temperatures[1] - temperatures[0]) < 0.15


def test_weight_decay_alone_moves_no_temperature():
    head = HALODense(3)
    head.build((None, 6))
    start = float(to_numpy(head.temperature))
    optimizer = keras.optimizers.AdamW(0.1, weight_decay=0.1)
    optimizer.build([head.raw_gamma])
    for _ in range(120):
        optimizer.apply([keras.ops.zeros(())])
    assert float(to_numpy(head.temperature)) == start


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_averaged_weights(momentum):
    plain = trained(keras.optimizers.Adam(1e-2))
    averaged = trained(
        keras.optimizers.Adam(1e-2, use_ema=True, ema_momentum=momentum)
    )
    if momentum == 0.0:
        assert_same_weights(averaged, plain)
    else:
        moved = averaged.layers[-1].kernel - plain.layers[-1].kernel
        assert 1e-5 < np.abs(to_numpy(moved)).max() < 0.1
    # Statistics are no weights to average: they follow the training.
    for name in ("abstain_bias", "far_bias", "evidence_mean"):
        of_each = [getattr(m.layers[-1], name) for m in (averaged, plain)]
        np.testing.assert_allclose(*map(to_numpy, of_each), rtol=1e-4)


@pytest.mark.parametrize("head", HEADS)
def test_accumulated_gradients_are_those_of_larger_batches(head):
    at_once = trained(keras.optimizers.SGD(0.01), head=head)
    in_two = trained(
        keras.optimizers.SGD(0.01, gradient_accumulation_steps=2),
        batch_size=4,
        head=head,
    )
    assert_same_weights(in_two, at_once)


@pytest.mark.parametrize(
    "duplicate",
    [lambda model: pickle.loads(pickle.dumps(model)), copy.deepcopy],
    ids=["pickle", "deepcopy"],
)
def test_copies_of_a_model_answer_alike(duplicate):
    model = trained("adam")
    twin = duplicate(model)
    expected = model.predict(X, verbose=0)
    np.testing.assert_allclose(twin.predict(X, verbose=0), expected, rtol=1e-6)
    twin.fit(X, Y, epochs=1, verbose=0)
    # They share nothing.
    np.testing.assert_array_equal(model.predict(X, verbose=0), expected)


def test_a_backbone_with_lora_trains_and_comes_back(tmp_path):
    model = trained("adam")
    model.get_layer("backbone").enable_lora(2)
    model.compile("adam", loss=HALOLoss())
    before = to_numpy(model.get_layer("backbone")._kernel).copy()
    centroids = to_numpy(model.layers[-1].centroids).copy()
    model.fit(X, Y, epochs=2, verbose=0)
    np.testing.assert_array_equal(
        to_numpy(model.get_layer("backbone")._kernel), before
    )
    assert np.abs(to_numpy(model.layers[-1].centroids) - centroids).max() > 0
    expected = model.predict(X, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    # The adapters have been joined with the kernel.
    np.testing.assert_allclose(
        loaded.predict(X, verbose=0)[:, :4], expected[:, :4], atol=1e-4
    )


def test_several_outputs_of_which_one_is_a_halo_head():
    inputs = keras.Input((6,))
    x = keras.layers.Dense(8, activation="relu")(inputs)
    # Named alike: Keras 3.10 asks for names of layers.
    outputs = {
        "kind": HALODense(3, name="kind")(x),
        "size": keras.layers.Dense(1, name="size")(x),
    }
    model = keras.Model(inputs, outputs)
    model.compile(
        "sgd",
        loss={"kind": HALOLoss(), "size": "mse"},
        loss_weights={"kind": 2.0, "size": 0.5},
        metrics={"kind": ["accuracy"]},
    )
    y = {"kind": Y, "size": X[:, :1]}
    logs = model.evaluate(X, y, verbose=0, return_dict=True, batch_size=16)
    scores = model.predict(X, verbose=0)
    loss = float(HALOLoss()(Y, scores["kind"]))
    error = np.mean((scores["size"] - X[:, :1]) ** 2)
    np.testing.assert_allclose(logs["loss"], 2 * loss + error / 2, rtol=1e-4)
    model.fit(X, y, verbose=0)


def test_a_teacher_that_abstains_teaches_by_soft_labels():
    teacher = trained("adam", head="reference")
    # It abstains on half of them.
    best = teacher.predict(X, verbose=0)[:, :3].max(axis=-1)
    teacher.layers[-1].abstain_bias.assign(np.median(best))
    scores = teacher.predict(X, verbose=0)
    hard = scores.argmax(axis=-1)
    abstained = hard == 3
    assert 0 < abstained.sum() < len(X)
    soft = keras.Sequential([teacher, HALOSoftmax(abstain=False)])
    targets = soft.predict(X, verbose=0)

    def losses(y, **arguments):
        student = make_model()
        student.compile("adam", loss=HALOLoss(**arguments))
        return student.fit(X, y, epochs=2, verbose=0).history["loss"]

    assert np.isfinite(losses(targets)).all()
    # K is no class: in an array an error, in `fit` not to be overlooked.
    assert np.isnan(losses(hard)[0])
    with pytest.raises(ValueError, match="Labels must be integers in"):
        HALOLoss()(hard, scores)
    # Or what the teacher does not know is left out.
    assert np.isfinite(losses(hard, ignore_class=3)).all()
    labels = keras_halo.decode_predictions(scores).labels
    np.testing.assert_array_equal(labels < 0, abstained)
    assert np.isfinite(losses(labels, ignore_class=-1)).all()
    # With K + 1 probabilities of the teacher there is one column too many.
    every = keras.Sequential([teacher, HALOSoftmax()])
    with pytest.raises(ValueError, match="Labels do not fit"):
        losses(every.predict(X, verbose=0))


@keras.saving.register_keras_serializable(package="situations")
class OwnConfidence(metrics.PackedMean):
    reads_labels = False

    def values_and_weights(self, samples, weights):
        return ops.max(ops.softmax(samples.logits), axis=-1), weights


def test_a_metric_of_ones_own_saves_and_loads(tmp_path):
    model = make_model()
    metric = OwnConfidence(name="confidence")
    model.compile("sgd", loss=HALOLoss(), metrics=[metric])
    model.fit(X, Y, epochs=1, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    scores = model.predict(X, verbose=0)
    expected = to_numpy(HALOSoftmax()(scores)).max(axis=-1).mean()
    for one in (model, loaded):
        for batch_size in (5, 16):
            found = one.evaluate(
                X, Y, batch_size=batch_size, verbose=0, return_dict=True
            )
            assert found["confidence"] == pytest.approx(expected, rel=1e-5)
    restored = OwnConfidence.from_config(metric.get_config())
    restored.update_state(None, scores, sample_weight=Y == 0)
    own = to_numpy(HALOSoftmax()(scores)).max(axis=-1)[Y == 0].mean()
    assert float(restored.result()) == pytest.approx(own, rel=1e-5)


def own_score(scores):
    """How far the second best class lies behind the best, negated."""
    logits = ops.sort(packing.answer_logits(scores)[..., :-1], axis=-1)
    return logits[..., -2] - logits[..., -1]


@keras.saving.register_keras_serializable(package="situations")
class OwnScore(keras.layers.Layer):
    """Puts a score of the user's own beside packed scores."""

    def call(self, scores):
        return {"scores": scores, "ood": own_score(scores)}


@keras.saving.register_keras_serializable(package="situations")
class OwnMargin(keras.layers.Layer):
    """Reads packed scores, and gives a power of the margin."""

    def __init__(self, power=1.0, **kwargs):
        super().__init__(**kwargs)
        self.power = power

    def call(self, scores):
        return ops.power(-own_score(scores), self.power)

    def get_config(self):
        return {**super().get_config(), "power": self.power}


def test_a_layer_of_ones_own_saves_and_loads(tmp_path):
    model = make_model()
    scores = model.outputs[0]
    both = keras.Model(
        model.inputs, {"scores": scores, "margin": OwnMargin(2.0)(scores)}
    )
    both.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    packed = model.predict(X, verbose=0)
    first, second = np.sort(packed[:, :3], axis=-1)[:, :0:-1].T
    for one in (both, loaded):
        margin = one.predict(X, verbose=0)["margin"]
        np.testing.assert_allclose(margin, (first - second) ** 2, rtol=1e-4)


def test_a_function_of_ones_own_is_evaluated_and_monitored():
    model = make_model()
    packed, far = (model.predict(x, verbose=0) for x in (X, 5 * X))
    expected = metrics.auroc(
        to_numpy(own_score(packed)), to_numpy(own_score(far))
    )
    report = keras_halo.evaluate_ood(
        model, (X, Y), {"far": 5 * X}, method=own_score, verbose=0
    )
    assert report["far"].auroc == pytest.approx(expected, abs=1e-6)
    monitor = keras_halo.OODMonitor(X, {"far": 5 * X}, method=own_score)
    model.compile(keras.optimizers.SGD(0.0), loss=HALOLoss())
    monitor.set_model(model)
    assert monitor.measure()["far_auroc"] == pytest.approx(expected, abs=1e-6)


RULES = {
    "coverage": lambda: rejection.CoverageRule(0.8, method="fitted"),
    "label sets": lambda: rejection.LabelSetRule(0.8, method="fitted"),
}


@pytest.mark.parametrize("name", RULES)
def test_a_score_of_ones_own_is_judged_guarded_and_saved(name, tmp_path):
    model = make_model()
    model = keras.Model(model.inputs, OwnScore()(model.outputs[0]))
    known = np.random.default_rng(1).normal(size=(200, 6)).astype("float32")
    output = model.predict(known, verbose=0)
    labels = np.argmax(known[:, :3], axis=-1)
    rule = RULES[name]()
    rule.fit(output, labels) if name == "label sets" else rule.fit(output)

    model.save(tmp_path / "model.keras")
    rule.save(tmp_path / "rule.json")
    keras_halo.guard(model, rule).save(tmp_path / "guarded.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    loaded_rule = rejection.load_rule(tmp_path / "rule.json")
    guarded = keras.models.load_model(tmp_path / "guarded.keras")

    new = np.random.default_rng(2).normal(size=(100, 6)).astype("float32")
    output = model.predict(new, verbose=0)
    first, second = np.sort(output["scores"][:, :3], axis=-1)[:, :0:-1].T
    np.testing.assert_allclose(output["ood"], second - first, atol=1e-5)
    decisions = rule.predict(output)
    again = loaded_rule.predict(loaded.predict(new, verbose=0))
    answers = guarded.predict(new, verbose=0)
    np.testing.assert_allclose(answers["score"], output["ood"], atol=1e-5)
    if name == "label sets":
        assert 0 < decisions.members.sum() < decisions.members.size
        np.testing.assert_array_equal(again.members, decisions.members)
        np.testing.assert_array_equal(answers["label_set"], decisions.members)
    else:
        assert 0 < decisions.accepted.sum() < decisions.accepted.size
        np.testing.assert_array_equal(again.labels, decisions.labels)
        np.testing.assert_array_equal(answers["label"], decisions.labels)
