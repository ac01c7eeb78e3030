"""A pool of processes that ends with its parent, and says which of them crashed."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from timesformer_jax.errors import InputError

# TensorFlow does not survive a fork, and some decoders do not either.
CONTEXT = multiprocessing.get_context("spawn")

# How a process ends that its own code killed; SIGKILL comes from outside.
CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)


class WorkerCrash(Exception):
    """Worker processes ended themselves. crashed: the signal's name, by process id."""

    def __init__(self, crashed: dict[int, str]):
        super().__init__(crashed)
        self.crashed = crashed


class _Pool(ProcessPoolExecutor):
    """An executor that remembers its processes, so that their exit codes can be asked for."""

    def __init__(self, workers: int, **options: Any):
        self._others = set(multiprocessing.active_children())
        self.started = set()
        super().__init__(workers, mp_context=CONTEXT, **options)

    def submit(self, *arguments: Any, **options: Any) -> Future:
        future = super().submit(*arguments, **options)
        self.started |= set(multiprocessing.active_children()) - self._others
        return future

    def end(self) -> None:
        for process in self.started:
            process.terminate()
        self.shutdown(cancel_futures=True)
        for process in self.started:
            process.join()


@contextmanager
def worker_pool(workers: int, events=None) -> Iterator[ProcessPoolExecutor]:
    """A pool that is gone as soon as anything goes wrong: what is half done is done again.

    Args:
      workers: processes.
      events: a SimpleQueue of CONTEXT that gets what the workers `tell`; None: nobody listens.

    Raises:
      WorkerCrash: a worker ended itself, by a segmentation fault, say.
      InputError: a worker was killed.
    """
    pool = _Pool(workers, initializer=_start_worker, initargs=(events,))
    try:
        yield pool
        pool.shutdown()
    except BrokenProcessPool as error:
        pool.end()
        names = {-number: number.name for number in CRASHES}
        ends = {process.pid: process.exitcode for process in pool.started}
        if crashed := {pid: names[code] for pid, code in ends.items() if code in names}:
            raise WorkerCrash(crashed) from error
        raise InputError(
            "a worker process was killed (out of memory?); run the same command again, with"
            " fewer workers if it recurs: finished shards are kept"
        ) from error
    except BaseException:
        pool.end()
        raise


_events = None


def tell(*event: Any) -> None:
    """Tells the parent, with this process's id, if it listens."""
    if _events is not None:
        _events.put((os.getpid(), *event))


def _start_worker(events) -> None:
    global _events
    _events = events
    # Ctrl-C reaches every process of the terminal; the parent ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # TensorFlow is here to write files; it would take the accelerator's memory all the same.
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent killed with -9 cannot tell its workers, who would go on writing."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def available_cores() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
