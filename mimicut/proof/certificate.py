"""What held-out images prove: an exact interval, how many images a threshold needs, and all of it in plain words."""

from collections.abc import Callable
from math import floor

from mimicut.base.errors import InputError

_MOST = 10**7  # held-out images that are thought of


def binomial_interval(successes: float, trials: int) -> tuple[float, float]:
    """Exact 95 % interval of a share, both ends in [0, 1]. successes: whole, but for what is between two of them.

    Source: Clopper and Pearson, Biometrika 26 (1934): quantiles of the beta distribution.
    """
    from scipy.special import betaincinv

    low = betaincinv(successes, trials - successes + 1, 0.025) if successes else 0.0
    high = betaincinv(successes + 1, trials - successes, 0.975) if successes < trials else 1.0
    return float(low), float(high)


def images_needed(threshold: float) -> int:
    """The fewest held-out images whose interval, were all to agree, would lie at `threshold` (below 1) or above."""
    return _fewest(lambda n: binomial_interval(n, n)[0] >= threshold)


def images_to_halve(successes: int, trials: int) -> int:
    """How many more held-out images would halve the interval, were they to agree as often as these."""
    low, high = binomial_interval(successes, trials)

    def halved(n: int) -> bool:
        below, above = binomial_interval(successes * n / trials, n)
        return above - below <= (high - low) / 2

    return _fewest(halved, trials) - trials


def _fewest(enough: Callable[[int], bool], start: int = 1) -> int:
    """The least number for which `enough` holds, which then holds for all above it."""
    high = start
    while not enough(high) and high < _MOST:
        high *= 2
    low = max(start, high // 2)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return high


def in_words(low: float, crossfit: int | None = None) -> str:
    """What a lower end of the interval says. crossfit: of how many folds, where it is not of the student itself."""
    who = "it" if crossfit is None else "a student made in this way"
    return (
        f"on images like these, we are 95 % confident that {who} answers as the teacher does at least "
        f"{floor(100 * low + 1e-9)} times in 100"
    )


def check_threshold(threshold: float | None, held_out: int | None = None) -> None:
    """Raises: InputError for a threshold that no share reaches, or that so many held-out images cannot prove."""
    if threshold is None:
        return
    if not 0 < threshold < 1:
        raise InputError(f"reading min_agreement: found {threshold}, expected a share above 0 and below 1")
    if threshold > binomial_interval(_MOST, _MOST)[0]:
        raise InputError(f"reading min_agreement: found {threshold}, which not even {_MOST:,} images could show")
    if held_out is not None and (most := binomial_interval(held_out, held_out)[0] if held_out else 0.0) < threshold:
        raise InputError(
            f"asking for an agreement of {threshold} with {held_out} held-out images: even if all of them agreed, the "
            f"95 % interval would begin at {most:.3f}; hold out {images_needed(threshold)} or more, or ask for less"
        )
