"""The page of a timeline: the video with its subtitles, and a lane for each class below it."""

from __future__ import annotations

import mimetypes
import os
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from timesformer_jax.data.decode import open_stream, read_info
from timesformer_jax.data.encode import encode_mp4
from timesformer_jax.inference import page
from timesformer_jax.inference.timeline.result import VideoTimeline
from timesformer_jax.storage import is_remote

# A file up to this size becomes part of the page. Beyond it, pages are slow to open.
EMBEDDED_BYTES = 16 << 20

# Videos up to this length are encoded anew if browsers do not play their format.
ENCODED_SECONDS = 120.0
ENCODED_SHORT_SIDE = 360

# What browsers play: FFmpeg's names of containers and codecs.
BROWSER_CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
BROWSER_CODECS = ("h264", "vp8", "vp9", "av1", "libdav1d", "libvpx", "libvpx-vp9")

# Classes with a lane: those with segments, then those with the highest probabilities.
MOST_LANES = 12
# Points of a curve. A screen shows no more.
MOST_POINTS = 1500
LANE_HEIGHT = 36


class Source(NamedTuple):
    """Where a page has its video from: the `src` of its element, None if there is none."""

    address: str | None
    embedded: bool
    note: str = ""


NO_SOURCE = Source(None, False, "The video itself is not shown.")


class Lane(NamedTuple):
    """One class in the chart. curve: SVG path of its probabilities, in [0, 1000] x [0, height]."""

    label: str
    curve: str
    highest: float
    segments: list[dict[str, Any]]


def find_source(video: str | os.PathLike, folder: str | os.PathLike) -> Source:
    """How a page in `folder` gets at the video.

    A small file becomes a data URI, a short one that browsers do not play is encoded anew. Of
    others the page has the relative address.
    """
    path = os.fspath(video)
    if is_remote(path) or os.path.isdir(path):
        return Source(None, False, "A browser cannot play it from there; the chart works without.")
    info = read_info(path)
    plays = info.container in BROWSER_CONTAINERS and info.codec in BROWSER_CODECS
    if plays and os.path.getsize(path) <= EMBEDDED_BYTES:
        kind = mimetypes.guess_type(path)[0] or "video/mp4"
        return Source(page.data_uri(Path(path).read_bytes(), kind), True)
    if not plays and (info.duration or np.inf) <= ENCODED_SECONDS:
        return Source(page.data_uri(_encode(path), "video/mp4"), True)
    address = os.path.relpath(os.path.abspath(path), os.path.abspath(folder))
    note = "" if plays else f"Few browsers play {info.codec} video; convert it to MP4 (H.264)."
    return Source(urllib.parse.quote(address.replace(os.sep, "/")), False, note)


def _encode(path: str) -> bytes:
    """A video as H.264 in MP4, without its sound."""
    info = read_info(path)
    short_side = min(info.width, info.height, ENCODED_SHORT_SIDE)
    with open_stream(path, lambda timeline: np.arange(len(timeline))[:, None],
                     short_side=short_side) as stream:  # fmt: skip
        images = (clip.frames[0] for clip in stream)
        return encode_mp4(images, stream.timeline.fps, preset="veryfast")


def render(
    timeline: VideoTimeline,
    name: str,
    source: Source = NO_SOURCE,
    facts: Sequence[tuple[str, str]] = (),
) -> str:
    """The HTML of a timeline.

    Args:
      timeline: of the video.
      name: of the video, for the title.
      source: from `find_source`.
      facts: names and texts to list, beside those of the timeline itself.
    """
    length = timeline.end - timeline.start
    own = [
        ("Part of the video", f"{clock(timeline.start)} to {clock(timeline.end)}"),
        ("Clips", f"{len(timeline.times)} of {timeline.window:.3g} s"),
        ("Stride", f"{timeline.stride:.3g} s"),
        ("Smoothing", f"Viterbi, {timeline.switch_cost:g} nats for a change of class"),
    ]
    top = np.argsort(-timeline.probabilities, axis=1, kind="stable")[:, :3]
    return page.render(
        "timeline.html",
        title=name,
        kind="Timeline of a video",
        subtitle=f"{clock(length)} · {_count(timeline.segments, 'segment')} · "
        f"{_count({segment.label for segment in timeline.segments}, 'class', 'classes')}",
        source=source,
        subtitles=page.data_uri(timeline.to_vtt().encode(), "text/vtt"),
        segments=[_segment(timeline, i) for i in range(len(timeline.segments))],
        lanes=_lanes(timeline),
        gaps=[
            {"left": _percent(timeline, gap.start), "width": 100 * (gap.end - gap.start) / length,
             "text": str(gap)}
            for gap in timeline.gaps
        ],
        ticks=[{"left": _percent(timeline, t), "text": clock(t)} for t in axis_ticks(timeline)],
        height=LANE_HEIGHT,
        facts=[*facts, *own],
        data={
            "start": timeline.start,
            "end": timeline.end,
            "stride": timeline.stride,
            "labels": timeline.labels,
            "times": timeline.times.round(3).tolist(),
            "top": [
                [[int(c), round(float(p[c]), 4)] for c in classes]
                for classes, p in zip(top, timeline.probabilities)
            ],
        },
    )  # fmt: skip


def clock(seconds: float) -> str:
    """Seconds as 0:07.5 or 1:02:03.0."""
    tenths = round(10 * seconds)
    minutes, rest = divmod(tenths, 600)
    hours = f"{minutes // 60}:{minutes % 60:02}" if minutes >= 60 else f"{minutes}"
    return f"{hours}:{rest // 10:02}.{rest % 10}"


def axis_ticks(timeline: VideoTimeline) -> np.ndarray:
    """Round times, at most 9, for the axis of the chart."""
    length = timeline.end - timeline.start
    steps = np.array([0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200])
    fitting = steps[length / steps <= 8]
    step = fitting[0] if len(fitting) else 14400.0
    return np.arange(np.ceil(timeline.start / step), np.floor(timeline.end / step) + 1) * step


def _lanes(timeline: VideoTimeline) -> list[Lane]:
    """The classes of the segments, in the order of their time, then the most probable others."""
    classes = {label: i for i, label in enumerate(timeline.labels)}
    seconds: dict[str, float] = dict.fromkeys((s.label for s in timeline.segments), 0.0)
    for segment in timeline.segments:
        seconds[segment.label] += segment.end - segment.start
    chosen = sorted(seconds, key=lambda label: -seconds[label])[:MOST_LANES]
    highest = timeline.probabilities.max(axis=0)
    for i in np.argsort(-highest, kind="stable")[: 2 * MOST_LANES]:
        if len(chosen) < MOST_LANES and timeline.labels[i] not in chosen and highest[i] >= 0.05:
            chosen.append(timeline.labels[i])
    return [
        Lane(
            label,
            _curve(timeline, timeline.probabilities[:, classes[label]]),
            float(highest[classes[label]]),
            [
                _segment(timeline, i)
                for i, segment in enumerate(timeline.segments)
                if segment.label == label
            ],
        )
        for label in chosen
    ]


def _curve(timeline: VideoTimeline, probabilities: np.ndarray) -> str:
    """The area under a curve as an SVG path; of many points the highest of each few."""
    group = -(-len(probabilities) // MOST_POINTS)
    firsts = np.arange(0, len(probabilities), group)
    x = 1000 * (timeline.times[firsts] - timeline.start) / (timeline.end - timeline.start)
    y = LANE_HEIGHT * (1 - np.maximum.reduceat(probabilities, firsts))
    # A video of one clip has a flat line. So have the halves of the first and the last clip.
    x, y = np.array([0, *x, 1000]), np.array([y[0], *y, y[-1]])
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y))
    return f"M0,{LANE_HEIGHT} L{points} L1000,{LANE_HEIGHT} Z"


def _segment(timeline: VideoTimeline, number: int) -> dict[str, Any]:
    segment = timeline.segments[number]
    length = timeline.end - timeline.start
    return {
        "number": number,
        "start": round(segment.start, 3),
        "end": round(segment.end, 3),
        "label": segment.label,
        "score": f"{segment.score:.0%}",
        "time": f"{clock(segment.start)} to {clock(segment.end)}",
        "left": _percent(timeline, segment.start),
        "width": 100 * (segment.end - segment.start) / length,
    }


def _percent(timeline: VideoTimeline, seconds: float) -> float:
    return float(100 * (seconds - timeline.start) / (timeline.end - timeline.start))


def _count(items: Any, one: str, many: str | None = None) -> str:
    return f"{len(items)} {one if len(items) == 1 else many or one + 's'}"
