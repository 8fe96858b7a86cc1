"""A fingerprint of what the software computes, to the bit: made before a rebuild, compared after each step of it.

    python -m benchmarks.fingerprint --write before.json      # some minutes on one core
    python -m benchmarks.fingerprint --against before.json    # exits with 1 where anything differs, and names it

Of every small demo teacher by both recipes at two budgets, 20 steps each; of ten architectures with random weights:
evidence, plan, cut and closed form; of a run that was stopped and resumed; and of an exported file: SHA-256 of the
plan (what stays, not how it words what was asked), of all tensors of the student, and of the figures in the report.
One thread, so that sums are made in one order. Another processor or version of torch rounds otherwise: compare only
fingerprints of one machine and one set of versions.
"""

import argparse
import hashlib
import json
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mimicut
from mimicut import demo
from mimicut.proof.randomised import randomised

TEACHERS = ("resnet14", "mobilenetv2_tiny", "vgg7", "vit_tiny")
RECIPES, KEEPS, STEPS, IMAGES = ("default", "paper"), (0.7, 0.5), 20, 50
# Spec -> pixels of the side.
ARCHITECTURES = {
    "torchvision:resnet18": 64, "torchvision:mobilenet_v2": 64, "torchvision:vgg11_bn": 64,
    "torchvision:densenet121": 64, "torchvision:convnext_tiny": 64, "torchvision:swin_t": 64,
    "torchvision:regnet_x_400mf": 64, "torchvision:mobilenet_v3_small": 64, "timm:vit_tiny_patch16_224": 224,
    "timm:ghostnet_050": 64,
}  # fmt: skip
VIEWS = 16  # of the closed form of an architecture
_PLAN = ("macs", "widths", "drop", "keep", "edits", "calls", "gone", "slices")
_FIGURES = (
    "macs_teacher", "macs_student", "params_teacher", "params_student", "top1_agreement", "feature_error_relative",
    "feature_cosine", "confidence_student", "images_few", "images_held_out", "steps", "image_hashes",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--only", nargs="+", default=[], help="parts whose names hold one of these texts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    for name, part in parts():
        if not options.only or any(text in name for text in options.only):
            found[name] = part()
            print(json.dumps({name: found[name]}), flush=True)
    if options.write:
        options.write.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if options.against:
        sys.exit(_differ(found, json.loads(options.against.read_text(encoding="utf-8"))))


def _differ(found: dict[str, Any], expected: dict[str, Any]) -> int:
    other = [
        f"{name}: {what} differs"
        for name, hashes in found.items()
        for what, digest in hashes.items()
        if expected.get(name, {}).get(what) != digest
    ]
    print("\n".join(other) or f"all {len(found)} parts are the same", file=sys.stderr)
    return 1 if other else 0


def parts() -> Iterator[tuple[str, Callable[[], dict[str, str]]]]:
    for teacher in TEACHERS:
        for recipe in RECIPES:
            for keep in KEEPS:
                yield f"demo {teacher} {recipe} {keep:g}", lambda t=teacher, r=recipe, k=keep: _demo(t, r, k)
    for spec, side in ARCHITECTURES.items():
        yield f"architecture {spec}", lambda s=spec, p=side: _architecture(s, p)
    yield "stopped and resumed", _resumed
    yield "export", _exported


def _compressed(name: str, recipe: str, keep: float, **options: Any) -> Any:
    teacher = mimicut.load_teacher(f"demo:{name}")
    config = mimicut.preset(recipe, steps=STEPS, views=teacher.views)
    return mimicut.compress(teacher, demo.few_images(IMAGES, 2021), keep=keep, config=config, **options)


def _demo(name: str, recipe: str, keep: float) -> dict[str, str]:
    return _result(_compressed(name, recipe, keep))


def _result(result: Any) -> dict[str, str]:
    report = result.report.to_json()
    figures = {name: report[name] for name in _FIGURES} | {"losses": report["losses"]}
    return {"plan": _of_plan(result.plan), "student": _of_tensors(result.model), "figures": _of_data(figures)}


def _architecture(spec: str, side: int) -> dict[str, str]:
    teacher = mimicut.load_teacher(spec, pretrained=False, input_size=(3, side, side))
    model = randomised(teacher.model)
    images = torch.randn(8, 3, side, side, generator=torch.Generator().manual_seed(0))
    anatomy = mimicut.trace(model, images[:2])
    evidence = mimicut.channel_evidence(model, anatomy, images, seed=0)
    plan = mimicut.make_plan(model, anatomy, keep=0.7, evidence=evidence)
    student = mimicut.cut(model, plan)
    cut = _of_tensors(student)
    mimicut.closed_form(
        mimicut.CutStudent(model, student, anatomy, plan), images, mimicut.ClosedFormOptions(count_views=VIEWS)
    )
    scores = {name: torch.as_tensor(found) for name, found in evidence.scores.items()}
    return {
        "evidence": _of_named(scores), "plan": _of_plan(plan), "cut": cut, "closed_form": _of_tensors(student),
    }  # fmt: skip


def _resumed() -> dict[str, str]:
    def stop(done: int, total: int, loss: float) -> None:
        if done == STEPS // 2:
            signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where it runs in the background
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "result")
        try:
            _compressed("resnet14", "default", 0.5, folder=folder, on_step=stop)
        except KeyboardInterrupt:
            pass
        else:
            raise RuntimeError("the run was not stopped")
        return _result(_compressed("resnet14", "default", 0.5, folder=folder, resume=True))


def _exported() -> dict[str, str]:
    import onnx

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "result")
        _compressed("resnet14", "paper", 0.5, folder=folder, export_to=["onnx"])
        (path,) = folder.rglob("*.onnx")
        graph = onnx.load(path).graph
    nodes = [[n.op_type, sorted(map(str, n.attribute))] for n in graph.node]
    values = {str(n): torch.tensor(list(w.raw_data)) for n, w in enumerate(graph.initializer)}
    return {"nodes": _of_data(nodes), "weights": _of_named(values)}


def _of_plan(plan: Any) -> str:
    data = plan.to_json()
    data["gone"] = data["dropped_modules"]  # as release 0.1 called it
    seam = {name: data["seam"][name] for name in ("points", "head")}
    return _of_data({name: data[name] for name in _PLAN} | {"seam": seam})


def _of_tensors(model: nn.Module) -> str:
    return _of_named(dict(model.state_dict()))


def _of_named(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _of_data(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


if __name__ == "__main__":
    main()
