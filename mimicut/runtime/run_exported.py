"""Run an exported file in a process of its own: python run_exported.py FILE INPUTS.npz OUTPUTS.npz.

It imports nothing of mimicut, so that it shows what everyone who deploys the file will see.

INPUTS: arrays, one for each input of the network in its order; "call", as JSON how torch's program takes them:
{"keyword": name or null, "options": {}}. OUTPUTS: arrays in the order in which the network gives them. All on the CPU.

For torch's program "call" may also name "values" of its operators, which are then returned after its outputs; where
"exact" is true, arrays after the first stand in their place for the operators that follow.
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
    names = call.get("values", [])
    instead = dict(zip(names, tensors[1:], strict=True)) if call.get("exact") else {}
    values: dict = {}

    class Watched(torch.fx.Interpreter):
        def run_node(self, node: torch.fx.Node) -> object:
            found = super().run_node(node)
            if node.name not in names:
                return found
            values[node.name] = found.clone()  # what follows may overwrite it
            return instead.get(node.name, found)

    with torch.no_grad():
        if names:
            found = Watched(program).run(tensors[0], *call["options"].values())
        elif call["keyword"] is None:
            found = program(*tensors, **call["options"])
        else:
            found = program(*tensors[1:], **{call["keyword"]: tensors[0]}, **call["options"])
    outputs = [t for t in tree_leaves(found) if isinstance(t, torch.Tensor)]
    return [t.numpy() for t in [*outputs, *(values[name] for name in names)]]


def main() -> None:
    path, inputs, outputs = sys.argv[1:]
    with np.load(inputs) as held:
        call = json.loads(str(held["call"]))
        given = [held[name] for name in held.files if name != "call"]
    run = {"xml": openvino, "onnx": onnx, "pt2": pt2}[path.rpartition(".")[2]]
    np.savez(outputs, *run(path, given, call))


if __name__ == "__main__":
    main()
