"""One family of exceptions. Each message says what was being done, with which input, what was found
against what was expected, and what to do next. `exit_code` is what the command line ends with. `one_line` quotes the
errors of others in such a message."""

from typing import Any


class MimicutError(Exception):
    """Base of every error that mimicut raises on purpose."""

    exit_code = 2


class InputError(MimicutError):
    """What the user gave cannot be used: images, paths, options, weights of another network."""


class Diverged(InputError):
    """Training whose loss stopped being finite."""


class PlanError(InputError):
    """A plan that does not fit: edited into nonsense, of another teacher, or a budget out of reach."""


class OutOfReach(PlanError):
    """A budget that no student meets; the nearest that can be is named, of latencies measured."""

    exit_code = 1


class StoreError(InputError):
    """A result folder that cannot be written, or that is not what it says it is."""


class UnsupportedModel(MimicutError):
    """This model is the reason: no seam, an operator that cannot be traced, a device without data."""

    exit_code = 3


class LawBroken(MimicutError):
    """A law of the design does not hold for this model and plan: the result must not be trusted."""

    exit_code = 1


class BelowThreshold(MimicutError):
    """The result is sound but poorer than the user demanded."""

    exit_code = 1


class Stopped(KeyboardInterrupt):
    """Ctrl-C behind a whole step of recovering: what was recovered until then is as good as it got.

    log: of what was done (`MimicLog`, from `restore` on `Recovery`). checkpoint: to go on from.
    """

    def __init__(self, log: Any, checkpoint: Any):
        super().__init__("stopped")
        self.log, self.checkpoint = log, checkpoint


def one_line(error: BaseException) -> str:
    """What someone else's error says, short enough to stand inside a message of ours."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
