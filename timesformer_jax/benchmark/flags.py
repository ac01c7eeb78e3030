"""`timesformer benchmark flags`: what each of XLA's flags that could matter here gains.

    timesformer benchmark flags --batch_size=64 --json=flags.json

XLA reads its flags once, before the first program, so every figure comes from a process of its own:
`benchmark model` without the flag and with it, by turns, every flag once before any is twice. A
flag that this version of XLA does not know, or that fails, says so in its row. Whatever the
environment's XLA_FLAGS has stays for all.
"""

from __future__ import annotations

import json as json_format
import os
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

import jax

from timesformer_jax.benchmark import report
from timesformer_jax.benchmark.machine import machine
from timesformer_jax.benchmark.model import WORKS
from timesformer_jax.benchmark.timing import spread
from timesformer_jax.errors import InputError

GRACE = 60.0  # seconds for what was begun before the end


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


# The most promising first, the longest to compile last.
FLAGS = (
    Flag("gpu", "--xla_gpu_enable_cublaslt=true", "bias and GELU in the product's epilogue"),
    Flag("gpu", "--xla_gpu_triton_gemm_any=true",
         "products with what surrounds them fused into Triton's, wherever it can"),
    Flag("gpu", "--xla_gpu_enable_triton_gemm=false", "cuBLAS for every product"),
    Flag("gpu", "--xla_gpu_unsupported_enable_triton_multi_output_fusion=true",
         "a norm's passes in one"),
    Flag("gpu", "--xla_gpu_enable_latency_hiding_scheduler=true", "copies behind products"),
    Flag("gpu", "--xla_gpu_enable_command_buffer=", "launches one by one: what graphs gain"),
    Flag("gpu", "--xla_gpu_cudnn_gemm_fusion_level=2", "cuDNN's fused products tried too"),
    Flag("gpu", "--xla_gpu_experimental_enable_fusion_autotuner=true", "fusions tried out"),
    Flag("gpu", "--xla_gpu_exhaustive_tiling_search=true", "more tilings of Triton's tried"),
    Flag("cpu", "--xla_cpu_use_onednn=true", "oneDNN's products for Eigen's"),
    Flag("cpu", "--xla_cpu_use_xnnpack=true", "XNNPACK's products for Eigen's"),
    Flag("cpu", "--xla_cpu_prefer_vector_width=512", "wider vectors where there are any"),
    Flag("cpu", "--xla_cpu_enable_fast_math=true", "reductions in any order"),
    Flag("cpu", "--xla_cpu_use_fusion_emitters=false", "the older code for loops"),
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
      minutes: after which nothing more is begun; what runs a minute later is stopped.
      json: file for the figures.

    Raises:
      InputError: for a name or file that cannot be, or where not even no flag can be measured.
    """
    if work not in WORKS:
        raise InputError(f"--work has no {work!r}; there are {', '.join(WORKS)}")
    report.check_folder(json)
    platform, device = _device()
    batch_size = batch_size or (1 if platform == "cpu" else 32)
    settings = {"preset": preset, "work": work, "batch_size": batch_size, "dtype": dtype}
    tried = [flag._asdict() for flag in FLAGS if flag.platform == platform]
    rows = [flag | report.NO_TIME_LEFT for flag in tried]
    figures = {
        "machine": machine(),
        "device": device,
        "versions": {"jax": jax.__version__},
        "settings": settings,
        "rows": rows,
    }
    ends = time.monotonic() + 60 * minutes
    print(f"{'gain (least to largest)':<28}flag: why it might")
    with tempfile.TemporaryDirectory() as cache:
        try:
            for i in [*range(len(rows))] * rounds:
                if rows[i]["status"] != "failed" and time.monotonic() < ends:
                    found = _one_more(rows[i], settings, cache, ends + GRACE)
                    rows[i] = tried[i] | found
                    print(_as_line(rows[i]), flush=True)
                    report.write(json, figures)
        except subprocess.TimeoutExpired:
            pass  # what is not measured says that no time was left
    report.write(json, figures)
    for row in rows:
        if row["status"] == "not run":
            print(_as_line(row))


def _device() -> list[str]:
    """The platform and the kind of the first device."""
    # Asked of another process: this one must not take the accelerator's memory.
    code = "import jax; print(jax.default_backend(), jax.devices()[0].device_kind, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-2:]


def _one_more(
    row: dict[str, Any], settings: dict[str, Any], cache: str, until: float
) -> dict[str, Any]:
    """What a flag's row says with another pair of rates, without it and with it, added.

    Raises:
      InputError: if there is no rate without it.
    """
    without = _rate("", settings, cache, until)
    if isinstance(without, str):
        raise InputError(f"nothing to compare flags with: {without}")
    with_it = _rate(row["text"], settings, cache, until)
    if isinstance(with_it, str):
        return {"status": "failed", "reason": with_it}
    pairs = [*row.get("clips_per_second", []), (with_it, without)]
    gains = spread([a / b for a, b in pairs])
    return {"status": "measured", "gain": gains, "clips_per_second": pairs}


def _rate(flag: str, settings: dict[str, Any], cache: str, until: float) -> float | str:
    """Clips a second of a process with the flag; or why there are none, in a line.

    Args:
      cache: folder of programs compiled before, which are not compiled again.
      until: when, of `time.monotonic`, the process is stopped.

    Raises:
      subprocess.TimeoutExpired: if it was stopped.
    """
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
        variables = {
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip(),
            "JAX_COMPILATION_CACHE_DIR": cache,
        }
        done = subprocess.run(
            [sys.executable, "-m", "timesformer_jax.cli", "benchmark", "model", *arguments],
            env=os.environ | variables,
            capture_output=True,
            text=True,
            timeout=until - time.monotonic(),
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


def _as_line(row: dict[str, Any]) -> str:
    return f"{gain(row):<26}  {row['text']}: {row['why']}"


def gain(row: dict[str, Any]) -> str:
    """Median, least and largest; or why there is none."""
    if row["status"] != "measured":
        return f"{row['status']}: {row['reason']}"
    found = row["gain"]
    return f"{found['median'] - 1:+.1%} ({found['least'] - 1:+.1%} to {found['largest'] - 1:+.1%})"
