"""Several processes as one run: how they find each other, end together, and notice a lost one.

Every process runs the same program on the same files; JAX makes one machine of their devices.
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
from absl import logging
from jax.experimental import multihost_utils

from timesformer_jax.errors import InputError

FAREWELL = 10.0  # seconds that a process which fails waits for the others to fail too


@contextlib.contextmanager
def processes(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    startup_seconds: float = 300.0,
    heartbeat_seconds: float = 60.0,
) -> Iterator[None]:
    """Within it, `jax.devices()` are those of all processes of the run; to be entered first of all.

    What is not given is what JAX detects: Cloud TPU, SLURM, Open MPI, Kubernetes. Where there is
    nothing to detect, or one process only, it does nothing. On GPUs a process that SLURM or Open
    MPI started gets the one of its local rank, JAX_LOCAL_DEVICE_IDS=0,1,2,3 says otherwise.

    Args:
      coordinator: host:port, a free port of the host of process 0.
      num_processes: of the run.
      process_id: of this one, from 0.
      startup_seconds: how long to wait for all processes.
      heartbeat_seconds: after so long a silence a process is lost, and JAX ends the others.

    Raises:
      InputError: if the processes cannot be found, or do not find each other.
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
        # What fails in one process only leaves the others waiting for it, so it waits for none.
        if not _left_together(FAREWELL):
            _end(e)
        raise
    finally:
        jax.distributed.shutdown()


def once(name: str, work: Callable[[], None]) -> None:
    """Does the work in process 0; the others go on when it is done.

    Args:
      name: of this place in the program, the same in all processes.
      work: writes files that all of them read.
    """
    if jax.process_index() == 0:
        work()
    multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def termination() -> Iterator[Callable[[int], int]]:
    """Notes SIGTERM and Ctrl-C, so that a loop can save before it ends.

    A second Ctrl-C does not wait.

    Yields:
      A function of the steps done, to be called after every step: the signal to end for, or 0. All
      processes get the same answer at the same step, whichever of them the signal went to.
    """
    if jax.process_count() > 1:
        with _handled({signal.SIGINT: _as_sigterm}):
            yield _agreed()
        return
    came = 0

    def note(signum, frame):
        nonlocal came
        came = signum
        signal.signal(signal.SIGINT, signal.default_int_handler)

    with _handled({signal.SIGTERM: note, signal.SIGINT: note}):
        yield lambda done: came


def _agreed() -> Callable[[int], int]:
    """`termination` by JAX's notice of SIGTERM: the processes stop at the largest step of any + 1.

    JAX counts from 0 until it is first asked, so that a notice from before sets step 1 as the end,
    which a run that goes on from a checkpoint never comes to: it is asked for at the first step.
    """
    reached = multihost_utils.reached_preemption_sync_point
    early: bool | None = None

    def asked_to_end(done: int) -> int:
        nonlocal early
        if early is None:
            early = any([reached(step) for step in (done, 1, done)])
        return signal.SIGTERM if early or reached(done) else 0

    return asked_to_end


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
    """Coordinator, number of processes and this one's; None for a run of one process."""
    # No public function says what `jax.distributed.initialize` would start.
    from jax._src.clusters import ClusterEnv

    try:
        with warnings.catch_warnings():
            # Of a Kubernetes whose Python client is missing; a pod of an indexed job is one of
            # several processes, any other may be alone.
            warnings.simplefilter("error" if "JOB_COMPLETION_INDEX" in os.environ else "ignore")
            if num_processes != 1 and None in (coordinator, num_processes, process_id):
                coordinator, num_processes, process_id, _ = (
                    ClusterEnv.auto_detect_unset_distributed_params(
                        coordinator, num_processes, process_id, [], None, seconds
                    )
                )
    except Exception as e:  # whatever the cluster's own library or settings raise
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
    # JAX aborts where it waited in vain, without a word to Python: so this ends before it does.
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
    if process_id > 0:  # what all have to say, process 0 says
        logging.set_verbosity(logging.WARNING)
    here = jax.local_device_count()
    logging.info("%d processes, %d devices, %d of them here", num_processes, len(devices), here)


def _check_free(coordinator: str) -> None:
    # JAX's server crashes, at times, on a port that it cannot have.
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


def _left_together(seconds: float) -> bool:
    """Whether within the time all processes came to leave the run."""
    thread = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def _end(error: BaseException) -> None:
    """Ends the process as the command line would, but waits for no other."""
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
