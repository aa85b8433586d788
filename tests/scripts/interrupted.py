"""A training that is killed, and trainings that go on where it was.

    python interrupted.py FOLDER killed EPOCH BATCH
    python interrupted.py FOLDER undisturbed backup checkpoint torn_checkpoint

The first trains with `BackupAndRestore` and `ModelCheckpoint`, and kills
itself with signal 9 after a batch, as a machine that goes down would. Each of
the second trains to the end and writes weights and metrics to `FOLDER`.
"""

import os
import pathlib
import shutil
import signal
import sys

import keras
import numpy as np
from keras import ops

from keras_halo import HALODense, HALOLoss

EPOCHS, BATCH_SIZE = 4, 16


def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 8)).astype("float32")
    return x, np.argmax(x[:, :4], axis=-1)


def compiled_model():
    # No dropout: Keras does not save how many random numbers were drawn.
    model = keras.Sequential(
        [
            keras.layers.Input((8,)),
            keras.layers.Dense(16, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(4),
            HALODense(4),
        ]
    )
    model.compile(keras.optimizers.Adam(1e-2), HALOLoss(), metrics=["accuracy"])
    return model


class KillAfter(keras.callbacks.Callback):
    def __init__(self, epoch, batch):
        super().__init__()
        self.at = (epoch, batch)

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def train(model, initial_epoch=0, callbacks=()):
    # In the same order every epoch: Keras does not save where a shuffle was.
    return model.fit(
        *data(),
        batch_size=BATCH_SIZE,
        epochs=EPOCHS,
        initial_epoch=initial_epoch,
        shuffle=False,
        verbose=0,
        callbacks=list(callbacks),
    )


def saving_callbacks(folder):
    return [
        keras.callbacks.ModelCheckpoint(folder / "epoch-{epoch}.keras"),
        keras.callbacks.BackupAndRestore(folder / "backup"),
    ]


def killed(folder, epoch, batch):
    train(
        compiled_model(),
        callbacks=[
            *saving_callbacks(folder),
            KillAfter(int(epoch), int(batch)),
        ],
    )


def undisturbed(folder):
    model = compiled_model()
    return model, train(model)


def backup(folder):
    model = compiled_model()
    restore = keras.callbacks.BackupAndRestore(folder / "backup")
    return model, train(model, callbacks=[restore])


def checkpoint(folder):
    """Goes on from the newest checkpoint that loads."""
    for epoch in range(EPOCHS, 0, -1):
        path = folder / f"epoch-{epoch}.keras"
        try:
            model = keras.saving.load_model(path)
        except Exception:
            continue
        return model, train(model, initial_epoch=epoch)
    return undisturbed(folder)


def torn_checkpoint(folder):
    """The same where the machine went down while it wrote the newest."""
    torn = folder / "torn"
    torn.mkdir()
    newest = 0
    for epoch in range(1, EPOCHS + 1):
        path = folder / f"epoch-{epoch}.keras"
        if path.exists():
            shutil.copy(path, torn / path.name)
            newest = epoch
    if newest:
        path = torn / f"epoch-{newest}.keras"
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return checkpoint(torn)


GOING_ON = {
    function.__name__: function
    for function in (undisturbed, backup, checkpoint, torn_checkpoint)
}


def main(folder, *arguments):
    folder = pathlib.Path(folder)
    if arguments[0] == "killed":
        keras.utils.set_random_seed(0)
        killed(folder, *arguments[1:])
        sys.exit("was not killed")
    for name in arguments:
        keras.utils.set_random_seed(0)
        model, history = GOING_ON[name](folder)
        np.savez(
            folder / f"{name}.npz",
            len(history.history["loss"]),
            [values[-1] for _, values in sorted(history.history.items())],
            *[ops.convert_to_numpy(v) for v in model.variables],
        )
        keras.backend.clear_session()


if __name__ == "__main__":
    main(*sys.argv[1:])
