"""The README.md inside a result folder: what it is, and how to load it in four ways."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mimicut.inputs.preprocessing import NATIVE, Preprocessing
from mimicut.results.report import Report
from mimicut.runtime.edge_formats import EDGE
from mimicut.surgery.plan import Plan

_NAMED = ("timm:", "torchvision:", "hf:", "onnx:", "demo:")


def readme(report: Report, plan: Plan, *, has_run_file: bool = False, repository: str | None = None) -> str:
    """The text of README.md.

    Its Python blocks run as they are, in the folder, once the files that they open exist.

    Args:
        report: The figures, and the files that were exported.
        plan: How the student was cut, and from which teacher.
        has_run_file: Whether the folder has a run.toml.
        repository: USER/NAME on a hub, for the card of what is published there.
    """
    source = plan.teacher.get("source") or {}
    recorded = source.get("preprocessing")
    preprocessing = Preprocessing.from_json(recorded) if recorded else None
    size = list(preprocessing.input_size) if preprocessing else [3, 224, 224]
    pruned_by = plan.pruned_by
    lines = [
        *_summary(report, _text(source.get("spec") or "module")),
        "## Load it", "", _takes(plan, preprocessing, size), "",
        *([] if pruned_by else _as_module(plan, source, size, repository)),
        *([] if _inputs(plan) else _with_runtimes(report, plan, size)),
        *_for_phones(report), *_other_files(report, pruned_by),
        *(_again(pruned_by) if has_run_file else []),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _inputs(plan: Plan) -> list[tuple[str | None, list[int], str]]:
    """(name, shape without the batch, type) of each input of a network that takes others than images."""
    return [(name, shape, kind) for name, shape, kind in (plan.call or {}).get("inputs", [])]


def _takes(plan: Plan, preprocessing: Preprocessing | None, size: list[int]) -> str:
    inputs = _inputs(plan)
    if not inputs:
        return f"Images are float32 (N, {_joined(size)}){_preparation(preprocessing)}."
    named = [f"{name or 'an input'} {kind} ({_joined(['N', *shape])})" for name, shape, kind in inputs]
    return f"It takes {', '.join(named)}, prepared as its teacher takes them."


def _summary(report: Report, spec: str) -> list[str]:
    known = report.top1_agreement is not None
    version = _text(report.versions.get("mimicut", ""))
    agreement = [f"- Top-1 agreement with the teacher: {report.top1_agreement:.1%}"] if known else []
    said = [*report.certificate(), *report.detection_lines(), *report.output_lines()]
    certificate = ["## What held-out images prove", "", *(f"- {line}" for line in said), ""] if said else []
    return [
        f"# Student of {spec}", "",
        f"A smaller network that replaces `{spec}`, made by mimicut {version}".rstrip(),
        "(`pip install mimicut`) from a few unlabelled images, with the method of",
        "[MiR](https://arxiv.org/abs/2201.02620). [report.html](report.html) shows how it compares with its teacher.",
        "",
        f"- MACs of one image: {_share(report.macs_student, report.macs_teacher)}",
        f"- Parameters: {_share(report.params_student, report.params_teacher)}",
        *agreement, "", *certificate,
    ]  # fmt: skip


def _as_module(plan: Plan, source: Mapping[str, Any], size: list[int], repository: str | None) -> list[str]:
    first = source
    while "result" in first:  # the teacher was itself a result: what the first one was made from
        first = (first["result"].get("plan", {}).get("teacher") or {}).get("source") or {}
    named = str(first.get("spec")).startswith(_NAMED)
    place = f'from_pretrained("{repository}"' if repository else 'load("."'
    loading = f"mimicut.{place})"
    if not named:
        loading = f'mimicut.{place}, "FILE.py:FUNCTION")  # the function that builds its teacher\'s architecture'
    return [
        "As a PyTorch module, with mimicut (`pip install mimicut`); no code in this folder is run:", "",
        "```python", "import torch", "import mimicut", "", f"model = {loading}",
        f"scores = model({_blank_call(plan, None, size)})", "```", "",
    ]  # fmt: skip


def _with_runtimes(report: Report, plan: Plan, size: list[int]) -> list[str]:
    """With each runtime alone, by the file that it reads."""
    code = {
        "pt2": (
            "PyTorch", "import torch", "", 'model = torch.export.load("model.pt2").module()',
            f"scores = model({_blank_call(plan, report, size)})",
        ),
        "onnx": (
            "ONNX Runtime", "import numpy", "import onnxruntime", "",
            'session = onnxruntime.InferenceSession("model.onnx")', _blank_array(report, "onnx", size),
            "scores = session.run(None, {session.get_inputs()[0].name: images})[0]",
        ),
        "openvino": (
            "OpenVINO", "import numpy", "import openvino", "",
            'model = openvino.Core().compile_model("model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})',
            _blank_array(report, "openvino", size), "scores = model([images])[0]",
        ),
    }  # fmt: skip
    lines = []
    for kind, (runtime, *body) in code.items():
        lines += [f"With {runtime} alone{_condition(report, plan, kind)}:", "", "```python", *body, "```", ""]
    return lines


def _for_phones(report: Report) -> list[str]:
    """A line for each file that another tool's runtime reads."""
    lines = []
    for kind, edge in EDGE.items():
        if (export := report.exports.get(kind)) is not None:
            images = "one image" if export["batch"] == "1" else f"{export['batch']} images"
            lines.append(f"- `{edge.file}` is for {edge.runtime}, {images} at a time.{_unrun(export)}")
    return ["For phones and accelerators:", "", *lines, ""] if lines else []


def _unrun(export: Mapping[str, Any]) -> str:
    return f" It was not run here: {_text(export['not_run'])}." if export.get("not_run") else ""


def _blank_array(report: Report, kind: str, size: list[int]) -> str:
    return f"images = numpy.zeros(({_batch(report, kind)}, {_joined(size)}), numpy.float32)"


def _other_files(report: Report, pruned_by: str | None) -> list[str]:
    if pruned_by:
        return [f"Another tool ({_text(pruned_by)}) pruned this student; `report.json` has all figures."]
    in_int8 = (
        "`model.int8.onnx` is the same network in INT8, for ONNX Runtime and OpenVINO; `report.json` compares the two."
        if "int8" in report.exports
        else "`mimicut export . --to int8 --images DIR` writes the same network in INT8, as `model.int8.onnx`."
    )
    return [
        in_int8, "",
        "`plan.json` says which channels and blocks were kept (edit a copy and pass it to `mimicut compress --plan`),",
        "`weights.safetensors` holds the tensors, `report.json` all figures.",
    ]  # fmt: skip


def _again(pruned_by: str | None) -> list[str]:
    command = "recover" if pruned_by else "compress"
    return [
        "", f"`run.toml` holds the options that this result was made with: `mimicut {command} --config run.toml --out",
        "ANOTHER_FOLDER` makes it again, with what a comment there names given besides.",
    ]  # fmt: skip


def _blank_call(plan: Plan, report: Report | None, size: list[int]) -> str:
    """The arguments of a call on blank images: of the exported program in `report`, or (None) of the module itself."""
    batch = 1 if report is None else _batch(report, "pt2")
    if _inputs(plan):
        blank = [(n, f"torch.zeros({_joined([1, *shape])}, dtype=torch.{kind})") for n, shape, kind in _inputs(plan)]
        return ", ".join(value if name is None else f"{name}={value}" for name, value in blank)
    image, call = f"torch.zeros({batch}, {_joined(size)})", plan.call
    if call is None or (report is not None and report.exports.get("pt2", {}).get("normalises")):
        return image
    first = image if call["keyword"] is None else f"{call['keyword']}={image}"
    return ", ".join([first, *(f"{name}={value!r}" for name, value in call["options"].items())])


def _batch(report: Report, kind: str) -> str:
    """How many images an exported file is called with: 1, or the batch that it is fixed to."""
    batch = report.exports.get(kind, {}).get("batch", "any")
    return "1" if batch == "any" else batch


def _condition(report: Report, plan: Plan, kind: str) -> str:
    """How to get the file where it does not exist; what to know about it where it does."""
    if kind not in report.exports:
        pruned = plan.pruned_by is not None
        return f" (only if `--to {kind}` wrote the file)" if pruned else f", after `mimicut export . --to {kind}`"
    remarks = []
    if report.exports[kind].get("normalises"):
        remarks.append("this file normalises by itself: values 0 to 1")
    if _batch(report, kind) != "1":
        remarks.append(f"it takes {_batch(report, kind)} images at a time, no more and no fewer")
    if report.exports[kind].get("size") == "any":
        remarks.append("it takes images of any height and width")
    return f" ({'; '.join(remarks)})" if remarks else ""


def _share(student: int | None, teacher: int | None) -> str:
    if not student or not teacher:
        return "unknown"
    return f"{student:,} of the teacher's {teacher:,} ({student / teacher:.0%})"


def _preparation(preprocessing: Preprocessing | None) -> str:
    """How an image becomes what the network takes, in words."""
    if preprocessing is None:
        return ""
    sized = "resized to that size"
    if preprocessing.resize == NATIVE:
        sized = "cropped to the centre, without resizing"
    elif preprocessing.resize is not None:
        sized = f"the shorter side resized to {preprocessing.resize}, cropped to the centre"
    mean, std = (", ".join(f"{v:.4g}" for v in values) for values in (preprocessing.mean, preprocessing.std))
    return f": {sized} ({preprocessing.interpolation}), scaled to 0..1, minus the mean {mean}, divided by {std}"


def _text(value: Any) -> str:
    """Text of others on one line of Markdown, also in a code span, without a meaning of its own there.

    >>> _text("net`.py [a] <script>")
    "net'.py &#91;a&#93; &lt;script&gt;"
    """
    line = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    line = line.replace("`", "'").replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"[\[\]|*\\]", lambda found: f"&#{ord(found[0])};", line)


def _joined(size: Sequence[int | str]) -> str:
    return ", ".join(map(str, size))
