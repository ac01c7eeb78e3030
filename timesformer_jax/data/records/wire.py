"""Finds byte strings in a serialized tf.train.Example without parsing it.

Parsing copies all that a record holds, every stored frame of a clip; of 75 frames that takes a
quarter of the time of decoding the 8 that are sampled. Walking over the lengths copies nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

# A TFRecord is a length (8 bytes), its checksum (4), the data, and the data's checksum (4).
RECORD_HEADER_BYTES = 12
RECORD_OVERHEAD_BYTES = 16

LENGTH_DELIMITED = 2  # the wire type of strings and messages; an Example has no other down to these


def bytes_list(example: bytes, name: str) -> list[slice]:
    """Where the values of a feature lie in a serialized tf.train.Example.

    Args:
      example: serialized.
      name: of a feature that is a bytes_list.

    Raises:
      KeyError: there is no such feature.
    """
    for _, features in _fields(example, slice(0, len(example))):
        for _, entry in _fields(example, features):  # of a map: a key and a value
            (_, key), (_, feature) = _fields(example, entry)
            if example[key] == name.encode():
                lists = (values for _, values in _fields(example, feature))
                return [value for values in lists for _, value in _fields(example, values)]
    raise KeyError(name)


def _fields(message: bytes, place: slice) -> Iterator[tuple[int, slice]]:
    """The number and place of each field of a message that lies at a place."""
    at = place.start
    while at < place.stop:
        tag, at = _varint(message, at)
        if tag & 7 != LENGTH_DELIMITED:
            raise ValueError(f"wire type {tag & 7} at byte {at} of a tf.train.Example")
        length, at = _varint(message, at)
        yield tag >> 3, slice(at, at + length)
        at += length


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """An integer in groups of 7 bits, the lowest first, and the position after it."""
    value = shift = 0
    while (byte := message[at]) > 127:
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
    return value | byte << shift, at + 1


def encoded_frames(
    serialized: bytes, indices: Sequence[int], feature: str = "video"
) -> list[bytes]:
    """Some of the stored frames of a serialized record, in a feature of this name."""
    places = bytes_list(serialized, feature)
    return [serialized[places[i]] for i in indices]
