"""Finds byte strings in a serialized tf.train.Example without parsing all of it.

Parsing copies everything in a record, every stored frame of a clip. For 75 frames this takes a
quarter of the time of decoding the 8 sampled ones. Following the lengths in protobuf's wire format
copies nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

# The TFRecord format: length (8 bytes), checksum of it (4), data, checksum of the data (4).
RECORD_HEADER_BYTES = 12
RECORD_OVERHEAD_BYTES = 16

# The wire type of strings and messages. An Example has no other down to its byte strings.
LENGTH_DELIMITED = 2


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
    for _, features in _fields(example, slice(0, len(example))):
        for _, entry in _fields(example, features):
            # An entry of a map is a message of key and value.
            (_, key), (_, feature) = _fields(example, entry)
            if example[key] == name.encode():
                lists = (values for _, values in _fields(example, feature))
                return [value for values in lists for _, value in _fields(example, values)]
    raise KeyError(name)


def _fields(message: bytes, place: slice) -> Iterator[tuple[int, slice]]:
    """The field number and the place of each field of the message at `place`."""
    at = place.start
    while at < place.stop:
        tag, at = _varint(message, at)
        if tag & 7 != LENGTH_DELIMITED:
            raise ValueError(f"wire type {tag & 7} at byte {at} of a tf.train.Example")
        length, at = _varint(message, at)
        yield tag >> 3, slice(at, at + length)
        at += length


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Decodes an integer of 7-bit groups, lowest first; returns it and the position after it."""
    value = shift = 0
    while (byte := message[at]) > 127:
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
    return value | byte << shift, at + 1


def extract_frames(
    serialized: bytes, indices: Sequence[int], feature: str = "video"
) -> list[bytes]:
    """The encoded frames at `indices` of a serialized record.

    Args:
      serialized: a tf.train.Example.
      indices: of stored frames.
      feature: name of the bytes_list of frames.
    """
    places = bytes_list(serialized, feature)
    return [serialized[places[i]] for i in indices]
