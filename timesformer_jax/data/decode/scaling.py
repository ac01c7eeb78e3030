"""Scales frames to a short side."""

from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

# `ffmpeg -vf scale` is bicubic too, so frames equal those of copies that were scaled with ffmpeg.
# swscale widens its kernel when it shrinks, so it does not alias. The other flags choose exact
# arithmetic, which gives the same bytes on every processor.
SCALING = int(
    Interpolation.BICUBIC
    | Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
    | Interpolation.BITEXACT
)


def resize(frames: np.ndarray, short_side: int) -> np.ndarray:
    """Resizes frames as `decode_clip` does.

    Args:
      frames: (T, H, W, 3) uint8 RGB.
      short_side: pixels that the shorter side is resized to.

    Returns:
      (T, H', W', 3) uint8.
    """
    height, width = frames.shape[1:3]
    if min(height, width) == short_side:
        return frames
    width, height = resized(width, height, short_side)
    scaler = VideoReformatter()
    videos = (av.VideoFrame.from_ndarray(np.ascontiguousarray(f), format="rgb24") for f in frames)
    options: dict[str, Any] = {"interpolation": SCALING, "threads": 1}
    return np.stack(
        [scaler.reformat(f, width, height, "rgb24", **options).to_ndarray() for f in videos]
    )


def resized(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Width and height whose shorter one is `short_side`, in the same proportion."""
    scale = short_side / min(width, height)
    return max(short_side, round(scale * width)), max(short_side, round(scale * height))
