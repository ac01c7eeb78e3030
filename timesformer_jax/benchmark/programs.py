"""Compiles a program, compares its memory with the device's, and times it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from timesformer_jax.benchmark.machine import DevicePeak, rates
from timesformer_jax.distributed.device_memory import required_bytes
from timesformer_jax.distributed.hardware import GIB
from timesformer_jax.errors import first_line
from timesformer_jax.models.config import TimeSformerConfig
from timesformer_jax.models.timesformer import abstract
from timesformer_jax.models.timesformer import parameters as parameters_of
from timesformer_jax.timing import time_runs

MIN_RUNS = 4  # a warm-up and three samples
SECONDS = 1.0  # how long to measure, if the runs are shorter
INPUT_SETS = 2  # runs alternate between them


class Program(NamedTuple):
    """A program to compile and time.

    Attributes:
      flops: the model's FLOPs in one run, two for each multiply-accumulate.
      clips: clips in one run.
      choose: chooses the attention kernels, see `tuning.choose_kernels`.
      lower: returns the lowered program.
      start: makes the inputs of the compiled program, and returns `run` for `timing.time_runs`.
    """

    flops: float
    clips: int
    choose: Callable[[], list[dict[str, Any]]]
    lower: Callable[[], jax.stages.Lowered]
    start: Callable[[jax.stages.Compiled], Callable[[int], Any]]


def measure_program(program: Program, peak: DevicePeak, seconds: float) -> dict[str, Any]:
    """Measures the memory and the speed of a program.

    Args:
      program: the program.
      peak: the device's rates and memory.
      seconds: the most that its runs may take. A program that would take longer at the rate of the
        large matrix product is not compiled.

    Returns:
      A dictionary of JSON values:
        kernels: what the attention kernels were chosen from, if there is a choice.
        status: "measured", "does not fit", "not run" or "failed" (an error of the compiler or the
          device); the last three with a "reason".
        compile_seconds, bytes (arguments, results and temporaries), executed_flops (counted by the
          compiler, with one iteration of each loop): if the program was compiled.
        seconds: per run, "wall" and "cpu" as in `timing.Timing`; this and the next: if measured.
        clips_per_second, flops_per_second (of the model's FLOPs): in the form of `machine.rates`.
        gemm_share: flops_per_second relative to `peak.gemm`.
        mfu: flops_per_second relative to `peak.datasheet`, None if that is.
        peak_bytes: the largest memory in use on the device; None if the device does not report it,
          or if an earlier program used as much.
    """
    predicted = MIN_RUNS * program.flops / peak.gemm["wall"]
    if predicted > seconds:
        return {"status": "not run", "reason": f"predicted {predicted:.0f} s"}
    found: dict[str, Any] = {}
    try:
        if kernels := program.choose():
            found["kernels"] = kernels
        begin = time.perf_counter()
        compiled = program.lower().compile()
        found["compile_seconds"] = time.perf_counter() - begin
        stats: Any = compiled.memory_analysis()
        costs = compiled.cost_analysis() or {}
        found["bytes"] = (
            stats.argument_size_in_bytes
            + stats.output_size_in_bytes
            - stats.alias_size_in_bytes
            + stats.temp_size_in_bytes
        )
        found["executed_flops"] = costs.get("flops")
        if found["bytes"] > peak.memory:
            return _does_not_fit(found["bytes"], peak) | found
        before = _peak_bytes()
        timing = time_runs(program.start(compiled), jax.block_until_ready, SECONDS)
    except jax.errors.JaxRuntimeError as e:
        if (needed := required_bytes(e)) is None:
            return {"status": "failed", "reason": first_line(e)} | found
        return _does_not_fit(needed, peak) | found
    flops, after = rates(program.flops, timing), _peak_bytes()
    return found | {
        "status": "measured",
        "seconds": {"wall": timing.wall, "cpu": timing.cpu},
        "clips_per_second": rates(program.clips, timing),
        "flops_per_second": flops,
        "gemm_share": {kind: flops[kind] / peak.gemm[kind] for kind in flops},
        "mfu": flops["wall"] / peak.datasheet if peak.datasheet else None,
        "peak_bytes": after if after and before is not None and after > before else None,
    }


def _does_not_fit(needed: float, peak: DevicePeak) -> dict[str, Any]:
    needs = "more" if needed == math.inf else f"{needed / GIB:.1f}"
    return {
        "status": "does not fit",
        "reason": f"needs {needs} of {peak.memory / GIB:.1f} GiB",
    }


def _peak_bytes() -> int | None:
    """The largest memory in use since the process began. JAX cannot reset it."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def random_parameters(config: TimeSformerConfig, seed: int = 0) -> dict:
    """Normal random parameters on the host. Zeros would make a device draw less power."""
    rng = np.random.default_rng(seed)

    def draw(x: jax.ShapeDtypeStruct) -> np.ndarray:
        return 0.02 * rng.standard_normal(x.shape, np.float32)

    return jax.tree.map(draw, parameters_of(abstract(config)))


def random_clips(batch: int, frames: int, side: int) -> list[jax.Array]:
    """INPUT_SETS batches of normalised clips (B, T, H, W, 3), float32, on the device."""
    shape = batch, frames, side, side, 3
    return [jax.random.normal(jax.random.key(i), shape, jnp.float32) for i in range(INPUT_SETS)]


def clip_shape(batch: int, frames: int, side: int) -> jax.ShapeDtypeStruct:
    """The shape and dtype of one of `random_clips`."""
    return jax.ShapeDtypeStruct((batch, frames, side, side, 3), jnp.float32)
