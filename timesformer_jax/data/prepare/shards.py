"""One shard of a prepared data set: the work of a worker, here or on Apache Beam.

What a shard holds follows from its clips and the options alone, so that it has the same bytes
whoever writes it, and however often.
"""

import io
import itertools
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from etils import epath
from PIL import Image

from timesformer_jax import workers
from timesformer_jax.data.annotations import Clip
from timesformer_jax.data.decode import Timeline, VideoError, VideoFile
from timesformer_jax.data.layout import MANIFESTS, MISSING
from timesformer_jax.storage import atomic_path, write_atomically

# A serialized Example cannot exceed 2 GiB; far below that, a record is no longer quick to read.
MAX_RECORD_BYTES = 1 << 30


@dataclass(frozen=True)
class Options:
    """What decides the bytes of a shard, beside its clips; see `prepare.prepare`."""

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
    def manifest(self) -> epath.Path:
        """The file that says that the shard is done, and what is in it."""
        return epath.Path(self.path).parent / MANIFESTS / f"{self.name}.json"

    def is_done(self) -> bool:
        path = epath.Path(self.path)
        try:
            num_bytes = self.read_manifest()["bytes"]
        except (OSError, ValueError, KeyError):  # not there, or damaged since
            return False
        return path.exists() and path.stat().length == num_bytes

    def read_manifest(self) -> dict:
        """bytes: of the shard. records: an index row each. failures: a row each; see `write`."""
        return json.loads(self.manifest.read_text())


def write(
    shard: Shard,
    videos: str,
    label_names: Sequence[str],
    options: Options,
    crashed: Mapping[str, str] = {},
) -> None:
    """Writes a shard and then its manifest.

    A clip that cannot be decoded is left out, and named with the reason in the manifest. Before
    each clip, and at the end, the worker tells the shard's name, how many of its clips are
    finished, and how many of those are there but undecodable.

    Args:
      shard: what to write, where.
      videos: the folder that the clips' paths are relative to.
      label_names: by class.
      options: of all shards.
      crashed: clips that are known to crash the decoder, by id, and how.

    Raises:
      OSError: the shard cannot be written.
    """
    records = import_records()
    definition = records.features(label_names)
    classes = {name: i for i, name in enumerate(label_names)}
    rows, failures, undecodable = [], [], 0
    with atomic_path(epath.Path(shard.path)) as temporary:
        with records.ShardWriter(os.fspath(temporary)) as writer:
            for finished, clip in enumerate(shard.clips):
                workers.tell(shard.name, finished, undecodable)
                try:
                    if clip.id in crashed:
                        raise VideoError(f"the decoder crashes: {crashed[clip.id]}")
                    # All of a video's records or none: the last one may be the one that fails.
                    pieces = [
                        (example, size, records.serialize(definition, example))
                        for example, size in encode(videos, clip, options)
                    ]
                except VideoError as error:
                    failures.append({"id": clip.id, **asdict(clip), "reason": str(error)})
                    undecodable += str(error) != MISSING
                    continue
                for example, size, record in pieces:
                    columns = {key: example[key] for key in ("id", "fps", "stride", "num_frames")}
                    place = writer.write(record)
                    row = {"video": clip.id, "label": classes[clip.label]}
                    rows.append({**columns, **size, **place, **row})
        num_bytes = temporary.stat().length
    manifest = {"bytes": num_bytes, "records": rows, "failures": failures}
    write_atomically(shard.manifest, json.dumps(manifest).encode())
    workers.tell(shard.name, len(shard.clips), undecodable)


def encode(videos: str, clip: Clip, options: Options) -> Iterator[tuple[dict, dict[str, int]]]:
    """Decodes a clip; yields its records (`records.features`) and the frames' height and width.

    Raises:
      VideoError: the file is missing or cannot be decoded, or a record is too large.
    """
    with VideoFile(os.path.join(videos, clip.path)) as video:
        timeline = video.timeline(clip.start, clip.end, frame_range=clip.frames, fps=options.fps)
        pieces = _pieces(timeline, options.segment_seconds)
        stored = [np.arange(first, last, options.store_stride) for first, last in pieces]
        frames = video.frames_at(timeline, np.concatenate(stored))
        for (first, last), ticks in zip(pieces, stored):
            jpegs, num_bytes = [], 0
            for frame in itertools.islice(frames, len(ticks)):
                rgb = video.to_rgb(frame, options.short_side)
                jpegs.append(_jpeg(rgb, options.quality))
                num_bytes += len(jpegs[-1])
                if num_bytes > MAX_RECORD_BYTES:
                    raise VideoError(
                        "over 1 GiB as one record; trim it (start, end), cut it"
                        " (segment_seconds) or raise the stride"
                    )
            example = {
                "video": jpegs,
                "label": clip.label,
                "id": clip.id if len(pieces) == 1 else _piece_id(clip, timeline, first, last),
                "fps": timeline.fps,
                "stride": options.store_stride,
                "num_frames": last - first,
            }
            yield example, {"height": rgb.shape[0], "width": rgb.shape[1]}


def _pieces(timeline: Timeline, seconds: float | None) -> list[tuple[int, int]]:
    """The [first, last) ticks of the equal pieces of a clip whose length is nearest to seconds."""
    count = 1
    if seconds is not None:
        count = min(max(round(len(timeline) / timeline.fps / seconds), 1), len(timeline))
    bounds = [i * len(timeline) // count for i in range(count + 1)]
    return list(itertools.pairwise(bounds))


def _piece_id(clip: Clip, timeline: Timeline, first: int, last: int) -> str:
    begin = timeline.times[0]
    return f"{clip.id}#{begin + first / timeline.fps:.2f}-{begin + last / timeline.fps:.2f}"


def _jpeg(rgb: np.ndarray, quality: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()


def import_records():
    """Imports TensorFlow where it is first needed, without what it says of CUDA."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # Its libraries write to the descriptor before they read the log level.
    sys.stderr.flush()
    stderr = os.dup(2)
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), 2)
    try:
        from timesformer_jax.data.records import prepared as records
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
    return records
