"""What is wrong with a data set: one list, which `check`, `prepare` and training all tell.

An error is damage, or leaves nothing to train or to measure with. With a warning the work goes on,
without a clip or with a result that is worth less.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from timesformer_jax.data.annotations import Clip
from timesformer_jax.data.layout import INFO_FILE

NO_TRAINING = (
    "no clip is for training, so that only `evaluate` can use the data: give clips the split train,"
    " or no split, so that it is drawn"
)
NO_VALIDATION = (
    "no clip is for validation, so that training cannot measure its accuracy: add videos, or train"
    " with --config.data.eval_split=train, which measures it with the training clips"
)

RUN_AGAIN = "run `timesformer prepare` again with the arguments it had"
REWRITE_INDEX = f"delete {INFO_FILE} and {RUN_AGAIN}: it writes the indices again, and no shard"

# Names of a line; the others are counted.
SHOWN = 3


class Problem(NamedTuple):
    """Something that is wrong.

    Attributes:
      text: what, and what to do; one line.
      is_error: see above; otherwise it is a warning.
    """

    text: str
    is_error: bool = False

    def __str__(self) -> str:
        return f"{'error' if self.is_error else 'warning'}: {self.text}"


def of_classes(counts: Mapping[str, tuple[int, Any]], labels: Sequence[str]) -> list[Problem]:
    """What is wrong with the numbers of clips of each class.

    Args:
      counts: for each split that has clips, their number, and (classes,) int, that of each class.
      labels: class names.
    """
    found = []
    if "train" not in counts:
        found.append(Problem(NO_TRAINING, True))
    if not counts.keys() - {"train"}:
        found.append(Problem(NO_VALIDATION, True))
    if "train" not in counts:
        return found
    clips, of_class = counts["train"]
    of_class = np.asarray(of_class)
    if clips < len(labels):
        found.append(Problem(f"{clips} training clips are fewer than the {len(labels)} classes"))
    for number, what in ((0, "no training clip: it cannot be learned"), (1, "one training clip")):
        if text := _classes(labels, of_class == number):
            found.append(Problem(f"{text} with {what}"))
    for split, (_, held_out) in counts.items():
        if split == "train":
            continue
        if text := _classes(labels, (np.asarray(held_out) == 0) & (of_class > 0)):
            found.append(Problem(f"{text} without a clip in {split}"))
    return found


def of_clips(clips: Sequence[Clip], labels: Sequence[str]) -> list[Problem]:
    """What is wrong with a list of clips.

    Args:
      clips: those that can be used, with their splits.
      labels: class names.
    """
    total: Counter[str] = Counter()
    of_class: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for clip in clips:
        total[clip.split] += 1
        of_class[clip.split].update(clip.names)
    counts = {s: (n, [of_class[s][label] for label in labels]) for s, n in total.items()}
    return of_classes(counts, labels) + _shared_videos(clips)


def _shared_videos(clips: Sequence[Clip]) -> list[Problem]:
    """The videos whose clips were drawn for training and for validation.

    `assign_splits` does that where all clips of a label are of one video, or those of a video have
    several labels.
    """
    splits, labels = defaultdict(set), defaultdict(set)
    for clip in clips:
        if clip.drawn:
            splits[clip.path].add(clip.split)
            labels[clip.path].add(clip.label)
    shared = [path for path in sorted(splits) if len(splits[path]) > 1]
    if not shared:
        return []
    names = some([f"{path} of {', '.join(sorted(labels[path]))}" for path in shared])
    return [
        Problem(
            f"{len(shared)} video{'s' * (len(shared) > 1)} ({names}) with clips in training and in"
            " validation: add videos of these classes, or give the clips a split"
        )
    ]


def count_classes(
    label: np.ndarray, video: np.ndarray, targets: np.ndarray | None, classes: int
) -> tuple[int, np.ndarray]:
    """The number of videos among records, and (classes,) int, that of each class.

    Args:
      label: (n,) int, the class of each record; those outside of the classes are not counted.
      video: (n,) int, its video; several records may be of one.
      targets: (n, classes) bool, of multi-label records in place of `label`; else None.
      classes: how many there are.
    """
    _, first = np.unique(video, return_index=True)
    if targets is not None:
        return len(first), targets[first].sum(axis=0)
    of_videos = label[first]
    of_videos = of_videos[(of_videos >= 0) & (of_videos < classes)]
    return len(first), np.bincount(of_videos, minlength=classes)


def some(names: Sequence[str]) -> str:
    """The first names, with commas, and dots for the others."""
    return ", ".join(names[:SHOWN]) + ", ..." * (len(names) > SHOWN)


def _classes(labels: Sequence[str], chosen: np.ndarray) -> str:
    """The chosen classes by number and name; empty for none."""
    names = [labels[i] for i in np.flatnonzero(chosen).tolist()]
    return f"{len(names)} class{'es' * (len(names) > 1)} ({some(names)})" if names else ""
