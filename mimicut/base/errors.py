"""The exceptions of mimicut. Each message says what was being done, with which input, what was found against what was
expected, and what to do next. `exit_code` is the exit code of the command line.
"""

import difflib
from collections.abc import Iterable
from typing import Any


class MimicutError(Exception):
    """Base of every error that mimicut raises on purpose."""

    exit_code = 2


class InputError(MimicutError):
    """What the user gave cannot be used: images, paths, options, weights of another network."""


class Diverged(InputError):
    """The loss of a training stopped being finite."""


class PlanError(InputError):
    """A plan that does not fit: edited into nonsense, made for another teacher, or for a budget out of reach."""


class OutOfReach(PlanError):
    """No student meets the budget; the message names the nearest one, by measurement where latency is the budget."""

    exit_code = 1


class StoreError(InputError):
    """A result folder that cannot be written, or that is not what it says it is."""


class UnsupportedModel(MimicutError):
    """The model is the reason: it has no seam, an operator that cannot be traced, or tensors without data."""

    exit_code = 3


class LawBroken(MimicutError):
    """A law of the design does not hold for this model and plan; the result must not be trusted."""

    exit_code = 1


class BelowThreshold(MimicutError):
    """The result is sound but below what the user required."""

    exit_code = 1


class Stopped(KeyboardInterrupt):
    """Ctrl-C, or the end of another process of the run; raised after a whole step of recovery, so that what was
    recovered until then can be used.

    Attributes:
        log: What was done: a `MimicLog`; from `recover` on a `Recovery`.
        checkpoint: The state to go on from.
        reason: Why, where it was not Ctrl-C; else "".
    """

    def __init__(self, log: Any, checkpoint: Any, reason: str = ""):
        super().__init__("stopped")
        self.log, self.checkpoint, self.reason = log, checkpoint, reason


def one_line(error: BaseException) -> str:
    """The first line of an error, short enough for a message of ours; with the reason, where that is on a later line.

    >>> one_line(ValueError("no such layer\\nand more"))
    'ValueError: no such layer'
    >>> one_line(RuntimeError("Exception from core.cpp:84:\\nCheck 'false' failed at ops.cpp:15:\\nno such operator"))
    'RuntimeError: Exception from core.cpp:84: no such operator'
    """
    first, *others = f"{type(error).__name__}: {error}".strip().splitlines()
    reasons = (line.strip() for line in others if line.strip() and not line.rstrip().endswith(":"))
    if first.endswith(":"):
        first = f"{first} {next(reasons, '')}".rstrip()
    return first[:300]


def unknown_option(name: str, known: Iterable[str]) -> str:
    """A sentence for an option that is not known, with the nearest one that is.

    >>> unknown_option("keap", ["keep", "params"])
    "there is no option 'keap'; did you mean 'keep'?"
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(names)}"
    return f"there is no option {name!r}; {hint}"
