"""Whether others need a CPU's cores while something is measured on it."""

from __future__ import annotations

import time

import psutil

from timesformer_jax.workers import available_cores


def spare_cores(threads: int) -> float:
    """How many cores others may be at without being in the way of `threads`, and a tenth of one."""
    return max(available_cores() - threads, 0) + 0.1


def busy_cores(seconds: float) -> float:
    """How many cores are at work, over some time."""
    return psutil.cpu_percent(seconds) / 100 * psutil.cpu_count()


class Others:
    """What processes other than one need of the cores, from now on.

    Args:
      pid: of the one.
    """

    def __init__(self, pid: int):
        self._process = psutil.Process(pid)
        self._wall, self._busy = time.monotonic(), self._seconds()

    def cores(self) -> float:
        """How many cores, on average."""
        return (self._seconds() - self._busy) / (time.monotonic() - self._wall)

    def _seconds(self) -> float:
        """Processor time of the whole machine, less that of the one."""
        machine, own = psutil.cpu_times(), self._process.cpu_times()
        at_work = sum(machine) - machine.idle - getattr(machine, "iowait", 0.0)
        return at_work - own.user - own.system
