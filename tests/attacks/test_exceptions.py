"""An exception at the entry of any function that a public call runs: the teacher is as before it (law 3)."""

import random
import sys

import nets
import numpy as np
import pytest
import torch
from attacks import in_child, in_fresh_process, record, thinned

import mimicut as us
from mimicut.inputs.preprocessing import Preprocessing
from mimicut.inputs.teacher import own_teacher
from mimicut.proof.randomised import randomised

SAID = Preprocessing((3, 8, 8), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
CONFIG = us.MimicConfig(steps=2, views="none", batch_size=8)


class Injected(Exception):
    pass


def images():
    return torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def call_of(name, own, folder):
    """A public call on the teacher, and what it needs, made before."""
    model, given = own.model, images()
    anatomy = us.trace(model, own.example())
    plan = us.make_plan(model, anatomy, keep=0.5, source=own.to_json())
    student = us.cut(model, plan)
    calls = {
        "find_seam": lambda: us.find_seam(model, own.example()),
        "trace": lambda: us.trace(model, own.example()),
        "inspect": lambda: us.inspect(model, own.example()),
        "count": lambda: us.count(model, own.example()),
        "make_plan": lambda: us.make_plan(model, anatomy, keep=0.6),
        "channel_evidence": lambda: us.channel_evidence(model, anatomy, given),
        "cut": lambda: us.cut(model, plan),
        "check_cut": lambda: us.check_cut(anatomy, plan, model, student),
        "mimic": lambda: us.mimic(model, us.cut(model, plan), plan.seam, given, CONFIG),
        "put_under_head": lambda: us.put_under_head(model, student, plan.seam),
        "closed_form": lambda: us.closed_form(us.CutStudent(model, us.cut(model, plan), anatomy, plan), given),
        "recover": lambda: us.recover(us.CutStudent(model, us.cut(model, plan), anatomy, plan), given, CONFIG),
        "recoverability": lambda: us.recoverability(model, anatomy, given),
        "replan": lambda: us.replan(model, anatomy, plan),
        "capturing": lambda: captured(model, plan.seam, given),
        "figures": lambda: us.figures(model, student, plan.seam, given),
        "measure": lambda: us.measure({"own": model}, own.example(), us.Setting("torch"), seconds=0.01),
        "export": lambda: us.export(model, own.example(), folder / "exported", formats=["pt2"]),
        "recover_pruned": lambda: us.recover_pruned(own, student, given, config=CONFIG, extra="none"),
        "crossfit": lambda: us.crossfit(own, given, 2, keep=0.5, config=CONFIG, extra="none"),
        "save": lambda: us.save(folder / "saved", model=model, plan=plan, report=us.Report()),
        "compress": lambda: us.compress(own, given, keep=0.5, config=CONFIG, extra="none", folder=folder / "small"),
    }
    return calls[name]


CALLS = ("find_seam", "trace", "inspect", "count", "make_plan", "channel_evidence", "cut", "check_cut", "mimic",
         "put_under_head", "closed_form", "recover", "recoverability", "replan", "capturing", "figures", "measure",
         "export", "recover_pruned", "crossfit", "save", "compress")  # fmt: skip
# Public callables that are given no teacher, or only read a folder.
WITHOUT_A_TEACHER = {
    "draw_pictures", "explain_export", "export_folder", "from_pretrained", "load", "load_teacher", "own_teacher",
    "preset", "push_to_hub", "read_extra", "read_images", "read_plan", "split",
}  # fmt: skip


CALLED_BY_TORCH = {"_ErrorsKept.write"}


def captured(model, seam, given):
    with us.capturing(model, seam) as capture:
        capture.features(given)


def state(model):
    held = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = {
        name: (m.training, {k: len(v) for k, v in vars(m).items() if k.endswith("_hooks")}, sorted(vars(m)))
        for name, m in model.named_modules()
    }
    grads = {name: (p.requires_grad, p.grad is None) for name, p in model.named_parameters()}
    chance = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    return held, (modules, grads, chance)


def same(one, other):
    return one[1] == other[1] and all(torch.equal(t, other[0][name]) for name, t in one[0].items())


def counted(work, stop_at=None):
    """Run `work`; return how many functions of the package it entered. At number `stop_at` an exception is raised.

    Generators are left out: one is entered again to put things back, as are the functions that do so. So is what torch
    calls while it writes a program: there an exception ends the process, so that interrupts are held.
    """
    entered = [0]

    def watch(frame, event, argument):
        code = frame.f_code
        own = "/mimicut/" in code.co_filename and not code.co_filename.endswith("base/guard.py")
        if (
            event == "call"
            and own
            and not code.co_flags & 0x20
            and code.co_name[0] != "<"
            and code.co_qualname not in CALLED_BY_TORCH
        ):
            entered[0] += 1
            if entered[0] == stop_at:
                raise Injected(f"{code.co_filename}:{code.co_name}")

    sys.setprofile(watch)
    try:
        work()
    except Injected:
        pass
    except us.MimicutError as error:  # where it was reported as the fault of something else
        if "Injected" not in str(error):
            raise
    finally:
        sys.setprofile(None)
    return entered[0]


def counted_alone(work, stop_at=None):
    """`counted` in a forked process. Its threads are set up first: torch ends the process where two do so at once."""
    torch.set_num_threads(1)
    return counted(work, stop_at)


def attack(name, folder, attempts):
    torch.set_num_threads(1)  # children of a process with threads would wait for them for ever
    net = nets.Residual if name == "recoverability" else nets.Chain  # which has a block that can be dropped
    own = own_teacher(randomised(net()), SAID)
    work = call_of(name, own, folder / "count")
    assert in_child(lambda: (folder / "number").write_text(str(counted_alone(work)))) == 0, name
    number = int((folder / "number").read_text())
    chance = random.Random(name)
    places = list(range(1, number + 1)) if number <= attempts else chance.sample(range(1, number + 1), attempts)
    reached = 0
    for place in places:
        work = call_of(name, own, folder / str(place))

        def child(work=work, place=place):
            before = state(own.model)
            entered = counted_alone(work, place)
            if not same(before, state(own.model)):
                sys.exit(4)
            sys.exit(0 if entered >= place else 3)  # what an earlier call keeps may make this one shorter

        code = in_child(child)
        assert code in (0, 3), (name, place)
        reached += code == 0
    return reached


@pytest.mark.attack
@pytest.mark.parametrize("name", CALLS)
def test_after_an_exception_the_teacher_is_as_before(name, tmp_path):
    number = in_fresh_process(attack, name, tmp_path, len(thinned(range(20))))
    record(f"injected exceptions: {name}", attacks=number)


def test_every_public_function_is_attacked_or_has_no_teacher():
    functions = {name for name in us.__all__ if callable(each := getattr(us, name)) and not isinstance(each, type)}
    assert functions == {*CALLS, *WITHOUT_A_TEACHER}


@pytest.mark.parametrize("name", ["cut"])
def test_a_sample_of_exceptions(name, tmp_path):
    in_fresh_process(attack, name, tmp_path, 3)
