"""Batches of the few images: random views of them, mixed without labels, placed where the network is."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from mimicut.base import memory
from mimicut.base.errors import InputError
from mimicut.inputs.augment import MIXES, VIEWS
from mimicut.inputs.device_images import images_on, tensor_on
from mimicut.inputs.extra_images import ExtraImages
from mimicut.inputs.image_set import ImageSet, ImagesWithCall

Batch = tuple[tuple, dict[str, Any]]
"""(args, kwargs) of the network's call."""


class Source(Protocol):
    """Images that can be read by index, such as `image_set.ImageSet`. Views are a tensor or (args, kwargs)."""

    def __len__(self) -> int: ...
    def view(self, indices: list[int], views: str, generator: torch.Generator) -> Any: ...


@dataclass(frozen=True)
class WithExtra:
    """The few images, with extra ones beside them that only help to mimic.

    For everything that asks how many images there are, or which, it is the few images alone. Indices from their number
    on are those of the extra ones, which only `Passes` draws.

    Args:
        few: The images of the network's task.
        extra: Any others.
    """

    few: Source | Tensor
    extra: Source | Tensor

    def __len__(self) -> int:
        return len(self.few)

    @property
    def hashes(self) -> list[Any]:
        return image_keys(self.few)

    def view(self, indices: list[int], views: str, generator: torch.Generator) -> Any:
        """Views of these images, in their order."""
        own, others = [i for i in indices if i < len(self)], [i - len(self) for i in indices if i >= len(self)]
        if not others:
            return make_views(self.few, own, views, generator)
        if not own:
            return make_views(self.extra, others, views, generator)
        places = sorted(range(len(indices)), key=lambda place: indices[place] >= len(self))
        order = torch.tensor(places).argsort()
        made = [make_views(*each, views, generator) for each in ((self.few, own), (self.extra, others))]
        return _joined(made[0], made[1], len(own), order)


def _joined(first: Any, second: Any, images: int, order: Tensor) -> Any:
    """The images of both batches in one, in this order; what else the network takes is that of the first one.

    images: How many the first one has.
    """
    if isinstance(first, Tensor):
        many = first.ndim > 0 and len(first) == images
        return torch.cat([first, second.to(first)])[order] if many else first
    if isinstance(first, tuple):
        return tuple(_joined(*pair, images, order) for pair in zip(first, second, strict=True))
    if isinstance(first, dict):
        return {name: _joined(value, second[name], images, order) for name, value in first.items()}
    return first


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
    """The images with these indices; extra ones stay beside them."""
    if isinstance(few, WithExtra):
        return replace(few, few=subset(few.few, indices))
    return few[indices] if isinstance(few, Tensor) else _Subset(few, list(indices))


def on_accelerator(few: Source | Tensor, views: str, device: torch.device) -> Source | Tensor:
    """The images held on `device`, where their views are made too, if it is an accelerator that has room for them
    (TRAINING_IMAGES of what is free); else unchanged."""
    if device.type != "cuda":
        return few
    free, _ = torch.cuda.mem_get_info(device)
    return held_on(few, views, device, int(memory.TRAINING_IMAGES * free))


def held_on(few: Any, views: str, device: torch.device, room: int) -> Any:
    """The images held on `device`, where they fit into `room` bytes and their views can be made (`device_images`);
    extra ones get half of it. What else a network takes stays where it is."""
    if isinstance(few, WithExtra):
        parts = (held_on(each, views, device, room // 2) for each in (few.few, few.extra))
        return WithExtra(*parts)
    if isinstance(few, (ImagesWithCall, ExtraImages)):
        return replace(few, images=held_on(few.images, views, device, room))
    if isinstance(few, ImageSet):
        return images_on(few, views, device, room) or few
    if isinstance(few, Tensor) and few.ndim == 4 and few.nbytes <= room:
        return tensor_on(few, image_keys(few), device)
    return few


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


def images_in_batch(few: Source | Tensor, size: int, extra_share: float) -> tuple[int, int]:
    """How many of the few images and how many extra ones a batch has; of either more where there are few of the other.

    Args:
        few: The images, perhaps with extra ones (`WithExtra`).
        size: Of a batch: it has fewer only where there are fewer images.
        extra_share: The share of a batch that extra images take.

    >>> images_in_batch(torch.zeros(50, 3, 8, 8), 64, 0.5)
    (50, 0)
    >>> images_in_batch(WithExtra(torch.zeros(50, 3, 8, 8), torch.zeros(900, 3, 8, 8)), 64, 0.5)
    (32, 32)
    >>> images_in_batch(WithExtra(torch.zeros(20, 3, 8, 8), torch.zeros(900, 3, 8, 8)), 64, 0.5)
    (20, 44)
    >>> images_in_batch(WithExtra(torch.zeros(50, 3, 8, 8), torch.zeros(3, 3, 8, 8)), 64, 0.5)
    (50, 3)
    """
    own = min(size, count(few))
    if not (isinstance(few, WithExtra) and extra_share):
        return own, 0
    extra = min(count(few.extra), size - min(own, max(1, size - round(extra_share * size))))
    return min(own, size - extra), extra


class Passes:
    """Endless passes over the images, each in a new order. Images left at the end that fill no batch are dropped.

    With extra images beside the few (`WithExtra`), a batch has its full size: a share of it comes from passes over
    them, the rest from passes over the few.

    Args:
        few: The images.
        size: Of a batch; all images where there are fewer and none beside them.
        views: A name in `augment.VIEWS`.
        mixing: A name in `augment.MIXES`.
        seed: Of the order, the views and the mixing.
        device: Of the batches.
        dtype: Of their floats.
        rise: Over so many batches the share of each that is mixed rises from none to all; 0: all from the first on.
        extra_share: Share of a batch for extra images, if there are any.
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
        extra_share: float = 0.0,
    ):
        self._few, self._views, self._mixing = few, views, mixing
        self._rise, self._made = rise, 0
        self._device, self._dtype = device, dtype
        self._draws = {name: torch.Generator().manual_seed(seed) for name in ("views", "mixes")}
        own, extra = images_in_batch(few, size, extra_share)
        self._turns = {"order": _Turns(count(few), own, seed)}
        if isinstance(few, WithExtra) and extra:
            self._turns["extra"] = _Turns(count(few.extra), extra, seed, first=count(few))
            self._draws["places"] = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        indices = [index for turns in self._turns.values() for index in turns.take(self._made)]
        if "places" in self._draws:
            places = torch.randperm(len(indices), generator=self._draws["places"]).tolist()
            indices = [indices[place] for place in places]
        batch = make_views(self._few, indices, self._views, self._draws["views"])
        batch = place_batch(batch, self._device, self._dtype)
        self._made += 1
        share = min(1.0, self._made / self._rise) if self._rise else 1.0
        return batch if self._mixing == "none" else mix_batch(batch, self._mixing, self._draws["mixes"], share)

    def state(self) -> dict[str, Tensor]:
        """The states of the generators; those of the orders from before this pass."""
        states = {name: draws.get_state() for name, draws in self._draws.items()}
        return states | {name: turns.before.clone() for name, turns in self._turns.items()}

    def go_to(self, states: dict[str, Tensor], made: int) -> None:
        """Continue from what `state` gave after `made` batches."""
        for name, draws in self._draws.items():
            draws.set_state(states[name])
        for name, turns in self._turns.items():
            turns.go_to(states[name])
        self._made = made


class _Turns:
    """Which images are in each batch: `size` at a time of an order that is new in each pass.

    Args:
        images: How many there are.
        size: Of a batch, at most as many.
        seed: Of the orders.
        first: Index of the first one.

    before: the generator's state from before this pass.
    """

    def __init__(self, images: int, size: int, seed: int, first: int = 0):
        self._images, self._size, self._first = images, size, first
        self._draws = torch.Generator().manual_seed(seed)
        self._batches = images // size  # in a pass
        self._begin()

    def _begin(self) -> None:
        self.before = self._draws.get_state()
        order = torch.randperm(self._images, generator=self._draws)
        self._order = (self._first + order).tolist()

    def take(self, made: int) -> list[int]:
        """The images of the next batch, after `made`."""
        if made and made % self._batches == 0:
            self._begin()
        at = made % self._batches * self._size
        return self._order[at : at + self._size]

    def go_to(self, before: Tensor) -> None:
        """Begin the pass from before which the generator's state is."""
        self._draws.set_state(before)
        self._begin()
