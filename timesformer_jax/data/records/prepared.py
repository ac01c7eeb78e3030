"""Reads and writes prepared directories: the format of records, and the files around them.

A prepared directory is a TFDS data set (`tfds.builder_from_directory` opens it): TFRecord shards,
one tf.train.Example per clip, one JPEG per stored frame. Each split also has an index, so that one
record can be read without those before it:

    NAME-SPLIT.tfrecord-00000-of-00008   the shards
    SPLIT.index.npz                      a row per record: where it is, and its shape
    SPLIT.places                         an entry per stored frame: where it is, and its checksum
    labels.txt                           a label per line; the class is the line's number, from 0
    splits.json                          other splits or labels of the records, if there are any
    features.json, dataset_info.json     TFDS's description; the second file is written last

external.py opens data sets of other projects.
"""

import errno
import io
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from zipfile import BadZipFile

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from timesformer_jax.data.layout import (
    INDEX_DTYPES,
    INFO_FILE,
    LABELS_FILE,
    TARGETS,
    index_path,
)
from timesformer_jax.data.problems import NO_TRAINING, NO_VALIDATION, REWRITE_INDEX
from timesformer_jax.data.records.places import with_places
from timesformer_jax.data.records.split import Split, read_reassigned, select_split
from timesformer_jax.errors import InputError, first_line

PERMISSION = (PermissionError, tf.errors.PermissionDeniedError)
# Errors of reading a file that is missing, not readable or of another format.
UNREADABLE = (OSError, EOFError, KeyError, ValueError, BadZipFile, tf.errors.OpError)

# TensorFlow only reads and decodes. By default it would take all GPU memory, which JAX needs.
tf.config.set_visible_devices([], "GPU")


def features(label_names: Sequence[str], multilabel: bool = False) -> tfds.features.FeaturesDict:
    """The features of a record.

    video: the stored frames, each a JPEG. Stored frame i is frame i * stride of the clip, so there
      are ceil(num_frames / stride).
    label: the class; of multi-label data a sequence of classes. id: Clip.id.
    fps: frame rate of the source. num_frames: frames of the clip in the source.
    """
    one = tfds.features.ClassLabel(names=list(label_names))
    return tfds.features.FeaturesDict(
        {
            "video": tfds.features.Video(shape=(None, None, None, 3), encoding_format="jpeg"),
            "label": tfds.features.Sequence(one) if multilabel else one,
            "id": tfds.features.Text(),
            "fps": np.float32,
            "stride": np.int64,
            "num_frames": np.int64,
        }
    )


# Parsing does not depend on the label names, nor on their number for a record.
_EXAMPLE_SPEC = features((), multilabel=True).tf_example_spec


def parse(serialized: tf.Tensor) -> dict[str, tf.Tensor]:
    """Parses one record, also within tf.data; the frames stay JPEGs.

    Args:
      serialized: () string.

    Returns:
      video: (stored frames,) string, JPEGs; label: (labels,) int64; stride, num_frames: () int64;
      fps: () float32; id: () string.
    """
    return tf.io.parse_single_example(serialized, _EXAMPLE_SPEC)


def open_prepared(directory: str, split: str) -> Split:
    """Opens a split of a prepared directory; see `open.open_split`."""
    _require_complete(directory)
    reassigned = read_reassigned(directory)
    names = split_names(directory)
    there = names if reassigned is None else sorted(reassigned.splits)
    if split not in there:
        if split == "train" and there:
            raise InputError(f"{directory}: {NO_TRAINING}")
        if split == "validation" and there == ["train"]:
            raise InputError(f"{directory}: {NO_VALIDATION}")
        raise InputError(f"{directory} has no split '{split}'; there: {', '.join(there) or 'none'}")

    def open_placed(name: str) -> Split:
        return with_places(directory, open_indexed(directory, name))

    found = (
        open_placed(split)
        if reassigned is None
        else select_split([open_placed(name) for name in names], reassigned, split)
    )
    if not len(found):
        raise InputError(f"the split '{split}' of {directory} holds no clip; prepare it with some")
    return found


def _require_complete(directory: str) -> None:
    if not tf.io.gfile.exists(os.path.join(directory, INFO_FILE)):
        raise InputError(
            f"{directory} is not a prepared data set (no {INFO_FILE}, which is written last);"
            " run `timesformer prepare` on it, again if it was interrupted"
        )


def open_indexed(directory: str, split: str) -> Split:
    """Opens a split as its index has it, whatever splits.json says.

    Raises:
      InputError: the index or the labels are missing or damaged, or may not be read.
    """
    try:
        index = _read_index(directory, split)
        label_names = _read_label_names(directory)
    except UNREADABLE as error:
        raise InputError(
            f"cannot read the index of {split} or the labels of {directory} ({first_line(error)});"
            f" {'make it readable' if isinstance(error, PERMISSION) else REWRITE_INDEX}"
        ) from error
    if absent := [column for column in ("files", "ids", *INDEX_DTYPES) if column not in index]:
        raise InputError(
            f"the index of {directory} has no column '{absent[0]}': another version made it;"
            " prepare it again, to another folder"
        )
    found = Split(
        name=split,
        files=tuple(os.path.join(directory, name) for name in index["files"].tolist()),
        label_names=label_names,
        ids=index["ids"],
        **{column: index[column] for column in INDEX_DTYPES},
    )
    if TARGETS not in index:
        return found
    targets = np.zeros((len(found), len(found.label_names)), bool)
    targets[tuple(index[TARGETS].T)] = True
    return replace(found, targets=targets)


def _read_index(directory: str, split: str) -> dict[str, Any]:
    """All columns of an index."""
    with tf.io.gfile.GFile(index_path(directory, split), "rb") as file:
        return dict(np.load(io.BytesIO(file.read())))


def split_names(directory: str) -> list[str]:
    """The splits of a prepared directory that have an index, as shards were written for, sorted."""
    suffix = index_path("", "")
    return sorted(
        name.removesuffix(suffix)
        for name in tf.io.gfile.listdir(directory)
        if name.endswith(suffix)
    )


def _read_label_names(directory: str) -> tuple[str, ...]:
    """The name of each class."""
    with tf.io.gfile.GFile(os.path.join(directory, LABELS_FILE)) as file:
        return tuple(file.read().splitlines())


def write_index(
    directory: str,
    split: str,
    files: Sequence[str],
    rows: Sequence[Mapping],
    multilabel: bool = False,
) -> None:
    """Writes a split's index.

    Args:
      files: names of the shards, in order.
      rows: `id` and the columns of INDEX_DTYPES for each record; `label` is a list of classes for
        each record of multi-label data.
      multilabel: whether a record has any number of labels.
    """
    more = {}
    if multilabel:
        targets = [(i, x) for i, row in enumerate(rows) for x in row["label"]]
        more[TARGETS] = np.array(targets, np.int32).reshape(-1, 2)
        rows = [{**row, "label": min(row["label"], default=0)} for row in rows]
    columns = {
        column: np.array([row[column] for row in rows], dtype)
        for column, dtype in INDEX_DTYPES.items()
    }
    ids = np.array([row["id"] for row in rows], np.str_)
    buffer = io.BytesIO()
    np.savez(buffer, files=np.array(files, np.str_), ids=ids, **columns, **more)  # type: ignore[arg-type]  # not allow_pickle
    with _write_errors(), tf.io.gfile.GFile(index_path(directory, split), "wb") as file:
        file.write(buffer.getvalue())


def write_metadata(
    directory: str,
    name: str,
    label_names: Sequence[str],
    shard_lengths: Mapping[str, Sequence[int]],
    num_bytes: Mapping[str, int],
    multilabel: bool = False,
) -> None:
    """Writes the label names and TFDS's description. dataset_info.json is the last of all files.

    Args:
      directory: the prepared directory.
      name: of the data set.
      label_names: the name of each class.
      shard_lengths: the number of records in each shard, for each split.
      num_bytes: the size of the shards, for each split.
      multilabel: whether a record has any number of labels.
    """
    with _write_errors(), tf.io.gfile.GFile(os.path.join(directory, LABELS_FILE), "w") as file:
        file.write("".join(f"{label}\n" for label in label_names))
    splits = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=list(lengths),
            num_bytes=num_bytes[split],
            filename_template=tfds.core.ShardedFileTemplate(
                dataset_name=name, split=split, data_dir=directory, filetype_suffix="tfrecord"
            ),
        )
        for split, lengths in shard_lengths.items()
    ]
    with _write_errors(), _quiet_tfds():
        tfds.folder_dataset.write_metadata(
            data_dir=directory,
            features=features(label_names, multilabel),
            split_infos=splits,
            filename_template=None,
            # The check would decode a record with TensorFlow, and print about it.
            check_data=False,
            description="Clips of video, a JPEG a frame, prepared by timesformer_jax.",
        )


@contextmanager
def _write_errors() -> Iterator[None]:
    """Raises TensorFlow's errors of writing as the OSError that Python would raise."""
    try:
        yield
    except tf.errors.ResourceExhaustedError as error:
        raise OSError(errno.ENOSPC, error.message) from error
    except tf.errors.OpError as error:
        raise OSError(errno.EIO, error.message) from error


@contextmanager
def _quiet_tfds() -> Iterator[None]:
    """Hides a warning of TFDS about a deprecated name that TFDS itself uses."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
