"""A program that does not fit the memory of a device: what is said, and what is tried."""

import json
import math

import jax
import jax.numpy as jnp
import pytest
from conftest import tiny_run

import timesformer_jax as tsf
from timesformer_jax.checkpoints.metadata import CheckpointMetadata
from timesformer_jax.checkpoints.store import save_parameters
from timesformer_jax.cli.main import load_command
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.data.records.open import open_split
from timesformer_jax.distributed import device_memory
from timesformer_jax.distributed.device_memory import required_bytes
from timesformer_jax.distributed.hardware import GIB
from timesformer_jax.errors import InputError
from timesformer_jax.evaluation import multi_view
from timesformer_jax.inference import clip_model
from timesformer_jax.models.timesformer import parameters
from timesformer_jax.training import run


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
         "temporaries (131.83G) exceeds available HBM (15.75G).", 131.83 * GIB),
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
         "hbm. Used 900.5M of 15.75G hbm.", 900.5 * 2**20),
        ("RESOURCE_EXHAUSTED: out of memory", math.inf),
        ("INTERNAL: something else", None),
    ],
)  # fmt: skip
def test_what_a_program_that_does_not_fit_would_need(said, expected):
    assert required_bytes(jax.errors.JaxRuntimeError(said)) == expected


@jax.jit
def petabyte():
    return jnp.zeros(1 << 50, jnp.uint8)


def too_large(*_):
    """A program that this machine's memory is too small for, as any."""
    return petabyte().block_until_ready()


def test_what_xla_says_becomes_one_line_with_what_to_do():
    with (
        pytest.raises(InputError, match=r"memory of cpu is too small: lower it \(RESOURCE_EXH"),
        device_memory.memory_advice("lower it"),
    ):
        too_large()


def test_it_becomes_one_line_whether_or_not_the_program_ran_asynchronously():
    for kind in (jax.errors.JaxRuntimeError, ValueError):
        with pytest.raises(InputError, match="lower it"), device_memory.memory_advice("lower it"):
            raise kind("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")


def test_what_is_said_already_is_not_said_again():
    with (
        pytest.raises(InputError, match=r"^lower this .RESOURCE_EXHAUSTED.$"),
        device_memory.memory_advice("lower that"),
    ):
        raise InputError("lower this (RESOURCE_EXHAUSTED)")


def test_other_errors_remain_what_they_are():
    with (
        pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"),
        device_memory.memory_advice("lower it"),
    ):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_training_says_what_to_lower(monkeypatch, refusal, demo_data, tmp_path):
    monkeypatch.setattr(run, "make_train_step", lambda *_, **__: too_large)
    said = refusal(*tiny_run(demo_data, tmp_path / "run"))
    assert "too small: set --config.model.dtype=bfloat16, --config.model.remat=block" in said
    assert "allocating 1125899906842624 bytes" in said


@pytest.fixture(scope="module")
def checkpoint(demo_data, tmp_path_factory):
    model = tsf.create(
        "timesformer_tiny", num_classes=8, hidden_size=16, depth=1, num_heads=2, num_frames=8
    )
    labels = open_split(demo_data, "validation").label_names
    metadata = CheckpointMetadata(model.config, ClipSpec(frames=8, crop=32), labels, {})
    path = tmp_path_factory.mktemp("model") / "model"
    save_parameters(path, parameters(model), metadata)
    return path


def test_evaluation_says_what_to_lower(monkeypatch, refusal, demo_data, checkpoint):
    monkeypatch.setattr(multi_view, "make_step", lambda *_: too_large)
    said = refusal("evaluate", f"--checkpoint={checkpoint}", f"--data={demo_data}")
    assert "too small: lower --batch_size (in training --config.eval.batch_size)" in said


def test_prediction_says_what_to_lower(monkeypatch, refusal, real_videos, checkpoint):
    monkeypatch.setattr(clip_model.ClipModel, "_choose_kernels", too_large)
    said = refusal("predict", real_videos / "bikes.mp4", f"--checkpoint={checkpoint}")
    assert "too small: lower --batch_size" in said


def refused():
    """The TPU compiler's answer to a program that does not fit."""
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.")


@pytest.fixture
def effort(monkeypatch):
    """What the option of the TPU compiler is set to; JAX believes that it has a TPU."""
    monkeypatch.setattr(device_memory.jax, "default_backend", lambda: "tpu")
    before = jax.config.jax_exec_time_optimization_effort
    yield lambda: jax.config.jax_exec_time_optimization_effort
    jax.config.update("jax_exec_time_optimization_effort", before)


def test_for_a_tpu_it_is_compiled_again_so_that_it_needs_less(effort):
    efforts = []

    def fits_with_less(x):
        efforts.append(effort())
        return x + 1 if effort() < 0 else refused()

    program = device_memory.compiled_to_fit(fits_with_less)
    assert [program(1), program(2)] == [2, 3]
    assert efforts == [0.0, -1.0, -1.0]


def test_training_goes_on_with_a_program_that_needs_less(monkeypatch, effort, demo_data, tmp_path):
    make = run.make_train_step

    def make_large(*arguments, **named):
        step = make(*arguments, **named)
        return lambda *inputs: step(*inputs) if effort() < 0 else refused()

    monkeypatch.setattr(run, "make_train_step", make_large)
    load_command(tiny_run(demo_data, tmp_path / "run", epochs=1))()
    assert json.loads((tmp_path / "run" / "results.json").read_text())["step"] == 8


def test_for_a_tpu_it_is_compiled_twice_at_most(effort):
    tried = []
    program = device_memory.compiled_to_fit(lambda: tried.append(effort()) or refused())
    for _ in range(2):
        with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
            program()
    assert tried == [0.0, -1.0, -1.0]


def test_for_other_devices_it_is_not_compiled_again():
    tried = []
    program = device_memory.compiled_to_fit(lambda: tried.append(1) or refused())
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        program()
    assert tried == [1]
