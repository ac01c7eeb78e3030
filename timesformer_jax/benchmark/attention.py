"""`timesformer benchmark attention`: what each scheme costs by length and size of the clip.

    timesformer benchmark attention --schemes=divided,joint --frames=8,32,96 --sides=224,448

A row is the whole model of --preset on one batch: its forward pass, and its forward and backward
pass (loss and gradients of all parameters, no drop path, no optimizer), from normalised clips in
the device's memory. Beside it stands what `models.costs` counts. This is the paper's figure 3 with
time and memory added.

Shares are of the whole model's FLOPs. No output needs the last block's MLP on the patches, which a
compiler leaves out: of 12 blocks 4%, of one with --depth=1 most.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from timesformer_jax.benchmark import report
from timesformer_jax.benchmark.autotune import as_line as kernel_line
from timesformer_jax.benchmark.autotune import choose_kernels
from timesformer_jax.benchmark.machine import Yardstick, about, default_dtype, yardstick
from timesformer_jax.benchmark.programs import (
    SETS,
    Program,
    clip_shape,
    measured,
    random_clips,
    random_parameters,
)
from timesformer_jax.distributed.hardware import GIB
from timesformer_jax.models.config import TimeSformerConfig
from timesformer_jax.models.costs import comparisons, macs, parameter_count
from timesformer_jax.models.ops.kernels.select import TABLE
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
    choose: bool = False,
    seconds: float = 60.0,
    minutes: float = 5.0,
    memory: float | None = None,
    json: str | None = None,
) -> None:
    """Measures every scheme on every clip and prints a row as it comes.

    The clips of figure 3 come first, of the fewest frames or the smallest, then all others; cheap
    ones before dear ones.

    Args:
      schemes: of `attention.SCHEMES`; all by default.
      frames, sides: of the clips; by default 8 to 96 frames and 224 to 560 pixels.
      preset: the model.
      depth: blocks, in place of the preset's.
      dtype: by default bfloat16, on a CPU float32.
      batch_size: clips a run.
      quick: whether one block and three lengths will do, where nothing else is said.
      choose: whether to time the attention kernels first, alone, and have all programs use the
        fastest from then on: the table of `kernels.choice` is written.
      seconds: that the runs of one pass may take; what is predicted to take longer is not run.
      minutes: after which no further row is begun.
      memory: GiB that a program may need; by default what the device has.
      json: file for the figures.

    Raises:
      InputError: for a name, size or file that cannot be.
    """
    ends = time.monotonic() + 60 * minutes
    report.check_folder(json)
    fields = {} if depth is None and not quick else {"depth": depth or 1}
    configs = [
        preset_of(preset, attention=scheme, num_frames=t, image_size=side, **fields,
                  dtype=dtype or default_dtype())
        for scheme, t, side in itertools.product(
            schemes or SCHEMES,
            report.numbers("frames", frames or FRAMES[: 3 if quick else None]),
            report.numbers("sides", sides or SIDES[: 1 if quick else None]),
        )
    ]  # fmt: skip
    shortest = min(config.num_frames for config in configs)
    smallest = min(config.image_size for config in configs)

    def in_turn(config: TimeSformerConfig) -> tuple[bool, int]:
        both = config.num_frames > shortest and config.image_size > smallest
        return both, macs(config)

    configs.sort(key=in_turn)
    yard = yardstick(configs[0].dtype, memory and memory * GIB)
    what = f"{preset}, {configs[0].depth} blocks, {configs[0].dtype}, batch {batch_size}"
    print(f"{what}; {report.headline(yard)}\n")
    settings = {"preset": preset, "depth": configs[0].depth, "batch_size": batch_size,
                "seconds": seconds, "minutes": minutes}  # fmt: skip
    figures = about(yard) | {"settings": settings, "kernels": [], "rows": []}

    def over() -> bool:
        return time.monotonic() > ends

    if choose:
        for kernels in choose_kernels(configs, over):
            print(*map(kernel_line, kernels), sep="\n", flush=True)
            figures["kernels"] += kernels
        print(f"from now on programs use the fastest: {TABLE}\n")
    print(header())
    for row in rows(configs, batch_size, yard, seconds, over):
        print(as_line(row), flush=True)
        figures["rows"].append(row)
        report.write(json, figures)  # what there is, if the next row ends the process


def rows(
    configs: Sequence[TimeSformerConfig],
    batch_size: int,
    yard: Yardstick,
    seconds: float,
    over: Callable[[], bool],
) -> Iterator[dict[str, Any]]:
    """A row for each model: its costs, and "forward" and "training" as `measured` gives them."""
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
            if over():
                row[name] = report.NO_TIME_LEFT
            else:
                row[name] = measured(program(config, name, batch_size), yard, seconds)
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
        return lambda i: compiled(params, clips[i % SETS])

    flops = (2 if name == "forward" else 6) * macs(config) * batch_size
    return Program(flops, batch_size, lower, start)


# ---- telling ------------------------------------------------------------------------------------


def header() -> str:
    passes = "".join(f" | {name:<49}" for name in PASSES).rstrip()
    units = f" | {'ms (least to largest)':<22}{'GiB':>6}  {'TFLOP/s, of product':<19}" * 2
    names = f"{'scheme':<16}{'clip':<9}{'pairs':>6}{'GMACs':>8}"
    return f"{'':<{len(names)}}{passes}\n{names}{units.rstrip()}"


def as_line(row: dict[str, Any]) -> str:
    """A row for people."""
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
