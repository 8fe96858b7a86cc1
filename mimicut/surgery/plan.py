"""A plan: which channels stay and which blocks go, as plain data. Decided here, applied by `cut`."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from mimicut.base.errors import PlanError
from mimicut.base.guard import named_tensors
from mimicut.base.paths import usable_path
from mimicut.base.schema import read_plain
from mimicut.surgery.budget import Budget
from mimicut.surgery.plan_check import KINDS, VERSION, check_plan, from_version_1
from mimicut.surgery.seam import Seam


@dataclass(frozen=True, kw_only=True)
class PlannedLatency:
    """What was measured while a plan was made for a latency.

    Args:
        setting: runtime, threads, batch, precision, its version and the processor, as `runtime.latency.Setting` has it.
        wanted_share: of the teacher's latency.
        teacher_ms, student_ms: median milliseconds of a forward pass.
        measured_share: student over teacher: median and quartiles.
        spread: teacher over itself: median and quartiles.
        tries: (blocks dropped, MACs, share) of each student that was measured.
    """

    setting: dict[str, Any]
    wanted_share: float
    teacher_ms: float
    student_ms: float
    measured_share: tuple[float, float, float]
    spread: tuple[float, float, float]
    tries: tuple[tuple[int, int, float], ...] = ()

    def to_json(self) -> dict[str, Any]:
        tries = [list(each) for each in self.tries]
        return {**vars(self), "measured_share": list(self.measured_share), "spread": list(self.spread), "tries": tries}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "PlannedLatency":
        names = [f.name for f in dataclasses.fields(cls)]
        found = {name: data[name] for name in names if name in data}
        found |= {name: tuple(found[name]) for name in ("measured_share", "spread") if name in found}
        return cls(**{**found, "tries": tuple(tuple(each) for each in found.get("tries", ()))})


@dataclass(frozen=True)
class Plan:
    """Everything needed to cut the same architecture again without tracing it.

    Args:
        teacher: class and tensors of the network it is for, and how to build it.
        seam: where the features are taken.
        widths: units that each group keeps; edit these (and `drop`) by hand, then run the plan again.
        keep: group -> the units that stay.
        slices: tensor -> axis -> positions that stay.
        edits: numbers in modules that follow the cut.
        drop: blocks (or modules) that are left out whole.
        macs: of the teacher and the student, for one image.
        notes: what the planner wants known.
        calls: numbers that the code of modules gives to torch functions and that do not follow by themselves.
        dropped_modules: [module, how] by which the blocks in `drop` are left out (`cut.without`).
        budget: what was asked for; None where no budget led here.
        scheme: the scheme that was taken: "mid" or "all".
        score: what ranked the channels: a name in SCORE_NAMES, or EVIDENCE.
        call: how the network takes its images (`preprocessing.handed`); None where they are all that it takes.
        latency: what was measured where the budget has a latency.
        images: hashes of the images that helped to make the plan.
        edited: whether widths or blocks were edited by hand.
        pruned_by: of a student that another tool pruned, how it is named.
    """

    teacher: dict[str, Any]
    seam: Seam
    widths: dict[str, int]
    keep: dict[str, list[int]]
    slices: dict[str, dict[int, list[int]]]
    edits: list[dict[str, Any]]
    drop: list[str] = field(default_factory=list)
    macs: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    dropped_modules: list[list[str]] = field(default_factory=list)
    budget: Budget | None = None
    scheme: str | None = None
    score: str | None = None
    call: dict[str, Any] | None = None
    latency: PlannedLatency | None = None
    images: list[str] = field(default_factory=list)
    edited: bool = False
    pruned_by: str | None = None
    version: int = VERSION

    def to_json(self) -> dict[str, Any]:
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        data["seam"] = self.seam.to_json()
        data["budget"] = self.budget and self.budget.to_json()
        data["latency"] = self.latency and self.latency.to_json()
        data["slices"] = {t: {str(d): i for d, i in dims.items()} for t, dims in self.slices.items()}
        return {key: data[key] for key in KINDS}

    @classmethod
    def from_json(cls, data: Any) -> "Plan":
        """Raises: PlanError naming the first field that is missing or of the wrong kind."""
        if isinstance(data, dict) and type(data.get("version")) is int and data["version"] == 1:
            data = from_version_1(data)
        check_plan(data)
        fields = {**data, "seam": Seam.from_json(data["seam"])}
        fields["slices"] = {t: {int(d): list(i) for d, i in dims.items()} for t, dims in data["slices"].items()}
        fields["budget"] = data["budget"] and Budget.from_json(data["budget"])
        fields["latency"] = data["latency"] and PlannedLatency.from_json(data["latency"])
        return cls(**fields)

    def dumps(self) -> str:
        """JSON text: one line for each group, tensor and edit, so that it can be read and edited."""
        parts = []
        for key, value in self.to_json().items():
            if isinstance(value, dict) and value:
                inner = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
                parts.append(f" {json.dumps(key)}: {{\n{inner}\n }}")
            elif isinstance(value, list) and value:
                inner = ",\n".join(f"  {json.dumps(v)}" for v in value)
                parts.append(f" {json.dumps(key)}: [\n{inner}\n ]")
            else:
                parts.append(f" {json.dumps(key)}: {json.dumps(value)}")
        return "{\n" + ",\n".join(parts) + "\n}\n"


def read_plan(path: str | Path) -> Plan:
    """The plan in a JSON file. Raises: PlanError naming the file and what is wrong in it."""
    try:
        with open(path, encoding="utf-8") as file:
            data = read_plain(file.read())
    except (OSError, ValueError) as error:
        raise PlanError(f"reading the plan {path}: {error}; expected the plan.json of a result folder") from error
    try:
        return Plan.from_json(data)
    except PlanError as error:
        raise PlanError(f"reading the plan {path}: {error}") from error


def check_plan_file(path: str | Path, *, force: bool = False) -> None:
    """Call it before long work. Raises: PlanError when a plan cannot be written to `path`."""
    path = usable_path(path, "writing the plan", PlanError)
    if path.is_dir() or (path.exists() and not force):
        raise PlanError(f"writing the plan {path}: it exists; name another file, or replace it with force (--force)")
    if not path.resolve().parent.is_dir():
        raise PlanError(f"writing the plan {path}: there is no folder {path.resolve().parent}")


def describe(teacher: nn.Module, source: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a plan remembers of its teacher: class, tensors by name, and `source`, how to build it again."""
    found = named_tensors(teacher)
    tensors = {n: f"{'x'.join(map(str, t.shape)) or 'scalar'} {str(t.dtype)[6:]}" for n, t in found.items()}
    return {"class": type(teacher).__qualname__, "source": source, "tensors": tensors}


def check_teacher(teacher: nn.Module, plan: Plan) -> None:
    """Raises: PlanError naming the first tensor in which `teacher` differs from the network that `plan` is for."""
    found, expected = describe(teacher)["tensors"], plan.teacher["tensors"]
    for name, what in expected.items():
        if found.get(name) != what:
            raise PlanError(
                f"applying a plan for {plan.teacher['class']} to {type(teacher).__qualname__}: {name} is "
                f"{found.get(name, 'missing')}, expected {what}; use the plan with the architecture it was made for"
            )
    extra = next((n for n in found if n not in expected), None)
    if extra is not None:
        raise PlanError(
            f"applying a plan for {plan.teacher['class']} to {type(teacher).__qualname__}: it has {extra} "
            f"({found[extra]}), which the plan does not know; use the plan with the architecture it was made for"
        )
