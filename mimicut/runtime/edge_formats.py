"""Files for phones and accelerators: LiteRT, ExecuTorch, Core ML and TensorRT.

Each converter reads torch's exported program in a process of its own (`edge_converter`): that of this Python, or of
another environment, whose Python an environment variable names, as converters may want another torch.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimicut.base.errors import InputError, LawBroken, UnsupportedModel
from mimicut.runtime import edge_converter
from mimicut.runtime.edge_converter import PACKAGES, arrays_of, calls_in
from mimicut.surgery.seam import tensors

_SCRIPT = Path(edge_converter.__file__)
# Numbers that a Core ML package may hold beside the student's, and the share that it must hold: batch norms go into
# convolutions, tables of positions are indexed while it is made. Source: assumption.
_EXTRA, _MOST, _LEAST = 2**14, 1.1, 0.9
_WITH_TORCH = ("litert", "executorch", "tensorrt")  # whose converters require torch, some only certain versions of it
_OPERATOR = re.compile(r"\b((?:aten|torchvision|prims)(?:::|\.)\w+(?:\.\w+)?)|\bop '([\w.]+)'|fx node (\w+)")


@dataclass(frozen=True)
class EdgeFormat:
    """A format that another tool writes.

    Attributes:
        file: The name of its files.
        runtime: What runs them.
    """

    file: str
    runtime: str


EDGE = {
    "litert": EdgeFormat("model.tflite", "LiteRT"),
    "executorch": EdgeFormat("model.pte", "ExecuTorch"),
    "coreml": EdgeFormat("model.mlpackage.zip", "Core ML"),
    "tensorrt": EdgeFormat("model.engine", "TensorRT"),
}


def variable(kind: str) -> str:
    """The environment variable that names the Python whose environment has the converter.

    >>> variable("litert")
    'MIMICUT_LITERT_PYTHON'
    """
    return f"MIMICUT_{kind.upper()}_PYTHON"


def check_converter(kind: str) -> None:
    """Check that a converter is there, and the torch that it wants.

    Raises:
        InputError: It is not; the message says how to install it.
    """
    python = _python(kind)
    if not Path(python).is_file():
        raise InputError(
            f"exporting to {kind}: {variable(kind)} is {python}, which is no file; expected the Python of an "
            f"environment with {', '.join(PACKAGES[kind])}"
        )
    found = edge_converter.check(kind) if python == sys.executable else _checked_elsewhere(python, kind)
    if found["device"]:
        raise InputError(
            f"exporting to {kind}: {found['device']}; expected an NVIDIA GPU, for which alone an engine is made: "
            "export there, or to onnx"
        )
    missing = found["missing"]
    if missing:
        raise InputError(
            f"exporting to {kind}: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed "
            f"{_where(python)}; expected {_ways(kind, python == sys.executable)}"
        )
    if found["torch"]:
        raise InputError(f"exporting to {kind}: {found['torch']} {_where(python)}; expected {_own_environment(kind)}")


def _where(python: str) -> str:
    return "here" if python == sys.executable else f"for {python}"


def _ways(kind: str, here: bool) -> str:
    """How a converter is installed. here: whether it may be into the environment that runs."""
    own, extra = _own_environment(kind), f"pip install 'mimicut[{kind}]'"
    if not here:
        return own
    if kind not in _WITH_TORCH:
        return f"the extra `{kind}`: {extra}, or {own}"
    return f"{own}. Or install them here, which may replace torch {torch.__version__}: {extra}"


def _own_environment(kind: str) -> str:
    folder = f".venv-{kind}"
    return (
        f"an environment of its own: python -m venv {folder}; {folder}/bin/pip install {' '.join(PACKAGES[kind])}; "
        f"export {variable(kind)}={folder}/bin/python"
    )


def _python(kind: str) -> str:
    return os.environ.get(variable(kind)) or sys.executable


@cache
def _checked_elsewhere(python: str, kind: str) -> Mapping[str, Any]:
    done = _start(python, "check", kind)
    found, error = _answer(done)
    if error is not None:
        raise InputError(
            f"exporting to {kind}: {variable(kind)} is {python}, which answers {error}; expected the Python of an "
            f"environment with {', '.join(PACKAGES[kind])}"
        )
    return found


def convert(kind: str, name: str, program: Path, target: Path) -> None:
    """Convert torch's exported program.

    Args:
        kind: The format.
        name: What the model is called in messages.
        program: The program, as `torch.export.save` wrote it.
        target: The file.

    Raises:
        UnsupportedModel: The converter stopped; the message names the operator where it said which.
    """
    done = _start(_python(kind), "write", kind, str(program), str(target))
    _, error = _answer(done)
    if error is None and not target.stat().st_size:
        error = "no file"
    if error is not None:
        operator = _operator_in(f"{error}\n{done.stderr}")
        at = f" at the operator {operator}" if operator else ""
        raise UnsupportedModel(
            f"converting {name} to {target.name}: {' and '.join(PACKAGES[kind])} stopped{at} with {error}; expected "
            f"operators that {EDGE[kind].runtime} has; --to onnx may have them"
        )


def run_edge(kind: str, path: Path, calls: Sequence[tuple[tuple, dict[str, Any]]]) -> list[list[Tensor]]:
    """The output tensors of a file for each call, of as many images as it was made for, in a process of its own.

    Raises:
        LawBroken: It does not run.
    """
    given = [[t.detach().contiguous().numpy() for _, t in tensors(call)] for call in calls]
    with tempfile.TemporaryDirectory(prefix="mimicut") as scratch:
        inputs, outputs = Path(scratch, "inputs.npz"), Path(scratch, "outputs.npz")
        np.savez(inputs, **arrays_of(given))  # type: ignore[arg-type]
        done = _start(_python(kind), "run", kind, str(path), str(inputs), str(outputs))
        _, error = _answer(done)
        if error is not None:
            operator = _operator_in(f"{error}\n{done.stderr}")
            at = f" at the operator {operator}" if operator else ""
            raise LawBroken(
                f"running {path.name} in a process of its own: it stopped{at} with {error}; do not deploy it"
            )
        return [[torch.from_numpy(array) for array in call] for call in calls_in(str(outputs))]


def not_run(kind: str) -> str | None:
    """Why files of a format cannot be run on this machine; None where they can."""
    if kind == "coreml" and sys.platform != "darwin":
        return "Core ML runs on macOS alone: only its inputs, outputs and the number of its weights were compared"
    return None


def check_structure(kind: str, path: Path, given: Sequence[Tensor], wanted: Sequence[Tensor], numbers: int) -> None:
    """Check what can be checked of a file that cannot be run: shapes of inputs and outputs, and how many numbers.

    Args:
        kind: Its format.
        path: The file.
        given: What the model takes.
        wanted: What it gives.
        numbers: How many numbers its kernels and matrices hold; nothing that is folded into them.

    Raises:
        LawBroken: It differs from the model.
    """
    found, error = _answer(_start(_python(kind), "describe", kind, str(path)))
    if error is not None:
        raise LawBroken(f"reading {path.name}: {error}; expected a {EDGE[kind].runtime} model; do not deploy it")
    shapes = {"inputs": given, "outputs": wanted}
    for name, values in shapes.items():
        expected = [list(t.shape) for t in values]
        # An output whose shape the converter leaves open has none there.
        if len(found[name]) != len(expected) or any(f and f != e for f, e in zip(found[name], expected, strict=True)):
            raise LawBroken(
                f"comparing {path.name} with the student: found {name} of shapes {found[name]}, expected {expected}; "
                "do not deploy it"
            )
    if not _LEAST * numbers <= found["numbers"] <= _MOST * numbers + _EXTRA:
        raise LawBroken(
            f"comparing {path.name} with the student: it holds {found['numbers']:,} numbers, expected about "
            f"{numbers:,}; do not deploy it"
        )


def _start(python: str, *arguments: str) -> subprocess.CompletedProcess:
    # Another environment is left to itself: neither PYTHONPATH nor the folder of the script lead into it.
    flag = "-P" if python == sys.executable else "-I"
    command = [python, flag, str(_SCRIPT), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:  # what the variable names is no program
        return subprocess.CompletedProcess(command, 1, "", str(error))


def _answer(done: subprocess.CompletedProcess) -> tuple[Any, str | None]:
    """What a process found, and its error: what it said, or how it ended."""
    last = next(iter(done.stdout.strip().splitlines()[::-1]), "")
    try:
        said = json.loads(last)
        error = said.get("error")
        return said.get("found"), None if error is None else _shortened(error)
    except (ValueError, AttributeError):
        ended = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        words = " / ".join(done.stderr.strip().splitlines()[-3:])
        return None, _shortened(f"{ended}{f': {words}' if words else ''}")


def _shortened(error: str) -> str:
    return " ".join(error.split())[:400]


def _operator_in(text: str) -> str | None:
    """The operator that a converter's message names.

    >>> _operator_in("RuntimeError: PyTorch convert function for op 'grid_sampler_3d' not implemented.")
    'grid_sampler_3d'
    >>> _operator_in("Lowering not found: aten.grid_sampler_3d.default")
    'aten.grid_sampler_3d.default'
    """
    found = _OPERATOR.search(text)
    return next((name for name in found.groups() if name), None) if found else None
