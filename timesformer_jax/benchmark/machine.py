"""What was measured on: the processor and its load, the accelerator, its peaks and its memory."""

from __future__ import annotations

import os
import platform
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib
from jax.typing import DTypeLike

from timesformer_jax.benchmark.timing import Timing, timed
from timesformer_jax.distributed.hardware import chip_of
from timesformer_jax.workers import available_cores


def machine() -> dict[str, Any]:
    """The host: processor, cores that this process may use, load average of the last minute."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            models = [line.split(":")[1].strip() for line in f if line.startswith("model name")]
        name = models[0] if models else name
    # Others at work make figures a second of wall time worthless.
    return {"processor": name, "cores": available_cores(), "load_average": os.getloadavg()[0]}


class Yardstick(NamedTuple):
    """What a device's figures are held against.

    Attributes:
      dtype: of the products, "float32" or "bfloat16".
      gemm: FLOPs of a large square product in that dtype, measured in the same run: in a second
        ("wall"), and on a CPU in a second of a core's time ("cpu").
      datasheet: FLOP/s that the maker states for it, None for a chip that is not in the table.
      memory: bytes that programs can use.
    """

    dtype: str
    gemm: dict[str, float]
    datasheet: float | None
    memory: float


def yardstick(dtype: str, memory: float | None = None) -> Yardstick:
    """Measures the first device.

    Args:
      dtype: "float32" or "bfloat16".
      memory: bytes that programs can use; by default what the device says, on a CPU what is free.
    """
    chip = chip_of(jax.devices()[0])
    peak = getattr(chip, dtype) if chip else None
    return Yardstick(dtype, gemm_rate(dtype), peak, memory_limit() if memory is None else memory)


def default_dtype() -> str:
    """What the first device is fast at."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def gemm_rate(dtype: DTypeLike, side: int | None = None, seconds: float = 1.0) -> dict[str, float]:
    """FLOPs a second of square matrix products of normal numbers, as `rates` gives them.

    Args:
      dtype: of the factors and the product.
      side: 8192 by default, on a CPU 2048.
      seconds: to measure.
    """
    side = side or (2048 if jax.default_backend() == "cpu" else 8192)
    factors = [jax.random.normal(jax.random.key(i), (side, side), dtype) for i in range(3)]
    product = jax.jit(jnp.matmul)

    def run(i: int) -> jax.Array:
        return product(factors[i % 3], factors[(i + 1) % 3])

    return rates(2 * side**3, timed(run, jax.block_until_ready, seconds))


def rates(amount: float, timing: Timing) -> dict[str, float]:
    """An amount a run, a second: of the clock ("wall"), and on a CPU of a core's time ("cpu")."""
    found = {"wall": amount / timing.wall["median"]}
    if jax.default_backend() == "cpu":
        found["cpu"] = amount / timing.cpu["median"]
    return found


def memory_limit() -> float:
    """Bytes that programs can use of the first device; on a CPU those that the host has free."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    with open("/proc/meminfo") as f:
        fields = dict(line.split(":") for line in f)
    return int(fields["MemAvailable"].split()[0]) * 1024


def about(yard: Yardstick) -> dict[str, Any]:
    """Everything about the machine and the yardstick, as JSON values."""
    device = jax.devices()[0]
    return {
        "machine": machine(),
        "device": {"kind": device.device_kind, "platform": device.platform},
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
        },
        "yardstick": yard._asdict(),
    }
