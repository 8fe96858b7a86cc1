"""Run an exported file in a process of its own: python run_exported.py FILE INPUTS.npz OUTPUTS.npz.

It imports nothing of mimicut, so that it shows what everyone who deploys the file will see.

INPUTS: arrays named PASS.INPUT, both counted from 0, the inputs in the network's order; "call", as JSON how torch's
program takes them: {"keyword": name or null, "options": {}}. OUTPUTS: arrays named PASS.OUTPUT, in the order in which
the network gives them. All on the CPU.

For torch's program "call" may also name "values" of its operators, which are then returned after its outputs; where
"exact" is true, arrays after the first stand in their place for the operators that follow.
"""

import json
import sys
from collections.abc import Callable

import numpy as np

Run = Callable[[list[np.ndarray]], list[np.ndarray]]


def onnx(path: str, call: dict) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return lambda given: session.run(None, dict(zip(names, given, strict=True)))


def openvino(path: str, call: dict) -> Run:
    import openvino

    # Some processors have bfloat16, and OpenVINO takes it by itself.
    network = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda given: [np.array(each) for each in network(given).to_tuple()]


def pt2(path: str, call: dict) -> Run:
    import torch
    from torch.utils._pytree import tree_leaves

    program = torch.export.load(path).module()
    names = call.get("values", [])

    def run(given: list[np.ndarray]) -> list[np.ndarray]:
        tensors = [torch.from_numpy(array) for array in given]
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

    return run


def main() -> None:
    path, inputs, outputs = sys.argv[1:]
    with np.load(inputs) as held:
        call = json.loads(str(held["call"]))
        passes: dict[str, list[np.ndarray]] = {}
        for name in held.files:
            if name != "call":
                passes.setdefault(name.partition(".")[0], []).append(held[name])
    run = {"xml": openvino, "onnx": onnx, "pt2": pt2}[path.rpartition(".")[2]](path, call)
    found: dict = {f"{number}.{i}": array for number, given in passes.items() for i, array in enumerate(run(given))}
    np.savez(outputs, **found)


if __name__ == "__main__":
    main()
