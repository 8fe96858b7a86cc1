"""One family of exceptions. Each message says what was being done, with which input, what was found
against what was expected, and what to do next. `exit_code` is what the command line ends with. `one_line` quotes the
errors of others in such a message."""


class UnderstudyError(Exception):
    """Base of every error that understudy raises on purpose."""

    exit_code = 2


class InputError(UnderstudyError):
    """What the user gave cannot be used: images, paths, options, weights of another network."""


class PlanError(InputError):
    """A plan that does not fit: edited into nonsense, of another teacher, or a budget out of reach."""


class StoreError(InputError):
    """A result folder that cannot be written, or that is not what it says it is."""


class UnsupportedModel(UnderstudyError):
    """This model is the reason: no seam, an operator that cannot be traced, a device without data."""

    exit_code = 3


class LawBroken(UnderstudyError):
    """A law of the design does not hold for this model and plan: the result must not be trusted."""

    exit_code = 1


class BelowThreshold(UnderstudyError):
    """The result is sound but poorer than the user demanded."""

    exit_code = 1


def one_line(error: BaseException) -> str:
    """What someone else's error says, short enough to stand inside a message of ours."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
