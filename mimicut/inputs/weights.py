"""Reads a file of weights into a model: tensors only, matched by name and shape, nothing unpickled.

A file may hold more than the network: wrappers, averages of the weights, optimisers, losses, counters of profilers. The
prefix under which all of the model's names are is looked for, and what remains is named. What does not fit is an error,
and the model stays as it was.
"""

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mimicut.base.errors import InputError
from mimicut.base.paths import usable_path
from mimicut.inputs.checkpoint_file import read_tensors
from mimicut.inputs.file_names import quoted

# Modules that wrap another one and add their name to the names of its tensors.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# What training programs call the network itself, where they save further ones beside it.
_USUAL = {"state_dict", "model_state_dict", "model_state", "model", "net", "network", "params", "weights"}
_AVERAGE = re.compile(r"(^|[._])(ema|swa|averaged?|avg|shadow)\d*([._]|$)", re.IGNORECASE)
# Buffers that profilers leave on modules, and counters; no network computes with them.
_COUNTERS = {"total_ops", "total_params", "n_averaged", "num_batches_tracked"}


def load_weights(model: nn.Module, path: Path, spec: str, notes: list[str]) -> None:
    """Read a file of weights into a model.

    Args:
        model: Gets the weights; on an error it stays as it was.
        path: A safetensors file, or what torch.save wrote: a state dict, a training checkpoint, a model. Where it holds
            the network more than once, "FILE:KEY" names the one to take: the keys and prefixes above its names, joined
            by dots, or some of them that follow one another.
        spec: The name of the teacher, for messages.
        notes: Gets a sentence for each adaptation.

    Raises:
        InputError: The file holds no weights, or those of another model; the message names the first difference. Or it
            holds the network more than once, and it is not said which one to take.
    """
    path, key = _file_and_key(path)
    own = model.state_dict()
    tensors, dropped = _unwrapped(read_tensors(path), own)
    whole = _whole_copies(own, tensors)
    prefix, others = _chosen(whole, key, tensors, own, path) if whole else (_nearest(own, tensors, key, path), [])
    found = _below(prefix, tensors)
    _add_absent(own, found)
    unused = [name for name in found if name not in own and not _part_of_network(name, found[name], own)]
    found = {name: tensor for name, tensor in found.items() if name not in unused}
    differences = list(_differences(own, found))
    if differences:
        raise InputError(_refusal(differences, own, found, path, spec))
    notes.extend(_remarks(path, prefix, others, dropped, tensors, own))
    other = sorted({str(t.dtype) for t in found.values() if t.is_floating_point() and t.dtype != torch.float32})
    if other:
        notes.append(f"weights in {quoted(path.name)} converted from {', '.join(other)} to float32")
    model.load_state_dict(found)


def _file_and_key(path: Path) -> tuple[Path, str]:
    """FILE and KEY of "FILE:KEY"; the key is "" where the whole is a file."""
    path = usable_path(path, "loading weights")
    file, colon, key = str(path).rpartition(":")
    return (Path(file), key) if colon and not path.is_file() and Path(file).is_file() else (path, "")


def _unwrapped(tensors: dict[str, Tensor], own: Iterable[str]) -> tuple[dict[str, Tensor], set[str]]:
    """The tensors under names without those of wrappers, and which wrappers these were."""
    wrappers = _WRAPPERS - {part for name in own for part in name.split(".")}
    found: dict[str, Tensor] = {}
    dropped: set[str] = set()
    for name, tensor in tensors.items():
        parts = name.split(".")
        kept = [part for part in parts if part not in wrappers]
        dropped |= set(parts) & wrappers
        # torchvision's published densenets still carry names with dots that attributes cannot have.
        # Source: torchvision.models.densenet, which renames them in the same way.
        found[re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)", r"\1\2", ".".join(kept))] = tensor
    # Two tensors of one name: what was dropped tells networks apart.
    return (found, dropped) if len(found) == len(tensors) else (tensors, set())


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, under the rest of their names."""
    start = f"{prefix}." if prefix else ""
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def _prefixes(own: Mapping[str, Tensor], tensors: Iterable[str]) -> Counter[str]:
    """For each prefix, how many of the model's names are below it."""
    found: Counter[str] = Counter()
    for name in tensors:
        parts = name.split(".")
        found.update(".".join(parts[:i]) for i in range(len(parts)) if ".".join(parts[i:]) in own)
    return found


def _whole_copies(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """The prefixes below which every tensor of the model is, in its shape; none below another one."""
    fitting = []
    for prefix in _prefixes(own, tensors):
        below = _below(prefix, tensors)
        _add_absent(own, below)
        if all(name in below and not _misfit(tensor, below[name]) for name, tensor in own.items()):
            fitting.append(prefix)
    return [p for p in fitting if not any(p != q and (not q or p.startswith(f"{q}.")) for q in fitting)]


def _add_absent(own: Mapping[str, Tensor], found: dict[str, Tensor]) -> None:
    """Add what files leave out without harm: counters, and the second name of a tensor that the model has twice."""
    places = {t.data_ptr(): found[name] for name, t in own.items() if name in found and t.numel()}
    for name, tensor in own.items():
        if name not in found and name.endswith("num_batches_tracked"):  # absent before torch 0.4.1
            found[name] = tensor
        elif name not in found and tensor.data_ptr() in places and places[tensor.data_ptr()].shape == tensor.shape:
            found[name] = places[tensor.data_ptr()]


def _chosen(
    whole: Sequence[str], key: str, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], path: Path
) -> tuple[str, list[str]]:
    """The prefix of the weights to take, and those of other weights of the same network.

    Raises:
        InputError: None is below `key`, or it is not clear which is meant.
    """
    named = [p for p in whole if p == key] or [p for p in whole if f".{key}." in f".{p}."] if key else list(whole)
    if not named:
        raise InputError(
            f"loading the weights {path}:{key}: found no weights of this network below {key!r}, expected one of "
            f"{', '.join(p or 'none (the file itself)' for p in whole)}"
        )
    plain = [p for p in named if not _AVERAGE.search(p)] or named
    usual = [p for p in plain if set(p.split(".")) <= _USUAL]
    choice = usual[0] if usual and len(plain) > 1 else plain[0]
    differing = [p for p in whole if p != choice and not _same(_below(p, tensors), _below(choice, tensors), own)]
    if not usual and set(plain) & set(differing):
        raise InputError(
            f"loading the weights {path}: it holds weights of this network {len(plain)} times: {', '.join(plain)}; "
            f"say which to take: --weights {path}:{choice}"
        )
    return choice, differing


def _same(a: Mapping[str, Tensor], b: Mapping[str, Tensor], own: Iterable[str]) -> bool:
    return all(torch.equal(a[n], b[n]) for n in own if n in a and n in b)


def _nearest(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], key: str, path: Path) -> str:
    """The prefix with most of the model's names below it, where none has them all.

    Raises:
        InputError: None of them is below `key`.
    """
    counts = _prefixes(own, tensors)
    fitting = [p for p in counts if not key or f".{key}." in f".{p}."]
    if key and not fitting:
        firsts = list(dict.fromkeys(name.split(".")[0] for name in tensors))
        raise InputError(
            f"loading the weights {path}:{key}: found no tensor of this network below {key!r}; the file holds "
            f"{', '.join(firsts[:8])}"
        )
    return max(fitting, key=lambda p: (counts[p], not _AVERAGE.search(p), -len(p)), default="")


def _part_of_network(name: str, tensor: Tensor, own: Iterable[str]) -> bool:
    """Whether a tensor that the model lacks belongs to a part that the model has, so that the file's network computes
    otherwise: a bias, a block. Integers and counters are no weights."""
    first, _, rest = name.partition(".")
    if not tensor.is_floating_point() or name.rpartition(".")[2] in _COUNTERS:
        return False
    return not rest or any(own_name.startswith(f"{first}.") for own_name in own)


def _differences(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """(key, sentence), in the model's order, unexpected ones last."""
    for key, tensor in own.items():
        if key not in found:
            near = difflib.get_close_matches(key, found, 1)
            yield key, f"{key} is missing" + (f" (nearest: {near[0]})" if near else "")
        elif misfit := _misfit(tensor, found[key]):
            yield key, f"{key} {misfit}"
    yield from ((key, f"{key} is not expected") for key in found if key not in own)


def _misfit(own: Tensor, found: Tensor) -> str:
    """How a tensor of the file differs from the model's; "" where it fits."""
    if found.shape != own.shape:
        return f"has shape {tuple(found.shape)}, expected {tuple(own.shape)}"
    return f"is {found.dtype}, expected {own.dtype}" if found.is_floating_point() != own.is_floating_point() else ""


def _refusal(
    differences: Sequence[tuple[str, str]],
    own: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    path: Path,
    spec: str,
) -> str:
    resized = [found[k].shape for k, _ in differences if k in own and k in found and found[k].shape != own[k].shape]
    heads = {shape[0] if shape else 0 for shape in resized} if len(resized) == len(differences) else set()
    hint = f"build it with --num-classes {heads.pop()}" if len(heads) == 1 else ""
    return (
        f"loading the weights {path} into {spec}: {len(differences)} difference(s) ({len(own)} tensors expected, "
        f"{len(found)} found); the first: {differences[0][1]}; {hint or 'these are the weights of another network'}"
    )


def _remarks(
    path: Path,
    prefix: str,
    others: Sequence[str],
    dropped: Iterable[str],
    tensors: Mapping[str, Tensor],
    own: Iterable[str],
) -> Iterator[str]:
    """Sentences about what was taken, what was passed over and what was not used."""
    if prefix:
        yield f"weights taken from {prefix!r} in {quoted(path.name)}"
    wrappers = sorted(dropped)
    if wrappers:
        yield f"the names of wrappers ({', '.join(wrappers)}) removed from the names of the weights"
    for other in others:
        average = _AVERAGE.search(other)
        kind = "an average of them over the training, which often answers better" if average else "other weights"
        yield f"{quoted(path.name)} also holds {kind}, {other!r}: --weights FILE:{other} takes those"
    start = f"{prefix}." if prefix else ""
    used = {start + name for name in own}
    unused = [n for n in tensors if n not in used and not any(n.startswith(f"{other}.") for other in others)]
    if unused:
        groups = Counter(_group(name, prefix) for name in unused)
        named = ", ".join(f"{group} ({number})" for group, number in list(groups.items())[:6])
        more = f" and {len(groups) - 6} more groups" if len(groups) > 6 else ""
        yield f"{len(unused)} tensor(s) in {quoted(path.name)} are not used: {named}{more}"


def _group(name: str, prefix: str) -> str:
    """What an unused tensor is listed under: the counter's name, or its name as far as it leaves the prefix.

    >>> _group("state_dict.criterion.weight", "state_dict.model")
    'state_dict.criterion'
    """
    parts, leading = name.split("."), prefix.split(".") if prefix else []
    if parts[-1] in _COUNTERS:
        return parts[-1]
    shared = next((i for i, (a, b) in enumerate(zip(parts, leading, strict=False)) if a != b), len(leading))
    return ".".join(parts[: shared + 1])
