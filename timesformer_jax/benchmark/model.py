"""`timesformer benchmark model`: clips per second, memory and MFU of inference and training.

    timesformer benchmark model --presets=timesformer_base,timesformer_hr --json=model.json

One device, one view. Inference is the forward pass of `predict`, from uint8 frames in device memory
to logits. Training is the step of `timesformer train`: uint8 frames cropped, resized, flipped and
normalised, the forward pass with drop path, the backward pass, SGD with Nesterov momentum. Reading
and decoding videos is measured by `benchmark input`.

MFU counts the model's FLOPs: two for each multiply-accumulate forward, six in training. What fused
projections save, the compiler removes or `remat` repeats does not change them; "executed_flops" in
the figures is the compiler's count.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from timesformer_jax import storage
from timesformer_jax.benchmark import report
from timesformer_jax.benchmark.machine import DevicePeak, default_dtype, describe, measure_peak
from timesformer_jax.benchmark.programs import (
    INPUT_SETS,
    Program,
    measure_program,
    random_parameters,
)
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.data.input.sampling import decoded_side
from timesformer_jax.distributed.hardware import GIB
from timesformer_jax.distributed.mesh import make_mesh
from timesformer_jax.errors import InputError
from timesformer_jax.models import tuning
from timesformer_jax.models.config import TimeSformerConfig
from timesformer_jax.models.costs import flops, macs, parameter_count
from timesformer_jax.models.ops.kernels import select
from timesformer_jax.models.presets import preset
from timesformer_jax.models.timesformer import abstract, parameters, with_parameters
from timesformer_jax.training.optimizer import make_optimizer
from timesformer_jax.training.step import abstract_state, init_state, make_train_step
from timesformer_jax.transforms.preprocess import preprocess

WORKLOADS = ("inference", "training")
MIN_GAIN = 1.02  # a doubled batch must raise the rate by this factor for the search to go on

# The optimizer of the recipes, without ml_collections.
RECIPE = SimpleNamespace(
    name="sgd", momentum=0.9, weight_decay=1e-4, clip_norm=0.0, layer_decay=1.0, trainable="all"
)  # fmt: skip


def benchmark_model(
    presets: Sequence[str] | None = None,
    workloads: Sequence[str] | None = None,
    batch_sizes: Sequence[str] | None = None,
    dtype: str | None = None,
    remat: str = "none",
    attention_kernels: str = "auto",
    seconds: float = 60.0,
    minutes: float = 5.0,
    memory: float | None = None,
    json: str | None = None,
) -> None:
    """Measures every preset and workload at every batch size, and prints a row after each.

    Args:
      presets: by default timesformer_base.
      workloads: "inference" and "training".
      batch_sizes: clips; by default 1, 2, 4, ... until the rate no longer grows or it does not fit.
      dtype: by default bfloat16, on a CPU float32.
      remat: of the training step.
      attention_kernels: "auto", "xla" or the name of a kernel.
      seconds: the most that a row's runs may take, as predicted.
      minutes: no row is begun after this time.
      memory: GiB that a program may use; by default the device's memory.
      json: file for the figures.

    Raises:
      InputError: if a name, size or file is wrong.
    """
    deadline = time.monotonic() + 60 * minutes
    storage.check_output("--json", json)
    for workload in workloads or WORKLOADS:
        if workload not in WORKLOADS:
            raise InputError(f"--workloads has no {workload!r}; there are {', '.join(WORKLOADS)}")
    select.check_name(attention_kernels)
    dtype = dtype or default_dtype()
    configs = {
        name: preset(name, dtype=dtype, remat=remat) for name in presets or ["timesformer_base"]
    }
    sizes = report.numbers("batch_sizes", batch_sizes) if batch_sizes else None
    peak = measure_peak(dtype, memory and memory * GIB)
    print(f"{dtype}, remat {remat}; {report.headline(peak)}\n\n{header()}")
    settings = {"dtype": dtype, "remat": remat, "attention_kernels": attention_kernels}
    figures = describe(peak) | {"settings": settings, "rows": []}
    for name, workload in itertools.product(configs, workloads or WORKLOADS):
        measure = functools.partial(
            measure_row, name, configs[name], workload, peak=peak, seconds=seconds,
            deadline=deadline,
        )  # fmt: skip
        rows = []
        with tuning.using(attention_kernels):
            for row in search_batch_sizes(measure, sizes):
                print(as_line(row), flush=True)
                rows.append(row)
                figures["rows"].append(row)
                report.write(json, figures)  # after each row: the next may crash the process
        if best := best_row(rows):
            rate = best["clips_per_second"]["wall"]
            print(f"best: {name} {workload} {rate:.3g} clips/s at {best['batch_size']} a batch")


def measure_row(
    name: str,
    config: TimeSformerConfig,
    workload: str,
    batch_size: int,
    peak: DevicePeak,
    seconds: float,
    deadline: float,
) -> dict[str, Any]:
    """The costs of a preset's model and the result of `measure_program` for one batch size."""
    row = {
        "preset": name,
        "workload": workload,
        "batch_size": batch_size,
        "macs": macs(config),
        "parameters": parameter_count(config),
    }
    if time.monotonic() > deadline:
        return row | report.NO_TIME_LEFT
    return row | measure_program(PROGRAMS[workload](config, batch_size), peak, seconds)


def search_batch_sizes(
    measure: Callable[[int], dict[str, Any]], sizes: Sequence[int] | None, start: int = 1
) -> Iterator[dict[str, Any]]:
    """Yields a row for each batch size.

    Args:
      measure: returns the row of a batch size, with its "status" and, if that is "measured", its
        "clips_per_second".
      sizes: batch sizes. None for `start` and its doubles, as long as they are measured and raise
        the rate.
    """
    if sizes:
        yield from map(measure, sizes)
        return
    best = 0.0
    for size in (start * 2**n for n in itertools.count()):
        row = measure(size)
        yield row
        if row["status"] != "measured":
            return
        rate = row["clips_per_second"]["wall"]
        if rate < MIN_GAIN * best:
            return
        best = max(best, rate)


def best_row(rows: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The row with the highest rate; None if no row was measured."""
    done = [row for row in rows if row["status"] == "measured"]
    return max(done, key=lambda row: row["clips_per_second"]["wall"], default=None)


# ---- what is measured ---------------------------------------------------------------------------


def inference(
    config: TimeSformerConfig, batch_size: int, mesh: jax.sharding.Mesh | None = None
) -> Program:
    """Frames to logits. The counted FLOPs are those of the model without fused projections.

    Args:
      mesh: of one device, by default the first.
    """
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    clip = ClipSpec(frames=config.num_frames, crop=config.image_size)

    def logits(params: dict, batch: dict[str, jax.Array]) -> jax.Array:
        clips = preprocess(batch["frames"], batch["crop_boxes"], clip)
        return with_parameters(config, params)(clips)

    def start(compiled: jax.stages.Compiled) -> Callable[[int], Any]:
        params = jax.device_put(random_parameters(config))
        batches = random_batches(config, batch_size)
        return lambda i: compiled(params, batches[i % INPUT_SETS])

    def lower() -> jax.stages.Lowered:
        with jax.set_mesh(mesh):
            return jax.jit(logits).lower(
                parameters(abstract(config)), batch_shapes(config, batch_size)
            )

    choose = functools.partial(choose_kernels, config, batch_size, mesh, gradients=False)
    return Program(flops(config) * batch_size, batch_size, choose, lower, start)


def training(
    config: TimeSformerConfig, batch_size: int, mesh: jax.sharding.Mesh | None = None
) -> Program:
    """The step of `timesformer train`, on a mesh of one device, by default the first."""
    clip = ClipSpec(frames=config.num_frames, crop=config.image_size)
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    schedule = optax.constant_schedule(0.005)
    optimizer = make_optimizer(RECIPE, schedule)
    target = abstract_state(config, optimizer, mesh)
    step = make_train_step(config, clip, optimizer, schedule, target, mesh, seed=0)

    def start(compiled: jax.stages.Compiled) -> Callable[[int], Any]:
        state = init_state(random_parameters(config), optimizer, target)
        batches = random_batches(config, batch_size)

        def run(i: int) -> Any:
            nonlocal state
            state, metrics = compiled(state, batches[i % INPUT_SETS])
            return metrics

        return run

    def lower() -> jax.stages.Lowered:
        with jax.set_mesh(mesh):
            return step.lower(target, batch_shapes(config, batch_size))

    choose = functools.partial(choose_kernels, config, batch_size, mesh, gradients=True)
    count = flops(config, trained="all") * batch_size
    return Program(count, batch_size, choose, lower, start)


def choose_kernels(
    config: TimeSformerConfig, batch_size: int, mesh: jax.sharding.Mesh, *, gradients: bool
) -> list[dict[str, Any]]:
    """`tuning.choose_kernels` for a program on this mesh."""
    with jax.set_mesh(mesh):
        return tuning.choose_kernels(
            config, batch_size, config.num_frames, config.image_size, gradients=gradients
        )


PROGRAMS = {"inference": inference, "training": training}


def batch_shapes(config: TimeSformerConfig, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the step's inputs: squares as training decodes them from videos whose
    short side is 8/7 of the crop (256 pixels for 224), the smallest scale of training."""
    crop = config.image_size
    side = decoded_side(crop * 8 // 7, crop, crop * 8 // 7)
    return {
        "frames": jax.ShapeDtypeStruct((size, config.num_frames, side, side, 3), jnp.uint8),
        "crop_boxes": jax.ShapeDtypeStruct((size, 3), jnp.float32),
        "flip": jax.ShapeDtypeStruct((size,), jnp.bool_),
        "label": jax.ShapeDtypeStruct((size,), jnp.int32),
    }


def random_batches(config: TimeSformerConfig, size: int) -> list[dict[str, jax.Array]]:
    """INPUT_SETS random batches of these shapes, on the device."""
    rng = np.random.default_rng(0)
    crop_box = np.array([1, 1, config.image_size], np.float32)

    def batch() -> dict[str, np.ndarray]:
        frames = batch_shapes(config, size)["frames"].shape
        return {
            "frames": rng.integers(0, 256, frames, np.uint8),
            "crop_boxes": np.tile(crop_box, (size, 1)),
            "flip": rng.random(size) < 0.5,
            "label": rng.integers(0, config.num_classes, size, np.int32),
        }

    return [jax.device_put(batch()) for _ in range(INPUT_SETS)]


# ---- printing -----------------------------------------------------------------------------------


def header() -> str:
    return (
        f"{'preset':<18}{'workload':<11}{'batch':>6}{'clips/s':>10}  {'ms (min to max)':<24}"
        f"{'GiB':>7}  {'TFLOP/s, of the product':<25}{'MFU':>6}"
    )


def as_line(row: dict[str, Any]) -> str:
    """A row as text."""
    start = f"{row['preset'].removeprefix('timesformer_'):<18}{row['workload']:<11}"
    start += f"{row['batch_size']:>6}"
    if row["status"] != "measured":
        return f"{start}  {row['status']}: {row['reason']}"
    mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
    return (
        f"{start}{row['clips_per_second']['wall']:>10.4g}  "
        f"{report.milliseconds(row['seconds']['wall']):<24}{row['bytes'] / GIB:>7.2f}  "
        f"{report.rate(row):<25}{mfu:>6}"
    )
