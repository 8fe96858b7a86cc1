"""Samples for networks that take other inputs than images: several tensors, volumes, clips.

The contract: every sample is what the network takes, *already prepared by the caller*, without the axis of the batch.
Nothing is resized, normalised or varied at random; nothing here reads a label. `volumes` reads files of such samples.
"""

import hashlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mimicut.base.errors import InputError

Key = int | str  # the place of an input among the positional ones, or its name


class InputSource:
    """A finite, ordered set of samples, of which each is one or several tensors; for `compress` and every step of it.

    It stands where an `ImageSet` would. All samples are held in memory. Their order, and the split, are fixed.

    >>> pairs = InputSource({"image": torch.zeros(5, 3, 8, 8), "mask": torch.zeros(5, 1, 8, 8)})
    >>> len(pairs), sorted(pairs.batch([0, 1])[1])
    (5, ['image', 'mask'])

    Args:
        samples: Tensors or arrays for all samples, with the samples on axis 0: {name: (N, ...)} for inputs given by
            name, or one (N, ...). Or a sequence or map-style Dataset of samples: {name: (...)}, a tuple of inputs in
            order, or one tensor. Numbers are tensors without axes. Floats become float32; other types stay.
        keys: Which inputs a sample has: the names to take from dictionaries, or how many to take from tuples. What else
            they hold (labels) is not read, and a note says so. None takes everything.
        optional: Further names to take from dictionaries that have them.
        names: A name for each sample, for messages; by default "sample 7".
        notes: Sentences that a person should see.

    Attributes:
        names, notes: As given.
        hashes, contents: SHA-256 (hex) of each sample's tensors.
        duplicates: (name, name of the first equal sample).
        skipped: Always empty.
        floats: Always True: samples are already prepared.
        preprocessing: Always None.

    Raises:
        InputError: There are no samples, or they differ in their inputs, shapes or types, or hold NaN or infinities.
    """

    def __init__(
        self,
        samples: Any,
        *,
        keys: Sequence[str] | int | None = None,
        optional: Sequence[str] = (),
        names: Sequence[str] | None = None,
        notes: Iterable[str] = (),
    ):
        found, unread = [], ""
        for i, item in enumerate(_listed(samples)):
            wanted = _with_optional(item, keys, optional)
            found.append(_sample(item, wanted, i))
            unread = unread or _unread(item, found[-1])
        if not found:
            raise InputError("reading samples: found none; give at least 3 of what the network will see")
        for i, sample in enumerate(found):
            if _form(sample) != _form(found[0]):
                raise InputError(
                    f"reading sample {i}: found {_in_words(sample)}, expected what sample 0 has, {_in_words(found[0])}"
                )
        self._samples = found
        self.names = [f"sample {i}" for i in range(len(found))] if names is None else list(names)
        self.contents = [_digest(sample) for sample in found]
        self.hashes = list(self.contents)
        first: dict[str, str] = {}
        seen = [(n, first.setdefault(c, n)) for n, c in zip(self.names, self.contents, strict=True)]
        self.duplicates = [(name, other) for name, other in seen if name != other]
        self.notes = [*notes, *([unread] if unread else [])]
        self.skipped: list[tuple[str, str]] = []
        self.floats, self.preprocessing = True, None

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def call(self) -> dict[str, Any]:
        """How the network takes a sample, as plain data for a plan: {"inputs": [name or None, shape, type] of each}."""
        inputs = [
            [key if isinstance(key, str) else None, list(t.shape), str(t.dtype).removeprefix("torch.")]
            for key, t in self._samples[0].items()
        ]
        return {"keyword": None, "options": {}, "inputs": inputs}

    def batch(self, indices: Iterable[int] | None = None) -> Any:
        """Samples as the network takes them: (args, kwargs), or a tensor where one is its only input.

        Args:
            indices: Which samples; all where that is None.
        """
        chosen = [self._samples[int(i)] for i in (range(len(self)) if indices is None else indices)]
        stacked = {key: torch.stack([sample[key] for sample in chosen]) for key in self._samples[0]}
        if list(stacked) == [0]:
            return stacked[0]
        args = tuple(tensor for key, tensor in stacked.items() if isinstance(key, int))
        return args, {key: tensor for key, tensor in stacked.items() if isinstance(key, str)}

    def view(self, indices: Iterable[int], views: str, generator: torch.Generator) -> Any:
        """As `batch`: samples have no random variants, since nothing says which the network's task allows."""
        return self.batch(indices)

    def subset(self, indices: Iterable[int]) -> "InputSource":
        """The samples at `indices`, in that order."""
        chosen = list(indices)
        made = object.__new__(InputSource)
        made.__dict__.update(self.__dict__, notes=[], duplicates=[])
        for name in ("_samples", "names", "contents", "hashes"):
            setattr(made, name, [getattr(self, name)[i] for i in chosen])
        return made

    def distinct(self) -> "InputSource":
        """The samples without repeats."""
        copies = {name for name, _ in self.duplicates}
        return self.subset([i for i, name in enumerate(self.names) if name not in copies])

    def keeping(self, views: str | None, memory_bytes: int) -> "InputSource":
        """The same: samples are always in memory."""
        return self

    def decoded_again(self, keep: str = "evaluated") -> int:
        """How many samples are not held in memory: none."""
        return 0

    def shared_with(self, other: Any) -> list[tuple[str, str]]:
        """(name here, name there) of equal samples in both sets."""
        there = dict(zip(reversed(other.contents), reversed(other.names), strict=True))
        return [(n, there[c]) for n, c in zip(self.names, self.contents, strict=True) if c in there]


@dataclass(frozen=True)
class Inputs:
    """What a network takes that is not one batch of images (N, C, H, W).

    Attributes:
        keys: The names of its inputs, or how many there are where they have none.
        depth: Number of frames, or of slices, of its only input; None where any will do.
        optional: The names of inputs that it can do without.
    """

    keys: Sequence[str] | int
    depth: int | None = None
    optional: Sequence[str] = ()


def inputs_of(model: nn.Module, example: Any) -> Inputs | None:
    """Which inputs a network takes; None for a batch of images.

    Args:
        model: The network.
        example: The (args, kwargs) that it is traced with, where the user gave one. Without it the parameters of its
            forward method that have no default count, and whether it convolves volumes first.
    """
    if example is None:
        given = inspect.signature(model.forward).parameters.values()
        single = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        names = [p.name for p in given if p.default is p.empty and p.kind in single]
        if len(names) > 1:
            return Inputs(names, optional=tuple(p.name for p in given if p.default is not p.empty))
        first = next((m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)), None)
        return Inputs(1) if isinstance(first, nn.Conv3d) else None
    args, kwargs = example
    named = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
    tensors = [*(a for a in args if isinstance(a, Tensor)), *named.values()]
    if len(tensors) != len(args) + len(named) or (args and named) or not tensors:
        return None
    if len(tensors) == 1 and tensors[0].dim() == 4:
        return None
    depth = tensors[0].shape[2] if len(tensors) == 1 and tensors[0].dim() == 5 else None
    return Inputs(list(named) if named else len(args), depth)


def recorded_inputs(call: Mapping[str, Any] | None) -> Inputs | None:
    """The same from a plan's record (`InputSource.call`)."""
    if call is None or "inputs" not in call:
        return None
    names, shapes = [name for name, _, _ in call["inputs"]], [shape for _, shape, _ in call["inputs"]]
    depth = shapes[0][1] if len(shapes) == 1 and len(shapes[0]) == 4 else None
    return Inputs(names if None not in names else len(names), depth)


def _listed(samples: Any) -> Iterator[Any]:
    if isinstance(samples, Mapping):
        lengths = {name: len(values) for name, values in samples.items()}
        if len(set(lengths.values())) > 1:
            raise InputError(f"reading samples: found {lengths} of them, expected as many for each input")
        return ({name: values[i] for name, values in samples.items()} for i in range(next(iter(lengths.values()), 0)))
    if not (hasattr(samples, "__getitem__") and hasattr(samples, "__len__")):
        raise InputError(
            f"reading samples: found a {type(samples).__name__}, expected a dictionary of tensors, a tensor, or a list "
            "or Dataset with __len__ and __getitem__ (for a loader, give its dataset)"
        )
    return (samples[i] for i in range(len(samples)))


def _with_optional(item: Any, keys: Sequence[str] | int | None, optional: Sequence[str]) -> Sequence[str] | int | None:
    """`keys`, and those optional ones that a sample has."""
    if not isinstance(item, Mapping) or keys is None or isinstance(keys, int):
        return keys
    return [*keys, *(name for name in optional if item.get(name) is not None and name not in keys)]


def _unread(item: Any, sample: Mapping[Key, Tensor]) -> str:
    """A note on what a sample holds besides its inputs; "" for nothing."""
    if isinstance(item, Mapping):
        names = [str(name) for name in item if name not in sample]
        return f"what the samples hold besides the network's inputs is not read: {', '.join(names)}" if names else ""
    if isinstance(item, (tuple, list)) and len(item) > len(sample):
        return (
            f"the network takes {len(sample)} inputs, and the samples hold {len(item)} values: those after the first "
            f"{len(sample)} are not read (name inputs in dictionaries if they should be)"
        )
    return ""


def _sample(item: Any, keys: Sequence[str] | int | None, number: int) -> dict[Key, Tensor]:
    """One sample's inputs by place or name."""
    if isinstance(item, Mapping):
        chosen: Iterable[Any] = item if keys is None or isinstance(keys, int) else keys
        absent = [key for key in chosen if key not in item]
        if absent:
            raise InputError(
                f"reading sample {number}: found {', '.join(map(str, item))}, expected {', '.join(map(str, chosen))}"
            )
        return {key: _tensor(item[key], f"{key} of sample {number}") for key in chosen}
    if isinstance(item, (tuple, list)):
        count = len(item) if keys is None else keys if isinstance(keys, int) else len(keys)
        if len(item) < count:
            raise InputError(f"reading sample {number}: found {len(item)} inputs, expected {count}")
        return {i: _tensor(item[i], f"input {i} of sample {number}") for i in range(count)}
    wanted = 1 if keys is None else keys if isinstance(keys, int) else len(keys)
    if wanted != 1:
        raise InputError(
            f"reading sample {number}: found one {type(item).__name__}, and the network takes {wanted} inputs; "
            "expected a dictionary or a tuple of them"
        )
    return {0: _tensor(item, f"sample {number}")}


def _tensor(value: Any, what: str) -> Tensor:
    if isinstance(value, (Number, np.ndarray)):
        value = torch.as_tensor(value)
    if not isinstance(value, Tensor):
        raise InputError(
            f"reading {what}: found a {type(value).__name__}, expected a tensor, an array or a number, prepared as the "
            "network takes it"
        )
    value = value.detach().cpu()
    if value.is_floating_point():
        value = value.float()
        if not bool(value.isfinite().all()):
            raise InputError(f"reading {what}: found NaN or infinite values, expected none; repair or remove it")
    return value.contiguous()


def _form(sample: Mapping[Key, Tensor]) -> list[Any]:
    return [(key, t.shape, t.dtype) for key, t in sample.items()]


def _in_words(sample: Mapping[Key, Tensor]) -> str:
    return ", ".join(f"{key} {tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for key, t in sample.items())


def _digest(sample: Mapping[Key, Tensor]) -> str:
    digest = hashlib.sha256()
    for key, tensor in sample.items():
        digest.update(f"{key}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()
