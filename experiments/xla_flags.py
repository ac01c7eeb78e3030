"""What each of XLA's flags that might matter here gains in speed.

    .venv/bin/python experiments/xla_flags.py --batch_size=64 --json=flags.json

XLA reads its flags once, before the first program, so every rate comes from a process of its own:
`timesformer benchmark model` without the flag and with it, in turns; every flag is measured once
before any is measured again. A flag that this version of XLA does not know, or that fails, is
reported in its row. The flags in the environment's XLA_FLAGS apply to all processes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from timesformer_jax import storage
from timesformer_jax.benchmark import report
from timesformer_jax.benchmark.machine import machine
from timesformer_jax.benchmark.model import WORKLOADS
from timesformer_jax.timing import spread

GRACE = 60.0  # seconds that a process may run past the deadline


class Flag(NamedTuple):
    """A flag that might make training or inference faster.

    Attributes:
      platform: "gpu" or "cpu". TPUs read LIBTPU_INIT_ARGS instead; none is listed.
      text: as in XLA_FLAGS.
      why: what it is expected to change.
    """

    platform: str
    text: str
    why: str


# The most promising first, those that compile for long last.
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


def main(argv: Sequence[str] | None = None) -> None:
    options = parser().parse_args(argv)
    storage.check_output("--json", options.json)
    platform, device = first_device()
    settings = {
        "preset": options.preset,
        "workload": options.workload,
        "batch_size": options.batch_size or (1 if platform == "cpu" else 32),
        "dtype": options.dtype,
    }
    listed = [flag for flag in FLAGS if flag.platform == platform]
    about = {
        "machine": machine(),
        "device": device,
        "versions": {"jax": jax.__version__},
        "settings": settings,
    }
    print(f"{'gain (min to max)':<28}flag: why it might")
    try:
        measure(listed, settings, options.rounds, options.minutes, options.json, about)
    except MeasurementError as e:
        sys.exit(f"error: nothing to compare flags with: {e}")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="timesformer_base", help="the model")
    parser.add_argument("--workload", default="training", choices=WORKLOADS)
    parser.add_argument("--batch_size", type=int, help="clips; by default 32, on a CPU 1")
    parser.add_argument("--dtype", help="by default bfloat16, on a CPU float32")
    parser.add_argument("--rounds", type=int, default=2, help="runs with the flag and without")
    parser.add_argument("--minutes", type=float, default=8.0, help="no run is begun after this")
    parser.add_argument("--json", help="file for the figures")
    return parser


class MeasurementError(Exception):
    """A process measured no rate; the message is one line that says why."""


def measure(
    listed: list[Flag],
    settings: dict[str, Any],
    rounds: int = 2,
    minutes: float = 8.0,
    path: str | None = None,
    about: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Measures every flag, prints its row after each pair of runs, and writes all rows to `path`.

    Args:
      listed: the flags.
      settings: the arguments of `rate`.
      rounds: pairs of runs of each flag.
      minutes: no run is begun after this time; one that runs a minute longer is stopped.
      about: written to the file beside the rows.

    Raises:
      MeasurementError: if there is no rate without any flag.
    """
    rows = [flag._asdict() | report.NO_TIME_LEFT for flag in listed]
    deadline = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as cache:
        try:
            for i in [*range(len(rows))] * rounds:
                if rows[i]["status"] != "failed" and time.monotonic() < deadline:
                    pair = measure_pair(rows[i], settings, cache, deadline + GRACE)
                    rows[i] = listed[i]._asdict() | pair
                    print(as_line(rows[i]), flush=True)
                    report.write(path, (about or {}) | {"rows": rows})
        except subprocess.TimeoutExpired:
            pass  # the rows that are left say that there was no time
    report.write(path, (about or {}) | {"rows": rows})
    for row in rows:
        if row["status"] == "not run":
            print(as_line(row))
    return rows


def first_device() -> list[str]:
    """The platform and the kind of the first device."""
    # In another process, as this one must not allocate the device's memory.
    code = "import jax; print(jax.default_backend(), jax.devices()[0].device_kind, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-2:]


def measure_pair(
    row: dict[str, Any], settings: dict[str, Any], cache: str, deadline: float
) -> dict[str, Any]:
    """The result of a flag with one more pair of rates, with the flag and without.

    Raises:
      MeasurementError: if there is no rate without the flag.
    """
    without = rate("", settings, cache, deadline)
    try:
        with_flag = rate(row["text"], settings, cache, deadline)
    except MeasurementError as e:
        return {"status": "failed", "reason": str(e)}
    pairs = [*row.get("clips_per_second", []), (with_flag, without)]
    gains = spread([a / b for a, b in pairs])
    return {"status": "measured", "gain": gains, "clips_per_second": pairs}


def rate(flag: str, settings: dict[str, Any], cache: str, deadline: float) -> float:
    """Clips per second in a process with the flag.

    Args:
      settings: "preset", "workload", "batch_size" and "dtype" (None for the default).
      cache: folder of compiled programs, which are not compiled again.
      deadline: when, in `time.monotonic`, the process is stopped.

    Raises:
      MeasurementError: if the process fails or measures nothing.
      subprocess.TimeoutExpired: if it was stopped.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.json")
        arguments = [
            f"--presets={settings['preset']}",
            f"--workloads={settings['workload']}",
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
            timeout=deadline - time.monotonic(),
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            # XLA names an unknown flag before it prints its stack.
            reason = next((line for line in lines if "Unknown flag" in line), lines[-1])
            raise MeasurementError(reason.removeprefix("error:").strip())
        with open(path) as f:
            [row] = json.load(f)["rows"]
    if row["status"] != "measured":
        raise MeasurementError(f"{row['status']}: {row['reason']}")
    rates = row["clips_per_second"]
    return rates.get("cpu", rates["wall"])  # processor time, as other processes share the cores


def as_line(row: dict[str, Any]) -> str:
    return f"{report.gain(row):<26}  {row['text']}: {row['why']}"


if __name__ == "__main__":
    main()
