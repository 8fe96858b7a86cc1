"""Apply a plan to a copy of the teacher. Nothing is scored, traced or trained here."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from mimicut.base.errors import InputError, PlanError
from mimicut.base.guard import full_copy
from mimicut.surgery.plan import Plan, check_teacher
from mimicut.surgery.sizes import may_be_size
from mimicut.surgery.stand_ins import (
    CallCorrections,
    can_correct_calls,
    correct_calls,
    replace_multihead_attention,
    stand_in,
)


def cut(teacher: nn.Module, plan: Plan) -> nn.Module:
    """Cut a copy of a network as a plan says. The network itself is not changed.

    A plan that keeps everything gives a bit-equal copy. Weights are only selected, never altered, so nothing of what
    was removed is carried into neighbours.

    Args:
        teacher: the network that the plan was made for.
        plan: which positions of every tensor stay, which modules are dropped, and which numbers follow.

    Returns:
        The student, with tensors of its own.

    Raises:
        PlanError: the teacher differs from the plan's, naming the first such tensor, or some part of the plan does not
            fit it.
    """
    check_teacher(teacher, plan)
    student = full_copy(teacher)
    _slice(student, plan)
    if plan.dropped_modules:
        drop_modules(student, plan.dropped_modules)
    for edit in plan.edits:
        _edit(student, edit)
    if plan.slices:
        replace_multihead_attention(student)
    _correct_calls(student, plan.calls)
    return student


def drop_modules(model: nn.Module, dropped: Iterable[Sequence[str]]) -> nn.Module:
    """Put stand-ins in place of some modules of a network, in place.

    Args:
        model: the network to change.
        dropped: pairs of a module's name and what takes its place, as `stand_ins.stand_in` reads it.

    Returns:
        `model` itself.

    Raises:
        InputError: there is no module of that name.

    >>> drop_modules(nn.Sequential(nn.ReLU()), [("0", "zero")])(torch.ones(2))
    tensor([0., 0.])
    """
    modules = dict(model.named_modules())
    for name, how in dropped:
        if name not in modules or not name:
            close = [m for m in modules if m.startswith(name.rsplit(".", 1)[0])][:8]
            raise InputError(
                f"dropping block {name!r}: there is no such module"
                + (f"; near it: {', '.join(close)}" if close else "")
                + "; `mimicut inspect` lists the blocks"
            )
        model.set_submodule(name, stand_in(how, modules[name]))
    return model


def _slice(student: nn.Module, plan: Plan) -> None:
    """Replace each tensor that the plan cuts by its selection, under every name that the tensor has."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    tensors: dict[str, torch.Tensor] = {}
    for prefix, module in student.named_modules():
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                owners.setdefault(id(tensor), []).append((module, key))
                tensors[f"{prefix}.{key}" if prefix else key] = tensor
    done: set[int] = set()
    for name, slices in plan.slices.items():
        if name not in tensors:
            raise PlanError(f"cutting {name}: the teacher has no such tensor; make the plan again for this teacher")
        if name in plan.seam.head:
            raise PlanError(f"cutting {name}: it belongs to the head, which is never cut; remove its slices")
        tensor = tensors[name]
        if id(tensor) in done:
            continue
        done.add(id(tensor))
        selected = _select(tensor, name, slices)
        for module, key in owners[id(tensor)]:
            setattr(module, key, selected)


def _select(tensor: torch.Tensor, name: str, slices: dict[int, list[int]]) -> torch.Tensor:
    """The listed positions of each axis in `slices`; a parameter stays a parameter."""
    data = tensor.detach()
    for dim, positions in slices.items():
        if (
            not 0 <= dim < data.dim()
            or not positions
            or max(positions) >= data.shape[dim]
            or sorted(set(positions)) != positions
        ):
            raise PlanError(
                f"cutting {name} {tuple(data.shape)} along axis {dim}: found {positions[:3]}..{positions[-1:]}; "
                "expected rising positions inside that axis. Edit widths, not slices, or make the plan again"
            )
        data = data.index_select(dim, torch.tensor(positions, device=data.device))
    return nn.Parameter(data, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data


def _edit(student: nn.Module, edit: dict[str, Any]) -> None:
    """Set one number that a module holds, after a check that it is the one that the plan expects."""
    name, attribute, index = edit["module"], edit["attribute"], edit["index"]
    doing = f"setting {attribute} of module {name!r}"
    module = _submodule(student, name, doing)
    held: Any = vars(module).get(attribute)
    value: Any = held
    if isinstance(held, (list, tuple)) and type(index) is int and 0 <= index < len(held):
        value = held[index]
    elif index is not None:
        value = None
    if type(value) is not int or value != edit["from"] or not may_be_size(module, attribute):
        found = "no number that may be a size" if type(value) is not int or value == edit["from"] else value
        raise PlanError(
            f"{doing}: found {found}, the plan expects {edit['from']}; make the plan again for this teacher"
        )
    if index is None:
        setattr(module, attribute, edit["to"])
    else:
        changed = list(held)
        changed[index] = edit["to"]
        setattr(module, attribute, type(held)(changed))


def _submodule(student: nn.Module, name: str, doing: str) -> nn.Module:
    try:
        return student.get_submodule(name)
    except AttributeError as error:
        raise PlanError(f"{doing}: {error}; make the plan again for this teacher") from None


def _correct_calls(student: nn.Module, calls: list[dict[str, Any]]) -> None:
    """Make the code of each module give torch functions the numbers in `calls` (`Plan.calls`)."""
    corrections: dict[str, CallCorrections] = {}
    for call in calls:
        positions = corrections.setdefault(call["module"], {}).setdefault((call["function"], call["index"]), {})
        positions[call["place"]] = call["from"], call["to"]
    for name, right in corrections.items():
        doing = f"correcting the numbers in the code of module {name!r}"
        module = _submodule(student, name, doing)
        if not can_correct_calls(module):
            raise PlanError(f"{doing}: its code is not its class's; make the plan again for this teacher")
        correct_calls(module, right)
