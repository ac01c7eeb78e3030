"""Shared by the benchmarks: parsing lists of numbers, formatting results, writing JSON files."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from timesformer_jax import storage
from timesformer_jax.benchmark.machine import DevicePeak, machine
from timesformer_jax.distributed.hardware import GIB
from timesformer_jax.errors import InputError

# The status of a row that was not begun within --minutes.
NO_TIME_LEFT = {"status": "not run", "reason": "no time left"}


def numbers(flag: str, words: Sequence[str]) -> list[int]:
    """Parses the values of a flag that takes a list of numbers.

    Raises:
      InputError: if one is not a whole number from 1 to a million.
    """
    if not all(word.isdecimal() and len(word) < 7 and int(word) for word in words):
        raise InputError(
            f"--{flag}={','.join(words)} must be whole numbers from 1, for example 8,16,32"
        )
    return [int(word) for word in words]


def write(path: str | os.PathLike | None, figures: Any) -> None:
    """Writes the figures as JSON, atomically. Does nothing if `path` is None.

    Raises:
      InputError: if the file cannot be written.
    """
    if path is None:
        return
    content = json.dumps(figures, indent=1, allow_nan=False) + "\n"
    with storage.disk_errors(path):
        storage.write_atomically(storage.absolute(path), content.encode())


def headline(peak: DevicePeak) -> str:
    """One line about the device and the peak that shares refer to."""
    host = machine()
    gemm = f"{tera(peak.gemm['wall'])} TFLOP/s"
    if "cpu" in peak.gemm:
        gemm += f", {tera(peak.gemm['cpu'])} per core"
    sheet = f"datasheet {tera(peak.datasheet)}" if peak.datasheet else "no datasheet"
    return (
        f"{host['processor']}, {host['cores']} cores, load {host['load_average']:.1f}, "
        f"{peak.memory / GIB:.1f} GiB; {peak.dtype} product measured {gemm}, {sheet}"
    )


def milliseconds(seconds: dict[str, float]) -> str:
    """Median, minimum and maximum."""
    median, low, high = (
        format(seconds[k] * 1e3, ".0f" if seconds["median"] > 0.1 else ".2f")
        for k in ("median", "min", "max")
    )
    return f"{median} ({low}-{high})"


def batch(row: dict[str, Any]) -> str:
    """A contender's best batch size, and the next one if there was no time left to try it."""
    last = row["tried"][-1]
    more = f" ({last['batch_size']} not tried)" if last["status"] == "not run" else ""
    return f"{row['batch_size']}{more}"


def median_and_range(values: dict[str, float]) -> str:
    """Median, minimum and maximum, without a unit."""
    return "{median:.3g} ({min:.3g}-{max:.3g})".format(**values)


def gain(row: dict[str, Any]) -> str:
    """A row's gain, median, minimum and maximum, as percentages; or why it has none."""
    if row["status"] != "measured":
        return f"{row['status']}: {row['reason']}"
    median, low, high = (f"{row['gain'][k] - 1:+.1%}" for k in ("median", "min", "max"))
    return f"{median} ({low} to {high})"


def tera(flops: float) -> str:
    return f"{flops / 1e12:.3g}"


def rate(found: dict[str, Any]) -> str:
    """TFLOP/s of the model's FLOPs, and their share of the measured matrix product's rate.

    On a CPU the share by processor time follows in brackets.
    """
    share = found["gemm_share"]
    core = f" ({share['cpu']:.0%})" if "cpu" in share else ""
    return f"{tera(found['flops_per_second']['wall'])} {share['wall']:.0%}{core}"
