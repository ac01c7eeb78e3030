"""Checks a prepared directory: every byte of its shards, and each file against the others.

`prepare` takes a shard for done if it has the size that its manifest says. So what this finds
damaged is to be deleted; `prepare` then makes that shard again, and the descriptions of all.
"""

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from zipfile import BadZipFile

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from etils import epath
from tqdm import tqdm

from timesformer_jax.data.check.check import is_chosen, table
from timesformer_jax.data.layout import (
    FAILURES_FILE,
    INDEX_DTYPES,
    INFO_FILE,
    LABELS_FILE,
    MANIFESTS,
    OPTIONS_FILE,
)
from timesformer_jax.data.records import prepared as records
from timesformer_jax.data.records.open import open_split
from timesformer_jax.data.records.split import Split
from timesformer_jax.data.records.wire import RECORD_OVERHEAD_BYTES
from timesformer_jax.errors import InputError
from timesformer_jax.workers import available_cores

AGAIN = "run `timesformer prepare` again with the arguments it had"
REMAKE_SHARD = f"delete it and {AGAIN}: it makes only this shard anew"
REMAKE_INDEX = f"delete {INFO_FILE} and {AGAIN}: it writes what describes the shards, and no shard"

# A label histogram of more classes is shown by its ends.
MOST_CLASSES = 50
ENDS = 5

READ_AHEAD_BYTES = 8 << 20

# What reading a file that is not there, not allowed or not what it should be raises.
UNREADABLE = (OSError, EOFError, KeyError, ValueError, BadZipFile, tf.errors.OpError)


@dataclass(frozen=True)
class _Shard:
    """A shard as its split's index has it.

    path: of the file. manifest: of what `prepare` noted of it; None if there are no manifests.
    rows: of its records, in order: `id` and the columns of INDEX_DTYPES.
    """

    path: epath.Path
    manifest: epath.Path | None
    rows: Sequence[Mapping]


@dataclass(frozen=True)
class _Found:
    """What there is of a shard. num_bytes: its size, 0 if it is missing."""

    num_bytes: int
    problems: Sequence[str]


def check_prepared(
    directory: str | os.PathLike, share: float, workers: int
) -> tuple[str, list[str]]:
    """Checks a prepared directory.

    Args:
      directory: on gs:// too.
      share: of the records, whose frames are decoded.
      workers: threads; 0: as many as there are processors.

    Returns:
      What the directory holds, and a line a problem.

    Raises:
      InputError: no such folder, or not a (wholly) prepared one.
    """
    root = epath.Path(directory)
    _require_prepared(root)
    splits, problems = _open_splits(root)
    for split in splits:
        problems += _check_index(split)
    shards = [shard for split in splits for shard in _shards(root, split)]
    found = _check_shards(shards, share, workers)
    problems += _check_description(root, splits, found)
    # An index that cannot be read names no shard, and what it does not name is no stray then.
    problems += _strays(root, known=None if problems else found.keys())
    problems += (problem for shard in found.values() for problem in shard.problems)
    return _summary(root, splits, found, share), problems


def _require_prepared(root: epath.Path) -> None:
    if not root.is_dir():
        raise InputError(f"there is no folder {root}; give one that `timesformer prepare` made")
    if not (root / OPTIONS_FILE).exists() and not records.split_names(os.fspath(root)):
        raise InputError(
            f"{root} was not made by `timesformer prepare`, and only what it makes can be checked"
        )
    if not (root / INFO_FILE).exists():
        manifests = root / MANIFESTS
        done = len(list(manifests.glob("*.json"))) if manifests.is_dir() else 0
        raise InputError(
            f"{root} is prepared in part: {done} shards are done, and {INFO_FILE}, which is written"
            f" last, is not there; {AGAIN}: it goes on where it was"
        )


# ---- the index ----------------------------------------------------------------------------------


def _open_splits(root: epath.Path) -> tuple[list[Split], list[str]]:
    """The splits, and a problem for each that cannot be opened."""
    splits, problems = [], []
    for name in records.split_names(os.fspath(root)):
        try:
            splits.append(open_split(root, name))
        except InputError as error:
            problems.append(str(error))
        except UNREADABLE as error:
            problems.append(
                f"the index of {name} or the labels cannot be read ({_reason(error)});"
                f" {REMAKE_INDEX}"
            )
    return splits, problems


def _check_index(split: Split) -> Iterator[str]:
    for column, count in (("shard", len(split.files)), ("label", len(split.label_names))):
        values = getattr(split, column)
        for i in np.flatnonzero((values < 0) | (values >= count)):
            yield (
                f"the index of {split.name} has {split.ids[i]} with {column} {values[i]} of"
                f" {count}; {REMAKE_INDEX}"
            )
    for clip, count in Counter(split.ids.tolist()).items():
        if count > 1:
            yield f"the index of {split.name} has {clip} {count} times; {REMAKE_INDEX}"


def _shards(root: epath.Path, split: Split) -> list[_Shard]:
    manifests = root / MANIFESTS if (root / MANIFESTS).is_dir() else None
    rows = [[] for _ in split.files]
    columns = (getattr(split, column).tolist() for column in INDEX_DTYPES)
    for clip, *values in zip(split.ids.tolist(), *columns):
        row = {"id": clip, **dict(zip(INDEX_DTYPES, values))}
        if 0 <= row["shard"] < len(rows):
            rows[row["shard"]].append(row)
    return [
        _Shard(root / name, manifests and manifests / f"{name}.json", of_shard)
        for name, of_shard in zip(_file_names(split), rows)
    ]


def _file_names(split: Split) -> list[str]:
    return [os.path.basename(file) for file in split.files]


# ---- a shard ------------------------------------------------------------------------------------


def _check_shards(shards: Sequence[_Shard], share: float, workers: int) -> dict[str, _Found]:
    """Reads all shards; returns what there is of each, by name.

    In threads: what takes time is done by TensorFlow, outside of Python's lock.
    """
    found = {}
    with (
        tqdm(total=sum(len(shard.rows) for shard in shards), unit="record", desc="reading") as bar,
        ThreadPool(workers or available_cores()) as pool,
    ):
        for shard, of_shard in zip(shards, pool.imap(partial(_check_shard, share=share), shards)):
            found[shard.path.name] = of_shard
            bar.update(len(shard.rows))
    return found


def _check_shard(shard: _Shard, share: float) -> _Found:
    name = shard.path.name
    try:
        if not shard.path.exists():
            return _Found(0, [f"{name} is missing; {AGAIN}: it makes only this shard"])
        num_bytes = shard.path.stat().length
        faults = list(_faults(shard, num_bytes, share)) or list(_check_manifest(shard, num_bytes))
    except (OSError, tf.errors.OpError) as error:
        problem = f"{name} cannot be read ({_reason(error)}); see to that and check again"
        return _Found(0, [problem])
    return _Found(num_bytes, [f"{name} {fault}; {REMAKE_SHARD}" for fault in faults])


def _faults(shard: _Shard, num_bytes: int, share: float) -> Iterator[str]:
    """Reads the records one after the other; the reader compares both checksums of each."""
    dataset = iter(tf.data.TFRecordDataset(os.fspath(shard.path), buffer_size=READ_AHEAD_BYTES))
    position = 0
    for number, row in enumerate(shard.rows):
        where = f"record {number} ({row['id']})"
        try:
            serialized = next(dataset, None)
        except tf.errors.DataLossError as error:
            what = "is cut short" if "truncated" in error.message else "has a wrong checksum"
            yield f"{where} {what}, and those after it were not read"
            return
        if serialized is None:
            yield f"ends before {where}: it has {number} of {len(shard.rows)} records"
            return
        if differences := list(_differences(serialized, position, row, share)):
            yield f"{where}: {', '.join(differences)}"
        position += len(serialized.numpy()) + RECORD_OVERHEAD_BYTES
    if position < num_bytes:
        yield f"has {num_bytes - position} bytes after its {len(shard.rows)} records"


def _differences(serialized: tf.Tensor, position: int, row: Mapping, share: float) -> Iterator[str]:
    """What a record holds that is not what the index says of it."""
    try:
        record = records.parse(serialized)
    # TensorFlow's message has the record's bytes in it, which may be no text.
    except (tf.errors.InvalidArgumentError, UnicodeDecodeError):
        yield "it is not what `timesformer prepare` writes"
        return
    # A stride of 0 is not what any record has, and reported as that.
    stored = -(-row["num_frames"] // max(row["stride"], 1))
    found = {
        "id": record["id"].numpy().decode(errors="replace"),
        "offset": position,
        "size": len(serialized.numpy()),
        **{name: record[name].numpy() for name in ("label", "num_frames", "fps", "stride")},
        "stored frames": len(record["video"]),
    }
    for name, value in found.items():
        expected = {**row, "stored frames": stored}[name]
        if value != expected:
            yield f"{name} {value} where the index has {expected}"
    if is_chosen(row["id"], share):
        yield from _check_frames(record["video"], (row["height"], row["width"], 3))


def _check_frames(jpegs: tf.Tensor, expected: tuple[int, int, int]) -> Iterator[str]:
    for i, jpeg in enumerate(jpegs):
        try:
            shape = tuple(tf.io.decode_jpeg(jpeg).shape)
        except tf.errors.InvalidArgumentError:
            yield f"frame {i} cannot be decoded"
            return
        if shape != expected:
            yield f"frame {i} is of shape {shape} where the index has {expected}"
            return


def _check_manifest(shard: _Shard, num_bytes: int) -> Iterator[str]:
    """Without it, or by it, `prepare` makes the shard again."""
    if shard.manifest is None:  # left behind by who copied what training needs
        return
    try:
        manifest = json.loads(shard.manifest.read_text())
        noted = manifest["bytes"], [row["id"] for row in manifest["records"]]
    except UNREADABLE as error:
        yield f"has no manifest that can be read ({_reason(error)})"
        return
    ids = [row["id"] for row in shard.rows]
    if noted[0] != num_bytes:
        yield f"has {num_bytes} bytes where its manifest has {noted[0]}"
    if noted[1] != ids:
        yield f"has other records than its manifest ({len(ids)}, and {len(noted[1])} there)"


# ---- the files beside the shards ----------------------------------------------------------------


def _check_description(
    root: epath.Path, splits: Sequence[Split], found: Mapping[str, _Found]
) -> Iterator[str]:
    """Compares what TFDS makes of the directory with the indices, and with the shards' sizes."""
    try:
        info = tfds.builder_from_directory(root).info
        label_names = tuple(info.features["label"].names)
    except Exception as error:  # TFDS's own are of every kind
        yield f"TFDS cannot open {root} ({_reason(error)}); {REMAKE_INDEX}"
        return
    for name in sorted(set(info.splits) ^ set(records.split_names(os.fspath(root)))):
        has, lacks = (INFO_FILE, "index") if name in info.splits else ("index", INFO_FILE)
        yield f"the split {name} has no {lacks}, only its {has}; {REMAKE_INDEX}"
    if splits and label_names != splits[0].label_names:
        yield f"TFDS has other label names than {LABELS_FILE}; {REMAKE_INDEX}"
    for split in splits:
        if split.name in info.splits:
            of_split = {name: found[name] for name in _file_names(split)}
            for what in _misdescribed(info.splits[split.name], split, of_split):
                yield f"{INFO_FILE} has {what}; {REMAKE_INDEX}"


def _misdescribed(
    described: tfds.core.SplitInfo, split: Split, found: Mapping[str, _Found]
) -> Iterator[str]:
    if sorted(described.filenames) != sorted(found):
        yield f"{len(described.filenames)} shards of {split.name} where the index has {len(found)}"
        return
    indexed = Counter(split.shard.tolist())
    for i, (name, length) in enumerate(zip(found, described.shard_lengths)):
        if length != indexed[i]:
            yield f"{length} records in {name} where the index has {indexed[i]}"
    num_bytes = sum(shard.num_bytes for shard in found.values())
    # A shard of another size than it had is reported as that.
    if described.num_bytes != num_bytes and not any(shard.problems for shard in found.values()):
        yield f"{int(described.num_bytes)} bytes of {split.name} where the shards have {num_bytes}"


def _strays(root: epath.Path, known: Collection[str] | None) -> Iterator[str]:
    """Files that belong to nothing. known: names of the shards; None: they are not known."""
    for path in sorted((*root.glob("*.part"), *(root / MANIFESTS).glob("*.part"))):
        yield f"{path.relative_to(root)} is the rest of a run that was killed; delete it"
    for path in sorted(root.glob("*.tfrecord-*")):
        if known is not None and path.suffix != ".part" and path.name not in known:
            yield f"{path.name} is in no index; delete it"


# ---- what there is ------------------------------------------------------------------------------


def _summary(
    root: epath.Path, splits: Sequence[Split], found: Mapping[str, _Found], share: float
) -> str:
    failed = _failures(root)
    rows = [("split", "clips", "records", "shards", "MB", "frames", "short side", "fps", "failed")]
    for split in splits:
        rows.append(
            (
                split.name,
                len(np.unique(split.video)),
                len(split),
                len(split.files),
                f"{sum(found[name].num_bytes for name in _file_names(split)) / 1e6:.1f}",
                int(np.sum(-(-split.num_frames // np.maximum(split.stride, 1)))),
                _span(np.minimum(split.height, split.width)),
                _span(split.fps),
                "?" if failed is None else failed[split.name],
            )
        )
    decoded = sum(is_chosen(clip, share) for split in splits for clip in split.ids.tolist())
    read = f"{root}: every record is read, and the frames of {decoded} are decoded"
    return "\n".join([read, table(rows), *map(histogram, splits)])


def _failures(root: epath.Path) -> Counter | None:
    """How many clips of each split `prepare` could not decode; None where it left no word."""
    path = root / FAILURES_FILE
    if not path.exists():
        return None
    return Counter(row["split"] for row in csv.DictReader(path.read_text().splitlines()))


def _span(values: np.ndarray) -> str:
    low, high = values.min(), values.max()
    return f"{low:.4g}" if low == high else f"{low:.4g}-{high:.4g}"


def histogram(split: Split) -> str:
    """How many clips each class has, most first; of many classes the first and the last."""
    counts = Counter({name: 0 for name in split.label_names})
    counts.update(
        split.label_names[label] for label in split.label if 0 <= label < len(split.label_names)
    )
    ranked = counts.most_common()
    there = [(name, count) for name, count in ranked if count]
    empty = [name for name, count in ranked if not count]
    lines = [f"{split.name}: {len(there)} of {len(ranked)} classes have clips"]
    if empty:
        lines.append(f"  no clip of: {', '.join(empty)}")
    shown = [f"{count:>8} {name}" for name, count in there]
    if len(shown) > MOST_CLASSES:
        shown[ENDS:-ENDS] = ["     ..."]
    return "\n".join(lines + shown)


def _reason(error: Exception) -> str:
    """What an error says, in a line, without TensorFlow's name of the operation."""
    text = re.sub(r"^\{\{.*?\}\} | \[Op:.*", "", str(error), flags=re.DOTALL).strip()
    return text.splitlines()[0] if text else type(error).__name__
