"""Time of many like pieces of work, from the first few."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from statistics import median

WARM_UP = 3
"""Steps at the start that are slower: memory is reserved, code is chosen, samples are read and kept."""
TIMED = 12
"""Steps after those."""


@dataclass(frozen=True)
class Timing:
    """Seconds that the first of many like pieces of work took.

    Attributes:
        first: seconds of each of those at the start, which are slower and only done once.
        rest: seconds of each of those after them.
    """

    first: tuple[float, ...]
    rest: tuple[float, ...]

    @property
    def count(self) -> int:
        """Number of pieces done."""
        return len(self.first) + len(self.rest)

    @property
    def each(self) -> float:
        """Seconds of one that is not among the first: the median, which a pause in between does not move."""
        return median(self.rest)

    def total(self, count: int) -> float:
        """Seconds that ``count`` pieces take, from the start."""
        return sum(self.first[:count]) + max(0, count - len(self.first)) * self.each


def timed(
    work: Iterable[object],
    *,
    warm_up: int = WARM_UP,
    all_of_it: bool = False,
    wait: Callable[[], None] | None = None,
) -> Timing:
    """Do the first pieces of ``work``, and look at the clock after each.

    Args:
        work: does a piece whenever it is asked for its next item; it has at least one.
        warm_up: how many are kept apart; fewer where there are hardly more.
        all_of_it: do them all, so that their number is known afterwards.
        wait: waits for a device that works on by itself.
    """
    seconds = []
    begun = time.perf_counter()
    for _ in islice(work, None if all_of_it else warm_up + TIMED):
        if wait is not None:
            wait()
        now = time.perf_counter()
        seconds.append(now - begun)
        begun = now
    apart = min(warm_up, len(seconds) - 1)
    return Timing(tuple(seconds[:apart]), tuple(seconds[apart:]))
