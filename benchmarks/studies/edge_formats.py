"""Files for phones: which networks does each converter take, and do the files agree with them?

    python -m benchmarks.studies.edge_formats            # goes on where it was stopped
    python -m benchmarks.studies.edge_formats --page     # docs/edge_formats.md from the lines

The demo's four teachers, and networks of torchvision and timm with random weights (statistics of batch norms and scales
of layers included), at small image sizes. Formats whose converter is missing are left out and said
(docs/how_to/phones_and_edge.md has how to install them). A line of results/edge_formats.jsonl for each network and
format: difference, as a share of the largest output; not_run; or error.
"""

import argparse
import logging
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision.models as tv
from torch import nn

from benchmarks.json_lines import add, read
from mimicut.base.environment import versions
from mimicut.base.errors import InputError, MimicutError
from mimicut.proof.randomised import randomised
from mimicut.results.teachers import load_teacher
from mimicut.runtime.edge_formats import EDGE, check_converter
from mimicut.runtime.export import export

RESULTS = Path(__file__).parents[1] / "results" / "edge_formats.jsonl"
PAGE = Path(__file__).parents[2] / "docs" / "edge_formats.md"


def _demo(name: str) -> nn.Module:
    return load_teacher(f"demo:{name}").model


def _torchvision(name: str, **options: Any) -> nn.Module:
    return randomised(tv.get_model(name, num_classes=20, **options))


def _timm(name: str, **options: Any) -> nn.Module:
    return randomised(timm.create_model(name, num_classes=20, **options))


# Name -> what builds it, and the shape of its images.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{f"demo:{n}": (partial(_demo, n), (1, 32, 32)) for n in ("resnet14", "mobilenetv2_tiny", "vgg7", "vit_tiny")},
    **{
        f"torchvision:{n}": (partial(_torchvision, n), (3, 64, 64))
        for n in ("mobilenet_v2", "mobilenet_v3_small", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1",
                  "regnet_y_400mf", "densenet121")
    },
    "torchvision:vit_b_16": (partial(_torchvision, "vit_b_16", image_size=64), (3, 64, 64)),
    "timm:efficientnet_lite0": (partial(_timm, "efficientnet_lite0"), (3, 64, 64)),
    "timm:convnext_atto": (partial(_timm, "convnext_atto"), (3, 64, 64)),
    "timm:ghostnet_100": (partial(_timm, "ghostnet_100"), (3, 64, 64)),
    "timm:levit_128s": (partial(_timm, "levit_128s"), (3, 224, 224)),
    "timm:swin_tiny_patch4_window7_224": (
        partial(_timm, "swin_tiny_patch4_window7_224", img_size=112, depths=(1, 1, 1, 1), embed_dim=48), (3, 112, 112),
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="write the page and convert nothing")
    if parser.parse_args().page:
        PAGE.write_text(page(read(RESULTS)), encoding="utf-8")
        return
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    done = {(line["network"], line["format"]) for line in read(RESULTS)}
    formats = _formats()
    for name in NETWORKS:
        for kind in formats:
            if (name, kind) not in done:
                add(RESULTS, one(name, kind))


def _formats() -> list[str]:
    """Those whose converter is here; of the others stderr has the reason."""
    found = []
    for kind in EDGE:
        try:
            check_converter(kind)
            found.append(kind)
        except InputError as error:
            print(error, file=sys.stderr)
    return found


def one(name: str, kind: str) -> dict[str, Any]:
    """The line of one network and format."""
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    network = build().eval()
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    line: dict[str, Any] = {"network": name, "format": kind, "versions": versions()}
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="edge_formats") as scratch:
        try:
            found = export(network, images, scratch, formats=[kind], force=True)
            line["bytes"] = found.files[kind].stat().st_size
            if kind in found.errors:
                line["difference"] = found.errors[kind]
            else:
                line["not_run"] = found.not_run[kind]
        except MimicutError as error:
            line["error"] = str(error).replace(scratch, "")[:400]
    return {**line, "seconds": round(time.perf_counter() - begun, 1)}


def page(lines: list[dict[str, Any]]) -> str:
    """The text of docs/edge_formats.md."""
    found = {(line["network"], line["format"]): line for line in lines}
    kinds = [kind for kind in EDGE if any(line["format"] == kind for line in lines)]
    rows = [[name, *(_cell(found.get((name, kind))) for kind in kinds)] for name in NETWORKS]
    errors = [f"- {x['network']}, {EDGE[x['format']].runtime}: {x['error']}" for x in lines if "error" in x]
    compared = [x["difference"] for x in lines if "difference" in x]
    return "\n".join([
        "# Files for phones", "",
        "Made by `python -m benchmarks.studies.edge_formats --page`. Each network is converted in float32 by the "
        "format's own converter, from torch's exported program, and run in a process of its own on random images: the "
        "largest difference of its outputs from the network's, as a share of the largest output; at most 1e-4 is "
        "allowed. How to make such files: [phones and edge](how_to/phones_and_edge.md).", "",
        f"{len(lines)} of {len(NETWORKS) * len(EDGE)} files were tried. {len(compared)} were run; they differ by at "
        f"most {max(compared, default=0.0):.0e}. TensorRT needs a GPU, and none was at hand. Core ML was not run: "
        "*alike* means that the shapes of inputs and outputs and the number of weights are the network's. An empty "
        "place was not tried.", "",
        f"| network | {' | '.join(EDGE[kind].runtime for kind in kinds)} |", f"|---|{'---|' * len(kinds)}",
        *(f"| {' | '.join(row)} |" for row in rows), "",
        *(["## What stopped", "", *errors, ""] if errors else []),
    ])  # fmt: skip


def _cell(line: dict[str, Any] | None) -> str:
    if line is None:
        return ""
    if "difference" in line:
        return f"{line['difference']:.0e}"
    if "not_run" in line:
        return "alike"
    operator = re.search(r"at the operator (\S+)", line["error"])
    return f"`{operator[1]}`" if operator else "stopped"


if __name__ == "__main__":
    main()
