"""Which frames and which square of a video a clip is made of: pure functions of numpy.

Frames are numbered in the source video. Every random draw enters as an argument in [0, 1), so that
training, evaluation and prediction share these rules and differ only in the numbers they put in.
"""

from __future__ import annotations

import math

import numpy as np

from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.errors import InputError


def train_indices(
    num_frames: int, fps: float, spec: ClipSpec, position: float, draws: np.ndarray
) -> np.ndarray:
    """The source frames of a training clip by the rule of `spec`.

    Args:
      num_frames: frames of the video.
      fps: its frame rate.
      spec: says the rule.
      position: a draw in [0, 1), where a clip of `clip_indices` starts.
      draws: (T,) in [0, 1), one for each segment of `segment_indices`.

    Returns:
      (T,) int64 in [0, num_frames).
    """
    if spec.sampling == "segments":
        return segment_indices(num_frames, spec.frames, draws)
    return clip_indices(num_frames, fps, spec.frames, spec.frame_stride, position)


def test_indices(num_frames: int, fps: float, spec: ClipSpec, views: int) -> np.ndarray:
    """The source frames of a video's test clips by the rule of `spec`.

    Segments always span the video, so its views differ in the place within every segment: view v
    takes the frame (v + 1/2) / views of the way through each, which for one view is the midpoint.

    Args:
      num_frames, fps, spec: as for `train_indices`.
      views: temporal views.

    Returns:
      (views, T) int64 in [0, num_frames).
    """
    if spec.sampling == "segments":
        # Just below, so that of the two middle frames of an even number the first is taken.
        places = np.nextafter(view_positions(views), 0)
        return np.stack(
            [segment_indices(num_frames, spec.frames, np.full(spec.frames, p)) for p in places]
        )
    places = view_positions(views, first=spec.start == "first")
    return np.stack(
        [clip_indices(num_frames, fps, spec.frames, spec.frame_stride, place) for place in places]
    )


test_indices.__test__ = False  # its name is the field's, but it is no test for pytest


def clip_indices(
    num_frames: int, fps: float, clip_frames: int, frame_stride: int, position: float
) -> np.ndarray:
    """The source frames of one clip by the rule of the authors' Kinetics recipes.

    The clip spans frame_stride * clip_frames frames of a 30 fps video, and as many seconds of any other.
    Its frames are spread evenly over the span, first and last included, and truncated to whole
    frames; where the video is shorter, its last frame is repeated.

    Args:
      num_frames: frames of the video.
      fps: its frame rate.
      clip_frames: frames of the clip, T.
      frame_stride: distance between them at 30 fps.
      position: where the clip starts, as a fraction of the room there is: 0 the beginning, 0.5
        the clip in the middle, a uniform draw in training.

    Returns:
      (clip_frames,) int64 in [0, num_frames).
    """
    span = frame_stride * clip_frames / 30 * fps
    start = position * max(num_frames - span, 0)
    # A span of less than a frame, at a frame a second, must not run backwards.
    indices = np.linspace(start, start + max(span - 1, 0), clip_frames)
    return np.clip(indices, 0, num_frames - 1).astype(np.int64)


def segment_indices(num_frames: int, clip_frames: int, draws: np.ndarray) -> np.ndarray:
    """The source frames of one clip by the rule of the authors' Something-Something recipes.

    The video is cut into T equal segments of (num_frames - 1) / T frames, whose borders are rounded
    to whole frames and belong to both sides; one frame is taken from each segment.

    Args:
      num_frames: frames of the video; where there are no more than T, some repeat.
      clip_frames: frames of the clip, T.
      draws: (T,) in [0, 1), where in its segment each frame lies; uniform draws in training.

    Returns:
      (T,) int64 in [0, num_frames), ascending.
    """
    segment = (num_frames - 1) / clip_frames
    borders = np.rint(segment * np.arange(clip_frames + 1)).astype(np.int64)
    first, last = borders[:-1], borders[1:]
    return first + np.floor(draws * (last - first + 1)).astype(np.int64)


def view_positions(views: int, first: bool = False) -> np.ndarray:
    """Positions of `views` test clips of a video, for `clip_indices`.

    Args:
      views: temporal views.
      first: start at the beginning of the video, as the authors' release does; the default is the
        middle of each of `views` equal parts, which for one view is the paper's middle.

    Returns:
      (views,) float64 in [0, 1).
    """
    return (np.arange(views) + (0.0 if first else 0.5)) / views


def stored_indices(indices: np.ndarray, stride: int, stored: int) -> np.ndarray:
    """The stored frames nearest to source frames `indices` when every stride-th was stored."""
    return np.minimum(np.rint(indices / stride).astype(np.int64), stored - 1)


def check_short_side_range(short_side_range: tuple[int, ...], crop: int) -> None:
    """Refuses a scale short_side_range that `random_crop_box` cannot draw from."""
    if len(short_side_range) != 2 or not crop <= short_side_range[0] <= short_side_range[1]:
        raise InputError(
            "the scale short_side_range (data.short_side_range) must be two sizes, ascending, of at least the crop, "
            f"{crop}; not {short_side_range}"
        )


def random_crop_box(
    height: int, width: int, crop: int, short_side_range: tuple[int, int], draws: np.ndarray
) -> np.ndarray:
    """The square of a frame that training sees.

    The release scales the short side to a random whole number of pixels and cuts a random
    crop x crop square; this is that square in the frame's own pixels, so that both happen in one
    resampling.

    Args:
      height, width: of the frame.
      crop: side of the clip in pixels.
      short_side_range: least and largest scaled short side, both at least crop.
      draws: three numbers in [0, 1): scale, vertical and horizontal position.

    Returns:
      (3,) float64: top, left and side, in pixels of the frame.
    """
    low, high = short_side_range
    scaled = low + math.floor(draws[0] * (high - low + 1))
    side = crop * min(height, width) / scaled
    return np.array([draws[1] * (height - side), draws[2] * (width - side), side])


def test_crop_boxes(height: int, width: int, crops: int) -> np.ndarray:
    """The squares of a frame that a test sees: its whole short side, along the long side.

    Args:
      height, width: of the frame.
      crops: 1 for the centre; 3 for left, centre, right (top, middle, bottom if it is tall).

    Returns:
      (crops, 3) float64: top, left and side, in pixels of the frame.
    """
    side = min(height, width)
    places = [0.5] if crops == 1 else np.linspace(0, 1, crops)
    return np.array([[p * (height - side), p * (width - side), side] for p in places])


test_crop_boxes.__test__ = False  # its name is the field's, but it is no test for pytest


def decoded_side(short_side: int, crop: int, smallest_scale: int) -> int:
    """Side of the square that has to be decoded to hold any training crop_box and its surroundings.

    The device resamples with a kernel that reads beyond the crop_box by as many pixels as the crop_box
    is shrunk; the frame's own short side is enough in any case.
    """
    shrink = short_side / smallest_scale
    return min(math.ceil(crop * shrink) + 2 * math.ceil(shrink) + 1, short_side)
