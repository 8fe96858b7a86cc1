"""The plain data of a plan: which fields it has, what may be in them, and plans of earlier releases."""

import json
import re
from dataclasses import fields
from keyword import iskeyword
from typing import Any, NotRequired

from typing_extensions import TypedDict

from mimicut.base.errors import PlanError
from mimicut.base.schema import faults as type_faults
from mimicut.surgery.budget import SCORE_NAMES, SIZES, Budget, Latency
from mimicut.surgery.seam import Seam
from mimicut.surgery.sizes import GEOMETRIC, HOW, may_correct

VERSION = 2  # 1 until release 0.1, which is read too
EVIDENCE = "evidence"  # the score of a plan whose channels the images ranked
_AXIS = re.compile(r"[0-9]{1,2}")
_NONE = type(None)
# Field -> the types that it may have, in the order of the file.
KINDS: dict[str, tuple[type, ...]] = {
    "version": (int,), "budget": (dict, _NONE), "scheme": (str, _NONE), "score": (str, _NONE), "latency": (dict, _NONE),
    "macs": (dict,), "widths": (dict,), "drop": (list,), "notes": (list,), "edited": (bool,), "seam": (dict,),
    "call": (dict, _NONE), "keep": (dict,), "edits": (list,), "calls": (list,), "dropped_modules": (list,),
    "slices": (dict,), "images": (list,), "pruned_by": (str, _NONE), "teacher": (dict,),
}  # fmt: skip


class _Call(TypedDict):
    """How a network takes its images (`preprocessing.model_inputs`, `InputSource.call`)."""

    keyword: str | None
    options: dict[str, Any]
    inputs: NotRequired[list[tuple[str | None, list[int], str]]]


class _Options(TypedDict, total=False):
    num_classes: int
    in_chans: int
    model_kwargs: dict[str, Any] | None
    norm_eps: float | None


class _Result(TypedDict):
    plan: dict[str, Any]
    images: list[str]
    weights_sha256: NotRequired[str | None]


class _Source(TypedDict, total=False):
    """How a teacher is built again (`Teacher.to_json`)."""

    spec: str
    options: _Options | None
    preprocessing: dict[str, Any] | None
    views: str | None
    part: str
    folded: bool
    result: _Result


_Teacher = TypedDict("_Teacher", {"class": str, "tensors": dict[str, str], "source": NotRequired[_Source | None]})


class _Latency(TypedDict):
    """As `PlannedLatency`."""

    setting: dict[str, Any]
    wanted_share: float
    teacher_ms: float
    student_ms: float
    measured_share: tuple[float, float, float]
    spread: tuple[float, float, float]
    tries: NotRequired[list[tuple[int, int, float]]]


# What is in fields that are objects or lists of text.
_TYPES = {
    "seam": Seam, "teacher": _Teacher, "call": _Call | None, "latency": _Latency | None, "notes": list[str],
    "images": list[str],
}  # fmt: skip
_WORDS = {int: "a whole number", dict: "an object", str: "text", list: "a list", bool: "true or false", _NONE: "null"}


def from_version_1(data: dict[str, Any]) -> dict[str, Any]:
    """A plan as release 0.1 wrote it, whose `asked` held budget, call, latency and images."""
    dropped = data.get("drop")
    before = {"calls": [], "gone": [[d, "through"] for d in dropped] if isinstance(dropped, list) else [], **data}
    asked = before.pop("asked", None)
    if not isinstance(asked, dict):
        raise PlanError(f"asked is {_short(asked)}, expected an object")
    faults = _asked_faults(asked)
    if faults:
        raise PlanError("; ".join(faults))
    names = {f.name for f in fields(Budget)}
    values = {n: v for n, v in asked.items() if n in names and n not in ("latency", "score") and v is not None}
    score = EVIDENCE if asked.get("score") == "reconstruction" else asked.get("score")
    measured = asked.get("latency")
    if measured:
        where = {n: v for n, v in measured["setting"].items() if n in ("runtime", "threads", "batch")}
        values["latency"] = Latency(share=measured.get("share"), ms=measured.get("ms"), **where)
    if score in SCORE_NAMES:
        values["score"] = score
    if dropped and isinstance(dropped, list) and not any(n in values for n in (*SIZES, "keep_width", "latency")):
        values["drop"] = dropped
    asks = any(n in values for n in (*SIZES, "keep_width", "latency", "drop"))
    return {
        **{name: value for name, value in before.items() if name != "gone"},
        "version": VERSION,
        "dropped_modules": before["gone"],
        "budget": Budget(**values).to_json() if asks else None,
        "scheme": asked.get("scheme"),
        "score": score,
        "call": asked.get("call"),
        "latency": measured,
        "images": asked.get("images") or [],
        "edited": bool(asked.get("edited")),
        "pruned_by": asked.get("pruned"),
    }


def check_plan(data: Any) -> None:
    """Raises: PlanError naming what is missing, unknown or of the wrong kind."""
    if isinstance(data, dict) and _is_int(data.get("version")) and data["version"] > VERSION:
        raise PlanError(
            f"the plan has version {data['version']}, this release reads versions 1 to {VERSION}: it was made by a "
            "newer release; update mimicut (pip install --upgrade mimicut)"
        )
    if not isinstance(data, dict):
        raise PlanError(f"found a {type(data).__name__}, expected an object with {', '.join(KINDS)}")
    faults = [f"{k} is missing" for k in KINDS if k not in data]
    faults += [f"{k} is unknown" for k in data if k not in KINDS]
    faults += [
        f"{k} is {_short(data[k])}, expected {' or '.join(_WORDS[kind] for kind in kinds)}"
        for k, kinds in KINDS.items()
        if k in data and type(data[k]) not in kinds
    ]
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
        if not isinstance(dims, dict) or not all(_AXIS.fullmatch(d) and _ints(i) and i for d, i in dims.items()):
            faults.append(f"slices[{tensor!r}] is {_short(dims)}, expected axis -> positions")
    for edit in data["edits"]:
        keys = {"module", "attribute", "index", "from", "to"}
        if not isinstance(edit, dict) or set(edit) != keys or not (_is_int(edit["from"]) and _is_int(edit["to"])):
            faults.append(f"edits holds {_short(edit)}, expected {', '.join(sorted(keys))}")
        elif not all(isinstance(edit[k], str) for k in ("module", "attribute")):
            faults.append(f"edits holds {_short(edit)}, expected names of a module and an attribute")
        elif edit["attribute"] in GEOMETRIC or not 0 <= edit["to"] < edit["from"]:
            faults.append(f"edits holds {_short(edit)}, expected a size that the cut makes smaller")
    for call in data["calls"]:
        if not isinstance(call, dict) or set(call) != _CALL or not all(map(_fits, call.items())):
            names = ", ".join(sorted(_CALL))
            faults.append(f"calls holds {_short(call)}, expected {names}: names, places and numbers")
        elif not may_correct(call):
            faults.append(f"calls holds {_short(call)}, expected numbers that count channels")
    faults += [
        f"dropped_modules holds {_short(g)}, expected [module, through, zero, or one of them with :N up to 99]"
        for g in data["dropped_modules"]
        if not _is_dropped(g)
    ]
    if data["dropped_modules"] and not data["drop"]:
        faults.append("dropped_modules holds modules, expected none where drop has no block")
    faults += _plain(data)
    return faults


_CALL = {"module", "function", "index", "place", "from", "to"}


def _fits(entry: tuple[str, Any]) -> bool:
    key, value = entry
    if key in ("module", "function"):
        return isinstance(value, str)
    return _is_int(value) or (key in ("from", "to") and isinstance(value, float))


def _is_dropped(each: Any) -> bool:
    if not (isinstance(each, list) and len(each) == 2 and all(isinstance(v, str) for v in each)):
        return False
    return HOW.fullmatch(each[1]) is not None


def _plain(data: dict[str, Any]) -> list[str]:
    """Faults in the budget, the call, the MACs, the seam's points and the teacher's source."""
    faults = []
    if data["budget"] is not None:
        try:
            Budget.from_json(data["budget"])
        except (PlanError, TypeError) as error:
            faults.append(f"budget cannot be read ({error})")
    for name, kind in _TYPES.items():
        faults += [f"{name}: {each}" for each in type_faults(data[name], kind)]
    if not faults:
        try:
            Seam.from_json(data["seam"])
        except TypeError as error:
            faults.append(f"seam cannot be read ({error})")
    faults += _call_faults(data["call"], "call")
    faults += [
        f"macs[{k!r}] is {_short(v)}, expected a whole number" for k, v in data["macs"].items() if not _is_int(v)
    ]
    if not data["seam"].get("points"):
        faults.append("seam has no points")
    if set(data["keep"]) - set(data["widths"]):
        faults.append(f"widths lacks {sorted(set(data['keep']) - set(data['widths']))[0]!r}, which keep lists")
    return faults


def _asked_faults(asked: dict[str, Any]) -> list[str]:
    """Faults in what a plan of version 1 was asked."""
    faults = []
    for name, kinds in (("keep", (int, float)), ("keep_width", (int, float)), ("seed", int), ("score", str)):
        value = asked.get(name)
        if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
            faults.append(f"asked[{name!r}] is {_short(value)}, expected {'text' if kinds is str else 'a number'}")
    if asked.get("latency"):
        faults += [f"asked['latency']: {each}" for each in type_faults(asked["latency"], _Latency)]
    faults += _call_faults(asked.get("call"), "asked['call']")
    return faults


def _call_faults(call: Any, name: str) -> list[str]:
    if call is None:
        return []
    if not isinstance(call, dict) or not {"keyword", "options"} <= set(call):
        return [f"{name} is {_short(call)}, expected an object with keyword and options"]
    wrong = [f"{name}: {each}" for each in type_faults(call, _Call)]
    if wrong:
        return wrong
    inputs = call.get("inputs", [])
    words = [call["keyword"], *call["options"], *(word for word, *_ in inputs), *(kind for *_, kind in inputs)]
    return [
        f"{name} has {_short(word)}, expected the name of an argument or of a type"
        for word in words
        if word is not None and (not word.isidentifier() or iskeyword(word))
    ]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _ints(value: Any) -> bool:
    return isinstance(value, list) and all(_is_int(v) and v >= 0 for v in value)


def _short(value: Any) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."
