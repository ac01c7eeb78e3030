"""Video files to RGB frames. PyAV, and so every codec, is met in this file only.

Time is in seconds from the first moment of the video. A clip is the frames shown in [start, end);
its frames are counted from 0, as they are stored: nothing is repeated or dropped to even out a
variable frame rate.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import Interpolation, VideoReformatter

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


class VideoError(Exception):
    """A video that cannot be decoded; the message is the reason, one line, without the path."""


@dataclass(frozen=True)
class VideoInfo:
    """fps: mean frame rate. width, height: pixels, as stored (before a
    rotation that the file asks for). duration: seconds, None if unsaid."""

    fps: float
    width: int
    height: int
    duration: float | None


@dataclass(frozen=True)
class Video:
    """Frames of a clip. frames: (T, H, W, 3) uint8 RGB. fps: of the source.

    num_frames: how many frames the clip has in the source.
    """

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
      path: the video file.
      start, end: seconds; None: from the beginning, to the end.
      short_side: pixels that the shorter side is resized to; None: as stored.
      pick: from the number of frames in the clip and the frames a second to the indices wanted,
        in [0, num_frames), in any order, repeats allowed. None: all of them. Every n-th:
        `lambda num_frames, fps: np.arange(0, num_frames, n)`.

    The frames are counted by reading the file without decoding; then only the part that holds the
    wanted ones is decoded, and only those are kept. Where the decoder gives fewer frames than the
    file announced (a cut last packet, say), the last one decoded takes their place, up to a tenth
    of the clip.

    Raises:
      VideoError: the file cannot be decoded, holds no frame in [start, end), or lacks more.
      ValueError: pick gives an index outside the clip, or none.
    """
    with VideoFile(path, threads=0) as video:
        times = video.times(start, end)
        if pick is None:
            wanted = np.arange(len(times))
        else:
            wanted = np.asarray(pick(len(times), video.info.fps), np.int64)
        if wanted.size == 0 or wanted.min() < 0 or wanted.max() >= len(times):
            raise ValueError(f"pick gave indices outside [0, {len(times)}), or none: {wanted}")
        needed, order = np.unique(wanted, return_inverse=True)
        kept = _take(video, times, end, needed, short_side)
        return Video(np.stack(kept)[order], video.info.fps, len(times))


class VideoFile:
    """An open video file: a context manager.

    Args:
      path: the file.
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
        if not os.path.isfile(self._path):
            raise VideoError("missing file")
        if os.path.getsize(self._path) == 0:
            raise VideoError("empty file")
        self._open()
        return self

    def __exit__(self, *_):
        self._container.close()

    def times(self, start: float | None = None, end: float | None = None) -> np.ndarray:
        """When each frame of a clip is shown, by reading the file without decoding it.

        Returns:
          (num_frames,) float64 seconds, ascending.

        Raises:
          VideoError: the file cannot be read, or no frame is shown in [start, end).
        """
        with _reasons():
            times = [self._seconds(_stamp(packet)) for packet in self._packets(start)]
        times = sorted(time for time in times if _inside(time, start, end))
        if not times:
            raise VideoError(_no_frame(start, end))
        return np.array(times)

    def frames(
        self, start: float | None = None, end: float | None = None
    ) -> Iterator[av.VideoFrame]:
        """Decodes the frames of a clip in order, from the keyframe before its start.

        The frames are as stored; `rgb` makes an array of one.

        Raises:
          VideoError: while iterating, the file cannot be decoded, or no frame is in [start, end).
        """
        found = False
        with _reasons():
            for frame in self._decoded(start):
                time = self._seconds(frame.pts)
                if end is not None and time >= end:
                    break
                if _inside(time, start, end):
                    if frame.is_corrupt:
                        raise VideoError(f"corrupt frame at {time:.2f} s")
                    found = True
                    yield frame
        if not found:
            raise VideoError(_no_frame(start, end))

    def rgb(self, frame: av.VideoFrame, short_side: int | None = None) -> np.ndarray:
        """A decoded frame as an upright (H, W, 3) uint8 array, its shorter side `short_side`.

        All frames of a file get one size, also where the stream changes its own midway.
        """
        width, height = self._stream.width, self._stream.height
        if short_side is not None:
            scale = short_side / min(width, height)
            width, height = (max(short_side, round(scale * side)) for side in (width, height))
        with _reasons():
            array = self._scaler.reformat(
                frame, width, height, "rgb24", interpolation=SCALING, threads=1
            ).to_ndarray()
        # FFmpeg and NumPy both count degrees counter-clockwise.
        return np.ascontiguousarray(np.rot90(array, round(frame.rotation / 90)))

    def _decoded(self, start: float | None) -> Iterator[av.VideoFrame]:
        for packet in self._packets(start):
            yield from packet.decode()
        yield from self._stream.codec_context.decode(None)

    def _packets(self, start: float | None) -> Iterator[av.Packet]:
        """The packets from the last keyframe shown at or before `start`, in the file's order."""
        for packet in self._demux_from(start or 0.0):
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
            if first is not None and self._seconds(_stamp(first)) <= start:
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
            # A title in a strange encoding is no reason to refuse the video.
            self._container = av.open(self._path, metadata_errors="replace")
            try:
                self._stream = _video_stream(self._container)
                self._stream.codec_context.thread_count = self._threads
                self.info = _info(self._container, self._stream)
            except BaseException:
                self._container.close()
                raise
        self._read = False

    @property
    def _origin(self) -> int:
        return self._stream.start_time or 0

    def _seconds(self, stamp: int | None) -> float:
        if stamp is None:
            raise VideoError("frames without a time")
        return float((stamp - self._origin) * self._stream.time_base)


def _take(video: VideoFile, times, end, needed, short_side) -> list[np.ndarray]:
    """The frames of the given indices, ascending; the last decoded stands for missing ones."""
    kept = []
    for position, frame in enumerate(video.frames(times[needed[0]], end), start=needed[0]):
        if position == needed[len(kept)]:
            kept.append(video.rgb(frame, short_side))
            if len(kept) == len(needed):
                return kept
    if len(times) - 1 - position > len(times) / 10:
        raise VideoError(f"truncated: {position + 1} frames of {len(times)}")
    return kept + [video.rgb(frame, short_side)] * (len(needed) - len(kept))


def _video_stream(container) -> av.VideoStream:
    for stream in container.streams.video:
        # A cover picture of a song is a video stream of one frame.
        if not stream.disposition & Disposition.attached_pic:
            return stream
    raise VideoError("no video stream")


def _info(container, stream) -> VideoInfo:
    fps = stream.average_rate or stream.guessed_rate
    if not fps:
        raise VideoError("no frame rate")
    if not stream.width or not stream.height:
        raise VideoError("no frame size")
    duration = None if container.duration is None else container.duration / av.time_base
    return VideoInfo(float(fps), stream.width, stream.height, duration)


def _stamp(packet: av.Packet) -> int | None:
    # AVI stores decoding times only; without reordering they are the times shown.
    return packet.dts if packet.pts is None else packet.pts


def _inside(time: float, start: float | None, end: float | None) -> bool:
    return (start is None or time >= start) and (end is None or time < end)


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
    except av.error.FFmpegError as error:
        raise VideoError((error.strerror or str(error)).splitlines()[0]) from error
