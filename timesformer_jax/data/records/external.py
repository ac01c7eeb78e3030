"""Records that other projects wrote: DMVR's and Scenic's tables, and TFDS data sets.

DMVR's are TFRecord shards of tf.train.SequenceExample. All shards of a directory that are named
alike but for their number are a table, and a table is a split. A TFDS data set is prepared by TFDS,
here or elsewhere; its records are tf.train.Example. external_index.py reads the records.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from absl import logging

from timesformer_jax.data.layout import INFO_FILE
from timesformer_jax.data.records.external_index import (
    Examples,
    Format,
    Index,
    SequenceExamples,
    index_of,
)
from timesformer_jax.data.records.split import Split
from timesformer_jax.errors import InputError

# A data set by its TFDS name: tfds:NAME[/CONFIG][:VERSION][@DATA_DIR].
TFDS_SCHEME = "tfds:"

_SHARD = re.compile(
    r"(?P<table>.+?)(?P<type>\.tfrecords?)?"
    r"(-(?P<number>\d{4,})-of-(?P<count>\d{4,}))?(?P<suffix>\.tfrecords?)?"
)

# ---- opening ------------------------------------------------------------------------------------


def open_external(source: str, split: str, fps: float | None = None) -> Split:
    """Opens a split of another project's records; see `open.open_split`.

    Args:
      source: an absolute path, a gs:// path, or `tfds:NAME[@DATA_DIR]`.
      split: a TFDS split; or a table, by its name or by a word of it that no other has.
      fps: frames a second of the records that do not say theirs.
    """
    try:
        if source.startswith(TFDS_SCHEME) or tf.io.gfile.exists(os.path.join(source, INFO_FILE)):
            return _open_tfds(source, split, fps)
        return _open_tables(source, split, fps)
    except tf.errors.OpError as error:  # a file that is gone, or not for this user
        raise InputError(f"cannot read {source}: {str(error).splitlines()[0]}") from error


def _open_tables(directory: str, split: str, fps: float | None) -> Split:
    """DMVR's tables. All are indexed, because together they say what the classes are."""
    tables = _tables(directory)
    if not tables:
        raise InputError(
            f"{directory} is not a prepared data set (make one with `timesformer prepare`), and"
            f" holds no other: no {INFO_FILE} of TFDS and no shards, as train-00000-of-00008"
        )
    table = _chosen(tables, split, directory)
    kind = SequenceExamples()
    indexes = {name: index_of(directory, name, files, kind) for name, files in tables.items()}
    names, classes = _classes(indexes, directory)
    return _split(table, tables[table], names, classes[table], indexes[table], kind, fps)


def _open_tfds(source: str, split: str, fps: float | None) -> Split:
    builder = _builder(source)
    info = builder.info
    if split not in info.splits:
        raise InputError(f"{source} has no split '{split}'; there: {', '.join(info.splits)}")
    if info.file_format != tfds.core.FileFormat.TFRECORD:
        raise InputError(
            f"{source} is stored as {info.file_format.value}, and only tfrecord can be read;"
            " build it with --file_format=tfrecord"
        )
    kind, names = _tfds_format(info.features, source)
    files = [os.fspath(path) for path in info.splits[split].filepaths]
    index = index_of(os.fspath(builder.data_path), split, files, kind)
    if index["label"].max(initial=-1) >= len(names):
        raise InputError(f"{source} has labels beyond the {len(names)} of its ClassLabel")
    return _split(split, files, names, index["label"], index, kind, fps)


def _split(
    name: str,
    files: Sequence[str],
    label_names: tuple[str, ...],
    label: np.ndarray,
    index: Index,
    kind: Format,
    fps: float | None,
) -> Split:
    _report_skipped(name, index)
    n = len(label)
    return Split(
        name=name,
        files=tuple(files),
        label_names=label_names,
        ids=index["id"],
        **{key: index[key] for key in ("shard", "offset", "size", "num_frames")},
        fps=_frame_rates(name, index, fps),
        stride=np.ones(n, np.int32),
        height=index["height"],
        width=index["width"],
        label=label,
        video=np.arange(n, dtype=np.int32),
        extract_frames=kind.extract_frames,
    )


def _report_skipped(name: str, index: Index) -> None:
    columns = (index[key].tolist() for key in ("skipped", "skipped_count", "skipped_first"))
    skipped = [f"{count} with {why} (first: {first})" for why, count, first in zip(*columns)]
    if not len(index["label"]):
        raise InputError(
            f"the split '{name}' has no record that can be used: {'; '.join(skipped) or 'empty'}"
        )
    if skipped:
        total = len(index["label"]) + index["skipped_count"].sum()
        logging.warning("%s: left out of %d records: %s", name, total, "; ".join(skipped))


def _frame_rates(name: str, index: Index, told: float | None) -> np.ndarray:
    """Frames a second of each record: what it says, else what is told, else by the clip's length.

    A generator may write the end that it asked for and not the end that the video has (DMVR's for
    HMDB-51 writes 20 s for all). So lengths are believed only if they make one rate for all.
    """
    fps = index["fps"].copy()
    unsaid = np.isnan(fps)
    if told is not None:
        fps[unsaid] = told
    elif unsaid.any():
        frames, seconds = index["num_frames"][unsaid], index["seconds"][unsaid]
        # A frame more or less is rounding. NaN compares as false.
        if not ((frames - 1) / seconds).max() <= ((frames + 1) / seconds).min():
            raise InputError(
                f"{unsaid.sum()} of {len(fps)} records of '{name}' do not say their frame rate;"
                " say it with --config.data.fps (training) or --fps (evaluation)"
            )
        fps[unsaid] = frames.sum() / seconds.sum()
    return fps


# ---- tables and their classes -------------------------------------------------------------------


def _tables(directory: str) -> dict[str, list[str]]:
    """The shards of each table in a directory and its folders, sorted; a table must be whole."""
    shards = defaultdict(list)
    for path in _shard_paths(directory):
        name = _SHARD.fullmatch(path)
        place = int(name["count"] or 1), int(name["number"] or 0)
        shards[name["table"]].append((*place, os.path.join(directory, path)))
    for table, places in shards.items():
        counts, numbers, paths = zip(*sorted(places))
        if len(set(counts)) > 1 or len(set(numbers)) < len(numbers):
            names = f"{os.path.basename(paths[0])}, {os.path.basename(paths[-1])}"
            raise InputError(f"{directory} has the table '{table}' twice ({names}); keep one")
        if absent := sorted(set(range(counts[0])) - set(numbers)):
            raise InputError(
                f"{directory} lacks {len(absent)} of the {counts[0]} shards of '{table}' (first:"
                f" {absent[0]:05d}); copy them there"
            )
    return {table: [path for *_, path in sorted(shards[table])] for table in sorted(shards)}


def _shard_paths(directory: str) -> Iterator[str]:
    for name in _listed(directory):
        path = os.path.join(directory, name)
        if _is_shard(name):
            yield name
        # A folder of TFDS is another data set.
        elif tf.io.gfile.isdir(path) and INFO_FILE not in (inner := _listed(path)):
            yield from (f"{name}/{shard}" for shard in inner if _is_shard(shard))


def _listed(directory: str) -> list[str]:
    """The names in a directory; gs:// ends a folder's with a slash, and lists the folder itself."""
    return [name for entry in tf.io.gfile.listdir(directory) if (name := entry.rstrip("/"))]


def _is_shard(name: str) -> bool:
    match = _SHARD.fullmatch(name)
    return any(match[group] for group in ("type", "number", "suffix"))


def _chosen(tables: Mapping[str, Any], split: str, directory: str) -> str:
    """The table of that name, else the only one with that word: k400-train for train."""
    if split in tables:
        return split
    found = [table for table in tables if split in re.split(r"[^A-Za-z0-9]+", table)]
    if len(found) != 1:
        what = f"several splits '{split}'" if found else f"no split '{split}'"
        raise InputError(f"{directory} has {what}; there: {', '.join(tables)}")
    return found[0]


def _classes(
    indexes: Mapping[str, Index], directory: str
) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """The classes that all tables share: their names, and for each table each record's class.

    A class is its label's index and is called by its text, or by the index if no record has a text.
    Where tables number the same texts differently, as DMVR's generator does, a class is its text.
    """
    names = {table: _names(index, f"{table} of {directory}") for table, index in indexes.items()}
    pairs = {pair for texts in names.values() for pair in texts.items()}
    shared = dict(pairs)
    if len(shared) == len(pairs) == len(set(shared.values())):
        count = 1 + max(index["label"].max(initial=-1) for index in indexes.values())
        classes = {table: index["label"] for table, index in indexes.items()}
        return tuple(shared.get(i, str(i)) for i in range(count)), classes
    for table, index in indexes.items():
        if unnamed := set(index["label"].tolist()) - set(names[table]):
            raise InputError(
                f"the tables of {directory} number their labels differently, and label"
                f" {min(unnamed)} of {table} has no clip/label/text; write them with one numbering"
            )
    logging.warning(
        "the tables of %s number their labels differently; classes go by clip/label/text", directory
    )
    in_order = sorted({text for _, text in pairs})
    place = {text: i for i, text in enumerate(in_order)}
    return tuple(in_order), {
        table: np.array([place[names[table][i]] for i in index["label"].tolist()], np.int32)
        for table, index in indexes.items()
    }


def _names(index: Index, where: str) -> dict[int, str]:
    """The text of each label of a table that has one."""
    pairs = set(zip(index["label"].tolist(), index["text"].tolist()))
    names, labels = {}, {}
    for label, text in sorted((label, text) for label, text in pairs if text):
        if label in names:
            raise InputError(
                f"label {label} of {where} is both '{names[label]}' and '{text}'; write it again"
            )
        if text in labels:
            raise InputError(
                f"'{text}' of {where} is both label {labels[text]} and {label}; write it again"
            )
        names[label], labels[text] = text, label
    return names


# ---- TFDS ---------------------------------------------------------------------------------------


def _builder(source: str) -> tfds.core.DatasetBuilder:
    """The builder of a data set that is on disk; builds and downloads nothing."""
    try:
        if not source.startswith(TFDS_SCHEME):
            return tfds.builder_from_directory(source)
        name, _, data_dir = source.removeprefix(TFDS_SCHEME).partition("@")
        return tfds.core.read_only_builder.builder_from_files(name, data_dir=data_dir or None)
    except tfds.core.DatasetNotFoundError as error:
        place = data_dir or "TFDS's folder (TFDS_DATA_DIR, else ~/tensorflow_datasets)"
        option = f" --data_dir={data_dir}" if data_dir else ""
        raise InputError(
            f"there is no TFDS data set '{name}' in {place}: build it with `tfds build"
            f" {name}{option}`, or say more of it, as tfds:NAME/CONFIG:VERSION@DATA_DIR"
        ) from error
    except Exception as error:  # of a damaged description, any kind
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"TFDS cannot open {source}: {reason}") from error


def _tfds_format(features: tfds.features.FeaturesDict, source: str) -> tuple[Examples, tuple]:
    videos = [
        key
        for key, feature in features.items()
        if isinstance(feature, tfds.features.Sequence)
        and isinstance(feature.feature, tfds.features.Image)
        and feature.feature.np_dtype == np.uint8
    ]
    labels = [
        key for key, feature in features.items() if isinstance(feature, tfds.features.ClassLabel)
    ]
    if len(videos) != 1 or len(labels) != 1:
        raise InputError(
            f"{source} has {len(videos)} videos and {len(labels)} class labels among its features"
            f" ({', '.join(features)}); one of each is needed"
        )
    label = features[labels[0]]
    return Examples(videos[0], labels[0]), tuple(map(label.int2str, range(label.num_classes or 0)))
