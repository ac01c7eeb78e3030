"""Which split and label each prepared record has, drawn from the clips that could be decoded."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from etils import epath

from timesformer_jax.data.annotations import Clip, Listing, assign_splits
from timesformer_jax.data.annotations.listing import SPLIT_ORDER
from timesformer_jax.data.layout import SPLITS_FILE
from timesformer_jax.data.prepare.shards import read_manifests
from timesformer_jax.data.records.split import Reassigned
from timesformer_jax.errors import InputError
from timesformer_jax.storage import write_atomically

# Of more classes, the table has only those with the fewest clips.
MAX_CLASSES = 50
SHOWN_CLASSES = 10


def fingerprint(listing: Listing) -> str:
    """Of the clips, their labels and their splits.

    Without the paths: a video that was missing may be added under any name.
    """
    clips = [(clip.id, clip.label, clip.split) for clip in listing.clips]
    return hashlib.sha256(repr((clips, listing.labels)).encode()).hexdigest()


def draw_splits(
    output: epath.Path, listing: Listing, validation_fraction: float, *, again: bool
) -> list[Clip]:
    """Draws the splits among the clips that were decoded, so that no class loses its validation to
    a clip that cannot be used. Writes splits.json if the result differs from the shards'.

    Args:
      output: a prepared directory whose shards are done.
      listing: the clips; their drawn splits count files that could not be decoded too.
      validation_fraction: as for `prepare`.
      again: labels and splits may be others than the shards were written for.

    Returns:
      The decoded clips, with their splits.

    Raises:
      InputError: a clip is in no shard.
    """
    manifests = read_manifests(output)
    decoded = {row["video"] for manifest in manifests for row in manifest["records"]}
    failed = {row["id"] for manifest in manifests for row in manifest["failures"]}
    kinds = {isinstance(row["label"], list) for m in manifests for row in m["records"]}
    if kinds and kinds != {listing.multilabel}:
        raise InputError(
            f"{output} was prepared {'with' if True in kinds else 'without'} --multilabel; do the"
            " same here, or choose another output"
        )
    if unknown := [clip.id for clip in listing.clips if clip.id not in decoded | failed]:
        raise InputError(
            f"{len(unknown)} of {len(listing.clips)} clips are not in {output} (first:"
            f" {unknown[0]}); prepare all of them to another folder"
        )
    here = [clip for clip in listing.clips if clip.id in decoded]
    clips = assign_splits(here, validation_fraction)
    path = output / SPLITS_FILE
    if not again and clips == here:
        path.unlink(missing_ok=True)
        return clips
    by_id = {clip.id: clip for clip in clips}
    records: defaultdict[str, dict[str, str | list[str]]] = defaultdict(dict)
    for manifest in manifests:
        for row in manifest["records"]:
            if clip := by_id.get(row["video"]):
                label = clip.label if clip.labels is None else list(clip.labels)
                records[clip.split][row["id"]] = label
    found = Reassigned(listing.labels, records, fingerprint(listing))
    write_atomically(path, found.to_json())
    return clips


def reassigned_clips(output: epath.Path, listing: Listing, reassigned: Reassigned) -> list[Clip]:
    """The decoded clips that splits.json has, with its labels and splits.

    Args:
      output: a prepared directory whose shards are done.
      listing: the clips that the shards were written for.
      reassigned: the content of splits.json.
    """
    by_id = {clip.id: clip for clip in listing.clips}
    video_of = {row["id"]: row["video"] for m in read_manifests(output) for row in m["records"]}
    found: dict[str, Clip] = {}
    for split, records in reassigned.splits.items():
        for record, label in records.items():
            if (video := video_of.get(record)) is None:
                continue
            one, several = (label, None) if isinstance(label, str) else ("", tuple(label))
            found[video] = replace(by_id[video], split=split, label=one, labels=several)
    return list(found.values())


def class_table(clips: Sequence[Clip], labels: Sequence[str]) -> str:
    """The number of clips of each class in each split; of many classes those with the fewest."""
    counts = Counter((name, clip.split) for clip in clips for name in clip.names)
    splits = [split for split in SPLIT_ORDER if any(s == split for _, s in counts)]
    rows: list[tuple[Any, ...]] = [
        (label, *(counts[label, split] for split in splits)) for label in labels
    ]
    fewest = sorted(rows, key=lambda row: row[1:])[:SHOWN_CLASSES]
    shown = rows if len(rows) <= MAX_CLASSES else fewest
    width = max(map(len, ("class", *labels)))
    lines = [f"  {'class':<{width}}" + "".join(f"  {split:>10}" for split in splits)]
    for label, *row in shown:
        lines.append(f"  {label:<{width}}" + "".join(f"  {count:>10}" for count in row))
    if len(rows) > len(shown):
        lines.append(f"  ... the other {len(rows) - len(shown)} classes have more")
    return "\n".join(lines)
