"""`python -m keras_halo`: a report and a guarded model, without Python."""

import json
import os
import re
import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_halo
from keras_halo import HALODense, HALOLoss
from keras_halo.workflows.command_line import main

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("scipy")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Models and data as somebody has them who writes no Python."""
    keras.utils.set_random_seed(0)
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    y = np.arange(600) % 3
    x = rng.normal(size=(600, 4)).astype("float32")
    x[np.arange(600), y] += 4.0

    def network(head):
        hidden = keras.layers.Dense(16, activation="relu")
        return keras.Sequential([keras.Input((4,)), hidden, head])

    halo = network(HALODense(3))
    halo.compile(keras.optimizers.Adam(1e-2), HALOLoss())
    halo.fit(x[:300], y[:300], epochs=5, verbose=0)
    halo.save(folder / "halo.keras")
    plain = network(keras.layers.Dense(3, activation="softmax"))
    plain.compile("adam", "sparse_categorical_crossentropy")
    plain.fit(x[:300], y[:300], epochs=5, verbose=0)
    plain.save(folder / "plain.keras")
    np.savez(folder / "train.npz", x=x[:300], y=y[:300])
    np.savez(folder / "test.npz", x=x[300:], y=y[300:])
    far = rng.normal(size=(50, 4)) + 4.0 * np.eye(4)[3]
    np.savez(folder / "far.npz", x=far.astype("float32"))
    np.savez(folder / "wide.npz", x=np.zeros((5, 7)), y=np.zeros(5, int))
    np.savez(folder / "short.npz", x=np.zeros((5, 4)), y=np.zeros(4, int))
    (folder / "text.npz").write_text("no arrays")
    return folder


def run(files, *arguments):
    return main([str(files / a) if "." in a else a for a in arguments])


def test_a_report_is_one_file(files, tmp_path, capsys):
    html, numbers = tmp_path / "report.html", tmp_path / "report.json"
    code = main(
        [
            "report",
            str(files / "halo.keras"),
            str(files / "test.npz"),
            "--unknown",
            f"far & <away>={files / 'far.npz'}",
            "--html",
            str(html),
            "--json",
            str(numbers),
        ]
    )
    assert code == 0
    found = json.loads(numbers.read_text("utf-8"))
    assert found["unknown"]["far & <away>"]["auroc"] > 0.75
    page = html.read_text("utf-8")
    auroc = 100 * found["unknown"]["far & <away>"]["auroc"]
    assert f"<td>{auroc:.1f}</td>" in page
    assert "far &amp; &lt;away&gt;" in page and "<away>" not in page
    assert "on average at least 95 % of known inputs" in page
    assert "SelectiveRiskRule" in page
    # Nothing is fetched from anywhere.
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    assert page.count("data:image/png;base64,") == 1
    assert str(html) in capsys.readouterr().out


@pytest.mark.parametrize("name", ["halo", "plain"])
def test_a_guarded_model_is_one_file(name, files, tmp_path, capsys):
    output = tmp_path / "guarded.keras"
    code = main(
        [
            "guard",
            str(files / f"{name}.keras"),
            str(files / "test.npz"),
            "--train",
            str(files / "train.npz"),
            "--output",
            str(output),
            "--coverage",
            "0.9",
            "--confidence",
            "0.95",
        ]
    )
    assert code == 0
    assert "95 % confidence" in capsys.readouterr().out
    guarded = keras.models.load_model(output)
    far = np.load(files / "far.npz")["x"]
    known = np.load(files / "test.npz")
    labels = guarded.predict(known["x"], verbose=0)["label"]
    assert np.mean(labels == known["y"]) > 0.8
    rejected = np.mean(guarded.predict(far, verbose=0)["label"] == -1)
    assert rejected > np.mean(labels == -1) + 0.1
    certificate = keras_halo.read_certificate(output)
    assert certificate["config"]["coverage"] == 0.9

    # A report of it would have no scores.
    code = main(
        [
            "report",
            str(output),
            str(files / "test.npz"),
            "--unknown",
            f"far={files / 'far.npz'}",
            "--html",
            str(tmp_path / "report.html"),
        ]
    )
    assert code == 2
    assert "guarded model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "data", "unknown", "message"),
    [
        ("none.keras", "test.npz", "far=far.npz", "no model"),
        ("plain.keras", "test.npz", "far=far.npz", "0 of them"),
        ("halo.keras", "none.npz", "far=far.npz", "no file"),
        ("halo.keras", "far.npz", "far=far.npz", "no array 'y'"),
        ("halo.keras", "wide.npz", "far=far.npz", "(None, 4)"),
        ("halo.keras", "short.npz", "far=far.npz", "5 inputs and 4 labels"),
        ("halo.keras", "text.npz", "far=far.npz", "text.npz"),
        ("halo.keras", "test.npz", "far=wide.npz", "(None, 4)"),
        ("halo.keras", "test.npz", "far", "NAME=FILE.npz"),
        ("halo.keras", "test.npz", None, "no `--unknown"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    model, data, unknown, message, files, tmp_path, capsys, monkeypatch
):
    def predict(*args, **kwargs):
        raise AssertionError("Something was predicted.")

    monkeypatch.setattr(keras.Model, "predict", predict)
    html = tmp_path / "report.html"
    arguments = ["report", str(files / model), str(files / data)]
    if unknown:
        name, _, path = unknown.partition("=")
        arguments += ["--unknown", f"{name}={files / path}" if path else name]
    assert main([*arguments, "--html", str(html)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("keras_halo: error: ")
    assert message in lines[0]
    assert not html.exists()


def test_padding_is_no_known_input(tmp_path, capsys):
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 7, 80)
    counted = np.arange(20) < lengths[:, None]
    x = np.where(counted, rng.integers(1, 25, counted.shape), 0)
    inputs = keras.Input((20,), dtype="int32")
    embedded = keras.layers.Embedding(25, 16, mask_zero=True)(inputs)
    model = keras.Model(inputs, HALODense(3)(embedded))
    model.save(tmp_path / "model.keras")
    np.savez(tmp_path / "data.npz", x=x, y=x % 3)
    names = "guard", "model.keras", "data.npz", "--output", "guarded.keras"
    assert run(tmp_path, *names) == 0
    rule = keras_halo.rejection.CoverageRule(0.95)
    rule.fit(model.predict(x, verbose=0)[counted])
    certificate = keras_halo.read_certificate(tmp_path / "guarded.keras")
    assert certificate["calibration"]["samples"] == counted.sum()
    assert certificate["threshold"] == pytest.approx(rule.threshold, rel=1e-5)
    assert f"{counted.sum()} positions of 80 inputs" in capsys.readouterr().out


def test_unknown_data_have_names_of_their_own(files, tmp_path, capsys):
    html = tmp_path / "report.html"
    twice = ["--unknown", f"noise={files / 'far.npz'}"] * 2
    known = [str(files / name) for name in ("halo.keras", "test.npz")]
    assert main(["report", *known, *twice, "--html", str(html)]) == 2
    assert "noise, noise" in capsys.readouterr().err
    assert not html.exists()


def test_a_model_without_a_head_needs_training_data(files, tmp_path, capsys):
    output = tmp_path / "guarded.keras"
    common = [str(files / "plain.keras"), str(files / "test.npz"), "--output"]
    assert main(["guard", *common, str(output)]) == 2
    assert "--train" in capsys.readouterr().err
    assert main(["guard", *common, str(tmp_path / "guarded.h5")]) == 2
    assert ".keras" in capsys.readouterr().err
    assert main(["guard", *common, str(output), "--coverage", "95"]) == 2
    assert "between 0 and 1" in capsys.readouterr().err
    assert not output.exists()


def test_the_module_runs():
    done = subprocess.run(
        [sys.executable, "-m", "keras_halo", "--help"],
        capture_output=True,
        text=True,
        env=dict(os.environ),
        check=True,
    )
    assert "report" in done.stdout and "guard" in done.stdout
