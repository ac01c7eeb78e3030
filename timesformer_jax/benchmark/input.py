"""`timesformer benchmark input`: the input pipeline's clips per second, and the cost of its stages.

Other work on the machine changes the wall time more than the processor time. Therefore each rate is
given per second of wall time and per second of processor time, summed over all threads.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import psutil
from ml_collections import ConfigDict

from timesformer_jax import ranges, storage
from timesformer_jax.benchmark import input_videos, report
from timesformer_jax.benchmark.machine import machine
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.data.input import pipeline, reading, sampling
from timesformer_jax.data.input.in_flight import READ_AHEAD
from timesformer_jax.data.records.access import read_frames
from timesformer_jax.data.records.open import open_split
from timesformer_jax.data.records.split import Split
from timesformer_jax.data.records.wire import RECORD_HEADER_BYTES
from timesformer_jax.errors import InputError, install
from timesformer_jax.timing import spread

ROUNDS = 10
STAGE_BATCHES = 20  # per round, at most
COUNTED_BATCHES = 10  # whose bytes are counted
WARM_UP = 4  # batches before the clock starts: prefetched or compiling ones do not count


@dataclasses.dataclass(frozen=True)
class Rate:
    """The clips of some batches, and their seconds of wall time and of processor time."""

    clips: int
    wall: float
    cpu: float


def benchmark_input(
    data: str | None = None,
    synthetic: str | None = None,
    video_seconds: int = 10,
    split: str = "train",
    config: ConfigDict | None = None,
    frames: int | None = None,
    frame_stride: int | None = None,
    crop: int | None = None,
    short_side_range: Sequence[str] | None = None,
    batch_size: int | None = None,
    batches: int = 200,
    reference: bool = False,
    json: str | None = None,
) -> None:
    """Measures the training input pipeline and prints a table.

    Args:
      data: a dataset for `open_split`; the default is the config's.
      synthetic: a folder to use instead; synthetic videos are made and prepared there.
      video_seconds: length of the synthetic videos; there are 64 of ten seconds, and fewer if they
        are longer.
      split: the split of the data.
      config: a recipe; it replaces the next arguments.
      frames, frame_stride, crop, short_side_range, batch_size: as in a recipe; by default 8, 32,
        224, 256 to 320, 16.
      batches: how many to measure, over all rounds; memory is read after 10, 50 and 100%.
      reference: whether to also measure a loop over simplejpeg and OpenCV, in alternation.
      json: a file to write the figures to.

    Raises:
      InputError: the data cannot be read, a setting is invalid, or a package is missing.
    """
    ranges.check_given(video_seconds=video_seconds)
    storage.check_output("--json", json)
    if reference:
        _input_reference()  # before videos are made
    if data and synthetic:
        raise InputError("give --data or --synthetic, not both")
    clip = {"frames": frames, "frame_stride": frame_stride, "crop": crop}
    told: dict[str, Any] = clip | {"short_side_range": short_side_range, "batch_size": batch_size}
    told = {name: value for name, value in told.items() if value is not None}
    if config is None:
        spec = ClipSpec(**{name: told[name] for name in clip if name in told})
        sizes, batch_size = _sizes(short_side_range or ("256", "320")), batch_size or 16
    elif told:
        raise InputError(f"--config says what a batch is; leave out --{next(iter(told))}")
    else:
        spec, sizes = ClipSpec(**config.clip), tuple(config.data.short_side_range)
        batch_size, data = config.batch_size, data or config.data.directory
    sampling.check_short_side_range(sizes, spec.crop)
    if synthetic is not None:
        input_videos.make(synthetic, seconds=video_seconds)
        data = synthetic
    if not data:
        raise InputError("say what to read with --data, or make something with --synthetic=DIR")
    found = open_split(data, split)
    options = {"batch_size": batch_size, "short_side_range": sizes, "flip": True, "seed": 0}
    figures = measure(found, spec, options, batches, reference)
    print(table(figures))
    if json is not None:
        report.write(json, figures)
        print(f"written to {json}")


def _sizes(short_side_range: Sequence[str]) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in short_side_range)
    except ValueError as error:
        raise InputError(
            f"--short_side_range={','.join(short_side_range)} must be two sizes, as 256,320"
        ) from error


def measure(
    split: Split, spec: ClipSpec, options: dict[str, Any], batches: int, reference: bool
) -> dict[str, Any]:
    """Measures a split.

    Args:
      split: the split to read.
      spec: the spec of the clips.
      options: the other arguments of `train_batches`.
      batches: how many to measure, over all rounds.
      reference: whether to measure the reference too.

    Returns:
      JSON values: `machine`, `settings`, `data`, `ours`, `stages`, `memory` and
      `iterator_state_bytes`; with `reference` also `reference` and `ratio`. Rates are clips per
      second of wall time (`wall`) and of processor time (`cpu`). Stages are milliseconds of
      processor time per clip; `whole` is their sum. Each is a median, minimum and maximum over
      the rounds.
    """
    size = options["batch_size"]
    each = math.ceil(batches / ROUNDS)
    about, memory = machine(), {"begin": _resident()}
    ours = pipeline.train_batches(split, spec, **options)
    loops: dict[str, Any] = {"ours": ours}
    if reference:
        loops["reference"] = _reference(split, spec, options)
    for loop in loops.values():
        _take(loop, WARM_UP)
    rates: dict[str, list] = {name: [] for name in loops}
    for i in range(ROUNDS):
        for name, loop in loops.items():
            rates[name].append(_rate(loop, each, size))
        if i + 1 in (1, ROUNDS // 2, ROUNDS):
            memory[f"{(i + 1) * 100 // ROUNDS}%"] = _resident()
    batch, position = next(ours)
    for loop in loops.values():
        loop.close()
    decoded = batch["frames"].nbytes / size
    figures = {
        "machine": about,
        "settings": dataclasses.asdict(spec) | options | {"batches": each * ROUNDS},
        "data": {
            "records": len(split),
            "bytes_a_record": float(split.size.mean()),
            "stored_frames_a_record": float(split.num_stored.mean()),
            "decoded_bytes_a_clip": decoded,
            **_bytes_read(split, pipeline.train_requests(split, spec, **options)),
        },
        **{name: _summary(of) for name, of in rates.items()},
    }
    if reference:
        pairs = list(zip(rates["ours"], rates["reference"]))
        figures["ratio"] = {
            "wall": spread([theirs.wall / mine.wall for mine, theirs in pairs]),
            "cpu": spread([theirs.cpu / mine.cpu for mine, theirs in pairs]),
        }
    figures["stages"] = _stages(split, spec, options, min(each, STAGE_BATCHES))
    figures["memory"] = memory
    state = json.dumps(dataclasses.asdict(position))
    return figures | {"iterator_state_bytes": len(state)}


def _bytes_read(split: Split, requests: Iterator[reading.BatchRequest]) -> dict[str, Any]:
    """The bytes that a clip reads, on average, and how many times those of its frames they are."""
    read, times = [], []
    for request in itertools.islice(requests, COUNTED_BATCHES):
        for row, indices in zip(request.record, request.indices):
            frames, num_bytes = read_frames(split, row, np.unique(indices).tolist())
            read.append(num_bytes)
            times.append(num_bytes / sum(map(len, frames)))
    return {"read_bytes_a_clip": float(np.mean(read)), "read_a_byte_of_frames": spread(times)}


# ---- stages -------------------------------------------------------------------------------------


def _stages(
    split: Split, spec: ClipSpec, options: dict[str, Any], batches: int
) -> dict[str, dict[str, float]]:
    """The processor time that each stage adds to the earlier ones, in milliseconds per clip.

    The pipeline is run up to each stage, one stage after the other in every round. If a stage costs
    less than the variation between rounds, its result can be negative.
    """
    side = pipeline.train_side(split, spec, options["short_side_range"])

    def requests() -> Iterator[reading.BatchRequest]:
        return pipeline.train_requests(split, spec, **options)

    plan = reading.in_flight(split, next(requests()), side)

    def encoded() -> Iterator[tuple[Any, Any]]:
        return reading.encoded_pieces(requests(), split, plan)

    # One pixel per frame: the clips are decoded, but not copied into batches.
    decoded = reading.decode_clips(encoded, plan)
    pixels = decoded.map(lambda frames: frames[..., :1, :1, :])
    size = options["batch_size"]
    pieces = size * len(plan.starts)
    cuts = {
        "planning": requests(),
        "reading": reading.read_encoded_frames(requests(), split),
        "decoding": pixels.batch(pieces).prefetch(READ_AHEAD).as_numpy_iterator(),
        "batching": pipeline.train_batches(split, spec, **options),
    }
    for cut in cuts.values():
        _take(cut, WARM_UP)
    stages: dict[str, list] = {name: [] for name in ("whole", *cuts)}
    for _ in range(ROUNDS):
        until = 0.0
        for name, cut in cuts.items():
            took = _rate(cut, batches, size)
            before, until = until, took.cpu / took.clips * 1e3
            stages[name].append(until - before)
        stages["whole"].append(until)
    return {name: spread(of) for name, of in stages.items()}


# ---- measuring ----------------------------------------------------------------------------------


def _rate(loop: Iterator[Any], batches: int, size: int) -> Rate:
    """Times `batches` of a loop after a warm-up, when no other loop is still running."""
    _settle()
    _take(loop, WARM_UP)
    wall, cpu = time.perf_counter(), _processor_time()
    _take(loop, batches)
    return Rate(batches * size, time.perf_counter() - wall, _processor_time() - cpu)


def _take(loop: Iterator[Any], batches: int) -> None:
    for _ in range(batches):
        next(loop)


def _settle() -> None:
    """Waits until this process and its children are idle."""
    while True:
        before = _processor_time()
        time.sleep(0.1)
        if _processor_time() - before < 0.02:
            return


def _processor_time() -> float:
    """Seconds of processor time, including the processes of the reference."""
    children = (child.cpu_times() for child in psutil.Process().children())
    return time.process_time() + sum(times.user + times.system for times in children)


def _resident() -> int:
    return psutil.Process().memory_info().rss


def _summary(rates: list[Rate]) -> dict[str, Any]:
    return {
        "wall": spread([rate.clips / rate.wall for rate in rates]),
        "cpu": spread([rate.clips / rate.cpu for rate in rates]),
    }


def _input_reference() -> ModuleType:
    try:
        return importlib.import_module("timesformer_jax.benchmark.input_reference")
    except ModuleNotFoundError as error:
        raise InputError(
            f"--reference needs the package {error.name}: {install('benchmark')}"
        ) from error


def _reference(split: Split, spec: ClipSpec, options: dict[str, Any]) -> Iterator[None]:
    reference = _input_reference()
    requests = pipeline.train_requests(split, spec, **options)
    clips = ([reference.Clip(*clip) for clip in reference_clips(split, r)] for r in requests)
    return reference.batches(clips, spec.crop)


def reference_clips(split: Split, request: reading.BatchRequest) -> list[tuple]:
    """The arguments of `input_reference.Clip` for each clip of a training request."""
    return [
        (
            split.files[split.shard[row]],
            int(split.offset[row]) + RECORD_HEADER_BYTES,
            int(split.size[row]),
            indices[0].tolist(),
            (*(crop_box[0, :2] + corner[0]).tolist(), float(crop_box[0, 2])),
            bool(flip),
        )
        for row, indices, crop_box, corner, flip in zip(
            request.record, request.indices, request.crop_boxes, request.corners, request.flip
        )
    ]


# ---- report -------------------------------------------------------------------------------------


def table(figures: dict[str, Any]) -> str:
    """Formats the figures of `measure` as text."""
    machine, data = figures["machine"], figures["data"]
    lines = [
        f"{machine['processor']}, {machine['cores']} cores, load {machine['load_average']:.1f}",
        f"{data['records']} records of {data['bytes_a_record'] / 1e3:.0f} kB, "
        f"{data['stored_frames_a_record']:.0f} frames each; "
        f"batches of {figures['settings']['batch_size']} clips",
        f"a clip reads {data['read_bytes_a_clip'] / 1e3:.0f} kB,"
        f" {_cell(data['read_a_byte_of_frames'], 1, '.2f')} times the bytes of its frames",
        "",
        f"{'median (min to max)':<28}{'a second':>22}{'a second of a core':>24}",
    ]
    for name in ("ours", "reference"):
        if name in figures:
            lines.append(_row(f"{name}, clips", figures[name], 1, ".0f"))
    if "ratio" in figures:
        lines.append(_row("ours / reference", figures["ratio"], 1, ".2f"))
    lines.append(_row("MB read", figures["ours"], data["read_bytes_a_clip"] / 1e6, ".0f"))
    lines.append(_row("MB decoded", figures["ours"], data["decoded_bytes_a_clip"] / 1e6, ".0f"))
    lines.append("")
    for name, took in figures["stages"].items():
        title = "ms of a core a clip" if name == "whole" else f"  {name}"
        lines.append(f"{title:<28}{_cell(took, 1, '.2f'):>22}")
    memory = ", ".join(f"{at} {value / 1e6:.0f} MB" for at, value in figures["memory"].items())
    lines += ["", f"memory  {memory}"]
    return "\n".join([*lines, f"iterator state  {figures['iterator_state_bytes']} bytes"])


def _row(name: str, spread: dict[str, Any], scale: float, form: str) -> str:
    wall, cpu = (_cell(spread[kind], scale, form) for kind in ("wall", "cpu"))
    return f"{name:<28}{wall:>22}{cpu:>24}"


def _cell(spread: dict[str, float], scale: float, form: str) -> str:
    median, low, high = (format(spread[key] * scale, form) for key in ("median", "min", "max"))
    return f"{median} ({low} to {high})"
