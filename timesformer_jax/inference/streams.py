"""The clips of a video one after the other, from a file or from frames in memory."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import numpy as np
from absl import logging

from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.data import decode
from timesformer_jax.data.decode import Stream, StreamedClip, Timeline
from timesformer_jax.data.input import sampling
from timesformer_jax.errors import InputError
from timesformer_jax.inference.clip_model import ClipInputs
from timesformer_jax.inference.clips import FPS_OF_FILE, Video, checked_frames, is_file, part

T = TypeVar("T")

Sample = Callable[[Timeline], Iterable[np.ndarray]]


def open_stream(
    video: Video,
    sample: Sample,
    short_side: int,
    start: float | None = None,
    end: float | None = None,
    *,
    fps: float | None = None,
    frame_range: tuple[int, int] | None = None,
    threads: int = 0,
) -> AbstractContextManager[Stream]:
    """Opens a video as a stream of clips.

    Args:
      video: a path, an open binary file, or frames: (T, H, W, 3) uint8 RGB.
      sample: the ticks of the clips, as for `decode.ClipStream`.
      short_side: pixels that the shorter side is resized to.
      start, end: seconds; the clips lie in this part. None: the beginning, the end.
      fps: of frames in memory.
      frame_range, threads: of a file, as for `decode.ClipStream`.

    Raises:
      decode.VideoError: on entering or iterating, if the video cannot be decoded.
      InputError: if frames in memory have another shape or dtype, or no rate.
    """
    if isinstance(video, decode.DecodedVideo):
        video, fps = video
    if not is_file(video):
        return nullcontext(_InMemory(video, fps, sample, short_side, start, end))
    if fps is not None:
        raise InputError(FPS_OF_FILE)
    return decode.open_stream(
        video, sample, start, end, frame_range=frame_range, short_side=short_side, threads=threads
    )


class _InMemory:
    """Frames in memory as a stream of clips."""

    gaps = ()

    def __init__(
        self,
        frames: Any,
        fps: float | None,
        sample: Sample,
        short_side: int,
        start: float | None,
        end: float | None,
    ):
        self._frames, self.timeline = part(checked_frames(frames), fps, start, end)
        self._sample, self._short_side = sample, short_side

    def __iter__(self) -> Iterator[StreamedClip]:
        for ticks in self._sample(self.timeline):
            yield StreamedClip(ticks, decode.resize(self._frames[ticks], self._short_side), 0)


def covering(spec: ClipSpec) -> Sample:
    """Samples the clips of `sampling.covering_indices`, of any video."""
    return lambda timeline: sampling.covering_indices(len(timeline), timeline.fps, spec)


def clip_inputs(clips: Iterable[StreamedClip], crops: int) -> ClipInputs:
    """The usable ones of some clips, with the crop boxes that `ClipModel` takes them with."""
    usable = [clip.frames for clip in clips if clip.is_usable]
    return [
        (frames, sampling.test_crop_boxes(frames.shape[1], frames.shape[2], crops))
        for frames in usable
    ]


@dataclasses.dataclass(frozen=True)
class Covering:
    """Clips along a whole video, as `covering` says, which are decoded when they are asked for.

    Attributes:
      video, start, end, fps, frame_range: as for `open_stream`.
      clip: what the model expects.
      crops: of each clip.
      threads: of the decoder; 0: one per core.
    """

    video: Video
    clip: ClipSpec
    crops: int
    start: float | None = None
    end: float | None = None
    fps: float | None = None
    frame_range: tuple[int, int] | None = None
    threads: int = 0

    def batches(self, size: int) -> Iterator[ClipInputs]:
        """The clips, at most `size` at a time, without those whose frames are damaged.

        What is missing is logged.

        Raises:
          decode.VideoError: if the video cannot be read, or no clip of it.
          InputError: as `open_stream`.
        """
        opened = open_stream(
            self.video, covering(self.clip), self.clip.short_side, self.start, self.end,
            fps=self.fps, frame_range=self.frame_range, threads=self.threads,
        )  # fmt: skip
        with opened as stream:
            found = False
            for clips in one_ahead(in_batches(iter(stream), size)):
                if inputs := clip_inputs(clips, self.crops):
                    found = True
                    yield inputs
            if not found:
                raise decode.VideoError("no clip can be decoded")
            for gap in stream.gaps:
                logging.warning("%s: %s", self.video if is_file(self.video) else "frames", gap)


def in_batches(items: Iterator[T], size: int) -> Iterator[list[T]]:
    """The items in lists of `size`; the last one may be shorter."""
    while batch := list(itertools.islice(items, size)):
        yield batch


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The items; a thread makes the next one while one is used."""
    with ThreadPoolExecutor(1, "decode") as thread:
        following = thread.submit(next, items, None)
        while (item := following.result()) is not None:
            following = thread.submit(next, items, None)
            yield item
