"""How long something takes: warmed up, repeated, waited for. Knows of no framework."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

SAMPLE_SECONDS = 0.1


class Timing(NamedTuple):
    """Seconds a run: median, least and largest of the samples.

    Attributes:
      wall: of the clock.
      cpu: of a core, of all threads of this process together: on a CPU this is what the work costs,
        whatever else the machine does.
      samples: how many there are.
      runs: in a sample, one after another.
    """

    wall: dict[str, float]
    cpu: dict[str, float]
    samples: int
    runs: int


def timed(
    run: Callable[[int], Any], wait: Callable[[Any], Any], seconds: float, least: int = 3
) -> Timing:
    """Times a run. The first one is not counted: it may load, allocate or compile.

    A sample is as many runs as take a tenth of a second, and the wait for the last, so that an
    accelerator gets the next run while it works at the one before, as it does in use.

    Args:
      run: starts the run of that number, counted from 0, and gives what to wait for.
      wait: waits until it is done.
      seconds: to measure for.
      least: samples, however long they take.
    """
    wait(run(0))
    first = _sample(run, wait, 1, 1)
    runs = math.ceil(SAMPLE_SECONDS / first[0])
    samples = [first] if runs == 1 else []
    done = 2
    begin = time.perf_counter()
    while len(samples) < least or time.perf_counter() - begin < seconds:
        samples.append(_sample(run, wait, done, runs))
        done += runs
    walls, cpus = zip(*samples)
    return Timing(spread(walls), spread(cpus), len(samples), runs)


def _sample(run: Callable, wait: Callable, first: int, runs: int) -> tuple[float, float]:
    """Seconds a run, of wall and of processor time."""
    wall, cpu = time.perf_counter(), time.process_time()
    for i in range(first, first + runs):
        last = run(i)
    wait(last)
    return (time.perf_counter() - wall) / runs, (time.process_time() - cpu) / runs


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median, least and largest."""
    return {"median": statistics.median(values), "least": min(values), "largest": max(values)}
