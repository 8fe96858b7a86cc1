"""A model as files that run without its code: ONNX, OpenVINO, torch.export and those for phones (`edge_formats`), each
compared with the model."""

import io
import math
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ShapesCollection
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.utils._pytree import tree_map

from mimicut.anatomy.tracing import (
    Example,
    as_example,
    export_program,
    fault_place,
    require_data,
)
from mimicut.base.disk import make_folder, remove_folder, write_by
from mimicut.base.errors import InputError, LawBroken, MimicutError, StoreError, UnsupportedModel, one_line
from mimicut.base.guard import full_copy, named_tensors, structural_copy
from mimicut.base.interrupts import interrupts_held
from mimicut.base.scratch import locked, replace_files
from mimicut.runtime.edge_formats import EDGE, check_converter, check_structure, convert, not_run, run_edge
from mimicut.runtime.int8 import quantise
from mimicut.runtime.onnx_file import write_onnx
from mimicut.runtime.readable_outputs import ReadableOutputs, is_readable, model_name
from mimicut.surgery.seam import tensors

FILES = {"pt2": "model.pt2", "onnx": "model.onnx", "openvino": "model.xml", "int8": "model.int8.onnx"}
FILES |= {kind: edge.file for kind, edge in EDGE.items()}
FORMATS = ("pt2", "onnx")  # by default
NOT_WANTED = "no free size was asked for"
OTHER_SIZE = (32, 64)  # pixels by which a free height and width are enlarged to check them. Assumption: strides fit 32
TOLERANCE = 1e-4  # of the largest output, in float32. Measured: 5e-7 in ONNX Runtime, 0 in the exported program
MOST_ROUNDING = 1e-2  # what a network that magnifies its own rounding may differ by


@dataclass(frozen=True)
class Exported:
    """The files that were written, and how much they differ from the model.

    Attributes:
        files: Format -> path.
        errors: Format -> largest difference of any output, as a share of that output's largest value.
        opset: The opset of the ONNX files; None without one.
        static: None where the batch may have any size, else the reason why it may not.
        static_size: None where images may have any height and width, else the reason why they may not.
        numbers: How many numbers the tensors of the model hold.
        bytes: How many bytes they take in float32.
        precision: The precision of all files but the INT8 one.
        edge_images: How many images the files for phones take: one, or as many as the example has.
        not_run: Format -> why its file cannot be run here, and has no entry in `errors`.
    """

    files: dict[str, Path]
    errors: dict[str, float]
    opset: int | None
    static: str | None
    numbers: int = 0
    bytes: int = 0
    precision: str = "float32"
    static_size: str | None = NOT_WANTED
    edge_images: int | None = None
    not_run: dict[str, str] = field(default_factory=dict)


def export(
    model: nn.Module,
    example: Any,
    folder: str | Path,
    *,
    formats: Sequence[str] = FORMATS,
    calibrate: Sequence[Any] = (),
    dynamic_size: bool = False,
    tolerance: float = TOLERANCE,
    force: bool = False,
) -> Exported:
    """Write `model`, in eval mode and float32, as files that run without its code, and compare each with it.

    "pt2" is model.pt2 (`torch.export`), "onnx" model.onnx, "openvino" model.xml and model.bin, "int8" model.int8.onnx
    (`int8.quantise`, for ONNX Runtime and OpenVINO); "litert", "executorch", "coreml" and "tensorrt" are those of
    `edge_formats.EDGE`, made by converters in a process of their own, of one image and one size. Each file is loaded
    again, the program by torch, the others by their runtimes, ONNX and OpenVINO on the CPU, in float32, and run on
    `example`. Of those that are made from ONNX, one that does not load, or differs, is written once more with the
    optimisations of torch's converter, and only then refused. Outputs that only the model's own code can read (a
    dataclass, a namedtuple) become a dict of their tensors. Weights of more than 256 MiB are written beside the ONNX
    file, to model.onnx.data. The model is untouched.

    Args:
        model: The network.
        example: Images (N, C, H, W), a tuple of arguments, or (args, kwargs). Where N is 2 or more, files take batches
            of any size, which is compared with the first image alone; if that fails, the batch is fixed at N.
        folder: Where the files are written; it is made if missing.
        formats: Any of FILES.
        calibrate: For INT8: batches of real images as the model takes them, each of N images. The difference of the
            INT8 file is reported and not limited.
        dynamic_size: Whether files take images of any height and width (of a volume: and depth), where the network
            allows it, which is compared at a larger size; else of the example's size alone.
        tolerance: The largest difference that is allowed, as a share of the largest output. A network that magnifies
            its own rounding may differ by twice what it differs by from itself in float64, at most MOST_ROUNDING.
        force: Whether existing files are replaced.

    Returns:
        The files and their differences.

    Raises:
        UnsupportedModel: An operator or module cannot be written; the message names it.
        LawBroken: A file gives other outputs than the model.
        InputError: A format is unknown or lacks its packages, or INT8 was requested without images.
        StoreError: A file exists (without `force`) or cannot be written. After any error nothing is left behind.
    """
    folder = Path(folder)
    formats = tuple(dict.fromkeys(formats))
    check_formats(formats)
    made = not folder.exists()
    options: dict[str, Any] = {"calibrate": calibrate, "dynamic_size": dynamic_size, "tolerance": tolerance}
    try:
        if made:
            make_folder(folder)
        with locked(folder) as begun:  # by a killed export: it is replaced
            there = [p for f in formats if (p := folder / FILES[f]).exists() and p.name not in begun]
            if there and not force:
                raise StoreError(f"exporting to {there[0]}: it exists; name another folder, or replace it with force")
            found = replace_files(folder, lambda fresh: export_into(model, example, fresh, formats=formats, **options))
        made = False
    except BlockingIOError:
        raise StoreError(f"exporting to {folder}: another export into it is under way; wait for it") from None
    except OSError as error:
        raise StoreError(f"exporting to {folder}: {error}; nothing was changed there") from error
    finally:
        if made:
            with suppress(OSError):
                remove_folder(folder)
    return replace(found, files={f: folder / FILES[f] for f in formats})


def export_into(
    model: nn.Module,
    example: Any,
    folder: Path,
    *,
    formats: Sequence[str],
    calibrate: Sequence[Any] = (),
    dynamic_size: bool = False,
    tolerance: float = TOLERANCE,
) -> Exported:
    """As `export`, into a folder that exists and that nobody else sees yet.

    Raises:
        OSError: The disk refuses; else as `export`.
    """
    formats = tuple(dict.fromkeys(formats))
    check_formats(formats)
    if "int8" in formats and not calibrate:
        raise InputError(
            "exporting to int8: found no images; expected a few, from which it takes the ranges of the values"
        )
    ready, call = _as_exported(model, example)
    fixed = {} if batch_of(call) > 1 else {"batch": "the example is not a batch of 2 or more"}
    if not dynamic_size:
        fixed["size"] = NOT_WANTED
    edge = [f for f in formats if f in EDGE]
    plain = [f for f in formats if f not in EDGE]
    found = _as_free_as_possible(ready, call, folder, plain, calibrate, tolerance, fixed)
    return _with_edge(ready, call, folder, edge, tolerance, found) if edge else found


def _with_edge(
    model: nn.Module, call: Example, folder: Path, formats: Sequence[str], tolerance: float, exported: Exported
) -> Exported:
    """Add the files for phones: of one image, or of the whole call if the network does not take one alone.

    Raises:
        UnsupportedModel, LawBroken: As `export`.
    """
    clone = structural_copy(model)
    try:
        one = _first_image(call)
        program, wanted = _traced(clone, one, {}), outputs_of(model, *one)
        call = one
    except UnsupportedModel:
        program, wanted = _traced(clone, call, {}), outputs_of(model, *call)
    errors, unrun = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, FILES["pt2"])
        _write_program(program, clone, source)
        for kind in formats:
            target = folder / FILES[kind]
            write_by(target, partial(convert, kind, model_name(model), source), _bytes_of(model))
            reason = not_run(kind)
            if reason is None:
                errors[kind] = _difference_of(model, kind, target, [call], [wanted], tolerance)
            else:
                unrun[kind] = reason
                check_structure(kind, target, tensors_in(call), wanted, _kernel_numbers(program))
    return replace(
        exported, files={**exported.files, **{f: folder / FILES[f] for f in formats}},
        errors={**exported.errors, **errors}, edge_images=batch_of(call), not_run=unrun,
    )  # fmt: skip


def _kernel_numbers(program: Any) -> int:
    """How many numbers the kernels and matrices of a traced program hold that it uses; vectors may be folded into
    them."""
    used = {node.name for node in program.graph.nodes if node.users}
    named = {**program.graph_signature.inputs_to_parameters, **program.graph_signature.inputs_to_buffers}
    held = {id(t): t for name, to in named.items() if name in used and (t := program.state_dict.get(to)) is not None}
    return sum(t.numel() for t in held.values() if t.dim() > 1)


def traced_as_exported(model: nn.Module, example: Any, free: Iterable[str]) -> tuple[nn.Module, Example, Any]:
    """Trace a model again as `export` does.

    Args:
        model: The network.
        example: As in `export`.
        free: Which of "batch" and "size" are free in the file.

    Returns:
        The copy of the model that is exported, in float32; the example for it, and the traced program.

    Raises:
        UnsupportedModel: As `export`.
    """
    ready, call = _as_exported(model, example)
    others = {kind: _CHANGED[kind](call) for kind in free}
    return ready, call, _traced(structural_copy(ready), call, others)


def _as_exported(model: nn.Module, example: Any) -> tuple[nn.Module, Example]:
    """A copy of the model in float32 with outputs that every process can read, and its call."""
    require_data(model)
    ready, call = in_float32(model, example)
    output = _output_of(ready, *call)
    if not tensors_in(output):
        raise UnsupportedModel(
            f"exporting {type(model).__name__}: found no tensors in its output; expected a tensor, or a tuple, list, "
            "dict or dataclass of them"
        )
    return (ready if is_readable(output) else ReadableOutputs(ready)), call


def check_formats(formats: Sequence[str]) -> None:
    """Check the names of formats, and that what they need is installed.

    Raises:
        InputError: A format is unknown, or a package that it needs is missing.
    """
    strange = [f for f in formats if f not in FILES]
    if strange or not formats:
        named = f"the format{'s' if len(strange) > 1 else ''} {', '.join(strange)}" if strange else "no format"
        raise InputError(f"exporting: found {named}, expected one of {', '.join(FILES)}")
    needed = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}
    needed["int8"] = needed["onnx"]
    found = (name for f in formats for name in needed.get(f, ()) if find_spec(name) is None)
    missing = list(dict.fromkeys(found))
    for kind in formats:
        if kind in EDGE:
            check_converter(kind)
    if missing:
        raise InputError(
            f"exporting to {', '.join(formats)}: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not "
            "installed; expected the extra `export`: pip install 'mimicut[export]'"
        )


def _as_free_as_possible(
    model: nn.Module,
    call: Example,
    folder: Path,
    formats: Sequence[str],
    calibrate: Sequence[Any],
    tolerance: float,
    fixed: dict[str, str],
) -> Exported:
    """Write every format. What makes it fail is fixed, the size of the images before the batch, until it works.

    Raises:
        UnsupportedModel, LawBroken: It fails with everything fixed.
    """
    while True:
        try:
            return _write(model, call, folder, formats, calibrate, tolerance, fixed)
        except (UnsupportedModel, LawBroken) as error:
            free = next((kind for kind in ("size", "batch") if kind not in fixed), None)
            if free is None:
                raise
            fixed = {**fixed, free: str(error)}


def _write(
    model: nn.Module,
    call: Example,
    folder: Path,
    formats: Sequence[str],
    calibrate: Sequence[Any],
    tolerance: float,
    fixed: Mapping[str, str],
) -> Exported:
    """Write every format from one trace, and compare it. fixed: for "batch" and "size", why it is not free."""
    others = {kind: change(call) for kind, change in _CHANGED.items() if kind not in fixed}
    expected = {kind: outputs_of(model, *other) for kind, other in {"": call, **others}.items()}
    clone = structural_copy(model)
    program = _traced(clone, call, others)
    traced = {kind: _COMPUTED[kind] for kind in others if not _is_free(program, kind)}
    fixed = {**fixed, **traced}
    calls = [call, *(other for kind, other in others.items() if kind not in traced)]
    wanted = [outputs for kind, outputs in expected.items() if kind not in traced]
    held = {id(t): t for t in [*program.state_dict.values(), *program.constants.values()] if isinstance(t, Tensor)}
    numbers = sum(t.numel() for t in held.values())
    size = sum(t.numel() * t.element_size() for t in held.values())
    del held
    files, errors = {f: folder / FILES[f] for f in formats}, {}
    opsets: set[int] = set()
    if "pt2" in files:
        _write_program(program, clone, files["pt2"])
        errors["pt2"] = _difference_of(model, "pt2", files["pt2"], calls, wanted, tolerance)
    for name, write in (("onnx", None), ("openvino", _write_openvino), ("int8", partial(_write_int8, calibrate))):
        if name in files:
            errors[name] = _by_onnx(model, program, clone, name, files, write, opsets, calls, wanted, tolerance)
    return Exported(
        files, {f: errors[f] for f in formats}, max(opsets, default=None), fixed.get("batch"), numbers, size,
        static_size=fixed.get("size"),
    )  # fmt: skip


def _traced(clone: nn.Module, call: Example, others: Mapping[str, Example]) -> Any:
    """Trace a copy of a model with the axes free in which the others differ from the call."""
    shapes = None
    if others:
        collection = ShapesCollection()
        for tensor in tensors_in(call):
            axes = _free_axes(tensor, call, others)
            if axes:
                collection[tensor] = dict.fromkeys(axes, Dim.AUTO)
        shapes = collection.dynamic_shapes(clone, *call)
    return export_program(clone, *call, dynamic_shapes=shapes)


_COMPUTED = {
    "batch": "its code computes with the size of the batch",
    "size": "its code computes with the height or width of the images",
}


def _first_image(call: Example) -> Example:
    return tree_map(lambda v: v[:1] if batched(v, call) else v, call)


def larger_images(call: Example) -> Example:
    """The call with random images of a larger height and width, each by another number of pixels."""
    generator = torch.Generator().manual_seed(0)

    def larger(value: Any) -> Any:
        if not _is_image(value, call):
            return value
        more = (OTHER_SIZE[0], *OTHER_SIZE)[5 - value.dim() :]
        sides = [side + pixels for side, pixels in zip(value.shape[2:], more, strict=True)]
        return torch.randn(*value.shape[:2], *sides, generator=generator)

    return tree_map(larger, call)


_CHANGED = {"batch": _first_image, "size": larger_images}


def _is_image(value: Any, call: Example) -> bool:
    return batched(value, call) and value.dim() in (4, 5) and value.is_floating_point()


def _free_axes(tensor: Tensor, call: Example, kinds: Iterable[str]) -> list[int]:
    """The axes of an input that may have any size."""
    batch = [0] if "batch" in kinds and batched(tensor, call) else []
    return batch + (list(range(2, tensor.dim())) if "size" in kinds and _is_image(tensor, call) else [])


def _by_onnx(
    model: nn.Module,
    program: Any,
    clone: nn.Module,
    name: str,
    files: dict[str, Path],
    write: Callable[[nn.Module, Path, Path], None] | None,
    opsets: set[int],
    calls: list[Example],
    wanted: list[list[Tensor]],
    tolerance: float,
) -> float:
    """Write one format that is ONNX, or is made from it by `write`, and compare it; whatever fails is tried once more
    with the optimisations of torch's converter.

    Raises:
        UnsupportedModel, LawBroken: Both failed; the first error.
    """
    first: MimicutError | None = None
    for optimise in (False, True):
        with tempfile.TemporaryDirectory() as scratch:
            own = write is None or optimise or "onnx" not in files
            source = files[name] if write is None else Path(scratch) / "model.onnx" if own else files["onnx"]
            if own:
                opsets.add(write_onnx(program, clone, source, optimise=optimise))
            try:
                if write is not None:
                    write(clone, source, files[name])
                return _difference_of(model, name, files[name], calls, wanted, tolerance)
            except (UnsupportedModel, LawBroken) as error:
                first = first or error
    assert first is not None
    raise first


def _difference_of(
    model: nn.Module, name: str, path: Path, calls: list[Example], wanted: list[list[Tensor]], tolerance: float
) -> float:
    """The largest difference of a file's outputs from the model's.

    Raises:
        LawBroken: It does not run, or differs by more than `tolerance` and by more than rounding can explain.
    """
    try:
        found = _RUN[name](path, calls)
    except Exception as error:  # whatever a runtime raises
        raise LawBroken(
            f"running {path.name} of {model_name(model)}: {one_line(error)}; expected the model's outputs"
        ) from error
    largest = _largest(found, wanted)
    if name == "int8":
        tolerance = sys.float_info.max
    elif not largest <= tolerance:
        tolerance = max(tolerance, min(2 * _rounding(model, calls, wanted), MOST_ROUNDING))
    if not largest <= tolerance:
        raise LawBroken(
            f"comparing {path.name} with the {model_name(model)} it was made of: they differ by "
            f"{largest:.1e} of the largest output in float32, expected at most {tolerance:.1e}; do not "
            "deploy it, and please report the model"
        )
    return largest


def _rounding(model: nn.Module, calls: list[Example], wanted: list[list[Tensor]]) -> float:
    """How far the model's outputs in float32 are from those in float64: two runtimes that both compute in float32 may
    differ by twice that. 0 where its code does not run in float64, or where the outputs are not finite."""
    try:
        double = full_copy(model).double()
        exact = [
            outputs_of(
                double, *tree_map(lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, call)
            )
            for call in calls
        ]
    except MimicutError:
        return 0.0
    found = _largest(wanted, exact)
    return found if math.isfinite(found) else 0.0


def outputs_of(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors in the outputs of a model, without gradients.

    Raises:
        UnsupportedModel: The model's own code fails.
    """
    return tensors_in(_output_of(model, args, kwargs))


def _output_of(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    try:
        with torch.no_grad():
            return model(*args, **kwargs)
    except Exception as error:  # whatever a model's own code raises
        raise UnsupportedModel(
            f"running {model_name(model)}{fault_place(error, model)} before its export, batch "
            f"{batch_of((args, kwargs))}, float32, on the CPU: {one_line(error)}; expected outputs to compare with"
        ) from error


class _ErrorsKept(io.FileIO):
    """A file that keeps its first error for later: torch ends the process where one is raised while it writes."""

    error: BaseException | None = None

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        while len(left) and self.error is None:
            try:
                left = left[super().write(left) :]
            except BaseException as error:
                self.error = error
        return len(data)


def _save_program(program: Any, path: Path) -> None:
    with interrupts_held(), _ErrorsKept(path, "w") as file:
        torch.export.save(program, file)
    if file.error is not None:
        raise file.error


def _write_program(program: Any, model: nn.Module, path: Path) -> None:
    try:
        write_by(path, partial(_save_program, program), _bytes_of(model))
    except OSError:
        raise
    except Exception as error:
        raise UnsupportedModel(
            f"writing {model_name(model)} as {path.name}: torch.export.save stopped{fault_place(error, model)} with "
            f"{one_line(error)}; expected operators and constants that can be stored"
        ) from error


def _write_openvino(model: nn.Module, source: Path, target: Path) -> None:
    """Write an ONNX file for OpenVINO, the way its latency is measured."""
    import openvino

    try:
        core = openvino.Core()
        core.set_property({"ENABLE_MMAP": False})  # the file does not last
        read = core.read_model(source)
        write_by(target, lambda to: openvino.save_model(read, to, compress_to_fp16=False), _bytes_of(model))
    except OSError:
        raise
    except Exception as error:  # whatever OpenVINO raises
        raise UnsupportedModel(
            f"writing {model_name(model)} for OpenVINO: {one_line(error)}; expected operators that it has; "
            "--to onnx, or --to pt2, may have them"
        ) from error


def _write_int8(calibrate: Sequence[Any], model: nn.Module, source: Path, target: Path) -> None:
    try:
        arrays = [[t.detach().numpy() for t in tensors_in(_in_float32(b))] for b in calibrate]
        write_by(target, lambda to: quantise(source, to, arrays), _bytes_of(model))
    except OSError:
        raise
    except Exception as error:  # whatever ONNX Runtime raises
        raise UnsupportedModel(
            f"quantising {model_name(model)}: {one_line(error)}; expected operators that ONNX Runtime can quantise; "
            "leave INT8 out, or quantise the float32 file (--to onnx) with another tool"
        ) from error


def _bytes_of(model: nn.Module) -> int:
    return sum({id(t): t.nbytes for t in named_tensors(model).values()}.values())


def _run_program(path: Path, calls: list[Example]) -> list[list[Tensor]]:
    module = torch.export.load(path).module()
    with torch.no_grad():
        return [tensors_in(module(*args, **kwargs)) for args, kwargs in calls]


def run_onnx(path: Path, calls: list[Example]) -> list[list[Tensor]]:
    """The output tensors of an ONNX file for each call, by ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.enable_cpu_mem_arena = False  # it keeps what every operator once needed
    options.log_severity_level = 4  # its errors are raised, and it warns of its own optimisations by the hundred
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    feeds = [dict(zip(names, (t.detach().numpy() for t in tensors_in(call)), strict=True)) for call in calls]
    return [[torch.from_numpy(v) for v in session.run(None, feed)] for feed in feeds]


def _run_openvino(path: Path, calls: list[Example]) -> list[list[Tensor]]:
    import openvino

    core = openvino.Core()
    core.set_property({"ENABLE_MMAP": False})  # the file may be moved
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    request = core.compile_model(core.read_model(path), "CPU", options).create_infer_request()
    feeds = [[t.detach().contiguous().numpy() for t in tensors_in(call)] for call in calls]
    return [[torch.from_numpy(v.copy()) for v in request.infer(feed).to_tuple()] for feed in feeds]


_RUN: dict[str, Callable[[Path, list[Example]], list[list[Tensor]]]] = {
    "pt2": _run_program,
    "onnx": run_onnx,
    "openvino": _run_openvino,
    "int8": run_onnx,
    **{kind: partial(run_edge, kind) for kind in EDGE},
}


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference of any output, as a share of that output's largest value; infinite for other shapes.

    >>> difference([torch.tensor([1.0, 2.0])], [torch.tensor([1.0, 4.0])])
    0.5
    """
    if [f.shape for f in found] != [e.shape for e in expected]:
        return math.inf
    pairs = [(f.double(), e.double()) for f, e in zip(found, expected, strict=True) if e.numel()]
    shares = [(f - e).abs().max() / e.abs().max().clamp_min(1e-300) for f, e in pairs]
    return torch.stack(shares).max().item() if shares else 0.0


def _largest(found: list[list[Tensor]], expected: list[list[Tensor]]) -> float:
    """The largest `difference` of any call; NaN where one is."""
    return torch.tensor([difference(*pair) for pair in zip(found, expected, strict=True)]).max().item()


def in_float32(model: nn.Module, example: Any) -> tuple[nn.Module, Example]:
    """A copy of the model in eval mode, on the CPU, in float32, and the example likewise; they share tensors if
    possible."""
    held = named_tensors(model).values()
    plain = all(t.device.type == "cpu" and (t.dtype == torch.float32 or not t.is_floating_point()) for t in held)
    ready = structural_copy(model) if plain else full_copy(model).cpu().float()
    return ready.eval(), _in_float32(example)


def _in_float32(example: Any) -> Example:
    return tree_map(
        lambda v: (v.cpu().float() if v.is_floating_point() else v.cpu()) if isinstance(v, Tensor) else v,
        as_example(example),
    )


def _is_free(program: Any, kind: str) -> bool:
    """Whether the batch of an input may have any size, or the height and width of an image ("size")."""
    users = set(program.graph_signature.user_inputs)
    values = [n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder" and n.name in users]
    axes = slice(0, 1) if kind == "batch" else slice(2, None)
    shapes = [v.shape[axes] for v in values if isinstance(v, Tensor)]
    return any(len(shape) and not any(map(is_concrete_int, shape)) for shape in shapes)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors anywhere inside tuples, lists, dicts and dataclasses, in order."""
    return [tensor for _, tensor in tensors(value)]


def batch_of(call: Example) -> int:
    """The number of images in a call: the length of its first tensor; 0 without one."""
    first = next(iter(tensors_in(call)), None)
    return first.shape[0] if first is not None and first.dim() else 0


def batched(value: Any, call: Example) -> bool:
    """Whether a value of a call is a tensor with the images of the batch along its first axis."""
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch_of(call)
