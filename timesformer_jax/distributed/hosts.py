"""Runs of several processes: start, shutdown, preemption and lost processes.

Every process runs the same program on the same files; `jax.devices()` are those of all processes.
Process 0 alone writes results and prints.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from timesformer_jax.errors import InputError

SHUTDOWN_SECONDS = 10.0  # how long a failing process waits for the others to fail too


@contextlib.contextmanager
def processes(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    startup_seconds: float = 300.0,
    heartbeat_seconds: float = 60.0,
) -> Iterator[None]:
    """A context in which the processes of a run are connected. Enter it before any use of JAX.

    JAX detects what is not given on Cloud TPU, SLURM, Open MPI and Kubernetes. For a single
    process, or if nothing is detected, the context does nothing. On GPUs, a process started by
    SLURM or Open MPI uses the GPU of its local rank; JAX_LOCAL_DEVICE_IDS=0,1,2,3 changes that.

    Args:
      coordinator: host:port, a free port of the host of process 0.
      num_processes: of the run.
      process_id: of this process, from 0.
      startup_seconds: how long to wait for all processes.
      heartbeat_seconds: a process silent for this long is lost, and JAX ends the others.

    Raises:
      InputError: if the processes cannot be detected or connected.
    """
    address = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    found = _detected(address, num_processes, process_id, startup_seconds)
    if found is None:
        yield
        return
    _connect(*found, startup_seconds, heartbeat_seconds)
    try:
        yield
    except (Exception, KeyboardInterrupt) as e:
        # If this process alone failed, the others wait for it in vain: it ends without them.
        if not _all_shut_down(SHUTDOWN_SECONDS):
            _end(e)
        raise
    finally:
        jax.distributed.shutdown()


def once(name: str, work: Callable[[], None]) -> None:
    """Does the work in process 0, while the others wait.

    Args:
      name: of this barrier, the same in all processes.
      work: writes files that all processes read.
    """
    if jax.process_index() == 0:
        work()
    multihost_utils.sync_global_devices(name)


def of_first(numbers: np.ndarray) -> np.ndarray:
    """The numbers of process 0, in all processes; each calls it with an array of one shape."""
    if jax.process_count() == 1:
        return numbers
    return np.asarray(multihost_utils.broadcast_one_to_all(numbers))


@contextlib.contextmanager
def termination() -> Iterator[Callable[[int], int]]:
    """Handles SIGTERM and Ctrl-C, so that a loop can save before it ends.

    A second Ctrl-C interrupts at once.

    Yields:
      A function of the number of finished steps, to be called after every step. It returns the
      received signal, or 0. All processes get the same answer at the same step, whichever of them
      received the signal.
    """
    if jax.process_count() > 1:
        with _handled({signal.SIGINT: _as_sigterm}):
            yield _synchronised()
        return
    received = 0

    def handle(signum, frame):
        nonlocal received
        received = signum
        signal.signal(signal.SIGINT, signal.default_int_handler)

    with _handled({signal.SIGTERM: handle, signal.SIGINT: handle}):
        yield lambda step: received


def _synchronised() -> Callable[[int], int]:
    """`termination` for several processes, by JAX's preemption sync point.

    After a SIGTERM, the sync point is the largest step of any process + 1. JAX counts from 0 until
    the first call, so a SIGTERM before that puts it at step 1. A resumed run starts after step 1,
    so the first call asks for step 1 too.
    """
    reached = multihost_utils.reached_preemption_sync_point
    early: bool | None = None

    def stop_signal(step: int) -> int:
        nonlocal early
        if early is None:
            early = any([reached(s) for s in (step, 1, step)])
        return signal.SIGTERM if early or reached(step) else 0

    return stop_signal


def _as_sigterm(signum, frame) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def _handled(handlers: dict[int, Callable]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _detected(
    coordinator: str | None, num_processes: int | None, process_id: int | None, seconds: float
) -> tuple[str, int, int] | None:
    """Coordinator, number of processes and id of this process; None for a single process."""
    # Private: `jax.distributed.initialize` detects and connects in one call. But a job of one
    # process must not connect, and the checks and messages of `_connect` need the address first.
    from jax._src.clusters import ClusterEnv

    try:
        with warnings.catch_warnings():
            # JAX warns if Kubernetes' Python client is missing. In a pod of an indexed job, one of
            # several processes, that is an error; any other pod may be a run of its own.
            warnings.simplefilter("error" if "JOB_COMPLETION_INDEX" in os.environ else "ignore")
            if num_processes != 1 and None in (coordinator, num_processes, process_id):
                coordinator, num_processes, process_id, _ = (
                    ClusterEnv.auto_detect_unset_distributed_params(
                        coordinator,
                        num_processes,
                        process_id,
                        [],
                        None,
                        seconds,  # type: ignore[arg-type]  # goes to a float
                    )
                )
    except Exception as e:  # of any kind, from the cluster's own library or settings
        raise InputError(
            f"cannot tell the processes of this run from the cluster ({_one_line(e)}); say them "
            "with --coordinator, --num_processes and --process_id, or --num_processes=1 for one"
        ) from e
    given = {
        "--coordinator": coordinator,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    missing = [flag for flag, value in given.items() if value is None]
    if num_processes == 1 or len(missing) == len(given):
        return None
    if missing:
        raise InputError(f"several processes need {' and '.join(missing)} too")
    assert coordinator is not None
    assert num_processes is not None
    assert process_id is not None
    if not re.fullmatch(r".+:\d+", coordinator):
        raise InputError(f"--coordinator must be host:port, not {coordinator}")
    if not 0 <= process_id < num_processes:
        raise InputError(
            f"--process_id must be 0 to {num_processes - 1} of {num_processes} processes, "
            f"not {process_id}"
        )
    return coordinator, num_processes, process_id


def _connect(
    coordinator: str, num_processes: int, process_id: int, startup: float, heartbeat: float
) -> None:
    # JAX aborts the process after its timeout, without an exception: this timer fires before it.
    late = InputError(
        f"process {process_id} of {num_processes} waited {startup:g} s for the others at "
        f"{coordinator}: start all of them with this --coordinator and --num_processes, each with "
        "its own --process_id, where that port of the host of process 0 can be reached"
    )
    if process_id == 0:
        _check_free(coordinator)
    timer = threading.Timer(startup, _end, [late])
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=int(startup) + 60,
            heartbeat_timeout_seconds=int(heartbeat),
        )
    except RuntimeError as e:
        raise InputError(
            f"process {process_id} of {num_processes} cannot join at {coordinator}: {_one_line(e)}"
        ) from e
    else:
        devices = jax.devices()  # waits for all processes too
    finally:
        timer.cancel()
    if process_id > 0:  # process 0 logs what all processes would
        logging.set_verbosity(logging.WARNING)
    here = jax.local_device_count()
    logging.info("%d processes, %d devices, %d of them here", num_processes, len(devices), here)


def _check_free(coordinator: str) -> None:
    # JAX's server sometimes crashes if the port is not free.
    port = int(coordinator.rpartition(":")[2])
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except (OSError, OverflowError) as e:
        raise InputError(
            f"process 0 cannot listen at port {port} ({_one_line(e)}); choose a free port of its "
            "host for --coordinator"
        ) from e


def _all_shut_down(seconds: float) -> bool:
    """Whether all processes reached the shutdown within the time."""
    thread = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def _end(error: BaseException) -> None:
    """Ends this process with the command line's exit status, without waiting for the others."""
    if isinstance(error, InputError):
        print(f"error: {_one_line(error)}", file=sys.stderr)
        status = 2
    elif isinstance(error, KeyboardInterrupt):
        status = 128 + signal.SIGINT
    else:
        traceback.print_exception(error)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
