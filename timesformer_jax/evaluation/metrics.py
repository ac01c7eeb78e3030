"""Top-1 and top-5 accuracy, or average precision, in all and by class; a video counts once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from timesformer_jax.data.input.sampling import Views

# With fewer classes the top 5 are all or nearly all of them, and say nothing: there is no `top5`.
LEAST_CLASSES_FOR_TOP5 = 6

_TINY = float(np.finfo(np.float32).tiny)


class VideoMeans:
    """The mean prediction of each video over its records and their clips, as they come.

    It holds a sum for each video and class, however many clips there are.

    Args:
      video: (n,) int, the number of the video of each of n records.
      classes: C.

    Attributes:
      first: (m,) int, the first record of each of the m videos, in the order of their numbers.
    """

    def __init__(self, video: np.ndarray, classes: int):
        _, self.first, self._place = np.unique(video, return_index=True, return_inverse=True)
        self._total = np.zeros((len(self.first), classes))
        self._clips = np.zeros(len(self.first), int)

    def add(self, probabilities: np.ndarray, record: np.ndarray) -> None:
        """Adds predictions, (k, C), of the records of these numbers, (k,), in any order."""
        np.add.at(self._total, self._place[record], probabilities)
        np.add.at(self._clips, self._place[record], 1)

    def means(self) -> np.ndarray:
        """(m, C) float64; every video must have a prediction."""
        return self._total / self._clips[:, None]


@dataclasses.dataclass(frozen=True)
class Results:
    """The predictions of an evaluation, one row a video, and the accuracy that follows from them.

    Attributes:
      labels: class names, C of them.
      ids: (m,) str, a name of each video.
      truth: (m,) int, the true class of each video.
      probabilities: (m, C), each row sums to 1.
      views, crops: clips a video and crops a clip whose probabilities were averaged; views "cover"
        of `sampling.covering_indices`.
    """

    labels: tuple[str, ...]
    ids: np.ndarray
    truth: np.ndarray
    probabilities: np.ndarray
    views: Views = 1
    crops: int = 1

    @cached_property
    def predicted(self) -> np.ndarray:
        """(m,) int, the most probable class of each video; of equal ones the first."""
        return self.probabilities.argmax(axis=1)

    @cached_property
    def ranks(self) -> np.ndarray:
        """(m,) int, how many classes come before the true one; of equal ones the first leads."""
        order = np.argsort(-self.probabilities, axis=1, kind="stable")
        return (order == self.truth[:, None]).argmax(axis=1)

    @property
    def videos(self) -> np.ndarray:
        """(C,) int, the number of videos of each class."""
        return self._by_class(np.full(len(self.truth), True))

    @property
    def top1(self) -> np.ndarray:
        """(C,) int, how many videos of each class have it as the most probable one."""
        return self._by_class(self.ranks < 1)

    @property
    def top5(self) -> np.ndarray:
        """(C,) int, how many videos of each class have it among the five most probable ones."""
        return self._by_class(self.ranks < 5)

    @property
    def correct(self) -> dict[str, np.ndarray]:
        """`top1` and, where there are classes enough for it, `top5`, by name."""
        found = {"top1": self.top1}
        if len(self.labels) >= LEAST_CLASSES_FOR_TOP5:
            found["top5"] = self.top5
        return found

    def _by_class(self, rows: np.ndarray) -> np.ndarray:
        return np.bincount(self.truth[rows], minlength=len(self.labels))

    def confusion(self) -> np.ndarray:
        """(C, C) int, how many videos of the class of the row were predicted as the column's."""
        counts = np.zeros((len(self.labels),) * 2, int)
        np.add.at(counts, (self.truth, self.predicted), 1)
        return counts

    def worst(self, most: int) -> np.ndarray:
        """The rows of at most `most` wrong predictions: the least probable true class first."""
        wrong = np.flatnonzero(self.predicted != self.truth)
        order = np.argsort(self.probabilities[wrong, self.truth[wrong]], kind="stable")
        return wrong[order[:most]]

    @property
    def loss(self) -> float:
        """The mean of -log p over the videos, p the averaged probability of the true class."""
        p = self.probabilities[np.arange(len(self.truth)), self.truth].astype(np.float64)
        # A float32 softmax can be 0, whose logarithm is not finite.
        return float(-np.log(np.maximum(p, _TINY)).mean())

    def scalars(self) -> dict[str, float]:
        """top1 and, of six classes or more, top5 as fractions, and loss."""
        total = len(self.truth)
        shares = {name: counts.sum() / total for name, counts in self.correct.items()}
        return shares | {"loss": self.loss}

    def to_json(self) -> dict[str, Any]:
        """`scalars`, and of all and of every class the number of videos and these fractions."""
        with np.errstate(invalid="ignore"):  # a class without videos
            shares = [counts / self.videos for counts in self.correct.values()]
        return self.scalars() | {
            "videos": len(self.truth),
            "views": self.views,
            "crops": self.crops,
            "classes": {
                label: _numbers(self.correct, row) | {"videos": int(videos)}
                for label, row, videos in zip(self.labels, zip(*shares), self.videos)
            },
        }

    def summary(self) -> str:
        """One line: the accuracy, and the numbers of videos, views and crops."""
        return accuracy_line(self.to_json())

    def table(self, worst: int = 5) -> str:
        """A line for each class that has videos, the worst predictions, and the summary."""
        width = max(len(label) for label in self.labels)
        shown = {name.replace("top", "top-"): counts for name, counts in self.correct.items()}
        lines = [f"{'class':<{width}}  {'videos':>6}" + "".join(f"  {k:>6}" for k in shown)]
        for row, (label, videos) in enumerate(zip(self.labels, self.videos)):
            if videos:
                shares = (f"{counts[row] / videos:.1%}" for counts in shown.values())
                line = f"{label:<{width}}  {videos:>6}"
                lines.append(line + "".join(f"  {share:>6}" for share in shares))
        if len(rows := self.worst(worst)):
            lines += ["", "worst predictions, the least probable true class first:"]
            lines += [f"  {self._described(row)}" for row in rows] + [""]
        return "\n".join([*lines, self.summary()])

    def _described(self, row: int) -> str:
        p, truth, predicted = self.probabilities[row], self.truth[row], self.predicted[row]
        return (
            f"{self.ids[row]}: {self.labels[truth]} ({p[truth]:.1%}),"
            f" predicted {self.labels[predicted]} ({p[predicted]:.1%})"
        )


@dataclasses.dataclass(frozen=True)
class MultiLabelResults:
    """As `Results`, of videos that have any number of the labels.

    Attributes:
      labels, ids, views, crops: as in `Results`.
      truth: (m, C) bool, the labels of each video.
      probabilities: (m, C), each in [0, 1].
    """

    labels: tuple[str, ...]
    ids: np.ndarray
    truth: np.ndarray
    probabilities: np.ndarray
    views: Views = 1
    crops: int = 1

    @cached_property
    def average_precision(self) -> np.ndarray:
        """(C,) the average precision of each class; NaN for a class that no video has."""
        return np.array(
            [average_precision(t, p) for t, p in zip(self.truth.T, self.probabilities.T)]
        )

    @cached_property
    def thresholds(self) -> tuple[np.ndarray, np.ndarray]:
        """(C,) `best_threshold` of each class, and (C,) its F1; NaN as above."""
        found = [best_threshold(t, p) for t, p in zip(self.truth.T, self.probabilities.T)]
        thresholds, f1 = np.array(found).T
        return thresholds, f1

    @property
    def common_threshold(self) -> tuple[float, float]:
        """`best_threshold` of all labels of all videos together, and its F1."""
        return best_threshold(self.truth.ravel(), self.probabilities.ravel())

    @property
    def loss(self) -> float:
        """The mean binary cross-entropy over videos and classes."""
        p = self.probabilities.astype(np.float64)
        # A float32 sigmoid can be 0 or 1, whose logarithms are not finite.
        p = np.where(self.truth, np.maximum(p, _TINY), np.maximum(1 - p, _TINY))
        return float(-np.log(p).mean())

    def scalars(self) -> dict[str, float]:
        """mAP, the mean of the average precision over the classes that a video has; and loss."""
        known = self.average_precision[self.truth.any(axis=0)]
        return {"mAP": float(known.mean()) if len(known) else 0.0, "loss": self.loss}

    def to_json(self) -> dict[str, Any]:
        """mAP, the number of videos, and the same of every class: AP, F1 and its threshold."""
        columns = (self.average_precision, *reversed(self.thresholds))
        return self.scalars() | {
            "videos": len(self.truth),
            "views": self.views,
            "crops": self.crops,
            **_numbers(("F1", "threshold"), reversed(self.common_threshold)),
            "classes": {
                label: _numbers(("AP", "F1", "threshold"), row) | {"videos": int(videos)}
                for label, row, videos in zip(self.labels, zip(*columns), self.truth.sum(axis=0))
            },
        }

    def summary(self) -> str:
        """One line: mAP, and the numbers of videos, views and crops."""
        return accuracy_line(self.to_json())

    def worst(self, most: int) -> np.ndarray:
        """The rows of `most` videos: the largest mean cross-entropy of their classes first."""
        p = np.where(self.truth, self.probabilities, 1 - self.probabilities)
        losses = -np.log(np.maximum(p, np.finfo(np.float32).tiny)).mean(axis=1)
        return np.argsort(-losses, kind="stable")[:most]

    def table(self, worst: int = 5) -> str:
        """A line for each class that has videos, the worst predictions, and the summary.

        F1 is the best one, of predictions with at least the probability beside it.
        """
        width = max(map(len, ("class", *self.labels)))
        lines = [f"{'class':<{width}}  {'videos':>6}  {'AP':>6}  {'F1':>6}  {'from':>6}"]
        columns = (self.truth.sum(axis=0), self.average_precision, *reversed(self.thresholds))
        for label, videos, ap, f1, least in zip(self.labels, *columns):
            if videos:
                numbers = f"{videos:>6}  {ap:>6.1%}  {f1:>6.1%}  {_rounded_down(least):>6}"
                lines.append(f"{label:<{width}}  {numbers}")
        least, f1 = self.common_threshold
        if self.truth.any():
            lines.append(
                f"all together: F1 {f1:.1%} from {_rounded_down(least)} (predict --threshold)"
            )
        if len(rows := self.worst(worst)):
            lines += ["", "worst predictions, the largest loss first:"]
            lines += [f"  {self._described(row)}" for row in rows] + [""]
        return "\n".join([*lines, self.summary()])

    def _described(self, row: int) -> str:
        p, truth = self.probabilities[row], self.truth[row]
        labels = ", ".join(f"{self.labels[i]} ({p[i]:.1%})" for i in np.flatnonzero(truth))
        others = np.flatnonzero(~truth)
        line = f"{self.ids[row]}: {labels or 'no label'}"
        if len(others):
            first = others[p[others].argmax()]
            line += f"; of the others most probable {self.labels[first]} ({p[first]:.1%})"
        return line


def average_precision(truth: np.ndarray, scores: np.ndarray) -> float:
    """The mean, over the positives, of the precision among all that score at least as much.

    Args:
      truth: (m,) bool. scores: (m,).

    Returns:
      In (0, 1]; NaN without a positive.
    """
    if not truth.any():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    found = truth[order].cumsum()
    # Of equal scores all are taken together: the order in which they come must not matter.
    last = np.searchsorted(-scores[order], -scores[order], side="right") - 1
    precision = found[last] / (last + 1)
    return float(precision[truth[order]].mean())


def best_threshold(truth: np.ndarray, scores: np.ndarray) -> tuple[float, float]:
    """The score from which on a label is given, for the best F1; of equal ones the highest.

    F1 is the harmonic mean of precision and recall. It is the best of these videos: on others
    expect a little less.

    Args:
      truth: (m,) bool. scores: (m,).

    Returns:
      The threshold, a score of a positive, and its F1; NaN without a positive.
    """
    if not truth.any():
        return float("nan"), float("nan")
    candidates = np.unique(scores[truth])[::-1]
    given = np.searchsorted(np.sort(-scores), -candidates, side="right")
    right = np.searchsorted(np.sort(-scores[truth]), -candidates, side="right")
    f1 = 2 * right / (given + truth.sum())
    best = f1.argmax()
    return float(candidates[best]), float(f1[best])


def _rounded_down(threshold: float) -> str:
    """With three decimals, and never more than it is: `predict` is given what is printed."""
    rounded = round(float(threshold), 3)
    return f"{rounded if rounded <= threshold else rounded - 0.001:.3f}"


def _numbers(names: Iterable[str], values: Iterable[float]) -> dict[str, float | None]:
    """By name, for JSON, which has no NaN."""
    return {name: None if np.isnan(x) else float(x) for name, x in zip(names, values)}


def accuracy_line(results: dict[str, Any]) -> str:
    """One line of `to_json`: the accuracy, and the numbers of videos, views and crops."""
    if "mAP" in results:
        accuracy = f"mAP {results['mAP']:.2%}"
    else:
        accuracy = f"top-1 {results['top1']:.2%}"
        if "top5" in results:
            accuracy += f"  top-5 {results['top5']:.2%}"
    return (
        f"{accuracy}  of {results['videos']} videos, {results['views']} x {results['crops']} views"
    )


def by_name(labels: Sequence[str], names: Sequence[str]) -> np.ndarray | None:
    """(len(labels),) int, the place of each label in `names`; None if one of them is not there."""
    places = {name: place for place, name in enumerate(names)}
    if not set(labels) <= set(places):
        return None
    return np.array([places[label] for label in labels], np.int32)
