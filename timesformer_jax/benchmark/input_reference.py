"""What the pipeline is compared with: a plain loop over simplejpeg and OpenCV, a process a core.

Each process reads a record at its offset, decodes the sampled frames, cuts their crop_boxes out at
whole pixels and resizes them into a batch, which it keeps: handing batches over costs nothing here.
TensorFlow, slow to import and fond of threads, is not there.
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
    """A clip to decode: where the serialized record is, in bytes; which of its frames, and their
    crop_box (top, left and side in pixels), mirrored or not."""

    file: str
    offset: int
    size: int
    indices: Sequence[int]
    crop_box: tuple[float, float, float]
    flip: bool


def batches(plans: Iterator[Sequence[Clip]], crop: int) -> Iterator[None]:
    """Decodes batches of clips, one after the other, and says when each is there.

    Args:
      plans: of the batches.
      crop: side of the clips in pixels.
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
    """(b, T, crop, crop, 3) uint8 RGB of b clips."""
    cv2.setNumThreads(1)  # there is a process a core
    batch = np.empty((len(plan), len(plan[0].indices), crop, crop, 3), np.uint8)
    for clip, frames in zip(plan, batch):
        with open(clip.file, "rb", buffering=0) as file:
            file.seek(clip.offset)
            record = file.read(clip.size)
        places = wire.bytes_list(record, "video")
        top, left, side = map(round, clip.crop_box)
        for index, out in zip(clip.indices, frames):
            # The fast transform, which is TensorFlow's default.
            frame = simplejpeg.decode_jpeg(record[places[index]], fastdct=True)
            cv2.resize(frame[top : top + side, left : left + side], (crop, crop), dst=out)
            if clip.flip:
                cv2.flip(out, 1, dst=out)
    return batch
