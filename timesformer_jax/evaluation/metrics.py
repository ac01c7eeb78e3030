"""Top-1 and top-5 accuracy, overall and by class; every video counts once."""

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
      probabilities: (n, C), one row a record, in any order.
      video: (n,) int, the number of each record's video.

    Returns:
      (m, C) float64, the means of the m videos, in the order of their numbers; and (m,) int, the
      row of one record of each video.
    """
    _, first, place, records = np.unique(
        video, return_index=True, return_inverse=True, return_counts=True
    )
    total = np.zeros((len(first), probabilities.shape[1]))
    np.add.at(total, place, probabilities)
    return total / records[:, None], first


@dataclasses.dataclass(frozen=True)
class Results:
    """The counts of an evaluation.

    Attributes:
      labels: class names, C of them.
      videos: (C,) int, the number of videos of each class.
      top1, top5: (C,) int, how many of them were predicted right by the top 1, the top 5.
      views, crops: clips a video and crops a clip whose probabilities were averaged.
    """

    labels: tuple[str, ...]
    videos: np.ndarray
    top1: np.ndarray
    top5: np.ndarray
    views: int = 1
    crops: int = 1

    @classmethod
    def count(cls, probabilities: np.ndarray, truth: np.ndarray, labels, **views) -> Results:
        """Compares predictions, (n, C) probabilities, with the true classes, (n,) int."""
        classes = len(labels)
        # The rank of the true class; of equal probabilities the lower class index comes first.
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
        """top1 and top5 as fractions and the number of videos: of all, and of every class."""
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
        """One line: the accuracy, and the numbers of videos, views and crops."""
        found = self.to_json()
        return (
            f"top-1 {found['top1']:.2%}  top-5 {found['top5']:.2%}  of {found['videos']} videos, "
            f"{self.views} x {self.crops} views"
        )

    def table(self) -> str:
        """One line for each class that has videos, then the summary."""
        width = max(len(label) for label in self.labels)
        lines = [f"{'class':<{width}}  {'videos':>6}  {'top-1':>6}  {'top-5':>6}"]
        for label, videos, top1, top5 in zip(self.labels, self.videos, self.top1, self.top5):
            if videos:
                share1, share5 = f"{top1 / videos:.1%}", f"{top5 / videos:.1%}"
                lines.append(f"{label:<{width}}  {videos:>6}  {share1:>6}  {share5:>6}")
        return "\n".join([*lines, self.summary()])

    def save(self, path: str | os.PathLike, **more: Any) -> None:
        """Writes `to_json` and the fields of `more` to a JSON file, atomically."""
        content = json.dumps(more | self.to_json(), indent=2) + "\n"
        storage.write_atomically(storage.absolute(path), content.encode())
