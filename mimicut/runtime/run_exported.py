"""Run an exported file in a process of its own: python run_exported.py FILE INPUTS.npz OUTPUTS.npz.

It imports nothing of mimicut, so that it shows what everyone who deploys the file will see.

INPUTS: arrays, one for each input of the network in its order; "call", as JSON how torch's program takes them:
{"keyword": name or null, "options": {}}. OUTPUTS: arrays in the order in which the network gives them. All on the CPU.
"""

import json
import sys

import numpy as np


def onnx(path: str, given: list[np.ndarray], call: dict) -> list[np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(zip([i.name for i in session.get_inputs()], given, strict=True)))


def openvino(path: str, given: list[np.ndarray], call: dict) -> list[np.ndarray]:
    import openvino

    # Some processors have bfloat16, and OpenVINO takes it by itself.
    network = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return list(network(given).to_tuple())


def pt2(path: str, given: list[np.ndarray], call: dict) -> list[np.ndarray]:
    import torch
    from torch.utils._pytree import tree_leaves

    program = torch.export.load(path).module()
    tensors = [torch.from_numpy(array) for array in given]
    named = {} if call["keyword"] is None else {call["keyword"]: tensors.pop(0)}
    with torch.no_grad():
        found = program(*tensors, **named, **call["options"])
    return [t.numpy() for t in tree_leaves(found) if isinstance(t, torch.Tensor)]


def main() -> None:
    path, inputs, outputs = sys.argv[1:]
    with np.load(inputs) as held:
        call = json.loads(str(held["call"]))
        given = [held[name] for name in held.files if name != "call"]
    run = {"xml": openvino, "onnx": onnx, "pt2": pt2}[path.rpartition(".")[2]]
    np.savez(outputs, *run(path, given, call))


if __name__ == "__main__":
    main()
