"""`timesformer benchmark attention --autotune`: finds the fastest attention kernel of this device.

Times every implementation of each attention of the schemes on its own, forward and with its
gradient, and writes the table that `models.ops.kernels.select` reads. The table distinguishes the
lengths of sequences, not their number: every length is timed with as many clips as a training step
has of that size.
"""

from __future__ import annotations

import json
import math
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from timesformer_jax.benchmark import report
from timesformer_jax.benchmark.timing import time_runs
from timesformer_jax.models.attention import (
    attend_along_frames,
    attend_along_patches,
    over_height,
    over_time,
)
from timesformer_jax.models.config import TimeSformerConfig
from timesformer_jax.models.ops.kernels import select

SECONDS = 0.3  # to measure one function
PATCHES = 32 * 8 * 14 * 14  # in the timed batch: 32 clips of 8 x 224; at least one clip
XLA = {"temporal": attend_along_frames, "spatial": attend_along_patches}
TOLERANCE = 0.02  # of the largest value; the rounding of bfloat16 gradients is below it


def autotune(
    configs: Iterable[TimeSformerConfig], deadline: float
) -> Iterator[list[dict[str, Any]]]:
    """Yields the rows of `measure` for each attention of the models, and adds them to the table.

    After `deadline` (of `time.monotonic`) it yields a row with an "error" for each attention that
    is left, which is not added to the table.
    """
    cases: dict = {}
    for config in configs:
        clips = max(1, PATCHES // (config.num_frames * math.prod(config.grid)))
        for kind, shape, dtype in attention_cases(config, clips):
            cases.setdefault((kind, _length(kind, shape), shape[-2:], dtype), (kind, shape, dtype))
    for kind, shape, dtype in cases.values():
        if time.monotonic() > deadline:
            row = {"kind": kind, "length": _length(kind, shape), "implementation": "all"}
            yield [row | {"error": "not timed: no time left"}]
            continue
        rows = measure(kind, shape, dtype, XLA[kind], _median_seconds)
        report.write(select.TABLE, merge(rows, select.TABLE))
        yield rows


def attention_cases(
    config: TimeSformerConfig, batch_size: int
) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Kind, shape of qkv and dtype of every attention for which the model selects a kernel."""
    t, grid = config.num_frames, config.grid
    heads = 3, config.num_heads, config.hidden_size // config.num_heads
    for layer in config.scheme.layers:
        if layer.attention_fn is over_time:
            shape = batch_size, t + layer.joins_cls, math.prod(grid), *heads
            yield "temporal", shape, config.dtype
        elif layer.attention_fn is not over_height:
            lengths = np.bincount(layer.partition(t, grid).reshape(-1))
            for length, count in zip(*np.unique(lengths, return_counts=True)):
                shape = (batch_size, int(count), int(length) + layer.joins_cls, *heads)
                yield "spatial", shape, config.dtype


def _length(kind: str, shape: tuple[int, ...]) -> int:
    return shape[1 if kind == "temporal" else 2]


def _median_seconds(function: Callable[[jax.Array], jax.Array], qkv: jax.Array) -> float:
    return time_runs(lambda _: function(qkv), jax.block_until_ready, SECONDS).wall["median"]


def measure(
    kind: str,
    shape: tuple[int, ...],
    dtype: Any,
    xla: Callable[[jax.Array], jax.Array],
    seconds: Callable[[Callable, jax.Array], float],
) -> list[dict[str, Any]]:
    """Times every implementation of one attention on the default device.

    Args:
      kind: "temporal" or "spatial".
      shape: of qkv on this one device, as `select.attention` takes it.
      xla: the formulation that every other implementation must agree with.
      seconds: returns the run time of a compiled function of qkv.

    Returns:
      A row of JSON values for each implementation. It has "error" in place of "seconds" if the
      implementation cannot run, or if its values or gradients differ from those of `xla`. Those are
      computed one head at a time, as the logits of all heads may exceed the memory.
    """
    qkv = jax.random.normal(jax.random.key(0), shape, dtype)
    attentions = {"xla": xla}
    attentions |= {name: kernel.attention for name, kernel in select.KERNELS[kind].items()}
    rows: list[dict[str, Any]] = []
    expected = None
    for name, attention in attentions.items():
        row = select.describe_case(kind, shape, dtype) | {"implementation": name}
        error = select.unsupported(kind, shape, dtype, name)
        functions = jax.jit(attention), jax.jit(jax.grad(_loss(attention)))
        try:
            if name == "xla":
                expected = _evaluate_by_head(functions, qkv)
            elif error is None and expected is None:
                error = "xla has no values to compare it with"
            elif error is None and expected is not None:
                error = _difference(expected, _evaluate(functions, qkv))
            if error is None:
                forward, gradient = (seconds(function, qkv) for function in functions)
                row["seconds"] = {"forward": forward, "gradient": gradient}
        except Exception as e:  # any error of the compiler; the others are still timed
            error = f"{type(e).__name__}: {e}".splitlines()[0]
        rows.append(row if error is None else row | {"error": error})
    return rows


def _loss(attention: Callable) -> Callable:
    return lambda qkv: jnp.square(attention(qkv).astype(jnp.float32)).sum()


def _evaluate(functions: Iterable[Callable], qkv: jax.Array) -> list[np.ndarray]:
    return [np.asarray(function(qkv), np.float32) for function in functions]


def _evaluate_by_head(functions: Iterable[Callable], qkv: jax.Array) -> list[np.ndarray]:
    heads = [_evaluate(functions, qkv[..., i : i + 1, :]) for i in range(qkv.shape[-2])]
    values, gradients = zip(*heads)
    return [np.concatenate(values, axis=-1), np.concatenate(gradients, axis=-2)]


def _difference(expected: list[np.ndarray], found: list[np.ndarray]) -> str | None:
    for name, a, b in zip(("values", "gradients"), expected, found):
        worst = np.abs(a - b).max() / np.abs(a).max()
        if not worst <= TOLERANCE:  # also true for NaN
            return f"its {name} differ from xla's by {worst:.2g} of the largest"
    return None


def merge(rows: list[dict[str, Any]], table: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a table, in which `rows` replace those about the same attentions."""
    new = {select.case_key(row) for row in rows}
    return [row for row in json.loads(table.read_text()) if select.case_key(row) not in new] + rows


def as_line(row: dict[str, Any]) -> str:
    """A row as text."""
    start = f"{row['kind']:<9} {row['length']:>5} tokens  {row['implementation']:<10}"
    if "error" in row:
        return f"{start}  {row['error']}"
    forward, gradient = (row["seconds"][name] * 1e3 for name in ("forward", "gradient"))
    return f"{start}  {forward:.3f} ms, with gradient {gradient:.3f} ms"
