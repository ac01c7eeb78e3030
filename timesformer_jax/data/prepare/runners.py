"""How the shards of a data set are written: by processes on this machine, or on Apache Beam."""

import shlex
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from tqdm import tqdm

from timesformer_jax import ranges
from timesformer_jax.data.layout import FAILURES_FILE
from timesformer_jax.data.prepare.shards import Shard, ShardOptions, write_shard
from timesformer_jax.errors import InputError, install
from timesformer_jax.workers import available_cores, run_tasks

RUNNERS = ("local", "beam")


class Source(NamedTuple):
    """What all shards are written from: arguments of `shards.write_shard`."""

    videos: str
    label_names: Sequence[str]
    options: ShardOptions


WriteShards = Callable[[Sequence[Shard], Source], None]


def shard_writer(
    runner: str, workers: int, max_failures: int | None, beam_options: str
) -> WriteShards:
    """What writes the shards of a source; the arguments are those of `prepare.prepare`.

    Raises:
      InputError: there is no such runner, or an argument is not for it.
    """
    ranges.check_given(workers=workers, max_failures=max_failures)
    if runner not in RUNNERS:
        raise InputError(f"there is no runner '{runner}'; give one of {', '.join(RUNNERS)}")
    if runner == "beam":
        return partial(_write_on_beam, beam_options=beam_options)
    if beam_options:
        raise InputError("beam_options are given, but the runner is local; add --runner=beam")
    processes = workers or available_cores()
    return partial(_write_locally, processes=processes, max_failures=max_failures)


def _write_locally(
    shards: Sequence[Shard], source: Source, processes: int, max_failures: int | None
) -> None:
    """Writes shards by processes on this machine. A clip that crashes the decoder is left out.

    Raises:
      InputError: more than `max_failures` clips cannot be decoded, or a worker was killed.
    """
    tasks = {shard.name: (shard, *source) for shard in shards}
    num_clips = sum(len(shard.clips) for shard in shards)
    with tqdm(total=num_clips, unit="clip", desc="preparing") as bar:
        on_progress = partial(_show_progress, bar, max_failures)
        run_tasks(write_shard, tasks, processes, on_progress, kept="finished shards")


def _show_progress(bar: tqdm, max_failures: int | None, finished: int, failed: int) -> None:
    if failed:
        bar.set_postfix_str(f"{failed} failed", refresh=False)
    if finished != bar.n:
        bar.update(finished - bar.n)
    check_max_failures(failed, max_failures)


def _write_on_beam(shards: Sequence[Shard], source: Source, beam_options: str) -> None:
    """Writes shards by Apache Beam, in which each shard is one element.

    Raises:
      InputError: Apache Beam is not installed.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise InputError(f"--runner=beam needs Apache Beam: {install('beam')}") from error
    with beam.Pipeline(options=PipelineOptions(shlex.split(beam_options))) as pipeline:
        _ = (
            pipeline
            | "shards" >> beam.Create(shards)
            # Otherwise one worker may get all shards.
            | "spread" >> beam.Reshuffle()
            | "write" >> beam.Map(write_shard, *source)
        )


def check_max_failures(failures: int, max_failures: int | None) -> None:
    """Raises an InputError if more clips than allowed cannot be decoded."""
    if max_failures is not None and failures > max_failures:
        raise InputError(
            f"{failures} clips could not be decoded, more than --max_failures={max_failures}; see"
            f" {FAILURES_FILE} in the output, and repair the videos or allow more: finished shards"
            " are kept"
        )
