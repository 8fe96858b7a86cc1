"""What a stopped run needs to continue to the same result, as tensors and plain data: never pickled."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Checkpoint:
    """tensors: copies on the CPU, by name. data: what JSON can hold."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)

    def under(self, name: str) -> dict[str, Tensor]:
        """The tensors called `name/...`, by the rest of their names."""
        return {
            key.removeprefix(name + "/"): value for key, value in self.tensors.items() if key.startswith(name + "/")
        }


def optimiser_state(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything that an optimiser keeps for its parameters, also in one inside it: "number of the parameter/key"."""
    found = {}
    for number, (owner, parameter) in enumerate(_owners(optimiser)):
        for key, value in owner.state.get(parameter, {}).items():
            found[f"{number}/{key}"] = torch.as_tensor(value).detach().cpu().clone()
    return found


def load_optimiser_state(optimiser: torch.optim.Optimizer, state: dict[str, Tensor]) -> None:
    """Put back what `optimiser_state` gave, into an optimiser of the same parameters."""
    for number, (owner, parameter) in enumerate(_owners(optimiser)):
        mine = {key.partition("/")[2]: value for key, value in state.items() if key.partition("/")[0] == str(number)}
        if mine:
            # A count of steps stays on the CPU, where torch's optimisers keep it unless they are fused.
            stays = not owner.defaults.get("fused")
            owner.state[parameter] = {
                key: value.clone() if value.ndim == 0 and stays else value.to(parameter.device, copy=True)
                for key, value in mine.items()
            }


def _owners(optimiser: torch.optim.Optimizer) -> list[tuple[torch.optim.Optimizer, Tensor]]:
    """Every parameter with the optimiser that moves it, in the order of the outer one."""
    inner: Any = getattr(optimiser, "vectors", None)
    inside = set() if inner is None else {id(p) for group in inner.param_groups for p in group["params"]}
    every = [p for group in optimiser.param_groups for p in group["params"]]
    return [(inner if id(p) in inside else optimiser, p) for p in every]
