"""From a video to the clips of a model: which frames are decoded, and which squares of them."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, BinaryIO, TypeGuard

import numpy as np

from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.data import decode
from timesformer_jax.data.input import sampling
from timesformer_jax.errors import InputError

# A file or a folder of images by its path, or an open binary file.
File = str | os.PathLike | BinaryIO

# A file, or frames in memory.
Video = File | np.ndarray | decode.DecodedVideo

FPS_OF_FILE = "fps is that of frames in memory; a file tells its own: leave it out"


@dataclasses.dataclass(frozen=True)
class Clips:
    """The clips of a video, before they are cropped and normalised.

    Attributes:
      frames: (V, T, H, W, 3) uint8 RGB: V clips of T frames, with `short_side` of the spec; fewer
        frames if the video is short and `short` of the spec is "mask".
      crop_boxes: (C, 3) float64, the squares of every clip: top, left and side, in pixels.
      times: (V, T) float64, when each frame is shown, in seconds from the beginning of the video;
        NaN where only the frames are known.
    """

    frames: np.ndarray
    crop_boxes: np.ndarray
    times: np.ndarray


def read(
    video: Video,
    clip: ClipSpec,
    views: int = 1,
    crops: int = 3,
    start: float | None = None,
    end: float | None = None,
    *,
    fps: float | None = None,
    frame_range: tuple[int, int] | None = None,
    threads: int = 0,
) -> Clips:
    """The clips of a video that a model classifies, as evaluation samples them.

    Args:
      video: a path, an open binary file, or frames: (T, H, W, 3) uint8 RGB.
      clip: what the model expects.
      views: clips along the video.
      crops: squares of every clip: 3 for left, centre and right, 1 for the centre.
      start, end: seconds; the clips lie in this part. None: the beginning, the end.
      fps: frames per second of frames in memory. Without it they must be one clip that is sampled
        already, of `clip.frames` frames (with sampling "segments": any number).
      frame_range: [first, last) frames of the video instead of start and end.
      threads: of the decoder; 0: one per core. The frames do not depend on it.

    Raises:
      decode.VideoError: if the video cannot be decoded.
      InputError: if frames in memory are of another shape or dtype, or there is no frame in
        [start, end).
    """

    def sample(num_frames: int, fps: float) -> np.ndarray:
        return sampling.test_indices(num_frames, fps, clip, views).reshape(-1)

    if isinstance(video, decode.DecodedVideo):
        video, fps = video
    if isinstance(video, bytes):
        raise InputError("a video cannot be bytes; wrap its content: io.BytesIO(content)")
    if not is_file(video):
        frames, times = _in_memory(video, clip, views, start, end, fps)
    elif fps is not None:
        raise InputError(FPS_OF_FILE)
    else:
        found = decode.decode_clip(
            video,
            start,
            end,
            sample=sample,
            short_side=clip.short_side,
            frame_range=frame_range,
            threads=threads,
        )
        frames, times = found.frames, found.times
    height, width = frames.shape[1:3]
    return Clips(
        frames.reshape(views, -1, height, width, 3),
        sampling.test_crop_boxes(height, width, crops),
        times.reshape(views, -1),
    )


def is_file(video: Video) -> TypeGuard[File]:
    """Whether a video is a path or an open file, not frames in memory."""
    return isinstance(video, str | os.PathLike) or hasattr(video, "read")


def _in_memory(
    video: Any,
    clip: ClipSpec,
    views: int,
    start: float | None,
    end: float | None,
    fps: float | None,
) -> tuple[np.ndarray, np.ndarray]:
    """The sampled frames of frames in memory, and their times."""
    frames = checked_frames(video)
    if fps is None:
        if start is not None or end is not None:
            raise InputError("start and end are in seconds: give the frames' rate as fps=... too")
        if clip.sampling == "segments":
            times = np.full(len(frames), np.nan)
            ticks = sampling.test_indices(len(frames), 1.0, clip, views).reshape(-1)
        elif views == 1 and (
            len(frames) == clip.frames or (clip.short == "mask" and len(frames) < clip.frames)
        ):
            return decode.resize(frames, clip.short_side), np.full(len(frames), np.nan)
        else:
            raise InputError(
                f"{len(frames)} frames without a rate: give it as fps=..., or give one clip of "
                f"exactly {clip.frames} sampled frames (views=1)"
            )
    else:
        frames, timeline = part(frames, fps, start, end)
        times = timeline.times
        ticks = sampling.test_indices(len(frames), fps, clip, views).reshape(-1)
    unique, inverse = np.unique(ticks, return_inverse=True)
    return decode.resize(frames[unique], clip.short_side)[inverse], times[ticks]


def part(
    frames: np.ndarray, fps: float | None, start: float | None, end: float | None
) -> tuple[np.ndarray, decode.Timeline]:
    """The frames in memory of [start, end) seconds, and when they are shown.

    Raises:
      InputError: if there is no rate, it is not above 0, or there is no such frame.
    """
    if fps is None or not 0 < fps < np.inf:
        raise InputError(f"frames in memory need their rate, fps=..., above 0; not {fps}")
    times = np.arange(len(frames)) / fps
    inside = (times >= (start or 0)) & (times < (np.inf if end is None else end))
    if not inside.any():
        raise InputError(f"{decode.no_frame(start, end)}: there are {times[-1]:g} s")
    return frames[inside], decode.Timeline(times[inside], np.arange(inside.sum()), fps)


def checked_frames(frames: Any) -> np.ndarray:
    """Frames in memory as (T, H, W, 3) uint8.

    Raises:
      InputError: if they have another shape or dtype; it says how to convert them.
    """
    frames = np.asarray(frames)
    if frames.dtype != np.uint8:
        how = (
            "(255 * frames).round().astype('uint8') if they lie in [0, 1], or "
            "frames.round().astype('uint8') if in [0, 255]"
            if frames.dtype.kind == "f"
            else "frames.astype('uint8') if they lie in [0, 255]"
        )
        raise InputError(f"frames are {frames.dtype}, not uint8; convert them: {how}")
    if frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        hint = ""
        if frames.ndim == 4 and frames.shape[1] == 3:
            hint = "; put the channels last: frames.transpose(0, 2, 3, 1)"
        elif frames.ndim == 5:
            hint = "; give several videos as a list: list(frames)"
        raise InputError(
            f"frames have shape {frames.shape}, not (frames, height, width, 3) as RGB{hint}"
        )
    return frames
