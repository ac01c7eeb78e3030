"""A split: where its records are and what they hold."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from timesformer_jax.data.annotations import clip_hash
from timesformer_jax.data.layout import INDEX_DTYPES
from timesformer_jax.data.records.wire import encoded_frames
from timesformer_jax.errors import InputError


@dataclass(frozen=True)
class Split:
    """Where the n records of a split are, and what they hold. The arrays are (n,), a row a record.

    name: `train`, `validation` or `test`; another project's may have any.
    files: absolute paths of the shards.
    label_names: name of each class.
    ids: str. Clip.id.
    shard: int32, position in `files`.
    offset: int64, bytes from the file's beginning to the record's (its TFRecord header of
      RECORD_HEADER_BYTES included: the serialized Example begins after that).
    size: int64, bytes of the serialized Example.
    num_frames: int32, frames of the clip in the source; stored: ceil(num_frames / stride).
    fps: float32, of the source.
    stride: int32, one of how many source frames is stored.
    height, width: int32, pixels of the stored frames.
    label: int32, class.
    video: int32, which video of the split the record is of: the pieces of a long video share it.
    encoded_frames: from a serialized record and the numbers of stored frames to those frames, each
      the bytes of a JPEG or PNG.
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
    encoded_frames: Callable[[bytes, Sequence[int]], list[bytes]] = encoded_frames

    def __len__(self) -> int:
        return len(self.label)


def take_fraction(split: Split, fraction: float) -> Split:
    """The records of a fraction of a split's videos, the same of every class.

    Which videos they are follows from their ids alone, so that it is the same for every run, and a
    smaller part lies within a larger.

    Args:
      split: what to take from.
      fraction: in (0, 1]; of a class's videos the nearest whole number, but at least one.

    Raises:
      InputError: if the fraction is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise InputError(f"a fraction of the data must be above 0 and at most 1, not {fraction}")
    if fraction == 1:
        return split
    # A video's pieces are taken together, by the id of its first.
    _, first, video = np.unique(split.video, return_index=True, return_inverse=True)
    kept = np.zeros(len(first), bool)
    labels = split.label[first]
    for label in np.unique(labels):
        videos = np.flatnonzero(labels == label)
        ranked = sorted(videos, key=lambda v: clip_hash(str(split.ids[first[v]])))
        kept[ranked[: max(round(fraction * len(ranked)), 1)]] = True
    rows = kept[video]
    columns = {column: getattr(split, column)[rows] for column in ("ids", *INDEX_DTYPES)}
    return replace(split, **columns)
