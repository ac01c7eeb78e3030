"""What throughput reports, with a clock that the test sets; and profiles."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.models.config import TimeSformerConfig
from timesformer_jax.training import throughput
from timesformer_jax.training.throughput import Profile, Throughput

MODEL = TimeSformerConfig(dtype="bfloat16")  # 195.83 GMACs a clip


def mesh_of(kind, count):
    device = types.SimpleNamespace(device_kind=kind)
    return types.SimpleNamespace(devices=np.array([device] * count))


@pytest.fixture
def clock(monkeypatch):
    now = types.SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now.seconds)
    return now


def step(timed, clock, wait, compute):
    with timed.waiting():
        clock.seconds += wait
    clock.seconds += compute
    timed.stepped(jnp.zeros(()))


def test_steps_are_timed_without_compilation_and_evaluation(clock):
    mesh = types.SimpleNamespace(devices=np.array(jax.devices()[:4]))
    timed = Throughput(MODEL, ClipSpec(), "all", 32, mesh)
    step(timed, clock, wait=7, compute=100)  # compiles
    assert timed.scalars() == {}
    assert timed.clips_per_second() is None
    for _ in range(3):
        step(timed, clock, wait=0.5, compute=1.5)
    with timed.paused():
        clock.seconds += 1000
    step(timed, clock, wait=0.5, compute=5.5)
    assert timed.scalars() == {
        "step_seconds": 3.0,  # 12 s of 4 steps
        "clips_per_second": 32 / 3,
        "clips_per_second_per_device": 8 / 3,
        "data_wait": 2 / 12,
    }
    for _ in range(4):
        step(timed, clock, wait=0, compute=1)
    found = timed.scalars()
    assert (found["step_seconds"], found["data_wait"]) == (1, 0)
    assert timed.clips_per_second() == 8 * 32 / 16


@pytest.mark.parametrize(
    ("kind", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4e12),
        ("NVIDIA H100 80GB HBM3", "float32", 494.7e12),
        ("TPU v5 lite", "bfloat16", 197e12),
        ("TPU v5", "bfloat16", 459e12),
        ("cpu", "float32", None),
    ],
)
def test_mfu_is_of_the_devices_stated_peak(kind, dtype, peak, clock):
    model = dataclasses.replace(MODEL, dtype=dtype)
    timed = Throughput(model, ClipSpec(), "all", 32, mesh_of(kind, 4))
    step(timed, clock, wait=0, compute=9)
    step(timed, clock, wait=0, compute=0.5)
    found = timed.scalars()
    if peak is None:
        assert "mfu" not in found
    else:
        assert found["mfu"] == pytest.approx(6 * 195.83e9 * 32 / 0.5 / (4 * peak), rel=1e-4)


@pytest.mark.parametrize(
    ("trained", "frames", "gflops"),
    # Beside the token, all of divided attention's products but those along time grow with the clip.
    [("all", 8, 6 * 195.83), ("head", 8, 2 * 195.83), ("all", 16, 12 * 195.83)],
)
def test_mfu_is_of_what_is_computed(trained, frames, gflops, clock):
    timed = Throughput(MODEL, ClipSpec(frames=frames), trained, 32, mesh_of("TPU v5 lite", 1))
    step(timed, clock, wait=0, compute=9)
    step(timed, clock, wait=0, compute=0.5)
    assert timed.scalars()["mfu"] == pytest.approx(gflops * 1e9 * 32 / 0.5 / 197e12, rel=1e-2)


def test_a_profile_is_of_the_steps_asked_for(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, **options: calls.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("end"))
    for start, steps, expected in [
        (3, 2, [1, 2, str(tmp_path), 3, 4, "end", 5]),
        (1, 0, [1, 2, 3, 4, 5]),
        (5, 9, [1, 2, 3, 4, str(tmp_path), 5, "end"]),  # the run ends before it
        (9, 2, [1, 2, 3, 4, 5]),
    ]:
        calls.clear()
        profile = Profile(tmp_path, start, steps)
        for number in range(1, 6):
            profile.before(number)
            calls.append(number)
            profile.after(number, jnp.zeros(()))
        profile.close()
        assert calls == expected
