"""The monitor's numbers reach everything that reads the logs of an epoch."""

import contextlib
import io
import re

import keras
import numpy as np
import pytest

import keras_halo
from keras_halo.callbacks import OODMonitor
from keras_halo.workflows import evaluate_ood

pytest.importorskip("sklearn", reason="needs scikit-learn")

NUM_CLASSES = 8
KEYS = {
    f"{name}_{what}"
    for name in ("ood", "held", "noise")
    for what in ("auroc", "fpr95", "abstention_rate")
} | {"known_abstention_rate"}


def load():
    """Digits 0 to 7 are known; 8 and 9, and noise, are not."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = (images / 16).astype("float32")
    known = labels < NUM_CLASSES
    noise = np.random.default_rng(0).uniform(size=(96, 64))
    return (
        (x[known][:512], labels[known][:512]),
        (x[known][512:704], labels[known][512:704]),
        {"held": x[~known][:160], "noise": noise.astype("float32")},
    )


TRAIN, TEST, UNKNOWN = load()


def make_model(*stateful_layers):
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [
            keras.Input((64,)),
            # Not relu, which turns NaN into 0 on some processors in TensorFlow.
            keras.layers.Dense(32, activation="tanh"),
            *stateful_layers,
            keras.layers.Dense(16),
            keras_halo.HALODense.reference(NUM_CLASSES),
        ]
    )
    model.compile(
        keras.optimizers.Adam(3e-3),
        loss=keras_halo.HALOLoss(),
        metrics=["accuracy"],
    )
    return model


def fit(model, callbacks, epochs=3, verbose=0):
    return model.fit(
        *TRAIN,
        batch_size=64,
        epochs=epochs,
        verbose=verbose,
        callbacks=callbacks,
    )


@pytest.fixture(scope="module")
def trained():
    """A model, its monitor, and what two trainings logged and printed."""
    model = make_model()
    monitor = OODMonitor(TEST[0], UNKNOWN, batch_size=32)
    logged, printed = [], []
    for epochs, verbose in ((2, 2), (1, 1)):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            history = fit(
                model,
                [monitor],
                epochs=epochs,
                verbose=verbose,
            )
        logged.append(history)
        printed.append(out.getvalue())
    return model, monitor, logged, printed


def last_epoch(history):
    return {key: history.history[key][-1] for key in KEYS}


@pytest.mark.slow
def test_numbers_reach_history_and_progress_bar(trained):
    _, _, logged, printed = trained
    for history, out, epochs in zip(logged, printed, (2, 1), strict=True):
        assert set(history.history) == KEYS | {"loss", "accuracy"}
        for key in KEYS:
            values = history.history[key]
            assert len(values) == epochs
            assert all(type(value) is float for value in values)
            shown = re.findall(rf"\b{key}: (\S+)", out)
            assert float(shown[-1]) == pytest.approx(values[-1], abs=1e-4)


def test_numbers_are_those_of_the_report(trained):
    model, monitor, (_, history), _ = trained
    report = evaluate_ood(model, TEST, UNKNOWN, batch_size=32, verbose=0)
    last = last_epoch(history)
    for prefix, result in (
        ("ood", report.mean),
        ("held", report["held"]),
        ("noise", report["noise"]),
    ):
        assert last[f"{prefix}_auroc"] == pytest.approx(result.auroc)
        fpr95 = last[f"{prefix}_fpr95"]
        assert fpr95 == pytest.approx(result.fpr95_known_positive)
        rate = last[f"{prefix}_abstention_rate"]
        assert rate == pytest.approx(result.abstention_rate)
    rate = last["known_abstention_rate"]
    assert rate == pytest.approx(report.known.abstention_rate)
    assert monitor.measure() == pytest.approx(last)


@pytest.mark.slow
def test_early_stopping_and_checkpoint_follow_the_monitor(tmp_path):
    path = tmp_path / "best.keras"
    model = make_model()
    callbacks = [
        OODMonitor(TEST[0], UNKNOWN, batch_size=32),
        keras.callbacks.EarlyStopping(
            "ood_auroc", mode="max", patience=2, restore_best_weights=True
        ),
        keras.callbacks.ModelCheckpoint(
            path, monitor="ood_auroc", mode="max", save_best_only=True
        ),
    ]
    # A rate that grows until it ruins the network: the score must peak.
    ruin = keras.callbacks.LearningRateScheduler(lambda e: 1e-3 * 12.0**e)
    history = fit(model, [*callbacks, ruin], epochs=20).history
    auroc = history["ood_auroc"]
    best = int(np.argmax(auroc))
    assert len(auroc) == best + 3 < 20
    for kept in (model, keras.saving.load_model(path)):
        report = evaluate_ood(kept, TEST, UNKNOWN, batch_size=32, verbose=0)
        assert report.mean.auroc == pytest.approx(auroc[best], abs=1e-6)


@pytest.mark.slow
def test_training_is_the_same_with_and_without():
    with_monitor, without = (
        make_model(
            keras.layers.Dropout(0.1, seed=0),
            keras.layers.BatchNormalization(),
        )
        for _ in range(2)
    )
    keras.utils.set_random_seed(1)
    history = fit(with_monitor, [OODMonitor(TEST[0], UNKNOWN, batch_size=32)])
    keras.utils.set_random_seed(1)
    expected = fit(without, []).history
    for key in expected:
        assert history.history[key] == pytest.approx(expected[key], rel=1e-6)
    for one, other in zip(
        with_monitor.get_weights(), without.get_weights(), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


def test_frequency_repeats_the_last_measurement(trained):
    monitor = OODMonitor(TEST[0], UNKNOWN, batch_size=32, frequency=2)
    monitor.set_model(trained[0])
    epochs = [{"loss": 1.0} for _ in range(5)]
    monitor.on_train_begin()
    for epoch, logs in enumerate(epochs):
        monitor.on_epoch_end(epoch, logs)
    # Every epoch has the same columns.
    assert all(set(logs) >= KEYS for logs in epochs)
    assert [len(logs) for logs in epochs] == [11] * 5
    assert np.isnan(epochs[0]["ood_auroc"])
    measured = [logs["ood_auroc"] for logs in epochs[1:]]
    assert np.isfinite(measured).all()
    assert measured[0] == measured[1]


@pytest.mark.slow
def test_a_model_that_diverges_keeps_its_history():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 4)).astype("float32")
    head = keras_halo.HALODense(3)
    model = keras.Sequential([keras.Input((4,)), head])
    model.compile("sgd", keras_halo.HALOLoss())

    class Diverge(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1:
                head.centroids.assign(np.full((3, 128), np.nan))

    monitor = OODMonitor(x, {"far": 9 * x})
    with pytest.warns(UserWarning, match=r"could be measured in epoch [23]"):
        history = model.fit(
            x,
            np.arange(32) % 3,
            epochs=3,
            callbacks=[Diverge(), monitor],
            verbose=0,
        )
    auroc = history.history["ood_auroc"]
    assert np.isfinite(auroc[0])
    assert np.isnan(auroc[1:]).all()


def test_method_is_used(trained):
    model, joint, *_ = trained
    report = evaluate_ood(model, TEST, UNKNOWN, method="nearest", verbose=0)
    monitor = OODMonitor(TEST[0], UNKNOWN, method="nearest")
    monitor.set_model(model)
    measured = monitor.measure()
    assert measured["ood_auroc"] == pytest.approx(report.mean.auroc)
    assert measured["ood_auroc"] != joint.measure()["ood_auroc"]


class Batches(keras.utils.PyDataset):
    def __init__(self, x, y, **kwargs):
        super().__init__(**kwargs)
        self.x, self.y = x, y

    def __len__(self):
        return -(-len(self.x) // 32)

    def __getitem__(self, index):
        rows = slice(32 * index, 32 * index + 32)
        return self.x[rows], self.y[rows]


def as_tf_dataset(x, y):
    tf = pytest.importorskip("tensorflow", reason="needs TensorFlow")
    return tf.data.Dataset.from_tensor_slices((x, y)).shuffle(999).batch(32)


def as_data_loader(x, y):
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    dataset = torch.utils.data.TensorDataset(torch.tensor(x), torch.tensor(y))
    return torch.utils.data.DataLoader(dataset, batch_size=32, shuffle=True)


def as_list(x, y):
    batches = Batches(x, y)
    return [batches[i] for i in range(len(batches))]


@pytest.mark.parametrize(
    "read", [Batches, as_list, as_tf_dataset, as_data_loader]
)
def test_datasets_are_read_every_epoch(read, trained):
    known = read(*TEST)
    unknown = {n: read(x, np.zeros(len(x))) for n, x in UNKNOWN.items()}
    monitor = OODMonitor(known, unknown)
    monitor.set_model(trained[0])
    monitor.on_train_begin()
    expected = trained[1].measure()
    for epoch in range(2):
        logs = {}
        monitor.on_epoch_end(epoch, logs)
        assert logs == pytest.approx(expected, abs=1e-6)


def test_rates_can_be_drawn(trained):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    from keras_halo.plots import abstention_over_training

    history = trained[2][0]
    ax = abstention_over_training(history)
    drawn = {line.get_label(): line.get_ydata() for line in ax.get_lines()}
    assert list(drawn) == ["known", "held", "noise", "mean of unknown"]
    np.testing.assert_allclose(
        drawn["held"], history.history["held_abstention_rate"]
    )


@pytest.mark.slow
def test_tensorboard_writes_the_numbers(tmp_path):
    tf = pytest.importorskip("tensorflow", reason="needs TensorFlow")
    pytest.importorskip("tensorboard", reason="needs TensorBoard")
    callbacks = [
        OODMonitor(TEST[0], UNKNOWN, batch_size=32),
        keras.callbacks.TensorBoard(tmp_path),
    ]
    history = fit(make_model(), callbacks, epochs=2).history
    written = {}
    for path in sorted(map(str, tmp_path.rglob("events.out.*"))):
        for record in tf.data.TFRecordDataset(path).as_numpy_iterator():
            for value in tf.compat.v1.Event.FromString(record).summary.value:
                written.setdefault(value.tag, []).append(
                    float(tf.make_ndarray(value.tensor))
                    if value.metadata.plugin_data.plugin_name == "scalars"
                    else None
                )
    for key in KEYS:
        assert written[f"epoch_{key}"] == pytest.approx(history[key], rel=1e-6)


def test_torch_models_are_evaluated_out_of_training_mode():
    if keras.backend.backend() != "torch":
        pytest.skip("needs the torch backend")
    import torch

    class Noisy(keras.Model):
        """Obeys the mode of the torch module, not Keras's `training`."""

        def __init__(self):
            super().__init__()
            self.head = keras_halo.HALODense.reference(NUM_CLASSES)

        def call(self, inputs):
            dropout = torch.nn.functional.dropout
            return self.head(dropout(inputs, 0.5, self.training))

    model = Noisy()
    model.predict(TEST[0][:2], verbose=0)
    model.train()
    monitor = OODMonitor(TEST[0], UNKNOWN)
    monitor.set_model(model)
    assert monitor.measure() == monitor.measure()
    assert model.training


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"unknown": {}}, "at least one entry"),
        ({"unknown": UNKNOWN["held"]}, "dictionary"),
        ({"unknown": {"known": UNKNOWN["held"]}}, "none of"),
        ({"unknown": {"ood": UNKNOWN["held"]}}, "none of"),
        ({"method": "typo"}, "`method` must be one of"),
        ({"frequency": 0}, "frequency"),
        ({"frequency": 1.5}, "frequency"),
        ({"known": ((x,) for x in [TEST[0]])}, "`known` is a generator"),
        (
            {"unknown": {"a": ((x,) for x in [TEST[0]])}},
            r"`unknown\['a'\]` is a generator",
        ),
        ({"known": "mnist"}, "Unrecognized"),
    ],
)
def test_bad_arguments_are_refused_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        OODMonitor(**{"known": TEST[0], "unknown": UNKNOWN, **arguments})


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"unknown": {"a": np.zeros((0, 64), "float32")}}, r"unknown\['a'\]"),
        ({"unknown": {"a": np.full((3, 64), np.nan, "f4")}}, "finite"),
        ({"unknown": {"a": np.zeros((3, 63), "float32")}}, "64|63"),
        ({"method": "fitted"}, "dictionary with the entries"),
    ],
)
def test_a_mistake_shows_before_the_first_epoch(arguments, message, trained):
    model = trained[0]
    before = [np.array(weight) for weight in model.get_weights()]
    arguments = {"known": TEST[0], "unknown": UNKNOWN, **arguments}
    with pytest.raises(Exception, match=message):
        fit(model, [OODMonitor(**arguments)])
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_model_without_packed_scores_is_refused():
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(12)])
    model.compile("sgd", loss="mse")
    monitor = OODMonitor(TEST[0], UNKNOWN)
    with pytest.raises(ValueError, match="HALODense"):
        model.fit(TEST[0], np.zeros((192, 12)), callbacks=[monitor], verbose=0)


def test_positions_that_keras_masks_are_not_measured():
    inputs = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(61, 8, mask_zero=True)(inputs)
    model = keras.Model(inputs, keras_halo.HALODense(3)(x))
    # No token twice: rounding may part scores that are equal.
    tokens = np.random.default_rng(0).permutation(np.arange(1, 61))
    tokens = tokens.reshape(30, 2)
    padded = np.concatenate([tokens, np.zeros((30, 3), int)], axis=1)
    measured = []
    for rows in (tokens, padded):
        monitor = OODMonitor(rows[5:], {"some": rows[:5]})
        monitor.set_model(model)
        measured.append(monitor.measure())
    # Padding in both sets would hide that it counts.
    monitor = OODMonitor(padded[5:], {"some": tokens[:5]})
    monitor.set_model(model)
    measured.append(monitor.measure())
    assert measured[0] == pytest.approx(measured[1])
    assert measured[0] == pytest.approx(measured[2])
