"""Reads a file of weights into a model: tensors only, matched by name and shape, nothing unpickled.

Names may carry the prefixes that wrappers add. What does not fit is named, and the model stays as it was.
"""

import difflib
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mimicut.base.errors import InputError, one_line


def load_weights(model: nn.Module, path: Path, spec: str, notes: list[str]) -> None:
    """Read a file of weights into a model.

    Args:
        model: Gets the weights; on an error it stays as it was.
        path: A safetensors file, or a state dict saved by torch.save.
        spec: The name of the teacher, for messages.
        notes: Gets a sentence for each adaptation.

    Raises:
        InputError: The file is no state dict, or differs from the model; the message names the first difference.
    """
    own, found = model.state_dict(), _stripped(_read_weights(path, notes), model.state_dict(), notes)
    absent = [k for k in own if k not in found and k.endswith("num_batches_tracked")]  # absent before torch 0.4.1
    found.update({k: own[k] for k in absent})
    auxiliary = [k for k in found if k not in own and re.match(r"(aux\d*|AuxLogits|aux_classifier)\.", k)]
    if auxiliary:
        notes.append(f"{len(auxiliary)} tensors of auxiliary heads in {path.name} are not used")
        found = {k: v for k, v in found.items() if k not in auxiliary}
    differences = list(_differences(own, found))
    if differences:
        resized = [found[k].shape for k, _ in differences if k in own and k in found and found[k].shape != own[k].shape]
        heads = {shape[0] if shape else 0 for shape in resized} if len(resized) == len(differences) else set()
        hint = f"build it with --num-classes {heads.pop()}" if len(heads) == 1 else ""
        raise InputError(
            f"loading the weights {path} into {spec}: {len(differences)} difference(s) ({len(own)} tensors expected, "
            f"{len(found)} found); the first: {differences[0][1]}; {hint or 'these are the weights of another network'}"
        )
    other = sorted({str(t.dtype) for t in found.values() if t.is_floating_point() and t.dtype != torch.float32})
    if other:
        notes.append(f"weights in {path.name} converted from {', '.join(other)} to float32")
    model.load_state_dict(found)


def _differences(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """(key, sentence), in the model's order, unexpected ones last."""
    for key, tensor in own.items():
        if key not in found:
            near = difflib.get_close_matches(key, found, 1)
            yield key, f"{key} is missing" + (f" (nearest: {near[0]})" if near else "")
        elif found[key].shape != tensor.shape:
            yield key, f"{key} has shape {tuple(found[key].shape)}, expected {tuple(tensor.shape)}"
        elif found[key].is_floating_point() != tensor.is_floating_point():
            yield key, f"{key} is {found[key].dtype}, expected {tensor.dtype}"
    yield from ((key, f"{key} is not expected") for key in found if key not in own)


def _read_weights(path: Path, notes: list[str]) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"loading weights: there is no file {path}; check the path")
    with path.open("rb") as stream:
        start = stream.read(9)
    try:
        if start[8:9] == b"{":  # by content: a safetensors file begins with a length and a JSON header
            from safetensors.torch import load_file

            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error below says what a TorchScript archive is
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        whole = "Unsupported" in str(error) or "TorchScript" in str(error)
        raise InputError(
            f"loading the weights {path}: "
            + (
                "it holds a whole model or other objects, which run code when read, expected tensors only; where you "
                "trust it, torch.save(model.state_dict(), FILE) or safetensors.torch.save_file"
                if whole
                else f"{one_line(error)}; damaged, or neither .safetensors nor a state dict saved by torch.save"
            )
        ) from error
    for key in ("state_dict", "model_state_dict", "model", "net"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            notes.append(f"weights taken from {key!r} inside {path.name}")
            loaded = loaded[key]
    strangers = [k for k, v in loaded.items() if not isinstance(v, Tensor)] if isinstance(loaded, Mapping) else []
    if not isinstance(loaded, Mapping) or strangers or not loaded:
        found = f"a mapping with {strangers[:3]}" if strangers else f"an empty or other {type(loaded).__name__}"
        raise InputError(f"loading the weights {path}: found {found}, expected a state dict: names and tensors")
    return dict(loaded)


def _stripped(found: dict[str, Tensor], own: Mapping[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """`found` under the model's own names: without the prefixes that wrappers add."""
    again = True
    while again and not own.keys() & found.keys():
        again = False
        for prefix in ("module.", "_orig_mod.", "model.", "net.", "backbone."):
            if all(k.startswith(prefix) for k in found):
                notes.append(f"prefix {prefix!r} removed from the names of the weights")
                found, again = {k.removeprefix(prefix): v for k, v in found.items()}, True
    # torchvision's published densenets still carry names with dots that attributes cannot have.
    # Source: torchvision.models.densenet, which renames them in the same way.
    return {re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)", r"\1\2", k): v for k, v in found.items()}
