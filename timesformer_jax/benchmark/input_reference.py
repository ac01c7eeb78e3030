"""The reference for the input pipeline: a loop over simplejpeg and OpenCV, one process per core.

Each process reads a record at its offset and decodes the sampled frames. It crops them at whole
pixels and resizes them into a batch. The batch is not sent to the parent process, so the reference
has no transfer cost. The processes do not import TensorFlow, which is slow and starts many threads.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg

from timesformer_jax.data.records import wire
from timesformer_jax.workers import SPAWN, available_cores


class Clip(NamedTuple):
    """A clip to decode: the byte range of the serialized record, the indices of the frames, the
    crop box (top, left and side in pixels), and whether the frames are mirrored."""

    file: str
    offset: int
    size: int
    indices: Sequence[int]
    crop_box: tuple[float, float, float]
    flip: bool


def batches(plans: Iterator[Sequence[Clip]], crop: int) -> Iterator[None]:
    """Decodes batches of clips and yields None as each batch is done, in order.

    Args:
      plans: the clips of each batch.
      crop: the side of the clips in pixels.
    """
    waiting: collections.deque = collections.deque()
    with ProcessPoolExecutor(available_cores(), mp_context=SPAWN) as pool:
        for plan in plans:
            waiting.append(pool.submit(_discard, plan, crop))
            if len(waiting) > 2 * available_cores():
                yield waiting.popleft().result()


def _discard(plan: Sequence[Clip], crop: int) -> None:
    decode(plan, crop)


def decode(plan: Sequence[Clip], crop: int) -> np.ndarray:
    """Decodes b clips into (b, T, crop, crop, 3) uint8 RGB."""
    cv2.setNumThreads(1)  # there is one process per core
    batch = np.empty((len(plan), len(plan[0].indices), crop, crop, 3), np.uint8)
    for clip, frames in zip(plan, batch):
        with open(clip.file, "rb", buffering=0) as file:
            file.seek(clip.offset)
            record = file.read(clip.size)
        places = wire.bytes_list(record, "video")
        top, left, side = map(round, clip.crop_box)
        for index, out in zip(clip.indices, frames):
            # The fast DCT is TensorFlow's default.
            frame = simplejpeg.decode_jpeg(record[places[index]], fastdct=True)
            cv2.resize(frame[top : top + side, left : left + side], (crop, crop), dst=out)
            if clip.flip:
                cv2.flip(out, 1, dst=out)
    return batch
