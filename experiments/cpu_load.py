"""How much of a CPU other processes use while something is measured."""

from __future__ import annotations

import time

import psutil

from timesformer_jax.workers import available_cores


def spare_cores(threads: int) -> float:
    """Cores that other processes may use without slowing down `threads` threads, plus 0.1."""
    return max(available_cores() - threads, 0) + 0.1


def busy_cores(seconds: float) -> float:
    """Busy cores of the machine, on average over some seconds."""
    return psutil.cpu_percent(seconds) / 100 * psutil.cpu_count()


class Others:
    """The cores that all processes but one use, from now on.

    Args:
      pid: the process that is not counted.
    """

    def __init__(self, pid: int):
        self._process = psutil.Process(pid)
        self._wall, self._busy = time.monotonic(), self._seconds()

    def cores(self) -> float:
        """Cores, on average."""
        return (self._seconds() - self._busy) / (time.monotonic() - self._wall)

    def _seconds(self) -> float:
        """Processor time of the whole machine without that process, in seconds."""
        machine, own = psutil.cpu_times(), self._process.cpu_times()
        at_work = sum(machine) - machine.idle - getattr(machine, "iowait", 0.0)
        return at_work - own.user - own.system
