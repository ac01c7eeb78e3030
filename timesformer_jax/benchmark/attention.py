"""`timesformer benchmark attention`: the cost of every scheme by length and size of the clip.

    timesformer benchmark attention --schemes=divided,joint --frames=8,32,96 --sides=224,448

A row measures the whole model of --preset on one batch of normalised clips in device memory: its
forward pass, and its forward and backward pass (loss and gradients of all parameters, without drop
path and optimizer), beside the costs counted by `models.costs`. This is the paper's figure 3, with
time and memory added.

Shares refer to the FLOPs of the whole model. The compiler removes the last block's MLP on the
patches, which no output needs: 4% of 12 blocks, most of the model if --depth=1.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from timesformer_jax import storage
from timesformer_jax.benchmark import report
from timesformer_jax.benchmark.machine import DevicePeak, default_dtype, describe, measure_peak
from timesformer_jax.benchmark.programs import (
    INPUT_SETS,
    Program,
    clip_shape,
    measure_program,
    random_clips,
    random_parameters,
)
from timesformer_jax.distributed.hardware import GIB
from timesformer_jax.models import tuning
from timesformer_jax.models.config import TimeSformerConfig
from timesformer_jax.models.costs import comparisons, macs, parameter_count
from timesformer_jax.models.ops.kernels import select
from timesformer_jax.models.presets import preset as preset_of
from timesformer_jax.models.schemes import SCHEMES
from timesformer_jax.models.timesformer import abstract, parameters, with_parameters

FRAMES, SIDES = ("8", "16", "32", "64", "96"), ("224", "336", "448", "560")
PASSES = ("forward", "training")


def benchmark_attention(
    schemes: Sequence[str] | None = None,
    frames: Sequence[str] | None = None,
    sides: Sequence[str] | None = None,
    preset: str = "timesformer_base",
    depth: int | None = None,
    dtype: str | None = None,
    batch_size: int = 1,
    quick: bool = False,
    attention_kernels: str = "auto",
    seconds: float = 60.0,
    minutes: float = 5.0,
    memory: float | None = None,
    json: str | None = None,
) -> None:
    """Measures every scheme on every clip size, and prints a row after each.

    Args:
      schemes: names of `schemes.SCHEMES`; by default all.
      frames, sides: of the clips; by default 8 to 96 frames and 224 to 560 pixels.
      preset: the model.
      depth: blocks; by default the preset's.
      dtype: by default bfloat16, on a CPU float32.
      batch_size: clips per run.
      quick: whether to default to one block, three lengths and one side.
      attention_kernels: "auto", "xla" or the name of a kernel.
      seconds: the most that the runs of one pass may take, as predicted.
      minutes: no row is begun after this time.
      memory: GiB that a program may use; by default the device's memory.
      json: file for the figures.

    Raises:
      InputError: if a name, size or file is wrong.
    """
    deadline = time.monotonic() + 60 * minutes
    storage.check_output("--json", json)
    select.check_name(attention_kernels)
    fields: dict[str, Any] = {"dtype": dtype or default_dtype()}
    if depth is not None or quick:
        fields["depth"] = depth or 1
    frames = report.numbers("frames", frames or FRAMES[: 3 if quick else None])
    sides = report.numbers("sides", sides or SIDES[: 1 if quick else None])
    configs = configs_to_measure(preset, schemes or list(SCHEMES), frames, sides, fields)
    peak = measure_peak(configs[0].dtype, memory and memory * GIB)
    model = f"{preset}, {configs[0].depth} blocks, {configs[0].dtype}, batch {batch_size}"
    print(f"{model}; {report.headline(peak)}\n")
    settings = {"preset": preset, "depth": configs[0].depth, "batch_size": batch_size,
                "attention_kernels": attention_kernels, "seconds": seconds,
                "minutes": minutes}  # fmt: skip
    figures = describe(peak) | {"settings": settings, "rows": []}
    print(header())
    with tuning.using(attention_kernels):
        for row in rows(configs, batch_size, peak, seconds, deadline):
            print(as_line(row), flush=True)
            figures["rows"].append(row)
            report.write(json, figures)  # after each row: the next may crash the process


def configs_to_measure(
    preset: str,
    schemes: Sequence[str],
    frames: Sequence[int],
    sides: Sequence[int],
    fields: dict[str, Any],
) -> list[TimeSformerConfig]:
    """Models for all combinations: first the clips of figure 3 (the fewest frames or the smallest
    side), then the others; cheap ones before expensive ones."""
    configs = [
        preset_of(preset, attention=scheme, num_frames=t, image_size=side, **fields)
        for scheme, t, side in itertools.product(schemes, frames, sides)
    ]

    def order(config: TimeSformerConfig) -> tuple[bool, int]:
        in_figure_3 = config.num_frames == min(frames) or config.image_size == min(sides)
        return not in_figure_3, macs(config)

    return sorted(configs, key=order)


def rows(
    configs: Sequence[TimeSformerConfig],
    batch_size: int,
    peak: DevicePeak,
    seconds: float,
    deadline: float,
) -> Iterator[dict[str, Any]]:
    """A row for each model: its costs, and the result of `measure_program` for both passes."""
    for config in configs:
        products = macs(config)
        row = {
            "scheme": config.attention,
            "frames": config.num_frames,
            "side": config.image_size,
            "comparisons": comparisons(config),
            "macs": products,
            "parameters": parameter_count(config),
        }
        for name in PASSES:
            if time.monotonic() > deadline:
                row[name] = report.NO_TIME_LEFT
            else:
                row[name] = measure_program(program(config, name, batch_size), peak, seconds)
        yield row


def program(config: TimeSformerConfig, name: str, batch_size: int) -> Program:
    """The forward pass of a batch ("forward"), or its loss and gradients ("training")."""

    def forward(params: dict, video: jax.Array) -> jax.Array:
        return with_parameters(config, params)(video)

    def loss(params: dict, video: jax.Array) -> jax.Array:
        logits, labels = forward(params, video), jnp.zeros(len(video), int)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    functions: dict[str, Callable] = {"forward": forward, "training": jax.value_and_grad(loss)}
    function = functions[name]
    clip = batch_size, config.num_frames, config.image_size

    def lower() -> jax.stages.Lowered:
        return jax.jit(function).lower(parameters(abstract(config)), clip_shape(*clip))

    def start(compiled: jax.stages.Compiled) -> Callable[[int], Any]:
        params, clips = jax.device_put(random_parameters(config)), random_clips(*clip)
        return lambda i: compiled(params, clips[i % INPUT_SETS])

    flops = (2 if name == "forward" else 6) * macs(config) * batch_size
    choose = functools.partial(tuning.choose_kernels, config, *clip, gradients=name == "training")
    return Program(flops, batch_size, choose, lower, start)


# ---- printing ---------------------------------------------------------------------------------


def header() -> str:
    passes = "".join(f" | {name:<49}" for name in PASSES).rstrip()
    units = f" | {'ms (min to max)':<22}{'GiB':>6}  {'TFLOP/s, of product':<19}" * 2
    names = f"{'scheme':<16}{'clip':<9}{'pairs':>6}{'GMACs':>8}"
    return f"{'':<{len(names)}}{passes}\n{names}{units.rstrip()}"


def as_line(row: dict[str, Any]) -> str:
    """A row as text."""
    clip = f"{row['frames']} x {row['side']}"
    start = f"{row['scheme']:<16}{clip:<9}{row['comparisons']:>6.0f}{row['macs'] / 1e9:>8.1f}"
    return start + "".join(f" | {_cell(row[name]):<49}" for name in PASSES).rstrip()


def _cell(found: dict[str, Any]) -> str:
    if found["status"] != "measured":
        return f"{found['status']}: {found['reason']}"
    return (
        f"{report.milliseconds(found['seconds']['wall']):<22}{found['bytes'] / GIB:>6.2f}  "
        f"{report.rate(found)}"
    )
