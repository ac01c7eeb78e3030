"""Prepares a data set: clips of video files become TFRecord shards.

The output follows from the clips and the options alone. So a run that was killed, at any moment,
continues where it stopped, and ends with the same bytes. In the order written:

    prepare.json             the options, and a fingerprint of the clips
    unlisted.txt             video files that belong to no clip
    NAME-SPLIT.tfrecord-*    a shard, renamed when it is complete
    manifests/SHARD.places   where its frames are
    manifests/SHARD.json     its index rows and failures; a shard is done once this exists
    splits.json              splits and labels, if they are others than those of the shards
    failures.csv             clips that are missing or cannot be decoded, and the reasons
    SPLIT.index.npz, SPLIT.places, labels.txt, features.json, dataset_info.json
                             see records/prepared.py
"""

import json
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial

from etils import epath

from timesformer_jax import ranges
from timesformer_jax.data import annotations as annotations_lib
from timesformer_jax.data.annotations import Clip, Listing
from timesformer_jax.data.decode import MISSING_FILE
from timesformer_jax.data.failures import write_failures
from timesformer_jax.data.layout import (
    FAILURES_FILE,
    INFO_FILE,
    MANIFESTS,
    OPTIONS_FILE,
    SPLITS_FILE,
    UNLISTED_FILE,
)
from timesformer_jax.data.prepare.description import Summary, summarize, write_description
from timesformer_jax.data.prepare.runners import (
    Source,
    WriteShards,
    check_max_failures,
    shard_writer,
)
from timesformer_jax.data.prepare.shards import Shard, ShardOptions, assign_shards, find_lost
from timesformer_jax.data.prepare.splits import draw_splits, fingerprint, reassigned_clips
from timesformer_jax.data.records.access import READ_THREADS
from timesformer_jax.data.records.split import Reassigned, read_reassigned
from timesformer_jax.errors import InputError
from timesformer_jax.storage import absolute, disk_errors, locked, write_atomically


def prepare(
    videos: str | os.PathLike,
    output: str | os.PathLike,
    annotations: str | os.PathLike | None = None,
    dataset: str | None = None,
    labels: str | os.PathLike | None = None,
    multilabel: str | None = None,
    name: str | None = None,
    short_side: int = 256,
    quality: int = 90,
    fps: float | None = None,
    store_stride: int | None = None,
    segment_seconds: float | None = None,
    clips_per_shard: int = 32,
    workers: int = 0,
    validation_fraction: float = 0.1,
    resplit: bool = False,
    max_failures: int | None = None,
    runner: str = "local",
    beam_options: str = "",
    follow: bool = False,
) -> Summary:
    """Prepares a data set: decodes its clips and writes them as TFRecord shards.

    If it was interrupted, it continues when it is called again with the same arguments. Missing
    videos that were added since, and broken ones that were repaired, are prepared then: only the
    shards they belong to are written again. Labels and splits that `resplit` changed are kept.
    Clips that are missing or cannot be decoded are left out, and listed in failures.csv. All paths
    may be on gs://.

    Args:
      videos: the folder that holds the video files.
      output: the directory to write; it is created if necessary.
      annotations, dataset: of the clips; see `annotations.read`.
      labels: a file with one label name per line, in class order; None: the data set's order, or
        the labels that occur, sorted.
      multilabel: what separates the labels of a clip in the csv's column `label`, such as ";", if a
        clip may have any number of them; "none": the whole text is one label.
      name: of the data set, at the start of the file names; None: `dataset`, or "videos".
      short_side: shorter side of the stored frames, in pixels.
      quality: of the stored JPEGs (4:2:0), 1 to 100.
      fps: frames per second to resample to; None: the video's own.
      store_stride: every store_stride-th frame is stored. The size of the shards depends on this; 4
        moves a sampled frame by at most 2. None: the data set's (4 for Kinetics), or 1.
      segment_seconds: a clip is cut into equal records of about this length; 0: it is not cut;
        None: the data set's, or 0.
      clips_per_shard: at most.
      workers: processes; 0: one for each processor.
      validation_fraction: share of the clips without a split that is used for validation. It is
        drawn among the clips of each class that can be decoded.
      resplit: change the labels and splits of an output that is prepared, to those of these
        annotations, labels and this fraction. Nothing is decoded and no shard is written.
      max_failures: the run ends when more clips than this exist but cannot be decoded; None: no
        limit. On Beam they are counted at the end.
      runner: "local", processes on this machine, or "beam".
      beam_options: of Apache Beam's command line: "--runner=DataflowRunner --project=p".
      follow: accept videos outside of the folder; see `annotations.read`.

    Returns:
      What was prepared; it is also printed. Progress is written to standard error.

    Raises:
      InputError: unusable arguments or annotations, an output that was prepared with other options
        or clips, a split without a single decodable clip, too many failures, a full disk, a killed
        worker. Finished shards are kept.
    """
    published = annotations_lib.published_dataset(dataset)
    if published and store_stride is None:
        store_stride = published.store_stride
    if published and segment_seconds is None:
        segment_seconds = published.segment_seconds
    options = ShardOptions(
        name=name or dataset or "videos",
        short_side=short_side,
        quality=quality,
        store_stride=1 if store_stride is None else store_stride,
        fps=fps,
        segment_seconds=segment_seconds or None,
        clips_per_shard=clips_per_shard,
    )
    _check_options(options)
    write_shards = shard_writer(runner, workers, max_failures, beam_options)
    output = absolute(output)
    names = None if labels is None else annotations_lib.read_labels(labels)
    listing = annotations_lib.read(
        videos, annotations, names, validation_fraction, dataset, follow, multilabel
    )
    print(listing.report(), flush=True)
    if resplit:
        summary = _resplit(output, listing, validation_fraction)
    else:
        source = Source(os.fspath(absolute(videos)), listing.labels, options)
        draw = partial(draw_splits, output, listing, validation_fraction, again=False)
        summary = _write_output(output, listing, source, write_shards, draw, max_failures)
    print(summary)
    return summary


def _check_options(options: ShardOptions) -> None:
    ranges.check_given(**{k: v for k, v in asdict(options).items() if k != "name"})
    if not re.fullmatch("[a-z][a-z0-9_]*", options.name):
        raise InputError(f"name '{options.name}' must be lower case letters, digits, underscores")


def _write_output(
    output: epath.Path,
    listing: Listing,
    source: Source,
    write_shards: WriteShards,
    draw: Callable[[], list[Clip]],
    max_failures: int | None,
) -> Summary:
    """Writes the missing parts of a prepared directory, which is locked meanwhile."""
    with disk_errors(output):
        (output / MANIFESTS).mkdir(parents=True, exist_ok=True)
        with locked(output):
            _record_options(output, source.options, listing)
            resplit = _read_resplit(output, listing)
            shards = assign_shards(output, listing.clips, source.options)
            todo = _unfinished(shards, source.videos, frozenset(listing.missing))
            if (output / INFO_FILE).exists() and not todo:
                if resplit is not None:
                    raise InputError(
                        f"the labels or splits of {output} were changed by --resplit; add --resplit"
                        " to change them to these"
                    )
                clips = draw()
                print("already prepared, nothing to do")
                return summarize(output, clips, listing.labels)
            _remove_unfinished(output)
            unlisted = "".join(f"{path}\n" for path in listing.unlisted)
            write_atomically(output / UNLISTED_FILE, unlisted.encode())
            try:
                if todo:
                    write_shards(todo, source)
            finally:
                failures = _collect_failures(shards)
                write_failures(output / FAILURES_FILE, failures)
            undecodable = sum(row["reason"] != MISSING_FILE for row in failures)
            check_max_failures(undecodable, max_failures)
            clips, labels = (
                (draw(), listing.labels)
                if resplit is None
                else (reassigned_clips(output, listing, resplit), resplit.labels)
            )
            write_description(output, source.options.name, shards, listing.labels)
            if resplit is not None:
                print(
                    f"the labels and splits that --resplit gave {output} are kept ({SPLITS_FILE});"
                    " run it with --resplit again to take in clips that were added"
                )
            return summarize(output, clips, labels)


def _unfinished(shards: Sequence[Shard], videos: str, missing: frozenset[str]) -> list[Shard]:
    """The shards that are to be written; the arguments are those of `Shard.is_done`."""
    # Each asks for the shard and for the files of its failures, and gs:// takes long to answer.
    with ThreadPoolExecutor(READ_THREADS) as pool:
        done = pool.map(lambda shard: shard.is_done(videos, missing), shards)
        return [shard for shard, is_done in zip(shards, done) if not is_done]


def _read_resplit(output: epath.Path, listing: Listing) -> Reassigned | None:
    """The labels and splits that --resplit gave an output, if they are not those of these clips.

    Raises:
      InputError: splits.json is damaged.
    """
    found = read_reassigned(os.fspath(output))
    return None if found is None or found.clips == fingerprint(listing) else found


def _resplit(output: epath.Path, listing: Listing, validation_fraction: float) -> Summary:
    """Changes the labels and splits of a complete output, and nothing else."""
    if not (output / INFO_FILE).exists():
        raise InputError(
            f"{output} is not prepared yet; run `timesformer prepare` without --resplit first"
        )
    with disk_errors(output), locked(output):
        if lost := find_lost(output):
            raise InputError(
                f"shards of {output} are missing or damaged (first: {lost[0]}); run"
                " `timesformer prepare` without --resplit first, with the arguments it had"
            )
        clips = draw_splits(output, listing, validation_fraction, again=True)
        return summarize(output, clips, listing.labels)


def _remove_unfinished(output: epath.Path) -> None:
    """Removes what says that the output is complete, and temporary files of a killed run."""
    (output / INFO_FILE).unlink(missing_ok=True)
    for temporary in (*output.glob("*.part"), *(output / MANIFESTS).glob("*.part")):
        temporary.unlink()


def _collect_failures(shards: Sequence[Shard]) -> list[dict]:
    """The failures of all shards that were written so far."""
    written = [shard.read_manifest() for shard in shards if shard.manifest_path.exists()]
    return [row for manifest in written for row in manifest["failures"]]


def _record_options(output: epath.Path, options: ShardOptions, listing: Listing) -> None:
    """Writes prepare.json, or compares the one that an earlier run wrote.

    Raises:
      InputError: the output was prepared with other options or clips.
    """
    record = {**asdict(options), "clips": fingerprint(listing)}
    path = output / OPTIONS_FILE
    if not path.exists():
        if (output / INFO_FILE).exists():
            raise InputError(
                f"{output} holds a data set that `timesformer prepare` did not write; choose"
                " another output"
            )
        write_atomically(path, json.dumps(record, indent=1).encode())
        return
    earlier = json.loads(path.read_text())
    if earlier == record:
        return
    differing = [
        f"{key} {earlier.get(key)} there, {record[key]} now"
        for key in asdict(options)
        if earlier.get(key) != record[key]
    ]
    if not differing:
        raise InputError(
            f"{output} was prepared with another list of clips, other labels or splits; add"
            " --resplit to change labels and splits without decoding, or choose another output"
        )
    if earlier.get("clips") != record["clips"]:
        differing.append("another list of clips")
    raise InputError(
        f"{output} was prepared differently ({'; '.join(differing)}); choose another output"
    )
