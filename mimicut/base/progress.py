"""Progress as sentences: how much of some counted work is done, every few seconds, with the time that is left."""

import time
from collections.abc import Callable

EVERY = 8.0  # seconds: no stage may be silent for more than ten.


class SpokenProgress:
    """A callback (done, total) that reports every EVERY seconds; quick work is not reported. total: 0 if not known.

    Args:
        say: Gets each sentence.
        what: The unit that is counted, such as "layer".
    """

    def __init__(self, say: Callable[[str], None], what: str):
        self._say, self._what = say, what
        self._started = self._said = time.monotonic()

    def __call__(self, done: int, total: int, *_: float) -> None:
        now = time.monotonic()
        if now - self._said < EVERY or 0 < total <= done:
            return
        self._said = now
        if not total:
            self._say(f"  {self._what} {done}")
            return
        left = f", {(now - self._started) / done * (total - done):.0f} s left" if done else ""
        self._say(f"  {self._what} {done} of {total}{left}")
