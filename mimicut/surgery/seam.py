"""Where the body ends and the head begins, and how the features there are captured."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import nn

from mimicut.base.errors import UnsupportedModel


@dataclass(frozen=True)
class SeamPoint:
    """One place whose tensor the student must imitate.

    Attributes:
        module: qualified name; "" for the whole network.
        side: "output" or "input" (the module's first tensor argument).
        call: which call of that module in one forward pass, from 0 (a module may be used several times).
        part: which tensor, where the module returns or takes several: keys, positions or fields joined by dots, such as
            "out" in a dict, "1" in a tuple, "features.0" in a list in a dict. For an input the argument comes first:
            "0.low".

    >>> str(SeamPoint("layer4"))
    'layer4:output'
    """

    module: str
    side: str = "output"
    call: int = 0
    part: str = ""

    def __str__(self) -> str:
        place = f"{self.module or '<model>'}:{self.side}" + (f"@{self.call}" if self.call else "")
        return f"{place}.{self.part}" if self.part else place

    @classmethod
    def parse(cls, text: str) -> "SeamPoint":
        """Read a point from text.

        Args:
            text: such as "layer4", "avgpool:input", "block:output@2", "backbone:output.out" or
                "<model>:output.features.0".

        Raises:
            UnsupportedModel: the side is neither input nor output, or the call is no number.

        >>> SeamPoint.parse("block:output@2")
        SeamPoint(module='block', side='output', call=2, part='')
        """
        module, _, place = text.partition(":")
        place, _, part = place.partition(".")
        side, _, call = (place or "output").partition("@")
        if side not in ("input", "output") or (call and not call.isdigit()):
            raise UnsupportedModel(
                f"reading the seam point {text!r}: found side {side!r}, call {call!r}; "
                "expected MODULE, MODULE:input, MODULE:output, MODULE:output@CALL or MODULE:output.PART"
            )
        return cls("" if module == "<model>" else module, side, int(call or 0), part)


# What the numbers of an output are; each kind is measured by figures of its own (`proof.output_figures`).
OUTPUT_KINDS = ("scores", "multilabel", "embedding", "values", "map", "boxes")
AGREEING = ("scores", "multilabel", "map")  # kinds of which an agreement can be required; of the others an error


@dataclass(frozen=True)
class Output:
    """One tensor that a network returns.

    Attributes:
        part: where it stands in what is returned, as `SeamPoint.part`; "" for a tensor that stands alone.
        kind: "scores" of classes that exclude one another, "multilabel" (one yes or no for each label), "embedding",
            "values" (numbers that are no classes), "map" (classes at every position), or "boxes" (a detector's).
        activation: "softmax", "log_softmax" or "sigmoid" where the network ends in one, else "".
        imitated: every path to it leads through the seam, so that a student with the teacher's features returns the
            teacher's output.
        image: a map of as many channels as the network's input: a picture.
        batch_axis: the axis of the images.
        class_axis: the axis of the classes, where there are several.
        declared: the kind is what the user says, not what the graph shows.
    """

    part: str
    kind: str
    activation: str = ""
    imitated: bool = True
    image: bool = False
    batch_axis: int = 0
    class_axis: int = 1
    declared: bool = False

    def __str__(self) -> str:
        return f"<model>:output.{self.part}" if self.part else "<model>:output"

    @property
    def guessed(self) -> bool:
        """Whether its numbers are taken for classes by their shape alone: neither the graph nor the user says so."""
        return self.kind in AGREEING and not self.activation and not self.declared


@dataclass(frozen=True)
class Seam:
    """Where the body of a network ends.

    Attributes:
        points: where features are taken.
        shapes: for each point the shape of one image's features, batch axis left out, such as (512, 7, 7).
        head: names of the parameters and buffers that act only after the points; they are never changed.
        headless: the network predicts nothing: it returns features, which are no class scores.
        outputs: the floating-point tensors that the network returns, that depend on the images and have an axis of
            images; empty in results of release 0.1 and in seams made by hand.
        not_measured: further tensors that it returns: integers, truth values, and tensors in which no axis is that of
            the images, or that do not depend on them.
        batch_axes: for each point the axis of the images, where that is not 0 for all of them.
    """

    points: tuple[SeamPoint, ...]
    shapes: tuple[tuple[int, ...], ...]
    head: tuple[str, ...]
    headless: bool = False
    outputs: tuple[Output, ...] = ()
    batch_axes: tuple[int, ...] = ()
    not_measured: tuple[str, ...] = ()

    @property
    def scores(self) -> Output | None:
        """The output whose classes are compared: the only row of class scores, or among several the one that is named
        logits or out; None if there is none."""
        found = [output for output in self.outputs if output.kind == "scores"]
        named = [output for output in found if output.part in ("logits", "out")]
        return (named or found)[0] if len(named or found) == 1 else None

    def batch_first(self, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The features of a pass with images on axis 0."""
        axes = self.batch_axes or (0,) * len(features)
        return [f.movedim(axis, 0) if axis else f for f, axis in zip(features, axes, strict=True)]

    def to_json(self) -> dict[str, Any]:
        """The seam as plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Seam":
        """The seam that `to_json` wrote."""
        return cls(
            tuple(SeamPoint(**p) for p in data["points"]),
            tuple(tuple(s) for s in data["shapes"]),
            tuple(data["head"]),
            bool(data.get("headless", False)),
            tuple(Output(**each) for each in data.get("outputs", ())),
            tuple(data.get("batch_axes", ())),
            tuple(data.get("not_measured", ())),
        )


class _Stop(Exception):
    """Ends a forward pass once every point has been captured."""


class Capture:
    """Runs a network with hooks at its seam. `capturing` builds it and removes the hooks."""

    def __init__(self, model: nn.Module, seam: Seam):
        self._model = model
        self._seam = seam
        self._points = seam.points
        self._calls: dict[tuple[str, str], int] = {}
        self._found: dict[SeamPoint, torch.Tensor] = {}
        self._stop: bool | None = None  # None: not running, so whoever else runs the network is left alone

    def _note(self, module: str, side: str, value: Any) -> dict[str, torch.Tensor]:
        if self._stop is None:
            return {}
        call = self._calls.get((module, side), 0)
        self._calls[module, side] = call + 1
        for point in self._points:
            if (point.module, point.side, point.call) != (module, side, call):
                continue
            tensor = dict(tensors(value)).get(point.part)
            if tensor is None:
                raise UnsupportedModel(
                    f"capturing features at seam point {point}: found {_described(value)}, expected one tensor; "
                    "name another point with --seam"
                )
            # Layers that run on after this point may overwrite the tensor in place (densenet121 does).
            self._found[point] = tensor if self._stop and len(self._points) == 1 else tensor.clone()
        if self._stop and len(self._found) == len(set(self._points)):
            raise _Stop
        return {}

    def features(self, *args: Any, **kwargs: Any) -> list[torch.Tensor]:
        """The features of a batch. The pass ends at the last seam point, so the head costs nothing.

        Args:
            *args: what the network is called with.
            **kwargs: the same, by name.

        Returns:
            One tensor per seam point, batch axis first, in the order of `seam.points`.

        Raises:
            UnsupportedModel: the pass did not reach every point, or found something else than one tensor there.
        """
        return self._run(True, args, kwargs)[0]

    def features_and_output(self, *args: Any, **kwargs: Any) -> tuple[list[torch.Tensor], Any]:
        """The features of a batch, as `features` returns them, and what the network returns, from one whole pass."""
        return self._run(False, args, kwargs)

    def _run(self, stop: bool, args: tuple, kwargs: dict) -> tuple[list[torch.Tensor], Any]:
        self._calls.clear()
        self._found.clear()
        self._stop, output = stop, None
        try:
            output = self._model(*args, **kwargs)
        except _Stop:
            pass
        finally:
            found, self._found, self._stop = self._found, {}, None
        if all(p in found for p in self._points):
            return self._seam.batch_first([found[p] for p in self._points]), output
        raise UnsupportedModel(
            f"capturing features: the forward pass of {type(self._model).__name__} ended without reaching "
            f"{', '.join(map(str, self._points))}; name points that every pass runs through with --seam"
        )


@contextmanager
def capturing(model: nn.Module, seam: Seam) -> Iterator[Capture]:
    """Capture the features at `seam` with hooks, all of which are removed on leaving.

    Args:
        model: the network to run.
        seam: where its features are taken.

    Yields:
        The object that runs the network.

    Raises:
        UnsupportedModel: the network has no module of that name.
    """
    capture = Capture(model, seam)
    with _hooks(model, seam.points, capture._note):
        yield capture


@contextmanager
def watching(model: nn.Module, points: Sequence[SeamPoint]) -> Iterator[dict[SeamPoint, dict[str, torch.Tensor]]]:
    """Note which tensors pass at some points in one forward pass.

    Args:
        model: the network that runs inside the `with` block.
        points: where to look; their parts do not count.

    Yields:
        A dict that fills while `model` runs: point -> part -> tensor.
    """
    calls: dict[tuple[str, str], int] = {}
    found: dict[SeamPoint, dict[str, torch.Tensor]] = {}

    def note(module: str, side: str, value: Any) -> dict[str, torch.Tensor]:
        call = calls[module, side] = calls.get((module, side), -1) + 1
        found[SeamPoint(module, side, call)] = _parts(value)
        return {}

    with _hooks(model, points, note):
        yield found


@contextmanager
def _hooks(
    model: nn.Module, points: Sequence[SeamPoint], at: Callable[[str, str, Any], dict[str, torch.Tensor]]
) -> Iterator[None]:
    """Call `at(module, side, value)` when a pass reaches a module of `points`; the tensors that it returns, by their
    parts, replace those in the value. All hooks are removed on leaving."""
    modules, handles = dict(model.named_modules()), []

    def enter(name: str) -> Any:
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> Any:
            given = _given(args, kwargs)
            new = at(name, "input", given)
            if not new:
                return None
            if "" in new:
                first = next(key for key, value in given.arguments.items() if value is given.first)
                new[str(first)] = new.pop("")
            changed = _with(given.arguments, new)
            return tuple(changed[i] for i in range(len(args))), {key: changed[key] for key in kwargs}

        return hook

    def leave(name: str) -> Any:
        def hook(_: nn.Module, __: tuple, output: Any) -> Any:
            new = at(name, "output", output)
            return _with(output, new) if new else None

        return hook

    try:
        for name in {p.module for p in points if p.side == "input"}:
            handles.append(_module(modules, name).register_forward_pre_hook(enter(name), with_kwargs=True))
        for name in {p.module for p in points if p.side == "output"}:
            handles.append(_module(modules, name).register_forward_hook(leave(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _parts(value: Any, part: str = "") -> dict[str, torch.Tensor]:
    """The tensor that is `part` of a value, or else every floating-point tensor inside it, each once."""
    held = dict(tensors(value))
    if part in held:
        return {part: held[part]}
    inside: dict[int, str] = {}
    for name, tensor in held.items():
        if tensor.is_floating_point() and name.startswith(f"{part}." if part else ""):
            inside.setdefault(id(tensor), name)
    return {name: held[name] for name in inside.values()}


def tensors(value: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in dicts, tuples, lists and dataclasses.

    Args:
        value: what to search.
        path: keys that lead to `value`.

    Yields:
        Each tensor after its keys, joined by dots; "" for a tensor that stands alone.

    >>> [name for name, _ in tensors({"out": torch.ones(1), "maps": [torch.ones(1)]})]
    ['out', 'maps.0']
    """
    if isinstance(value, torch.Tensor):
        yield path, value
    for key, held in _children(value):
        yield from tensors(held, f"{path}.{key}" if path else str(key))


def _children(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, _Given):
        return [("", value.first), *_children(value.arguments)]
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, (tuple, list)):
        return list(enumerate(value))
    if is_dataclass(value) and not isinstance(value, type):
        return [(f.name, getattr(value, f.name)) for f in fields(value)]
    return []


def _described(value: Any) -> str:
    if isinstance(value, _Given):
        value = value.arguments
    names = [name for name, _ in tensors(value)]
    if names == [""]:
        return "one tensor"
    return f"a {type(value).__name__}" + (f" with the parts {', '.join(names[:8])}" if names else "")


@dataclass
class _Given:
    """The arguments of a module: its first tensor, if any, and all of them by position or name."""

    first: torch.Tensor | None
    arguments: dict[Any, Any]


def _given(args: tuple, kwargs: dict) -> _Given:
    arguments = {**dict(enumerate(args)), **kwargs}
    return _Given(next((v for v in arguments.values() if isinstance(v, torch.Tensor)), None), arguments)


def _with(value: Any, new: dict[str, torch.Tensor], path: str = "") -> Any:
    """`value` with the tensors at some paths replaced; itself if there are none."""
    if path in new:
        return new[path]
    changed = {}
    for key, held in _children(value):
        other = _with(held, new, f"{path}.{key}" if path else str(key))
        if other is not held:
            changed[key] = other
    if not changed:
        return value
    if isinstance(value, (tuple, list)):
        held = [changed.get(i, v) for i, v in enumerate(value)]
        return value._make(held) if hasattr(value, "_make") else type(value)(held)
    value = copy.copy(value)
    for key, other in changed.items():
        if isinstance(value, Mapping):
            value[key] = other  # type: ignore[index]  # a dict of some kind, or it could not be made anew
        else:
            object.__setattr__(value, key, other)  # a dataclass, frozen or not
    return value


def _module(modules: dict[str, nn.Module], name: str) -> nn.Module:
    if name not in modules:
        close = [m for m in modules if name.rsplit(".", 1)[-1] in m][:5]
        raise UnsupportedModel(
            f"capturing features: there is no module {name!r} in this network"
            + (f"; near it: {', '.join(close)}" if close else "")
        )
    return modules[name]


@torch.library.custom_op("mimicut::seam_mark", mutates_args=())
def _seam_mark(x: torch.Tensor, point: int) -> torch.Tensor:
    """Marks a seam point in a traced graph; it computes nothing."""
    return x.clone()


@_seam_mark.register_fake
def _(x: torch.Tensor, point: int) -> torch.Tensor:
    return torch.empty_like(x)


@contextmanager
def marking(model: nn.Module, points: Sequence[SeamPoint]) -> Iterator[list[tuple[int, SeamPoint]]]:
    """Leave a mark in the traced graph where each point's tensor passes, with hooks that are removed on leaving.

    Args:
        model: the network that is traced inside the `with` block.
        points: where to mark. A point at which a module returns or takes several tensors stands for all of them.

    Yields:
        A list that fills while `model` runs: what mark 0, 1, ... stands for, as the number of the point that was asked
        for and the point itself.

    Raises:
        UnsupportedModel: no tensor passes at a point, or the network has no such module.
    """
    calls: dict[tuple[str, str], int] = {}
    found: list[tuple[int, SeamPoint]] = []

    def mark(module: str, side: str, value: Any) -> dict[str, torch.Tensor]:
        call = calls[module, side] = calls.get((module, side), -1) + 1
        new: dict[str, torch.Tensor] = {}
        for i, point in enumerate(points):
            if (point.module, point.side, point.call) != (module, side, call):
                continue
            parts = _parts(value, point.part)
            if not parts:
                raise UnsupportedModel(
                    f"finding the seam: {point} gives {_described(value)}, expected one tensor or several"
                )
            for part, tensor in parts.items():
                new[part] = _seam_mark(new.get(part, tensor), len(found))
                found.append((i, SeamPoint(module, side, call, part)))
        return new

    with _hooks(model, points, mark):
        yield found
