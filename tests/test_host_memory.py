"""Programs on the CPU find the memory of their last run again."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from timesformer_jax import host_memory

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
