"""Weights that a network computes from other tensors before each pass: weight_norm, spectral_norm, parametrizations and
the masks of `torch.nn.utils.prune`, and hooks of others that work as these do.

In eval mode such a weight is the same in every pass, so the value that it has there can take its place. torch's own
functions for that are not used: `remove_parametrizations` changes a class that all copies of a module share.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from mimicut.base.errors import one_line
from mimicut.base.guard import evaluating, same_bits

_MOST_NAMED = 3
# What such hooks, torch's and others', call the tensors that they compute the weight NAME from: NAME_orig, ...
_SOURCES = ("_orig", "_g", "_v", "_u", "_mask", "_sigma")


def fold_computed_weights(model: nn.Module, notes: list[str]) -> bool:
    """Put plain parameters in place of the weights that `model` computes, in place, with the values of eval mode.

    Args:
        model: What it returns in eval mode is the same, bit for bit, afterwards.
        notes: Gets a sentence on what was folded, and one on each weight that had to stay.

    Returns:
        Whether anything was folded.
    """
    folded: list[str] = []
    masked = any(name.endswith("_mask") for name, _ in model.named_buffers())
    with evaluating(model):
        for prefix, module in list(model.named_modules()):
            for names, fold in _computed(module) if "parametrizations" not in prefix.split(".") else ():
                places = [f"{prefix}.{name}" if prefix else name for name in names]
                try:
                    fold()
                except Exception as error:  # of the user's hook or parametrization
                    notes.append(
                        f"the weight {', '.join(places)} stays computed ({one_line(error)}): it is not solved in "
                        "closed form, and its channels may have to stay; put its value into a plain parameter yourself"
                    )
                else:
                    folded += places
    if folded:
        more = f" and {len(folded) - _MOST_NAMED} more" if len(folded) > _MOST_NAMED else ""
        notes.append(
            "weights that are computed (weight_norm, spectral_norm, parametrizations, pruning masks) were folded into "
            f"plain ones, which changes no output in eval mode: {', '.join(folded[:_MOST_NAMED])}{more}"
            + ("; in the student the zeros of masks may take other values" if masked else "")
        )
    return bool(folded)


def _computed(module: nn.Module) -> Iterator[tuple[list[str], Callable[[], None]]]:
    """The names of weights that `module` computes, and what folds them."""
    if parametrize.is_parametrized(module):
        yield list(_parametrizations(module)), functools.partial(_fold_parametrizations, module)
    hooks: dict[str, list[Any]] = {}
    for hook in module._forward_pre_hooks.values():
        name = getattr(hook, "_tensor_name", None) or getattr(hook, "name", None)
        if isinstance(name, str) and isinstance(vars(module).get(name), Tensor):
            hooks.setdefault(name, []).append(hook)
    for name, every in hooks.items():
        yield [name], functools.partial(_fold_hooks, module, name, every)


def _parametrizations(module: nn.Module) -> dict[str, nn.Module]:
    held = module._modules["parametrizations"]
    assert isinstance(held, nn.ModuleDict)  # as torch makes it
    return dict(held.items())


def _fold_parametrizations(module: nn.Module) -> None:
    values = {}
    for name, made in _parametrizations(module).items():
        values[name] = _constant(functools.partial(getattr, module, name)), _trains(made.parameters(recurse=False))
    del module._modules["parametrizations"]
    module.__class__ = type(module).__bases__[0]  # the class above, which torch made for this, has the properties
    for name, (value, trains) in values.items():
        _set(module, name, value, trains)


def _fold_hooks(module: nn.Module, name: str, hooks: list[Any]) -> None:
    def run() -> Tensor:
        before = vars(module)[name]
        for hook in hooks:
            hook(module, ())
        if vars(module)[name] is before:
            raise ValueError(f"its hook {type(hooks[0]).__name__} does not set it")
        return vars(module)[name]

    value, trains = _constant(run), _trains(module._parameters.get(name + part) for part in _SOURCES)
    for held in (module._forward_pre_hooks, module._state_dict_hooks, module._load_state_dict_pre_hooks):
        for key, hook in list(held.items()):
            hook = getattr(hook, "hook", hook)
            if any(each in (hook, getattr(hook, "fn", None)) for each in hooks):
                del held[key]
    for part in _SOURCES:
        module._parameters.pop(name + part, None)
        module._buffers.pop(name + part, None)
    del vars(module)[name]
    _set(module, name, value, trains)


def _constant(compute: Callable[[], Tensor]) -> Tensor:
    """What `compute` returns, with a memory of its own. Raises: ValueError where it is not the same each time."""
    first = compute().detach().clone()
    if not same_bits(first, compute()):
        raise ValueError("it differs from pass to pass")
    return first


def _trains(sources: Any) -> bool | None:
    """Whether a gradient reaches one of the parameters; None where there are none."""
    found = [p.requires_grad for p in sources if p is not None]
    return any(found) if found else None


def _set(module: nn.Module, name: str, value: Tensor, trains: bool | None) -> None:
    if trains is None:
        module.register_buffer(name, value)
    else:  # by attribute, so that a recurrent layer notices
        setattr(module, name, nn.Parameter(value, requires_grad=trains))
