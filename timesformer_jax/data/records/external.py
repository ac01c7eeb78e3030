"""Opens data sets that other projects wrote: tables of DMVR and Scenic, and TFDS data sets.

A table is a split: TFRecord shards of tf.train.SequenceExample in one directory, whose names differ
only in the shard number. The records of a TFDS data set are tf.train.Example. external_index.py
parses the records.
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
    ExampleFormat,
    Index,
    RecordFormat,
    SequenceExampleFormat,
    load_or_make_index,
)
from timesformer_jax.data.records.split import Split
from timesformer_jax.errors import InputError, first_line

# The source of a data set by its name in TFDS: tfds:NAME[/CONFIG][:VERSION][@DATA_DIR].
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
      split: a TFDS split; or a table, by its name or by a word of it that no other table has.
      fps: frame rate of the records that do not state theirs.
    """
    try:
        if source.startswith(TFDS_SCHEME) or tf.io.gfile.exists(os.path.join(source, INFO_FILE)):
            return _open_tfds(source, split, fps)
        return _open_tables(source, split, fps)
    except tf.errors.OpError as error:  # a missing file, or no permission
        raise InputError(f"cannot read {source}: {first_line(error)}") from error


def _open_tables(directory: str, split: str, fps: float | None) -> Split:
    """Opens a table. All tables are indexed, because together they define the classes."""
    tables = _tables(directory)
    if not tables:
        raise InputError(
            f"{directory} is not a prepared data set (make one with `timesformer prepare`), and"
            f" holds no other: no {INFO_FILE} of TFDS and no shards, as train-00000-of-00008"
        )
    table = _find_table(tables, split, directory)
    record_format = SequenceExampleFormat()
    indexes = {
        name: load_or_make_index(directory, name, files, record_format)
        for name, files in tables.items()
    }
    names, classes = _classes(indexes, directory)
    index = indexes[table]
    return _make_split(table, tables[table], names, classes[table], index, record_format, fps)


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
    record_format, names = tfds_format(info.features, source)
    files = [os.fspath(path) for path in info.splits[split].filepaths]
    index = load_or_make_index(os.fspath(builder.data_path), split, files, record_format)
    if index["label"].max(initial=-1) >= len(names):
        raise InputError(f"{source} has labels beyond the {len(names)} of its ClassLabel")
    return _make_split(split, files, names, index["label"], index, record_format, fps)


def _make_split(
    name: str,
    files: Sequence[str],
    label_names: tuple[str, ...],
    label: np.ndarray,
    index: Index,
    record_format: RecordFormat,
    fps: float | None,
) -> Split:
    _report_skipped(name, index)
    n = len(label)
    return Split(
        name=name,
        files=tuple(files),
        label_names=label_names,
        ids=index["id"],
        shard=index["shard"],
        offset=index["offset"],
        size=index["size"],
        num_frames=index["num_frames"],
        fps=frame_rates(name, index, fps),
        stride=np.ones(n, np.int32),
        height=index["height"],
        width=index["width"],
        label=label,
        video=np.arange(n, dtype=np.int32),
        extract_frames=record_format.extract_frames,
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


def frame_rates(name: str, index: Index, default: float | None) -> np.ndarray:
    """The frame rate of each record: its own, else the default, else from the clips' lengths.

    A generator may write the end that was requested and not the end of the video: DMVR's for
    HMDB-51 writes 20 s for all clips. So lengths are used only if one rate fits them all.

    Args:
      name: of the split.
      index: of its records.
      default: for records that do not state their frame rate; None: unknown.

    Raises:
      InputError: the frame rate of some records is unknown.
    """
    fps = index["fps"].copy()
    unknown = np.isnan(fps)
    if default is not None:
        fps[unknown] = default
    elif unknown.any():
        frames, seconds = index["num_frames"][unknown], index["seconds"][unknown]
        # Lengths are rounded to a frame. A comparison with NaN is false.
        if not ((frames - 1) / seconds).max() <= ((frames + 1) / seconds).min():
            raise InputError(
                f"{unknown.sum()} of {len(fps)} records of '{name}' do not state their frame rate;"
                " give it with --config.data.fps (training) or --fps (evaluation)"
            )
        fps[unknown] = frames.sum() / seconds.sum()
    return fps


# ---- tables and their classes -------------------------------------------------------------------


def _tables(directory: str) -> dict[str, list[str]]:
    """The shards of each table in a directory and its subdirectories, sorted, none missing."""
    shards = defaultdict(list)
    for path in _shard_paths(directory):
        name = _SHARD.fullmatch(path)
        assert name is not None  # the pattern takes any name
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
        # A subdirectory with TFDS's description is a data set of its own.
        elif tf.io.gfile.isdir(path) and INFO_FILE not in (inner := _listed(path)):
            yield from (f"{name}/{shard}" for shard in inner if _is_shard(shard))


def _listed(directory: str) -> list[str]:
    """The names in a directory. On gs:// subdirectories end with a slash, and "" is among them."""
    return [name for entry in tf.io.gfile.listdir(directory) if (name := entry.rstrip("/"))]


def _is_shard(name: str) -> bool:
    match = _SHARD.fullmatch(name)
    assert match is not None  # the pattern takes any name
    return any(match[group] for group in ("type", "number", "suffix"))


def _find_table(tables: Mapping[str, Any], split: str, directory: str) -> str:
    """The table of that name, else the only one with that word, as k400-train for train."""
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
    """The names of the classes of all tables, and the class of each record of each table.

    A class is a label's index. Its name is the label's text, or the index if no record has a text.
    DMVR's generator may number the same texts differently in each table; then a class is a text.
    """
    names = {
        table: _label_texts(index, f"{table} of {directory}") for table, index in indexes.items()
    }
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
    ordered = sorted({text for _, text in pairs})
    class_of = {text: i for i, text in enumerate(ordered)}
    return tuple(ordered), {
        table: np.array([class_of[names[table][i]] for i in index["label"].tolist()], np.int32)
        for table, index in indexes.items()
    }


def _label_texts(index: Index, where: str) -> dict[int, str]:
    """The text of each label of a table, without labels that have none."""
    pairs = set(zip(index["label"].tolist(), index["text"].tolist()))
    names: dict[int, str] = {}
    labels: dict[str, int] = {}
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
    """Opens a data set that TFDS has built. Builds and downloads nothing."""
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
            f" {name}{option}`, or give its full name, as tfds:NAME/CONFIG:VERSION@DATA_DIR"
        ) from error
    except Exception as error:  # a damaged description raises errors of any kind
        raise InputError(f"TFDS cannot open {source}: {first_line(error)}") from error


def tfds_format(
    features: tfds.features.FeaturesDict, source: str
) -> tuple[ExampleFormat, tuple[str, ...]]:
    """The format of a TFDS data set's records, and the names of its classes.

    Raises:
      InputError: the features are not one video and one class label, beside others.
    """
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
    return ExampleFormat(videos[0], labels[0]), tuple(
        map(label.int2str, range(label.num_classes or 0))
    )
