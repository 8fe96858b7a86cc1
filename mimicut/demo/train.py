"""Trains the demo's teachers and writes their weights: python -m mimicut.demo.train [--teacher NAME] [--out DIR]

Reads the "train" tiles only; the test patches are counted once, at the end, with the weights that are then written.
Nothing is chosen by them. A run cannot be resumed. One seed on one machine gives one result; other thread counts or
processors round differently and end elsewhere, about as far as another seed would.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn
from torch.nn import functional as F

from mimicut.demo import photographs, teacher_networks


@dataclass(frozen=True)
class TrainConfig:
    """Constants without a source are assumptions. Short runs that compared the networks' sizes and much mixing with
    none were judged on tiles held back from the "train" part, not on the test part."""

    steps: int
    batch_size: int = 128
    optimizer: str = "sgd"  # or "adamw", which has no momentum but its own betas
    lr: float = 0.2  # peak of a warm-up and a linear fall to zero
    warmup: float = 0.15  # share of the steps
    momentum: float = 0.9
    weight_decay: float = 5e-4  # of convolution and linear weights; none on norms and biases
    label_smoothing: float = 0.1
    cutmix: float = 0.2  # share of the batches that are mixed. Source: Yun et al. 2019, arXiv 1905.04899
    average: float = 0.99  # decay of the running average of the weights, which is what is kept
    seed: int = 0


# 7 to 19 minutes each on one core; vit_tiny took 49 on one that three other programs shared.
CONFIGS = {
    "mobilenetv2_tiny": TrainConfig(6000),
    "resnet14": TrainConfig(5000),
    "vgg7": TrainConfig(5000),
    "vit_tiny": TrainConfig(7000, optimizer="adamw", lr=3e-3, weight_decay=0.05),
    "resnet20": TrainConfig(2000),
    "resnet32": TrainConfig(4000),
    "vit_deep": TrainConfig(6000, optimizer="adamw", lr=3e-3, weight_decay=0.05),
}


def train(name: str, config: TrainConfig, on_step: Callable[[int, float], None] | None = None) -> nn.Module:
    """The trained network, in eval mode. on_step(step, loss) is called after each step, from 1."""
    torch.manual_seed(config.seed)
    model = teacher_networks.build(name).to(memory_format=torch.channels_last).train()
    kept = teacher_networks.build(name).eval()
    kept.load_state_dict(model.state_dict())
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    if config.optimizer == "adamw":
        optimiser: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=config.lr)
    else:
        optimiser = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=True)
    random = torch.Generator().manual_seed(config.seed)

    def loss_of(seed: int) -> torch.Tensor:
        x, y = photographs.patches("train", config.batch_size, seed)
        x, other, share = _mixed(x, config.cutmix, random)
        logits = model(x.contiguous(memory_format=torch.channels_last))
        loss = share * F.cross_entropy(logits, y, label_smoothing=config.label_smoothing)
        return loss + (1 - share) * F.cross_entropy(logits, y[other], label_smoothing=config.label_smoothing)

    run_steps(model, kept, optimiser, config, loss_of, on_step)
    return kept


def run_steps(
    model: nn.Module,
    kept: nn.Module,
    optimiser: torch.optim.Optimizer,
    config: TrainConfig,
    loss_of: Callable[[int], torch.Tensor],
    on_step: Callable[[int, float], None] | None,
) -> None:
    """Train `model`, and let `kept` follow it as the running average of its weights. loss_of: from a step's seed."""
    for step in range(1, config.steps + 1):
        lr = config.lr * min(step / (config.warmup * config.steps), (1 - step / config.steps) / (1 - config.warmup))
        for group in optimiser.param_groups:
            group["lr"] = lr
        loss = loss_of(config.seed * config.steps + step)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        average_weights(kept, model, min(config.average, step / (step + 10)))
        if on_step is not None:
            on_step(step, loss.item())


def _mixed(x: torch.Tensor, chance: float, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The batch, maybe with one box taken from other patches; which patches those are; the share of the own pixels."""
    other = torch.randperm(len(x), generator=random)
    if torch.rand((), generator=random) >= chance:
        return x, other, 1.0
    high, wide = torch.randint(8, photographs.PATCH - 7, (2,), generator=random).tolist()
    top = int(torch.randint(0, photographs.PATCH - high + 1, (), generator=random))
    left = int(torch.randint(0, photographs.PATCH - wide + 1, (), generator=random))
    mixed = x.clone()
    mixed[:, :, top : top + high, left : left + wide] = x[other, :, top : top + high, left : left + wide]
    return mixed, other, 1 - high * wide / photographs.PATCH**2


@torch.no_grad()
def average_weights(kept: nn.Module, model: nn.Module, decay: float) -> None:
    """Move `kept` towards `model`, in place."""
    for old, new in zip(kept.state_dict().values(), model.state_dict().values(), strict=True):
        if old.is_floating_point():
            old.lerp_(new, 1 - decay)
        else:
            old.copy_(new)


@torch.no_grad()
def correct(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Whether each patch is classified correctly, bool (count,). Put the model in eval mode first."""
    return torch.cat([model(part).argmax(1) for part in x.split(500)]) == y


def write(folder: Path, name: str, model: nn.Module, facts: dict[str, Any]) -> None:
    """NAME.safetensors and NAME.json in `folder`; each file appears whole or not at all, the weights first."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = save({key: value.contiguous() for key, value in model.state_dict().items()})
    text = json.dumps(facts, indent=2) + "\n"
    for path, content in ((folder / f"{name}.safetensors", weights), (folder / f"{name}.json", text.encode())):
        partial = path.with_name(path.name + ".partial")
        partial.write_bytes(content)
        os.replace(partial, path)


def _facts(name: str, model: nn.Module, config: TrainConfig, minutes: float, command: str) -> dict[str, Any]:
    x, y = photographs.test_set()
    right = correct(model, x, y)
    return {
        "teacher": name,
        "top1_test": round(100 * right.double().mean().item(), 2),
        "test_patches": len(y),
        "right_of_first_2000": int(right[:2000].sum()),
        "test_sha256": photographs.test_hash(),
        "classes": list(photographs.CLASSES),
        "parameters": sum(p.numel() for p in model.parameters()),
        "minutes": round(minutes, 1),
        "threads": torch.get_num_threads(),
        "command": command,
        "config": asdict(config),
        "versions": training_versions(),
    }


def training_versions() -> dict[str, str]:
    """What the training depends on."""
    packages = ("torch", "numpy", "pillow", "scikit-image", "scikit-learn", "safetensors")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


def progress(steps: int) -> Callable[[int, float], None]:
    """Receives (step, loss) and prints every 50th."""
    start = time.monotonic()

    def report(step: int, loss: float) -> None:
        if step % 50 == 0 or step == steps:
            spent = time.monotonic() - start
            print(f"step {step}/{steps}  loss {loss:.3f}  {spent / step * (steps - step):.0f} s left", file=sys.stderr)

    return report


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mimicut.demo.train", description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", choices=teacher_networks.NAMES, action="append", help="which one; default: all")
    parser.add_argument("--out", type=Path, default=teacher_networks.TEACHERS, help="folder; default: %(default)s")
    parser.add_argument(
        "--steps", type=int, help="default: " + ", ".join(f"{c.steps} for {n}" for n, c in CONFIGS.items())
    )
    parser.add_argument("--seed", type=int, default=TrainConfig.seed, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="processor cores to use; default: %(default)s")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    for name in options.teacher or teacher_networks.NAMES:
        config = replace(CONFIGS[name], steps=options.steps or CONFIGS[name].steps, seed=options.seed)
        command = (
            f"python -m mimicut.demo.train --teacher {name} --steps {config.steps} --seed {config.seed} "
            f"--threads {options.threads}"
        )
        start = time.monotonic()
        model = train(name, config, progress(config.steps))
        facts = _facts(name, model, config, (time.monotonic() - start) / 60, command)
        write(options.out, name, model, facts)
        print(json.dumps({"teacher": name, "top1_test": facts["top1_test"], "minutes": facts["minutes"]}))


if __name__ == "__main__":
    main()
