"""Decodes a clip into memory: all its frames, or only the sampled ones."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

import numpy as np

from timesformer_jax.data.decode.video import VideoFile


@dataclass(frozen=True)
class DecodedClip:
    """Frames of a clip.

    Attributes:
      frames: (T, H, W, 3) uint8 RGB.
      fps: ticks per second of the clip's timeline.
      num_frames: ticks of the clip's timeline.
      times: (T,) float64, when each frame is shown, in seconds from the beginning of the video.
    """

    frames: np.ndarray
    fps: float
    num_frames: int
    times: np.ndarray


class DecodedVideo(NamedTuple):
    """A whole video in memory: `frames, fps = decode(path)`.

    Attributes:
      frames: (T, H, W, 3) uint8 RGB.
      fps: frames per second.
    """

    frames: np.ndarray
    fps: float


def decode(
    video: str | os.PathLike | BinaryIO,
    start: float | None = None,
    end: float | None = None,
    *,
    short_side: int | None = None,
) -> DecodedVideo:
    """Decodes a video, or its part [start, end), into memory: `frames, fps = decode(path)`.

    A minute of 30 frames a second takes 0.5 GB at 340 x 256 and 11 GB at 1920 x 1080. Frames are
    upright, with square pixels. A video with a varying frame rate is resampled to its mean rate.

    It decodes in this process: from another one, all frames would be in memory twice. So a file
    that crashes FFmpeg ends the program, and one that hangs it is waited for. Of files that may do
    so, take the frames that you need from another process, as a `Predictor` does:

        from timesformer_jax.data.decode import decode_clip, isolated
        with isolated():
            clip = decode_clip(path, short_side=256)

    Args:
      video: a file, which may be on gs://; a binary file that is open; or a folder of images.
      start: seconds; None: the beginning of the video.
      end: seconds; None: its end.
      short_side: pixels that the shorter side is resized to; None: as stored.

    Raises:
      VideoError: it cannot be decoded, has no frame in [start, end), or is truncated.
    """
    clip = decode_clip(video, start, end, short_side=short_side)
    return DecodedVideo(clip.frames, clip.fps)


def decode_clip(
    path: str | os.PathLike | BinaryIO,
    start: float | None = None,
    end: float | None = None,
    *,
    short_side: int | None = None,
    sample: Callable[[int, float], np.ndarray] | None = None,
    frame_range: tuple[int, int] | None = None,
    threads: int = 0,
) -> DecodedClip:
    """Decodes frames of a clip into memory.

    First the packets are read without decoding, to count the frames. Then only the part of the file
    that holds the sampled frames is decoded.

    Args:
      path: as for `VideoFile`.
      start: seconds; None: the beginning of the video.
      end: seconds; None: its end.
      short_side: pixels that the shorter side is resized to; None: as stored.
      frame_range: as for `VideoFile.timeline`, instead of start and end.
      threads: as for `VideoFile`.
      sample: a function of the number of ticks and the ticks per second, which returns the ticks
        to decode, in [0, num_frames), in any order, with repeats. To take every n-th:
        `lambda num_frames, fps: np.arange(0, num_frames, n)`. None: all ticks.

    Raises:
      VideoError: the file cannot be decoded, has no frame in [start, end), or is truncated.
      ValueError: `sample` returns no tick, or one outside the clip.
    """
    with VideoFile(path, threads) as video:
        timeline = video.timeline(start, end, frame_range=frame_range)
        count = len(timeline)
        ticks = np.arange(count) if sample is None else np.asarray(sample(count, timeline.fps), int)
        if ticks.size == 0 or ticks.min() < 0 or ticks.max() >= count:
            raise ValueError(f"sample gave no index, or one outside [0, {count}): {ticks}")
        unique, inverse = np.unique(ticks, return_inverse=True)
        frames = [video.to_rgb(frame, short_side) for frame in video.frames_at(timeline, unique)]
        times = timeline.times[timeline.frame_indices[ticks]]
        return DecodedClip(np.stack(frames)[inverse], timeline.fps, count, times)
