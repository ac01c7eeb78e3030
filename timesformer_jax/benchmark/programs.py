"""A program that is compiled, held against the device's memory and timed; or why it was not."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from timesformer_jax.benchmark.machine import Yardstick, rates
from timesformer_jax.benchmark.timing import timed
from timesformer_jax.distributed.hardware import GIB
from timesformer_jax.models.config import TimeSformerConfig
from timesformer_jax.models.timesformer import abstract
from timesformer_jax.models.timesformer import parameters as parameters_of
from timesformer_jax.planning.memory import exceeded

RUNS = 4  # at least: to warm up, and three samples
SECONDS = 1.0  # to measure where a run takes less
SETS = 2  # of inputs, which runs take in turn


class Program(NamedTuple):
    """Something to compile and time.

    Attributes:
      flops: the model's of one run, two a multiply-accumulate.
      clips: of one run.
      lower: gives what to compile.
      start: given the compiled program, makes its inputs and gives `run` of `timing.timed`.
    """

    flops: float
    clips: int
    lower: Callable[[], jax.stages.Lowered]
    start: Callable[[jax.stages.Compiled], Callable[[int], Any]]


def measured(program: Program, yard: Yardstick, seconds: float) -> dict[str, Any]:
    """What a program needs and takes, as JSON values.

    Args:
      program: what to measure.
      yard: the device.
      seconds: that its runs may take. What would take longer with its products at the rate of the
        large one is not even compiled.

    Returns:
      "status": "measured", "does not fit", "not run" or "failed" (as the compiler or the device
      says), with the "reason" of the latter three. When compiled "compile_seconds", "bytes"
      (arguments, results and temporaries, as compiled) and "executed_flops" (as the compiler counts
      them; a loop as one turn). When measured the "seconds" a run ("wall" and "cpu" of
      `timing.Timing`), "clips_per_second" and "flops_per_second" (of the model's FLOPs), each as
      `machine.rates` has them, their "gemm_share", "mfu" (the share of the datasheet; None for a
      chip that is not in the table) and "peak_bytes" (in use on the device at most, where it says
      so and the most yet was here).
    """
    predicted = RUNS * program.flops / yard.gemm["wall"]
    if predicted > seconds:
        return {"status": "not run", "reason": f"predicted {predicted:.0f} s"}
    found: dict[str, Any] = {}
    try:
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
        if found["bytes"] > yard.memory:
            return _does_not_fit(found["bytes"], yard) | found
        before = _peak_bytes()
        timing = timed(program.start(compiled), jax.block_until_ready, SECONDS)
    except jax.errors.JaxRuntimeError as e:
        if (needed := exceeded(e)) is None:
            return {"status": "failed", "reason": str(e).splitlines()[0]} | found
        return _does_not_fit(needed, yard) | found
    flops, after = rates(program.flops, timing), _peak_bytes()
    return found | {
        "status": "measured",
        "seconds": {"wall": timing.wall, "cpu": timing.cpu},
        "clips_per_second": rates(program.clips, timing),
        "flops_per_second": flops,
        "gemm_share": {kind: flops[kind] / yard.gemm[kind] for kind in flops},
        "mfu": flops["wall"] / yard.datasheet if yard.datasheet else None,
        "peak_bytes": after if after and before is not None and after > before else None,
    }


def _does_not_fit(needed: float, yard: Yardstick) -> dict[str, Any]:
    needs = "more" if needed == math.inf else f"{needed / GIB:.1f}"
    return {
        "status": "does not fit",
        "reason": f"needs {needs} of {yard.memory / GIB:.1f} GiB",
    }


def _peak_bytes() -> int | None:
    """The most that was in use since the process began; no device lets it be set back."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def random_parameters(config: TimeSformerConfig, seed: int = 0) -> dict:
    """Normal numbers in every parameter, on the host: zeros take less power than weights do."""
    rng = np.random.default_rng(seed)

    def draw(x: jax.ShapeDtypeStruct) -> np.ndarray:
        return 0.02 * rng.standard_normal(x.shape, np.float32)

    return jax.tree.map(draw, parameters_of(abstract(config)))


def random_clips(batch: int, frames: int, side: int) -> list[jax.Array]:
    """Sets of normalised clips (B, T, H, W, 3) float32 on the device."""
    shape = batch, frames, side, side, 3
    return [jax.random.normal(jax.random.key(i), shape, jnp.float32) for i in range(SETS)]


def clip_shape(batch: int, frames: int, side: int) -> jax.ShapeDtypeStruct:
    """The shape and dtype of one of `random_clips`."""
    return jax.ShapeDtypeStruct((batch, frames, side, side, 3), jnp.float32)
