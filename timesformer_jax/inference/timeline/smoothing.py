"""Class probabilities along a video to segments of one class each.

The labels of the clips are those of the best path of a hidden Markov model (Viterbi). Its states
are the classes. The probability of a class is what a clip says for it, and a change of the class
costs the same between all classes. So a class must be more probable for long enough to be a
segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# A clip says no more against a class than this probability. Networks give far lower ones, which do
# not mean that they are as rarely wrong.
LEAST_PROBABILITY = 1e-3


class Segment(NamedTuple):
    """A part of a video of one class.

    Attributes:
      start, end: seconds from the beginning of the video.
      label: name of the class.
      score: mean probability of the class over the clips of the segment.
    """

    start: float
    end: float
    label: str
    score: float


def best_path(log_probabilities: np.ndarray, weights: np.ndarray, switch_cost: float) -> np.ndarray:
    """The classes y that maximise sum_t weights[t] * log_probabilities[t, y[t]] - cost * changes.

    A change is a t with y[t] != y[t - 1]. Dynamic programming in time n * C: of the best paths that
    end in each class, the next clip extends the one of its own class or the best of all.

    Args:
      log_probabilities: (n, C), n at least 1.
      weights: (n,), how much each clip counts.
      switch_cost: of a change, at least 0, in nats.

    Returns:
      (n,) int64 in [0, C).
    """
    count, classes = log_probabilities.shape
    evidence = weights[:, None] * log_probabilities
    # int32: for hours of video and hundreds of classes this is the largest array.
    previous = np.empty((count, classes), np.int32)
    total = evidence[0].astype(np.float64)
    for i in range(1, count):
        best = int(total.argmax())
        changes = total[best] - switch_cost > total
        previous[i] = np.where(changes, best, np.arange(classes))
        total = np.where(changes, total[best] - switch_cost, total) + evidence[i]
    path = np.empty(count, np.int64)
    path[-1] = total.argmax()
    for i in range(count - 1, 0, -1):
        path[i - 1] = previous[i, path[i]]
    return path


def find_segments(
    times: np.ndarray,
    probabilities: np.ndarray,
    labels: Sequence[str],
    bounds: tuple[float, float],
    window: float,
    switch_cost: float,
) -> list[Segment]:
    """The segments of a part of a video that clips cover.

    A clip counts for the time that is nearer to it than to other clips, in parts of the time that
    it spans: overlapping clips see the same frames. So the segments do not depend on the stride,
    apart from its precision.

    Args:
      times: (n,) seconds, ascending, the middles of the clips; n at least 1.
      probabilities: (n, C) of the classes.
      labels: C names.
      bounds: seconds, where the first segment starts and the last one ends.
      window: seconds that a clip spans.
      switch_cost: what a change of class must gain, in nats; of two classes whose probabilities
        have the ratio r, log(r) is gained by the time of each clip that does not overlap.

    Returns:
      Segments without gaps between them; one ends in the middle between two clips.
    """
    edges = np.concatenate([bounds[:1], (times[1:] + times[:-1]) / 2, bounds[1:]])
    weights = np.minimum(np.diff(edges) / window, 1)
    path = best_path(np.log(np.maximum(probabilities, LEAST_PROBABILITY)), weights, switch_cost)
    firsts = np.flatnonzero(np.diff(path, prepend=-1))
    return [
        Segment(
            float(edges[first]),
            float(edges[last]),
            labels[path[first]],
            float(probabilities[first:last, path[first]].mean()),
        )
        for first, last in zip(firsts, [*firsts[1:], len(path)])
    ]
