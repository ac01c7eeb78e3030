"""Decodes a video of any length once, from its beginning to its end, and yields clips of it.

At any time only the frames that a clip still needs are in memory. Beside them there are two numbers
and one flag for each frame of the video: its time, the tick that shows it, and whether it could be
decoded; 17 bytes, or 1.8 MB for an hour at 30 frames per second.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO, NamedTuple

import av
import numpy as np

from timesformer_jax.data.decode.container import VideoError, video_errors
from timesformer_jax.data.decode.limits import LIMITS
from timesformer_jax.data.decode.timeline import Timeline
from timesformer_jax.data.decode.video import TIME_TOLERANCE, VideoFile

# Seconds without a new frame that are worth a word. A video of slides has them, a damaged one too.
LONG_STILL = 1.0

# Seconds. Damaged parts that are closer to each other are told as one.
CLOSE_GAPS = 0.5

# While a video is open as a stream, a model works on its clips, however long that takes.
UNHURRIED = dataclasses.replace(LIMITS, minutes=math.inf)


class Gap(NamedTuple):
    """A part of a video without frames.

    Attributes:
      start, end: seconds from the beginning of the video.
      damaged: whether the file has frames there that cannot be decoded. If not, it has none: the
        last frame before stays on the screen.
    """

    start: float
    end: float
    damaged: bool

    def __str__(self) -> str:
        what = "damaged, left out" if self.damaged else "no new frames, the last one stays"
        return f"from {self.start:.2f} to {self.end:.2f} s: {what}"


class StreamedClip(NamedTuple):
    """One clip of a stream.

    Attributes:
      ticks: (T,) int64, as sampled.
      frames: (T, H, W, 3) uint8 RGB.
      damaged: how many of the T frames cannot be decoded; the last decoded frame before each of
        them is in its place (at the beginning of a video, the first one after it).
    """

    ticks: np.ndarray
    frames: np.ndarray
    damaged: int

    @property
    def is_usable(self) -> bool:
        """Whether at least half of the frames are those of the clip."""
        return 2 * self.damaged <= len(self.ticks)


class Shown(NamedTuple):
    """The frame that a tick shows, (H, W, 3) uint8, or if it is damaged another in its place."""

    tick: int
    rgb: np.ndarray
    damaged: bool


class ClipStream:
    """An open video whose clips are decoded in one pass: a context manager, iterated over once.

    Frames are found by the ticks of the video's `Timeline`, as in `decode_clip`. Damage in the
    middle of the file is passed over, and told by `gaps`.

    Args:
      path: as for `VideoFile`.
      sample: a function of the timeline, which returns the ticks of the clips one after the other:
        arrays of T ascending ticks, and neither the first nor the last tick of a clip is less than
        that of the clip before.
      start, end: seconds; None: the beginning, the end of the video.
      frame_range: [first, last) of the video's frames, from 0, instead of start and end.
      short_side: pixels that the shorter side is resized to; None: as stored.
      threads: of the decoder; 0: one per core.

    Attributes:
      timeline: of the part [start, end).

    Raises:
      VideoError: on entering, if the file cannot be read, is truncated, or has no frame in
        [start, end); while iterating, if no frame can be decoded.
    """

    def __init__(
        self,
        path: str | os.PathLike | BinaryIO,
        sample: Callable[[Timeline], Iterable[np.ndarray]],
        start: float | None = None,
        end: float | None = None,
        *,
        frame_range: tuple[int, int] | None = None,
        short_side: int | None = None,
        threads: int = 0,
    ):
        self._file = VideoFile(path, threads, UNHURRIED, skip_damage=True)
        self._sample, self._short_side = sample, short_side
        self._range, self._frame_range = (start, end), frame_range

    def __enter__(self):
        self._file.__enter__()
        try:
            self.timeline = self._file.timeline(*self._range, frame_range=self._frame_range)
        except BaseException:
            self._file.__exit__()
            raise
        self._is_decoded = np.zeros(len(self.timeline.times), bool)
        self._passed = 0  # frames of the timeline that the decoder is past
        return self

    def __exit__(self, *_):
        self._file.__exit__()

    def __iter__(self) -> Iterator[StreamedClip]:
        return assemble(self._sample(self.timeline), self.shown_at)

    @property
    def gaps(self) -> tuple[Gap, ...]:
        """The parts without frames, in order, up to the last frame decoded so far.

        They are damaged parts of more than one frame, and stretches of more than a second in which
        the file has no frame.
        """
        times = self.timeline.times
        frame = float(np.median(np.diff(times))) if len(times) > 1 else 1 / self.timeline.fps
        ends = np.append(times, times[-1] + frame)
        lost = np.flatnonzero(~self._is_decoded[: self._passed])
        found: list[Gap] = []
        for run in np.split(lost, np.flatnonzero(np.diff(lost) > 1) + 1):
            if not len(run):
                continue
            gap = Gap(float(times[run[0]]), float(ends[run[-1] + 1]), damaged=True)
            if found and gap.start - found[-1].end < CLOSE_GAPS:
                gap = Gap(found.pop().start, gap.end, damaged=True)
            found.append(gap)
        found = [gap for gap in found if gap.end - gap.start > 1.5 * frame]
        stills = np.flatnonzero(np.diff(times[: self._passed]) > max(LONG_STILL, 2 * frame))
        found += [Gap(float(times[i] + frame), float(times[i + 1]), False) for i in stills]
        return tuple(sorted(found))

    def shown_at(self, ticks: Iterator[int]) -> Iterator[Shown]:
        """The frames that ascending ticks show."""
        frames = self._decoded()
        with video_errors():
            current = upcoming = next(frames, None)
            if current is None:
                raise VideoError("no frame can be decoded")
            converted = None
            for tick in ticks:
                due = self.timeline.times[self.timeline.frame_indices[tick]]
                while upcoming is not None and upcoming[0] <= due + TIME_TOLERANCE:
                    current, upcoming = upcoming, next(frames, None)
                time, frame = current
                if converted is None or converted[0] != time:
                    converted = time, self._file.to_rgb(frame, self._short_side)
                yield Shown(tick, converted[1], abs(time - due) > TIME_TOLERANCE)

    def _decoded(self) -> Iterator[tuple[float, av.VideoFrame]]:
        """The undamaged frames and their times, which ascend; notes them in `_is_decoded`."""
        times, until = self.timeline.times, -np.inf
        for time, frame in self._file.decoded_from(times[0]):
            if frame.is_corrupt or time <= until:
                continue
            until = time
            place = np.searchsorted(times, time - TIME_TOLERANCE)
            self._passed = int(place)
            if place < len(times) and times[place] <= time + TIME_TOLERANCE:
                self._is_decoded[place] = True
                self._passed += 1
            yield time, frame
        self._passed = len(times)


def assemble(
    rows: Iterable[np.ndarray], shown_at: Callable[[Iterator[int]], Iterator[Shown]]
) -> Iterator[StreamedClip]:
    """Clips from frames that are decoded once, in order.

    Args:
      rows: the ticks of each clip, as `ClipStream` samples them.
      shown_at: the frames that ascending ticks show.
    """
    rows, ahead = itertools.tee(rows)
    shown = shown_at(_union(ahead))
    held: collections.deque[Shown] = collections.deque()
    for row in rows:
        while held and held[0].tick < row[0]:
            held.popleft()
        while not held or held[-1].tick < row[-1]:
            held.append(next(shown))
        kept = list(held)
        clip = [kept[i] for i in np.searchsorted([frame.tick for frame in kept], row)]
        frames = np.stack([frame.rgb for frame in clip])
        yield StreamedClip(row, frames, sum(frame.damaged for frame in clip))
    # The ticks are over: whoever gives the frames learns it.
    for _ in shown:
        pass


def _union(rows: Iterable[np.ndarray]) -> Iterator[int]:
    """The ticks of all rows, ascending, each once. It holds those of overlapping rows only."""
    pending = np.empty(0, np.int64)
    for row in rows:
        due = np.searchsorted(pending, row[0])
        yield from pending[:due].tolist()
        pending = np.union1d(pending[due:], row)
    yield from pending.tolist()
