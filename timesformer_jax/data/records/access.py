"""Reads records, and single frames of them.

Where the places of a record's frames are known, a clip reads its own frames: of ten minutes of
video that may be a hundredth. The TFRecord format has one checksum for a whole record, so each
frame has another in its place.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence

import google_crc32c
import numpy as np

from timesformer_jax.data.layout import DIGEST_BYTES, PLACE
from timesformer_jax.data.records.split import Split
from timesformer_jax.data.records.wire import (
    RECORD_HEADER_BYTES,
    RECORD_OVERHEAD_BYTES,
    LongRecord,
    masked_crc32c,
)
from timesformer_jax.errors import InputError
from timesformer_jax.storage import read_ranges

# A record is read whole unless it has more than so many times the bytes of the frames.
WHOLE_FROM = 2
# Reading waits for a disk or a network and not for a processor, so threads may outnumber the cores.
READ_THREADS = 16
# Records of more bytes stay in their files, or are read one at a time.
LONG_RECORD_BYTES = 32 << 20


def read_frames(split: Split, row: int, indices: Sequence[int]) -> tuple[list[bytes], int]:
    """Reads stored frames of a record, and of it nothing else if their places are known.

    Args:
      split: where the records are.
      row: of the record.
      indices: of its stored frames, in any order; some may be the same.

    Returns:
      The JPEG or PNG at each index, and the number of bytes that were read for them.

    Raises:
      InputError: names the file that is missing, truncated or damaged.
    """
    if found := read_placed(split, row, indices):
        return found
    size = int(split.size[row])
    record = read_record(split.files[split.shard[row]], int(split.offset[row]), size)
    of_places = PLACE.itemsize * (max(indices) - min(indices) + 1) if split.places_of(row) else 0
    return split.extract_frames(record, indices), of_places + size + RECORD_OVERHEAD_BYTES


def read_placed(split: Split, row: int, indices: Sequence[int]) -> tuple[list[bytes], int] | None:
    """As `read_frames`; None where the record is to be read whole.

    That is where its places are not known, or half of its bytes are wanted.
    """
    file, offset, size = split.files[split.shard[row]], int(split.offset[row]), int(split.size[row])
    known = split.places_of(row)
    if known is None:
        return None
    wanted, which = np.unique(indices, return_inverse=True)
    places = _read_places(*known, wanted, size)
    if size <= WHOLE_FROM * places["size"].sum(dtype=np.int64):
        return None
    frames, num_bytes = _read_at(file, offset + RECORD_HEADER_BYTES, places)
    if not all(_is_intact(*each) for each in zip(frames, places, strict=True)):
        read_record(file, offset, size)  # ends here if it is the record that is damaged
        raise _damaged(known[0])
    num_bytes += PLACE.itemsize * int(wanted[-1] - wanted[0] + 1)
    return [frames[i] for i in which.tolist()], num_bytes


def _read_places(path: str, first: int, wanted: np.ndarray, record_size: int) -> np.ndarray:
    """The places of frames of a record.

    Args:
      path: of the file of places.
      first: the entry of the record's frame 0 in it.
      wanted: (k,) int, the frames, ascending.
      record_size: bytes of the serialized record.

    Returns:
      (k,) PLACE, one after the other and within the record.

    Raises:
      InputError: the file is damaged there.
    """
    begin = DIGEST_BYTES + PLACE.itemsize * (first + int(wanted[0]))
    num_bytes = PLACE.itemsize * int(wanted[-1] - wanted[0] + 1)
    (content,) = _read(path, [(begin, num_bytes)])
    if len(content) < num_bytes:
        raise _damaged(path)
    places = np.frombuffer(content, PLACE)[wanted - wanted[0]]
    first, last = _bounds(places)
    if (first[1:] < last[:-1]).any() or last[-1] > record_size:
        raise _damaged(path)
    return places


def _bounds(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each frame begins and ends, in bytes from the beginning of its record."""
    first = places["offset"].astype(np.int64)
    return first, first + places["size"]


def _read_at(file: str, begin: int, places: np.ndarray) -> tuple[list[bytes], int]:
    """The frames at (k,) places of the serialized record at `begin`, and how many bytes were read.

    Where the file ends, frames are shorter than they should be.
    """
    first, last = _bounds(places)
    low, high = byte_ranges(first, last)
    parts = _read(file, list(zip((begin + low).tolist(), (high - low).tolist())))
    part = np.searchsorted(low, first, side="right") - 1
    cuts = zip(part.tolist(), (first - low[part]).tolist(), (last - low[part]).tolist())
    return [parts[i][start:stop] for i, start, stop in cuts], sum(map(len, parts))


def byte_ranges(first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranges that hold frames: a gap is read too if it is no longer than the frame after it.

    So they have less than twice the bytes of the frames, and few are asked for.

    Args:
      first, last: (k,) where each frame begins and ends, one after the other.

    Returns:
      Where each range begins and ends, in order.
    """
    apart = first[1:] - last[:-1] > last[1:] - first[1:]
    return first[np.concatenate([[True], apart])], last[np.concatenate([apart, [True]])]


def _is_intact(frame: bytes, place: np.void) -> bool:
    return len(frame) == place["size"] and google_crc32c.value(frame) == place["crc"]


def read_record(file: str, offset: int, size: int) -> bytes:
    """Reads the serialized record at a byte offset of a TFRecord file, and checks its checksums.

    Args:
      file: path, which may be on gs://.
      offset: bytes from the beginning of the file to the record's header.
      size: bytes of the serialized record.

    Raises:
      InputError: the file cannot be read, ends within the record, or is damaged there.
    """
    parts = [(0, RECORD_HEADER_BYTES), (RECORD_HEADER_BYTES, size), (RECORD_HEADER_BYTES + size, 4)]
    header, data, footer = _read_within(file, offset, parts)
    _check(file, offset, size, header, masked_crc32c(data), footer)
    return data


def open_record(file: str, offset: int, size: int) -> LongRecord:
    """As `read_record`, of a record that stays in the file; it is read once, and checked."""

    def read(first: int, last: int) -> bytes:
        return _read_within(file, offset, [(RECORD_HEADER_BYTES + first, last - first)])[0]

    record = LongRecord(size, read)
    [header] = _read_within(file, offset, [(0, RECORD_HEADER_BYTES)])
    _check(file, offset, size, header, record.checksum(), read(size, size + 4))
    return record


def _read_within(file: str, offset: int, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Parts of the record at `offset`: the first byte of each, from there, and its size."""
    parts = _read(file, [(offset + first, size) for first, size in ranges])
    if [len(part) for part in parts] != [size for _, size in ranges]:
        raise InputError(f"{file} ends within the record at byte {offset}; {advice(file)}")
    return parts


def _check(file: str, offset: int, size: int, header: bytes, checksum: int, footer: bytes) -> None:
    """Raises InputError unless what stands before and after a record's data is right."""
    expected = struct.pack("<QI", size, masked_crc32c(header[:8])), checksum
    if (header, int.from_bytes(footer, "little")) != expected:
        raise InputError(f"{file} is damaged in the record at byte {offset}; {advice(file)}")


def _read(file: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    try:
        return read_ranges(file, ranges)
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}; {advice(file)}") from error


def _damaged(path: str) -> InputError:
    return InputError(f"{path} is damaged; delete it: it is made again from the records")


def advice(file: str) -> str:
    """What to do about a damaged shard."""
    return f"`timesformer check {os.path.dirname(file)}` lists what is wrong and what to do"
