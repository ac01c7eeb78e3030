"""What the benchmarks share in being asked and in telling: lists of numbers, cells, JSON files."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from timesformer_jax.benchmark.machine import Yardstick, machine
from timesformer_jax.distributed.hardware import GIB
from timesformer_jax.errors import InputError

# What a row says that was not begun before --minutes were over.
NO_TIME_LEFT = {"status": "not run", "reason": "no time left"}


def numbers(flag: str, words: Sequence[str]) -> list[int]:
    """The numbers of a flag that lists them.

    Raises:
      InputError: unless all are whole and at least 1.
    """
    if not all(word.isdecimal() and int(word) for word in words):
        raise InputError(f"--{flag}={','.join(words)} must be numbers from 1 on, as 8,16,32")
    return [int(word) for word in words]


def check_folder(path: str | None) -> None:
    """Raises InputError, before anything is measured, if the file of --json cannot be."""
    if path is None:
        return
    if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
        raise InputError(f"the folder of --json={path} does not exist")
    if os.path.isdir(path):
        raise InputError(f"--json={path} is a folder; name a file")


def write(path: str | os.PathLike | None, figures: Any) -> None:
    """Writes the figures, whole or not at all; nothing where no file was asked for.

    Raises:
      InputError: if the file cannot be written.
    """
    if path is None:
        return
    try:
        with open(f"{path}.new", "w") as f:
            json.dump(figures, f, indent=1, allow_nan=False)
            f.write("\n")
        os.replace(f"{path}.new", path)
    except OSError as e:
        raise InputError(f"cannot write {path}: {e.strerror}") from None


def headline(yard: Yardstick) -> str:
    """The device and what figures are shares of, in a line."""
    host = machine()
    gemm = f"{tera(yard.gemm['wall'])} TFLOP/s"
    if "cpu" in yard.gemm:
        gemm += f", {tera(yard.gemm['cpu'])} in a core's time"
    sheet = f"datasheet {tera(yard.datasheet)}" if yard.datasheet else "no datasheet"
    return (
        f"{host['processor']}, {host['cores']} cores, load {host['load_average']:.1f}, "
        f"{yard.memory / GIB:.1f} GiB; {yard.dtype} product measured {gemm}, {sheet}"
    )


def milliseconds(seconds: dict[str, float]) -> str:
    """Median, least and largest."""
    median, least, largest = (
        format(seconds[k] * 1e3, ".0f" if seconds["median"] > 0.1 else ".2f")
        for k in ("median", "least", "largest")
    )
    return f"{median} ({least}-{largest})"


def batch(row: dict[str, Any]) -> str:
    """A contender's best batch, and the one that no time was left for if there is one."""
    last = row["tried"][-1]
    more = f" ({last['batch_size']} not tried)" if last["status"] == "not run" else ""
    return f"{row['batch_size']}{more}"


def three(values: dict[str, float]) -> str:
    """Median, least and largest of values that have no unit here."""
    return "{median:.3g} ({least:.3g}-{largest:.3g})".format(**values)


def tera(flops: float) -> str:
    return f"{flops / 1e12:.3g}"


def rate(found: dict[str, Any]) -> str:
    """TFLOP/s of the model's FLOPs and their share of the measured product.

    On a CPU, in brackets, the share of what a core's time gives.
    """
    share = found["gemm_share"]
    core = f" ({share['cpu']:.0%})" if "cpu" in share else ""
    return f"{tera(found['flops_per_second']['wall'])} {share['wall']:.0%}{core}"
