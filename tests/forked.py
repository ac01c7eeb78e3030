"""Processes with everything imported: each is forked from one that has done nothing else.

The imports of a command take 8 seconds of a core, the work of most tests less. A forked process is
as real as any: it has devices, signals and an exit status of its own. What a process does from its
very first line on is tested with `subprocess`.
"""

import atexit
import contextlib
import gc
import logging
import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver

import absl.logging

# Imported before the first fork; none of them may start a thread or JAX's devices.
PRELOADED = (
    "timesformer_jax.cli.main",
    "timesformer_jax.training.loop",
    "timesformer_jax.inference.predict",
    "timesformer_jax.data.prepare.prepare",
    "timesformer_jax.checkpoints.convert",
    "tensorflow_datasets",
)

_PROCESSES = multiprocessing.get_context("forkserver")
_starting = threading.Lock()


class Process:
    """A running process; the methods and attributes are those of `subprocess.Popen`.

    Args:
      function, arguments: what it calls; as in any program, `sys.exit` ends it.
      environment: all of its environment variables.
      cwd: its working directory; None: this process's.
      umask: of the files that it makes; None: that of the process it is forked from.
    """

    def __init__(self, function, *arguments, environment, cwd=None, umask=None):
        with _starting, contextlib.ExitStack() as here:
            _start_server(environment)
            readers = []
            writers = []
            for _ in range(2):
                reader, writer = map(here.enter_context, _PROCESSES.Pipe(duplex=False))
                readers.append(open(os.dup(reader.fileno())))  # noqa: SIM115
                writers.append(writer)
            self.stdout, self.stderr = readers
            self._process = _PROCESSES.Process(
                target=_run,
                args=(writers, environment, cwd or os.getcwd(), umask, function, *arguments),
            )
            self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self.returncode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        self._process.kill()

    def communicate(self, timeout=None):
        """What is left of its output and errors, when it has ended."""
        with ThreadPoolExecutor() as threads:  # no pipe may fill up while the other is read
            output, errors = threads.map(_read_all, (self.stdout, self.stderr))
        self._process.join(timeout)
        assert self.returncode is not None
        return output, errors


def run(function, *arguments, environment, cwd=None, umask=None):
    """Calls a function in a process of its own, to its end, as `subprocess.run` does."""
    process = Process(function, *arguments, environment=environment, cwd=cwd, umask=umask)
    output, errors = process.communicate()
    return subprocess.CompletedProcess(arguments, process.returncode, output, errors)


def _read_all(file):
    if file.closed:
        return ""
    with file:
        return file.read()


def _start_server(environment):
    """Starts the process that all others are forked from, unless it runs."""
    _PROCESSES.set_forkserver_preload([*PRELOADED])
    before = dict(os.environ)
    try:
        os.environ.update(environment)
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run(writers, environment, cwd, umask, function, *arguments):
    """Calls the function as a process of its own would."""
    assert sys.modules.keys() >= set(PRELOADED)  # of which multiprocessing tells no error
    gc.freeze()  # modules are no garbage
    for descriptor, writer in enumerate(writers, 1):
        os.dup2(writer.fileno(), descriptor)
        writer.close()
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    # A module that logs while it is imported adds a handler where the command has added none yet.
    logging.getLogger().handlers.clear()
    # absl's handler has the standard error of its import, and writes to another one as well.
    absl.logging.get_absl_handler().python_handler.stream = sys.stderr
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    if umask is not None:
        os.umask(umask)
    imported_with = dict(os.environ)
    os.environ.clear()
    os.environ.update(environment)
    import jax

    for name, value in environment.items():  # which JAX has read when it was imported
        if name.startswith("JAX_") and imported_with.get(name) != value:
            with contextlib.suppress(AttributeError):
                jax.config.update(name.lower(), value)
    try:
        function(*arguments)
    finally:
        # As at the end of any program, but not of one that multiprocessing forked.
        threading._shutdown()
        atexit._run_exitfuncs()


def run_command(*arguments):
    """The command line, as `python -m timesformer_jax.cli` runs it."""
    sys.argv = ["timesformer", *arguments]
    runpy.run_module("timesformer_jax.cli", run_name="__main__", alter_sys=True)


def run_command_that_ends(how, when, *arguments):
    """The command line, which sends itself a signal, at the same moment on any machine.

    when: "evaluation", as the first begins; or a folder of checkpoints and a number of steps, after
      one step more and once that checkpoint is written; 0: before the first.
    """
    if when == "evaluation":
        _signal_in_evaluation(how)
    else:
        _signal_after_step(*when, how)
    run_command(*arguments)


def _signal_in_evaluation(how):
    from timesformer_jax.training import loop

    evaluate = loop.evaluate

    def signalled(*arguments, **keywords):
        loop.evaluate = evaluate
        os.kill(os.getpid(), how)
        return evaluate(*arguments, **keywords)

    loop.evaluate = signalled


def _signal_after_step(checkpoints, last, how):
    from timesformer_jax.distributed import hosts

    termination = hosts.termination

    @contextlib.contextmanager
    def signalled():
        with termination() as stop_signal:

            def after(step):
                if last and step == last + 1:
                    while not os.path.isdir(os.path.join(checkpoints, str(last))):
                        time.sleep(0.01)
                    os.kill(os.getpid(), how)
                return stop_signal(step)

            if not last:
                os.kill(os.getpid(), how)
            yield after

    hosts.termination = signalled


def run_command_with_small_files(size, *arguments):
    """The command line, where no file may exceed a size in bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    run_command(*arguments)


def run_file(path, *arguments):
    """A script's file, as `python FILE` runs it."""
    sys.argv = [path, *arguments]
    sys.path.insert(0, os.path.dirname(path))
    runpy.run_path(path, run_name="__main__")


def run_script(code, *arguments):
    """A script, as `python -c` runs it."""
    sys.argv = ["-c", *arguments]
    exec(code, {"__name__": "__main__"})
