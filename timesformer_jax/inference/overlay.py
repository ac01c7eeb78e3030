"""Heat over pictures: levels of a heat map, their colours, and frames with the heat over them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

# From cold to hot, RGB. The page has the same ones.
COLOURS = ((30, 40, 130), (110, 45, 170), (215, 60, 110), (250, 140, 45), (255, 240, 130))

# How much of a picture the hottest colour covers.
STRENGTH = 0.7

# Outside of the square that the model sees, a picture is darkened to this share.
OUTSIDE = 0.45


def levels(heat: np.ndarray) -> np.ndarray:
    """A heat map as numbers from 0 to 255, for colours.

    One scale for all frames of the clip: 0 up to the 10th percentile of all patches, 255 from the
    99th on. Rollout gives every patch a share, which would colour the whole picture.

    Args:
      heat: (T, H', W') float.

    Returns:
      (T, H', W') uint8.
    """
    low, high = np.percentile(heat, (10, 99))
    if high <= low:  # less than a hundredth of the patches differ
        low, high = heat.min(), heat.max()
    scaled = (heat - low) / max(high - low, np.finfo(np.float32).tiny)
    return np.rint(255 * np.clip(scaled, 0, 1)).astype(np.uint8)


def nearest(times: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """For each of `shown`, the index of the nearest of `times`, both ascending seconds."""
    return np.abs(shown[:, None] - times[None, :]).argmin(axis=1)


def overlaid(
    frames: np.ndarray, heat: np.ndarray, index: np.ndarray, crop_box: np.ndarray
) -> Iterator[np.ndarray]:
    """Draws heat over the frames of a video.

    Args:
      frames: (F, H, W, 3) uint8 RGB.
      heat: (T, H', W') uint8 `levels`.
      index: (F,), which of the T belongs to each frame.
      crop_box: (3,) top, left and side, as shares of the frame: of H, of W and of H.

    Yields:
      (H, W, 3) uint8 RGB for every frame.
    """
    height, width = frames.shape[1:3]
    top, left = round(crop_box[0] * height), round(crop_box[1] * width)
    side = min(round(crop_box[2] * height), height - top, width - left)
    inside = slice(top, top + side), slice(left, left + side)
    for frame, t in zip(frames, index):
        out = frame * OUTSIDE
        level = _enlarged(heat[t], side)
        cover = STRENGTH * level[..., None] / 255
        out[inside] = (1 - cover) * frame[inside] + cover * colour(level)
        yield np.rint(out).astype(np.uint8)


def colour(level: np.ndarray) -> np.ndarray:
    """(...) levels from 0 to 255 as (..., 3) float RGB."""
    stops = np.linspace(0, 255, len(COLOURS))
    channels = np.asarray(COLOURS, np.float64).T
    return np.stack([np.interp(level, stops, channel) for channel in channels], axis=-1)


def _enlarged(level: np.ndarray, side: int) -> np.ndarray:
    """(H', W') to (side, side), by linear interpolation between the middles of the patches."""
    out = level.astype(np.float64)
    for axis, size in enumerate(level.shape):
        at = (np.arange(side) + 0.5) * size / side - 0.5
        at = np.clip(at, 0, size - 1)
        below = np.minimum(at.astype(int), max(size - 2, 0))
        share = (at - below).reshape([-1 if a == axis else 1 for a in range(2)])
        above = np.minimum(below + 1, size - 1)
        out = (1 - share) * out.take(below, axis) + share * out.take(above, axis)
    return out
