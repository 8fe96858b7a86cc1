"""What is attacked: saves, exports and runs on tiny networks, with what may be there before and after each."""

import functools
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nets
import torch
from attacks import in_child

import mimicut as us
from mimicut.base.disk import write, write_by
from mimicut.base.errors import StoreError
from mimicut.base.scratch import replace_file
from mimicut.inputs.preprocessing import Preprocessing
from mimicut.inputs.teacher import own_teacher
from mimicut.proof.randomised import randomised
from mimicut.recovery.checkpoint import Checkpoint
from mimicut.results import export_folder as export_module
from mimicut.results.stopped_runs import read_stopped, write_stopped
from mimicut.results.store import put_report, read
from mimicut.runtime.export import FILES, Exported

SAID = Preprocessing((3, 8, 8), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
NETS = ("Chain", "Residual", "Concat", "Depthwise", "Grouped", "Shared")
OLD, NEW = us.Report(steps=1), us.Report(steps=2)


@functools.cache
def student(net, keep):
    own = own_teacher(randomised(getattr(nets, net)()), SAID)
    plan = us.make_plan(own.model, us.trace(own.model, own.example()), keep=keep, source=own.to_json())
    return us.cut(own.model, plan), plan


@dataclass(frozen=True)
class Scenario:
    """prepare: what is there before. act: what is killed, and done again. old, new: what may be there, as `state` gives
    it. refuses: whether doing it once more, when it was complete, is refused because it would need force."""

    prepare: Any
    act: Any
    state: Any
    refuses: bool = False


def saving(net, report, keep, **options):
    def act(place):
        model, plan = student(net, keep)
        us.save(place / "small", model=model, plan=plan, report=report, **options)

    return act


def result_state(net):
    def state(place):
        """The steps of the report, whose student loads with every bit; None without a result."""
        try:
            steps = read(place / "small")[1].steps
        except StoreError:
            assert not (place / "small").exists()
            return None
        model = us.load(place / "small", getattr(nets, net))
        loaded = model.state_dict()
        keeps = [keep for keep in (0.8, 0.5) if same(student(net, keep)[0].state_dict(), loaded)]
        return steps, keeps, tuple(sorted(read(place / "small")[1].exports))

    return state


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(t, other[name]) for name, t in one.items())


def files_alone(model, example, folder, *, formats, **options):
    """Stand-ins for exported files, written as these are: what counts here is how they come to their places."""
    names = {"onnx": ("model.onnx.data", "model.onnx"), "openvino": ("model.xml", "model.bin"), "pt2": ("model.pt2",)}
    for name in (name for kind in formats for name in names[kind]):
        write_by(folder / name, lambda path: path.write_text(f"content of {path.name}"), 1000)
    return Exported({kind: folder / FILES[kind] for kind in formats}, dict.fromkeys(formats, 0.0), 18, None)


def exporting(place):
    export_module.export_into, export_module.check_exports = files_alone, entries  # in a child
    export_module.export_folder(place / "small", ["onnx", "openvino", "pt2"], teacher=nets.Chain)


def entries(model, exported, formats, *others):
    names = "fixed_because size_fixed_because call tolerance"
    entry = {"bytes": 1, "precision": "float32", "opset": 18, "batch": "any", "size": "any", "normalises": False}
    entry |= {"error_random": 0.0, "error_real": None, **dict.fromkeys(names.split())}
    return {kind: {"file": FILES[kind], **entry} for kind in formats}


def nothing(place):
    pass


def checkpoint(number):
    def act(place):
        data = {
            "asked": {"number": number}, "plan": {}, "saved": None, "losses": [], "steps": number,
            "before": {"closed_form": None, "errors": None, "norms_share": None},
        }  # fmt: skip
        write_stopped(place / "small", Checkpoint({"a": torch.full((5,), float(number))}, data))

    return act


def checkpoint_state(place):
    return read_stopped(place / "small").data["steps"]


def plan_file(text):
    return lambda place: replace_file(place / "plan.json", lambda fresh: write(fresh, text))


def scenarios():
    for net in NETS:
        old = saving(net, OLD, 0.8)
        yield f"save {net}", Scenario(nothing, saving(net, NEW, 0.5), result_state(net), refuses=True)
        yield f"replace {net}", Scenario(old, saving(net, NEW, 0.5, force=True), result_state(net))
        yield f"report {net}", Scenario(old, lambda place: put_report(place / "small", NEW), result_state(net))
    old = saving("Chain", OLD, 0.8)
    yield "export", Scenario(old, exporting, result_state("Chain"), refuses=True)

    def exported(place):
        old(place)
        assert in_child(lambda: exporting(place)) == 0

    yield "replace exported", Scenario(exported, saving("Chain", NEW, 0.5, force=True), result_state("Chain"))
    yield "checkpoint", Scenario(checkpoint(1), checkpoint(2), checkpoint_state)
    yield "plan file", Scenario(plan_file("old"), plan_file("new"), lambda place: (place / "plan.json").read_text())


SCENARIOS = dict(scenarios())


def copied(start, place):
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(start, place)
    return place


CONFIG = us.MimicConfig(steps=3, views="none", batch_size=8)


def compressing(place):
    from mimicut.recovery import training_loop

    training_loop._CHECKPOINT_SECONDS = training_loop._CHECKPOINT_PAUSE = 0.0  # a checkpoint after every step
    own = own_teacher(randomised(nets.Chain()), SAID)
    images = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    us.compress(own, images, keep=0.5, folder=place / "small", config=CONFIG, extra="none", resume=True)


def compressed_state(place: Path):
    """Whether the result is there, and loads; None without one."""
    try:
        us.load(place / "small", nets.Chain)
    except StoreError:
        assert not (place / "small").exists()
        return None
    return True
