"""The clips of a data set, and a report on missing files."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from timesformer_jax.data.annotations.clips import Clip

SPLIT_ORDER = ("train", "validation", "test")


@dataclass(frozen=True)
class Listing:
    """The clips of a data set; the same on every machine that has the same files.

    clips: sorted by id, including those whose file is missing.
    labels: the label map; the class is the position.
    missing: ids of the clips whose file is not in the folder.
    unlisted: video files in the folder that no clip uses, relative to it, `storage.as_text`.
    published_counts: clips of each split that the publisher states; empty for custom data.
    notes: more remarks for the user, one line each.
    """

    clips: tuple[Clip, ...]
    labels: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unlisted: tuple[str, ...] = ()
    published_counts: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def multilabel(self) -> bool:
        """Whether a clip may have any number of labels."""
        return any(clip.labels is not None for clip in self.clips)

    def report(self) -> str:
        """The available share of each split, and the missing and unlisted files, one line each."""
        listed = Counter(clip.split for clip in self.clips)
        absent = frozenset(self.missing)
        here = Counter(clip.split for clip in self.clips if clip.id not in absent)
        report = [
            _share(split, listed[split], here[split], self.published_counts.get(split))
            for split in SPLIT_ORDER
            if split in listed or split in self.published_counts
        ]
        if self.missing:
            report.append(_some("listed clips have no file", self.missing))
        if self.unlisted:
            report.append(_some("video files are in no list", self.unlisted))
        return "\n".join([*report, *self.notes])


def _share(split: str, listed: int, here: int, published: int | None) -> str:
    line = f"{split}: none listed"
    if listed:
        line = f"{split}: {here:,} of {listed:,} listed are here ({here / listed:.1%})"
    return f"{line}; published {published:,} ({here / published:.1%})" if published else line


def _some(what: str, names: Sequence[str], most: int = 3) -> str:
    more = ", ..." if len(names) > most else ""
    return f"{len(names):,} {what}: {', '.join(names[:most])}{more}"
