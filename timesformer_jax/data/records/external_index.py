"""What the records of other projects say, and the index that they are read by.

The pipeline reads records by their offset, so each split is read once to index it. A record
without frames, without a label or with several labels, or whose frames are not all JPEGs or PNGs
of one size is left out of the index, which says how many were and why.
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
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from absl import logging
from etils import epath
from google.protobuf.message import DecodeError
from PIL import Image
from tqdm import tqdm

from timesformer_jax.data.records.wire import RECORD_OVERHEAD_BYTES, extract_frames
from timesformer_jax.errors import InputError
from timesformer_jax.storage import write_atomically
from timesformer_jax.workers import available_cores, worker_pool

# Of an index: raise it when what an index says changes.
VERSION = 1

# What one process reads while another starts, which has to import TensorFlow: some seconds.
BYTES_WORTH_A_WORKER = 1 << 32

# A label from here on is no class number but something else, a hash say.
MAX_CLASSES = 1 << 20

# The columns of an index, with one row a usable record.
_COLUMNS = {
    "shard": np.int32,
    "offset": np.int64,
    "size": np.int64,
    "num_frames": np.int32,
    "fps": np.float32,  # NaN: not said
    "seconds": np.float64,  # from the clip's start to its end; NaN: not said
    "height": np.int32,
    "width": np.int32,
    "label": np.int32,
    "text": np.str_,  # of the label; "": not said
    "id": np.str_,
}
Index = dict[str, np.ndarray]


# ---- what a record says -------------------------------------------------------------------------


class Contents(NamedTuple):
    """What a record holds, as written.

    frames: an encoded image each. labels: class numbers. text: what the one label is called.
    fps: frames a second, seconds: from the clip's start to its end; NaN where it is not said.
    id: what the clip is called. Text and id are "" where they are not said.
    """

    frames: Sequence[bytes]
    labels: Sequence[int]
    text: str = ""
    fps: float = np.nan
    seconds: float = np.nan
    id: str = ""


@dataclass(frozen=True)
class SequenceExamples:
    """DMVR's records: tf.train.SequenceExample with MediaSequence's keys."""

    frames: str = "image/encoded"

    def contents(self, serialized: bytes) -> Contents:
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
        return Contents(
            frames,
            context["clip/label/index"].int64_list.value,
            text=names[0] if len(names) == 1 else "",
            fps=fps if 0 < fps < np.inf else np.nan,
            seconds=seconds if seconds > 0 else np.nan,
            id=ids[0] if ids else "",
        )

    def extract_frames(self, serialized: bytes, indices: Sequence[int]) -> list[bytes]:
        """As `Split.extract_frames`."""
        lists = tf.train.SequenceExample.FromString(serialized).feature_lists.feature_list
        return [_only(lists[self.frames].feature[i]) for i in indices]


@dataclass(frozen=True)
class Examples:
    """TFDS's records: tf.train.Example with these names of the video and the label."""

    video: str
    label: str

    def contents(self, serialized: bytes) -> Contents:
        """Parses a record."""
        feature = tf.train.Example.FromString(serialized).features.feature
        return Contents(feature[self.video].bytes_list.value, feature[self.label].int64_list.value)

    def extract_frames(self, serialized: bytes, indices: Sequence[int]) -> list[bytes]:
        """As `Split.extract_frames`."""
        return extract_frames(serialized, indices, self.video)


Format = SequenceExamples | Examples


def _only(feature: tf.train.Feature) -> bytes:
    """The one byte string of a frame; an empty one, which is no image, where there is no one."""
    values = feature.bytes_list.value
    return values[0] if len(values) == 1 else b""


# ---- the index ----------------------------------------------------------------------------------


def index_of(directory: str, split: str, files: Sequence[str], kind: Format) -> Index:
    """The index of a split, read if it is there and belongs to these files, else made and kept.

    It is kept beside the data as SPLIT.records.npz or, where that cannot be written, in the user's
    cache. Several processes at once do the same work and write the same file, each whole.
    """
    # One after the other is slow on gs://.
    with ThreadPoolExecutor(32) as pool:
        sizes = [stat.length for stat in pool.map(tf.io.gfile.stat, files)]
    shards = [(os.path.basename(file), size) for file, size in zip(files, sizes)]
    key = hashlib.sha256(repr((VERSION, kind, shards)).encode()).hexdigest()
    paths = _index_paths(directory, split)
    for path in paths:
        if (index := _read_index(path, key)) is not None:
            return index
    index = _make_index(split, files, sizes, kind) | {"key": np.array(key)}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **index)
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


def _index_paths(directory: str, split: str) -> tuple[str, str]:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = hashlib.sha256(directory.encode()).hexdigest()[:16]
    name = f"{split}.records.npz"
    return os.path.join(directory, name), os.path.join(cache, "timesformer_jax", folder, name)


def _read_index(path: str, key: str) -> Index | None:
    """The index at a path; None if there is none, or a damaged one, or one of other data."""
    try:
        with tf.io.gfile.GFile(path, "rb") as file:
            index = dict(np.load(io.BytesIO(file.read())))
        return index if index["key"] == key else None
    except (OSError, tf.errors.OpError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _make_index(split: str, files: Sequence[str], sizes: Sequence[int], kind: Format) -> Index:
    """Reads every record of a split, by a pool of processes if there is much to read."""
    workers = min(available_cores(), len(files), 1 + sum(sizes) // BYTES_WORTH_A_WORKER)
    found = {}
    with tqdm(total=sum(sizes), unit="B", unit_scale=True, desc=f"indexing {split}") as progress:
        for i, contents in _read_shards(files, kind, workers):
            found[i] = contents
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


def _read_shards(files: Sequence[str], kind: Format, workers: int) -> Iterator[tuple[int, Any]]:
    if workers <= 1:
        yield from ((i, _read_shard(file, kind)) for i, file in enumerate(files))
        return
    with worker_pool(workers) as pool:
        tasks = {pool.submit(_read_shard, file, kind): i for i, file in enumerate(files)}
        try:
            for task in as_completed(tasks):
                yield tasks[task], task.result()
        except BrokenProcessPool as error:
            raise InputError(
                "a process that indexed records was killed (out of memory?); run it again"
            ) from error


def _read_shard(file: str, kind: Format) -> tuple[list[dict], list[tuple[str, str]]]:
    """The index rows of a shard's records, and why and which were left out."""
    rows, skipped = [], []
    offset = 0
    try:
        shard = tf.data.TFRecordDataset(file, buffer_size=1 << 23)
        for i, serialized in enumerate(shard.as_numpy_iterator()):
            contents = kind.contents(serialized)
            name = contents.id or f"{os.path.basename(file)}:{i}"
            try:
                row = _row(contents)
            except _Unusable as error:
                skipped.append((str(error), name))
            else:
                rows.append({**row, "offset": offset, "size": len(serialized), "id": name})
            offset += len(serialized) + RECORD_OVERHEAD_BYTES
    except (tf.errors.OpError, DecodeError) as error:
        raise InputError(
            f"{file} cannot be read as uncompressed TFRecords of {type(kind).__name__} from byte"
            f" {offset} on ({str(error).splitlines()[0]}); copy it there again, or write it again"
        ) from error
    return rows, skipped


class _Unusable(Exception):
    """Why a record cannot be used, as what it is `with`."""


def _row(contents: Contents) -> dict[str, Any]:
    labels = set(contents.labels)
    if not contents.frames:
        raise _Unusable("no frames")
    if len(labels) > 1:
        raise _Unusable("several labels")
    # TFDS writes -1 where there is no label.
    if not labels or not 0 <= (label := labels.pop()) < MAX_CLASSES:
        raise _Unusable("no label")
    shapes = {_shape(frame) for frame in contents.frames}
    if len(shapes) > 1:
        raise _Unusable("frames of several sizes")
    height, width = shapes.pop()
    said = {key: getattr(contents, key) for key in ("text", "fps", "seconds")}
    size = {"num_frames": len(contents.frames), "height": height, "width": width}
    return {"label": label, **size, **said}


def _shape(frame: bytes) -> tuple[int, int]:
    """Height and width of an encoded image, by its header."""
    try:
        with Image.open(io.BytesIO(frame), formats=("JPEG", "PNG")) as image:
            return image.height, image.width
    except (OSError, Image.DecompressionBombError) as error:
        raise _Unusable("frames that are neither JPEG nor PNG") from error
