"""Killed trainings, damaged and hostile files, files of other backends."""

import io
import itertools
import json
import pathlib
import signal
import subprocess
import sys
import zipfile

import keras
import numpy as np
import pytest
from cases import THOROUGH, passed
from helpers import to_numpy

import keras_halo
from keras_halo import HALODense, HALOLoss
from keras_halo.ops import packing

SCRIPT = pathlib.Path(__file__).parent / "scripts" / "interrupted.py"
DATA = pathlib.Path(__file__).with_name("data")
BACKEND = keras.backend.backend()
TIME_LIMIT = 300

# Epoch and batch, of four each.
KILLED_AFTER = [(2, 1)]
if THOROUGH:
    KILLED_AFTER = list(itertools.product(range(4), (0, 1, 3)))


def run(*arguments):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIME_LIMIT,
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no signal 9")
@pytest.mark.parametrize("epoch, batch", KILLED_AFTER)
def test_a_killed_training_goes_on_as_if_nothing_had_happened(
    epoch, batch, tmp_path
):
    done = run(tmp_path, "killed", epoch, batch)
    assert done.returncode == -signal.SIGKILL, done.stdout
    ways = ["undisturbed", "backup", "checkpoint", "torn_checkpoint"]
    done = run(tmp_path, *ways)
    assert done.returncode == 0, done.stdout
    results = {}
    for way in ways:
        with np.load(tmp_path / f"{way}.npz") as arrays:
            results[way] = list(arrays.values())
    tolerance = 1e-6 if BACKEND == "torch" else 0.0
    lost = {"undisturbed": 4, "backup": 0, "checkpoint": 0}
    lost["torn_checkpoint"] = min(1, epoch)
    for way in ways[1:]:
        epochs, *found = results[way]
        # It did go on, and did not start again.
        assert epochs == 4 - epoch + lost[way]
        for one, other in zip(found, results["undisturbed"][1:], strict=True):
            np.testing.assert_allclose(
                one, other, rtol=tolerance, atol=tolerance
            )
        passed[f"killed, resumed from {way}"] += 1


X = np.random.default_rng(0).normal(size=(6, 4)).astype("float32")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model, and the bytes of its file."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.layers.Input((4,)), keras.layers.Dense(3), HALODense(3)]
    )
    model.compile("sgd", HALOLoss())
    model.fit(X, np.arange(6) % 3, verbose=0)
    path = tmp_path_factory.mktemp("saved") / "model.keras"
    model.save(path)
    return model, path.read_bytes()


def load(path, content):
    path.write_bytes(content)
    return keras.saving.load_model(path)


def rewritten(content, name, change):
    """The file with one of its members changed, or left out."""
    result = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(result, "w") as new,
    ):
        assert name in old.namelist()
        for member in old.namelist():
            data = old.read(member)
            if member == name:
                data = change(data)
            if data is not None:
                new.writestr(member, data)
    return result.getvalue()


def with_head_config(content, **changes):
    def change(data):
        config = json.loads(data)
        head = config["config"]["layers"][-1]
        assert head["class_name"] == "HALODense"
        for key, value in changes.items():
            target = head if key in head else head["config"]
            assert key in target
            target[key] = value
        return json.dumps(config).encode()

    return rewritten(content, "config.json", change)


def test_an_untouched_file_loads_as_it_was(saved, tmp_path):
    model, content = saved
    for loaded in (
        load(tmp_path / "a.keras", content),
        load(tmp_path / "b.keras", with_head_config(content, units=3)),
    ):
        np.testing.assert_array_equal(
            loaded.predict(X, verbose=0), model.predict(X, verbose=0)
        )


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.5, 0.9, 0.999])
def test_truncated_models_are_refused(share, saved, tmp_path):
    _, content = saved
    with pytest.raises((ValueError, OSError, zipfile.BadZipFile, KeyError)):
        load(tmp_path / "model.keras", content[: int(share * len(content))])


def test_a_changed_byte_is_refused_or_changes_nothing(saved, tmp_path):
    model, content = saved
    expected = model.predict(X, verbose=0)
    rng = np.random.default_rng(0)
    refused = 0
    count = 200 if THOROUGH else 30
    for position in rng.integers(0, len(content), count):
        damaged = bytearray(content)
        damaged[position] ^= 1 << int(rng.integers(8))
        try:
            loaded = load(tmp_path / "model.keras", bytes(damaged))
        except Exception:
            refused += 1
        else:
            # Time stamps and the like.
            np.testing.assert_array_equal(
                loaded.predict(X, verbose=0), expected
            )
        passed["changed bytes"] += 1
    assert refused > count // 2


@pytest.mark.parametrize(
    "changes",
    [
        {"units": 4},
        {"units": 1},
        {"units": "three"},
        {"label_smoothing": 5.0},
        {"centroid_initializer": {"class_name": "Evil", "config": {}}},
        {"class_name": "SoftDense", "registered_name": "other>SoftDense"},
    ],
    ids=lambda changes: "-".join(map(str, changes)),
)
def test_models_with_an_impossible_head_are_refused(changes, saved, tmp_path):
    _, content = saved
    with pytest.raises((ValueError, TypeError)):
        load(tmp_path / "model.keras", with_head_config(content, **changes))


@pytest.mark.parametrize("member", ["config.json", "model.weights.h5"])
def test_models_without_one_of_their_parts_are_refused(member, saved, tmp_path):
    _, content = saved
    with pytest.raises((ValueError, KeyError, OSError)):
        load(
            tmp_path / "model.keras",
            rewritten(content, member, lambda data: None),
        )


def test_the_weights_of_another_head_are_refused(saved, tmp_path):
    _, content = saved
    other = keras.Sequential(
        [keras.layers.Input((4,)), keras.layers.Dense(3), HALODense(5)]
    )
    other.save(tmp_path / "other.keras")
    with zipfile.ZipFile(tmp_path / "other.keras") as archive:
        weights = archive.read("model.weights.h5")
    with pytest.raises(ValueError):
        load(
            tmp_path / "model.keras",
            rewritten(content, "model.weights.h5", lambda data: weights),
        )


@pytest.mark.parametrize(
    "hostile",
    [
        # A function of the standard library where a class is expected.
        {
            "module": "os",
            "class_name": "system",
            "config": {"command": "touch {marker}"},
            "registered_name": None,
        },
        {
            "module": "builtins",
            "class_name": "function",
            "config": "eval",
            "registered_name": "function",
        },
    ],
)
def test_a_file_cannot_have_code_run(hostile, saved, tmp_path):
    _, content = saved
    marker = tmp_path / "code-was-run"
    hostile = json.loads(json.dumps(hostile).replace("{marker}", str(marker)))
    with pytest.raises((ValueError, TypeError)):
        load(
            tmp_path / "model.keras",
            with_head_config(content, centroid_initializer=hostile),
        )
    assert not marker.exists()


def test_our_registration_opens_no_door_to_lambdas(saved, tmp_path):
    """A file with Python in it is refused beside our layers as without them."""
    model = keras.Sequential(
        [
            keras.layers.Input((4,)),
            keras.layers.Lambda(lambda x: x * 2.0, output_shape=(4,)),
            HALODense(3),
        ]
    )
    model.save(tmp_path / "lambda.keras")
    with pytest.raises(ValueError, match="[Ll]ambda"):
        keras.saving.load_model(tmp_path / "lambda.keras")


def test_files_name_nothing_but_keras_and_keras_halo(saved):
    """So `safe_mode` has nothing to refuse and needs no custom objects."""
    _, content = saved
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        config = json.loads(archive.read("config.json"))

    def modules(node):
        if isinstance(node, dict):
            if "module" in node:
                yield node["module"], node.get("registered_name")
            for value in node.values():
                yield from modules(value)
        elif isinstance(node, list):
            for value in node:
                yield from modules(value)

    found = set(modules(config))
    assert ("keras_halo.layers.halo_dense", "keras_halo>HALODense") in found
    assert {(module or "keras_halo").split(".")[0] for module, _ in found} <= {
        "keras",
        "keras_halo",
    }


SAVED = sorted(
    path.stem.removeprefix("classifier-")
    for path in DATA.glob("classifier-*.keras")
)


def test_there_is_a_file_of_every_backend():
    assert {name.split("-")[-1] for name in SAVED} == {
        "jax",
        "tensorflow",
        "torch",
    }


def version(text):
    return tuple(int(part) for part in text.split(".")[:2])


@pytest.mark.parametrize("name", SAVED)
def test_what_any_backend_saved_in_an_earlier_release_still_works(
    name, tmp_path
):
    with zipfile.ZipFile(DATA / f"classifier-{name}.keras") as archive:
        saved_by = json.loads(archive.read("metadata.json"))["keras_version"]
    if version(keras.__version__) < version(saved_by):
        # Nor does it load its own layers then: `Dense` has new arguments.
        pytest.skip(f"Keras loads no files of a later Keras, here {saved_by}")
    with np.load(DATA / f"predictions-{name}.npz") as arrays:
        expected = dict(arrays)
    expected["scores"] = packing.upgrade_scores(expected["scores"])
    rng = np.random.default_rng(0)
    x = rng.normal(size=(48, 4)).astype("float32")
    y = np.argmax(x[:, :3], axis=-1)

    # `safe_mode` and no `custom_objects`: what a user does. What `compile` was
    # told is of the backend: the class of the optimizer on PyTorch, XLA.
    same = name.endswith(f"-{BACKEND}")
    classifier = keras.saving.load_model(
        DATA / f"classifier-{name}.keras", compile=same
    )
    scores = classifier.predict(x, verbose=0)
    # The head of that release did not say from which label smoothing it takes
    # its margin, which the loaded one does.
    parts = packing.unpack(keras.ops.convert_to_tensor(expected["scores"]))
    np.testing.assert_array_equal(to_numpy(parts.background), 0.0)
    parts = parts._replace(background=packing.smoothing_background(0.05))
    np.testing.assert_allclose(
        scores, to_numpy(packing.pack(*parts)), rtol=1e-5, atol=1e-5
    )
    if same:
        # Its loss, optimizer and slots came with it.
        losses = [float(classifier.train_on_batch(x, y)[0]) for _ in range(3)]
        np.testing.assert_allclose(losses, expected["next_losses"], rtol=1e-5)
    else:
        loss = HALOLoss(label_smoothing=0.05)
        classifier.compile("sgd", loss)
        np.testing.assert_allclose(
            classifier.test_on_batch(x, y),
            expected["next_losses"][0],
            rtol=1e-5,
        )

    fitted = keras.saving.load_model(
        DATA / f"gaussians-{name}.keras", compile=False
    )
    np.testing.assert_allclose(
        fitted.predict(x, verbose=0)["ood"],
        expected["ood"],
        rtol=1e-4,
        atol=1e-4,
    )

    rule = keras_halo.rejection.load_rule(DATA / f"rule-{name}.json")
    np.testing.assert_array_equal(
        rule.predict(expected["scores"]).accepted, expected["accepted"]
    )
    # It takes the loaded head for the one that it was fitted on, and does not
    # refuse its scores. The one at the threshold may be rounded to beyond it.
    accepted = rule.predict(scores).accepted
    assert np.sum(accepted != expected["accepted"]) <= 1
    passed[f"loaded files of {name}"] += 1
