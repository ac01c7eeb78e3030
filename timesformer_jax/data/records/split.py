"""A split of a data set: where its records are and what they contain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from timesformer_jax.data.annotations import clip_hash
from timesformer_jax.data.layout import INDEX_DTYPES
from timesformer_jax.data.records.wire import extract_frames
from timesformer_jax.errors import InputError


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
    extract_frames: Callable[[bytes, Sequence[int]], list[bytes]] = extract_frames
    targets: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.label)

    def take(self, rows: np.ndarray) -> Split:
        """The records of some rows: their numbers, or a mask."""
        columns = {column: getattr(self, column)[rows] for column in ("ids", *INDEX_DTYPES)}
        return replace(
            self, **columns, targets=None if self.targets is None else self.targets[rows]
        )


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
