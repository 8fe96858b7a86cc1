"""How to mimic: the options, each with the source of its default, and the named recipes."""

from dataclasses import asdict, dataclass, field, replace
from math import isfinite
from typing import Any, TypedDict, Unpack

import torch

from mimicut.base.errors import InputError, unknown_option
from mimicut.base.layout import LAYOUTS
from mimicut.inputs.augment import MIXES
from mimicut.recovery.muon import Muon

_MIR = "cited: MiR, arXiv 2201.02620, as read in its public re-implementations"
OPTIMIZERS = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "muon": Muon}
STARTS = ("closed_form", "cut")
SCHEDULES = ("milestones", "linear")
PRECISIONS = {"auto": torch.float32, "float32": torch.float32, "bf16": torch.float32, "float64": torch.float64}


def _constant(default: Any, source: str) -> Any:
    return field(default=default, metadata={"source": source})


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def _is_device(text: str) -> bool:
    try:
        torch.device(text)
    except (RuntimeError, TypeError):
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class MimicConfig:
    """How to mimic. Each field has the source of its default in its metadata ("cited", "measured", "assumption").

    Args:
        steps: Optimiser steps, never epochs.
        batch_size: Images of a step; all of them where there are fewer.
        optimizer: "sgd", "muon" or "adamw", for which momentum is the first beta (the second is 0.999).
        lr: The learning rate. None: measured on the network at hand, so that a step moves the student's features as far
            in every network (`settle_options.measure_rate`).
        momentum: Of the optimizer, 0 to below 1.
        weight_decay: On every parameter of the body.
        schedule: Of lr, "milestones", or "linear": straight to zero.
        milestones: Shares of `steps` at which lr is multiplied by gamma, with that schedule alone.
        gamma: That factor.
        warmup: Share of `steps` in which lr rises from zero.
        mixing: How the images of a batch are mixed with each other, a name in `augment.MIXES`.
        mixing_rise: Steps in which the share of images that is mixed rises to all.
        extra_share: Share of a batch for extra images, where there are any (`batches.WithExtra`): 0 to below 1.
        start: What `recover` does first: "closed_form" solves the layers, "cut" nothing (`mimic` ignores it).
        norm_mode: "train" normalises with batch statistics and updates the running ones, "eval" leaves both alone.
        views: A name in `augment.VIEWS`; it belongs to the teacher's task, not to the recipe.
        seed: Of the batches, the views and whatever else is random.
        device: None: where the student is.
        precision: "float32", "float64", "bf16" (autocast; weights stay float32), or "auto": float32 or bf16, whichever
            is quicker on this machine (`precision_and_layout`).
        layout: Of pixels in memory while it mimics: "contiguous", "channels_last", or "auto": whichever is quicker. The
            last bits of a student depend on precision and layout.

    Raises:
        InputError: With every fault found, on construction.
    """

    steps: int = _constant(2000, _MIR)
    batch_size: int = _constant(64, _MIR)
    optimizer: str = _constant("sgd", _MIR)
    lr: float | None = _constant(0.02, _MIR)
    momentum: float = _constant(0.9, _MIR)
    weight_decay: float = _constant(1e-4, _MIR)
    schedule: str = _constant("milestones", _MIR)
    milestones: tuple[float, ...] = _constant((0.4, 0.8), _MIR)
    gamma: float = _constant(0.1, _MIR)
    warmup: float = _constant(0.0, _MIR)
    mixing: str = _constant("none", _MIR)
    mixing_rise: int = _constant(0, _MIR)
    extra_share: float = _constant(0.0, _MIR)
    start: str = _constant("cut", _MIR)
    norm_mode: str = _constant("train", _MIR)
    views: str = _constant("imagenet", _MIR + "; for ImageNet teachers")
    seed: int = _constant(2021, _MIR + "; first of its five seeds")
    device: str | None = _constant(None, "assumption: the student already is where it should train")
    precision: str = _constant("auto", "assumption: the paper names none; float32, or bf16 where that is quicker")
    layout: str = _constant("auto", "assumption: the paper names none; the student is the same up to rounding")

    def __post_init__(self) -> None:
        if isinstance(self.milestones, list):
            object.__setattr__(self, "milestones", tuple(self.milestones))
        faults = [f"{text}, found {getattr(self, name)!r}" for name, ok, text in self._rules() if not ok]
        if faults:
            raise InputError("configuring mimic: " + "; ".join(faults))

    def _rules(self) -> list[tuple[str, bool, str]]:
        marks, whole, number = self.milestones, _whole, _number
        rising = isinstance(marks, tuple) and all(number(m) and 0 < m < 1 for m in marks)
        rising = rising and list(marks) == sorted(set(marks))
        named = self.device is None or _is_device(self.device)
        return [
            ("steps", whole(self.steps) and self.steps >= 0, "steps must be a whole number from 0"),
            ("batch_size", whole(self.batch_size) and self.batch_size > 0, "batch_size must be a whole number from 1"),
            ("optimizer", self.optimizer in OPTIMIZERS, f"optimizer must be one of {', '.join(OPTIMIZERS)}"),
            ("lr", self.lr is None or (number(self.lr) and self.lr > 0), "lr must be a finite number above 0, or None"),
            ("momentum", number(self.momentum) and 0 <= self.momentum < 1, "momentum must be in [0, 1)"),
            ("weight_decay", number(self.weight_decay) and self.weight_decay >= 0, "weight_decay must be 0 or more"),
            ("schedule", self.schedule in SCHEDULES, f"schedule must be one of {', '.join(SCHEDULES)}"),
            ("milestones", rising, "milestones must be rising shares of the steps between 0 and 1"),
            ("gamma", number(self.gamma) and 0 < self.gamma <= 1, "gamma must be in (0, 1]"),
            (
                "warmup",
                number(self.warmup) and 0 <= self.warmup < 1,
                "warmup must be a share of the steps, 0 to below 1",
            ),
            ("mixing", self.mixing in MIXES, f"mixing must be one of {', '.join(MIXES)}"),
            ("mixing_rise", whole(self.mixing_rise) and self.mixing_rise >= 0, "mixing_rise must be a number from 0"),
            (
                "extra_share",
                number(self.extra_share) and 0 <= self.extra_share < 1,
                "extra_share must be a share of a batch, 0 to below 1",
            ),
            ("start", self.start in STARTS, f"start must be one of {', '.join(STARTS)}"),
            ("norm_mode", self.norm_mode in ("train", "eval"), "norm_mode must be 'train' or 'eval'"),
            ("views", isinstance(self.views, str) and bool(self.views), "views must name an entry of augment.VIEWS"),
            ("seed", whole(self.seed) and 0 <= self.seed < 2**63, "seed must be a whole number from 0 below 2**63"),
            ("device", named, "device must be None or the name of one, such as 'cpu' or 'cuda:0'"),
            ("precision", self.precision in PRECISIONS, f"precision must be one of {', '.join(PRECISIONS)}"),
            ("layout", self.layout in ("auto", *LAYOUTS), f"layout must be one of {', '.join(('auto', *LAYOUTS))}"),
        ]

    def lr_at(self, step: int) -> float:
        """The learning rate of the step with this number, from 0. Raises: ValueError where it is not measured yet.

        >>> [MimicConfig(steps=10, lr=1.0).lr_at(step) for step in (0, 4, 9)]
        [1.0, 0.1, 0.010000000000000002]
        """
        if self.lr is None:
            raise ValueError(
                "the learning rate is measured on the network, which has not been done yet: call settle_options.settle"
            )
        rise = min(1.0, (step + 1) / (self.warmup * self.steps)) if self.warmup else 1.0
        if self.schedule == "linear":
            return self.lr * rise * (1 - step / self.steps)
        return self.lr * rise * self.gamma ** sum(step >= int(share * self.steps) for share in self.milestones)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"milestones": list(self.milestones)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "MimicConfig":
        known = cls.__dataclass_fields__
        unknown = [unknown_option(name, known) for name in data if name not in known]
        if unknown:
            raise InputError("configuring mimic: " + "; ".join(unknown))
        return cls(**data)


# Steps of the default recipe: the closed form alone; most of what there is to gain; the rest of it. Source:
# measured on the demo's teachers (docs/LOG.md).
EFFORTS = {"quick": 0, "standard": 400, "thorough": 2000}
# default: after the closed form. Source: measured on the demo's teachers, seeds 1001 and 1002 (docs/LOG.md): Muon is
# up to 0.7 points ahead of AdamW, batch norms left alone 0.4 to 2 ahead of batch statistics, both ways of mixing in
# turn up to 0.5 ahead of mixup alone.
# transformer: the paper's start for networks of attention and layer norms. Source: measured on demo:vit_tiny, half of
# its heads and MLP widths, 50 images, seed 1001: lr the best of 3e-4, 1e-3, 3e-3, 1e-2
# (benchmarks/results/embedded_transformer_tuning); after 300 steps linear is 1.2 points ahead of milestones.
PRESETS = {
    "default": MimicConfig(
        steps=EFFORTS["standard"], start="closed_form", optimizer="muon", lr=None, momentum=0.95, weight_decay=0.0,
        schedule="linear", warmup=0.05, mixing="vivid", mixing_rise=100, extra_share=0.5,
        norm_mode="eval",
    ),
    "paper": MimicConfig(),
    "transformer": MimicConfig(optimizer="adamw", lr=3e-3, weight_decay=0.0, schedule="linear"),
}  # fmt: skip


class ConfigChanges(TypedDict, total=False):
    """Fields of a `MimicConfig`; None leaves the recipe's own value."""

    steps: int | None
    batch_size: int | None
    optimizer: str | None
    lr: float | None
    momentum: float | None
    weight_decay: float | None
    schedule: str | None
    milestones: tuple[float, ...] | None
    gamma: float | None
    warmup: float | None
    mixing: str | None
    mixing_rise: int | None
    extra_share: float | None
    start: str | None
    norm_mode: str | None
    views: str | None
    seed: int | None
    device: str | None
    precision: str | None
    layout: str | None


def preset(name: str, effort: str | None = None, **changes: Unpack[ConfigChanges]) -> MimicConfig:
    """The recipe of that name, with changes.

    Args:
        name: A name in PRESETS.
        effort: A name in EFFORTS, instead of steps.
        changes: Fields of MimicConfig; None leaves the recipe's own value.

    Raises:
        InputError: The name is unknown, or the options do not fit.

    >>> preset("default", effort="quick").steps
    0
    """
    if effort is not None:
        if effort not in EFFORTS or changes.get("steps") is not None or name != "default":
            raise InputError(
                f"configuring mimic: found the effort {effort!r}, steps {changes.get('steps')!r} and the preset "
                f"{name!r}; expected one of {', '.join(EFFORTS)}, or steps, not both, and the preset default"
            )
        changes["steps"] = EFFORTS[effort]
    known = ConfigChanges.__annotations__
    unknown = [unknown_option(option, known) for option in changes if option not in known]
    if unknown:
        raise InputError("configuring mimic: " + "; ".join(unknown))
    if name not in PRESETS:
        raise InputError(f"configuring mimic: found the preset {name!r}, expected one of {', '.join(PRESETS)}")
    given: dict[str, Any] = {k: v for k, v in changes.items() if v is not None}
    return replace(PRESETS[name], **given)
