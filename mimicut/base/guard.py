"""Context managers that put networks, random state and caches back as they were, and copies to work on."""

import copy
import functools
import random
import re
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import CellType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from mimicut.base.errors import InputError, UnsupportedModel, one_line


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer under every name that it has; also buffers that a state dict leaves out."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


@contextmanager
def memory_error(doing: str, device: str | None, going_on: Callable[[], str] = str) -> Iterator[None]:
    """Let what a device says when its memory runs out be an error of ours. going_on: further words for its end.

    Raises:
        InputError: It ran out inside.
    """
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise InputError(
            f"{doing} on {device or 'the device of the teacher'}: its memory ran out ({one_line(error)}); free what "
            "else holds it, give a smaller input, less to the stages before mimicking (--max-memory), or another "
            f"device{going_on()}"
        ) from error


def out_of_memory(error: RuntimeError) -> bool:
    """Whether a device says that its memory ran out; its libraries say so in words of their own.

    >>> out_of_memory(torch.OutOfMemoryError("")), out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"))
    (True, True)
    >>> out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    False
    """
    return isinstance(error, torch.OutOfMemoryError) or bool(re.search("out of memory|_ALLOC_FAILED", str(error)))


@contextmanager
def exact_float32() -> Iterator[None]:
    """float32 is float32 inside: by default GPUs multiply in TF32, with 10 bits, in convolutions. Also a decorator."""
    try:
        before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:  # set by the newer fp32_precision, with which torch does not let these be mixed
        yield
        return
    try:
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])


@torch.no_grad()
def put_back(values: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy into each tensor the value beside it. Equal ones are not written: an expanded tensor cannot be."""
    for tensor, value in values:
        if not torch.equal(tensor, value):
            tensor.copy_(value)


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Restore `training` and `requires_grad` of every part of `module` on the way out.

    Tensors are not copied: the code inside must not write to them.
    """
    training = [(m, m.training) for m in module.modules()]
    grads = [(p, p.requires_grad) for p in module.parameters()]
    try:
        yield
    finally:
        for m, flag in training:
            m.training = flag
        for p, flag in grads:
            p.requires_grad_(flag)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """`module` in eval mode and without gradients inside; as it was afterwards."""
    with untouched(module), torch.no_grad():
        module.eval()
        yield


def resolve_device(name: str) -> torch.device:
    """The device with this name, with its index.

    Raises:
        InputError: This machine does not have it, or it holds no data ("meta").

    >>> resolve_device("cpu")
    device(type='cpu')
    """
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"working on {name!r}: {error}; name a device that this machine has, such as 'cpu'") from error
    if device.type == "meta":
        raise InputError("working on 'meta': it holds no data; name another device, such as 'cpu'")
    return device


@contextmanager
def on_device(model: nn.Module, device: torch.device | str | None) -> Iterator[None]:
    """Put `model` on `device` inside; afterwards the very same tensors are back in place. None: leave it as it is."""
    originals = [] if device is None else [(tensor, tensor.data) for tensor in named_tensors(model).values()]
    try:
        for tensor, data in originals:
            tensor.data = data.to(device)
        yield
    finally:
        for tensor, data in originals:
            tensor.data = data


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Fix the random state of Python, NumPy and torch inside; the caller's state is back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _spaces(model: nn.Module) -> list[dict[str, Any]]:
    """The names that the code of `model` can see: those of its classes, and of the files that define them."""
    kinds = {k for m in model.modules() for k in type(m).__mro__ if not k.__module__.startswith(("torch.", "builtins"))}
    files = dict.fromkeys(k.__module__ for k in kinds if k.__module__ in sys.modules)
    return [dict(vars(k)) for k in kinds] + [dict(vars(sys.modules[name])) for name in files]


def remembers(model: nn.Module) -> bool:
    """Whether the code of `model` has a `functools.cache`, which outlives every copy of the network."""
    return any(isinstance(v, functools._lru_cache_wrapper) for space in _spaces(model) for v in space.values())


@contextmanager
def caches_kept(model: nn.Module) -> Iterator[None]:
    """Give the dictionaries beside the code of `model` their former content back at the end. Code that keeps tables
    there would otherwise find those of a copy, without data or in another precision."""
    found = {
        id(value): value
        for space in _spaces(model)
        for name, value in space.items()
        if type(value) in (dict, OrderedDict, defaultdict) and not name.startswith("__")
    }
    held = [(value, dict(value)) for value in found.values()]
    try:
        yield
    finally:
        for value, before in held:
            if value.keys() != before.keys() or any(value[key] is not before[key] for key in before):
                value.clear()
                value.update(before)


@contextmanager
def backward_pass(model: nn.Module) -> Iterator[None]:
    """Around a backward pass of a network that nobody may have trained in this form.

    Raises:
        UnsupportedModel: It changes in place what the pass needs.
    """
    try:
        yield
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        made = re.search(r"which is output \d+ of (\w+)", str(error))
        what = f"the result of {made[1]}" if made else "a value"
        raise UnsupportedModel(
            f"running {type(model).__name__} backward: its code changes {what} in place, which the backward pass still "
            "needs; expected operators that make new tensors: y = y * 2, not y *= 2"
        ) from error


def structural_copy(model: nn.Module) -> nn.Module:
    """A copy with modules and attributes of its own that shares the tensors of `model`: cheap, for reading only."""
    return _copied(model, {id(t): t for t in [*model.parameters(), *model.buffers()]})


def full_copy(model: nn.Module) -> nn.Module:
    """A copy with tensors of its own.

    Raises:
        UnsupportedModel: copy.deepcopy cannot copy the module.
    """
    return _copied(model, {})


def empty_copy(model: nn.Module) -> nn.Module:
    """A copy on the meta device, without data; shared tensors stay shared."""
    held = [v for m in model.modules() for v in tree_leaves(list(vars(m).values())) if isinstance(v, torch.Tensor)]
    memo: dict[int, object] = {id(t): t.detach().to("meta") for t in [*held, *model.buffers()]}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad)
    return _copied(model, memo)


def _copied(model: nn.Module, memo: dict[int, object]) -> nn.Module:
    for module in model.modules():  # what a forward pass left behind: copy.deepcopy refuses what has a gradient
        left = (v for v in tree_leaves(list(vars(module).values())) if isinstance(v, torch.Tensor) and not v.is_leaf)
        memo.update({id(value): value.detach() for value in left})
    before = {**memo}
    try:
        try:
            copied = copy.deepcopy(model, memo)
        except Exception:  # a `__deepcopy__` that reads data, where there is none
            memo = before
            copied = _copied_plainly(model, memo)
        _complete(model, copied, memo, set())
        _rebind(copied, memo)
    except Exception as error:
        raise UnsupportedModel(
            f"copying {type(model).__name__}: {type(error).__name__}: {error}; "
            "expected a module that copy.deepcopy can copy"
        ) from error
    return copied


def _copied_plainly(model: nn.Module, memo: dict[int, object]) -> nn.Module:
    """A deep copy for which no module's own `__deepcopy__` is asked."""
    for module in reversed([m for m in model.modules() if hasattr(m, "__deepcopy__")]):
        plain = memo[id(module)] = object.__new__(type(module))
        plain.__dict__.update(copy.deepcopy(module.__dict__, memo))
    return copy.deepcopy(model, memo)


def _complete(mine: nn.Module, its: nn.Module, memo: dict[int, object], done: set[int]) -> None:
    """Give `its`, a copy of `mine`, what a `__deepcopy__` or `__getstate__` of the module's own class left out of it.

    Such code may build the copy anew from some attributes: then tensors in `memo` are not shared, numbers that a cut
    changed are as before it, and attributes or whole submodules are missing.
    """
    memo[id(mine)] = its
    done.add(id(mine))
    for kind in ("_parameters", "_buffers"):
        held, copies = vars(mine)[kind], vars(its)[kind]
        for name, tensor in held.items():
            if tensor is None or name not in copies or copies[name] is not memo.get(id(tensor)):
                copies[name] = copy.deepcopy(tensor, memo)
    for name, child in mine._modules.items():
        made = its._modules.get(name)
        if child is None or made is None or id(child) in done:
            made = its._modules[name] = copy.deepcopy(child, memo)
        if child is not None and made is not None and id(child) not in done:
            _complete(child, made, memo, done)
    for name, value in vars(mine).items():
        if name not in vars(its) or (_plain(value) and vars(its)[name] != value):  # torchvision's forget `training`
            with suppress(Exception):  # a lock or an open file, left out for a reason
                vars(its)[name] = copy.deepcopy(value, memo)


def _rebind(copied: nn.Module, memo: dict[int, object]) -> None:
    """Let the functions that a copy holds (hooks, attributes) name its own parts, where they name those of the model.

    copy.deepcopy takes a function as it is. One that is defined inside a method and names `self` would act on the
    model, whichever copy runs it.
    """
    for module in copied.modules():
        kept: tuple[dict[Any, Any], ...] = (vars(module), module._forward_pre_hooks, module._forward_hooks)
        for held in kept:
            for name, value in list(held.items()):
                if isinstance(value, FunctionType) and value.__closure__:
                    held[name] = _rebound(value, value.__closure__, memo)


def _rebound(function: FunctionType, closure: tuple[CellType, ...], memo: dict[int, object]) -> FunctionType:
    """The same function for a copy; itself where it names nothing that was copied."""
    try:
        named = [cell.cell_contents for cell in closure]
    except ValueError:  # a name that has no value yet
        return function
    if all(memo.get(id(each), each) is each for each in named):
        return function
    cells = tuple(CellType(memo.get(id(each), each)) for each in named)
    made = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _plain(value: Any) -> bool:
    """Whether a value is a number, a text or None, or a list or tuple of these."""
    held = value if type(value) in (list, tuple) else (value,)
    return all(isinstance(v, (bool, int, float, str, type(None))) for v in held)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits, on any device: -0.0 differs from 0.0, NaN equals itself.

    >>> same_bits(torch.tensor(0.0), torch.tensor(-0.0))
    False
    """
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    flat = [t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(*flat)
