"""One shard of a prepared data set: the work of one worker, here or on Apache Beam.

The bytes of a shard follow from its clips and the options alone. They are the same whichever
process writes the shard, and however often.
"""

import io
import itertools
import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from etils import epath
from PIL import Image

from timesformer_jax.data.annotations import Clip, clip_hash
from timesformer_jax.data.decode import (
    MISSING_FILE,
    Timeline,
    VideoError,
    VideoFile,
    crash_reason,
    equal_pieces,
)
from timesformer_jax.data.failures import failure
from timesformer_jax.data.layout import MANIFESTS
from timesformer_jax.data.records import wire
from timesformer_jax.storage import atomic_path, write_atomically
from timesformer_jax.workers import report_progress

# A serialized Example cannot exceed 2 GiB. The frames of a clip and its record are held in memory.
MAX_RECORD_BYTES = 1 << 30


@dataclass(frozen=True)
class ShardOptions:
    """What the bytes of a shard depend on, besides its clips; see `prepare.prepare`."""

    name: str
    short_side: int
    quality: int
    store_stride: int
    fps: float | None
    segment_seconds: float | None
    clips_per_shard: int


@dataclass(frozen=True)
class Shard:
    """A shard to write: its path, its split, and its clips in order."""

    path: str
    split: str
    clips: tuple[Clip, ...]

    @property
    def name(self) -> str:
        return os.path.basename(self.path)

    @property
    def manifest_path(self) -> epath.Path:
        """The file that is written after the shard, and lists its content."""
        return epath.Path(self.path).parent / MANIFESTS / f"{self.name}.json"

    @property
    def places_path(self) -> epath.Path:
        """The file, beside the manifest, of the places of the shard's frames, `layout.PLACE`."""
        return self.manifest_path.with_suffix(".places")

    def read_manifest(self) -> dict:
        """Reads the manifest.

        Returns:
          bytes: size of the shard. records: an index row for each record. failures: a row of
          failures.csv for each clip that is left out, and `file`: its video's `_file_version`.

        Raises:
          OSError, ValueError: there is none, or it is damaged.
        """
        return json.loads(self.manifest_path.read_text())

    def is_done(self, videos: str, missing: frozenset[str] = frozenset()) -> bool:
        """Whether the shard is written, and the files of its failures are still what they were.

        Args:
          videos: the folder that the clips' paths are relative to.
          missing: ids of the clips whose file is missing now.
        """
        failures = self._failures()
        return failures is not None and not any(
            row["id"] not in missing
            if row["reason"] == MISSING_FILE
            else _is_changed(os.path.join(videos, row["path"]), row.get("file"))
            for row in failures
        )

    @property
    def is_whole(self) -> bool:
        """Whether the shard is there, and of the size that its manifest says."""
        return self._failures() is not None

    def _failures(self) -> list[dict] | None:
        """The failures in the manifest; None unless the shard is whole."""
        path = epath.Path(self.path)
        try:
            manifest = self.read_manifest()
            num_bytes, failures = manifest["bytes"], manifest["failures"]
        except (OSError, ValueError, KeyError):
            return None
        return failures if path.exists() and path.stat().length == num_bytes else None


def _file_version(path: str) -> list[int] | None:
    """Bytes and time of modification, in seconds, of a file or of the files in a folder.

    None if the storage does not tell: the file may be gone.
    """
    try:
        found = epath.Path(path).stat()
        parts = [file.stat() for file in epath.Path(path).iterdir()] if found.is_directory else []
    except Exception:  # the back ends of gs:// raise errors of their own kinds
        return None
    parts.append(found)
    return [sum(part.length for part in parts), max(int(part.mtime) for part in parts)]


def _is_changed(path: str, version: list[int] | None) -> bool:
    """Whether a file is another than that of this version; None: unknown, as of old manifests."""
    return version is not None and _file_version(path) not in (None, version)


def assign_shards(output: epath.Path, clips: Sequence[Clip], options: ShardOptions) -> list[Shard]:
    """Distributes the clips of each split over shards, in the order of a hash of their ids.

    So every shard holds clips of many classes.
    """
    by_split = defaultdict(list)
    for clip in sorted(clips, key=lambda clip: clip_hash(clip.id)):
        by_split[clip.split].append(clip)
    shards = []
    for split, members in sorted(by_split.items()):
        count = -(-len(members) // options.clips_per_shard)
        for i in range(count):
            # TFDS expects this form of file name.
            file = f"{options.name}-{split}.tfrecord-{i:05d}-of-{count:05d}"  # as in `find_lost`
            shards.append(Shard(os.fspath(output / file), split, tuple(members[i::count])))
    return shards


def find_lost(output: epath.Path) -> list[str]:
    """The names of the shards of a prepared directory that are missing or damaged, sorted.

    How many a split has is in the name of each.
    """
    manifests = (output / MANIFESTS).glob("*.json")
    matches = (re.match(r"(.*\.tfrecord-)\d{5}-of-(\d{5})", path.name) for path in manifests)
    splits = {match.groups() for match in matches if match}
    names = [
        f"{start}{i:05d}-of-{count}" for start, count in sorted(splits) for i in range(int(count))
    ]
    return [name for name in names if not Shard(os.fspath(output / name), "", ()).is_whole]


def read_manifests(output: epath.Path) -> list[dict]:
    """The manifests of all shards of a prepared directory, in the order of the shards' names."""
    return [json.loads(path.read_text()) for path in sorted((output / MANIFESTS).glob("*.json"))]


def write_shard(
    shard: Shard,
    videos: str,
    label_names: Sequence[str],
    options: ShardOptions,
    crashed: Mapping[str, str] = {},
) -> None:
    """Writes a shard and then its manifest.

    A clip that cannot be decoded is left out; the manifest has its id and the reason. Progress is
    reported by `workers.report_progress`: tasks are shards, items are ids of clips, and a missing
    file is not a failure.

    Args:
      shard: what to write, and where.
      videos: the folder that the clips' paths are relative to.
      label_names: by class.
      options: of all shards.
      crashed: for clips that crash the decoder, by id: the name of the signal.

    Raises:
      OSError: the shard cannot be written.
    """
    classes = {name: i for i, name in enumerate(label_names)}
    rows, failures, undecodable, places = [], [], 0, b""
    with atomic_path(epath.Path(shard.path)) as temporary:
        with wire.ShardWriter(temporary) as writer:
            for finished, clip in enumerate(shard.clips):
                report_progress(shard.name, clip.id, finished, undecodable)
                try:
                    if clip.id in crashed:
                        raise VideoError(crash_reason(crashed[clip.id]))
                    # All records of a clip before any is written: the last one may fail.
                    encoded = [
                        (example, size, wire.serialize(example))
                        for example, size in encode_clip(videos, clip, classes, options)
                    ]
                except VideoError as error:
                    version = _file_version(os.path.join(videos, clip.path))
                    failures.append({**failure(clip, str(error)), "file": version})
                    undecodable += str(error) != MISSING_FILE
                    continue
                for example, size, record in encoded:
                    columns = {key: value for key, value in example.items() if key != "video"}
                    rows.append({**columns, **size, **writer.write(record), "video": clip.id})
                    places += wire.frame_places(record).tobytes()
        num_bytes = temporary.stat().length
    write_atomically(shard.places_path, places)
    manifest = {"bytes": num_bytes, "records": rows, "failures": failures}
    write_atomically(shard.manifest_path, json.dumps(manifest).encode())
    report_progress(shard.name, None, len(shard.clips), undecodable)


def encode_clip(
    videos: str, clip: Clip, classes: Mapping[str, int], options: ShardOptions
) -> Iterator[tuple[dict, dict[str, int]]]:
    """Decodes a clip and yields its records: `records.features`, and the frames' height and width.

    Raises:
      VideoError: the file is missing or cannot be decoded, or a record is too large.
    """
    with VideoFile(os.path.join(videos, clip.path)) as video:
        timeline = video.timeline(
            clip.start, clip.end, frame_range=clip.frame_range, fps=options.fps
        )
        segments = equal_pieces(len(timeline), timeline.fps, options.segment_seconds or math.inf)
        stored = [np.arange(first, last, options.store_stride) for first, last in segments]
        frames = video.frames_at(timeline, np.concatenate(stored))
        for (first, last), ticks in zip(segments, stored):
            jpegs, num_bytes = [], 0
            for frame in itertools.islice(frames, len(ticks)):
                rgb = video.to_rgb(frame, options.short_side)
                jpegs.append(_encode_jpeg(rgb, options.quality))
                num_bytes += len(jpegs[-1])
                if num_bytes > MAX_RECORD_BYTES:
                    raise VideoError(
                        "over 1 GiB as one record; trim it (start, end), cut it"
                        " (segment_seconds) or raise the stride"
                    )
            example = {
                "video": jpegs,
                "label": (
                    classes[clip.label]
                    if clip.labels is None
                    else tuple(classes[name] for name in clip.labels)
                ),
                "id": clip.id if len(segments) == 1 else _segment_id(clip, timeline, first, last),
                "fps": float(timeline.fps),
                "stride": options.store_stride,
                "num_frames": last - first,
            }
            yield example, {"height": rgb.shape[0], "width": rgb.shape[1]}


def _segment_id(clip: Clip, timeline: Timeline, first: int, last: int) -> str:
    begin = timeline.times[0]
    return f"{clip.id}#{begin + first / timeline.fps:.2f}-{begin + last / timeline.fps:.2f}"


def _encode_jpeg(rgb: np.ndarray, quality: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()
