"""Worker processes that end with their parent, and tasks that survive the crash of a worker."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, NamedTuple

from tqdm import tqdm

from timesformer_jax.errors import InputError

# TensorFlow does not survive a fork, and neither do some decoders.
SPAWN = multiprocessing.get_context("spawn")

# Signals that end a process because of its own code. SIGKILL comes from outside. SIGALRM is that of
# the watchdog, see `still_working`.
HANG_SIGNAL = signal.SIGALRM
CRASH_SIGNALS = (
    *(signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL),
    HANG_SIGNAL,
)

# Seconds in which a decoder must give a packet or a frame. The slowest take tenths of a second.
STALL_SECONDS = 300.0

# Seconds between two updates of the progress.
POLL_SECONDS = 0.2


class WorkerCrash(Exception):
    """Worker processes crashed. signals: the signal's name, by process id."""

    def __init__(self, signals: dict[int, str]):
        super().__init__(signals)
        self.signals = signals


@contextmanager
def worker_pool(
    processes: int, reports=None, stall_seconds: float = STALL_SECONDS, kept: str = ""
) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes that are terminated if anything goes wrong.

    Args:
      processes: how many.
      reports: a SimpleQueue of SPAWN that receives what workers pass to `report_progress`; None:
        reports are dropped.
      stall_seconds: see `still_working`.
      kept: of the finished work, as of `run_tasks`.

    Raises:
      WorkerCrash: a worker crashed, for example by a segmentation fault, or hung.
      InputError: a worker was killed, or could not start.
    """
    pool = _Pool(processes, initializer=_start_worker, initargs=(reports, stall_seconds))
    try:
        yield pool
        pool.shutdown()
    except BrokenProcessPool as error:
        pool.terminate()
        names = {-number: number.name for number in CRASH_SIGNALS}
        exit_codes = {process.pid: process.exitcode for process in pool.started}
        if signals := {
            pid: names[code] for pid, code in exit_codes.items() if pid and code in names
        }:
            raise WorkerCrash(signals) from error
        if any((code or 0) > 0 for code in exit_codes.values()):
            raise InputError(
                "a worker process could not start, and its error is above; if a script of yours"
                ' started it, put what the script does under `if __name__ == "__main__":`'
            ) from error
        raise InputError(
            "a worker process was killed (out of memory?); run the same command again, with"
            f" fewer workers if it recurs{f': {kept} are kept' if kept else ''}"
        ) from error
    except BaseException:
        pool.terminate()
        raise


def run_tasks(
    function: Callable[..., Any],
    tasks: Mapping[str, tuple],
    processes: int,
    on_progress: Callable[[int, int], None],
    stall_seconds: float = STALL_SECONDS,
    kept: str = "",
) -> dict[str, Any]:
    """Runs tasks in worker processes. A crash or a hang costs one item of a task, not the run.

    A task handles its items one by one, and calls `report_progress` before each and after the
    last. If a worker crashes, or hangs (see `still_working`), the item that it reported last is
    noted, and all unfinished tasks run again; they must skip the noted items.

    Args:
      function: called as function(*arguments, crashed) in a worker. crashed: {item: name of the
        signal} of the items to skip.
      tasks: the arguments of each task, by its name.
      processes: at most.
      on_progress: called with the numbers of finished items and of failed ones among them, in all
        tasks. What it raises ends the run.
      stall_seconds: of an item without a call of `still_working`, after which it hangs.
      kept: what is kept of the work if a worker is killed, for the message.

    Returns:
      What the function returned for each task, by the task's name.

    Raises:
      InputError: a worker was killed, could not start, or crashed while it handled no item.
    """
    results: dict[str, Any] = {}
    crashed: dict[str, str] = {}
    log = _ProgressLog()
    while len(results) < len(tasks):
        remaining = [name for name in tasks if name not in results]
        reports = SPAWN.SimpleQueue()
        try:
            size = min(processes, len(remaining))
            with worker_pool(size, reports, stall_seconds, kept) as pool:
                futures = {pool.submit(function, *tasks[name], crashed): name for name in remaining}
                while futures:
                    done, _ = wait(futures, POLL_SECONDS, return_when=FIRST_COMPLETED)
                    log.receive(reports)
                    on_progress(log.finished, log.failed)
                    for future in done:
                        results[futures.pop(future)] = future.result()
        except WorkerCrash as crash:
            log.receive(reports)
            for process, how in crash.signals.items():
                item = log.current_item(process)
                crashed[item] = how
                message = f"{item} crashed a worker process ({how}); continuing without it"
                tqdm.write(message, sys.stderr)
            log.forget_processes()
    return results


class _Report(NamedTuple):
    """What a worker does: see `report_progress`."""

    process: int
    task: str
    item: str | None
    finished: int
    failed: int


class _ProgressLog:
    """The last report of each worker and of each task."""

    def __init__(self):
        self._by_process: dict[int, _Report] = {}
        self._by_task: dict[str, _Report] = {}

    def receive(self, reports) -> None:
        """Takes all reports that are in the queue."""
        while not reports.empty():
            report = reports.get()
            self._by_process[report.process] = self._by_task[report.task] = report

    def forget_processes(self) -> None:
        """For a new pool, whose processes may get ids of the old one's."""
        self._by_process.clear()

    @property
    def finished(self) -> int:
        return sum(report.finished for report in self._by_task.values())

    @property
    def failed(self) -> int:
        return sum(report.failed for report in self._by_task.values())

    def current_item(self, process: int) -> str:
        report = self._by_process.get(process)
        if report is None or report.item is None:
            raise InputError(
                "a worker crashed while it handled no clip; run the same command again"
            )
        return report.item


# ---- in a worker --------------------------------------------------------------------------------

_reports = None
_stall_seconds = 0.0  # 0: nobody watches


def report_progress(task: str, item: str | None, finished: int, failed: int = 0) -> None:
    """Reports to the parent process what this worker does.

    Args:
      task: name of the task.
      item: the item that comes next; None after the last one.
      finished: items of the task that are finished.
      failed: how many of the finished ones failed.
    """
    if _reports is not None:
        watch(_stall_seconds if item is not None else 0)
        _reports.put(_Report(os.getpid(), task, item, finished, failed))


def still_working() -> None:
    """Tells the watchdog that the current item goes on. Does nothing in a process without one.

    The watchdog is a timer of the system: what hangs may hold any lock. If it is not told for
    `stall_seconds`, it ends the process by HANG_SIGNAL.
    """
    # A caller's process may use the timer for something else.
    if _stall_seconds and signal.getitimer(signal.ITIMER_REAL)[0]:
        signal.setitimer(signal.ITIMER_REAL, _stall_seconds)


def watch(stall_seconds: float) -> None:
    """Starts the watchdog of this process, or stops it with 0. For processes made to decode."""
    global _stall_seconds
    _stall_seconds = stall_seconds or _stall_seconds
    signal.setitimer(signal.ITIMER_REAL, stall_seconds)


def _start_worker(reports, stall_seconds: float) -> None:
    global _reports, _stall_seconds
    _reports, _stall_seconds = reports, stall_seconds
    # Ctrl-C reaches every process of the terminal; the parent ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Workers may use TensorFlow to read from gs://, and it must not reserve the GPU's memory.
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Waits for the end of the parent: a parent killed with SIGKILL cannot end its workers."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


class _Pool(ProcessPoolExecutor):
    """An executor that keeps its processes, so that their exit codes can be read."""

    def __init__(self, processes: int, **options: Any):
        self._others = set(multiprocessing.active_children())
        self.started: set[multiprocessing.process.BaseProcess] = set()
        super().__init__(processes, mp_context=SPAWN, **options)

    def submit(self, *arguments: Any, **options: Any) -> Future:
        future = super().submit(*arguments, **options)
        self.started |= set(multiprocessing.active_children()) - self._others
        return future

    def terminate(self) -> None:
        for process in self.started:
            process.terminate()
        self.shutdown(cancel_futures=True)
        for process in self.started:
            process.join()


def available_cores() -> int:
    """The number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
