"""`timesformer benchmark flags`: what each of XLA's flags that could matter here gains.

    timesformer benchmark flags --batch_size=64 --json=flags.json

XLA reads its flags once, before the first program, so every figure comes from a process of its own:
`benchmark model` without the flag and with it, by turns. A flag that this version of XLA does not
know, or that fails, says so in its row. Whatever the environment's XLA_FLAGS has stays for all.
"""

from __future__ import annotations

import json as json_format
import os
import subprocess
import sys
import tempfile
import time
from statistics import median
from typing import Any, NamedTuple

import jax

from timesformer_jax.benchmark import report
from timesformer_jax.benchmark.machine import machine
from timesformer_jax.benchmark.model import WORKS
from timesformer_jax.errors import InputError


class Flag(NamedTuple):
    """A flag that might make training or inference faster.

    Attributes:
      platform: "gpu" or "cpu"; TPUs take theirs in LIBTPU_INIT_ARGS, and none is listed.
      text: as it stands in XLA_FLAGS.
      why: what it is expected to change.
    """

    platform: str
    text: str
    why: str


FLAGS = (
    Flag("gpu", "--xla_gpu_triton_gemm_any=true",
         "products with what surrounds them fused into Triton's, wherever it can"),
    Flag("gpu", "--xla_gpu_enable_triton_gemm=false", "cuBLAS for every product"),
    Flag("gpu", "--xla_gpu_exhaustive_tiling_search=true", "more tilings of Triton's tried"),
    Flag("gpu", "--xla_gpu_cudnn_gemm_fusion_level=2", "cuDNN's fused products tried too"),
    Flag("gpu", "--xla_gpu_enable_cublaslt=true", "bias and GELU in the product's epilogue"),
    Flag("gpu", "--xla_gpu_enable_latency_hiding_scheduler=true", "copies behind products"),
    Flag("gpu", "--xla_gpu_enable_command_buffer=", "launches one by one: what graphs gain"),
    Flag("gpu", "--xla_gpu_experimental_enable_fusion_autotuner=true", "fusions tried out"),
    Flag("gpu", "--xla_gpu_unsupported_enable_triton_multi_output_fusion=true",
         "a norm's passes in one"),
    Flag("cpu", "--xla_cpu_prefer_vector_width=512", "wider vectors where there are any"),
    Flag("cpu", "--xla_cpu_enable_fast_math=true", "reductions in any order"),
    Flag("cpu", "--xla_cpu_use_onednn=true", "oneDNN's products for Eigen's"),
    Flag("cpu", "--xla_cpu_enable_concurrency_optimized_scheduler=true", "more runs at once"),
)  # fmt: skip


def benchmark_flags(
    preset: str = "timesformer_base",
    work: str = "training",
    batch_size: int | None = None,
    dtype: str | None = None,
    rounds: int = 2,
    minutes: float = 8.0,
    json: str | None = None,
) -> None:
    """Measures every flag of the device's platform and prints a row as it comes.

    Args:
      preset, work, batch_size, dtype: what `benchmark model` measures; by default 32 clips, 1 on a
        CPU.
      rounds: runs of each, with the flag and without.
      minutes: after which no further flag is begun.
      json: file for the figures.

    Raises:
      InputError: for a name or file that cannot be, or where not even no flag can be measured.
    """
    if work not in WORKS:
        raise InputError(f"--work has no {work!r}; there are {', '.join(WORKS)}")
    report.check_folder(json)
    platform = _platform()
    batch_size = batch_size or (1 if platform == "cpu" else 32)
    settings = {"preset": preset, "work": work, "batch_size": batch_size, "dtype": dtype}
    figures: dict[str, Any] = {
        "machine": machine(),
        "versions": {"jax": jax.__version__},
        "settings": settings,
        "rows": [],
    }
    ends = time.monotonic() + 60 * minutes
    print(f"{'gain (least to largest)':<28}flag: why it might")
    for flag in FLAGS:
        if flag.platform != platform:
            continue
        row: dict[str, Any] = flag._asdict()
        if time.monotonic() > ends:
            row |= report.NO_TIME_LEFT
        else:
            row |= _gain(flag.text, settings, rounds)
        figures["rows"].append(row)
        print(f"{_cell(row):<28}{flag.text}: {flag.why}", flush=True)
        report.write(json, figures)


def _platform() -> str:
    # Asked of another process: this one must not take the accelerator's memory.
    code = "import jax; print(jax.default_backend())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()[-1]


def _gain(flag: str, settings: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Rates with the flag over those without, each pair from two runs one after the other."""
    found = []
    for _ in range(rounds):
        without = _rate("", settings)
        if isinstance(without, str):
            raise InputError(f"nothing to compare flags with: {without}")
        with_it = _rate(flag, settings)
        if isinstance(with_it, str):
            return {"status": "failed", "reason": with_it}
        found.append((with_it, without))
    gains = [a / b for a, b in found]
    spread = {"median": median(gains), "least": min(gains), "largest": max(gains)}
    return {"status": "measured", "gain": spread, "clips_per_second": found}


def _rate(flag: str, settings: dict[str, Any]) -> float | str:
    """Clips a second of a process with the flag; or why there are none, in a line."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.json")
        arguments = [
            f"--presets={settings['preset']}",
            f"--works={settings['work']}",
            f"--batch_sizes={settings['batch_size']}",
            f"--json={path}",
        ]
        if settings["dtype"]:
            arguments.append(f"--dtype={settings['dtype']}")
        done = subprocess.run(
            [sys.executable, "-m", "timesformer_jax.cli", "benchmark", "model", *arguments],
            env=os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            # XLA names a flag that it does not know, and then dumps its stack.
            return (
                next((line for line in said if "Unknown flag" in line), said[-1])
                .removeprefix("error:")
                .strip()
            )
        with open(path) as f:
            [row] = json_format.load(f)["rows"]
    if row["status"] != "measured":
        return f"{row['status']}: {row['reason']}"
    rates = row["clips_per_second"]
    return rates.get("cpu", rates["wall"])  # a core's time, where others share the cores


def _cell(row: dict[str, Any]) -> str:
    if row["status"] != "measured":
        return f"{row['status']}: {row['reason']}"[:26]
    gain = row["gain"]
    return f"{gain['median'] - 1:+.1%} ({gain['least'] - 1:+.1%} to {gain['largest'] - 1:+.1%})"
