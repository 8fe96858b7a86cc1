"""What held-out images prove: an exact interval, the number of images that a threshold needs, and plain words."""

from collections.abc import Callable
from math import floor, inf

from mimicut.base.errors import InputError

_MOST = 10**7  # largest number of held-out images considered


def binomial_interval(successes: float, trials: int) -> tuple[float, float]:
    """Exact 95 % interval of a share, both ends in [0, 1].

    Args:
        successes: A whole number, or a fraction to interpolate between two intervals.
        trials: A whole number.

    Source: Clopper and Pearson, Biometrika 26 (1934): quantiles of the beta distribution.
    """
    from scipy.special import betaincinv

    low = betaincinv(successes, trials - successes + 1, 0.025) if successes else 0.0
    high = betaincinv(successes + 1, trials - successes, 0.975) if successes < trials else 1.0
    return float(low), float(high)


def images_needed(threshold: float) -> int:
    """The smallest number of held-out images whose interval, if all agree, begins at `threshold` (below 1) or above."""
    return _fewest(lambda n: binomial_interval(n, n)[0] >= threshold)


def images_to_halve(successes: int, trials: int) -> int:
    """How many more held-out images would halve the interval, if they agree as often as these."""
    low, high = binomial_interval(successes, trials)

    def halved(n: int) -> bool:
        below, above = binomial_interval(successes * n / trials, n)
        return above - below <= (high - low) / 2

    return _fewest(halved, trials) - trials


def _fewest(enough: Callable[[int], bool], start: int = 1) -> int:
    """The smallest number for which `enough` holds; it must then hold for all larger ones."""
    high = start
    while not enough(high) and high < _MOST:
        high *= 2
    low = max(start, high // 2)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return high


def in_words(low: float, crossfit: int | None = None) -> str:
    """The lower end of the interval in plain words. crossfit: number of folds, if the figure is from `crossfit`."""
    who = "the student" if crossfit is None else "a student made in this way"
    return (
        f"on images like these, we are 95 % confident that {who} gives the teacher's answer at least "
        f"{floor(100 * low + 1e-9)} times in 100"
    )


def check_max_error(bound: float | None) -> None:
    """Check an allowed error.

    Raises:
        InputError: It is not a number above 0.
    """
    if bound is not None and not 0 < bound < inf:
        raise InputError(f"reading max_error: found {bound}, expected a relative error above 0 (1: as bad as the mean)")


def check_threshold(threshold: float | None, held_out: int | None = None) -> None:
    """Check a required agreement.

    Raises:
        InputError: No share reaches the threshold, or `held_out` images cannot prove it.
    """
    if threshold is None:
        return
    if not 0 < threshold < 1:
        raise InputError(f"reading min_agreement: found {threshold}, expected a share above 0 and below 1")
    if threshold > binomial_interval(_MOST, _MOST)[0]:
        raise InputError(f"reading min_agreement: found {threshold}, which not even {_MOST:,} images could show")
    if held_out is not None and (most := binomial_interval(held_out, held_out)[0] if held_out else 0.0) < threshold:
        raise InputError(
            f"requiring an agreement of {threshold} with {held_out} held-out images: even if all of them agreed, the "
            f"95 % interval would begin at {most:.3f}; hold out {images_needed(threshold)} or more, or require less"
        )
