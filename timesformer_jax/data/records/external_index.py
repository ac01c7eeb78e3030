"""Parses the records of other projects, and makes an index of them.

The pipeline reads records at their offsets, so each split is read once to make its index. Some
records cannot be used: those without frames, without a label or with several labels, or whose
frames are not all JPEGs or PNGs of one size. The index leaves them out, and counts them by reason.
"""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import tensorflow as tf
from absl import logging
from etils import epath
from google.protobuf.message import DecodeError
from PIL import Image
from tqdm import tqdm

from timesformer_jax.data.records.wire import RECORD_OVERHEAD_BYTES, LongRecord, extract_frames
from timesformer_jax.errors import InputError, first_line
from timesformer_jax.storage import cache_path, write_atomically
from timesformer_jax.workers import available_cores, worker_pool

# Of the index; increase it when the content of an index changes.
VERSION = 1

# One worker per so many bytes: a worker takes some seconds to start, to import TensorFlow.
BYTES_PER_WORKER = 1 << 32

# A larger label is no class number but something else, for example a hash.
MAX_CLASSES = 1 << 20

# The columns of an index, a row per usable record.
_COLUMNS = {
    "shard": np.int32,
    "offset": np.int64,
    "size": np.int64,
    "num_frames": np.int32,
    "fps": np.float32,  # NaN: unknown
    "seconds": np.float64,  # from the clip's start to its end; NaN: unknown
    "height": np.int32,
    "width": np.int32,
    "label": np.int32,
    "text": np.str_,  # of the label; "": unknown
    "id": np.str_,
}
Index = dict[str, np.ndarray]


# ---- records ------------------------------------------------------------------------------------


class RecordContents(NamedTuple):
    """The fields of a record, as written.

    Attributes:
      frames: encoded images.
      labels: class numbers.
      text: name of the label, if there is one label; "": unknown.
      fps: frame rate; NaN: unknown.
      seconds: from the clip's start to its end; NaN: unknown.
      id: name of the clip; "": unknown.
    """

    frames: Sequence[bytes]
    labels: Sequence[int]
    text: str = ""
    fps: float = np.nan
    seconds: float = np.nan
    id: str = ""


@dataclass(frozen=True)
class SequenceExampleFormat:
    """DMVR's records: tf.train.SequenceExample with MediaSequence's keys."""

    frames: str = "image/encoded"
    message: ClassVar[str] = "SequenceExample"

    def parse(self, serialized: bytes) -> RecordContents:
        """Parses a record. Timestamps are in microseconds."""
        record = tf.train.SequenceExample.FromString(serialized)
        context, lists = record.context.feature, record.feature_lists.feature_list

        def texts(*keys: str) -> list[str]:
            values = (value for key in keys for value in context[key].bytes_list.value)
            return [value.decode(errors="replace") for value in values]

        def timestamp(key: str) -> float:
            return next(iter(context[key].int64_list.value), np.nan)

        frames = [_only(feature) for feature in lists[self.frames].feature]
        stamps = lists["image/timestamp"].feature
        times = [time for stamp in stamps for time in stamp.int64_list.value]
        rate = context["image/frame_rate"]
        fps = next(iter([*rate.float_list.value, *rate.int64_list.value]), np.nan)
        if not 0 < fps < np.inf and len(times) == len(frames) > 1 and times[-1] > times[0]:
            fps = (len(times) - 1) / (times[-1] - times[0]) * 1e6
        seconds = (timestamp("clip/end/timestamp") - timestamp("clip/start/timestamp")) / 1e6
        names = texts("clip/label/text") or texts("clip/label/string")
        ids = texts("clip/key", "clip/media_id", "clip/data_path", "video/filename")
        return RecordContents(
            frames,
            context["clip/label/index"].int64_list.value,
            text=names[0] if len(names) == 1 else "",
            fps=fps if 0 < fps < np.inf else np.nan,
            seconds=seconds if seconds > 0 else np.nan,
            id=ids[0] if ids else "",
        )

    def extract_frames(self, serialized: bytes | LongRecord, indices: Sequence[int]) -> list[bytes]:
        """As `Split.extract_frames`."""
        lists = tf.train.SequenceExample.FromString(serialized[:]).feature_lists.feature_list
        return [_only(lists[self.frames].feature[i]) for i in indices]


@dataclass(frozen=True)
class ExampleFormat:
    """TFDS's records: tf.train.Example. video, label: names of these features."""

    video: str
    label: str
    message: ClassVar[str] = "Example"

    def parse(self, serialized: bytes) -> RecordContents:
        """Parses a record."""
        feature = tf.train.Example.FromString(serialized).features.feature
        return RecordContents(
            feature[self.video].bytes_list.value, feature[self.label].int64_list.value
        )

    def extract_frames(self, serialized: bytes | LongRecord, indices: Sequence[int]) -> list[bytes]:
        """As `Split.extract_frames`."""
        return extract_frames(serialized, indices, self.video)


RecordFormat = SequenceExampleFormat | ExampleFormat


def _only(feature: tf.train.Feature) -> bytes:
    """The byte string of a frame; an empty one, which is no image, if there is not exactly one."""
    values = feature.bytes_list.value
    return values[0] if len(values) == 1 else b""


# ---- the index ----------------------------------------------------------------------------------


def load_or_make_index(
    directory: str, split: str, files: Sequence[str], record_format: RecordFormat
) -> Index:
    """Loads the index of a split if it was made from these files, else makes and saves it.

    It is saved beside the data as SPLIT.records.npz or, if that cannot be written, in the user's
    cache. Several processes at once do the same work and write the same file, each atomically.
    """
    # In threads, because a request to gs:// takes long.
    with ThreadPoolExecutor(32) as pool:
        sizes = [stat.length for stat in pool.map(tf.io.gfile.stat, files)]
    shards = [(os.path.basename(file), size) for file, size in zip(files, sizes)]
    key = hashlib.sha256(repr((VERSION, record_format, shards)).encode()).hexdigest()
    name = f"{split}.records.npz"
    paths = (os.path.join(directory, name), cache_path(directory, name))
    for path in paths:
        if (index := _read_index(path, key)) is not None:
            return index
    workers = min(available_cores(), len(files), 1 + sum(sizes) // BYTES_PER_WORKER)
    index = make_index(split, files, sizes, record_format, workers) | {"key": np.array(key)}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **index)  # type: ignore[arg-type]  # as numpy's stubs have it
    for path in paths:
        try:
            tf.io.gfile.makedirs(os.path.dirname(path))
            write_atomically(epath.Path(path), buffer.getvalue())
        except (OSError, tf.errors.OpError) as error:
            logging.warning("cannot keep the index of %s at %s: %s", split, path, error)
        else:
            logging.info("the index of %s is kept at %s", split, path)
            break
    return index


def _read_index(path: str, key: str) -> Index | None:
    """The index at a path; None if it is missing, damaged or of other data."""
    try:
        with tf.io.gfile.GFile(path, "rb") as file:
            index = dict(np.load(io.BytesIO(file.read())))
        return index if index["key"] == key else None
    except (OSError, tf.errors.OpError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def make_index(
    split: str,
    files: Sequence[str],
    sizes: Sequence[int],
    record_format: RecordFormat,
    workers: int,
) -> Index:
    """Reads every record of a split, in a pool of processes if `workers` is more than 1.

    Args:
      split: its name, to show progress.
      files: the shards, in order.
      sizes: bytes of each.
      record_format: of the records.
      workers: number of processes. The index does not depend on it.
    """
    found = {}
    with tqdm(total=sum(sizes), unit="B", unit_scale=True, desc=f"indexing {split}") as progress:
        for i, rows_and_skipped in _read_shards(files, record_format, workers):
            found[i] = rows_and_skipped
            progress.update(sizes[i])
    rows = [{**row, "shard": i} for i in range(len(files)) for row in found[i][0]]
    skipped = [entry for i in range(len(files)) for entry in found[i][1]]
    first = dict(reversed(skipped))
    count = Counter(reason for reason, _ in skipped)
    columns = {
        column: np.array([row[column] for row in rows], dtype) for column, dtype in _COLUMNS.items()
    }
    return columns | {
        "skipped": np.array(list(count), np.str_),
        "skipped_count": np.array(list(count.values()), np.int64),
        "skipped_first": np.array([first[reason] for reason in count], np.str_),
    }


def _read_shards(
    files: Sequence[str], record_format: RecordFormat, workers: int
) -> Iterator[tuple[int, Any]]:
    if workers <= 1:
        yield from ((i, _read_shard(file, record_format)) for i, file in enumerate(files))
        return
    with worker_pool(workers) as pool:
        tasks = {pool.submit(_read_shard, file, record_format): i for i, file in enumerate(files)}
        try:
            for task in as_completed(tasks):
                yield tasks[task], task.result()
        except BrokenProcessPool as error:
            raise InputError(
                "a process that indexed records was killed (out of memory?); run it again"
            ) from error


def _read_shard(file: str, record_format: RecordFormat) -> tuple[list[dict], list[tuple[str, str]]]:
    """The index rows of a shard's records, and a reason and a name for each that is left out."""
    rows, skipped = [], []
    offset = 0
    try:
        shard = tf.data.TFRecordDataset(file, buffer_size=1 << 23)
        for i, serialized in enumerate(shard.as_numpy_iterator()):
            contents = record_format.parse(serialized)
            name = contents.id or f"{os.path.basename(file)}:{i}"
            try:
                row = _row(contents)
            except _UnusableRecord as error:
                skipped.append((str(error), name))
            else:
                rows.append({**row, "offset": offset, "size": len(serialized), "id": name})
            offset += len(serialized) + RECORD_OVERHEAD_BYTES
    except (tf.errors.OpError, DecodeError) as error:
        raise InputError(
            f"{file} cannot be read as uncompressed TFRecords of {record_format.message}s from byte"
            f" {offset} on ({first_line(error)}); copy it there again, or write it again"
        ) from error
    return rows, skipped


class _UnusableRecord(Exception):
    """A record that cannot be used. The message is the reason, to follow "with"."""


def _row(contents: RecordContents) -> dict[str, Any]:
    labels = set(contents.labels)
    if not contents.frames:
        raise _UnusableRecord("no frames")
    if len(labels) > 1:
        raise _UnusableRecord("several labels")
    # TFDS writes -1 for an unknown label.
    if not labels or not 0 <= (label := labels.pop()) < MAX_CLASSES:
        raise _UnusableRecord("no label")
    shapes = {_image_size(frame) for frame in contents.frames}
    if len(shapes) > 1:
        raise _UnusableRecord("frames of several sizes")
    height, width = shapes.pop()
    fields = {key: getattr(contents, key) for key in ("text", "fps", "seconds")}
    size = {"num_frames": len(contents.frames), "height": height, "width": width}
    return {"label": label, **size, **fields}


def _image_size(frame: bytes) -> tuple[int, int]:
    """Height and width in the header of an encoded image."""
    try:
        with Image.open(io.BytesIO(frame), formats=("JPEG", "PNG")) as image:
            return image.height, image.width
    except (OSError, Image.DecompressionBombError) as error:
        raise _UnusableRecord("frames that are neither JPEG nor PNG") from error
