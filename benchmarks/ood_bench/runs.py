"""Trains and evaluates one run, each in files of its own.

A process of its own does it, so that its peak memory is that of this run and
nothing is left behind for the next.
"""

import concurrent.futures
import dataclasses
import functools
import multiprocessing
import multiprocessing.connection
import os
import platform
import threading
import time

import keras
import numpy as np
from networks import NETWORKS
from scipy.special import softmax

from keras_halo import metrics
from ood_bench import data, posthoc, store
from ood_bench.methods import METHODS
from ood_bench.settings import name_of

OPTIMIZERS = {
    "adam": keras.optimizers.Adam,
    # As OpenOOD v1.5 trains: Keras's decay bypasses the momentum, and comes to
    # a penalty of (1 - 0.9) times as much, 5e-4. The limit is not OpenOOD's:
    # a squared distance to the centroids diverges at its rate without one.
    "sgd": functools.partial(
        keras.optimizers.SGD,
        momentum=0.9,
        nesterov=True,
        weight_decay=5e-3,
        global_clipnorm=1.0,
    ),
}


def training_path(folder, settings):
    name = name_of(settings, METHODS[settings.method])
    return os.path.join(folder, f"{name}.trained.npz")


def shared_path(folder, settings, method, epochs):
    """Where the phase is that several methods begin with."""
    first = dataclasses.replace(settings, method="shared", epochs=epochs)
    return os.path.join(folder, f"{name_of(first, method)}.trained.npz")


def result_path(folder, settings, evaluation):
    name = name_of(settings, METHODS[settings.method], evaluation)
    return os.path.join(folder, f"{name}.result.npz")


def run(folder, settings, evaluation):
    """Trains unless that was done before, evaluates, and saves both.

    Args:
        folder: String, where the files of the runs are.
        settings: `Settings`.
        evaluation: `Evaluation`.

    Returns:
        Boolean, whether the network was trained.
    """
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_run_here, folder, settings, evaluation).result()


def _run_here(folder, settings, evaluation):
    _end_with_parent()
    images = data.load(settings, evaluation)
    model = build(settings, images)
    path = training_path(folder, settings)
    trained = store.load(path)
    if trained is None:
        record = train(model, settings, images, folder)
        store.save(path, record, _weights(model))
    else:
        record, weights = trained
        _set_weights(model, weights)
    figures, arrays = evaluate(settings, evaluation, model, images)
    store.save(
        result_path(folder, settings, evaluation),
        {"training": record, **figures},
        arrays,
    )
    return trained is None


def _end_with_parent():
    """Ends this process when the one that started it is killed."""
    parent = multiprocessing.parent_process()

    def watch():
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def build(settings, images):
    """The model with the fresh weights that the seed determines."""
    keras.utils.set_random_seed(settings.seed)
    backbone = NETWORKS[settings.network](images.train[0].shape[1:])
    method = METHODS[settings.method]
    outputs = method.head(backbone, images.num_classes)
    return keras.Model(backbone.input, outputs)


def train(model, settings, images, folder):
    """Trains in place; returns how long it took, and how it went.

    A phase that several methods begin with is a file of its own: the first of
    them trains it, and all count its time.
    """
    batches = data.training_batches(settings, images)
    total = {
        "seconds": 0.0,
        "cpu_seconds": 0.0,
        "epoch_seconds": [],
        "peak_mib": 0.0,
        "loss": [],
        "accuracy": [],
    }
    start, cpu_start = time.perf_counter(), time.process_time()
    for training, epochs in METHODS[settings.method].phases(
        model, images, settings.epochs
    ):
        path = training.shared and shared_path(
            folder, settings, training.shared, epochs
        )
        stored = store.load(path) if path else None
        if stored is None:
            record = {
                **_fit(training, batches, settings, len(total["loss"]), epochs),
                "seconds": time.perf_counter() - start,
                "cpu_seconds": time.process_time() - cpu_start,
                "peak_mib": _peak_mib(),
            }
            if path:
                store.save(path, record, _weights(training.model))
        else:
            record, weights = stored
            _set_weights(training.model, weights)
        peak = max(total["peak_mib"], record["peak_mib"])
        total = {name: total[name] + record[name] for name in total}
        total["peak_mib"] = peak
        # What comes before a phase, such as converting a head, counts with it.
        start, cpu_start = time.perf_counter(), time.process_time()
    return total | {
        "parameters": model.count_params(),
        "num_train": len(batches.x),
    }


def _fit(training, batches, settings, done, epochs):
    """Trains one phase, which comes after as many epochs as are `done`."""
    batches.start(done)
    progress = _Progress(settings)
    schedule = keras.optimizers.schedules.CosineDecay(
        training.rate * settings.learning_rate, epochs * batches.num_batches
    )
    training.model.compile(
        OPTIMIZERS[settings.optimizer](schedule),
        loss=training.loss,
        metrics=[training.metric],
    )
    history = training.model.fit(
        batches,
        initial_epoch=done,
        epochs=done + epochs,
        # Keras would draw from a state that depends on how many weights the
        # head has: each method would see the batches in another order.
        shuffle=False,
        verbose=0,
        callbacks=[progress, *training.callbacks],
    ).history
    return {
        "epoch_seconds": progress.seconds,
        "loss": history["loss"],
        "accuracy": history["accuracy"],
    }


def _weights(model):
    return {f"w{i}": w for i, w in enumerate(model.get_weights())}


def _set_weights(model, weights):
    model.set_weights([weights[f"w{i}"] for i in range(len(weights))])


class _Progress(keras.callbacks.Callback):
    def __init__(self, settings):
        super().__init__()
        self.settings = settings
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        self.began = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        if not np.isfinite(logs["loss"]):
            raise FloatingPointError(
                f"{self.settings.title} has diverged: the loss of epoch "
                f"{epoch + 1} is {logs['loss']}. Lower --learning-rate, or "
                "leave the method out with --methods."
            )
        self.seconds.append(time.perf_counter() - self.began)
        print(
            f"  {self.settings.title}: epoch {epoch + 1}"
            f"/{self.settings.epochs}, loss {logs['loss']:.3f}, "
            f"accuracy {logs['accuracy']:.3f}, {self.seconds[-1]:.1f} s",
            flush=True,
        )


def _peak_mib():
    """Peak memory of this process, that of an accelerator left out."""
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    unit = 2**20 if platform.system() == "Darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def evaluate(settings, evaluation, model, images):
    """Every figure of a trained model, and what figures are drawn from.

    Args:
        settings: `Settings`.
        evaluation: `Evaluation`.
        model: The trained `keras.Model`.
        images: `data.Images`.

    Returns:
        Dictionary of plain data, and dictionary of arrays.
    """
    start = time.perf_counter()
    reader = METHODS[settings.method].reader(model, images)
    x, y = images.test
    x_validation, y_validation = images.validation
    test, validation = reader.read(x), reader.read(x_validation)
    temperature = posthoc.fit_temperature(validation.logits, y_validation)
    unknown = {
        name: reader.read(x)
        for name, x in data.unknown_sets(images, evaluation).items()
    }
    synthetic = {
        name: reader.read(x)
        for name, x in data.synthetic_sets(images, unknown).items()
    }
    errors = test.logits.argmax(axis=-1) != y
    detectors = {}
    for name, storage in reader.storage.items():
        known = test.scores[name]
        detectors[name] = {
            "storage": storage,
            "aurc": metrics.aurc(errors, known),
            "augrc": metrics.augrc(errors, known),
            "sets": {
                key: separation(known, reading.scores[name])
                for key, reading in unknown.items()
            },
            # By what settings may be chosen.
            "synthetic_auroc": float(
                np.mean(
                    [
                        metrics.auroc(
                            validation.scores[name], reading.scores[name]
                        )
                        for reading in synthetic.values()
                    ]
                )
            ),
        }
    figures = {
        "known": known_figures(y, test, temperature),
        "validation": known_figures(y_validation, validation, temperature),
        "abstained": {
            name: abstention_rate(reading) for name, reading in unknown.items()
        },
        "detectors": detectors,
        "num_test": len(y),
        "evaluation_seconds": time.perf_counter() - start,
    }
    arrays = {
        "labels": y,
        "probabilities": softmax(test.logits, axis=-1).astype("float32"),
        "errors": errors,
        "uncertainty": posthoc.max_probability(test.logits),
    }
    return figures, arrays


def separation(known, unknown):
    """How well a score tells known from unknown, by every convention."""
    return {
        "auroc": metrics.auroc(known, unknown),
        "fpr95_known_positive": metrics.fpr_at_recall(
            known, unknown, positive="known"
        ),
        "fpr95_unknown_positive": metrics.fpr_at_recall(
            known, unknown, positive="unknown"
        ),
        "aupr_unknown_positive": metrics.aupr(
            known, unknown, positive="unknown"
        ),
        "aupr_known_positive": metrics.aupr(known, unknown, positive="known"),
    }


def known_figures(labels, reading, temperature):
    """Accuracy and calibration: as trained, scaled, and with abstain mass."""
    logits = np.asarray(reading.logits, "float64")
    probabilities = softmax(logits, axis=-1)
    kinds = {
        "": probabilities,
        "_scaled": softmax(logits / temperature, axis=-1),
        "_with_abstain": reading.probabilities,
    }
    figures = {
        "accuracy": float(np.mean(logits.argmax(axis=-1) == labels)),
        "abstained": abstention_rate(reading),
        "temperature": temperature,
        "ece_if_calibrated": calibrated_ece(probabilities),
    }
    for suffix, p in kinds.items():
        if p is not None:
            figures |= {
                f"ece{suffix}": metrics.expected_calibration_error(labels, p),
                f"nll{suffix}": metrics.negative_log_likelihood(labels, p),
                f"brier{suffix}": metrics.brier_score(labels, p),
            }
    return figures


def calibrated_ece(probabilities, draws=100):
    """The ECE that a perfectly calibrated model measures on as many images.

    It is above zero: the share of hits among the finitely many images of a bin
    is hardly ever their confidence to the last bit. So labels are drawn from
    the probabilities themselves.

    Args:
        probabilities: Array of shape `(N, K)`, rows that sum to one.
        draws: Integer, the number of draws of all labels.

    Returns:
        Float, the mean over the draws.

    References:

    - Jochen Bröcker, Leonard A. Smith, Increasing the Reliability of
      Reliability Diagrams, 2007.
    """
    rng = np.random.default_rng(0)
    return float(
        np.mean(
            [
                metrics.expected_calibration_error(
                    rng.multinomial(1, probabilities), probabilities
                )
                for _ in range(draws)
            ]
        )
    )


def abstention_rate(reading):
    """How often abstaining is the most probable answer."""
    p = reading.probabilities
    if p is None:
        return 0.0
    return float(np.mean(1.0 - p.sum(axis=-1) > p.max(axis=-1)))
