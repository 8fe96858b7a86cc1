"""Where the body ends and the head begins, and how the features there are captured."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from understudy.errors import UnsupportedModel


@dataclass(frozen=True)
class SeamPoint:
    """One place whose tensor the student must imitate.

    module: qualified name, "" for the whole network. side: "output" or "input" (its first tensor argument).
    call: which call of that module in one forward pass, from 0 (a module may be used several times).
    """

    module: str
    side: str = "output"
    call: int = 0

    def __str__(self) -> str:
        return f"{self.module or '<model>'}:{self.side}" + (f"@{self.call}" if self.call else "")

    @classmethod
    def parse(cls, text: str) -> "SeamPoint":
        """Read "layer4", "avgpool:input" or "block:output@2"."""
        module, _, side = text.partition(":")
        side, _, call = (side or "output").partition("@")
        if side not in ("input", "output") or (call and not call.isdigit()):
            raise UnsupportedModel(
                f"reading the seam point {text!r}: found side {side!r}, call {call!r}; "
                "expected MODULE, MODULE:input, MODULE:output or MODULE:output@CALL"
            )
        return cls(module, side, int(call or 0))


@dataclass(frozen=True)
class Seam:
    """points: where features are taken; shapes: of one image at each point, batch axis left out, e.g. (512, 7, 7);
    head: names of the parameters and buffers that only act behind the points (they are never changed)."""

    points: tuple[SeamPoint, ...]
    shapes: tuple[tuple[int, ...], ...]
    head: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Seam":
        return cls(
            tuple(SeamPoint(**p) for p in data["points"]),
            tuple(tuple(s) for s in data["shapes"]),
            tuple(data["head"]),
        )


class _Stop(Exception):
    """Ends a forward pass once every point has been captured."""


class Capture:
    """Runs a network with hooks at its seam. Built by `capturing`, which removes them."""

    def __init__(self, model: nn.Module, seam: Seam):
        self._model = model
        self._points = seam.points
        self._calls: dict[tuple[str, str], int] = {}
        self._found: dict[SeamPoint, torch.Tensor] = {}
        self._stop: bool | None = None  # None: not running, so whoever else runs the network is left alone

    def _note(self, module: str, side: str, value: Any) -> None:
        if self._stop is None:
            return
        call = self._calls.get((module, side), 0)
        self._calls[module, side] = call + 1
        point = SeamPoint(module, side, call)
        if point not in self._points:
            return
        if not isinstance(value, torch.Tensor):
            raise UnsupportedModel(
                f"capturing features at seam point {point}: found a {type(value).__name__}, expected one tensor; "
                "name another point with --seam"
            )
        # Layers that run on after this point may overwrite the tensor in place (densenet121 does).
        self._found[point] = value if self._stop and len(self._points) == 1 else value.clone()
        if self._stop and len(self._found) == len(set(self._points)):
            raise _Stop

    def features(self, *args: Any, **kwargs: Any) -> list[torch.Tensor]:
        """One tensor per seam point, batch axis first, in the order of `seam.points`.

        The pass ends at the last point, so the head costs nothing.
        """
        return self._run(True, args, kwargs)[0]

    def features_and_output(self, *args: Any, **kwargs: Any) -> tuple[list[torch.Tensor], Any]:
        """What `features` returns, and what the network returns, from one whole pass."""
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
            return [found[p] for p in self._points], output
        raise UnsupportedModel(
            f"capturing features: the forward pass of {type(self._model).__name__} ended without reaching "
            f"{', '.join(map(str, self._points))}; name points that every pass runs through with --seam"
        )


@contextmanager
def capturing(model: nn.Module, seam: Seam) -> Iterator[Capture]:
    """Hooks that capture the features at `seam`; all of them are gone on leaving."""
    modules = dict(model.named_modules())
    capture = Capture(model, seam)
    handles = []
    try:
        for name in {p.module for p in seam.points if p.side == "input"}:
            handles.append(
                _module(modules, name).register_forward_pre_hook(
                    lambda _, args, kwargs, name=name: capture._note(name, "input", _first(args, kwargs)),
                    with_kwargs=True,
                )
            )
        for name in {p.module for p in seam.points if p.side == "output"}:
            handles.append(
                _module(modules, name).register_forward_hook(
                    lambda _, __, output, name=name: capture._note(name, "output", output)
                )
            )
        yield capture
    finally:
        for handle in handles:
            handle.remove()


def _first(args: tuple, kwargs: dict) -> Any:
    return next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)), None)


def _module(modules: dict[str, nn.Module], name: str) -> nn.Module:
    if name not in modules:
        close = [m for m in modules if name.rsplit(".", 1)[-1] in m][:5]
        raise UnsupportedModel(
            f"capturing features: there is no module {name!r} in this network"
            + (f"; near it: {', '.join(close)}" if close else "")
        )
    return modules[name]


@torch.library.custom_op("understudy::seam_mark", mutates_args=())
def _seam_mark(x: torch.Tensor, point: int) -> torch.Tensor:
    """Marks a seam point in a traced graph; it computes nothing."""
    return x.clone()


@_seam_mark.register_fake
def _(x: torch.Tensor, point: int) -> torch.Tensor:
    return torch.empty_like(x)


@contextmanager
def marking(model: nn.Module, points: "tuple[SeamPoint, ...] | list[SeamPoint]") -> Iterator[None]:
    """Hooks that leave a mark in the traced graph where each point's tensor passes; gone on leaving."""
    modules, handles, calls = dict(model.named_modules()), [], {}

    def mark(name: str, side: str, value: Any) -> Any:
        call = calls[name, side] = calls.get((name, side), -1) + 1
        for i, point in enumerate(points):
            if point == SeamPoint(name, side, call):
                if not isinstance(value, torch.Tensor):
                    raise UnsupportedModel(
                        f"finding the seam: {point} gives a {type(value).__name__}, expected one tensor"
                    )
                value = _seam_mark(value, i)
        return value

    def enter(name: str) -> Any:
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> Any:
            for i, value in enumerate(args):
                if isinstance(value, torch.Tensor):
                    return (*args[:i], mark(name, "input", value), *args[i + 1 :]), kwargs
            key = next((k for k, v in kwargs.items() if isinstance(v, torch.Tensor)), None)
            return args, kwargs if key is None else {**kwargs, key: mark(name, "input", kwargs[key])}

        return hook

    try:
        for name in {p.module for p in points if p.side == "input"}:
            handles.append(_module(modules, name).register_forward_pre_hook(enter(name), with_kwargs=True))
        for name in {p.module for p in points if p.side == "output"}:
            handles.append(
                _module(modules, name).register_forward_hook(lambda _, __, out, name=name: mark(name, "output", out))
            )
        yield
    finally:
        for handle in handles:
            handle.remove()
