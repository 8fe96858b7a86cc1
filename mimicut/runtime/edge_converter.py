"""Convert torch's exported program for phones and accelerators, and run what was made, in a process of its own.

    python edge_converter.py check FORMAT                        # what is missing
    python edge_converter.py write FORMAT MODEL.pt2 FILE
    python edge_converter.py run FORMAT FILE INPUTS.npz OUTPUTS.npz
    python edge_converter.py describe FORMAT FILE                # what it takes, gives and holds

Any Python runs it that has the packages of the format, as converters may want another torch: it imports nothing of
mimicut. The last line that it prints is JSON: {"found": ...}, or {"error": text}.

INPUTS and OUTPUTS: arrays named CALL.PLACE, for each call the tensors that the network takes, or gives, in order.
"""

import importlib.metadata
import json
import re
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np  # a bare environment can be checked

# Format -> the packages that convert and run it.
PACKAGES = {
    "litert": ("litert-torch", "ai-edge-litert"),
    "executorch": ("executorch",),
    "coreml": ("coremltools",),
    "tensorrt": ("torch-tensorrt", "tensorrt"),
}
Calls = list[list["np.ndarray"]]


def check(kind: str) -> dict[str, Any]:
    """What stands in the way: "missing" packages; "torch", where another one is wanted; "device", where none is."""
    missing, wanted = [], None
    for package in PACKAGES[kind]:
        try:
            requirements = importlib.metadata.requires(package) or []
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
            continue
        wanted = wanted or _torch_fault(package, requirements)
    return {"missing": missing, "torch": wanted, "device": _device_fault(kind)}


def _torch_fault(package: str, requirements: list[str]) -> str | None:
    """Which torch the package wants, where it is not the one that is installed."""
    from packaging.requirements import Requirement

    try:
        found = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return f"{package} wants torch, and none is installed"
    for wanted in map(Requirement, requirements):
        applies = wanted.name == "torch" and (wanted.marker is None or wanted.marker.evaluate({"extra": ""}))
        if applies and not wanted.specifier.contains(found, prereleases=True):
            version = importlib.metadata.version(package)
            return f"{package} {version} wants torch {wanted.specifier}, found torch {found}"
    return None


def _device_fault(kind: str) -> str | None:
    if kind != "tensorrt":
        return None
    try:
        import torch
    except ImportError:
        return None  # said as the torch that is wanted
    return None if torch.cuda.is_available() else f"torch {torch.__version__} finds no CUDA device"


def _program(path: str) -> Any:
    import torch

    try:
        return torch.export.load(path)
    except Exception as error:
        raise RuntimeError(f"torch {torch.__version__} cannot read the program: {error}") from error


def _write_litert(source: str, target: str) -> None:
    import litert_torch

    program = _program(source)
    args, kwargs = program.example_inputs
    litert_torch.convert(program.module(), args, sample_kwargs=kwargs or None).export(target)


def _write_executorch(source: str, target: str) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    made = to_edge_transform_and_lower(_program(source), partitioner=[XnnpackPartitioner()]).to_executorch()
    Path(target).write_bytes(made.buffer)


def _write_coreml(source: str, target: str) -> None:
    import coremltools

    made = coremltools.convert(
        _without_aliases(_program(source).run_decompositions({})),
        minimum_deployment_target=coremltools.target.iOS16,
        compute_precision=coremltools.precision.FLOAT32,  # its own default is half precision
    )
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch, "model.mlpackage")
        made.save(str(package))
        with zipfile.ZipFile(target, "w") as archive:  # a package is a folder, and what is exported are files
            for file in sorted(p for p in package.rglob("*") if p.is_file()):
                archive.write(file, file.relative_to(scratch))


def _without_aliases(program: Any) -> Any:
    """The program with what `aten.alias` gives replaced by what it was given, which is the same: coremltools 9 does not
    know it. One that is an output keeps its name."""
    for node in list(program.graph.nodes):
        if str(node.target).startswith("aten.alias") and all(user.op != "output" for user in node.users):
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)
    program.graph_module.recompile()
    return program


def _write_tensorrt(source: str, target: str) -> None:
    import torch_tensorrt

    program = _program(source)
    args, kwargs = program.example_inputs
    engine = torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine(
        program, arg_inputs=args, kwarg_inputs=kwargs, disable_tf32=True
    )
    Path(target).write_bytes(engine)


def _run_litert(path: str, calls: Calls) -> Calls:
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(model_path=path).get_signature_runner()
    names = sorted(runner.get_input_details(), key=_by_number)
    found = (runner(**dict(zip(names, call, strict=True))) for call in calls)
    return [[outputs[name] for name in sorted(outputs, key=_by_number)] for outputs in found]


def _by_number(name: str) -> list[Any]:
    """args_2 before args_10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _run_executorch(path: str, calls: Calls) -> Calls:
    import torch
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(path).load_method("forward")
    # Copied, since the next call writes to the same memory.
    return [[t.numpy().copy() for t in method.execute([torch.from_numpy(a) for a in call])] for call in calls]


def _run_coreml(path: str, calls: Calls) -> Calls:
    import coremltools
    import numpy as np

    with tempfile.TemporaryDirectory() as scratch:
        model = coremltools.models.MLModel(_unpacked(path, scratch), compute_units=coremltools.ComputeUnit.CPU_ONLY)
        said = model.get_spec().description
        takes, gives = ([value.name for value in values] for values in (said.input, said.output))
        found = [model.predict(dict(zip(takes, call, strict=True))) for call in calls]
    return [[np.asarray(outputs[name]) for name in gives] for outputs in found]


def _unpacked(path: str, folder: str) -> str:
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
    return str(Path(folder, "model.mlpackage"))


def _run_tensorrt(path: str, calls: Calls) -> Calls:
    import numpy as np
    import tensorrt
    import torch

    logger = tensorrt.Logger(tensorrt.Logger.ERROR)
    engine = tensorrt.Runtime(logger).deserialize_cuda_engine(Path(path).read_bytes())
    context = engine.create_execution_context()
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    takes = [name for name in names if engine.get_tensor_mode(name) == tensorrt.TensorIOMode.INPUT]
    found = []
    for call in calls:
        held = {name: torch.from_numpy(array).cuda().contiguous() for name, array in zip(takes, call, strict=True)}
        gives = [name for name in names if name not in held]
        for name in gives:
            kind = torch.from_numpy(np.empty(0, tensorrt.nptype(engine.get_tensor_dtype(name)))).dtype
            held[name] = torch.empty(tuple(engine.get_tensor_shape(name)), dtype=kind, device="cuda")
        for name, tensor in held.items():
            context.set_tensor_address(name, tensor.data_ptr())
        context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()
        found.append([held[name].cpu().numpy() for name in gives])
    return found


def describe_coreml(path: str) -> dict[str, Any]:
    """The shapes of "inputs" and "outputs", and the "numbers" of all constants of a Core ML package, without running
    it."""
    import coremltools
    import numpy as np

    with tempfile.TemporaryDirectory() as scratch:
        model = coremltools.models.MLModel(_unpacked(path, scratch), skip_model_load=True)
        spec = model.get_spec()
        said = spec.description
        main = spec.mlProgram.functions["main"]
        numbers = 0
        for operation in main.block_specializations[main.opset].operations:
            if operation.type == "const":
                sides = operation.attributes["val"].type.tensorType.dimensions
                numbers += int(np.prod([side.constant.size for side in sides]))
    shapes = [[list(value.type.multiArrayType.shape) for value in values] for values in (said.input, said.output)]
    return {"inputs": shapes[0], "outputs": shapes[1], "numbers": numbers}


WRITE: dict[str, Callable[[str, str], None]] = {
    "litert": _write_litert, "executorch": _write_executorch, "coreml": _write_coreml, "tensorrt": _write_tensorrt,
}  # fmt: skip
RUN: dict[str, Callable[[str, Calls], Calls]] = {
    "litert": _run_litert, "executorch": _run_executorch, "coreml": _run_coreml, "tensorrt": _run_tensorrt,
}  # fmt: skip


def calls_in(path: str) -> Calls:
    """The arrays of each call in an .npz file, as `arrays_of` names them."""
    import numpy as np

    calls: dict[int, dict[int, np.ndarray]] = {}
    with np.load(path) as held:
        for name in held.files:
            call, place = map(int, name.split("."))
            calls.setdefault(call, {})[place] = held[name]
    return [[calls[i][k] for k in sorted(calls[i])] for i in sorted(calls)]


def arrays_of(calls: Calls) -> dict[str, "np.ndarray"]:
    """CALL.PLACE -> array."""
    return {f"{i}.{k}": array for i, call in enumerate(calls) for k, array in enumerate(call)}


def main() -> None:
    """Do what the command line says, and print what was found, or the error."""
    what, kind, *paths = sys.argv[1:]
    found: Any = None
    try:
        if what == "check":
            found = check(kind)
        elif what == "write":
            WRITE[kind](*paths)
        elif what == "describe":
            found = describe_coreml(*paths)
        else:
            import numpy as np

            path, inputs, outputs = paths
            np.savez(outputs, **arrays_of(RUN[kind](path, calls_in(inputs))))  # type: ignore[arg-type]
    except Exception as error:  # whatever a converter raises
        print("\n" + json.dumps({"error": f"{type(error).__name__}: {error}"}))
        sys.exit(1)
    print("\n" + json.dumps({"found": found}))


if __name__ == "__main__":
    main()
