"""Checks raw videos before they are prepared: each is opened, and its packets are read."""

import csv
import io
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import asdict, dataclass, fields

from tqdm import tqdm

from timesformer_jax import workers as workers_lib
from timesformer_jax.data import annotations as annotations_lib
from timesformer_jax.data.annotations import Clip, Listing
from timesformer_jax.data.check.check import is_chosen, table
from timesformer_jax.data.decode import VideoError, VideoFile, VideoInfo
from timesformer_jax.data.layout import MISSING
from timesformer_jax.errors import InputError
from timesformer_jax.storage import absolute, disk_errors, write_atomically

# Clips that a worker gets at a time: few enough to be done again when one crashes the decoder.
CLIPS_PER_TASK = 32

# Most values of a property that are shown, the commonest.
MOST_VALUES = 8


@dataclass(frozen=True)
class _Found:
    """What there is of a clip. reason: why it cannot be decoded, empty if it can.

    info: of its file. seconds: of the clip. Both are only there if it can.
    """

    reason: str
    info: VideoInfo | None = None
    seconds: float = 0.0


def check_videos(
    videos: str | os.PathLike,
    annotations: str | os.PathLike | None,
    dataset: str | None,
    labels: str | os.PathLike | None,
    share: float,
    workers: int,
    output: str | os.PathLike | None,
) -> tuple[str, list[str]]:
    """Checks the videos of a data set.

    Args:
      videos, annotations, dataset, labels: as `prepare.prepare` takes them.
      share: of the clips, which are decoded.
      workers: processes; 0: as many as there are processors.
      output: a csv for the clips that cannot be used, of the columns of failures.csv; None: none.

    Returns:
      What the videos are, and a line a problem: a clip that is missing or cannot be decoded.

    Raises:
      InputError: annotations or labels that cannot be used, an output that cannot be written, a
        killed worker.
    """
    names = None if labels is None else annotations_lib.read_labels(labels)
    listing = annotations_lib.read(videos, annotations, names, dataset=dataset)
    _write(output, [], {})  # one that cannot be written is not to be met after hours
    missing = frozenset(listing.missing)
    there = [clip for clip in listing.clips if clip.id not in missing]
    found = dict.fromkeys(missing, _Found(MISSING)) | examine_all(
        os.fspath(absolute(videos)), there, share, workers or workers_lib.available_cores()
    )
    bad = [clip for clip in listing.clips if found[clip.id].reason]
    _write(output, bad, found)
    # The missing ones last: there may be very many, and no file to look at.
    problems = [
        f"{clip.id}: {found[clip.id].reason}"
        for clip in sorted(bad, key=lambda clip: clip.id in missing)
    ]
    return _summary(listing, found, share), problems


# ---- in processes -------------------------------------------------------------------------------


def examine_all(
    videos: str, clips: Sequence[Clip], share: float, processes: int
) -> dict[str, _Found]:
    """What there is of each clip, by id, also of one that crashes the decoder."""
    todo = {
        first: list(clips[first : first + CLIPS_PER_TASK])
        for first in range(0, len(clips), CLIPS_PER_TASK)
    }
    found = {}
    with tqdm(total=len(clips), unit="clip", desc="checking") as bar:
        while todo:
            events, begun = workers_lib.CONTEXT.SimpleQueue(), {}
            try:
                with workers_lib.worker_pool(min(processes, len(todo)), events) as pool:
                    tasks = {
                        pool.submit(_examine_some, videos, batch, share): first
                        for first, batch in todo.items()
                    }
                    while tasks:
                        done, _ = wait(tasks, timeout=0.2, return_when=FIRST_COMPLETED)
                        begun |= _told(events)
                        for task in done:
                            found |= task.result()
                            del todo[tasks.pop(task)]
                        bar.update(len(found) - bar.n)
            except workers_lib.WorkerCrash as crash:
                begun |= _told(events)
                found |= _crashed(begun, crash)
                todo = {
                    first: [clip for clip in batch if clip.id not in found]
                    for first, batch in todo.items()
                }
    return found


def _told(events) -> dict[int, str]:
    """The clip that each worker, by process id, said last that it begins."""
    told = {}
    while not events.empty():
        process, clip = events.get()
        told[process] = clip
    return told


def _crashed(begun: Mapping[int, str], crash: workers_lib.WorkerCrash) -> dict[str, _Found]:
    if not crash.crashed.keys() <= begun.keys():
        raise InputError("a worker crashed before its first clip; run the same command again")
    return {
        begun[process]: _Found(f"the decoder crashes: {how}")
        for process, how in crash.crashed.items()
    }


def _examine_some(videos: str, clips: Sequence[Clip], share: float) -> dict[str, _Found]:
    found = {}
    for clip in clips:
        workers_lib.tell(clip.id)
        found[clip.id] = _examine(videos, clip, is_chosen(clip.id, share))
    return found


def _examine(videos: str, clip: Clip, decode: bool) -> _Found:
    """Reads a clip's packets as preparing it would, and decodes them if asked to."""
    try:
        with VideoFile(os.path.join(videos, clip.path)) as video:
            timeline = video.timeline(clip.start, clip.end, frame_range=clip.frames)
            if decode:
                for _ in video.frames_at(timeline, range(len(timeline))):
                    pass
            return _Found("", video.info, len(timeline) / timeline.fps)
    except VideoError as error:
        return _Found(str(error))


# ---- what there is ------------------------------------------------------------------------------


def _summary(listing: Listing, found: Mapping[str, _Found], share: float) -> str:
    clips = [clip for clip in listing.clips if found[clip.id].reason != MISSING]
    decoded = sum(is_chosen(clip.id, share) for clip in clips)
    read = f"the packets of {len(clips)} clips are read, and {decoded} of them are decoded"
    rows = [("split", "clips", "hours", "bad")]
    for split in dict.fromkeys(clip.split for clip in clips):
        of_split = [found[clip.id] for clip in clips if clip.split == split]
        hours = sum(clip.seconds for clip in of_split) / 3600
        bad = sum(bool(clip.reason) for clip in of_split)
        rows.append((split, len(of_split), f"{hours:.2f}", bad))
    infos = {clip.path: found[clip.id].info for clip in clips if not found[clip.id].reason}
    return "\n".join([listing.report(), read, table(rows), table(_properties(infos.values()))])


def _properties(infos: Iterable[VideoInfo]) -> list[tuple[str, str, str]]:
    """The commonest containers, codecs, sizes and frame rates, with how many videos have each."""
    infos = list(infos)
    values = {
        "container": [info.container for info in infos],
        "codec": [info.codec for info in infos],
        "size": [f"{info.width}x{info.height}" for info in infos],
        "fps": [f"{info.fps:.4g}" for info in infos],
    }
    rows = [("property", "value", "videos")]
    for name, of_all in values.items():
        ranked = Counter(of_all).most_common()
        rows += [(name, value, count) for value, count in ranked[:MOST_VALUES]]
        if rest := ranked[MOST_VALUES:]:
            rows.append((name, f"{len(rest)} others", sum(count for _, count in rest)))
    return rows


def _write(
    output: str | os.PathLike | None, clips: Sequence[Clip], found: Mapping[str, _Found]
) -> None:
    if output is None:
        return
    text = io.StringIO()
    columns = ["id", *(field.name for field in fields(Clip) if field.name != "name"), "reason"]
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for clip in clips:
        writer.writerow({"id": clip.id, **asdict(clip), "reason": found[clip.id].reason})
    with disk_errors(output):
        write_atomically(absolute(output), text.getvalue().encode())
