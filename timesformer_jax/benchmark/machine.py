"""Describes the machine: the processor and its load, the device, its peak rate and memory."""

from __future__ import annotations

import os
import platform
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib
from jax.typing import DTypeLike

from timesformer_jax.distributed.hardware import chip_of
from timesformer_jax.timing import Timing, time_runs
from timesformer_jax.workers import available_cores


def machine() -> dict[str, Any]:
    """The host: its processor, the cores available to this process, the load of the last minute."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            models = [line.split(":")[1].strip() for line in f if line.startswith("model name")]
        name = models[0] if models else name
    # Under load, figures per second of wall time are meaningless.
    return {"processor": name, "cores": available_cores(), "load_average": os.getloadavg()[0]}


class DevicePeak(NamedTuple):
    """What a device can do: the rates and the memory that a program's figures are compared with.

    Attributes:
      dtype: of the matrix products, "float32" or "bfloat16".
      gemm: FLOP/s of a large square matrix product in that dtype, measured in the same run: per
        second of wall time ("wall"), and on a CPU per second of processor time ("cpu").
      datasheet: the manufacturer's FLOP/s for the dtype; None for a chip that is not in
        `distributed.hardware.CHIPS`.
      memory: bytes that programs can use.
    """

    dtype: str
    gemm: dict[str, float]
    datasheet: float | None
    memory: float


def measure_peak(dtype: str, memory: float | None = None) -> DevicePeak:
    """Measures the first device.

    Args:
      dtype: "float32" or "bfloat16".
      memory: bytes that programs can use; by default those of the device, on a CPU the free ones.
    """
    chip = chip_of(jax.devices()[0])
    datasheet = getattr(chip, dtype) if chip else None
    memory = memory_limit() if memory is None else memory
    return DevicePeak(dtype, gemm_rate(dtype), datasheet, memory)


def default_dtype() -> str:
    """The dtype in which the first device is fast."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def gemm_rate(dtype: DTypeLike, side: int | None = None, seconds: float = 1.0) -> dict[str, float]:
    """FLOP/s of square matrix products of normal random numbers, in the form of `rates`.

    Args:
      dtype: of the factors and the product.
      side: rows and columns; by default 8192, on a CPU 2048.
      seconds: how long to measure.
    """
    side = side or (2048 if jax.default_backend() == "cpu" else 8192)
    factors = [jax.random.normal(jax.random.key(i), (side, side), dtype) for i in range(3)]
    product = jax.jit(jnp.matmul)

    def run(i: int) -> jax.Array:
        return product(factors[i % 3], factors[(i + 1) % 3])

    return rates(2 * side**3, time_runs(run, jax.block_until_ready, seconds))


def rates(amount: float, timing: Timing) -> dict[str, float]:
    """The rate of an amount per run: per second of wall time ("wall"), on a CPU of processor
    time ("cpu") too."""
    found = {"wall": amount / timing.wall["median"]}
    if jax.default_backend() == "cpu":
        found["cpu"] = amount / timing.cpu["median"]
    return found


def memory_limit() -> float:
    """Bytes that programs can use on the first device; on a CPU the free memory of the host."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    with open("/proc/meminfo") as f:
        fields = dict(line.split(":") for line in f)
    return int(fields["MemAvailable"].split()[0]) * 1024


def describe(peak: DevicePeak) -> dict[str, Any]:
    """The machine, the device, its peak and the versions, as JSON values."""
    device = jax.devices()[0]
    return {
        "machine": machine(),
        "device": {"kind": device.device_kind, "platform": device.platform},
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
        },
        "device_peak": peak._asdict(),
    }
