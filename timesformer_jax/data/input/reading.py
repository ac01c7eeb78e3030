"""Reads and decodes the records that a batch needs: the sampled frames of each, and no others.

Python threads read the sampled frames; tf.data decodes these. TensorFlow's own reader and parser
copy every frame of a record several times into fresh memory, which takes longer than decoding the
sampled ones.
"""

from __future__ import annotations

import atexit
import collections
import dataclasses
import functools
import itertools
import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tensorflow as tf

from timesformer_jax.data.input.in_flight import READ_AHEAD, InFlight
from timesformer_jax.data.records.access import (
    LONG_RECORD_BYTES,
    READ_THREADS,
    advice,
    open_record,
    read_placed,
    read_record,
)
from timesformer_jax.data.records.split import Split
from timesformer_jax.data.records.wire import LongRecord
from timesformer_jax.errors import InputError

# JPEGs are coded in blocks of 16 columns (4:2:0). TensorFlow is 40% slower if a crop starts within
# a block.
JPEG_BLOCK = 16


@dataclasses.dataclass(frozen=True)
class BatchRequest:
    """What a batch is made of, chosen before anything is read.

    b records, V views (clips of T frames) of each, C square crops of each frame.

    Attributes:
      record: (b,) int32, rows of the split.
      indices: (b, V, T) int32, the stored frames of each view.
      corners: (b, C, 2) int32, top and left of the squares to decode; they lie within the frame.
      crop_boxes: (b, C, 3) float32, the crops within these squares: top, left and side in pixels.
      flip: (b,) bool, whether the clip is mirrored.
      augment_seed: (b,) uint32, the seed of the clip's augmentation on the device.
      label: (b,) int32; of multi-label data (b, classes) float32, 0 or 1.
      valid: (b,) bool, False for rows that only fill up the last batch.
      valid_frames: (b,) int32, the frames of each clip that count; None if all do.
    """

    record: np.ndarray
    indices: np.ndarray
    corners: np.ndarray
    crop_boxes: np.ndarray
    flip: np.ndarray
    augment_seed: np.ndarray
    label: np.ndarray
    valid: np.ndarray
    valid_frames: np.ndarray | None = None


def read_batches(
    requests: Iterator[BatchRequest], split: Split, side: int
) -> Iterator[tuple[BatchRequest, np.ndarray]]:
    """Reads and decodes batches in order, ahead of their use.

    Args:
      requests: at least one; all arrays of the same shapes.
      split: where the records are.
      side: of the squares to decode, in pixels.

    Yields:
      A request and its frames, (b, V * C, T, side, side, 3) uint8 RGB; crops vary fastest.

    Raises:
      InputError: names the shard that is missing, truncated or damaged, or that has a frame which
        is no image of the size in the index.
    """
    batches = _read_batches(requests, split, side)
    # TensorFlow's threads call Python to read ahead. After the interpreter has ended they would
    # wait forever.
    atexit.register(_close, weakref.ref(batches))
    return batches


def _close(batches: weakref.ref[Generator]) -> None:
    if (generator := batches()) is not None:
        generator.close()


def _read_batches(
    requests: Iterator[BatchRequest], split: Split, side: int
) -> Generator[tuple[BatchRequest, np.ndarray], None, None]:
    first = next(requests)
    plan = in_flight(split, first, side)
    source = _EncodedSource(itertools.chain([first], requests), split, plan)
    decoded = decode_clips(source, plan)
    if plan.in_pieces:
        batches = _filled(decoded, plan)
    else:
        batches = decoded.batch(plan.rows).prefetch(READ_AHEAD).as_numpy_iterator()
    try:
        for frames in batches:
            yield source.pending.popleft(), frames
    except tf.errors.OpError as error:
        cause = source.error or _undecodable_frame(split, source.pending[0])
        raise cause or error from None


def in_flight(split: Split, like: BatchRequest, side: int) -> InFlight:
    """What is in memory while requests of these shapes are read, with squares of this side."""
    rows, views, frames = like.indices.shape
    crops = like.corners.shape[1]
    return InFlight.of(split, rows=rows, views=views, crops=crops, frames=frames, side=side)


def _filled(decoded: tf.data.Dataset, plan: InFlight) -> Iterator[np.ndarray]:
    """Batches that a thread fills with decoded pieces, one while the one before it is used."""
    pieces, closed = decoded.as_numpy_iterator(), threading.Event()

    def fill() -> np.ndarray | None:
        batch = np.empty(plan.shape, np.uint8)
        for row, start in itertools.product(batch, plan.starts):
            piece = None if closed.is_set() else next(pieces, None)
            if piece is None:
                return None
            row[:, start : start + plan.piece] = piece
        return batch

    with ThreadPoolExecutor(1, "batch") as thread:
        following = thread.submit(fill)
        try:
            while (batch := following.result()) is not None:
                following = thread.submit(fill)
                yield batch
        finally:
            closed.set()


class _EncodedSource:
    """Gives tf.data the encoded frames, and keeps what tf.data cannot pass on.

    Attributes:
      pending: the requests whose frames tf.data has, in order.
      error: what ended the reading; tf.data would report it in its own words.
    """

    def __init__(self, requests: Iterator[BatchRequest], split: Split, plan: InFlight):
        self.pending: collections.deque[BatchRequest] = collections.deque()
        self.error: Exception | None = None
        self._requests, self._split, self._plan = requests, split, plan

    def __call__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        try:
            yield from encoded_pieces(self._noted(), self._split, self._plan)
        except Exception as error:
            self.error = error
            raise

    def _noted(self) -> Iterator[BatchRequest]:
        for request in self._requests:
            self.pending.append(request)
            yield request


def encoded_pieces(
    requests: Iterator[BatchRequest], split: Split, plan: InFlight
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Reads the frames of requests as they are stored, together with what is decoded at a time.

    Yields:
      n pieces: their frames, (n, V, P) objects, each the bytes of a JPEG or PNG; and the corners of
      their squares, (n, C, 2) int32. They are the rows of a request, or where a batch is filled
      from pieces those of one row.
    """
    for part, images in read_encoded_frames(_parts(requests, plan.reads), split):
        if not plan.in_pieces:
            yield images, part.corners
            continue
        places = plan.starts[:, None] + np.arange(plan.piece)  # n P
        for row, corners in zip(images, part.corners):
            yield row[:, places].swapaxes(0, 1), np.repeat(corners[None], len(places), axis=0)


def _parts(requests: Iterator[BatchRequest], rows: int) -> Iterator[BatchRequest]:
    """The requests in parts of so many rows, as far as reading goes."""
    for request in requests:
        for first in range(0, len(request.record), rows):
            own = slice(first, first + rows)
            read = {name: getattr(request, name)[own] for name in ("record", "indices", "corners")}
            yield dataclasses.replace(request, **read)


def decode_clips(
    encoded: Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]], plan: InFlight
) -> tf.data.Dataset:
    """Decodes encoded frames, one piece after the other.

    Args:
      encoded: returns an iterator as `encoded_pieces` does.
      plan: of the same batches.

    Returns:
      A data set of (V * C, P, side, side, 3) uint8 RGB, an element per piece.
    """
    together = len(plan.starts) if plan.in_pieces else plan.rows
    signature = (
        tf.TensorSpec((together, plan.views, plan.piece), tf.string),
        tf.TensorSpec((together, plan.crops, 2), tf.int32),
    )
    return (
        tf.data.Dataset.from_generator(encoded, output_signature=signature)
        .prefetch(1 if plan.in_pieces else READ_AHEAD)
        .unbatch()
        .map(
            functools.partial(decode_squares, side=plan.side),
            num_parallel_calls=plan.calls if plan.in_pieces else tf.data.AUTOTUNE,
            deterministic=True,
        )
    )


def read_encoded_frames(
    requests: Iterator[BatchRequest], split: Split
) -> Iterator[tuple[BatchRequest, np.ndarray]]:
    """Reads the requested frames as they are stored.

    Yields:
      A request and its frames, (b, V, T) objects, each the bytes of a JPEG or PNG.
    """
    # A long record is read on by the next request, if that begins with it: clips that cover a
    # record follow each other.
    opened: dict[int, LongRecord] = {}

    def read(row: int, indices: np.ndarray) -> list[bytes]:
        wanted = indices.ravel().tolist()
        if found := read_placed(split, row, wanted):
            return found[0]
        record = opened.get(row) or _open_record(split, row)
        if isinstance(record, LongRecord):
            opened[row] = record
        return split.extract_frames(record, wanted)

    with ThreadPoolExecutor(READ_THREADS) as pool:
        for request in requests:
            rows = list(dict.fromkeys(request.record.tolist()))
            of_row = [request.record == row for row in rows]
            found = pool.map(read, rows, [request.indices[own] for own in of_row])
            images = np.empty(request.indices.shape, object)
            for own, frames in zip(of_row, found):
                images[own] = np.array(frames, object).reshape(-1, *images.shape[1:])
            for row in opened.keys() - rows[-1:]:
                del opened[row]
            yield request, images


def _open_record(split: Split, row: int) -> bytes | LongRecord:
    """A record of the split, checked; one that is long stays in its file."""
    place = split.files[split.shard[row]], int(split.offset[row]), int(split.size[row])
    return read_record(*place) if place[-1] <= LONG_RECORD_BYTES else open_record(*place)


@tf.autograph.experimental.do_not_convert
def decode_squares(images: tf.Tensor, corners: tf.Tensor, *, side: int) -> tf.Tensor:
    """Decodes the squares of a record's frames.

    Args:
      images: (V, T) string, JPEGs or PNGs.
      corners: (C, 2) int32, top and left of the squares.
      side: of the squares, in pixels.

    Returns:
      (V * C, T, side, side, 3) uint8 RGB; crops vary fastest.
    """
    (views, length), crops = images.shape, corners.shape[0]
    images = tf.reshape(images, [-1])
    decode_then_crop = functools.partial(_decode_then_crop, images, corners, side, length)
    if crops > 1:
        squares = decode_then_crop()
    else:
        are_jpegs = tf.reduce_all(tf.strings.substr(images, 0, 3) == b"\xff\xd8\xff")
        decode_crop = functools.partial(_decode_crop, images, corners[0], side)
        squares = tf.cond(are_jpegs, decode_crop, decode_then_crop)
    return tf.reshape(squares, [views * crops, length, side, side, 3])


def _decode_crop(jpegs: tf.Tensor, corner: tf.Tensor, side: int) -> tf.Tensor:
    """Decodes one square of each frame, and the columns from the block boundary to its left."""
    top, left = corner[0], corner[1]
    shift = left % JPEG_BLOCK
    window = tf.stack([top, left - shift, side, side + shift])
    origin = tf.stack([0, shift, 0])
    wider = [tf.io.decode_and_crop_jpeg(jpeg, window, channels=3) for jpeg in tf.unstack(jpegs)]
    return tf.stack([tf.slice(square, origin, [side, side, 3]) for square in wider])


def _decode_then_crop(images: tf.Tensor, corners: tf.Tensor, side: int, length: int) -> tf.Tensor:
    """Decodes whole frames, then cuts the squares out of each; a view has `length` frames."""
    frames = [tf.io.decode_jpeg(image, channels=3) for image in tf.unstack(images)]  # PNGs too
    origins = tf.unstack(tf.pad(corners, [[0, 0], [0, 1]]))
    return tf.stack(
        [
            tf.slice(frame, origin, [side, side, 3])
            for first in range(0, len(frames), length)
            for origin in origins
            for frame in frames[first : first + length]
        ]
    )


def _undecodable_frame(split: Split, request: BatchRequest) -> InputError | None:
    """Finds the frame that TensorFlow could not decode in a batch; None if all can be decoded."""
    for row, indices in zip(request.record, request.indices):
        expected = split.height[row], split.width[row]
        for frame in split.extract_frames(_open_record(split, row), indices.ravel().tolist()):
            try:
                size = tuple(tf.io.decode_jpeg(frame, channels=3).shape[:2])
                reason = f"is {size[1]}x{size[0]}, and not {expected[1]}x{expected[0]}"
            except tf.errors.OpError:
                size, reason = None, "cannot be decoded"
            if size != expected:
                file = split.files[split.shard[row]]
                return InputError(f"a frame of {split.ids[row]} in {file} {reason}; {advice(file)}")
    return None
