"""Reads every tensor of a file: safetensors, a state dict, or whatever a training program saved. No code of it runs."""

import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimicut.base.errors import InputError, one_line

DEEPEST = 8  # levels of containers that are searched. Assumption: no training program nests its networks deeper
# What torch's reader says of what it will not read: programs, functions of the system, code beside whole models.
_RUNS_CODE = ("TorchScript", "is blocked", "persistent_load", "reduce for unrecognized", "Can only")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, under the keys that lead to them, joined by dots.

    {"epoch": 3, "state_dict": {"conv.weight": w}} gives {"state_dict.conv.weight": w}. Objects of any class may lie
    between them (a Namespace, a Path, a whole pickled model): their classes are not imported and nothing of them is
    called. Of a pickled model the tensors of its state dict are given.

    Raises:
        InputError: There is no such file, or it cannot be read in this way.
    """
    if not path.is_file():
        raise InputError(f"loading weights: there is no file {path}; check the path")
    with path.open("rb") as stream:
        start = stream.read(9)
    try:
        if start[8:9] == b"{":  # by content: a safetensors file begins with a length and a JSON header
            from safetensors.torch import load_file

            return load_file(path)
        loaded = _loaded(path)
    except Exception as error:
        script = any(word in str(error) for word in _RUNS_CODE)
        raise InputError(
            f"loading the weights {path}: "
            + (
                "it holds a TorchScript program or other objects, which run code when read, expected tensors; where "
                "you trust it, torch.save(model.state_dict(), FILE) or safetensors.torch.save_file"
                if script
                else f"{one_line(error)}; damaged, or neither .safetensors nor a file of torch.save"
            )
        ) from error
    found = dict(_tensors_in(loaded, DEEPEST))
    if not found:
        kind = f"a mapping with {list(loaded)[:3]}" if isinstance(loaded, Mapping) and loaded else "no tensor"
        raise InputError(f"loading the weights {path}: found {kind}, expected a state dict: names and tensors")
    return found


class _StandIn:
    """An object of any class, as the file describes it: it has the object's attributes and does nothing."""

    attributes: Mapping[str, Any] = {}

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        both = state if isinstance(state, tuple) else (state,)  # of a class with slots: (dictionary, slots)
        self.attributes = {name: value for each in both if isinstance(each, dict) for name, value in each.items()}


def _stand_in(number: int, container: Any = None) -> type:
    """A class of its own, which torch's reader can tell from others. container: what its objects are instead, for a
    class derived from dict or list."""
    body = {} if container is None else {"__new__": lambda cls, *args, **kwargs: container()}
    return type(f"stand_in_{number}", (_StandIn,), body)


def _loaded(path: Path) -> Any:
    """What torch.save wrote, with stand-ins for all that is neither plain data nor a tensor.

    torch's own reader (weights_only) knows no class but those that it is given. It stops at the first unknown name,
    which is then given a stand-in, and at the first object that turns out to be a dict or a list.
    """
    names: list[str] = []
    classes: list[type] = []
    while True:
        try:
            known: list[Any] = list(zip(classes, names, strict=True))
            with warnings.catch_warnings(), torch.serialization.safe_globals(known):
                warnings.simplefilter("ignore")  # of protocols; what is a TorchScript archive is an error below
                return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            unknown = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
            misread = re.search(r"Can only (SETITEM|append|extend).*stand_in_(\d+)'", str(error))
            if unknown and unknown[1] not in names:
                for name in dict.fromkeys([*_unknown_names(path), unknown[1], f"builtins.{unknown[1]}"]):
                    if name not in names:
                        names.append(name)
                        classes.append(_stand_in(len(classes)))
            elif misread and "__new__" not in vars(classes[int(misread[2])]):
                at = int(misread[2])
                classes[at] = _stand_in(at, OrderedDict if misread[1] == "SETITEM" else list)
            else:
                raise


def _unknown_names(path: Path) -> list[str]:
    """The names that torch's reader does not know; none for a file of the form before torch 1.6."""
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except ValueError:
        return []


def _tensors_in(value: Any, deeper: int) -> Iterator[tuple[str, Tensor]]:
    """(keys joined by dots, tensor), anywhere inside."""
    if isinstance(value, _StandIn) and "_modules" in value.attributes:
        yield from _module_tensors(value)
        return
    if isinstance(value, _StandIn):
        value = value.attributes
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    for key, inner in value.items() if isinstance(value, Mapping) else ():
        if isinstance(inner, Tensor):
            yield str(key), inner
        elif deeper:
            yield from ((f"{key}.{name}", tensor) for name, tensor in _tensors_in(inner, deeper - 1))


def _module_tensors(module: _StandIn) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a pickled module's state dict."""
    held = module.attributes
    passing = held.get("_non_persistent_buffers_set", ())
    passing = passing if isinstance(passing, (set, list, tuple)) else ()
    for name, tensor in {**held.get("_parameters", {}), **held.get("_buffers", {})}.items():
        if isinstance(tensor, Tensor) and name not in passing:
            yield name, tensor
    for name, inner in held["_modules"].items():
        if isinstance(inner, _StandIn) and "_modules" in inner.attributes:
            yield from ((f"{name}.{below}", tensor) for below, tensor in _module_tensors(inner))
