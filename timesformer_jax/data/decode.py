"""Video files to RGB frames. PyAV, and so every codec, is met in this file only.

Time is in seconds from the first moment of the video. A clip is the frames shown in [start, end),
or the frames of a range of numbers; what is sampled from, and stored, are the frames shown at each
tick of its timeline. Where frames come at a constant rate, that is each frame once; where they do
not, the timeline has as many ticks, evenly spaced, so that equal numbers of frames are equal times.
"""

import collections
import glob
import io
import itertools
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import Interpolation, VideoReformatter
from etils import epath

from timesformer_jax.storage import RemoteFile, is_remote

# Bicubic is what `ffmpeg -vf scale` does, so frames equal those of copies that people have scaled
# with ffmpeg; swscale widens its support when it shrinks, so it does not alias. The flags choose
# exact arithmetic: the same bytes on every processor.
SCALING = int(
    Interpolation.BICUBIC
    | Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
    | Interpolation.BITEXACT
)

# Seconds; beyond the rounding of any container's clock, and below any frame.
CLOCK = 5e-7

# Of a folder of images, which says none: what the public extractions of Something-Something are at.
IMAGES_FPS = 30
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png")


class VideoError(Exception):
    """A video that cannot be decoded; the message is the reason, one line, without the path."""


@dataclass(frozen=True)
class VideoInfo:
    """What a file says of itself.

    fps: mean frame rate. width, height: pixels, as stored (before a rotation that the file asks
    for). duration: seconds, None if unsaid. codec, container: FFmpeg's names.
    """

    fps: float
    width: int
    height: int
    duration: float | None
    codec: str
    container: str


@dataclass(frozen=True)
class Timeline:
    """When the frames of a clip are shown.

    times: (frames,) float64 seconds, ascending; the frames as they are in the file.
    ticks: (n,) int64, ascending: which of those frames is shown at each tick. All of them in order
      if they come at a constant rate; else some twice, and some not at all.
    fps: ticks a second.
    """

    times: np.ndarray
    ticks: np.ndarray
    fps: float

    def __len__(self) -> int:
        return len(self.ticks)

    @classmethod
    def of(cls, times: np.ndarray, announced: float, fps: float | None = None) -> "Timeline":
        """The timeline of frames shown at `times`, (frames,) ascending seconds.

        Args:
          announced: the frame rate that the file gives, which is the exact one of its timeline if
            the times agree to a hundredth.
          fps: ticks a second; None: as the frames come.
        """
        count = len(times)
        mean = (count - 1) / (times[-1] - times[0]) if times[-1] > times[0] else announced
        native = announced if abs(mean / announced - 1) < 0.01 else mean
        constant = times[0] + np.arange(count) / mean
        if fps is None and np.abs(times - constant).max() * mean < 0.5:
            return cls(times, np.arange(count), native)
        rate = fps or native
        instants = times[0] + np.arange(max(round(count / mean * rate), 1)) / rate
        # A container rounds its times: the frame that starts just after a tick is the one meant.
        shown = np.searchsorted(times, instants + 0.5 / max(rate, mean), side="right") - 1
        return cls(times, shown, rate)


@dataclass(frozen=True)
class Video:
    """Frames of a clip. frames: (T, H, W, 3) uint8 RGB. fps, num_frames: of its timeline."""

    frames: np.ndarray
    fps: float
    num_frames: int


def probe(path: str | os.PathLike) -> VideoInfo:
    """Reads what the file says of itself, decoding nothing but what its header needs.

    Raises:
      VideoError: the file is missing, is not a video or has no frame rate.
    """
    with VideoFile(path) as video:
        return video.info


def decode(
    path: str | os.PathLike,
    start: float | None = None,
    end: float | None = None,
    *,
    short_side: int | None = None,
    pick: Callable[[int, float], np.ndarray] | None = None,
) -> Video:
    """Decodes frames of a clip into memory.

    Args:
      path: the video file, or a folder of images.
      start, end: seconds; None: from the beginning, to the end.
      short_side: pixels that the shorter side is resized to; None: as stored.
      pick: from the number of ticks of the clip's timeline and the ticks a second to the ticks
        wanted, in [0, num_frames), in any order, repeats allowed. None: all of them. Every n-th:
        `lambda num_frames, fps: np.arange(0, num_frames, n)`.

    The frames are counted by reading the file without decoding; then only the part that holds the
    wanted ones is decoded, and only those are kept.

    Raises:
      VideoError: the file cannot be decoded, holds no frame in [start, end), or ends early.
      ValueError: pick gives an index outside the clip, or none.
    """
    with VideoFile(path, threads=0) as video:
        timeline = video.timeline(start, end)
        count = len(timeline)
        wanted = np.arange(count) if pick is None else np.asarray(pick(count, timeline.fps), int)
        if wanted.size == 0 or wanted.min() < 0 or wanted.max() >= count:
            raise ValueError(f"pick gave indices outside [0, {count}), or none: {wanted}")
        needed, order = np.unique(wanted, return_inverse=True)
        kept = [video.rgb(frame, short_side) for frame in video.shown(timeline, needed)]
        return Video(np.stack(kept)[order], timeline.fps, count)


class VideoFile:
    """An open video: a context manager.

    Args:
      path: the file, which may be on gs://; or a folder whose images, in the order of their names,
        are the frames.
      threads: of the decoder; 0: as many as the machine has. They do not change the frames.

    Attributes:
      info: VideoInfo.

    Raises:
      VideoError: on entering, the file is missing, is not a video or has no frame rate.
    """

    def __init__(self, path: str | os.PathLike, threads: int = 1):
        self._path = os.fspath(path)
        self._threads = threads
        # One for all frames: setting swscale up takes longer than scaling a small frame.
        self._scaler = VideoReformatter()

    def __enter__(self):
        self._open()
        try:
            self._origin = self._first_moment()
        except BaseException:
            self._container.close()
            raise
        return self

    def __exit__(self, *_):
        self._container.close()

    def timeline(
        self,
        start: float | None = None,
        end: float | None = None,
        *,
        numbers: tuple[int, int] | None = None,
        fps: float | None = None,
    ) -> Timeline:
        """When the frames of a clip are shown, by reading the file without decoding it.

        Args:
          start, end: seconds; None: no bound.
          numbers: [first, last) of the video's frames, counted from 0, in place of start and end.
          fps: ticks a second; None: as the frames come.

        Raises:
          VideoError: the file cannot be read, ends early, or holds no such frame.
        """
        with _reasons():
            times = [self._shown_at(packet) for packet in self._packets(start, end)]
        times = np.sort(np.array(times, np.float64))
        if numbers is not None:
            first, last = numbers
            inside = times[first:last]
            _require_most(len(inside), last - first, "frames")
        else:
            inside = times[_inside(times, start, end)]
            if len(inside) and self._announced is not None:
                begin, until = start or 0, min(self._announced, math.inf if end is None else end)
                _require_most(inside[-1] + 1 / self.info.fps - begin, until - begin, "s")
        if not len(inside):
            raise VideoError(_no_frame(start, end))
        return Timeline.of(inside, self.info.fps, fps)

    def shown(self, timeline: Timeline, wanted: Sequence[int]) -> Iterator[av.VideoFrame]:
        """Decodes the frames shown at some ticks, ascending, from the keyframe before the first.

        Where the decoder gives fewer frames than the file announced (a cut last packet, say), the
        last one decoded takes their place, up to a tenth of the clip. `rgb` makes an array of one.

        Raises:
          VideoError: while iterating, the file cannot be decoded or lacks more.
        """
        due = collections.deque(timeline.times[timeline.ticks[wanted]])
        last = None
        with _reasons():
            for time, frame in self._decoded(due[0]):
                if time < due[0] - CLOCK:
                    continue
                if frame.is_corrupt:
                    raise VideoError(f"corrupt frame at {time:.2f} s")
                last, until = frame, time
                while due and due[0] <= time + CLOCK:
                    due.popleft()
                    yield frame
                if not due:
                    return
        decoded = 0 if last is None else (timeline.times <= until + CLOCK).sum()
        _require_most(decoded, len(timeline.times), "frames")
        yield from [last] * len(due)

    def rgb(self, frame: av.VideoFrame, short_side: int | None = None) -> np.ndarray:
        """A decoded frame as an upright (H, W, 3) uint8 array of square pixels.

        Its shorter side is `short_side`, by default as it is. All frames of a file get one size,
        also where the stream changes its own midway.
        """
        width, height = self._stream.width, self._stream.height
        width = max(round(width * (self._stream.sample_aspect_ratio or 1)), 1)
        if short_side is not None:
            scale = short_side / min(width, height)
            width, height = (max(short_side, round(scale * side)) for side in (width, height))
        with _reasons():
            array = self._scaler.reformat(
                frame, width, height, "rgb24", interpolation=SCALING, threads=1
            ).to_ndarray()
        # FFmpeg and NumPy both count degrees counter-clockwise.
        return np.ascontiguousarray(np.rot90(array, round(frame.rotation / 90)))

    def _decoded(self, start: float) -> Iterator[tuple[float, av.VideoFrame]]:
        """Frames from the last keyframe at or before `start`, in order, and when they are shown."""
        packets = self._packets(start)
        first = next(packets, None)
        if first is None:
            return
        begin = self._shown_at(first)
        decoder = self._stream.codec_context
        whole = itertools.chain([first], packets, [None])  # None: give what you hold back
        frames = itertools.chain.from_iterable(map(decoder.decode, whole))
        for count, frame in enumerate(frames):
            time = begin + count / self.info.fps if self._untimed else self._seconds(frame.pts)
            yield time, frame

    def _packets(self, start: float | None, end: float | None = None) -> Iterator[av.Packet]:
        """The packets from the last keyframe shown at or before `start`, in the file's order.

        They go on until all that are shown before `end` were among them.
        """
        for packet in self._demux_from(start or 0.0):
            # No frame is shown before it is decoded.
            if end is not None and packet.dts is not None and self._seconds(packet.dts) >= end:
                return
            if packet.is_corrupt:
                raise VideoError("truncated: a packet is cut short")
            if packet.size and not packet.is_discard:
                yield packet

    def _demux_from(self, start: float) -> Iterator[av.Packet]:
        # Containers seek by decoding time, which runs ahead of the time shown, and some not to a
        # keyframe at all: the first keyframe met can lie after the start. Then begin further back.
        reach, step = start, 1.0
        while reach > 0:
            self._seek(reach)
            packets = self._container.demux(self._stream)
            first = next((packet for packet in packets if packet.is_keyframe), None)
            if first is not None and self._shown_at(first) <= start:
                yield first
                yield from packets
                return
            reach, step = reach - step, 2 * step
        self._rewind()
        yield from self._container.demux(self._stream)

    def _seek(self, seconds: float) -> None:
        stamp = round(seconds / self._stream.time_base) + self._origin
        self._container.seek(stamp, stream=self._stream, backward=True)
        self._read = True

    def _rewind(self) -> None:
        # By opening anew: not every container can seek to its own beginning.
        if self._read:
            self._container.close()
            self._open()
        self._read = True

    def _open(self) -> None:
        with _reasons():
            self._container = _open_container(self._path)
            try:
                self._stream = _video_stream(self._container)
                self._stream.codec_context.thread_count = self._threads
                self.info = _info(self._container, self._stream)
                self._announced = _announced_duration(self._container, self._stream)
            except BaseException:
                self._container.close()
                raise
        self._read = False

    def _first_moment(self) -> int:
        """The time stamp from which the video's seconds are counted."""
        if self.info.container == "avi" and not self._untimed:
            # It starts at 0 by its own word, but the first frame is shown later if others are
            # decoded before they are shown.
            with _reasons():
                first = next(self._container.demux(self._stream))
            self._read = True
            return first.pts or first.dts or 0
        return self._stream.start_time or 0

    @property
    def _untimed(self) -> bool:
        """Whether only the order of the frames tells when they are shown.

        AVI tells no frame's time, and FFmpeg guesses H.264's wrong where frames refer to later
        ones; but they are decoded in order, and come at a constant rate.
        """
        return self.info.container == "avi" and self.info.codec in ("h264", "hevc")

    def _shown_at(self, packet: av.Packet) -> float:
        timed = packet.pts is not None and not self._untimed
        return self._seconds(packet.pts if timed else packet.dts)

    def _seconds(self, stamp: int | None) -> float:
        if stamp is None:
            raise VideoError("frames without a time")
        return float((stamp - self._origin) * self._stream.time_base)


def _open_container(path: str) -> av.container.InputContainer:
    # A title in a strange encoding is no reason to refuse the video.
    lenient = {"metadata_errors": "replace"}
    if is_remote(path):
        if not (file := epath.Path(path)).exists():
            raise VideoError("missing file")
        if file.stat().length == 0:
            raise VideoError("empty file")
        # What is read is small and scattered: every request takes as long as a megabyte.
        return av.open(io.BufferedReader(RemoteFile(path), 1 << 20), **lenient)
    if os.path.isdir(path):
        options = {"pattern_type": "glob", "framerate": str(IMAGES_FPS)}
        return av.open(_images(path), format="image2", container_options=options, **lenient)
    if not os.path.isfile(path):
        raise VideoError("missing file")
    if os.path.getsize(path) == 0:
        raise VideoError("empty file")
    return av.open(path, **lenient)


def _images(folder: str) -> str:
    """The pattern of a folder's images, whose names must sort as their numbers do."""
    names = [name for name in os.listdir(folder) if name.lower().endswith(IMAGE_EXTENSIONS)]
    if not names:
        raise VideoError("no video file, and no folder of images")
    stems, endings = zip(*map(os.path.splitext, names))
    if len(set(endings)) > 1 or len({len(stem) for stem in stems}) > 1:
        raise VideoError("images of names that differ in length or ending: pad their numbers")
    return os.path.join(glob.escape(folder), f"*{endings[0]}")


def _video_stream(container) -> av.VideoStream:
    for stream in container.streams.video:
        # A cover picture of a song is a video stream of one frame.
        if not stream.disposition & Disposition.attached_pic:
            if stream.codec_context is None:
                raise VideoError("a codec that FFmpeg does not know")
            return stream
    raise VideoError("no video stream")


def _info(container, stream) -> VideoInfo:
    fps = stream.average_rate or stream.guessed_rate
    if not fps:
        raise VideoError("no frame rate")
    if not stream.width or not stream.height:
        raise VideoError("no frame size")
    duration = None if container.duration is None else container.duration / av.time_base
    codec, name = stream.codec_context.name, container.format.name
    return VideoInfo(float(fps), stream.width, stream.height, duration, codec, name)


def _announced_duration(container, stream) -> float | None:
    """Seconds that the header says the frames take, where a file cut short still has a header.

    MP4 is not among them: its packets are listed, and a list that leads beyond the end is an error.
    Nor are MPEG-TS and WMV, which announce nothing once they are cut: their rest is a whole video.
    """
    if container.format.name == "avi":
        return None if not stream.duration else float(stream.duration * stream.time_base)
    if container.format.name != "matroska,webm":
        return None
    tag = re.fullmatch(r"(\d+):(\d\d):(\d\d\.?\d*)", stream.metadata.get("DURATION", ""))
    if tag is not None:
        return sum(60**i * float(part) for i, part in enumerate(reversed(tag.groups())))
    # The container's duration is that of the longest stream, which may be the sound.
    alone = len(container.streams) == 1 and container.duration is not None
    return container.duration / av.time_base if alone else None


def _inside(times: np.ndarray, start: float | None, end: float | None) -> np.ndarray:
    return (times >= (start or 0)) & (times < (math.inf if end is None else end))


def _require_most(found: float, announced: float, unit: str) -> None:
    """Nine tenths of a clip stand for it; less is another clip than the one that is labelled."""
    if found < 0.9 * announced:
        raise VideoError(f"truncated: {found:.4g} {unit} of {announced:.4g}")


def _no_frame(start: float | None, end: float | None) -> str:
    if start is None and end is None:
        return "no frame"
    until = "the end" if end is None else f"{end:g} s"
    return f"no frame from {start or 0:g} s to {until}"


@contextmanager
def _reasons() -> Iterator[None]:
    """Turns what PyAV raises into a VideoError that gives the reason in a line."""
    try:
        yield
    except (av.error.FFmpegError, OSError) as error:
        raise VideoError((error.strerror or str(error)).splitlines()[0]) from error
