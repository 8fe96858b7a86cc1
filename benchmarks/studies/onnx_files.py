"""ONNX files as teachers: is the network that is read the one that was written, and does cutting it obey law 2?

    python -m benchmarks.studies.onnx_files            # goes on where it was stopped

Networks of torchvision and timm with random weights, each written by both exporters of torch.onnx.export, for any
number of images and for one alone; read again by `load_teacher("onnx:FILE")`, compared on three images, and cut to half
of the MACs. A line of results/onnx_files.jsonl for each file.
"""

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision.models as tv
from torch import nn

from benchmarks.json_lines import add, read
from mimicut.anatomy.cost import count
from mimicut.anatomy.find_seam import trace
from mimicut.base.environment import versions
from mimicut.base.errors import MimicutError
from mimicut.planning.planner import make_plan
from mimicut.proof.laws import check_cut
from mimicut.proof.randomised import randomised
from mimicut.results.teachers import load_teacher
from mimicut.surgery.cut import cut

RESULTS = Path(__file__).parents[1] / "results" / "onnx_files.jsonl"
KEEP, IMAGES = 0.5, 3


class _Out(nn.Module):
    """A segmentation network of torchvision, whose dictionary ONNX cannot hold."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> Any:
        return self.network(x)["out"]


# Name -> what builds it, and the side of its images.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (lambda: tv.resnet18(num_classes=20), 64),
    "mobilenet_v3_small": (lambda: tv.mobilenet_v3_small(num_classes=20), 64),
    "shufflenet_v2_x0_5": (lambda: tv.shufflenet_v2_x0_5(num_classes=20), 64),
    "vit of three layers": (lambda: tv.VisionTransformer(64, 16, 3, 4, 96, 192, num_classes=20), 64),
    "convnext_tiny": (lambda: tv.convnext_tiny(num_classes=20), 64),
    "densenet121": (lambda: tv.densenet121(num_classes=20), 64),
    "squeezenet1_1": (lambda: tv.squeezenet1_1(num_classes=20), 64),
    "lraspp_mobilenet_v3_large": (
        lambda: _Out(tv.segmentation.lraspp_mobilenet_v3_large(weights_backbone=None, num_classes=5)), 64,
    ),
    "timm efficientnet_lite0": (lambda: timm.create_model("efficientnet_lite0", num_classes=20), 64),
    "timm levit_128s": (lambda: timm.create_model("levit_128s", num_classes=20), 224),
    "timm vit_tiny of three layers": (
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=20), 64,
    ),
    "timm swin_tiny, small": (
        lambda: timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=112, depths=(1, 2, 2, 1), embed_dim=48, num_classes=20
        ), 112,
    ),
}  # fmt: skip


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    done = {(line["network"], line["exporter"], line["batch"]) for line in read(RESULTS)}
    for name in NETWORKS:
        for exporter in ("dynamo", "torchscript"):
            for batch in ("any", "one"):
                if (name, exporter, batch) not in done:
                    add(RESULTS, one(name, exporter, batch))


def one(name: str, exporter: str, batch: str) -> dict[str, Any]:
    """The line of one file: difference, of the largest output; macs, kept; law, the error of law 2; or error."""
    build, side = NETWORKS[name]
    torch.manual_seed(0)
    network = randomised(build())
    line: dict[str, Any] = {"network": name, "exporter": exporter, "batch": batch, "versions": versions()}
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="onnx_files") as scratch:
        path = Path(scratch, "model.onnx")
        try:
            _write(network, path, side, exporter, batch)
        except Exception as error:  # whatever torch's exporter raises
            return {**line, "not_written": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
        try:
            teacher = load_teacher(f"onnx:{path}")
            images = torch.randn(IMAGES, 3, side, side, generator=torch.Generator().manual_seed(1))
            with torch.no_grad():
                wanted, found = network(images), teacher.model(images)
            line["difference"] = float((found - wanted).abs().max() / wanted.abs().max())
            anatomy = trace(teacher.model, torch.zeros(2, 3, side, side))
            plan = make_plan(teacher.model, anatomy, keep=KEEP, score="random")
            student = cut(teacher.model, plan)
            line["law"] = check_cut(anatomy, plan, teacher.model, student)["error"]
            costs = [count(model, images[:1]).macs for model in (student, teacher.model)]
            line["macs"] = round(costs[0] / costs[1], 4)
        except MimicutError as error:
            line["error"] = str(error).replace(scratch, "")[:400]
    return {**line, "seconds": round(time.perf_counter() - begun, 1)}


def _write(network: nn.Module, path: Path, side: int, exporter: str, batch: str) -> None:
    images = torch.zeros(2 if batch == "any" else 1, 3, side, side)
    free: dict[str, Any] = {}
    if batch == "any" and exporter == "dynamo":
        free = {"dynamic_shapes": ({0: torch.export.Dim("images")},)}
    elif batch == "any":
        free = {"input_names": ["x"], "output_names": ["y"], "dynamic_axes": {"x": {0: "images"}, "y": {0: "images"}}}
    torch.onnx.export(network, (images,), str(path), dynamo=exporter == "dynamo", verbose=False, **free)


if __name__ == "__main__":
    main()
