"""The README.md inside a result folder: what it is, and how to load it in three ways."""

from typing import Any

from mimicut.results.report import Report
from mimicut.surgery.plan import Plan

_NAMED = ("timm:", "torchvision:", "hf:", "demo:")


def readme(report: Report, plan: Plan) -> str:
    """Code blocks that are python run as they stand, in the folder, once the files that they open are there."""
    source = plan.teacher.get("source") or {}
    spec = str(source.get("spec") or "module")
    size = (source.get("preprocessing") or {}).get("input_size") or [3, 224, 224]
    first = source
    while "result" in first:  # what its teacher, or the teacher of that, was made of
        first = (first["result"].get("plan", {}).get("teacher") or {}).get("source") or {}
    ours = str(first.get("spec")).startswith(_NAMED)
    opened = 'mimicut.load(".")'
    if not ours:
        opened = 'mimicut.load(".", "FILE.py:FUNCTION")  # what builds the architecture of its teacher'
    pruned = plan.pruned_by is not None
    module = [] if pruned else [
        "As a module, with mimicut (`pip install mimicut`); no code in this folder is run:", "",
        "```python", "import torch", "import mimicut", "", f"model = {opened}",
        f"scores = model({_given(plan, None, size)})", "```", "",
    ]  # fmt: skip
    inside = [f"Of a student that another tool pruned ({plan.pruned_by}); `report.json` has all figures."]
    if not pruned:
        inside = ["`mimicut export . --to int8 --images DIR` writes the same in INT8, as `model.int8.onnx`.", "",
                  "`plan.json` is the plan it was cut by (edit it and give it to `mimicut compress --plan`),",
                  "`weights.safetensors` its tensors, `report.json` all figures."]  # fmt: skip
    known = report.top1_agreement is not None
    agreement = [f"- top-1 agreement with the teacher: {report.top1_agreement:.1%}"] if known else []
    lines = [
        f"# Student of {spec}", "",
        f"Made by [mimicut](https://arxiv.org/abs/2201.02620) {report.versions.get('mimicut', '')}: a smaller",
        f"network in the place of `{spec}`. [report.html](report.html) says what it is worth.", "",
        f"- MACs of one image: {_of(report.macs_student, report.macs_teacher)}",
        f"- parameters: {_of(report.params_student, report.params_teacher)}",
        *agreement, "",
        "## Load it", "", f"Images are float32 (N, {', '.join(map(str, size))}){_how(source)}.", "",
        *module,
        f"With PyTorch alone{_after(report, 'pt2', pruned)}:", "",
        "```python", "import torch", "", 'model = torch.export.load("model.pt2").module()',
        f"scores = model({_given(plan, report, size)})", "```", "",
        f"With ONNX Runtime alone{_after(report, 'onnx', pruned)}:", "",
        "```python", "import numpy", "import onnxruntime", "",
        'session = onnxruntime.InferenceSession("model.onnx")',
        f"images = numpy.zeros(({_batch(report, 'onnx')}, {', '.join(map(str, size))}), numpy.float32)",
        "scores = session.run(None, {session.get_inputs()[0].name: images})[0]", "```", "",
        f"With OpenVINO alone{_after(report, 'openvino', pruned)}:", "",
        "```python", "import numpy", "import openvino", "",
        'model = openvino.Core().compile_model("model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})',
        f"images = numpy.zeros(({_batch(report, 'openvino')}, {', '.join(map(str, size))}), numpy.float32)",
        "scores = model([images])[0]", "```", "",
        *inside, "",
    ]  # fmt: skip
    return "\n".join(lines)


def _given(plan: Plan, report: Report | None, size: list[int]) -> str:
    """The arguments of a call on blank images. report: of the exported program; None of the module itself."""
    batch = 1 if report is None else _batch(report, "pt2")
    image, call = f"torch.zeros({batch}, {', '.join(map(str, size))})", plan.call
    if call is None or (report is not None and report.exports.get("pt2", {}).get("normalises")):
        return image
    first = image if call["keyword"] is None else f"{call['keyword']}={image}"
    return ", ".join([first, *(f"{name}={value!r}" for name, value in call["options"].items())])


def _batch(report: Report, kind: str) -> str:
    """How many images an exported file is shown: as many as it takes, where that is fixed."""
    batch = report.exports.get(kind, {}).get("batch", "any")
    return "1" if batch == "any" else batch


def _after(report: Report, kind: str, pruned: bool) -> str:
    """How the file is had where it is not there; what to know of it where it is."""
    if kind not in report.exports:
        return f" (once it was made with `--to {kind}`)" if pruned else f", after `mimicut export . --to {kind}`"
    export, said = report.exports[kind], []
    if export.get("normalises"):
        said.append("this file normalises by itself: values 0 to 1")
    if _batch(report, kind) != "1":
        said.append(f"it takes {_batch(report, kind)} images at a time, no more and no fewer")
    return f" ({'; '.join(said)})" if said else ""


def _of(student: int | None, teacher: int | None) -> str:
    if not student or not teacher:
        return "unknown"
    return f"{student:,} of {teacher:,} ({student / teacher:.0%})"


def _how(source: dict[str, Any]) -> str:
    said = source.get("preprocessing")
    if not said:
        return ""
    sized = "resized to that size" if said.get("resize") is None else f"resized to {said['resize']} and cropped"
    mean, std = (", ".join(f"{v:.4g}" for v in said[name]) for name in ("mean", "std"))
    return f", {sized} ({said['interpolation']}), scaled to 0..1, minus the mean {mean}, over {std}"
