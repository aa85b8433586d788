"""The formats of each backend.

Each function writes a model to a folder, and returns a function that runs it.
"""

import keras
import numpy as np
import pytest

BACKEND = keras.backend.backend()


def saved_model(model, folder):
    tf = pytest.importorskip("tensorflow")
    model.export(folder / "saved_model", verbose=False)
    loaded = tf.saved_model.load(folder / "saved_model")
    return lambda x: loaded.serve(x)


def onnx(model, folder):
    runtime = pytest.importorskip("onnxruntime")
    converter = {
        "tensorflow": "tf2onnx",
        "jax": "jax2onnx",
        "torch": "onnxscript",
    }[BACKEND]
    pytest.importorskip(converter)
    path = str(folder / "model.onnx")
    model.export(path, format="onnx", verbose=False)
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(path, options)
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})


def openvino(model, folder):
    ov = pytest.importorskip("openvino")
    path = str(folder / "model.xml")
    model.export(path, format="openvino", verbose=False)
    compiled = ov.Core().compile_model(
        path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )

    def run(x):
        results = compiled(x)
        return [np.array(results[i]) for i in range(len(model.outputs))]

    return run


def litert(model, folder):
    interpreters = pytest.importorskip("ai_edge_litert.interpreter")
    path = str(folder / "model.tflite")
    model.export(path, format="litert", verbose=False)
    interpreter = interpreters.Interpreter(path)
    place = interpreter.get_input_details()[0]["index"]
    # The names end in the number of the output, the list has another order.
    details = sorted(
        interpreter.get_output_details(),
        key=lambda detail: int(detail["name"].rsplit(":")[-1]),
    )

    def run(x):
        interpreter.resize_tensor_input(place, x.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(place, x)
        interpreter.invoke()
        return [interpreter.get_tensor(d["index"]) for d in details]

    return run


def torch_export(model, folder):
    import torch

    path = folder / "model.pt2"
    batch = torch.export.Dim("batch", min=1, max=4096)
    model.export(path, format="torch", verbose=False, dynamic_shapes={0: batch})
    module = torch.export.load(path).module()
    return lambda x: module(torch.from_numpy(x))


def keras_file(model, folder):
    model.save(folder / "model.keras")
    loaded = keras.models.load_model(folder / "model.keras")
    return lambda x: loaded.predict(x, verbose=0)


FORMATS = {
    "jax": [keras_file, saved_model, onnx],
    "tensorflow": [keras_file, saved_model, onnx, openvino, litert],
    "torch": [keras_file, torch_export, onnx, openvino],
}[BACKEND]
