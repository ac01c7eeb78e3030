"""`timesformer benchmark attention --choose`: which kernel attends the fastest on this device.

Times every implementation of each attention that the schemes are made of, alone, forward and with
its gradient, and puts them into the table from which `kernels.choice` picks. The table tells
lengths apart, not how many sequences there are: each is timed on as many clips as a step would have
of that size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from timesformer_jax.benchmark import report
from timesformer_jax.benchmark.timing import timed
from timesformer_jax.models.attention import (
    attend_along_frames,
    attend_along_patches,
    over_height,
    over_time,
)
from timesformer_jax.models.config import TimeSformerConfig
from timesformer_jax.models.ops.kernels import select as choice

SECONDS = 0.3
TOKENS = 32 * 8 * 14 * 14  # of the clips that are timed together: 32 of 8 x 224, at least one
FORMULATIONS = {"temporal": attend_along_frames, "spatial": attend_along_patches}


def choose_kernels(
    configs: Iterable[TimeSformerConfig], over: Callable[[], bool]
) -> Iterator[list[dict[str, Any]]]:
    """The rows of `kernels.choice.measure` for each attention of the clips, saved as they come.

    Once it is `over`, a row for each of those left says that it was not timed; the table has none.
    """
    first: dict = {}
    for config in configs:
        clips = max(1, TOKENS // (config.num_frames * math.prod(config.grid)))
        for kind, shape, dtype in attentions(config, clips):
            length = shape[1 if kind == "temporal" else 2]
            first.setdefault((kind, length, shape[-2:], dtype), (kind, shape, dtype))
    for kind, shape, dtype in first.values():
        if over():
            length = shape[1 if kind == "temporal" else 2]
            row = {"kind": kind, "length": length, "implementation": "all"}
            yield [row | {"error": "not timed: no time left"}]
            continue
        rows = choice.measure(kind, shape, dtype, FORMULATIONS[kind], _seconds)
        report.write(choice.TABLE, choice.merged(rows, choice.TABLE))
        yield rows


def attentions(
    config: TimeSformerConfig, batch_size: int
) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Kind, shape of qkv and dtype of every attention that the model asks `choice.choose` for."""
    t, grid = config.num_frames, config.grid
    heads = 3, config.num_heads, config.hidden_size // config.num_heads
    for layer in config.scheme.layers:
        if layer.attention_fn is over_time:
            shape = batch_size, t + layer.joins_cls, math.prod(grid), *heads
            yield "temporal", shape, config.dtype
        elif layer.attention_fn is not over_height:
            of_sequences = np.bincount(layer.partition(t, grid).reshape(-1))
            for length, count in zip(*np.unique(of_sequences, return_counts=True)):
                shape = (batch_size, int(count), int(length) + layer.joins_cls, *heads)
                yield "spatial", shape, config.dtype


def _seconds(function: Callable[[jax.Array], jax.Array], qkv: jax.Array) -> float:
    return timed(lambda _: function(qkv), jax.block_until_ready, SECONDS).wall["median"]


def as_line(row: dict[str, Any]) -> str:
    """A row for people."""
    start = f"{row['kind']:<9} {row['length']:>5} tokens  {row['implementation']:<10}"
    if "error" in row:
        return f"{start}  {row['error']}"
    forward, gradient = (row["seconds"][name] * 1e3 for name in ("forward", "gradient"))
    return f"{start}  {forward:.3f} ms, with gradient {gradient:.3f} ms"
