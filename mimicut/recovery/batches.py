"""Batches of the few images: random views of them, mixed without labels, where the network is, as it takes them."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mimicut.base.errors import InputError
from mimicut.inputs.augment import MIXES, VIEWS

Batch = tuple[tuple, dict[str, Any]]


class Source(Protocol):
    """What is needed of the images; `images.ImageSet` is one. A view is a tensor or (args, kwargs) of the network."""

    def __len__(self) -> int: ...
    def view(self, indices: list[int], views: str, generator: torch.Generator) -> Any: ...


def count(few: Source | Tensor) -> int:
    if isinstance(few, Tensor) and not (few.is_floating_point() and few.ndim > 1):
        raise InputError(
            f"reading the few images: they are a {few.dtype} tensor of shape {tuple(few.shape)}, expected floats with "
            "images on axis 0, as the teacher takes them; images.read_images prepares raw ones"
        )
    if not len(few):
        raise InputError("reading the few images: there are no images; give at least one, better 50")
    return len(few)


def told_apart(few: Source | Tensor) -> list[Any]:
    """A key for each image: the same for images whose pixels are the same, where the source can tell."""
    if isinstance(few, Tensor):
        return [hashlib.sha256(image.detach().cpu().contiguous().view(torch.uint8).numpy()).digest() for image in few]
    return list(getattr(few, "hashes", range(len(few))))


def view(few: Source | Tensor, indices: list[int], views: str, generator: torch.Generator) -> Any:
    if not isinstance(few, Tensor):
        return few.view(indices, views, generator)
    if views not in VIEWS or (views != "none" and few.ndim != 4):
        raise InputError(
            f"making views: found the views {views!r} for a tensor of shape {tuple(few.shape)}; "
            f"known for images (n, C, H, W): {', '.join(VIEWS)}; for anything else: none"
        )
    if views == "none":
        return few[indices]
    return torch.stack([VIEWS[views].apply(few[i], tuple(few.shape[2:]), "bilinear", generator) for i in indices])


@dataclass(frozen=True)
class _Subset:
    few: Source
    indices: list[int]

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def hashes(self) -> list[Any]:
        keys = told_apart(self.few)
        return [keys[i] for i in self.indices]

    def view(self, indices: list[int], views: str, generator: torch.Generator) -> Any:
        return self.few.view([self.indices[i] for i in indices], views, generator)


def subset(few: Source | Tensor, indices: list[int]) -> Source | Tensor:
    """Some of the images."""
    return few[indices] if isinstance(few, Tensor) else _Subset(few, list(indices))


def placed(batch: Any, device: torch.device, dtype: torch.dtype) -> Batch:
    """(args, kwargs) of the network's call, its tensors on `device`, those of floats in `dtype`."""

    def put(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype if value.is_floating_point() else None)

    args, kwargs = ((batch,), {}) if isinstance(batch, Tensor) else batch
    return tuple(map(put, args)), {key: put(value) for key, value in kwargs.items()}


def copied(batch: Batch) -> Batch:
    """`batch` with tensors of its own: a network may write into what it is given."""
    args, kwargs = batch

    def copy(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) else value

    return tuple(map(copy, args)), {key: copy(value) for key, value in kwargs.items()}


def mixed(batch: Batch, mixing: str, generator: torch.Generator, share: float = 1.0) -> Batch:
    """`batch` with every image of it mixed with another one, by the name in `augment.MIXES`; or the first `share`.

    The images are the float tensors of three axes and more; what else the network takes stays as it is.
    """
    args, kwargs = batch
    state = generator.get_state()

    def mix(value: Any) -> Any:
        if not (isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 2):
            return value
        generator.set_state(state)  # several inputs of one image are mixed alike
        found = MIXES[mixing](value, generator)
        first = round(share * len(value))
        return found if first == len(value) else torch.cat([found[:first], value[first:]])

    return tuple(map(mix, args)), {key: mix(value) for key, value in kwargs.items()}


class Passes:
    """Endless passes over the images, each in a new order; what is left of a pass and fills no batch is dropped.

    Iterating gives batches on `device` in `dtype`. rise: over so many batches the share of each that is mixed rises
    from none to all of it. `state` says where it stands, `go_to` brings another one there.
    """

    def __init__(
        self,
        few: Source | Tensor,
        size: int,
        views: str,
        mixing: str,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        rise: int = 0,
    ):
        self._few, self._size, self._views, self._mixing = few, min(size, count(few)), views, mixing
        self._rise, self._made = rise, 0
        self._device, self._dtype = device, dtype
        self._draws = {name: torch.Generator().manual_seed(seed) for name in ("order", "views", "mixes")}
        self._begin()

    def _begin(self) -> None:
        self._order_before = self._draws["order"].get_state()
        self._order = torch.randperm(count(self._few), generator=self._draws["order"]).tolist()
        self._at = 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._at + self._size > len(self._order):
            self._begin()
        indices = self._order[self._at : self._at + self._size]
        self._at += self._size
        batch = placed(view(self._few, indices, self._views, self._draws["views"]), self._device, self._dtype)
        self._made += 1
        share = min(1.0, self._made / self._rise) if self._rise else 1.0
        return batch if self._mixing == "none" else mixed(batch, self._mixing, self._draws["mixes"], share)

    def state(self) -> tuple[dict[str, Tensor], int]:
        """States of the generators, that of the order from before this pass, and the place in the pass."""
        states = {name: draws.get_state() for name, draws in self._draws.items()}
        return states | {"order": self._order_before.clone()}, self._at

    def go_to(self, states: dict[str, Tensor], at: int, made: int) -> None:
        """made: how many batches there were until then."""
        for name, draws in self._draws.items():
            draws.set_state(states[name])
        self._begin()
        self._at, self._made = at, made
