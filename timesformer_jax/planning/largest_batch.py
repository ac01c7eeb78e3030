"""The largest batch whose step fits."""

from __future__ import annotations

import math
from collections.abc import Callable


def largest_batch(
    needed: Callable[[int], float], limit: float, unit: int, start: int, empty: float
) -> int:
    """The largest multiple of `unit` that needs no more than `limit`; 0 if none does.

    Memory is nearly a straight line in the batch, so each trial is where the line through the two
    known points nearest to the limit meets it; every third halves the interval, so that no curve
    makes the search long.

    Args:
      needed: bytes that a batch needs, more for a larger one; inf where only that it is too much is
        known. It is a compilation: called as seldom as possible.
      limit: bytes.
      unit: that batches are multiples of.
      start: the first to try.
      empty: bytes that are needed whatever the batch.
    """
    known = {0: empty}  # by the number of units
    low, high = 0, None  # the largest that fits, the least that does not
    trial = max(1, start // unit)
    while high is None or high - low > 1:
        known[trial] = needed(trial * unit)
        if known[trial] <= limit:
            low = trial
        else:
            high = trial
        trial = _next(known, limit, low, high)
    return low * unit


def _next(known: dict[int, float], limit: float, low: int, high: int | None) -> int:
    """The next number of units to try, between the bounds."""
    if high is not None and len(known) % 3 == 0:
        return (low + high) // 2
    nearest = sorted((abs(needs - limit), n) for n, needs in known.items() if needs < math.inf)
    if len(nearest) > 1 and known[nearest[0][1]] != known[nearest[1][1]]:
        (_, a), (_, b) = nearest[:2]
        guess = int(a + (limit - known[a]) * (b - a) / (known[b] - known[a]))
    else:
        guess = 2 * low if high is None else (low + high) // 2
    # One beyond the last that fits settles it where the line is right.
    most = 4 * max(low, 1) if high is None else high - 1
    return min(max(guess, low + 1), most)
