"""From plans to decoded clips: reads records at their offsets, decodes what the plans ask for.

Python reads and parses records, in threads, and tf.data decodes. TensorFlow's own reader and parser
copy all frames of a record several times into fresh memory, which takes longer than decoding the
few that are sampled.
"""

from __future__ import annotations

import atexit
import collections
import functools
import itertools
import os
import struct
import weakref
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor

import google_crc32c
import numpy as np
import tensorflow as tf
from etils import epath

from timesformer_jax.data.records.split import Split
from timesformer_jax.data.records.wire import RECORD_HEADER_BYTES, RECORD_OVERHEAD_BYTES
from timesformer_jax.errors import InputError

Plan = dict[str, np.ndarray]

# They wait for a disk or a network, not for a processor.
READ_THREADS = 16
READ_AHEAD = 2  # batches
# JPEG codes squares of so many pixels (4:2:0); from another column on, TensorFlow is 40% slower.
JPEG_COLUMNS = 16


def clips(plans: Iterator[Plan], split: Split, side: int) -> Iterator[tuple[Plan, np.ndarray]]:
    """Reads and decodes batches ahead of their use, in order.

    Args:
      plans: what to read, batches of one shape: record (b,), rows of `split`; indices (b, V, T),
        their stored frames, for V views; corners (b, C, 2), top and left of C squares of each
        frame, which lie within it.
      split: where the records are.
      side: of the squares, in pixels.

    Yields:
      A plan and its frames, (b, V * C, T, side, side, 3) uint8 RGB, squares varying fastest.

    Raises:
      InputError: naming the shard that is missing, truncated or damaged, or has a frame that is
        no image of the size that the index says.
    """
    batches = _clips(plans, split, side)
    # TensorFlow's threads ask Python for more; asking once the interpreter has ended, they hang.
    atexit.register(_close, weakref.ref(batches))
    return batches


def _close(batches: weakref.ref[Generator]) -> None:
    if (generator := batches()) is not None:
        generator.close()


def _clips(
    plans: Iterator[Plan], split: Split, side: int
) -> Generator[tuple[Plan, np.ndarray], None, None]:
    first = next(plans)
    waiting: collections.deque[Plan] = collections.deque()
    failures: list[Exception] = []

    def encoded() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        try:
            for plan, images in encoded_frames(itertools.chain([first], plans), split):
                waiting.append(plan)
                yield images, plan["corners"]
        except Exception as error:  # TensorFlow would tell of it in its own words
            failures.append(error)
            raise

    data = decoded(encoded, first, side).batch(len(first["record"])).prefetch(READ_AHEAD)
    try:
        for frames in data.as_numpy_iterator():
            yield waiting.popleft(), frames
    except tf.errors.OpError as error:
        cause = failures[0] if failures else _undecodable(split, waiting[0])
        raise cause or error from None


def decoded(
    encoded: Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]], like: Plan, side: int
) -> tf.data.Dataset:
    """The clips of batches of encoded frames, one by one.

    Args:
      encoded: gives batches of frames, as `encoded_frames`, and corners, as in their plan.
      like: a plan of the same shapes.
      side: of the squares, in pixels.
    """
    data = tf.data.Dataset.from_generator(
        encoded,
        output_signature=(
            tf.TensorSpec(like["indices"].shape, tf.string),
            tf.TensorSpec(like["corners"].shape, tf.int32),
        ),
    )
    return (
        data.prefetch(READ_AHEAD)
        .unbatch()
        .map(
            functools.partial(_decode, side=side),
            num_parallel_calls=tf.data.AUTOTUNE,
            deterministic=True,
        )
    )


def encoded_frames(plans: Iterator[Plan], split: Split) -> Iterator[tuple[Plan, np.ndarray]]:
    """The frames that plans ask for, as they are stored.

    Yields:
      A plan and its frames, (b, V, T) objects, each the bytes of a JPEG or PNG.
    """
    read = functools.partial(_frames, split)
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for plan in plans:
            images = list(pool.map(read, plan["record"], plan["indices"]))
            yield plan, np.array(images, object).reshape(plan["indices"].shape)


def _frames(split: Split, row: int, indices: np.ndarray) -> list[bytes]:
    """The frames of a record at (V, T) indices, in a row."""
    file = split.files[split.shard[row]]
    record = read_record(file, int(split.offset[row]), int(split.size[row]))
    return split.encoded_frames(record, indices.ravel().tolist())


def read_record(file: str, offset: int, size: int) -> bytes:
    """The serialized record at a byte offset of a TFRecord file, its checksums checked.

    Args:
      file: its path, on gs:// too.
      offset: bytes from the file's beginning to the record's header.
      size: bytes of the serialized record.

    Raises:
      InputError: the file cannot be read, ends within the record, or is damaged there.
    """
    try:
        with epath.Path(file).open("rb") as shard:
            shard.seek(offset)
            header, data, footer = (shard.read(n) for n in (RECORD_HEADER_BYTES, size, 4))
    except (OSError, tf.errors.OpError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise InputError(f"cannot read {file}: {reason}; {_advice(file)}") from error
    if len(header) + len(data) + len(footer) < size + RECORD_OVERHEAD_BYTES:
        raise InputError(f"{file} ends within the record at byte {offset}; {_advice(file)}")
    length = header[:8]
    expected = struct.pack("<QI", size, _masked_crc32c(length)), _masked_crc32c(data)
    if (header, int.from_bytes(footer, "little")) != expected:
        raise InputError(f"{file} is damaged in the record at byte {offset}; {_advice(file)}")
    return data


def _masked_crc32c(data: bytes) -> int:
    """The checksum of TFRecords: rotated by 15 bits, plus a constant."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@tf.autograph.experimental.do_not_convert
def _decode(images: tf.Tensor, corners: tf.Tensor, *, side: int) -> tf.Tensor:
    """(V, T) JPEGs or PNGs and (C, 2) corners to (V * C, T, side, side, 3) uint8."""
    (views, length), crops = images.shape, corners.shape[0]
    images = tf.reshape(images, [-1])
    top, left = corners[0, 0], corners[0, 1]
    shift = left % JPEG_COLUMNS

    def from_squares() -> tf.Tensor:
        """Decodes the square and little else."""
        window = tf.stack([top, left - shift, side, side + shift])
        inner = tf.stack([0, shift, 0])
        squares = [tf.io.decode_and_crop_jpeg(i, window, channels=3) for i in tf.unstack(images)]
        return tf.stack([tf.slice(square, inner, [side, side, 3]) for square in squares])

    def from_frames() -> tf.Tensor:
        frames = [tf.io.decode_jpeg(i, channels=3) for i in tf.unstack(images)]  # PNGs too
        origins = tf.unstack(tf.pad(corners, [[0, 0], [0, 1]]))
        return tf.stack(
            [
                tf.slice(frame, origin, [side, side, 3])
                for view in range(views)
                for origin in origins
                for frame in frames[view * length : (view + 1) * length]
            ]
        )

    if crops > 1:
        squares = from_frames()
    else:
        are_jpegs = tf.reduce_all(tf.strings.substr(images, 0, 3) == b"\xff\xd8\xff")
        squares = tf.cond(are_jpegs, from_squares, from_frames)
    return tf.reshape(squares, [views * crops, length, side, side, 3])


def _undecodable(split: Split, plan: Plan) -> InputError | None:
    """Which record is to blame for a batch that TensorFlow could not decode, if one is."""
    for row, indices in zip(plan["record"], plan["indices"]):
        expected = split.height[row], split.width[row]
        for frame in _frames(split, row, indices):
            try:
                size = tuple(tf.io.decode_jpeg(frame, channels=3).shape[:2])
                reason = f"is {size[1]}x{size[0]}, and not {expected[1]}x{expected[0]}"
            except tf.errors.OpError:
                size, reason = None, "cannot be decoded"
            if size != expected:
                file = split.files[split.shard[row]]
                return InputError(
                    f"a frame of {split.ids[row]} in {file} {reason}; {_advice(file)}"
                )
    return None


def _advice(file: str) -> str:
    return f"`timesformer check {os.path.dirname(file)}` lists what is wrong and what to do"
