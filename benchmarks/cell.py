"""Runs one cell and says what came of it, as one JSON line."""

import ctypes
import gc
import json
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.methods import METHODS, Problem
from benchmarks.protocol import Cell
from benchmarks.tasks import Place, Task, open_task
from mimicut.anatomy.cost import Cost, count
from mimicut.anatomy.find_seam import trace
from mimicut.anatomy.graph import Anatomy
from mimicut.base.environment import platform_kind, versions
from mimicut.base.guard import evaluating, seeded
from mimicut.base.layout import laid
from mimicut.planning.planner import make_plan
from mimicut.proof.figures import FeatureError, quick_layout
from mimicut.surgery.cut import cut
from mimicut.surgery.plan import Plan
from mimicut.surgery.seam import Seam, capturing


def run_cell(cell: Cell, place: Place) -> dict[str, Any]:
    """The line of `cell`: its figures, or the error that it ended in. Never raises but for KeyboardInterrupt.

    Figures: top1_* in percent; agreement: share of the test images on which student and teacher say the same;
    feature_error: squared error at the seam over the teacher's squared deviation from its mean feature; macs, params:
    the student's share of the teacher's. seconds: of the method alone, with everything it does; seconds_cell: all.
    peak_memory_mib: how far memory (the process's, or the GPU's) rose above what it was before the method began.
    """
    started = time.perf_counter()
    _keep_memory()
    threads = torch.get_num_threads()
    line: dict[str, Any] = {"cell": asdict(cell)}
    try:
        weights = place.weights_said()
        line |= {} if weights is None else {"weights": weights}
        torch.set_num_threads(place.threads)
        line |= _measured(cell, place)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        line["error"] = f"{type(error).__name__}: {error} ({Path(where.filename).name}, {where.name})"
    finally:
        torch.set_num_threads(threads)
    kept = ("python", "torch", "torchvision", "timm", "numpy", "mimicut")
    line["seconds_cell"] = round(time.perf_counter() - started, 2)
    line["versions"] = {name: text for name, text in versions().items() if name in kept}
    line["platform"] = platform_kind(place.threads, place.device)
    return line


def _measured(cell: Cell, place: Place) -> dict[str, Any]:
    method, task = METHODS[cell.method], open_task(cell.task, cell.teacher, place)
    teacher = task.teacher.model
    anatomy, plan, whole, planned = _planned(cell.task, cell.teacher, json.dumps(cell.cut, sort_keys=True), place)
    few, labels = task.few(cell.images, cell.seed)
    problem = Problem(
        teacher, anatomy, plan, few, labels if method.labels else None, task.teacher.views, cell.steps, cell.seed,
        dict(cell.options),
    )  # fmt: skip
    before = _start_peak(place.device)
    begun = time.perf_counter()
    with seeded(cell.seed):
        model = method.run(problem)
    _wait(place.device)
    seconds = time.perf_counter() - begun
    peak = _peak(place.device)
    cost = planned if not method.blocks else count(model, few.batch([0]).to(place.device))
    return {
        "figures": {
            **_tested(task, model, plan, place),
            "macs": round(cost.macs / whole.macs, 6),
            "params": round(cost.params / whole.params, 6),
        },
        "seconds": round(seconds, 2),
        "peak_memory_mib": None if before is None or peak is None else round((peak - before) / 2**20, 1),
    }


@lru_cache(maxsize=4)
def _planned(task: str, teacher: str, options: str, place: Place) -> tuple[Anatomy, Plan, Cost, Cost]:
    """The cut is the same for every method, seed and number of images; the teacher's and the student's cost."""
    opened = open_task(task, teacher, place).teacher
    model, example = opened.model, torch.zeros(2, *opened.preprocessing.input_size, device=place.device)
    anatomy = trace(model, example)
    plan = make_plan(model, anatomy, **json.loads(options))
    return anatomy, plan, count(model, example[:1]), count(cut(model, plan), example[:1])


def _tested(task: Task, model: nn.Module, plan: Plan, place: Place) -> dict[str, float]:
    """What student and teacher say of the test images, and how far their features are apart."""
    right_teacher = right = same = total = 0
    error = FeatureError()
    with evaluating(model), capturing(model, plan.seam) as learner:
        for x, y, wanted, theirs in _reference(task, plan.seam, place):
            (found,), logits = learner.features_and_output(x)
            ours = logits.argmax(1)
            right_teacher += int((theirs == y).sum())
            right += int((ours == y).sum())
            same += int((theirs == ours).sum())
            total += len(y)
            error.add(wanted, found)
    return {
        "top1_teacher": 100 * right_teacher / total,
        "top1": 100 * right / total,
        "agreement": same / total,
        "feature_error": round(error.squared / error.spread, 6),
        "test_images": total,
    }


def _reference(task: Task, seam: Seam, place: Place) -> Iterable[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Batches of test images, labels, the teacher's features at the seam and its answers."""
    return _held_reference(task, seam, place) if task.small else _fresh_reference(task, seam, place)


@lru_cache(maxsize=1)
def _held_reference(task: Task, seam: Seam, place: Place) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    return list(_fresh_reference(task, seam, place))


def _fresh_reference(task: Task, seam: Seam, place: Place) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    teacher = task.teacher.model
    with evaluating(teacher), capturing(teacher, seam) as lead:
        layout = quick_layout([teacher], torch.zeros(1, *task.teacher.preprocessing.input_size, device=place.device))
        for x, y in task.test():
            x, y = laid(x.to(place.device), layout), y.to(place.device)
            (wanted,), logits = lead.features_and_output(x)
            yield x, y, wanted, logits.argmax(1)


def _keep_memory() -> None:
    """Ask glibc to keep freed memory: handing maps back to the system after every step costs a tenth (measured)."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        pass  # another C library


def _give_back() -> None:
    """What was freed and kept before a method begins would hide as much of its peak."""
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _start_peak(device: str) -> int | None:
    """Forget the peak of the GPU's memory, or the process's; bytes in use now, None where the system does not tell."""
    _wait(device)
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    _give_back()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def _peak(device: str) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else _status("VmHWM")


def _status(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)
    except OSError:
        return None
