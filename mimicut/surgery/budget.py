"""What is asked for: how much of a network may stay, and what must not change. A plain value, checked when it is made.

Every fault is in one message, before any image is read or any network is traced.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypedDict, Unpack

from mimicut.base.errors import PlanError, unknown_option

SCHEMES = ("auto", "mid", "all")
DEPTHS = ("never", "auto", "only")
SCORE_NAMES = ("l1", "l2", "bn", "random")
RUNTIMES = ("torch", "compile", "onnxruntime", "openvino", "cuda", "tensorrt")
SIZES = ("keep", "params", "size_mb")  # budgets that say how large the student may be


class BudgetOptions(TypedDict, total=False):
    """The options of a `Budget` as flat keyword arguments; None leaves the default."""

    keep: float | None
    params: float | None
    size_mb: float | None
    keep_width: float | None
    latency: "float | Latency | None"
    latency_ms: float | None
    runtime: str | None
    threads: int | None
    batch: int | None
    depth: str | None
    scheme: str | None
    spare_ends: bool | None
    drop: "list[str] | tuple[str, ...] | None"
    pin: "list[str] | tuple[str, ...] | None"
    exclude: "list[str] | tuple[str, ...] | None"
    min_channels: int | None
    divisor: int | None
    score: str | None
    seed: int | None


@dataclass(frozen=True, kw_only=True)
class Latency:
    """A latency to meet, and where it is measured.

    Args:
        share: of the teacher's latency, above 0.
        ms: milliseconds of one forward pass, above 0. With both, both are met.
        runtime: a name in RUNTIMES.
        threads: CPU threads; None for as many as torch uses.
        batch: images in a measured pass.

    Raises: PlanError with every fault, on construction.
    """

    share: float | None = None
    ms: float | None = None
    runtime: str = "torch"
    threads: int | None = None
    batch: int = 1

    def __post_init__(self) -> None:
        _raise(self.faults())

    def target(self, teacher_ms: float) -> float:
        """The milliseconds to meet, where the teacher takes so many.

        >>> Latency(share=0.5, ms=3).target(10.0)
        3
        """
        shares = [] if self.share is None else [self.share * teacher_ms]
        return min([*shares, *([] if self.ms is None else [self.ms])])

    def faults(self) -> list[str]:
        found = []
        if self.share is None and self.ms is None:
            found.append("a latency is given without its value, expected a share of the teacher's or milliseconds")
        for name, value, what in (
            ("latency", self.share, "a share of the teacher's above 0"),
            ("latency_ms", self.ms, "milliseconds above 0"),
        ):
            if value is not None and not (_is_number(value) and 0 < value < math.inf):
                found.append(f"{name} is {value!r}, expected {what}")
        if self.runtime not in RUNTIMES:
            found.append(f"runtime is {self.runtime!r}, expected one of {', '.join(RUNTIMES)}")
        if self.threads is not None and not _is_whole(self.threads):
            found.append(f"threads is {self.threads!r}, expected a whole number of 1 or more")
        if not _is_whole(self.batch):
            found.append(f"batch is {self.batch!r}, expected a whole number of 1 or more")
        return found


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much of a network may stay. Of several sizes and a latency every one is met.

    Args:
        keep: share of the teacher's MACs, 0 < keep <= 1.
        params: share of its parameters up to 1, or how many there may be.
        size_mb: megabytes (10**6 bytes) of all its tensors.
        keep_width: share of each group's channels that stays, instead of a size: of C channels ceil(C * keep_width).
        latency: to be met on a runtime; needs images.
        depth: whether whole blocks may be dropped: "never", "auto", or "only" (no widths then); None for "auto" with a
            latency and "never" without one. Anything but "never" needs images.
        scheme: "mid" cuts channels inside residual blocks and leaves residual widths alone (MiR's); "all" cuts every
            group that does not reach the seam; "auto" is "mid" where that reaches the budget and
            the images do not say that "all" loses clearly less, else "all".
        spare_ends: with "mid", leave the first and last block of each stage whole.
        drop: blocks to drop whatever they cost.
        pin: patterns of modules whose outputs keep all channels.
        exclude: patterns of modules that must not change at all.
        min_channels: no group is cut below it.
        divisor: widths are rounded up to a multiple of it; None for 1, or with a latency for what was measured to be
            worth it on the runtime.
        score: a name in SCORE_NAMES by which channels are ranked; None for the images' evidence where there are
            images, else "l1".
        seed: of a random score.

    Raises: PlanError with every fault, on construction.

    >>> Budget(keep=0.5).keep
    0.5
    >>> Budget(keep=2, scheme="most")
    Traceback (most recent call last):
    ...
    mimicut.base.errors.PlanError: making a plan: keep is 2, expected a share above 0 and up to 1; scheme is 'most', \
expected one of auto, mid, all
    """

    keep: float | None = None
    params: float | None = None
    size_mb: float | None = None
    keep_width: float | None = None
    latency: Latency | None = None
    depth: str | None = None
    scheme: str = "auto"
    spare_ends: bool = False
    drop: tuple[str, ...] = ()
    pin: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    min_channels: int = 1
    divisor: int | None = None
    score: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("drop", "pin", "exclude"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        _raise([*self._value_faults(), *self._joint_faults()])

    @classmethod
    def of(cls, **options: Unpack[BudgetOptions]) -> "Budget":
        """The budget of flat options, as the command line and `compress(..., keep=0.5)` take them.

        Raises: PlanError with every fault in one message, misspelt names among them.

        >>> Budget.of(latency=0.6, runtime="openvino").latency.share
        0.6
        >>> Budget.of(keap=0.5)
        Traceback (most recent call last):
        ...
        mimicut.base.errors.PlanError: making a plan: there is no option 'keap'; did you mean 'keep'?
        """
        known = set(BudgetOptions.__annotations__)
        given = {name: value for name, value in options.items() if value is not None}
        faults = [unknown_option(name, known) for name in given if name not in known]
        values: dict[str, Any] = {name: value for name, value in given.items() if name in known}
        latency, more = _latency_of(values)
        faults += more
        if latency is not None:
            values["latency"] = latency
        made = None
        try:
            if values or not faults:
                made = cls(**values)
        except PlanError as error:
            faults.append(str(error).removeprefix(_DOING))
        _raise(faults)
        assert made is not None
        return made

    @property
    def searches(self) -> bool:
        """Whether images decide more than widths: a latency to meet, or blocks to drop."""
        return self.latency is not None or self.depth not in (None, "never")

    @property
    def resolved_depth(self) -> str:
        return self.depth or ("auto" if self.latency is not None else "never")

    @property
    def sizes(self) -> tuple[str, ...]:
        """Names of the sizes that are given."""
        return tuple(name for name in SIZES if getattr(self, name) is not None)

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        return data | {name: list(data[name]) for name in ("drop", "pin", "exclude")}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Budget":
        """Raises: PlanError for unknown names and impossible values."""
        known = {f.name for f in fields(cls)}
        _raise([unknown_option(str(name), known) for name in data if name not in known])
        latency = data.get("latency")
        if isinstance(latency, Mapping):
            names = {f.name for f in fields(Latency)}
            strange = [name for name in latency if name not in names]
            _raise([unknown_option(f"latency.{name}", {f"latency.{n}" for n in names}) for name in strange])
            latency = Latency(**latency)
        return cls(**{**data, "latency": latency})

    def _value_faults(self) -> list[str]:
        found = []
        for name in ("keep", "keep_width"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 < value <= 1):
                found.append(f"{name} is {value!r}, expected a share above 0 and up to 1")
        for name in ("params", "size_mb"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 < value < math.inf):
                found.append(f"{name} is {value!r}, expected a number above 0")
        if self.latency is not None and not isinstance(self.latency, Latency):
            found.append(f"latency is {self.latency!r}, expected a Latency")
        for name, allowed in (("scheme", SCHEMES), ("depth", (None, *DEPTHS)), ("score", (None, *SCORE_NAMES))):
            if getattr(self, name) not in allowed:
                named = ", ".join(each for each in allowed if each is not None)
                found.append(f"{name} is {getattr(self, name)!r}, expected one of {named}")
        for name in ("drop", "pin", "exclude"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(isinstance(each, str) for each in value):
                found.append(f"{name} is {value!r}, expected a list of names")
        for name in ("min_channels", "divisor"):
            value = getattr(self, name)
            if not (_is_whole(value) or (name == "divisor" and value is None)):
                found.append(f"{name} is {value!r}, expected a whole number of 1 or more")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            found.append(f"seed is {self.seed!r}, expected a whole number")
        return found

    def _joint_faults(self) -> list[str]:
        found, sizes = [], self.sizes
        if self.keep_width is not None and sizes:
            found.append(f"{sizes[0]} and keep_width are both given, expected one budget, or the widths themselves")
        if self.keep_width is not None and self.searches:
            found.append("keep_width sets the widths itself, expected no latency and no depth beside it")
        if self.depth in ("auto", "only") and self.latency is None and not sizes and not self.drop:
            found.append("a depth is given without a budget, expected keep, params, size_mb or latency beside it")
        elif not sizes and self.keep_width is None and self.latency is None and not self.drop:
            found.append(
                "no budget is given, expected keep (share of MACs), params, size_mb, latency, keep_width (share of "
                "channels) or drop (blocks)"
            )
        return found


_DOING = "making a plan: "
_OF_LATENCY = {"latency": "share", "latency_ms": "ms", "runtime": "runtime", "threads": "threads", "batch": "batch"}


def _latency_of(values: dict[str, Any]) -> tuple[Latency | None, list[str]]:
    """Takes the latency's options out of `values`; returns the latency, if there is one, and what is wrong."""
    given = {name: values.pop(name) for name in _OF_LATENCY if name in values}
    whole = given.get("latency")
    if isinstance(whole, Latency):
        beside = [name for name in given if name != "latency"]
        faults = [f"{', '.join(beside)} given beside a Latency, which holds them itself"] if beside else []
        return whole, faults
    if "latency" not in given and "latency_ms" not in given:
        beside = [name for name in ("runtime", "batch") if name in given]
        faults = [f"{' and '.join(beside)} given without a latency, expected latency or latency_ms"] if beside else []
        return None, faults  # threads alone are those of the whole run
    try:
        return Latency(**{_OF_LATENCY[name]: value for name, value in given.items()}), []
    except PlanError as error:
        return None, [str(error).removeprefix(_DOING)]


def _raise(faults: list[str]) -> None:
    if faults:
        raise PlanError(_DOING + "; ".join(faults))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


# What a plan holds the answer to, and the defaults that may stand beside one. Threads are those of the whole run.
_BESIDE_PLAN = {name for name in BudgetOptions.__annotations__ if name not in ("threads", "seed")}
_DEFAULTS: dict[str, tuple[Any, ...]] = {"scheme": ("auto",), "min_channels": (1,), "divisor": (1,)}


def refuse_beside_plan(options: BudgetOptions) -> None:
    """Raises: PlanError for a budget, or a part of one, beside a plan, which already fixes what is kept."""
    given = [
        name
        for name, value in options.items()
        if name in _BESIDE_PLAN
        and value is not None
        and value is not False
        and value not in ((), [])
        and value not in _DEFAULTS.get(name, ())
    ]
    if given:
        raise PlanError(
            f"reading the plan: {', '.join(given)} given beside it, but a plan already fixes what is kept; leave "
            "these out, or the plan"
        )


def or_whole(options: BudgetOptions) -> BudgetOptions:
    """The options of a budget; where they name none, of one that keeps the whole network: it may be only quantised.

    >>> or_whole({"scheme": "all"}), or_whole({"latency": 0.5})
    ({'scheme': 'all', 'keep': 1.0}, {'latency': 0.5})
    """
    named = (*SIZES, "keep_width", "latency", "latency_ms", "drop")
    return options if any(options.get(name) is not None for name in named) else {**options, "keep": 1.0}


def several_budgets(
    options: BudgetOptions,
    *,
    keep: Sequence[float] = (),
    latency: Sequence[float] = (),
    latency_ms: Sequence[float] = (),
) -> dict[str, BudgetOptions]:
    """Name of a folder -> the options of one budget. With one budget the name is empty.

    Args:
        options: those of all budgets.
        keep, latency, latency_ms: one of these may have several values: one budget each.

    Raises: PlanError where two lists have several values, or one has a value twice.

    >>> list(several_budgets({}, keep=[0.7, 0.5]))
    ['keep-0.7', 'keep-0.5']
    """
    lists = {"keep": list(keep), "latency": list(latency), "latency_ms": list(latency_ms)}
    fixed = {name: values[0] for name, values in lists.items() if len(values) == 1}
    many = {name: values for name, values in lists.items() if len(values) > 1}
    shared: Any = {name: value for name, value in {**options, **fixed}.items() if value is not None}
    if len(many) > 1:
        raise PlanError(f"making plans: {' and '.join(many)} have several values each, expected one that has")
    for name, values in many.items():
        if len(set(values)) < len(values):
            raise PlanError(f"making plans: {name} is given twice as {values}, expected different values")
        found: dict[str, Any] = {f"{name.replace('_', '-')}-{value:.12g}": {**shared, name: value} for value in values}
        return found
    return {"": shared}
