"""Decodes videos ahead of the model, in threads. FFmpeg runs without Python's lock."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from timesformer_jax.data.decode import VideoError

T = TypeVar("T")

# Videos that wait decoded, per thread. A thread that ends early must find its next one.
AHEAD = 2


def decode_ahead(reads: Iterable[Callable[[], T]], workers: int) -> Iterator[T | VideoError]:
    """Calls functions that decode videos, in threads.

    Args:
      reads: a function for each video.
      workers: threads; 0: the functions are called here, one after another.

    Yields:
      What each function returned, in order, or its VideoError. Other errors are raised.
    """
    if workers == 0:
        yield from map(_clips_or_error, reads)
        return
    with ThreadPoolExecutor(workers, "decode") as pool:
        waiting: collections.deque[Future] = collections.deque()
        try:
            for read in reads:
                waiting.append(pool.submit(_clips_or_error, read))
                if len(waiting) > AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _clips_or_error(read: Callable[[], T]) -> T | VideoError:
    try:
        return read()
    except VideoError as error:
        return error
