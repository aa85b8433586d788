"""Trains the two models of the page to play with, and exports them to ONNX.

    KERAS_BACKEND=torch python docs/play/train.py

They are those of `examples/quickstart.py` and of the README's table: data,
network, loss and settings are read from that script, and trained with its first
seed. Needs the extra `tools`, Pillow, onnx, onnxruntime and onnxscript.
"""

import argparse
import ast
import json
import pathlib
import tempfile

import drawings
import keras
import numpy as np
import onnx
import onnxruntime
from keras import layers

from keras_halo import HALOSoftmax

HERE = pathlib.Path(__file__).parent
QUICKSTART = HERE.parents[1] / "examples" / "quickstart.py"
SEED = 0
# Initializers below this size are kept in float32.
SMALL = 1000


def definitions(path):
    """Functions and constants of a script, without what it runs."""

    def is_constant(node):
        if not isinstance(node, ast.Assign):
            return False
        names = [n.id for n in ast.walk(node.targets[0]) if hasattr(n, "id")]
        return all(name.isupper() for name in names)

    tree = ast.parse(path.read_text("utf-8"))
    kept = (ast.Import, ast.ImportFrom, ast.FunctionDef)
    tree.body = [n for n in tree.body if isinstance(n, kept) or is_constant(n)]
    names = {"__name__": path.stem}
    exec(compile(tree, str(path), "exec"), names)
    return names


def in_half_precision(graph):
    """Keeps large weights in 16 bits, which halves the file."""
    casts = []
    for weights in graph.graph.initializer:
        values = onnx.numpy_helper.to_array(weights)
        if values.dtype != np.float32 or values.size < SMALL:
            continue
        name = weights.name
        halved = onnx.numpy_helper.from_array(
            values.astype("float16"), f"{name}_half"
        )
        weights.CopyFrom(halved)
        casts.append(
            onnx.helper.make_node(
                "Cast", [halved.name], [name], to=onnx.TensorProto.FLOAT
            )
        )
    for cast in reversed(casts):
        graph.graph.node.insert(0, cast)


def export(model, path):
    """Writes the model as ONNX; returns what runs the file."""
    # Keras exports only what has been called.
    model(np.zeros((1, 8, 8, 1), "float32"))
    with tempfile.TemporaryDirectory() as folder:
        raw = str(pathlib.Path(folder) / "model.onnx")
        model.export(raw, format="onnx", verbose=False)
        graph = onnx.load(raw)
    in_half_precision(graph)
    # Names of their own: what is traced here is nobody's business.
    graph.doc_string, graph.producer_name = "", "keras_halo"
    for node in graph.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    onnx.checker.check_model(graph)
    path.parent.mkdir(exist_ok=True)
    onnx.save(graph, path)
    session = onnxruntime.InferenceSession(str(path))
    name = session.get_inputs()[0].name
    return lambda x: np.concatenate(
        # One at a time, as the page asks.
        [session.run(None, {name: image[None]})[0] for image in x]
    )


def describe(kind, quickstart, data, scribbles, path):
    """Trains, exports and measures one model; returns what the page shows."""
    model = quickstart["train"](kind, SEED, data)
    softmax = layers.Softmax() if kind != quickstart["HALO"] else HALOSoftmax()
    model = keras.Sequential([model, softmax])
    run = export(model, path)
    classes = quickstart["NUM_KNOWN"]
    x, y = data["known"]
    shown = {
        "known": x,
        "unknown digits": data["unknown digits"],
        "scribbles": scribbles,
    }
    p = {name: run(images) for name, images in shown.items()}
    for name, images in shown.items():
        ours = model.predict(images, verbose=0)
        np.testing.assert_allclose(ours, p[name], atol=5e-3)
        # Nearly every answer is clear, and the file gives the same.
        best = np.sort(ours, axis=-1)
        clear = best[:, -1] - best[:, -2] > 0.01
        assert clear.mean() > 0.98
        assert np.array_equal(ours.argmax(-1)[clear], p[name].argmax(-1)[clear])
    # The column after the classes is "I don't know".
    refused = {name: np.mean(q.argmax(-1) == classes) for name, q in p.items()}
    figures = {
        "accuracy": np.mean(p["known"][:, :classes].argmax(-1) == y),
        "known_refused": refused["known"],
        "unknown_refused": refused["unknown digits"],
        "scribbles_refused": refused["scribbles"],
        "scribbles_confident": np.mean(
            p["scribbles"][:, :classes].max(-1) > 0.9
        ),
    }
    print(kind, path.stat().st_size // 1000, "kB", figures, flush=True)
    return {name: round(float(value), 4) for name, value in figures.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=pathlib.Path, default=HERE / "models")
    arguments = parser.parse_args()
    quickstart = definitions(QUICKSTART)
    data = quickstart["load_data"](SEED)
    rng = np.random.default_rng(SEED)
    scribbles = drawings.scribbles(1000, rng)[..., None]
    description = {"classes": quickstart["NUM_KNOWN"]}
    for kind in (quickstart["HALO"], quickstart["CROSS_ENTROPY"]):
        name = kind.lower()
        description[name] = describe(
            kind, quickstart, data, scribbles, arguments.output / f"{name}.onnx"
        )
    path = arguments.output / "models.json"
    path.write_text(json.dumps(description, indent=2) + "\n")


if __name__ == "__main__":
    main()
