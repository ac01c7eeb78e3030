"""Checks a prepared directory: every byte of its shards, and each file against the others.

`prepare` considers a shard done if its size equals the one in its manifest. So a damaged shard must
be deleted; `prepare` then writes it again, together with the files that describe all shards.
"""

import json
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from etils import epath
from tqdm import tqdm

from timesformer_jax.data import problems
from timesformer_jax.data.check.prepared_summary import summarize
from timesformer_jax.data.check.report import is_decoded
from timesformer_jax.data.check.sources import require_prepared
from timesformer_jax.data.layout import (
    INDEX_DTYPES,
    INFO_FILE,
    LABELS_FILE,
    MANIFESTS,
    SPLITS_FILE,
    places_path,
)
from timesformer_jax.data.problems import REWRITE_INDEX, RUN_AGAIN, Problem
from timesformer_jax.data.records import places
from timesformer_jax.data.records import prepared as records
from timesformer_jax.data.records.prepared import UNREADABLE
from timesformer_jax.data.records.split import Split, read_reassigned, select_split
from timesformer_jax.data.records.wire import RECORD_OVERHEAD_BYTES
from timesformer_jax.errors import InputError, first_line
from timesformer_jax.workers import available_cores

REWRITE_SHARD = f"delete it and {RUN_AGAIN}: it writes only this shard again"

READ_AHEAD_BYTES = 8 << 20


@dataclass(frozen=True)
class IndexedShard:
    """A shard as the index of its split describes it.

    path: the file. manifest_path: None if the directory has no manifests. rows: of its records in
    order, with `id` and the columns of INDEX_DTYPES.
    """

    path: epath.Path
    manifest_path: epath.Path | None
    rows: Sequence[Mapping]


@dataclass(frozen=True)
class ShardResult:
    """What was found of a shard. num_bytes: its size, 0 if it is missing."""

    num_bytes: int
    problems: Sequence[str]


def check_prepared(
    directory: str | os.PathLike, decode_fraction: float, workers: int
) -> tuple[str, list[Problem]]:
    """Checks a prepared directory.

    Args:
      directory: may be on gs://.
      decode_fraction: fraction of the records whose frames are decoded.
      workers: threads; 0: one for each processor.

    Returns:
      A summary of the directory, and its problems.

    Raises:
      InputError: there is no such folder, or `prepare` did not write or complete it.
    """
    root = epath.Path(directory)
    require_prepared(root)
    splits, damage = _open_splits(root)
    for split in splits:
        damage += [*_check_index(split), *_check_places(root, split.name)]
    shards = [shard for split in splits for shard in _indexed_shards(root, split)]
    results = _check_shards(shards, decode_fraction, workers)
    damage += _check_description(root, splits, results)
    # If an index cannot be read, it is unknown which shards and clips belong to the data set.
    is_known = not damage
    stray = _unexpected_files(root, expected=results.keys() if is_known else None)
    damage += (fault for result in results.values() for fault in result.problems)
    num_bytes = {name: result.num_bytes for name, result in results.items()}
    used, unusable = _used_splits(root, splits)
    found = [Problem(text, True) for text in damage + unusable]
    found += _few_clips(used) if is_known and not unusable else []
    found += map(Problem, stray)
    return summarize(root, splits, used, num_bytes, decode_fraction), found


# ---- the index ----------------------------------------------------------------------------------


def _open_splits(root: epath.Path) -> tuple[list[Split], list[str]]:
    """Opens the splits; returns a problem for each that cannot be opened."""
    splits, problems = [], []
    for name in records.split_names(os.fspath(root)):
        try:
            splits.append(records.open_indexed(os.fspath(root), name))
        except InputError as error:
            problems.append(str(error))
    return splits, problems


def _used_splits(root: epath.Path, splits: list[Split]) -> tuple[list[Split], list[str]]:
    """The splits as training reads them, with splits.json; a problem if that cannot be used."""
    try:
        reassigned = read_reassigned(os.fspath(root))
        if reassigned is None:
            return splits, []
        return [select_split(splits, reassigned, name) for name in sorted(reassigned.splits)], []
    except (InputError, *UNREADABLE) as error:
        return [], [f"{SPLITS_FILE}: {first_line(error)}"]


def _few_clips(splits: list[Split]) -> list[Problem]:
    """What is wrong with the numbers of clips that training reads."""
    counts = {
        s.name: problems.count_classes(s.label, s.video, s.targets, len(s.label_names))
        for s in splits
        if len(s)
    }
    return problems.of_classes(counts, splits[0].label_names if splits else ())


def _check_index(split: Split) -> Iterator[str]:
    for column, count in (("shard", len(split.files)), ("label", len(split.label_names))):
        values = getattr(split, column)
        for i in np.flatnonzero((values < 0) | (values >= count)):
            yield (
                f"the index of {split.name} has {split.ids[i]} with {column} {values[i]} of"
                f" {count}; {REWRITE_INDEX}"
            )
    for clip, count in Counter(split.ids.tolist()).items():
        if count > 1:
            yield f"the index of {split.name} has {clip} {count} times; {REWRITE_INDEX}"


def _check_places(root: epath.Path, split: str) -> Iterator[str]:
    """The file need not be there. What is of other records is not used, and made again."""
    path = epath.Path(places_path(os.fspath(root), split))
    try:
        if path.exists() and places.is_damaged(path):
            yield f"{path.name} is damaged; delete it: it is made again from the records"
    except (OSError, tf.errors.OpError) as error:
        yield f"{path.name} cannot be read ({first_line(error)}); make it readable and check again"


def _indexed_shards(root: epath.Path, split: Split) -> list[IndexedShard]:
    manifests = root / MANIFESTS if (root / MANIFESTS).is_dir() else None
    rows: list[list[dict]] = [[] for _ in split.files]
    columns = (getattr(split, column).tolist() for column in INDEX_DTYPES)
    classes = (
        split.label.tolist()
        if split.targets is None
        else [np.flatnonzero(targets).tolist() for targets in split.targets]
    )
    for clip, labels, *values in zip(split.ids.tolist(), classes, *columns):
        row = {"id": clip, **dict(zip(INDEX_DTYPES, values)), "label": labels}
        if 0 <= row["shard"] < len(rows):
            rows[row["shard"]].append(row)
    return [
        IndexedShard(root / name, manifests and manifests / f"{name}.json", shard_rows)
        for name, shard_rows in zip(_file_names(split), rows)
    ]


def _file_names(split: Split) -> list[str]:
    return [os.path.basename(file) for file in split.files]


# ---- a shard ------------------------------------------------------------------------------------


def _check_shards(
    shards: Sequence[IndexedShard], decode_fraction: float, workers: int
) -> dict[str, ShardResult]:
    """Reads all shards; returns the result of each by its name.

    Threads suffice: the time is spent in TensorFlow, without Python's lock.
    """
    check_shard = partial(_check_shard, decode_fraction=decode_fraction)
    results = {}
    with (
        tqdm(total=sum(len(shard.rows) for shard in shards), unit="record", desc="reading") as bar,
        ThreadPool(workers or available_cores()) as pool,
    ):
        for shard, result in zip(shards, pool.imap(check_shard, shards)):
            results[shard.path.name] = result
            bar.update(len(shard.rows))
    return results


def _check_shard(shard: IndexedShard, decode_fraction: float) -> ShardResult:
    name = shard.path.name
    try:
        if not shard.path.exists():
            return ShardResult(0, [f"{name} is missing; {RUN_AGAIN}: it writes only this shard"])
        num_bytes = shard.path.stat().length
        faults = list(_check_records(shard, num_bytes, decode_fraction))
        faults = faults or list(_check_manifest(shard, num_bytes))
    except (OSError, tf.errors.OpError) as error:
        problem = f"{name} cannot be read ({first_line(error)}); make it readable and check again"
        return ShardResult(0, [problem])
    return ShardResult(num_bytes, [f"{name} {fault}; {REWRITE_SHARD}" for fault in faults])


def _check_records(shard: IndexedShard, num_bytes: int, decode_fraction: float) -> Iterator[str]:
    """Reads the records in order; the reader verifies both checksums of each."""
    dataset = iter(tf.data.TFRecordDataset(os.fspath(shard.path), buffer_size=READ_AHEAD_BYTES))
    position = 0
    for number, row in enumerate(shard.rows):
        where = f"record {number} ({row['id']})"
        try:
            serialized = next(dataset, None)
        except tf.errors.DataLossError as error:
            fault = "is truncated" if "truncated" in error.message else "has a wrong checksum"
            yield f"{where} {fault}, and the records after it were not read"
            return
        if serialized is None:
            yield f"ends before {where}: it has {number} of {len(shard.rows)} records"
            return
        if differences := list(_differences(serialized, position, row, decode_fraction)):
            yield f"{where}: {', '.join(differences)}"
        position += len(serialized.numpy()) + RECORD_OVERHEAD_BYTES
    if position < num_bytes:
        yield f"has {num_bytes - position} bytes after its {len(shard.rows)} records"


def _one_or_all(labels: list[int], indexed: int | list[int]) -> int | list[int]:
    """The label of a record, or the list of them if the index has a list or there is not one."""
    return labels[0] if len(labels) == 1 and not isinstance(indexed, list) else labels


def _differences(
    serialized: tf.Tensor, position: int, row: Mapping, decode_fraction: float
) -> Iterator[str]:
    """The differences between a record and its row in the index."""
    try:
        record = records.parse(serialized)
    # TensorFlow's message contains the record's bytes, which may be no text.
    except (tf.errors.InvalidArgumentError, UnicodeDecodeError):
        yield "it has not the format that `timesformer prepare` writes"
        return
    # No record has a stride of 0, so it is reported as a difference.
    stored_frames = -(-row["num_frames"] // max(row["stride"], 1))
    expected = {**row, "stored frames": stored_frames}
    found = {
        "id": record["id"].numpy().decode(errors="replace"),
        "offset": position,
        "size": len(serialized.numpy()),
        "label": _one_or_all(sorted(record["label"].numpy().tolist()), row["label"]),
        **{name: record[name].numpy() for name in ("num_frames", "fps", "stride")},
        "stored frames": len(record["video"]),
    }
    for name, value in found.items():
        if value != expected[name]:
            yield f"{name} {value} where the index has {expected[name]}"
    if is_decoded(row["id"], decode_fraction):
        yield from _check_frames(record["video"], (row["height"], row["width"], 3))


def _check_frames(jpegs: tf.Tensor, expected: tuple[int, int, int]) -> Iterator[str]:
    """Decodes frames; reports the first that cannot be decoded or has another shape."""
    for i, jpeg in enumerate(jpegs):
        try:
            shape = tuple(tf.io.decode_jpeg(jpeg).shape)
        except tf.errors.InvalidArgumentError:
            yield f"frame {i} cannot be decoded"
            return
        if shape != expected:
            yield f"frame {i} has shape {shape} where the index has {expected}"
            return


def _check_manifest(shard: IndexedShard, num_bytes: int) -> Iterator[str]:
    """Compares a shard with its manifest, by which `prepare` decides whether the shard is done."""
    if shard.manifest_path is None:  # training does not need them, so a copy may lack them
        return
    try:
        manifest = json.loads(shard.manifest_path.read_text())
        manifest_bytes = manifest["bytes"]
        manifest_ids = [row["id"] for row in manifest["records"]]
    except UNREADABLE as error:
        yield f"has no readable manifest ({first_line(error)})"
        return
    if manifest_bytes != num_bytes:
        yield f"has {num_bytes} bytes where its manifest has {manifest_bytes}"
    ids = [row["id"] for row in shard.rows]
    if manifest_ids != ids:
        yield (
            f"has other records than its manifest ({len(ids)} records, and {len(manifest_ids)} in"
            " the manifest)"
        )


# ---- the files beside the shards ----------------------------------------------------------------


def _check_description(
    root: epath.Path, splits: Sequence[Split], results: Mapping[str, ShardResult]
) -> Iterator[str]:
    """Compares what TFDS reads of the directory with the indices and with the shards' sizes."""
    try:
        info = tfds.builder_from_directory(root).info
        label = info.features["label"]
        label_names = tuple(getattr(label, "feature", label).names)
    except Exception as error:  # TFDS raises errors of many kinds
        yield f"TFDS cannot open {root} ({first_line(error)}); {REWRITE_INDEX}"
        return
    for name in sorted(set(info.splits) ^ set(records.split_names(os.fspath(root)))):
        has, lacks = (INFO_FILE, "index") if name in info.splits else ("index", INFO_FILE)
        yield f"the split {name} has no {lacks}, only its {has}; {REWRITE_INDEX}"
    if splits and label_names != splits[0].label_names:
        yield f"TFDS has other label names than {LABELS_FILE}; {REWRITE_INDEX}"
    for split in splits:
        if split.name in info.splits:
            of_split = {name: results[name] for name in _file_names(split)}
            for difference in _check_split_info(info.splits[split.name], split, of_split):
                yield f"{INFO_FILE} has {difference}; {REWRITE_INDEX}"


def _check_split_info(
    info: tfds.core.SplitInfo, split: Split, results: Mapping[str, ShardResult]
) -> Iterator[str]:
    """The differences between TFDS's description of a split, its index and its shards."""
    if sorted(info.filenames) != sorted(results):
        yield f"{len(info.filenames)} shards of {split.name} where the index has {len(results)}"
        return
    indexed = Counter(split.shard.tolist())
    for i, (name, length) in enumerate(zip(results, info.shard_lengths)):
        if length != indexed[i]:
            yield f"{length} records in {name} where the index has {indexed[i]}"
    num_bytes = sum(result.num_bytes for result in results.values())
    # A damaged shard changes the sum, and has its own problem.
    damaged = any(result.problems for result in results.values())
    if info.num_bytes != num_bytes and not damaged:
        yield f"{int(info.num_bytes)} bytes of {split.name} where the shards have {num_bytes}"


def _unexpected_files(root: epath.Path, expected: Collection[str] | None) -> Iterator[str]:
    """Files that belong to no data set. expected: names of the shards; None: they are unknown."""
    for path in sorted((*root.glob("*.part"), *(root / MANIFESTS).glob("*.part"))):
        yield f"{path.relative_to(root)} is a temporary file of a killed run; delete it"
    for path in sorted(root.glob("*.tfrecord-*")):
        if expected is not None and path.suffix != ".part" and path.name not in expected:
            yield f"{path.name} is in no index; delete it"
