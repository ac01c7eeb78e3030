"""A clip of a video, and rules on lists of clips that follow from their ids alone."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from timesformer_jax.errors import InputError

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validate": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True)
class Clip:
    """A piece of a video file, and what it shows.

    path: of the video file, or of a folder of its frames as images, relative to the videos folder,
      with forward slashes.
    start, end: seconds from the beginning of the video, [start, end); None: no bound.
    split: `train`, `validation` or `test`; empty until `read` has assigned one.
    frame_range: [first, last) frames of the video, counted from 0; None: all. For a folder of
      images, (0, the number it must hold); None if that number is unknown.
    name: the id, where the publisher of the data set has one.
    """

    path: str
    label: str
    start: float | None
    end: float | None
    split: str
    frame_range: tuple[int, int] | None = None
    name: str = ""

    @property
    def id(self) -> str:
        """The name, or else the path and what of it: `cats/a.mp4`, `b.mp4#2-4.5`, `b.mp4#f0-90`."""
        if self.name:
            return self.name
        trimmed = self.path
        if self.start is not None or self.end is not None:
            trimmed += f"#{_seconds(self.start)}-{_seconds(self.end)}"
        if self.frame_range is not None:
            trimmed += "#f{}-{}".format(*self.frame_range)
        return trimmed


# A row is where a clip was read from, for messages (`clips.csv line 7`), and the clip.
Row = tuple[str, Clip]


class ParsedAnnotations(NamedTuple):
    """What the reader of a data set found.

    rows: of every clip with a label. labels: names in class order, where the publisher gives one.
    notes: what a person should know of the list, a line each.
    published: count of each split that the publisher states, where it is not the data set's usual.
    """

    rows: Sequence[Row]
    labels: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    published: Mapping[str, int] | None = None


def label_names(clips: Sequence[Clip]) -> tuple[str, ...]:
    """The label map when none is given: the distinct labels, sorted; the class is the position."""
    return tuple(sorted({clip.label for clip in clips}))


def name_classes(
    rows: Sequence[Row], names: Sequence[str] | None
) -> tuple[list[Row], tuple[str, ...]]:
    """Names classes that rows give by number, as text: by `names`, or else by the number itself.

    Returns:
      The rows, and the names of all classes in order, also of those that no row is of.

    Raises:
      InputError: a number that `names` does not reach.
    """
    if names is None:
        names = tuple(map(str, range(1 + max((int(clip.label) for _, clip in rows), default=-1))))
    named = []
    for where, clip in rows:
        if int(clip.label) >= len(names):
            raise InputError(
                f"{where}: class {clip.label} is beyond the {len(names)} labels (from 0);"
                " give the labels of these annotations"
            )
        named.append((where, replace(clip, label=names[int(clip.label)])))
    return named, tuple(names)


def assign_splits(clips: Sequence[Clip], validation_fraction: float) -> list[Clip]:
    """Gives clips without a split one: train, or for a fixed share of each label validation.

    Each label's clips are put in the order of a hash of their id, and the first
    round(fraction * n) are for validation: at least one and not all, if there are two or more.
    So the choice is the same on every machine and does not follow the order of the names.
    """
    unassigned = defaultdict(list)
    for clip in clips:
        if not clip.split:
            unassigned[clip.label].append(clip.id)
    validation = set()
    for ids in unassigned.values():
        share = round(validation_fraction * len(ids))
        if validation_fraction > 0:
            share = min(max(share, 1), len(ids) - 1)
        validation.update(sorted(ids, key=clip_hash)[:share])
    return [
        clip
        if clip.split
        else replace(clip, split="validation" if clip.id in validation else "train")
        for clip in clips
    ]


def clip_hash(clip_id: str) -> bytes:
    """An order for clips that is the same everywhere and has nothing to do with their names."""
    return hashlib.sha256(clip_id.encode()).digest()


def _seconds(value: float | None) -> str:
    return "" if value is None else str(value).removesuffix(".0")
