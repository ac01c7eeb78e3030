"""Which frames of a video a clip has, and how they are cropped: pure NumPy functions.

Frames are numbered in the source video. A clip with `ClipSpec.short` "mask" has the frames that the
video has, k of T, wherever (T,) is said here. Random numbers in [0, 1) are arguments, so training,
evaluation and prediction share these functions and differ only in the arguments.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import numpy as np

from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.errors import InputError

# In place of a number of views: clips that do not overlap, along the whole video.
COVER: Literal["cover"] = "cover"
Views = int | Literal["cover"]


def train_indices(
    num_frames: int, fps: float, spec: ClipSpec, position: float, draws: np.ndarray
) -> np.ndarray:
    """The source frames of a training clip, by `spec.sampling`.

    Args:
      num_frames: frames of the video.
      fps: its frame rate.
      spec: of the clip.
      position: random number in [0, 1), where a clip of `clip_indices` starts.
      draws: (T,) random numbers in [0, 1), one per segment of `segment_indices`.

    Returns:
      (T,) int64 in [0, num_frames).
    """
    if spec.sampling == "segments":
        return _of_segments(num_frames, spec, draws)
    return clip_indices(num_frames, fps, spec.frames, spec.frame_stride, position, spec.short)


def test_indices(num_frames: int, fps: float, spec: ClipSpec, views: int) -> np.ndarray:
    """The source frames of a video's test clips, by `spec.sampling`.

    Segments always span the whole video, so their views differ in the position within every
    segment: view v takes the frame at (v + 1/2) / views of each; with one view, the midpoint.

    Args:
      num_frames, fps, spec: as for `train_indices`.
      views: temporal views.

    Returns:
      (views, T) int64 in [0, num_frames).
    """
    if spec.sampling == "segments":
        # Rounded down: of an even number of frames, the first of the two middle ones is taken.
        positions = np.nextafter(view_positions(views), 0)
        return np.stack(
            [_of_segments(num_frames, spec, np.full(spec.frames, p)) for p in positions]
        )
    positions = view_positions(views, first=spec.start == "first")
    length = spec.frames, spec.frame_stride
    return np.stack([clip_indices(num_frames, fps, *length, p, spec.short) for p in positions])


test_indices.__test__ = False  # type: ignore[attr-defined]  # pytest must not collect it as a test


def covering_pieces(num_frames: int, fps: float, spec: ClipSpec) -> list[tuple[int, int]]:
    """The [first, last) source frames of the pieces of a video that one test clip each stands for.

    They are equal, and as nearly as long as a clip as can be: the records that `prepare` cuts a
    long video into are the same. With sampling "segments" a clip is as long as the video, and
    there is one piece.
    """
    from timesformer_jax.data.decode import equal_pieces  # it imports PyAV, which plans do not need

    return equal_pieces(num_frames, fps, clip_seconds(spec) or math.inf)


def covering_indices(num_frames: int, fps: float, spec: ClipSpec) -> Iterator[np.ndarray]:
    """The source frames of clips that do not overlap along a whole video.

    It is the paper's protocol for long videos (HowTo100M): a clip is taken from each of the
    `covering_pieces` as from a video, and the predictions are averaged.

    Yields:
      (T,) int64 in [0, num_frames), ascending, from one clip to the next too.
    """
    for first, last in covering_pieces(num_frames, fps, spec):
        yield first + test_indices(last - first, fps, spec, views=1)[0]


def _of_segments(num_frames: int, spec: ClipSpec, draws: np.ndarray) -> np.ndarray:
    """`segment_indices`; of a video with fewer frames than segments all frames, each once."""
    if spec.short == "mask" and num_frames < spec.frames:
        return np.arange(num_frames)
    return segment_indices(num_frames, spec.frames, draws)


def clip_indices(
    num_frames: int,
    fps: float,
    clip_frames: int,
    frame_stride: int,
    position: float,
    short: str = "repeat",
) -> np.ndarray:
    """The source frames of one clip, as in the authors' Kinetics recipes.

    The clip spans frame_stride * clip_frames frames of a 30 fps video, or the same time of another.
    Its frames are spread evenly over the span, including its first and last frame, and rounded down
    to whole frames. If the video is shorter than the span, its last frame is repeated.

    Args:
      num_frames: frames of the video.
      fps: its frame rate.
      clip_frames: frames of the clip, T.
      frame_stride: distance between them at 30 fps.
      position: where the clip lies: 0 at the beginning of the video, 0.5 in the middle, 1 at the
        end; a uniform random number in training.
      short: `ClipSpec.short`.

    Returns:
      (clip_frames,) int64 in [0, num_frames); with "mask" those within the video, at least one.
    """
    span = frame_stride * clip_frames / 30 * fps
    start = position * max(num_frames - span, 0)
    return _spread(num_frames, start, span, clip_frames, short)


def _spread(num_frames: int, start: float, span: float, clip_frames: int, short: str) -> np.ndarray:
    """(clip_frames,) frames from `start`, evenly over a span; beyond the video, as `short` says."""
    # The span can be shorter than one frame if the frame rate is low.
    indices = np.linspace(start, start + max(span - 1, 0), clip_frames)
    if short == "mask":
        indices = indices[: max(int((indices < num_frames).sum()), 1)]
    return np.clip(indices, 0, num_frames - 1).astype(np.int64)


def clip_seconds(spec: ClipSpec) -> float | None:
    """The time that a clip spans; None with sampling "segments": as long as the video."""
    return None if spec.sampling == "segments" else spec.frame_stride * spec.frames / 30


def sliding_starts(num_frames: int, fps: float, window: float, stride: float) -> np.ndarray:
    """Where clips start that slide along a video: at 0, and every `stride` seconds after it.

    The last one ends with the video, so that every frame lies in the span of a clip: it may be
    nearer to the one before it. A video that is shorter than the window has one clip.

    Args:
      num_frames, fps: of the video.
      window: seconds that a clip spans.
      stride: seconds; less than a frame is a frame.

    Returns:
      (clips,) float64, ascending, in frames; at least one.
    """
    last, step = max(num_frames - window * fps, 0.0), max(stride * fps, 1.0)
    starts = np.arange(math.floor(last / step) + 1) * step
    # Less than a frame from the end is the end.
    return starts if last - starts[-1] < 1 else np.append(starts, last)


def sliding_indices(
    num_frames: int, fps: float, spec: ClipSpec, window: float, starts: np.ndarray
) -> Iterator[np.ndarray]:
    """The source frames of clips that start anywhere, one after the other.

    Within its span a clip is sampled as in a test: with sampling "stride", as by `clip_indices`;
    with "segments", the middle frames of T equal parts of the span.

    Args:
      num_frames, fps: of the video.
      spec: of the clips.
      window: seconds that a clip spans, as `clip_seconds` says if it says so.
      starts: (clips,) in frames, ascending.

    Yields:
      (T,) int64 in [0, num_frames), ascending.
    """
    span = window * fps
    for start in starts:
        if spec.sampling == "stride":
            yield _spread(num_frames, start, span, spec.frames, spec.short)
            continue
        first = min(int(start), num_frames - 1)
        length = min(max(round(span), 1), num_frames - first)
        yield first + test_indices(length, fps, spec, views=1)[0]


def segment_indices(num_frames: int, clip_frames: int, draws: np.ndarray) -> np.ndarray:
    """The source frames of one clip, as in the authors' Something-Something recipes.

    The video is divided into T equal segments of (num_frames - 1) / T frames. Their borders are
    rounded to whole frames and belong to both neighbours. One frame is taken from each segment.

    Args:
      num_frames: frames of the video; if there are only T or fewer, some are repeated.
      clip_frames: frames of the clip, T.
      draws: (T,) in [0, 1), the position of each frame within its segment; uniform random numbers
        in training.

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
      first: the first view starts at the beginning of the video, as in the authors' release. By
        default views are in the middle of `views` equal parts; one view is the paper's middle clip.

    Returns:
      (views,) float64 in [0, 1).
    """
    return (np.arange(views) + (0.0 if first else 0.5)) / views


def stored_indices(indices: np.ndarray, stride: int, stored: int) -> np.ndarray:
    """The stored frames nearest to the source frames `indices`.

    Args:
      indices: source frames.
      stride: every stride-th source frame is stored.
      stored: number of stored frames.
    """
    return np.minimum(np.rint(indices / stride).astype(np.int64), stored - 1)


def check_short_side_range(short_side_range: tuple[int, ...], crop: int) -> None:
    """Raises InputError if `random_crop_box` cannot use this short_side_range."""
    if len(short_side_range) != 2 or not crop <= short_side_range[0] <= short_side_range[1]:
        raise InputError(
            "short_side_range (data.short_side_range) must be two sizes, ascending, of at least"
            f" the crop, {crop}; not {short_side_range}"
        )


def random_crop_box(
    height: int, width: int, crop: int, short_side_range: tuple[int, int], draws: np.ndarray
) -> np.ndarray:
    """The square of a frame that a training clip shows.

    The authors' release scales the short side to a random number of pixels, then cuts out a random
    crop x crop square. This is the same square in pixels of the unscaled frame, so scaling and
    cropping are one resampling.

    Args:
      height, width: of the frame.
      crop: side of the clip in pixels.
      short_side_range: least and largest scaled short side, at least crop.
      draws: three random numbers in [0, 1): scale, vertical and horizontal position.

    Returns:
      (3,) float64: top, left and side, in pixels of the frame.
    """
    low, high = short_side_range
    scaled = low + math.floor(draws[0] * (high - low + 1))
    side = crop * min(height, width) / scaled
    return np.array([draws[1] * (height - side), draws[2] * (width - side), side])


def test_crop_boxes(height: int, width: int, crops: int) -> np.ndarray:
    """The squares of a frame that tests show; their side is the frame's short side.

    Args:
      height, width: of the frame.
      crops: 1 for the centre; 3 for left, centre and right (top, centre and bottom if it is tall).

    Returns:
      (crops, 3) float64: top, left and side, in pixels of the frame.
    """
    side = min(height, width)
    positions = [0.5] if crops == 1 else np.linspace(0, 1, crops)
    return np.array([[p * (height - side), p * (width - side), side] for p in positions])


test_crop_boxes.__test__ = False  # type: ignore[attr-defined]  # pytest must not collect it as a test


def decoded_side(short_side: int, crop: int, least_short_side: int) -> int:
    """Side of the squares to decode: any training crop box fits, with a margin for resampling.

    The resampling kernel on the device reads beyond the crop box by as many pixels as the factor by
    which it shrinks. The frame's short side is always enough.

    Args:
      short_side: of the stored frames, in pixels.
      crop: side of the clip.
      least_short_side: least short side that frames are scaled to.
    """
    shrink = short_side / least_short_side
    return min(math.ceil(crop * shrink) + 2 * math.ceil(shrink) + 1, short_side)
