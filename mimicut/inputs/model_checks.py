"""A model that is to be a teacher: unwrapped, in eval mode, on the CPU, in float32, and without damage."""

from typing import Any

import torch
from torch import nn

from mimicut.base.errors import InputError, UnsupportedModel
from mimicut.base.guard import named_tensors

_QUANTISED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")  # packages of torch's quantised layers
_SEVERAL = 4  # networks that a message names


def network_in(model: Any, spec: str, notes: list[str]) -> Any:
    """The network inside an object that wraps it: a pipeline, a trainer, a module of Lightning, a YOLO.

    Args:
        model: What the user gave. A module with a `forward` of its own is returned as it is.
        spec: The name of the teacher, for messages.
        notes: Gets a sentence on what was taken.

    Returns:
        The only module with parameters that the object holds; `model` itself where it holds none.

    Raises:
        InputError: It holds several; they are named.
    """
    own = isinstance(model, nn.Module)
    if own and ("forward" in vars(model) or getattr(type(model), "forward", None) is not nn.Module.forward):
        return model
    if isinstance(model, type) or not hasattr(model, "__dict__"):
        return model
    held = {**vars(model), **(model._modules if own else {})}
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, value in held.items():
        if isinstance(value, nn.Module) and next(value.parameters(), None) is not None:
            found.setdefault(id(value), (name, value))
    kind = type(model).__name__
    if len(found) > 1:
        parts = ", ".join(f"{name} ({type(value).__name__})" for name, value in list(found.values())[:_SEVERAL])
        raise InputError(
            f"loading the teacher {spec}: found a {kind}, which holds {len(found)} networks: {parts}; expected one: "
            f"give the one that takes the images, such as object.{next(iter(found.values()))[0]}"
        )
    if not found:
        return model
    name, inner = next(iter(found.values()))
    notes.append(f"taken out of the {kind} around it: its attribute {name!r}, a {type(inner).__name__}, is the network")
    return network_in(inner, spec, notes)


def checked_model(model: Any, spec: str, notes: list[str]) -> nn.Module:
    """`model` itself, taken out of its wrappers and set to eval mode, on the CPU, in float32.

    Args:
        model: What a builder returned.
        spec: The name of the teacher, for messages.
        notes: Gets a sentence for each change.

    Raises:
        InputError: It is no nn.Module.
        UnsupportedModel: It is TorchScript or quantised, wholly or in a part, has tensors without shape or data, or has
            no parameters.
    """
    model = network_in(model, spec, notes)
    for wrapper, inner in ((nn.DataParallel, "module"), (nn.parallel.DistributedDataParallel, "module")):
        if isinstance(model, wrapper):
            model = getattr(model, inner)
            notes.append(f"taken out of its {wrapper.__name__} wrapper")
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        model = model._orig_mod
        notes.append("taken out of its torch.compile wrapper")
    if not isinstance(model, nn.Module):
        raise InputError(
            f"loading the teacher {spec}: found a {type(model).__name__}, expected an nn.Module, or an object that "
            "holds one in an attribute"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModel(
            f"loading the teacher {spec}: found a TorchScript module, which cannot be cut; give the Python module"
        )
    require_float_modules(model, spec)
    tensors = named_tensors(model)
    for name, tensor in tensors.items():
        if nn.parameter.is_lazy(tensor):
            raise UnsupportedModel(
                f"loading the teacher {spec}: {name} has no shape yet; run one forward pass in the builder"
            )
        if tensor.is_meta:
            raise UnsupportedModel(
                f"loading the teacher {spec}: {name} is on the meta device, without data; build it on the CPU"
            )
    if not any(isinstance(t, nn.Parameter) for t in tensors.values()):
        raise UnsupportedModel(
            f"loading the teacher {spec}: {type(model).__name__} has no parameters, nothing to compress"
        )
    other = sorted({str(t.dtype) for t in tensors.values() if t.is_floating_point() and t.dtype != torch.float32})
    if other:
        notes.append(f"converted from {', '.join(other)} to float32")
    return model.to(device="cpu", dtype=torch.float32).eval()


def require_float_modules(model: nn.Module, spec: str) -> None:
    """Raises: UnsupportedModel where a part of the model is TorchScript, or was quantised and has no weights in
    floating point left."""
    for name, module in model.named_modules():
        where = f"{name} ({type(module).__name__})"
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedModel(
                f"loading the teacher {spec}: its part {where} is TorchScript, which cannot be copied or cut; give the "
                "Python module in its place"
            )
        kind = type(module).__module__
        packed = any(isinstance(v, torch.ScriptObject) for v in vars(module).values())
        if packed or (kind.startswith(_QUANTISED) and ".qat" not in kind and hasattr(module, "scale")):
            raise UnsupportedModel(
                f"loading the teacher {spec}: its part {where} is quantised, with whole numbers for weights, which "
                "cannot be cut or trained; give the network as it was before it was quantised, and export the student "
                "with --to int8"
            )


def refuse_damaged(model: nn.Module, spec: str) -> None:
    """Refuse weights that hold NaN or infinite values.

    Raises:
        UnsupportedModel: It names the first tensor that does.
    """
    parameters = dict(model.named_parameters())
    for name, tensor in named_tensors(model).items():
        if not tensor.is_floating_point():
            continue
        # A buffer may hold infinities by intent (masks, limits of a clamp), but no statistics do.
        finite = name in parameters or name.rpartition(".")[2].startswith("running_")
        broken = ~torch.isfinite(tensor) if finite else tensor.isnan()
        if bool(broken.any()):
            bad = int(broken.sum())
            raise UnsupportedModel(
                f"checking the teacher {spec}: {name} holds {bad} NaN or infinite values, expected none; "
                "the weights are damaged, take another copy"
            )
