"""One model of the zoo, from its builder to a network that was cut, mimicked, saved, loaded again and exported.

Run in a process of its own: `python -m benchmarks.zoo.case SPEC` prints the line that stands before the export, which
may end the process, and last the whole one.
"""

import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

KEEP = 0.7
SEED = 0
# With random statistics its batch norms keep nothing within bounds, and attention over features in the hundreds
# magnifies rounding until no two runtimes agree: its features differ by 5 % between float32 and float64.
EXPLODING = {"open_clip:MobileCLIP-S1"}
STAGES = ("build", "trace", "plan", "cut", "mimic", "save", "reload", "export")


def run(spec: str, before_export: Callable[[dict[str, Any]], None] = lambda line: None) -> dict[str, Any]:
    """Outcome of every stage. outcome: "done", "unsupported" (a documented refusal), "unreachable" (the budget), or
    "failed"; stage, error: where it ended. keep: share of the MACs that was reached. macs_share_pinned: of those of
    which not one channel can be cut. seconds, cpu_seconds (of its subprocess too): of each stage; "all" leaves export
    out. peak_memory_mib: resident; peak_memory_mib_before_export. export: format -> error as a share of the largest
    output; None where the uncut teacher cannot be exported either: export_why. export_static: why the exported batch
    is fixed. before_export: is given the line as it stands then."""
    from mimicut.base.errors import PlanError, UnsupportedModel

    line: dict[str, Any] = {"model": spec, "outcome": "done", "seconds": {}, "cpu_seconds": {}}
    try:
        _run(spec, line, before_export)
    except UnsupportedModel as error:
        line |= {"outcome": "unsupported", "error": str(error)}
    except PlanError as error:
        line |= {"outcome": "unreachable", "error": str(error)}
    except Exception as error:
        line |= {"outcome": "failed", "error": f"{type(error).__name__}: {error}"[:600]}
    _sum_up(line)
    return line


def _sum_up(line: dict[str, Any]) -> None:
    for clock in ("seconds", "cpu_seconds"):
        line[clock]["all"] = round(sum(s for name, s in line[clock].items() if name not in ("export", "all")), 2)
    line["peak_memory_mib"] = peak_memory_mib()


def _run(spec: str, line: dict[str, Any], before_export: Callable[[dict[str, Any]], None]) -> None:
    teacher, result, few = _compressed(spec, line)
    gc.collect()
    line["peak_memory_mib_before_export"] = peak_memory_mib()
    _sum_up(line)
    before_export(line)
    with _stage(line, "export"):
        _export(teacher, result, few, line)


@contextmanager
def _stage(line: dict[str, Any], name: str) -> Iterator[None]:
    line["stage"], started, cpu = name, time.perf_counter(), sum(os.times()[:4])
    try:
        yield
    finally:
        line["seconds"][name] = round(time.perf_counter() - started, 2)
        line["cpu_seconds"][name] = round(sum(os.times()[:4]) - cpu, 2)


def peak_memory_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def _export(teacher: Any, result: Any, few: Any, line: dict[str, Any]) -> None:
    """Only where the cut network cannot be exported is the teacher tried: what it cannot either is not the cut's."""
    from mimicut.base.errors import MimicutError
    from mimicut.runtime.edge_formats import EDGE
    from mimicut.runtime.export import FILES, export

    formats = [f for f in FILES if f != "int8" and f not in EDGE]
    with tempfile.TemporaryDirectory() as scratch:
        try:
            found = export(result, few, scratch, formats=formats)
        except MimicutError as error:
            try:
                export(teacher, few, scratch, formats=formats)
            except MimicutError as same:
                line |= {"export": None, "export_why": f"the teacher itself cannot be exported: {same}"[:600]}
                return
            raise RuntimeError(str(error)) from error  # a failure, not a refusal
    line["export"] = found.errors
    if found.static:
        line["export_static"] = found.static[:600]


def _compressed(spec: str, line: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The teacher, the result and the few images, after every stage but the last."""
    import torch

    from benchmarks.zoo.models import builder, load
    from mimicut.anatomy.cost import count, count_traced
    from mimicut.anatomy.find_seam import trace
    from mimicut.planning.planner import make_plan
    from mimicut.proof.laws import check_budget, check_cut
    from mimicut.proof.randomised import randomised
    from mimicut.recovery.config import MimicConfig
    from mimicut.recovery.mimic import mimic
    from mimicut.results.report import Report
    from mimicut.results.store import save
    from mimicut.surgery.cut import cut
    from mimicut.surgery.head import put_under_head
    from mimicut.surgery.seam import tensors
    from mimicut.workflow.inspection import facts

    stage = partial(_stage, line)
    with stage("build"):
        teacher = load(spec)
        size = teacher.preprocessing.input_size
        few = torch.randn(2, *size, generator=torch.Generator().manual_seed(SEED))
        model = randomised(teacher.model)
        if spec in EXPLODING:
            _normalise(model, few)
        line |= {"input": list(size), "params": sum(p.numel() for p in model.parameters())}
    with stage("trace"):
        anatomy = trace(model, torch.zeros(2, *size))
    known = facts(model, anatomy)
    line |= {
        "seam": known["seam"], "macs": known["macs"], "unread": known["unread"], "pinned": known["pinned"],
        "groups": len(known["groups"]), "macs_share_pinned": known["macs_share_pinned"],
        "smallest_keep": known["smallest_keep"],
    }  # fmt: skip
    with stage("plan"):
        plan = make_plan(model, anatomy, keep=KEEP, score="random", source=teacher.to_json())
    with stage("cut"):
        student = cut(model, plan)
        line["law"] = check_cut(anatomy, plan, model, student)
        before, after = count_traced(anatomy.traced), count(student, anatomy.traced.example)
        check_budget(plan, before, after)
        line["keep"] = round(after.macs / before.macs, 4)
    with stage("mimic"):
        # Random weights of a network without norms have features of any size: at a usual lr one step overflows.
        mimic(model, student, plan.seam, few, MimicConfig(steps=1, views="none", lr=1e-9))
    with tempfile.TemporaryDirectory() as scratch:
        with stage("save"):
            result = put_under_head(model, student, plan.seam)
            with torch.no_grad():
                wanted = [t for _, t in tensors(result(few))]
            if not all(t.isfinite().all() for t in wanted):
                raise RuntimeError("after the step of mimicking its output is not finite")
            torch.save(wanted, Path(scratch, "wanted.pt"))
            torch.save(few, Path(scratch, "few.pt"))
            report = Report(params_teacher=before.params, params_student=after.params)
            folder = save(Path(scratch, "result"), model=teacher.completed(result), plan=plan, report=report)
        with stage("reload"):
            again = subprocess.run(
                [
                    sys.executable, "-c", _RELOAD, str(folder), scratch, str(torch.get_num_threads()), teacher.part,
                    builder(spec),
                ],
                capture_output=True,
                text=True,
                check=False,
            )  # fmt: skip
            if again.returncode:
                raise RuntimeError(f"loading it again in a fresh process: {again.stderr.strip()[-400:]}")
    return model, result, few


def _normalise(model: Any, images: Any) -> None:
    """Give the batch norms of `model` the statistics of the images, in place."""
    import torch
    from torch import nn

    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    with torch.no_grad():
        model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum


_RELOAD = """
import sys, torch, mimicut
from mimicut.surgery.seam import tensors
folder, scratch, threads, part, builder = sys.argv[1:]
torch.set_num_threads(int(threads))  # how a sum is shared among threads shows in its last bits
model = mimicut.load(folder, build_teacher=builder or None).get_submodule(part)
with torch.no_grad():
    found = [t for _, t in tensors(model(torch.load(f"{scratch}/few.pt")))]
wanted = torch.load(f"{scratch}/wanted.pt")
assert len(found) == len(wanted) and all(map(torch.equal, found, wanted)), "its output is not bit-equal"
"""


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(run(sys.argv[1], lambda line: print(json.dumps(line), flush=True))))
