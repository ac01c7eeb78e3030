"""What describes the shards of a prepared directory: indices, label names, TFDS's files, a summary.

All of it follows from the manifests of the shards.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from etils import epath

from timesformer_jax.data.annotations import Clip
from timesformer_jax.data.layout import FAILURES_FILE, PLACE, places_path
from timesformer_jax.data.prepare.shards import Shard, read_manifests
from timesformer_jax.data.prepare.splits import class_table
from timesformer_jax.data.problems import Problem, of_clips
from timesformer_jax.data.records import places
from timesformer_jax.data.records.quiet_import import import_prepared
from timesformer_jax.errors import InputError


@dataclass(frozen=True)
class Summary:
    """What a prepared directory holds.

    output: the directory. clips, records: how many each split has; a long clip may be cut into
    several records. classes: number of labels. failures: number of clips that are missing or could
    not be decoded; failures.csv lists them. num_bytes: size of all shards. table: text, the clips
    of each class in each split. problems: what is wrong with these, as `timesformer check` finds
    it.
    """

    output: str
    clips: dict[str, int]
    records: dict[str, int]
    classes: int
    failures: int
    num_bytes: int
    table: str
    problems: tuple[Problem, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.output}: {self.classes} classes, {self.num_bytes / 1e6:.1f} MB"]
        for split, count in self.clips.items():
            records = self.records[split]
            cut = f" in {records} records" if records != count else ""
            lines.append(f"  {split}: {count} clips{cut}")
        lines.append(self.table)
        if self.failures:
            listed = os.path.join(self.output, FAILURES_FILE)
            lines.append(
                f"  {self.failures} clips are missing or not decoded; see the reasons in {listed}"
            )
        return "\n".join([*lines, *map(str, self.problems)])


def write_description(
    output: epath.Path, name: str, shards: Sequence[Shard], label_names: Sequence[str]
) -> None:
    """Writes the index and the places of each split, the label names and TFDS's description.

    Args:
      name: of the data set.

    Raises:
      InputError: no clip of a split that the annotations state could be decoded.
    """
    by_split: defaultdict[str, dict] = defaultdict(dict)
    clips_of: defaultdict[str, list[Clip]] = defaultdict(list)
    for shard in shards:
        by_split[shard.split][shard.name] = shard.read_manifest()
        clips_of[shard.split] += shard.clips
    for split, manifests in by_split.items():
        if not all(clip.drawn for clip in clips_of[split]):
            _require_records(output, split, list(manifests.values()))
    multilabel = any(clip.labels is not None for shard in shards for clip in shard.clips)
    prepared = import_prepared()
    for split, manifests in by_split.items():
        rows = _index_rows(list(manifests.values()))
        prepared.write_index(os.fspath(output), split, list(manifests), rows, multilabel)
        found = (_places(shard) for shard in shards if shard.split == split)
        header = places.header(list(manifests), [[row[c] for row in rows] for c in places.COLUMNS])
        places.write(places_path(os.fspath(output), split), header, found)
    lengths, sizes = {}, {}
    for split, manifests in by_split.items():
        lengths[split] = [len(manifest["records"]) for manifest in manifests.values()]
        sizes[split] = sum(manifest["bytes"] for manifest in manifests.values())
    prepared.write_metadata(os.fspath(output), name, label_names, lengths, sizes, multilabel)


def _places(shard: Shard) -> bytes:
    """The places of a shard's frames; from its records, if an earlier version wrote the shard."""
    records = [
        (shard.path, row["offset"], row["size"], -(-row["num_frames"] // row["stride"]))
        for row in shard.read_manifest()["records"]
    ]
    if shard.places_path.exists():
        written = shard.places_path.read_bytes()
        if len(written) == PLACE.itemsize * sum(count for *_, count in records):
            return written
    return b"".join(places.of_records(records))


def _require_records(output: epath.Path, split: str, manifests: Sequence[Mapping]) -> None:
    if not any(manifest["records"] for manifest in manifests):
        first = manifests[0]["failures"][0]
        raise InputError(
            f"none of the clips of {split} could be decoded (first: {first['path']}:"
            f" {first['reason']}); see {output / FAILURES_FILE}"
        )


def _index_rows(manifests: Sequence[Mapping]) -> list[dict]:
    """The rows of a split's index, with the shard and the video by number."""
    rows = [{**row, "shard": i} for i, m in enumerate(manifests) for row in m["records"]]
    numbers = {video: i for i, video in enumerate(dict.fromkeys(row["video"] for row in rows))}
    return [{**row, "video": numbers[row["video"]]} for row in rows]


def summarize(output: epath.Path, clips: Sequence[Clip], labels: Sequence[str]) -> Summary:
    """Counts the decoded clips, with their splits, and what is in the shards."""
    split_of = {clip.id: clip.split for clip in clips}
    manifests = read_manifests(output)
    records = Counter(
        split_of[row["video"]]
        for manifest in manifests
        for row in manifest["records"]
        if row["video"] in split_of
    )
    return Summary(
        output=os.fspath(output),
        clips=dict(sorted(Counter(split_of.values()).items())),
        records=dict(records),
        classes=len(labels),
        failures=sum(len(manifest["failures"]) for manifest in manifests),
        num_bytes=sum(manifest["bytes"] for manifest in manifests),
        table=class_table(clips, labels),
        problems=tuple(of_clips(clips, labels)),
    )
