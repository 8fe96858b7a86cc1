"""A result as a folder: plan.json, weights.safetensors, report.json, and for people report.html and README.md.

Complete or not there; nothing is pickled.

Loading builds the named architecture without pretrained weights, replays the plan's resolved slices and fills in the
saved tensors: nothing is traced, and no code in the folder is run. Where the teacher was itself a result, its plan lies
in the new one, and is replayed before it: the first folder is not needed.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mimicut.base import guard
from mimicut.base.errors import PlanError, StoreError, one_line
from mimicut.recovery.checkpoint import Checkpoint
from mimicut.results.report import Report

if TYPE_CHECKING:
    from mimicut.surgery.plan import Plan

PLAN, WEIGHTS, REPORT = FILES = ("plan.json", "weights.safetensors", "report.json")
# What may lie beside them, and goes with them where a result is replaced.
PAGES = ("report.html", "README.md")
BESIDE = (*PAGES, "model.pt2", "model.onnx", "model.onnx.data", "model.xml", "model.bin", "model.int8.onnx",
          "model.int8.onnx.data", "preprocessing.json")  # fmt: skip
SCRATCH = ".export"  # begins the name of a folder inside that is being filled
_STORED, _STOPPED = "stored", "stopped"
_TITLES = ("Student of ", "Understudy of ")  # of the pages; the second one until release 0.1
# Keys of what a weights file says of itself; the second one until release 0.1, when the project had another name.
_NAMES = ("mimicut", "understudy")


def check_writable(folder: str | Path, *, force: bool = False) -> Path:
    """The resolved folder, when `save` could write it; call it before long work. Nothing stays behind.

    An existing folder needs `force`, and must then be a result: its report and nothing but the files of one.

    Raises: StoreError saying what stands in the way.
    """
    path = Path(folder).resolve()
    _settle(path)
    if path.exists():
        _check_replaceable(path, force)
    parent = next(p for p in path.parents if p.exists())
    probe = parent / f".{path.name}.{secrets.token_hex(4)}.probe"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise StoreError(
            f"saving to {path}: cannot write in {parent} ({error.strerror}); name another folder"
        ) from error
    return path


def save(
    folder: str | Path,
    *,
    model: nn.Module,
    plan: "Plan",
    report: Report,
    extra: dict[str, Any] | None = None,
    force: bool = False,
) -> Path:
    """Write the three files and return the folder. `extra` is plain data kept beside the report (`read` returns it).

    The files are written to a hidden sibling, which then takes the folder's place by renaming; on an exception an old
    folder is whole and the sibling gone. Killed between two renames, the old one is a hidden sibling that `load` finds.

    Raises: StoreError when the folder cannot be written or replaced, or the model holds what no file can.
    """

    def fill(fresh: Path) -> None:
        _write_weights(fresh / WEIGHTS, model)
        _write_json(fresh / PLAN, plan.to_json(), plan.dumps())
        stored = {"weights_sha256": _sha256(fresh / WEIGHTS), "extra": extra or {}}
        _write_json(fresh / REPORT, report.to_json() | {_STORED: stored})
        _write_page(fresh, report, plan)

    return _filled(folder, fill, force)[0]


def save_programs(
    folder: str | Path, *, write: Callable[[Path], Report], plan: "Plan", force: bool = False
) -> tuple[Path, Report]:
    """A result that is exported files and a report, of a student whose code is not ours to build again.

    write: puts the files into the folder that it is given, and returns the report. plan: for its pages; it is not kept.
    As `save`: complete or not there. Raises: as `save`, and whatever `write` does.
    """

    def fill(fresh: Path) -> Report:
        report = write(fresh)
        _write_json(fresh / REPORT, report.to_json() | {_STORED: {"extra": {}}})
        _write_page(fresh, report, plan)
        return report

    return _filled(folder, fill, force)


def _filled(folder: str | Path, fill: Callable[[Path], Any], force: bool) -> tuple[Path, Any]:
    """The folder, and what `fill` returned."""
    path = check_writable(folder, force=force)
    fresh = path.parent / f".{path.name}.{secrets.token_hex(4)}.saving"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.mkdir()
        filled = fill(fresh)
        _swap(fresh, path)
    except OSError as error:
        raise StoreError(f"saving to {path}: {error}; nothing was changed there") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return path, filled


def _write_page(folder: Path, report: Report, plan: "Plan") -> None:
    for name, text in _pages(folder, report, plan).items():
        (folder / name).write_text(text, encoding="utf-8")


def _pages(folder: Path, report: Report, plan: "Plan") -> dict[str, str]:
    """name -> text; a page of that name that was not made here stays."""
    from mimicut.results.page import page
    from mimicut.results.readme import readme

    made = zip(PAGES, (page, readme), strict=True)
    return {name: make(report, plan) for name, make in made if _ours(folder / name)}


def _ours(path: Path) -> bool:
    """Is a page that is there one that was made here, or is there none?"""
    try:
        text = path.read_text(encoding="utf-8")[:1000]
        return any(title in text for title in _TITLES)
    except FileNotFoundError:
        return True
    except (OSError, UnicodeDecodeError):
        return False


def put_report(folder: str | Path, report: Report) -> None:
    """Replace the report of a result, and its page; all else stays. Raises: StoreError; the old one is then whole."""
    path = _existing(folder)
    stored = _read_json(path / REPORT).get(_STORED, {})
    mark = f".{secrets.token_hex(4)}.saving"
    pages = _pages(path, report, read(folder)[0])
    fresh = {name: path / f".{name}{mark}" for name in (*pages, REPORT)}
    try:
        for name, text in pages.items():
            fresh[name].write_text(text, encoding="utf-8")
        _write_json(fresh[REPORT], report.to_json() | {_STORED: stored})
        for name, new in fresh.items():
            os.replace(new, path / name)
    except OSError as error:
        raise StoreError(f"saving {path / REPORT}: {error}") from error
    finally:
        for new in fresh.values():
            new.unlink(missing_ok=True)


def stopped_path(folder: str | Path) -> Path:
    """The file beside a result folder that tells of a run that was stopped."""
    path = Path(folder).resolve()
    return path.with_name(path.name + ".stopped.safetensors")


def write_stopped(folder: str | Path, checkpoint: Checkpoint) -> Path:
    """Raises: StoreError; an older file is then whole."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = stopped_path(folder)
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}.saving")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}
        save_file(tensors, fresh, metadata={_STOPPED: json.dumps(checkpoint.data)})
        with fresh.open("rb") as file:
            os.fsync(file.fileno())
        fresh.replace(path)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"saving {path}: {error}; nothing was changed there") from error
    finally:
        fresh.unlink(missing_ok=True)
    return path


def read_stopped(folder: str | Path) -> Checkpoint | None:
    """None where there is no such file. Raises: StoreError where it cannot be read."""
    from safetensors import SafetensorError, safe_open

    path = stopped_path(folder)
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            data = json.loads((file.metadata() or {})[_STOPPED])
            for key in ("asked", "plan", "saved", "before", "losses", "steps"):
                data[key]
            return Checkpoint({name: file.get_tensor(name) for name in file.keys()}, data)  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise StoreError(
            f"going on with {path}: {one_line(error)}; it is no file of a stopped run: remove it and start anew"
        ) from error


def digest(folder: str | Path) -> str | None:
    """Of the weights that a result folder was saved with; None where there is no such folder."""
    try:
        return _read_json(Path(folder) / REPORT)[_STORED]["weights_sha256"]
    except (StoreError, OSError, KeyError):
        return None


def drop_stopped(folder: str | Path) -> None:
    stopped_path(folder).unlink(missing_ok=True)


def read(folder: str | Path) -> tuple["Plan", Report, dict[str, Any]]:
    """Plan, report and the extra data of a result; no weights are read.

    Raises: StoreError when a file is missing or unreadable; PlanError when the plan is nonsense.
    """
    from mimicut.surgery.plan import Plan

    path = _existing(folder)
    try:
        plan = Plan.from_json(_read_json(path / PLAN))
    except PlanError as error:
        raise PlanError(f"reading {path / PLAN}: {error}") from error
    data = _read_json(path / REPORT)
    stored = data.pop(_STORED, {})
    return plan, Report.from_json(data), stored.get("extra", {})


def load(
    folder: str | Path,
    build_teacher: str | Callable[[], nn.Module] | None = None,
    *,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """The saved model, bit-equal, in eval mode on `device`.

    `build_teacher` is a function that returns the teacher's architecture (any weights), or names one ("file.py:build").
    It is needed unless the teacher was named `timm:...`, `torchvision:...`, `hf:...` or `demo:...`: code that a folder
    names is never run. Of a teacher that was compressed in part the whole is returned. The caller's random state is
    untouched.

    Raises: StoreError when the folder is not a whole result, or its weights do not fit: the first difference is named;
    PlanError when the plan is nonsense or the teacher built is another; InputError when build_teacher is needed.
    """
    plan, _, _ = read(folder)
    path = _existing(folder)
    weights, shared = _read_weights(path)
    with guard.seeded(0):
        model = _built(plan, build_teacher)
    _fill(model, weights, shared, path / WEIGHTS)
    return model.eval().to(device)


def is_result(folder: str | Path) -> bool:
    """Whether `folder` is a result, or would be one, had a run or a save not been stopped."""
    path = Path(folder).resolve()
    return (path / PLAN).is_file() or _previous(path).is_dir() or stopped_path(path).exists()


def as_teacher(
    folder: str | Path, build_teacher: str | Callable[[], nn.Module] | None = None
) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """A result that is to be a teacher: the model as `load` gives it, the source of its own teacher, and two fields of
    a `teachers.Teacher`. `call`; and `result`: its plan, by which `load` builds it again without `folder`, the digest
    of its weights, and the hashes of all images that it, or a teacher of its own, was fitted to.

    Raises: as `load`; StoreError also for the result of a run that was stopped and can go on.
    """
    path = Path(folder).resolve()
    stood = read_stopped(path)
    if stood is not None and (not path.exists() or stood.data["saved"] == digest(path)):
        raise StoreError(
            f"loading {path} as a teacher: the run that makes it was stopped; go on with it first (--resume), or take "
            f"the result as it is by removing {stopped_path(path).name}"
        )
    plan, report, _ = read(folder)
    source = plan.teacher.get("source") or {}
    learnt = [source.get("result", {}).get("images", []), *(report.image_hashes.get(p, []) for p in ("fit", "choose"))]
    result = {
        "plan": plan.to_json(),
        "weights_sha256": digest(_existing(folder)),
        "images": list(dict.fromkeys(one for some in learnt for one in some)),
    }
    return load(folder, build_teacher), source, {"call": plan.call, "result": result}


def _built(plan: "Plan", build_teacher: str | Callable[[], nn.Module] | None) -> nn.Module:
    """The whole network that `plan` leaves, without its weights."""
    from mimicut.inputs.teacher import build_architecture, part_of, put_part
    from mimicut.surgery.cut import cut
    from mimicut.surgery.plan import Plan

    source = plan.teacher.get("source") or {"spec": "module"}
    part = str(source.get("part", ""))
    if "result" not in source:
        whole = build_architecture(source, build_teacher)
    else:
        try:
            earlier = Plan.from_json(source["result"]["plan"])
        except PlanError as error:
            raise PlanError(f"reading the plan of the teacher {source.get('spec')}: {error}") from error
        whole = _built(earlier, build_teacher)
        _resize(part_of(whole, part), plan)
    return put_part(whole, part, cut(part_of(whole, part), plan))


def _resize(model: nn.Module, plan: "Plan") -> None:
    """Give the buffers that state dicts leave out the shapes that they had when `plan` was made, see `_fill`."""
    for name in set(dict(model.named_buffers())) - set(model.state_dict()):
        said = re.fullmatch(r"(scalar|\d+(?:x\d+)*) \w+", plan.teacher["tensors"].get(name, ""))
        if said is not None:
            shape = [] if said[1] == "scalar" else [int(n) for n in said[1].split("x")]
            held = model.get_buffer(name)
            if list(held.shape) != shape:
                _put(model, name, held.new_zeros(shape))


def _put(model: nn.Module, name: str, buffer: Tensor) -> None:
    owner, _, key = name.rpartition(".")
    setattr(model.get_submodule(owner), key, buffer)


def _fill(model: nn.Module, weights: dict[str, Tensor], shared: dict[str, str], path: Path) -> None:
    """Copy every saved tensor into `model`; names, shapes and dtypes must agree. A buffer that state dicts leave
    out may have another shape: some networks make it anew when they first see an image."""
    from mimicut.base.guard import same_bits

    targets = guard.named_tensors(model)
    weights = weights | {alias: weights[name] for alias, name in shared.items() if name in weights}
    for name in set(dict(model.named_buffers())) - set(model.state_dict()):
        if name in weights and weights[name].shape != targets[name].shape:
            _put(model, name, weights[name])
            targets[name] = weights[name]
    for name in [*targets, *weights]:
        target, value = targets.get(name), weights.get(name)
        if target is None or value is None or (target.shape, target.dtype) != (value.shape, value.dtype):
            raise StoreError(
                f"loading {path}: the first difference is {name!r}: the model has {_kind(target)}, the file "
                f"{_kind(value)}; plan.json and weights.safetensors must come from one result"
            )
        # Expanded tensors cannot be written to, and need not be: they come right out of the constructor.
        if not same_bits(target, value):
            with torch.no_grad():
                target.copy_(value)


def _kind(tensor: Tensor | None) -> str:
    return "none" if tensor is None else f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _write_weights(path: Path, model: nn.Module) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    states = [key for key, value in model.state_dict().items() if not isinstance(value, Tensor)]
    if states:
        raise StoreError(
            f"saving {path.name}: {states[0]!r} is not a tensor; only tensors can be stored without pickle"
        )
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    seen: dict[tuple, str] = {}
    for name, tensor in guard.named_tensors(model).items():
        if tensor.device.type == "meta" or tensor.layout != torch.strided:
            raise StoreError(
                f"saving {path.name}: {name!r} is on {tensor.device} as {tensor.layout}; expected plain data"
            )
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and key in seen:
            shared[name] = seen[key]
            continue
        seen[key] = name
        tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    try:
        # One entry: the order of several is not fixed, and the same model should give the same bytes.
        save_file(tensors, path, metadata={_NAMES[0]: json.dumps({"shared": shared}, sort_keys=True)})
    except SafetensorError as error:
        raise StoreError(f"saving {path.name}: {error}") from error
    _sync(path)


def _read_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    path = folder / WEIGHTS
    saved = _read_json(folder / REPORT).get(_STORED, {}).get("weights_sha256")
    try:
        if _sha256(path) != saved:
            raise StoreError(f"reading {path}: its content is not what was saved; copy the folder again")
        with safe_open(path, framework="pt", device="cpu") as file:
            told = file.metadata() or {}
            shared = json.loads(next((told[name] for name in _NAMES if name in told), "{}")).get("shared", {})
            return {name: file.get_tensor(name) for name in file.keys()}, shared  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise StoreError(f"reading {path}: {error}; expected the safetensors file of a result") from error


def _write_json(path: Path, data: dict[str, Any], text: str | None = None) -> None:
    """Write `data`, as `text` where its owner lays it out."""
    try:
        plain = json.dumps(data, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise StoreError(f"saving {path.name}: {error}; expected plain data with finite numbers") from error
    path.write_text(text or plain, encoding="utf-8")
    _sync(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"reading {path}: {error}; expected the {path.name} of a result") from error
    if not isinstance(data, dict):
        raise StoreError(f"reading {path}: found a {type(data).__name__}, expected an object")
    return data


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _previous(path: Path) -> Path:
    return path.parent / f".{path.name}.previous"


def _settle(path: Path) -> None:
    """Finish what a killed `save` left: put the old folder back, or remove it when the new one is in place."""
    previous = _previous(path)
    if not previous.is_dir():
        return
    try:
        if not path.exists():
            os.rename(previous, path)
        elif set(os.listdir(previous)) <= {*FILES, *BESIDE}:
            shutil.rmtree(previous)
    except OSError as error:
        raise StoreError(f"saving to {path}: {previous} of an earlier save is in the way ({error.strerror})") from error


def _check_replaceable(path: Path, force: bool) -> None:
    if not path.is_dir():
        raise StoreError(f"saving to {path}: it is a file; name a folder")
    if not force:
        raise StoreError(f"saving to {path}: it exists; name another folder, or replace it with force (--force)")
    strange = _strange(path)
    if strange:
        raise StoreError(
            f"saving to {path}: it is not a result of mimicut (found {', '.join(strange[:3])}), so force does not "
            "replace it; name another folder, or remove it yourself"
        )
    if not os.access(path, os.W_OK):
        raise StoreError(f"saving to {path}: it is read-only; name another folder")


def _strange(path: Path) -> list[str]:
    """What of a folder was not made here; nothing of an empty one."""
    found = {name for name in os.listdir(path) if not (name.startswith(SCRATCH) and (path / name).is_dir())}
    if not found:
        return []
    try:
        told = _read_json(path / REPORT)
    except StoreError:
        told = {}
    if not isinstance(told.get(_STORED), dict):
        return [*sorted(found - {*FILES, *BESIDE}), f"no {REPORT} of a result"]
    exported = {str(each.get("file")) for each in told.get("exports", {}).values()}
    own = {REPORT, *exported, *(f"{name}.data" for name in exported)}
    own |= {PLAN, WEIGHTS} if "weights_sha256" in told[_STORED] else set()
    own |= {"preprocessing.json"} if exported else set()
    own |= {"model.bin"} if "model.xml" in exported else set()
    own |= {name for name in PAGES if _ours(path / name)}
    return sorted(found - own)


def _swap(fresh: Path, path: Path) -> None:
    """`fresh` in the place of `path`; on an exception `path` is what it was."""
    previous = _previous(path)
    try:
        if path.exists():
            os.rename(path, previous)
        os.rename(fresh, path)
    except BaseException:
        if previous.exists() and not path.exists():
            os.rename(previous, path)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def _existing(folder: str | Path) -> Path:
    path = Path(folder).resolve()
    path = path if path.exists() or not _previous(path).is_dir() else _previous(path)
    missing = [name for name in FILES if not (path / name).is_file()]
    if missing == [PLAN, WEIGHTS]:
        raise StoreError(
            f"reading {path}: it holds a student that another tool pruned, as exported files, and no plan to build it "
            "by; its README.md says how to load them"
        )
    if missing:
        raise StoreError(f"reading {path}: found no {', '.join(missing)}; expected a folder that mimicut saved")
    return path
