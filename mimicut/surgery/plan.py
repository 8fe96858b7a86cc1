"""A plan: which channels stay and which blocks go, as plain data. Decided here, applied by `cut`."""

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from mimicut.base.errors import PlanError
from mimicut.base.guard import named_tensors
from mimicut.surgery.seam import Seam

VERSION = 1
_HOW = re.compile(r"(through|zero)(:\d+)?")  # as modules.stand_in reads it


@dataclass(frozen=True)
class Plan:
    """Everything needed to cut the same architecture again without tracing it.

    widths: units that each group keeps; edit these (and `drop`) by hand, then run the plan again.
    drop: blocks (or modules) left out whole; gone: [module, how] by which they are (`cut.without`). keep: which units
    stay, per group. slices: tensor -> axis -> positions that stay. edits: numbers in modules that follow the cut.
    calls: numbers that the code of modules gives to torch functions and that do not follow by themselves
    (`modules.tell`). teacher: class and tensors of the network it is for, and how to build it. asked: the budget and
    options that led here. notes: what the planner wants known.
    """

    teacher: dict[str, Any]
    seam: Seam
    widths: dict[str, int]
    keep: dict[str, list[int]]
    slices: dict[str, dict[int, list[int]]]
    edits: list[dict[str, Any]]
    drop: list[str] = field(default_factory=list)
    asked: dict[str, Any] = field(default_factory=dict)
    macs: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    gone: list[list[str]] = field(default_factory=list)
    version: int = VERSION

    def to_json(self) -> dict[str, Any]:
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        data["seam"] = self.seam.to_json()
        data["slices"] = {t: {str(d): i for d, i in dims.items()} for t, dims in self.slices.items()}
        order = ["version", "asked", "macs", "widths", "drop", "notes", "seam", "keep", "edits", "calls"]
        order += ["gone", "slices", "teacher"]
        return {key: data[key] for key in order}

    @classmethod
    def from_json(cls, data: Any) -> "Plan":
        """Raises: PlanError naming the first field that is missing or of the wrong kind."""
        if isinstance(data, dict):  # plans of before there were any
            dropped = data.get("drop")
            data = {"calls": [], "gone": [[d, "through"] for d in dropped] if isinstance(dropped, list) else [], **data}
        _check(data)
        fields = {**data, "seam": Seam.from_json(data["seam"])}
        fields["slices"] = {t: {int(d): list(i) for d, i in dims.items()} for t, dims in data["slices"].items()}
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


def read_plan(path: Any) -> Plan:
    """The plan in a JSON file. Raises: PlanError naming the file and what is wrong in it."""
    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PlanError(f"reading the plan {path}: {error}; expected the plan.json of a result folder") from error
    try:
        return Plan.from_json(data)
    except PlanError as error:
        raise PlanError(f"reading the plan {path}: {error}") from error


def check_plan_file(path: Any, *, force: bool = False) -> None:
    """Call it before long work. Raises: PlanError when a plan cannot be written to `path`."""
    path = Path(path)
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


_KINDS: dict[str, type] = {
    "version": int, "asked": dict, "macs": dict, "widths": dict, "drop": list, "notes": list,
    "seam": dict, "keep": dict, "edits": list, "calls": list, "gone": list, "slices": dict, "teacher": dict,
}  # fmt: skip


def _check(data: Any) -> None:
    if not isinstance(data, dict):
        raise PlanError(f"found a {type(data).__name__}, expected an object with {', '.join(_KINDS)}")
    version = data.get("version")
    if _is_int(version) and version > VERSION:  # first: its fields may be other ones
        raise PlanError(
            f"the plan has version {version}, this release reads version {VERSION}: it was made by a newer release; "
            "update mimicut (pip install --upgrade mimicut)"
        )
    faults = [f"{k} is missing" for k in _KINDS if k not in data]
    faults += [f"{k} is unknown" for k in data if k not in _KINDS]
    faults += [
        f"{k} is {_short(data[k])}, expected {kind.__name__}"
        for k, kind in _KINDS.items()
        if k in data and (not isinstance(data[k], kind) or isinstance(data[k], bool))
    ]
    if not faults and data["version"] != VERSION:
        faults.append(f"version is {data['version']}, this release reads version {VERSION}")
    if not faults:
        faults += _contents(data)
    if faults:
        raise PlanError("; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else ""))


def _contents(data: dict[str, Any]) -> list[str]:
    faults = [
        f"widths[{g!r}] is {_short(w)}, expected a number of channel units of 1 or more"
        for g, w in data["widths"].items()
        if not _is_int(w) or w < 1
    ]
    faults += [f"drop holds {_short(d)}, expected names of modules" for d in data["drop"] if not isinstance(d, str)]
    faults += [f"keep[{g!r}] is {_short(u)}, expected a list of units" for g, u in data["keep"].items() if not _ints(u)]
    for tensor, dims in data["slices"].items():
        if not isinstance(dims, dict) or not all(str(d).isdigit() and _ints(i) and i for d, i in dims.items()):
            faults.append(f"slices[{tensor!r}] is {_short(dims)}, expected axis -> positions")
    for edit in data["edits"]:
        keys = {"module", "attribute", "index", "from", "to"}
        if not isinstance(edit, dict) or set(edit) != keys or not (_is_int(edit["from"]) and _is_int(edit["to"])):
            faults.append(f"edits holds {_short(edit)}, expected {', '.join(sorted(keys))}")
        elif not all(isinstance(edit[k], str) for k in ("module", "attribute")):
            faults.append(f"edits holds {_short(edit)}, expected names of a module and an attribute")
    for call in data["calls"]:
        if not isinstance(call, dict) or set(call) != _CALL or not all(map(_fits, call.items())):
            faults.append(f"calls holds {_short(call)}, expected {', '.join(sorted(_CALL))}: names, places and numbers")
    faults += [f"gone holds {_short(g)}, expected [module, through or zero]" for g in data["gone"] if not _gone(g)]
    faults += _plain(data)
    if not isinstance(data["teacher"].get("tensors"), dict) or not isinstance(data["teacher"].get("class"), str):
        faults.append("teacher lacks its class or its tensors")
    try:
        Seam.from_json(data["seam"])
    except Exception as error:
        faults.append(f"seam cannot be read ({error!r})")
    return faults


_CALL = {"module", "function", "index", "place", "from", "to"}


def _fits(entry: tuple[str, Any]) -> bool:
    key, value = entry
    if key in ("module", "function"):
        return isinstance(value, str)
    return _is_int(value) or (key in ("from", "to") and isinstance(value, float))


def _gone(each: Any) -> bool:
    return (
        isinstance(each, list) and len(each) == 2 and all(isinstance(v, str) for v in each) and _HOW.fullmatch(each[1])
    )


def _plain(data: dict[str, Any]) -> list[str]:
    """Faults in what was asked, the MACs, the seam's points and the teacher's source."""
    asked, faults = data["asked"], []
    for name, kinds in (("keep", (int, float)), ("keep_width", (int, float)), ("seed", int), ("score", str)):
        value = asked.get(name)
        if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
            faults.append(f"asked[{name!r}] is {_short(value)}, expected {'text' if kinds is str else 'a number'}")
    call = asked.get("call")
    if call is not None and not (isinstance(call, dict) and {"keyword", "options"} <= set(call)):
        faults.append(f"asked['call'] is {_short(call)}, expected an object with keyword and options")
    faults += [
        f"macs[{k!r}] is {_short(v)}, expected a whole number" for k, v in data["macs"].items() if not _is_int(v)
    ]
    if not data["seam"].get("points"):
        faults.append("seam has no points")
    source = data["teacher"].get("source")
    if not isinstance(source, (dict, type(None))):
        faults.append(f"teacher's source is {_short(source)}, expected an object or null")
    elif source and "result" in source:
        result = source["result"]
        if not isinstance(result, dict) or not (isinstance(result.get("images"), list) and "plan" in result):
            faults.append(f"teacher's source has the result {_short(result)}, expected an object with plan and images")
    if set(data["keep"]) - set(data["widths"]):
        faults.append(f"widths lacks {sorted(set(data['keep']) - set(data['widths']))[0]!r}, which keep lists")
    return faults


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _ints(value: Any) -> bool:
    return isinstance(value, list) and all(_is_int(v) and v >= 0 for v in value)


def _short(value: Any) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."
