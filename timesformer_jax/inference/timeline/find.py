"""Class probabilities of clips that slide along a video, and the segments that follow.

The video is decoded once, and memory does not grow with its length (`decode.ClipStream`), apart
from the results: a probability for each clip and class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from timesformer_jax import ranges
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.data.decode import Stream, Timeline, VideoError
from timesformer_jax.data.input import sampling
from timesformer_jax.errors import InputError
from timesformer_jax.inference.clip_model import ClipInputs
from timesformer_jax.inference.clips import Video
from timesformer_jax.inference.streams import (
    clip_inputs,
    in_batches,
    one_ahead,
    open_stream,
)
from timesformer_jax.inference.timeline.result import VideoTimeline
from timesformer_jax.inference.timeline.smoothing import Segment, find_segments

# Of clips that slide along a video, how many see each frame, if the stride is not given.
OVERLAP = 4

# Between two classes that alternate with probabilities of 0.9 and 0.1, a segment must last for as
# long as a clip spans. It is log(0.9 / 0.1) = 2.2 nats, for two changes.
SWITCH_COST = 1.1


Classify = Callable[[ClipInputs], np.ndarray]
Progress = Callable[[int, int], None]


def find_timeline(
    video: Video,
    classify: Classify,
    clip: ClipSpec,
    labels: Sequence[str],
    stride: float | None = None,
    window: float | None = None,
    switch_cost: float = SWITCH_COST,
    start: float | None = None,
    end: float | None = None,
    *,
    fps: float | None = None,
    crops: int = 1,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> VideoTimeline:
    """The `VideoTimeline` of a video, or of its part [start, end) seconds.

    Args:
      video: as for `open_stream`.
      classify: gives probabilities, (n, C), of n pairs of frames (T, H, W, 3) and crop boxes.
      clip: the clips that it expects.
      labels: names of the C classes.
      stride: seconds between clips; None: a quarter of what a clip spans.
      window: seconds that a clip spans, only for clips that are as long as the video (sampling
        "segments"). The others say it themselves.
      switch_cost: nats, as for `smoothing.find_segments`; 0: no smoothing.
      start, end, fps: as for `open_stream`.
      crops: squares of each clip: 3 for left, centre and right, 1 for the centre.
      batch_size: clips that `classify` gets at a time.
      progress: called after each batch with the clips that are done, and all.

    Raises:
      VideoError: if the video cannot be read, is truncated, or none of its clips can be decoded.
      InputError: if an argument is out of range, or frames in memory are not right.
    """
    window = _resolve_window(clip, window)
    stride = window / OVERLAP if stride is None else stride
    ranges.check("stride", stride)
    ranges.check("switch_cost", switch_cost)

    def sample(timeline: Timeline) -> Iterator[np.ndarray]:
        starts = sampling.sliding_starts(len(timeline), timeline.fps, window, stride)
        return sampling.sliding_indices(len(timeline), timeline.fps, clip, window, starts)

    with open_stream(video, sample, clip.short_side, start, end, fps=fps) as stream:
        times = _middles(stream.timeline, window, stride)
        usable, found = _classify_all(stream, classify, crops, batch_size, len(times), progress)
        gaps = stream.gaps
    if not usable.any():
        raise VideoError("no clip can be decoded")
    begin = float(stream.timeline.times[0])
    finish = begin + len(stream.timeline) / stream.timeline.fps
    segments: list[Segment] = []
    for middles, part, bounds in _runs(times, usable, found, begin, finish):
        segments += find_segments(middles, part, labels, bounds, window, switch_cost)
    return VideoTimeline(
        times[usable], found, tuple(labels), tuple(segments), gaps, begin, finish, window, stride,
        switch_cost,
    )  # fmt: skip


def _resolve_window(clip: ClipSpec, window: float | None) -> float:
    """The seconds that a clip spans, which the checkpoint or else the user says."""
    own = sampling.clip_seconds(clip)
    if own is not None and window is not None:
        raise InputError(f"the clips of this checkpoint span {own:.3g} s; leave out the window")
    if own is None and window is None:
        raise InputError(
            "the clips of this checkpoint are as long as the video: say with --window=SECONDS"
            " (window=...) how long the events are that it was trained on"
        )
    if window is not None:
        ranges.check("window", window)
    return own or window  # type: ignore[return-value]  # one of them is a number


def _middles(timeline: Timeline, window: float, stride: float) -> np.ndarray:
    """(n,) seconds, the middles of the sliding clips."""
    starts = sampling.sliding_starts(len(timeline), timeline.fps, window, stride)
    span = min(window * timeline.fps, len(timeline))
    return timeline.times[0] + (starts + span / 2) / timeline.fps


def _classify_all(
    stream: Stream,
    classify: Classify,
    crops: int,
    batch_size: int,
    total: int,
    progress: Progress | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Which clips are usable, (n,) bool, and the probabilities of those, (usable, C)."""
    usable: list[bool] = []
    found: list[np.ndarray] = []
    for batch in one_ahead(in_batches(iter(stream), batch_size)):
        if inputs := clip_inputs(batch, crops):
            found.append(classify(inputs))
        usable += [clip.is_usable for clip in batch]
        if progress is not None:
            progress(len(usable), total)
    return np.array(usable), np.concatenate(found) if found else np.zeros((0, 0), np.float32)


def _runs(
    times: np.ndarray, usable: np.ndarray, found: np.ndarray, begin: float, finish: float
) -> Iterator[tuple[np.ndarray, np.ndarray, tuple[float, float]]]:
    """The runs of usable clips: their times, their probabilities, and from when to when each lasts.

    A run ends in the middle between its last clip and the next, unusable one. That is about where
    the damaged part begins, since half of a usable clip's frames are good.
    """
    edges = np.concatenate([[begin], (times[1:] + times[:-1]) / 2, [finish]])
    changes = np.flatnonzero(np.diff(usable.astype(int), prepend=0, append=0))
    for first, last in zip(changes[::2], changes[1::2]):
        part = found[usable[:first].sum() :][: last - first]
        yield times[first:last], part, (float(edges[first]), float(edges[last]))
