"""Top-k accuracy and its table by class, counted exactly, a video once."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

import numpy as np

from timesformer_jax import storage


def average_pieces(probabilities: np.ndarray, video: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean prediction of each video over its records.

    Args:
      probabilities: (n, C), a row a record, in any order.
      video: (n,) int, which video each is of.

    Returns:
      (m, C) float64 of the m videos, in the order of their numbers, and (m,) int, for each the row
      of one of its records.
    """
    _, first, place, records = np.unique(
        video, return_index=True, return_inverse=True, return_counts=True
    )
    total = np.zeros((len(first), probabilities.shape[1]))
    np.add.at(total, place, probabilities)
    return total / records[:, None], first


@dataclasses.dataclass(frozen=True)
class Results:
    """What an evaluation found.

    Attributes:
      labels: class names, C of them.
      videos: (C,) int, videos of each class.
      top1, top5: (C,) int, how many of them had their class first, among the first five.
      views, crops: clips a video and squares a clip whose probabilities were averaged.
    """

    labels: tuple[str, ...]
    videos: np.ndarray
    top1: np.ndarray
    top5: np.ndarray
    views: int = 1
    crops: int = 1

    @classmethod
    def count(cls, probabilities: np.ndarray, truth: np.ndarray, labels, **views) -> Results:
        """Counts predictions, (n, C) probabilities, against (n,) class indices."""
        classes = len(labels)
        # The rank of the true class; of equal probabilities the earlier class counts as better.
        order = np.argsort(-probabilities, axis=1, kind="stable")
        rank = (order == truth[:, None]).argmax(axis=1)

        def by_class(rows):
            return np.bincount(truth[rows], minlength=classes)

        return cls(
            labels=tuple(labels),
            videos=by_class(np.full(len(truth), True)),
            top1=by_class(rank < 1),
            top5=by_class(rank < 5),
            **views,
        )

    def to_json(self) -> dict[str, Any]:
        """top1 and top5 as fractions of all videos, the count, and the same for every class."""
        total = int(self.videos.sum())
        return {
            "top1": self.top1.sum() / total,
            "top5": self.top5.sum() / total,
            "videos": total,
            "views": self.views,
            "crops": self.crops,
            "classes": {
                label: {
                    "top1": top1 / videos if videos else None,
                    "top5": top5 / videos if videos else None,
                    "videos": videos,
                }
                for label, videos, top1, top5 in zip(
                    self.labels, self.videos.tolist(), self.top1.tolist(), self.top5.tolist()
                )
            },
        }

    def summary(self) -> str:
        """One line: accuracy, and over what."""
        found = self.to_json()
        return (
            f"top-1 {found['top1']:.2%}  top-5 {found['top5']:.2%}  of {found['videos']} videos, "
            f"{self.views} x {self.crops} views"
        )

    def table(self) -> str:
        """A line for each class that has videos, the summary last."""
        width = max(len(label) for label in self.labels)
        lines = [f"{'class':<{width}}  {'videos':>6}  {'top-1':>6}  {'top-5':>6}"]
        for label, videos, top1, top5 in zip(self.labels, self.videos, self.top1, self.top5):
            if videos:
                share1, share5 = f"{top1 / videos:.1%}", f"{top5 / videos:.1%}"
                lines.append(f"{label:<{width}}  {videos:>6}  {share1:>6}  {share5:>6}")
        return "\n".join([*lines, self.summary()])

    def save(self, path: str | os.PathLike, **more: Any) -> None:
        """Writes `to_json`, and what else is given, whole or not at all."""
        content = json.dumps(more | self.to_json(), indent=2) + "\n"
        storage.write_atomically(storage.absolute(path), content.encode())
