"""A clip of a video, and functions on lists of clips that depend only on the clips' ids."""

import hashlib
from collections import Counter, defaultdict
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
    """A part of a video file, with its label.

    path: of the video file, or of a folder of its frames as images; relative to the videos folder,
      with forward slashes.
    start, end: seconds from the beginning of the video, [start, end); None: no bound.
    split: `train`, `validation` or `test`; empty until `read` has assigned one.
    frame_range: [first, last) frames of the video, counted from 0; None: all. For a folder of
      images, (0, the number it must hold); None if that number is unknown.
    name: the publisher's id of the clip; empty if there is none.
    labels: of multi-label data, the names in `label`, sorted; may be empty. None: one label.
    drawn: the split is `assign_splits`'s choice, and not the annotations'.
    """

    path: str
    label: str
    start: float | None
    end: float | None
    split: str
    frame_range: tuple[int, int] | None = None
    name: str = ""
    labels: tuple[str, ...] | None = None
    drawn: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The labels: one, or any number in multi-label data."""
        return (self.label,) if self.labels is None else self.labels

    @property
    def id(self) -> str:
        """The name, or else path and range: `cats/a.mp4`, `b.mp4#2-4.5` (s), `b.mp4#f0-90`."""
        if self.name:
            return self.name
        identifier = self.path
        if self.start is not None or self.end is not None:
            identifier += f"#{_seconds(self.start)}-{_seconds(self.end)}"
        if self.frame_range is not None:
            identifier += "#f{}-{}".format(*self.frame_range)
        return identifier


# The place that a clip was read from, for messages (`clips.csv line 7`), and the clip.
Row = tuple[str, Clip]


class ParsedAnnotations(NamedTuple):
    """What the reader of a data set returns.

    rows: all clips with a label. labels: names in class order, if the publisher defines an order.
    notes: remarks on the list for the user, one line each.
    published_counts: clips of each split that the publisher states, if they differ from the data
    set's in DATASETS.
    """

    rows: Sequence[Row]
    labels: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    published_counts: Mapping[str, int] | None = None


def label_names(clips: Sequence[Clip]) -> tuple[str, ...]:
    """The default label map: the distinct labels, sorted. The class is the position."""
    return tuple(sorted({name for clip in clips for name in clip.names}))


def name_classes(
    rows: Sequence[Row], names: Sequence[str] | None
) -> tuple[list[Row], tuple[str, ...]]:
    """Replaces labels that are class numbers, as text, by `names`, or keeps them if that is None.

    Returns:
      The rows, and the names of all classes in order, also of classes without a row.

    Raises:
      InputError: a class number that `names` does not have.
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
    """Assigns clips without a split to validation, a fixed fraction of each label, or to train.

    A split that this function drew before, of another list of clips, is drawn again.

    A clip with several labels counts for the one that the fewest clips have. The clips of a label
    that are of one file stay together. The n files of a label are sorted by a hash of their clips'
    ids, and the first round(fraction * n) are for validation: of two or more files at least one,
    and not all. Where all clips of a label are of one file, they are drawn one by one. So the
    result is the same on every machine, and independent of the order of the names.
    """
    count = Counter(name for clip in clips for name in clip.names)
    unassigned: defaultdict[str, defaultdict[str, list[str]]] = defaultdict(
        lambda: defaultdict(list)
    )
    first: dict[str, bytes] = {}  # of each file: if it has clips of several labels, they go alike
    for clip in clips:
        if not clip.split or clip.drawn:
            rarest = min(clip.names, key=lambda name: (count[name], name), default="")
            unassigned[rarest][clip.path].append(clip.id)
            key = clip_hash(clip.id)
            first[clip.path] = min(first.get(clip.path, key), key)
    validation: set[str] = set()
    for by_file in unassigned.values():
        drawn = [by_file[path] for path in sorted(by_file, key=first.__getitem__)]
        if len(drawn) == 1:
            drawn = [[clip] for clip in sorted(drawn[0], key=clip_hash)]
        share = round(validation_fraction * len(drawn))
        if validation_fraction > 0:
            share = min(max(share, 1), len(drawn) - 1)
        validation.update(*drawn[:share])
    return [
        clip
        if clip.split and not clip.drawn
        else replace(clip, split="validation" if clip.id in validation else "train", drawn=True)
        for clip in clips
    ]


def clip_hash(clip_id: str) -> bytes:
    """The SHA-256 of a clip's id: a sort key that is the same everywhere and shuffles the names."""
    return hashlib.sha256(clip_id.encode()).digest()


def _seconds(value: float | None) -> str:
    return "" if value is None else str(value).removesuffix(".0")
