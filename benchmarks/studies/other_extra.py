"""Pictures made out of the few images, in place of drawn ones: is any of them worth more beside the few?

    python -m benchmarks.studies.other_extra                # goes on where it was stopped
    python -m benchmarks.studies.other_extra --summary

On the demo's task, 50 images, our recipe with its own cut at heavy cuts. recombined: four crops of the few in one
picture. inverted: the few moved until the teacher's batch norms see the statistics of their training. boundary: the few
moved to where the teacher's two first answers are equally likely, from either side. drawn: the default. A line of
results/other_extra.jsonl for each; top1 in percent of 10,000 test patches.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.cell import Place, run_cell
from benchmarks.json_lines import add, read
from benchmarks.methods import METHODS, Problem
from benchmarks.methods.default import run_own_cut
from benchmarks.protocol import OWN, Cell
from mimicut.inputs.extra_images import GENERATED

OUT = Path(__file__).parents[1] / "results" / "other_extra.jsonl"
CASES = (("demo:vgg7", {"keep_width": 0.5}), ("demo:resnet14", {"keep_width": 0.3}))
SEED, IMAGES, STEPS, MADE = 2021, 50, 400, 2000
INVERSION_STEPS, BOUNDARY_STEPS, AT_ONCE = 60, 30, 250


def recombined(few: Tensor, teacher: nn.Module, draws: torch.Generator) -> Tensor:
    """(MADE, C, H, W), each of four crops, at another place of the picture than where they come from."""
    _, channels, height, width = few.shape
    out = torch.empty(MADE, channels, height, width)
    for picture in out:
        at_y, at_x = (int(torch.randint(s // 4, 3 * s // 4, (), generator=draws)) for s in (height, width))
        for rows, columns in [(slice(0, at_y), slice(0, at_x)), (slice(0, at_y), slice(at_x, None)),
                              (slice(at_y, None), slice(0, at_x)), (slice(at_y, None), slice(at_x, None))]:  # fmt: skip
            part = picture[:, rows, columns]
            high, wide = part.shape[1:]
            source = few[int(torch.randint(len(few), (), generator=draws))]
            y, x = (int(torch.randint(s - n + 1, (), generator=draws)) for s, n in ((height, high), (width, wide)))
            part.copy_(source[:, y : y + high, x : x + wide])
    return out


def inverted(few: Tensor, teacher: nn.Module, draws: torch.Generator) -> Tensor:
    """(MADE, C, H, W). Source: DeepInversion, Yin et al. 2020, arXiv 1912.08795, its loss on batch norms alone."""
    losses: list[Tensor] = []

    def note(norm: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
        variance, mean = torch.var_mean(inputs[0], (0, 2, 3), correction=0)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        unit = norm.running_var.clamp_min(1e-5)
        losses.append(((mean - norm.running_mean).square() / unit + (variance / unit - 1).square()).mean())

    hooks = [m.register_forward_pre_hook(note) for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)]

    def mismatch(x: Tensor) -> Tensor:
        losses.clear()
        teacher(x)
        return torch.stack(losses).sum()

    try:
        return _moved(few, draws, INVERSION_STEPS, mismatch)
    finally:
        for hook in hooks:
            hook.remove()


def boundary(few: Tensor, teacher: nn.Module, draws: torch.Generator) -> Tensor:
    """(MADE, C, H, W)."""

    def margin(x: Tensor) -> Tensor:
        first = teacher(x).topk(2, 1).values
        return (first[:, 0] - first[:, 1]).square().mean()

    return _moved(few, draws, BOUNDARY_STEPS, margin)


def _moved(few: Tensor, draws: torch.Generator, steps: int, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """The few with noise, moved by Adam."""
    parts = []
    for _ in range(MADE // AT_ONCE):
        start = few[torch.randint(len(few), (AT_ONCE,), generator=draws)]
        x = (start + 0.3 * torch.randn(start.shape, generator=draws)).requires_grad_()
        optimiser = torch.optim.Adam([x], 0.05)
        with torch.enable_grad():
            for _ in range(steps):
                optimiser.zero_grad()
                loss(x).backward(inputs=[x])
                optimiser.step()
        parts.append(x.detach())
    return torch.cat(parts)


MAKERS = {"drawn": None, "recombined": recombined, "inverted": inverted, "boundary": boundary}


def one(name: str, teacher: str, cut: dict[str, float]) -> dict[str, object]:
    def run(problem: Problem) -> nn.Module:
        maker = MAKERS[name]
        few = problem.few.batch(range(len(problem.few)))
        extra = GENERATED if maker is None else maker(few, problem.teacher, torch.Generator().manual_seed(SEED))
        return run_own_cut(problem, extra)

    with mock.patch.dict(METHODS, {OWN: replace(METHODS[OWN], run=run)}):
        line = run_cell(Cell("photographs", teacher, cut, IMAGES, STEPS, SEED, OWN), Place())
    return {"extra": name, **line}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--summary", action="store_true")
    if not parser.parse_args().summary:
        torch.set_num_threads(1)
        done = {(line["extra"], line["cell"]["teacher"]) for line in read(OUT)}
        for teacher, cut in CASES:
            for name in MAKERS:
                if (name, teacher) not in done:
                    add(OUT, one(name, teacher, cut))
    print(json.dumps({f"{x['cell']['teacher']} {x['extra']}": x["figures"]["top1"] for x in read(OUT)}))


if __name__ == "__main__":
    main()
