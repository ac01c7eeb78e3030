"""`VideoFile`: the packets, the timeline and the frames of one video.

Times are in seconds from the beginning of the video. A clip is the frames shown in [start, end), or
a range of frame numbers. Frames are sampled and stored by the ticks of the clip's `Timeline`.
"""

import collections
import itertools
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import BinaryIO

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from timesformer_jax.data.decode.container import (
    VideoError,
    check_pixels,
    find_video_stream,
    open_container,
    read_info,
    read_stream_duration,
    video_errors,
    video_source,
)
from timesformer_jax.data.decode.limits import LIMITS, Limits
from timesformer_jax.data.decode.scaling import SCALING, resized
from timesformer_jax.data.decode.timeline import Timeline
from timesformer_jax.workers import still_working

# Seconds: longer than any container's rounding of times, shorter than any frame.
TIME_TOLERANCE = 5e-7

# The largest time stamp that FFmpeg takes, with room for what it adds.
MAX_STAMP = 1 << 62

# A clip is complete if this share of it can be decoded. With less, its label may not fit.
COMPLETE = 0.9

CUT_PACKET = "truncated: a packet is cut short"


class VideoFile:
    """An open video: a context manager.

    Args:
      path: a file, which may be on gs://; a folder whose images, sorted by name, are the frames; or
        a binary file that is open, which is read from its beginning and not closed.
      threads: of the decoder; 0: one per core. The frames do not depend on it.
      limits: of what the file may cost.
      skip_damage: leave out what cannot be decoded in the middle of the video, instead of raising
        VideoError there. A video that ends too early is an error all the same.

    Attributes:
      info: VideoInfo.

    Raises:
      VideoError: on entering, if the file is missing, is not a video or has no frame rate; at any
        time, if it is beyond a limit.
    """

    def __init__(
        self,
        path: str | os.PathLike | BinaryIO,
        threads: int = 1,
        limits: Limits = LIMITS,
        skip_damage: bool = False,
    ):
        self._path = video_source(path)
        self._threads = threads
        self._limits = limits
        self._skip_damage = skip_damage
        self._deadline = time.monotonic() + 60 * limits.minutes
        # One scaler for all frames: to set it up takes longer than to scale a small frame.
        self._scaler = VideoReformatter()

    def __enter__(self):
        self._open()
        try:
            self._start_stamp = self._first_stamp()
        except BaseException:
            self._opened.close()
            raise
        return self

    def __exit__(self, *_):
        self._opened.close()

    def timeline(
        self,
        start: float | None = None,
        end: float | None = None,
        *,
        frame_range: tuple[int, int] | None = None,
        fps: float | None = None,
    ) -> Timeline:
        """Reads when the frames of a clip are shown, without decoding.

        Args:
          start, end: seconds; None: no bound.
          frame_range: [first, last) of the video's frames, from 0, instead of start and end.
          fps: ticks per second; None: the frame rate of the clip.

        Raises:
          VideoError: the file cannot be read, is truncated, or has no such frame.
        """
        with video_errors():
            times = np.sort(np.fromiter(self._packet_times(start, end), np.float64))
        if frame_range is not None:
            first, last = frame_range
            times = times[first:last]
            _check_complete(len(times), last - first, "frames")
        else:
            begin, until = start or 0, math.inf if end is None else end
            times = times[(times >= begin) & (times < until)]
            if len(times) and self._duration is not None:
                found = times[-1] + 1 / self.info.fps - begin
                _check_complete(found, min(self._duration, until) - begin, "s")
        if not len(times):
            raise VideoError(no_frame(start, end))
        if (hours := (times[-1] - times[0]) / 3600) > self._limits.hours:
            raise VideoError(f"lasts {hours:.3g} hours; at most {self._limits.hours:g} are read")
        return Timeline.from_times(times, self.info.fps, fps, self._limits.frames)

    def frames_at(self, timeline: Timeline, ticks: Sequence[int]) -> Iterator[av.VideoFrame]:
        """Decodes the frames shown at some ticks, from the keyframe before the first of them.

        The decoder may give fewer frames than there are packets, for example if the last packet is
        cut. Then the last decoded frame is repeated, for up to a tenth of the clip.

        Args:
          timeline: of the clip.
          ticks: ascending.

        Yields:
          A frame for each tick; `to_rgb` makes an array of it.

        Raises:
          VideoError: while iterating, if the file cannot be decoded or more frames are missing.
        """
        due = collections.deque(timeline.times[timeline.frame_indices[ticks]])
        last = None
        with video_errors():
            for time, frame in self.decoded_from(due[0]):
                if time < due[0] - TIME_TOLERANCE:
                    continue
                if frame.is_corrupt:
                    raise VideoError(f"corrupt frame at {time:.2f} s")
                last, until = frame, time
                while due and due[0] <= time + TIME_TOLERANCE:
                    due.popleft()
                    yield frame
                if not due:
                    return
        decoded = 0 if last is None else (timeline.times <= until + TIME_TOLERANCE).sum()
        _check_complete(decoded, len(timeline.times), "frames")
        if last is not None:
            yield from [last] * len(due)

    def to_rgb(self, frame: av.VideoFrame, short_side: int | None = None) -> np.ndarray:
        """Converts a decoded frame to an upright (H, W, 3) uint8 RGB array of square pixels.

        All frames of a file get one size, even if the stream changes its size midway.

        Args:
          frame: from `frames_at`.
          short_side: pixels that the shorter side is resized to; None: as stored.
        """
        width, height = self._stream.width, self._stream.height
        width = max(round(width * (self._stream.sample_aspect_ratio or 1)), 1)
        if short_side is not None:
            width, height = resized(width, height, short_side)
        check_pixels(width, height, self._limits)
        still_working()
        with video_errors():
            array = self._scaler.reformat(
                frame, width, height, "rgb24", interpolation=SCALING, threads=1
            ).to_ndarray()
        # FFmpeg and NumPy both count degrees counter-clockwise.
        return np.ascontiguousarray(np.rot90(array, round(frame.rotation / 90)))

    def packets(self, start: float | None = None, end: float | None = None) -> Iterator[av.Packet]:
        """Reads the packets that hold the frames shown in [start, end), in the file's order.

        The first packet is that of the last keyframe shown at or before `start`. Packets of frames
        shown before `start`, or after `end`, may be among them.
        """
        for packet in self._demux_from(start or 0.0):
            # A frame is decoded before it is shown: no later packet is shown before `end`.
            if end is not None and packet.dts is not None and self._seconds(packet.dts) >= end:
                return
            if packet.is_corrupt and not self._skip_damage:
                raise VideoError(CUT_PACKET)
            if packet.size and not packet.is_discard:
                yield packet

    def _packet_times(self, start: float | None, end: float | None) -> Iterator[float]:
        """The times of the packets from `packets`; the last of them must not be cut."""
        cut = False
        for packet in self.packets(start, end):
            cut = packet.is_corrupt
            yield self._time_of(packet)
        if cut:
            raise VideoError(CUT_PACKET)

    def decoded_from(self, start: float) -> Iterator[tuple[float, av.VideoFrame]]:
        """The frames from the last keyframe shown at or before `start`, with their times.

        In the order in which they are shown. `is_corrupt` tells of a frame whether the decoder
        made up some of it.

        Raises:
          VideoError, av.error.FFmpegError: while iterating, where `skip_damage` does not apply.
        """
        packets = self.packets(start)
        first = next(packets, None)
        if first is None:
            return
        begin = self._time_of(first)
        count = 0
        for packet in itertools.chain([first], packets, [None]):
            frames = self._decode(packet)
            if frames is None:
                count += 1  # its place in time, if places are all that tells the time
                continue
            for frame in frames:
                untimed = begin + count / self.info.fps
                count += 1
                yield untimed if self._is_untimed else self._seconds(frame.pts), frame

    def _decode(self, packet: av.Packet | None) -> list[av.VideoFrame] | None:
        """The frames that the decoder gives for a packet; None if it is damaged and skipped."""
        if packet is not None and packet.is_corrupt:
            return None
        try:
            return self._stream.codec_context.decode(packet)
        except (av.error.InvalidDataError, av.error.PatchWelcomeError):
            if not self._skip_damage:
                raise
            return None

    def _demux_from(self, start: float) -> Iterator[av.Packet]:
        # Containers seek by decoding time, which is earlier than the time shown, and some do not
        # seek to a keyframe. So the next keyframe can be after `start`: then seek further back.
        target, step = start, 1.0
        while target > 0:
            self._seek(target)
            packets = self._demux()
            first = next((packet for packet in packets if packet.is_keyframe), None)
            if first is not None and self._time_of(first) <= start:
                yield first
                yield from packets
                return
            target, step = target - step, 2 * step
        self._rewind()
        yield from self._demux()

    def _demux(self) -> Iterator[av.Packet]:
        for count, packet in enumerate(self._container.demux(self._stream)):
            if count > self._limits.frames:
                raise VideoError(
                    f"more than {self._limits.frames:,} frames, the most that are read"
                )
            if time.monotonic() > self._deadline:
                raise VideoError(f"not decoded in {self._limits.minutes:g} minutes")
            still_working()
            yield packet

    def _seek(self, seconds: float) -> None:
        assert self._stream.time_base is not None  # of a stream that was opened
        stamp = round(seconds / self._stream.time_base) + self._start_stamp
        # A time stamp beyond the range of the file means its end.
        self._container.seek(min(stamp, MAX_STAMP), stream=self._stream, backward=True)
        self._at_start = False

    def _rewind(self) -> None:
        # Opens the file again, because not every container can seek to its beginning.
        if not self._at_start:
            self._opened.close()
            self._open()
        self._at_start = False

    def _open(self) -> None:
        with video_errors(), ExitStack() as opened:
            self._container = open_container(self._path, opened, self._limits)
            self._stream = find_video_stream(self._container)
            self._stream.codec_context.thread_count = self._threads
            self._stream.codec_context.options = {"max_pixels": str(self._limits.pixels)}
            self.info = read_info(self._container, self._stream, self._limits)
            self._duration = read_stream_duration(self._container, self._stream)
            self._opened = opened.pop_all()
        self._at_start = True

    def _first_stamp(self) -> int:
        """The time stamp of the beginning of the video."""
        if self.info.container == "avi" and not self._is_untimed:
            # An AVI's header says 0. But if frames refer to later ones, the first is shown later.
            with video_errors():
                first = next(self._demux())
            self._at_start = False
            return first.pts or first.dts or 0
        return self._stream.start_time or 0

    @property
    def _is_untimed(self) -> bool:
        """Whether the times of frames follow from their order only.

        AVI stores no times. FFmpeg guesses them, wrongly for H.264 whose frames refer to later
        ones. But frames are decoded in order, and the frame rate is constant.
        """
        return self.info.container == "avi" and self.info.codec in ("h264", "hevc")

    def _time_of(self, packet: av.Packet) -> float:
        has_time = packet.pts is not None and not self._is_untimed
        return self._seconds(packet.pts if has_time else packet.dts)

    def _seconds(self, stamp: int | None) -> float:
        if stamp is None:
            raise VideoError("frames without a time")
        return float((stamp - self._start_stamp) * self._stream.time_base)


def _check_complete(found: float, expected: float, unit: str) -> None:
    if found < COMPLETE * expected:
        raise VideoError(f"truncated: {found:.4g} {unit} of {expected:.4g}")


def no_frame(start: float | None, end: float | None) -> str:
    """Says that the part [start, end) of a video, in seconds, has no frame."""
    if start is None and end is None:
        return "no frame"
    until = "the end" if end is None else f"{end:g} s"
    return f"no frame from {start or 0:g} s to {until}"
