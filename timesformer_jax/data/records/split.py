"""A split of a data set: where its records are and what they contain."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from etils import epath

from timesformer_jax.data.annotations import clip_hash
from timesformer_jax.data.layout import INDEX_DTYPES, SPLITS_FILE
from timesformer_jax.data.records.wire import LongRecord, extract_frames
from timesformer_jax.errors import InputError, first_line


@dataclass(frozen=True)
class Split:
    """The index of a split with n records. The arrays are (n,), a row per record.

    Attributes:
      name: `train`, `validation` or `test`; any name in records of other projects.
      files: absolute paths of the shards.
      label_names: the name of each class.
      ids: str, `Clip.id`.
      shard: int32, index in `files`.
      offset: int64, bytes from the beginning of the file to the record's TFRecord header. The
        serialized Example begins RECORD_HEADER_BYTES later.
      size: int64, bytes of the serialized Example.
      num_frames: int32, frames of the clip in the source. ceil(num_frames / stride) are stored.
      fps: float32, frame rate of the source.
      stride: int32, every stride-th frame of the source is stored.
      height, width: int32, pixels of the stored frames.
      label: int32, the class; of multi-label data the first of the classes, or 0.
      video: int32, the video that the record is from. The pieces of a long video share it.
      places: for each shard the file that says where the frames of its records are (`places.py`),
        or None if it is not known; () if of no shard.
      first_place: int64, the record's first entry in this file; None if `places` is ().
      extract_frames: a function of a serialized record and indices of stored frames. It returns
        the bytes of each of these frames, a JPEG or PNG.
      targets: (n, classes) bool, the classes of each record; None unless the data is multi-label.
    """

    name: str
    files: tuple[str, ...]
    label_names: tuple[str, ...]
    ids: np.ndarray
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    num_frames: np.ndarray
    fps: np.ndarray
    stride: np.ndarray
    height: np.ndarray
    width: np.ndarray
    label: np.ndarray
    video: np.ndarray
    places: tuple[str | None, ...] = ()
    first_place: np.ndarray | None = None
    extract_frames: Callable[[bytes | LongRecord, Sequence[int]], list[bytes]] = extract_frames
    targets: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.label)

    @property
    def num_stored(self) -> np.ndarray:
        """(n,) int32, the stored frames of each record. No record has a stride of 0."""
        return -(-self.num_frames // np.maximum(self.stride, 1))

    def places_of(self, row: int) -> tuple[str, int] | None:
        """The file that says where the frames of a record are, and the entry of the first of them.

        None if it is not known.
        """
        path = self.places[self.shard[row]] if self.places else None
        if path is None or self.first_place is None:
            return None
        return path, int(self.first_place[row])

    def take(self, rows: np.ndarray) -> Split:
        """The records of some rows: their numbers, or a mask."""
        columns = {column: getattr(self, column)[rows] for column in ("ids", *INDEX_DTYPES)}
        for column in ("first_place", "targets"):
            if (values := getattr(self, column)) is not None:
                columns[column] = values[rows]
        return replace(self, **columns)


def first_class(targets: np.ndarray) -> np.ndarray:
    """(n,) int32, the first class of each row of (n, classes) bool; 0 where there is none."""
    return targets.argmax(axis=1).astype(np.int32)


def take_fraction(split: Split, fraction: float) -> Split:
    """The records of a fraction of a split's videos, the same fraction of every class.

    The choice follows from the videos' ids alone: it is the same in every run, and a smaller
    fraction is a subset of a larger one.

    Args:
      split: what to take from.
      fraction: in (0, 1]; rounded to whole videos of each class, but at least one.

    Raises:
      InputError: the fraction is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise InputError(f"a fraction of the data must be above 0 and at most 1, not {fraction}")
    if fraction == 1:
        return split
    # The pieces of a video stay together; the id of its first piece decides.
    _, first, video = np.unique(split.video, return_index=True, return_inverse=True)
    taken = np.zeros(len(first), bool)
    labels = split.label[first]
    for label in np.unique(labels):
        videos = np.flatnonzero(labels == label)
        ranked = sorted(videos, key=lambda v: clip_hash(str(split.ids[first[v]])))
        taken[ranked[: max(round(fraction * len(ranked)), 1)]] = True
    return split.take(taken[video])


# ---- Splits and labels that differ from those that the shards were written for -----------------

# A shard is named for its split, and its records hold their class, but neither has to be decoded
# again to change: `splits.json` of a prepared directory has each record's split and label by name,
# and takes precedence over the indices. TFDS knows nothing of it.


@dataclass(frozen=True)
class Reassigned:
    """The content of splits.json.

    labels: class names in order.
    splits: for each split, the label of each of its records by the record's id; of multi-label
      data a list of labels.
    clips: a fingerprint of the list of clips that it follows from.
    """

    labels: tuple[str, ...]
    splits: Mapping[str, Mapping[str, str | list[str]]]
    clips: str

    def to_json(self) -> bytes:
        fields = {"labels": self.labels, "splits": self.splits, "clips": self.clips}
        return (json.dumps(fields, indent=0) + "\n").encode()


def read_reassigned(directory: str) -> Reassigned | None:
    """Reads splits.json; None if there is none.

    Raises:
      InputError: it is damaged, or cannot be read.
    """
    path = epath.Path(directory) / SPLITS_FILE
    if not path.exists():
        return None
    try:
        text = path.read_text()
    except OSError as error:
        raise InputError(f"cannot read {path}: {first_line(error)}; make it readable") from error
    try:
        found = json.loads(text)
        splits = {name: dict(records) for name, records in found["splits"].items()}
        return Reassigned(tuple(found["labels"]), splits, found["clips"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is damaged ({error}); delete it, and run `timesformer prepare --resplit` again"
        ) from error


def select_split(indexed: Sequence[Split], reassigned: Reassigned, name: str) -> Split:
    """The records of a split, from the indices of all shards.

    Raises:
      InputError: a record is in no index, or has no known label.
    """
    label_of = reassigned.splits[name]
    everything = join(indexed)
    everything = everything.take(np.array([i in label_of for i in everything.ids.tolist()], bool))
    if len(everything) != len(label_of):
        raise InputError(
            f"{SPLITS_FILE} has {len(label_of)} records of {name}, and the indices"
            f" {len(everything)} of them; run `timesformer prepare --resplit` again"
        )
    classes = {label: i for i, label in enumerate(reassigned.labels)}
    found = replace(everything, name=name, label_names=reassigned.labels)
    targets = np.zeros((len(found), len(classes)), bool)
    for row, record in enumerate(found.ids.tolist()):
        labels = label_of[record]
        for label in [labels] if isinstance(labels, str) else labels:
            if label not in classes:
                raise InputError(
                    f"{SPLITS_FILE} gives {record} the label {label!r}, which it does not list; run"
                    " `timesformer prepare --resplit` again"
                )
            targets[row, classes[label]] = True
    if everything.targets is None:
        return replace(found, label=first_class(targets))
    return replace(found, label=first_class(targets), targets=targets)


def join(splits: Sequence[Split]) -> Split:
    """All records of several splits of one data set, as one."""
    # An index without records does not tell that the data is multi-label, if an earlier version
    # wrote it.
    splits = [split for split in splits if len(split)] or splits[:1]
    columns: dict[str, Any] = {
        column: np.concatenate([getattr(split, column) for split in splits])
        for column in ("ids", *INDEX_DTYPES)
    }
    for column in ("first_place", "targets"):
        if getattr(splits[0], column) is not None:
            columns[column] = np.concatenate([getattr(split, column) for split in splits])
    # Shards and videos are numbered within each split.
    for column, counts in {
        "shard": [len(split.files) for split in splits],
        "video": [1 + split.video.max(initial=-1) for split in splits],
    }.items():
        first = np.repeat(np.cumsum([0, *counts[:-1]]), [len(split) for split in splits])
        columns[column] = (columns[column] + first).astype(INDEX_DTYPES[column])
    files = tuple(file for split in splits for file in split.files)
    places = tuple(path for split in splits for path in split.places)
    return replace(splits[0], files=files, places=places, **columns)
