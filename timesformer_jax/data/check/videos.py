"""Checks videos before they are prepared: opens each file and reads the packets of its clips."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from timesformer_jax.data import annotations as annotations_lib
from timesformer_jax.data.annotations import Clip, Listing, assign_splits
from timesformer_jax.data.check.report import format_table, is_decoded
from timesformer_jax.data.decode import MISSING_FILE, VideoError, VideoFile, VideoInfo, crash_reason
from timesformer_jax.data.failures import failure, write_failures
from timesformer_jax.data.problems import Problem, of_clips
from timesformer_jax.storage import absolute, disk_errors
from timesformer_jax.workers import available_cores, report_progress, run_tasks

# Clips of a task. Few, because a task starts again if one of its clips crashes the decoder.
CLIPS_PER_TASK = 32

# Values shown of each property, the most frequent ones.
MAX_VALUES = 8


@dataclass(frozen=True)
class ClipResult:
    """What was found of a clip.

    reason: why it cannot be decoded; empty if it can. info: of its file, and seconds: of the clip;
    both are set only if it can be decoded.
    """

    reason: str
    info: VideoInfo | None = None
    seconds: float = 0.0


def check_videos(
    videos: str | os.PathLike,
    annotations: str | os.PathLike | None,
    dataset: str | None,
    labels: str | os.PathLike | None,
    decode_fraction: float,
    workers: int,
    output: str | os.PathLike | None,
    follow: bool = False,
    multilabel: str | None = None,
    validation_fraction: float = 0.1,
) -> tuple[str, list[Problem]]:
    """Checks the videos of a data set.

    Args:
      videos, annotations, dataset, labels, multilabel, follow, validation_fraction: see
        `prepare.prepare`.
      decode_fraction: fraction of the clips that are decoded.
      workers: processes; 0: one for each processor.
      output: a csv for the clips that cannot be used, with the columns of failures.csv; None: none.

    Returns:
      A summary of the videos, and the problems: clips that are missing or cannot be decoded, which
      `prepare` would leave out, and what is wrong with the others.

    Raises:
      InputError: annotations or labels that cannot be used, an output that cannot be written, a
        killed worker.
    """
    names = None if labels is None else annotations_lib.read_labels(labels)
    listing = annotations_lib.read(
        videos, annotations, names, validation_fraction, dataset, follow, multilabel
    )
    _write_output(output, {}, ())  # fails now rather than after hours if it cannot be written
    missing = frozenset(listing.missing)
    present = [clip for clip in listing.clips if clip.id not in missing]
    results = dict.fromkeys(missing, ClipResult(MISSING_FILE)) | check_clips(
        os.fspath(absolute(videos)), present, decode_fraction, workers or available_cores()
    )
    bad = [clip for clip in listing.clips if results[clip.id].reason]
    _write_output(output, results, bad)
    # Missing files come last: there may be many of them.
    unusable = [
        Problem(f"{clip.id}: {results[clip.id].reason}; `prepare` leaves it out")
        for clip in sorted(bad, key=lambda clip: clip.id in missing)
    ]
    usable = [clip for clip in listing.clips if not results[clip.id].reason]
    if not usable:
        unusable.append(Problem("no clip can be used", True))
        return _summary(listing, results, decode_fraction), unusable
    drawn = assign_splits(usable, validation_fraction)
    few = of_clips(drawn, listing.labels)
    return _summary(listing, results, decode_fraction), few + unusable


def _write_output(
    output: str | os.PathLike | None, results: Mapping[str, ClipResult], bad: Sequence[Clip]
) -> None:
    if output is not None:
        with disk_errors(output):
            rows = [failure(clip, results[clip.id].reason) for clip in bad]
            write_failures(absolute(output), rows)


# ---- clips --------------------------------------------------------------------------------------


def check_clips(
    videos: str, clips: Sequence[Clip], decode_fraction: float, processes: int
) -> dict[str, ClipResult]:
    """Checks clips in processes.

    Args:
      videos: the folder that the clips' paths are relative to.

    Returns:
      The result of each clip by its id, also of one that crashes the decoder.
    """
    tasks = {}
    for first in range(0, len(clips), CLIPS_PER_TASK):
        batch = clips[first : first + CLIPS_PER_TASK]
        tasks[str(first)] = (str(first), videos, batch, decode_fraction)
    with tqdm(total=len(clips), unit="clip", desc="checking") as bar:
        results = run_tasks(
            _check_batch, tasks, processes, lambda finished, _: bar.update(finished - bar.n)
        )
    return {clip_id: result for batch in results.values() for clip_id, result in batch.items()}


def _check_batch(
    task: str,
    videos: str,
    clips: Sequence[Clip],
    decode_fraction: float,
    crashed: Mapping[str, str],
) -> dict[str, ClipResult]:
    """Checks clips one by one; those in `crashed` crash the decoder (see `workers.run_tasks`)."""
    results = {}
    for finished, clip in enumerate(clips):
        report_progress(task, clip.id, finished)
        if clip.id in crashed:
            results[clip.id] = ClipResult(crash_reason(crashed[clip.id]))
        else:
            results[clip.id] = _check_clip(videos, clip, is_decoded(clip.id, decode_fraction))
    report_progress(task, None, len(clips))
    return results


def _check_clip(videos: str, clip: Clip, decode: bool) -> ClipResult:
    """Reads a clip's packets as `prepare` would, and decodes them if `decode` is set."""
    try:
        with VideoFile(os.path.join(videos, clip.path)) as video:
            timeline = video.timeline(clip.start, clip.end, frame_range=clip.frame_range)
            if decode:
                for _ in video.frames_at(timeline, range(len(timeline))):
                    pass
            return ClipResult("", video.info, len(timeline) / timeline.fps)
    except VideoError as error:
        return ClipResult(str(error))


# ---- summary ------------------------------------------------------------------------------------


def _summary(listing: Listing, results: Mapping[str, ClipResult], decode_fraction: float) -> str:
    clips = [clip for clip in listing.clips if results[clip.id].reason != MISSING_FILE]
    decoded = sum(is_decoded(clip.id, decode_fraction) for clip in clips)
    read = f"the packets of {len(clips)} clips are read, and {decoded} of them are decoded"
    rows: list[tuple[object, ...]] = [("split", "clips", "hours", "bad")]
    for split in dict.fromkeys(clip.split for clip in clips):
        of_split = [results[clip.id] for clip in clips if clip.split == split]
        hours = sum(result.seconds for result in of_split) / 3600
        bad = sum(bool(result.reason) for result in of_split)
        rows.append((split, len(of_split), f"{hours:.2f}", bad))
    infos = {
        clip.path: info
        for clip in clips
        if not results[clip.id].reason and (info := results[clip.id].info)
    }
    properties = _property_counts(infos.values())
    return "\n".join([listing.report(), read, format_table(rows), format_table(properties)])


def _property_counts(infos: Iterable[VideoInfo]) -> list[tuple[object, ...]]:
    """A table of the most frequent containers, codecs, sizes and frame rates."""
    infos = list(infos)
    properties = {
        "container": [info.container for info in infos],
        "codec": [info.codec for info in infos],
        "size": [f"{info.width}x{info.height}" for info in infos],
        "fps": [f"{info.fps:.4g}" for info in infos],
    }
    rows: list[tuple[object, ...]] = [("property", "value", "videos")]
    for name, values in properties.items():
        ranked = Counter(values).most_common()
        rows += [(name, value, count) for value, count in ranked[:MAX_VALUES]]
        if rest := ranked[MAX_VALUES:]:
            rows.append((name, f"{len(rest)} others", sum(count for _, count in rest)))
    return rows
