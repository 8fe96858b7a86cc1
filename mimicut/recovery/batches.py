"""Batches of the few images: random views of them, mixed without labels, placed where the network is."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from mimicut.base.errors import InputError
from mimicut.inputs.augment import MIXES, VIEWS

Batch = tuple[tuple, dict[str, Any]]
"""(args, kwargs) of the network's call."""


class Source(Protocol):
    """Images that can be read by index, such as `image_set.ImageSet`. Views are a tensor or (args, kwargs)."""

    def __len__(self) -> int: ...
    def view(self, indices: list[int], views: str, generator: torch.Generator) -> Any: ...


def count(few: Source | Tensor) -> int:
    """How many images there are. Raises: InputError where there are none, or a tensor is not of floats."""
    if isinstance(few, Tensor) and not (few.is_floating_point() and few.ndim > 1):
        raise InputError(
            f"reading the few images: they are a {few.dtype} tensor of shape {tuple(few.shape)}, expected floats with "
            "images on axis 0, as the teacher takes them; images.read_images prepares raw ones"
        )
    if not len(few):
        raise InputError("reading the few images: there are no images; give at least one, better 50")
    return len(few)


def image_keys(few: Source | Tensor) -> list[Any]:
    """A key for each image: the same for images with the same pixels, where the source knows that."""
    if isinstance(few, Tensor):
        return [hashlib.sha256(image.detach().cpu().contiguous().view(torch.uint8).numpy()).digest() for image in few]
    return list(getattr(few, "hashes", range(len(few))))


def make_views(few: Source | Tensor, indices: list[int], views: str, generator: torch.Generator) -> Any:
    """Make a random view of each of these images.

    Args:
        few: The images.
        indices: Of those wanted.
        views: A name in `augment.VIEWS`; "none" gives the images as they are.
        generator: Random numbers.

    Returns:
        A tensor with images on axis 0, or (args, kwargs) of the network's call.

    Raises:
        InputError: There are no such views, or none for tensors of that shape.
    """
    if not isinstance(few, Tensor):
        return few.view(indices, views, generator)
    if views not in VIEWS or (views != "none" and few.ndim != 4):
        raise InputError(
            f"making views: found the views {views!r} for a tensor of shape {tuple(few.shape)}; "
            f"known for images (n, C, H, W): {', '.join(VIEWS)}; for anything else: none"
        )
    if views == "none":
        return few[indices]
    size = few.shape[2], few.shape[3]
    return torch.stack([VIEWS[views].apply(few[i], size, "bilinear", generator) for i in indices])


@dataclass(frozen=True)
class _Subset:
    few: Source
    indices: list[int]

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def hashes(self) -> list[Any]:
        keys = image_keys(self.few)
        return [keys[i] for i in self.indices]

    def view(self, indices: list[int], views: str, generator: torch.Generator) -> Any:
        return self.few.view([self.indices[i] for i in indices], views, generator)


def subset(few: Source | Tensor, indices: list[int]) -> Source | Tensor:
    """The images with these indices."""
    return few[indices] if isinstance(few, Tensor) else _Subset(few, list(indices))


def place_batch(batch: Any, device: torch.device, dtype: torch.dtype) -> Batch:
    """(args, kwargs) of the network's call, its tensors on `device`, those of floats in `dtype`.

    Args:
        batch: A tensor, or (args, kwargs).
        device: Where to.
        dtype: Of the floats.
    """
    args, kwargs = ((batch,), {}) if isinstance(batch, Tensor) else batch
    return _on_tensors((args, kwargs), lambda t: t.to(device, dtype if t.is_floating_point() else None))


def plain_batches(few: Source | Tensor, size: int, device: torch.device, dtype: torch.dtype) -> Iterator[Batch]:
    """Yield all images as they are, `size` at once, on `device` in `dtype`."""
    images = count(few)
    for start in range(0, images, size):
        indices = list(range(start, min(start + size, images)))
        yield place_batch(make_views(few, indices, "none", torch.Generator()), device, dtype)


def copied(batch: Batch) -> Batch:
    """`batch` with tensors of its own: a network may write into what it is given."""
    return _on_tensors(batch, lambda t: t.clone())


def _on_tensors(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    args, kwargs = batch

    def changed(value: Any) -> Any:
        return change(value) if isinstance(value, Tensor) else value

    return tuple(map(changed, args)), {key: changed(value) for key, value in kwargs.items()}


def count_in(batch: Batch) -> int:
    """How many images a batch has: the length of its first tensor; 1 where there is none."""
    args, kwargs = batch
    return next((len(t) for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.ndim), 1)


def part_of(batch: Batch, images: int, at: slice) -> Batch:
    """The images in `at` of a batch that has `images`."""
    if at == slice(0, images):
        return batch
    return _on_tensors(batch, lambda t: t[at] if t.ndim and len(t) == images else t)


def equal_slices(images: int, parts: int) -> list[slice]:
    """Cut `images` into so many parts of equal size, or nearly.

    >>> equal_slices(5, 2)
    [slice(0, 2, None), slice(2, 5, None)]
    """
    edges = [images * i // parts for i in range(parts + 1)]
    return [slice(a, b) for a, b in pairwise(edges) if b > a]


def repeat_image(one: Batch, images: int) -> Batch:
    """The batch of one image as a batch of `images`, in tensors of its own."""
    return _on_tensors(one, lambda t: torch.cat([t] * images) if t.ndim and len(t) == 1 else t.clone())


def mix_batch(batch: Batch, mixing: str, generator: torch.Generator, share: float = 1.0) -> Batch:
    """Mix the images of a batch with each other.

    Args:
        batch: The images are its float tensors with three axes and more; what else the network takes stays as it is.
        mixing: A name in `augment.MIXES`.
        generator: Random numbers; several inputs of one image are mixed alike.
        share: Which share of the images is mixed, the first ones.
    """
    state = generator.get_state()

    def mix(value: Tensor) -> Tensor:
        if not (value.is_floating_point() and value.ndim > 2):
            return value
        generator.set_state(state)
        found = MIXES[mixing](value, generator)
        first = round(share * len(value))
        return found if first == len(value) else torch.cat([found[:first], value[first:]])

    return _on_tensors(batch, mix)


class Passes:
    """Endless passes over the images, each in a new order. Images left at the end that fill no batch are dropped.

    Args:
        few: The images.
        size: Of a batch; all images where there are fewer.
        views: A name in `augment.VIEWS`.
        mixing: A name in `augment.MIXES`.
        seed: Of the order, the views and the mixing.
        device: Of the batches.
        dtype: Of their floats.
        rise: Over so many batches the share of each that is mixed rises from none to all; 0: all from the first on.
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
        batch = make_views(self._few, indices, self._views, self._draws["views"])
        batch = place_batch(batch, self._device, self._dtype)
        self._made += 1
        share = min(1.0, self._made / self._rise) if self._rise else 1.0
        return batch if self._mixing == "none" else mix_batch(batch, self._mixing, self._draws["mixes"], share)

    def state(self) -> tuple[dict[str, Tensor], int]:
        """The states of the generators, that of the order from before this pass, and the place in the pass."""
        states = {name: draws.get_state() for name, draws in self._draws.items()}
        return states | {"order": self._order_before.clone()}, self._at

    def go_to(self, states: dict[str, Tensor], at: int, made: int) -> None:
        """Continue from what `state` gave after `made` batches."""
        for name, draws in self._draws.items():
            draws.set_state(states[name])
        self._begin()
        self._at, self._made = at, made
