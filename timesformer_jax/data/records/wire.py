"""Writes and reads records, tf.train.Examples in TFRecord files, without TensorFlow.

TensorFlow's parser copies everything in a record, every stored frame of a clip. For 75 frames this
takes a quarter of the time of decoding the 8 sampled ones. Following the lengths in protobuf's wire
format copies nothing. The processes that write shards do not import TensorFlow at all, which takes
seconds and hundreds of megabytes in each of them.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import google_crc32c
import numpy as np

from timesformer_jax.data.layout import PLACE

# The TFRecord format: length (8 bytes), checksum of it (4), data, checksum of the data (4).
RECORD_HEADER_BYTES = 12
RECORD_OVERHEAD_BYTES = 16

# What is read at a time of a record that stays in its file.
BLOCK_BYTES = 1 << 20

# The wire type of strings and messages. An Example has no other down to its byte strings.
LENGTH_DELIMITED = 2

# Field numbers of tf.train.Feature, which holds one of three lists.
BYTES_LIST, FLOAT_LIST, INT64_LIST = 1, 2, 3


def masked_crc32c(data: bytes) -> int:
    """The checksum of the TFRecord format: CRC-32C rotated right by 15 bits, plus a constant."""
    return _masked(google_crc32c.value(data))


def _masked(crc: int) -> int:
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


class LongRecord:
    """A serialized record that stays in its file: indexed like its bytes, it reads a block of them.

    It holds that block, and once its frames were asked for, 16 bytes for each of them. Not for
    several threads at a time.

    Args:
      size: bytes of the record.
      read: a function of two positions in the record that returns the bytes between them.
    """

    def __init__(self, size: int, read: Callable[[int, int], bytes]):
        self._size, self._read = size, read
        self._first, self._block = 0, b""
        self._places: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, at: int | slice) -> int | bytes:
        """A byte, or the bytes of a slice with neither a step nor negative ends."""
        if isinstance(at, slice):
            start, stop, _ = at.indices(self._size)
            return self._between(start, stop)
        return self._between(at, at + 1)[0]

    def _between(self, start: int, stop: int) -> bytes:
        if not self._first <= start <= stop <= self._first + len(self._block):
            until = min(max(stop, start + BLOCK_BYTES), self._size)
            self._first, self._block = start, self._read(start, until)
        return self._block[start - self._first : stop - self._first]

    def checksum(self) -> int:
        """`masked_crc32c` of the bytes; it reads all of them."""
        crc = 0
        for start in range(0, self._size, BLOCK_BYTES):
            crc = google_crc32c.extend(crc, self._read(start, min(start + BLOCK_BYTES, self._size)))
        return _masked(crc)

    def places(self, feature: str) -> np.ndarray:
        """(n, 2) int64: where each value of a bytes_list feature is, as for `bytes_list`."""
        if feature not in self._places:
            ends = ((place.start, place.stop) for place in _bytes_values(self, feature))
            self._places[feature] = np.fromiter(ends, np.dtype((np.int64, 2)))
        return self._places[feature]


class ShardWriter:
    """A context manager that writes records to a TFRecord file and returns where each begins.

    Args:
      path: of a file on a disk.

    Raises:
      OSError: from any method, if the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike):
        self._file = open(path, "wb")  # noqa: SIM115  closed by __exit__

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def write(self, record: bytes) -> dict[str, int]:
        """Appends a record; returns its index columns `offset` and `size`."""
        place = {"offset": self._file.tell(), "size": len(record)}
        length = struct.pack("<Q", len(record))
        self._file.write(length + struct.pack("<I", masked_crc32c(length)))
        self._file.write(record)
        self._file.write(struct.pack("<I", masked_crc32c(record)))
        return place


# What a feature of an Example holds: text, a number, classes, or byte strings.
Feature = str | float | tuple[int, ...] | list[bytes]


def serialize(example: Mapping[str, Feature]) -> bytes:
    """Serializes a tf.train.Example; equal examples give equal bytes.

    Args:
      example: a value per feature. An int becomes an int64_list of one number and a tuple an
        int64_list of its numbers; a float becomes a float_list; a str becomes a bytes_list of its
        UTF-8 and a list a bytes_list of its byte strings.
    """
    features = b""
    for name, value in sorted(example.items()):
        features += _field(1, _field(1, name.encode()) + _field(2, _feature(value)))
    return _field(1, features)


def _feature(value: Feature) -> bytes:
    """Serializes a tf.train.Feature."""
    if isinstance(value, float):
        return _field(FLOAT_LIST, _field(1, struct.pack("<f", value)))
    if isinstance(value, (int, tuple)):
        numbers = (value,) if isinstance(value, int) else value
        packed = b"".join(_encode_varint(number & (1 << 64) - 1) for number in numbers)
        return _field(INT64_LIST, _field(1, packed) if packed else b"")
    strings = [value.encode()] if isinstance(value, str) else value
    return _field(BYTES_LIST, b"".join(_field(1, each) for each in strings))


def _field(number: int, content: bytes) -> bytes:
    """A string or message as a field of a message."""
    return b"".join(
        (_encode_varint(number << 3 | LENGTH_DELIMITED), _encode_varint(len(content)), content)
    )


def _encode_varint(value: int) -> bytes:
    """An integer of at least 0, in groups of 7 bits, lowest first."""
    groups = bytearray()
    while value > 127:
        groups.append(value & 127 | 128)
        value >>= 7
    return bytes((*groups, value))


def bytes_list(example: bytes, name: str) -> list[slice]:
    """Finds the values of a bytes_list feature.

    Args:
      example: a serialized tf.train.Example.
      name: of the feature.

    Returns:
      Where each value is in `example`.

    Raises:
      KeyError: there is no such feature.
    """
    return list(_bytes_values(example, name))


def _bytes_values(example: Any, name: str) -> Iterator[slice]:
    """The places of `bytes_list`, of an example that is indexed like bytes."""
    for _, features in _fields(example, slice(0, len(example))):
        for _, entry in _fields(example, features):
            # An entry of a map is a message of key and value.
            (_, key), (_, feature) = _fields(example, entry)
            if example[key] == name.encode():
                for _, values in _fields(example, feature):
                    yield from (value for _, value in _fields(example, values))
                return
    raise KeyError(name)


def _fields(message: Any, place: slice) -> Iterator[tuple[int, slice]]:
    """The field number and the place of each field of the message at `place`."""
    at = place.start
    while at < place.stop:
        tag, at = _varint(message, at)
        if tag & 7 != LENGTH_DELIMITED:
            raise ValueError(f"wire type {tag & 7} at byte {at} of a tf.train.Example")
        length, at = _varint(message, at)
        yield tag >> 3, slice(at, at + length)
        at += length


def _varint(message: Any, at: int) -> tuple[int, int]:
    """Decodes an integer of 7-bit groups, lowest first; returns it and the position after it."""
    value = shift = 0
    while (byte := message[at]) > 127:
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
    return value | byte << shift, at + 1


def extract_frames(
    serialized: bytes | LongRecord, indices: Sequence[int], feature: str = "video"
) -> list[bytes]:
    """The encoded frames at `indices` of a serialized record.

    Args:
      serialized: a tf.train.Example.
      indices: of stored frames.
      feature: name of the bytes_list of frames.
    """
    if isinstance(serialized, LongRecord):
        ends = serialized.places(feature)
        return [serialized[ends[i, 0] : ends[i, 1]] for i in indices]  # type: ignore[misc]
    places = bytes_list(serialized, feature)
    return [serialized[places[i]] for i in indices]


def frame_places(serialized: bytes, feature: str = "video") -> np.ndarray:
    """Where each frame of a serialized record is, (k,) PLACE; arguments as of `extract_frames`."""
    frames = bytes_list(serialized, feature)
    rows = [(f.start, f.stop - f.start, google_crc32c.value(serialized[f])) for f in frames]
    return np.array(rows, PLACE)
