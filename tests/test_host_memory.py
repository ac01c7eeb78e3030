"""Programs on the CPU find the memory of their last run again."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import tiny_run

import timesformer_jax as tsf
from timesformer_jax import host_memory
from timesformer_jax.checkpoints.metadata import CheckpointMetadata
from timesformer_jax.checkpoints.store import save_parameters
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.data.records.open import open_split
from timesformer_jax.models.timesformer import parameters

# Ten runs of a program with a temporary of 40 MB, in rounds: on a busy machine a run may begin
# before the memory of the last one is free, so that there come to be several such blocks.
PROGRAM = """
import resource, sys
if sys.argv[1] == "kept":
    from timesformer_jax import host_memory
    host_memory.keep_freed()
import jax, jax.numpy as jnp
f = jax.jit(lambda x: (x @ x[:500].T) @ x[:500])
x = jnp.ones((20_000, 8))
rounds = []
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        f(x).block_until_ready()
    rounds.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(rounds))
"""


def page_faults(how: str) -> int:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    )  # fmt: skip
    return int(run.stdout)


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_a_program_touches_no_new_page_when_it_runs_again():
    touched = 10 * 20_000 * 500 * 4 // os.sysconf("SC_PAGE_SIZE")
    assert page_faults("given back") > touched
    assert page_faults("kept") < touched / 20


@pytest.mark.parametrize(
    ("platforms", "plugins", "kept"),
    [("cpu", ["cuda"], True), ("cuda,cpu", [], False), ("", [], True), ("", ["cuda"], False)],
)
def test_nothing_is_changed_where_there_is_an_accelerator(monkeypatch, platforms, plugins, kept):
    changed = []

    def change(*setting):
        changed.append(setting)

    config = SimpleNamespace(jax_platforms=platforms, update=change)
    monkeypatch.setattr(host_memory, "jax", SimpleNamespace(config=config))
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=change))
    monkeypatch.setattr(host_memory.importlib.metadata, "entry_points", lambda group: plugins)
    monkeypatch.setattr(host_memory.importlib.util, "find_spec", lambda name: None)
    host_memory.keep_freed()
    assert len(changed) == (3 if kept else 0)


@pytest.fixture
def memory(monkeypatch):
    """This machine has 3 GiB."""
    monkeypatch.setattr(host_memory, "physical_memory", lambda: 3 << 30)


@pytest.mark.parametrize("field", ["batch_size", "eval.batch_size"])
def test_training_on_more_than_the_memory_is_refused(field, memory, refusal, demo_data, tmp_path):
    said = refusal(*tiny_run(demo_data, tmp_path / "run", **{field: 1_000_000}))
    # 8 frames of 32 x 32 RGB are 24 KiB.
    assert said == (
        "the frames of 1,000,000 clips at a time take 23 GiB, and this machine has 3 GiB:"
        f" lower --config.{field}"
    )


def test_evaluation_on_more_than_the_memory_is_refused(memory, refusal, demo_data, tmp_path):
    model = tsf.create(
        "timesformer_tiny", num_classes=8, hidden_size=16, depth=1, num_heads=2, num_frames=8
    )
    labels = open_split(demo_data, "validation").label_names
    metadata = CheckpointMetadata(model.config, ClipSpec(frames=8, crop=32), labels, {})
    save_parameters(tmp_path / "model", parameters(model), metadata)
    said = refusal(
        "evaluate",
        f"--checkpoint={tmp_path / 'model'}",
        f"--data={demo_data}",
        "--views=10000",
        "--batch_size=16",
    )
    assert "take 4 GiB, and this machine has 3 GiB: lower --batch_size or --views" in said
