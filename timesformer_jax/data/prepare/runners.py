"""How the shards of a data set are written: by processes on this machine, or on Apache Beam."""

import shlex
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from tqdm import tqdm

from timesformer_jax.data.layout import FAILURES_FILE
from timesformer_jax.data.prepare.shards import Shard, ShardOptions, write_shard
from timesformer_jax.errors import InputError, install
from timesformer_jax.workers import run_tasks

RUNNERS = ("local", "beam")


class Source(NamedTuple):
    """What all shards are written from: arguments of `shards.write_shard`."""

    videos: str
    label_names: Sequence[str]
    options: ShardOptions


def write_locally(
    shards: Sequence[Shard], source: Source, processes: int, max_failures: int | None
) -> None:
    """Writes shards by processes on this machine. A clip that crashes the decoder is left out.

    Raises:
      InputError: more than `max_failures` clips cannot be decoded, or a worker was killed.
    """
    tasks = {shard.name: (shard, *source) for shard in shards}
    num_clips = sum(len(shard.clips) for shard in shards)
    with tqdm(total=num_clips, unit="clip", desc="preparing") as bar:
        run_tasks(write_shard, tasks, processes, partial(_show_progress, bar, max_failures))


def _show_progress(bar: tqdm, max_failures: int | None, finished: int, failed: int) -> None:
    if failed:
        bar.set_postfix_str(f"{failed} failed", refresh=False)
    if finished != bar.n:
        bar.update(finished - bar.n)
    check_max_failures(failed, max_failures)


def write_on_beam(shards: Sequence[Shard], source: Source, beam_options: str) -> None:
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
