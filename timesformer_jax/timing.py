"""Measures run times: a warm-up, then samples of repeated runs. Independent of any framework."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

SAMPLE_SECONDS = 0.1


class Timing(NamedTuple):
    """Seconds per run: median, minimum and maximum of the samples.

    Attributes:
      wall: wall time.
      cpu: processor time, summed over all threads of this process. On a CPU this is what the work
        costs, whatever else the machine does.
      samples: how many samples there are.
      runs: consecutive runs in a sample.
    """

    wall: dict[str, float]
    cpu: dict[str, float]
    samples: int
    runs: int


def time_runs(
    run: Callable[[int], Any], wait: Callable[[Any], Any], seconds: float, min_samples: int = 3
) -> Timing:
    """Times a run. The first run is not counted, since it may load, allocate or compile.

    A sample is as many runs as take a tenth of a second, and one wait for the last of them. So an
    accelerator receives the next run while it computes the one before, as in real use.

    Args:
      run: starts the run with this number, from 0, and returns what to wait for.
      wait: waits until that is finished.
      seconds: how long to measure.
      min_samples: samples to take however long they last.
    """
    wait(run(0))
    first = _sample(run, wait, 1, 1)
    runs = math.ceil(SAMPLE_SECONDS / first[0])
    samples = [first] if runs == 1 else []
    done = 2
    begin = time.perf_counter()
    while len(samples) < min_samples or time.perf_counter() - begin < seconds:
        samples.append(_sample(run, wait, done, runs))
        done += runs
    walls, cpus = zip(*samples)
    return Timing(spread(walls), spread(cpus), len(samples), runs)


def _sample(run: Callable, wait: Callable, first: int, runs: int) -> tuple[float, float]:
    """Seconds per run, of wall time and of processor time."""
    wall, cpu = time.perf_counter(), time.process_time()
    for i in range(first, first + runs):
        last = run(i)
    wait(last)
    return (time.perf_counter() - wall) / runs, (time.process_time() - cpu) / runs


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
