"""The classes along a video, and the texts that say them: JSON, CSV, WebVTT."""

from __future__ import annotations

import csv
import dataclasses
import html
import io
import json
from typing import Any

import numpy as np

from timesformer_jax.data.decode import Gap
from timesformer_jax.inference.timeline.smoothing import Segment


@dataclasses.dataclass(frozen=True)
class VideoTimeline:
    """The classes along a video.

    Attributes:
      times: (n,) float64, the middle of each clip, in seconds from the beginning of the video.
      probabilities: (n, C) float32 of the classes.
      labels: C names of the classes.
      segments: parts of one class each, (start, end, label, score), in order. They cover the video
        without its damaged parts.
      gaps: parts that have no frames or damaged ones, (start, end, damaged).
      start, end: seconds, the part of the video that was looked at.
      window: seconds that a clip spans.
      stride: seconds between clips. The last clip ends with the video, and may be nearer.
      switch_cost: of the smoothing, in nats.
    """

    times: np.ndarray
    probabilities: np.ndarray
    labels: tuple[str, ...]
    segments: tuple[Segment, ...]
    gaps: tuple[Gap, ...]
    start: float
    end: float
    window: float
    stride: float
    switch_cost: float

    def __repr__(self) -> str:
        return (
            f"VideoTimeline({len(self.times)} clips, {len(self.labels)} classes, "
            f"{len(self.segments)} segments, {self.start:g} to {self.end:g} s)"
        )

    def to_json(self, **facts: Any) -> str:
        """All of it as JSON: times in seconds to the millisecond, probabilities to 5 digits.

        Args:
          facts: more entries, such as the name of the video.
        """
        content = {
            **facts,
            "start": round(self.start, 3),
            "end": round(self.end, 3),
            "window": round(self.window, 3),
            "stride": round(self.stride, 3),
            "switch_cost": self.switch_cost,
            "segments": [
                {
                    "start": round(segment.start, 3),
                    "end": round(segment.end, 3),
                    "label": segment.label,
                    "score": round(segment.score, 5),
                }
                for segment in self.segments
            ],
            "gaps": [
                {"start": round(gap.start, 3), "end": round(gap.end, 3), "damaged": gap.damaged}
                for gap in self.gaps
            ],
            "labels": self.labels,
            "times": self.times.round(3).tolist(),
            "probabilities": self.probabilities.astype(np.float64).round(5).tolist(),
        }
        return json.dumps(content, ensure_ascii=False) + "\n"

    def to_csv(self) -> str:
        """The segments as CSV with a header: start, end, label, score; times in seconds."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(Segment._fields)
        for segment in self.segments:
            start, end = f"{segment.start:.3f}", f"{segment.end:.3f}"
            writer.writerow([start, end, segment.label, f"{segment.score:.5f}"])
        return text.getvalue()

    def to_vtt(self) -> str:
        """The segments as WebVTT subtitles: the class and its score, as long as it lasts."""
        cues = [
            f"{number}\n{_vtt_time(segment.start)} --> {_vtt_time(segment.end)}\n"
            f"{html.escape(' '.join(segment.label.split()), quote=False)} {segment.score:.0%}\n"
            for number, segment in enumerate(self.segments, start=1)
        ]
        return "\n".join(["WEBVTT\n", *cues])


def _vtt_time(seconds: float) -> str:
    milliseconds = round(1000 * seconds)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}.{rest % 1000:03}"
