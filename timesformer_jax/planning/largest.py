"""The largest batch, or the longest clip, whose step fits."""

from __future__ import annotations

import math
from collections.abc import Callable


def largest(
    needed: Callable[[int], float],
    limit: float,
    multiple: int,
    start: int,
    empty: float,
    most: int,
) -> int:
    """The largest multiple of `multiple` that needs at most `limit` bytes; 0 if there is none.

    A size is that of a batch, or the frames of a clip. Memory is almost linear in it. Each trial
    is where the line through the two known points nearest to the limit reaches it; every third
    trial halves the interval, so that the search is short even where memory is not linear.

    Args:
      needed: bytes that a size needs, increasing; inf if the compiler only says that it is
        too much. It compiles a program, so it is called as rarely as possible.
      limit: bytes.
      multiple: sizes are multiples of this.
      start: the size to try first.
      empty: bytes that are needed by nothing at all.
      most: no larger size is tried.
    """
    known = {0: empty}  # by size over `multiple`
    low, high = 0, None  # the largest that fits, the smallest that does not
    bound = most // multiple
    trial = min(max(1, start // multiple), bound)
    while low < bound and (high is None or high - low > 1):
        known[trial] = needed(trial * multiple)
        if known[trial] <= limit:
            low = trial
        else:
            high = trial
        trial = min(_next(known, limit, low, high), bound)
    return low * multiple


def _next(known: dict[int, float], limit: float, low: int, high: int | None) -> int:
    """The next number to try, between the bounds."""
    if high is not None and len(known) % 3 == 0:
        return (low + high) // 2
    nearest = sorted((abs(needs - limit), n) for n, needs in known.items() if needs < math.inf)
    if len(nearest) > 1 and known[nearest[0][1]] != known[nearest[1][1]]:
        (_, a), (_, b) = nearest[:2]
        guess = int(a + (limit - known[a]) * (b - a) / (known[b] - known[a]))
    else:
        guess = 2 * low if high is None else (low + high) // 2
    # Where memory is linear, one more than the largest that fits ends the search.
    most = 4 * max(low, 1) if high is None else high - 1
    return min(max(guess, low + 1), most)
