"""Trains the demo's teachers of `scene_networks`: python -m mimicut.demo.train_scenes [--teacher NAME] [--out DIR]

As `mimicut.demo.train`: reads "train" tiles only, measures once on test scenes or patches, writes NAME.safetensors and
NAME.json.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import box_iou

from mimicut.demo import photographs, scenes, teacher_networks
from mimicut.demo.scene_networks import EMBEDDING, STRIDE, boxes_of
from mimicut.demo.train import TrainConfig, progress, run_steps, training_versions, write

NOISE = 0.6  # standard deviation of the denoiser's noise, in those of a patch

CONFIGS = {
    "segmenter_tiny": TrainConfig(2000, batch_size=32, optimizer="adamw", lr=4e-3, weight_decay=0.01),
    "detector_tiny": TrainConfig(2500, batch_size=32, optimizer="adamw", lr=4e-3, weight_decay=0.01),
    "embedder_tiny": TrainConfig(2000, optimizer="adamw", lr=4e-3, weight_decay=0.05),
    "denoiser_tiny": TrainConfig(1000, batch_size=32, optimizer="adamw", lr=2e-3, weight_decay=0.0),
}


def segmentation_loss(model: nn.Module, config: TrainConfig, seed: int) -> torch.Tensor:
    """Cross-entropy at every pixel."""
    drawn = scenes.scenes("train", config.batch_size, seed)
    return F.cross_entropy(model(drawn.images), drawn.labels)


def detection_loss(model: nn.Module, config: TrainConfig, seed: int) -> torch.Tensor:
    """Focal loss of the centres, absolute error of sizes and offsets at the true centres.

    Source: Zhou et al. 2019, arXiv 1904.07850, equations 1 to 4 (alpha 2, beta 4; Gaussians of a sixth of the box).
    """
    drawn = scenes.scenes("train", config.batch_size, seed)
    found = model(drawn.images)
    centres = found["centres"].clamp(1e-4, 1 - 1e-4)
    heat, rest = torch.zeros_like(centres), torch.zeros(())
    grid = torch.arange(centres.shape[-1], dtype=torch.float32)
    objects = sum(map(len, drawn.boxes))
    for number, boxes in enumerate(drawn.boxes):
        for left, top, right, bottom, texture in boxes.tolist():
            x, y = (left + right) / 2 / STRIDE, (top + bottom) / 2 / STRIDE
            column, row, spread = int(x), int(y), (right - left) / STRIDE / 6
            bell = torch.exp(-((grid[None] - column) ** 2 + (grid[:, None] - row) ** 2) / (2 * spread**2))
            heat[number, int(texture)] = torch.maximum(heat[number, int(texture)], bell)
            size = torch.tensor([right - left, bottom - top]) / 16
            offset = torch.tensor([x - column, y - row])
            rest = rest + (found["sizes"][number, :, row, column] - size).abs().sum()
            rest = rest + (found["offsets"][number, :, row, column] - offset).abs().sum()
    there = heat == 1
    hit = (1 - centres) ** 2 * centres.log()
    miss = (1 - heat) ** 4 * centres**2 * (1 - centres).log()
    return (rest - torch.where(there, hit, miss).sum()) / max(1, objects)


def embedding_loss(model: nn.Module, rows: torch.Tensor, config: TrainConfig, seed: int) -> torch.Tensor:
    """Cross-entropy over cosines to one learned row for each photograph, which is thrown away afterwards.

    Source: Wang et al. 2018, arXiv 1801.09414 (here scale 16, margin 0.2).
    """
    x, y = photographs.patches("train", config.batch_size, seed)
    likeness = model(x) @ F.normalize(rows).T
    return F.cross_entropy(16 * (likeness - 0.2 * F.one_hot(y, likeness.shape[1])), y)


def noisy(x: torch.Tensor, seed: int) -> torch.Tensor:
    """Patches with noise of deviation NOISE."""
    return x + NOISE * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))


def denoising_loss(model: nn.Module, config: TrainConfig, seed: int) -> torch.Tensor:
    """Squared error to the patch without noise."""
    x, _ = photographs.patches("train", config.batch_size, seed)
    return F.mse_loss(model(noisy(x, seed)), x)


_LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "segmenter_tiny": segmentation_loss,
    "detector_tiny": detection_loss,
    "denoiser_tiny": denoising_loss,
}


def train(name: str, config: TrainConfig, on_step: Callable[[int, float], None] | None = None) -> nn.Module:
    """The trained network, in eval mode: the running average of its weights. on_step(step, loss) after each step."""
    torch.manual_seed(config.seed)
    model, kept = teacher_networks.build(name).train(), teacher_networks.build(name).eval()
    kept.load_state_dict(model.state_dict())
    rows = nn.Parameter(torch.randn(len(photographs.CLASSES), EMBEDDING))
    optimiser = torch.optim.AdamW([*model.parameters(), rows], lr=config.lr, weight_decay=config.weight_decay)

    def loss_of(seed: int) -> torch.Tensor:
        return _LOSSES[name](model, config, seed) if name in _LOSSES else embedding_loss(model, rows, config, seed)

    run_steps(model, kept, optimiser, config, loss_of, on_step)
    return kept


@torch.no_grad()
def measure(name: str, model: nn.Module) -> dict[str, float]:
    """The figure of a network on its test part: percent of pixels, of objects found (overlap of one half or more, right
    texture), of patches whose nearest other patch is of the same photograph; or decibel."""
    if name == "segmenter_tiny":
        test = scenes.test_scenes()
        found = torch.cat([model(part).argmax(1) for part in test.images.split(100)])
        return {"pixels_right": round(100 * (found == test.labels).double().mean().item(), 2)}
    if name == "detector_tiny":
        test = scenes.test_scenes()
        boxes = [box for part in test.images.split(100) for box in boxes_of(model(part))]
        hits = [_found(true, some) for true, some in zip(test.boxes, boxes, strict=True)]
        return {"objects_found": round(100 * sum(map(sum, hits)) / sum(map(len, hits)), 2)}
    x, y = photographs.patches("test", 2000, photographs.TEST_SEED)
    if name == "denoiser_tiny":
        error = F.mse_loss(torch.cat([model(part) for part in noisy(x, 0).split(500)]), x)
        return {"psnr": round(float(10 * (1 / error).log10()), 2), "psnr_noisy": round(-20 * math.log10(NOISE), 2)}
    rows = torch.cat([model(part) for part in x.split(500)])
    nearest = (rows @ rows.T).fill_diagonal_(-2).argmax(1)
    return {"nearest_alike": round(100 * (y[nearest] == y).double().mean().item(), 2)}


def _found(true: torch.Tensor, boxes: torch.Tensor) -> list[bool]:
    overlaps = box_iou(true[:, :4], boxes[:, :4])
    return [bool(((row >= 0.5) & (boxes[:, 4] == t)).any()) for row, t in zip(overlaps, true[:, 4], strict=True)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mimicut.demo.train_scenes", description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", choices=CONFIGS, action="append", help="which one; default: all")
    parser.add_argument("--out", type=Path, default=teacher_networks.TEACHERS, help="folder; default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="processor cores to use; default: %(default)s")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    for name in options.teacher or CONFIGS:
        config, begun = CONFIGS[name], time.monotonic()
        # Stored in half precision, so that the wheel stays small; measured as they are stored.
        stored = train(name, config, progress(config.steps)).half()
        model = teacher_networks.build(name).eval()
        model.load_state_dict(stored.state_dict())
        facts: dict[str, Any] = {
            "teacher": name,
            **measure(name, model),
            "parameters": sum(p.numel() for p in model.parameters()),
            "minutes": round((time.monotonic() - begun) / 60, 1),
            "threads": options.threads,
            "command": f"python -m mimicut.demo.train_scenes --teacher {name} --threads {options.threads}",
            "config": asdict(config),
            "versions": training_versions(),
        }
        write(options.out, name, stored, facts)
        print(json.dumps(facts))


if __name__ == "__main__":
    main()
