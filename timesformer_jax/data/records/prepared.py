"""What a record holds, and where the records of a data set lie.

A prepared directory is a TFDS data set (`tfds.builder_from_directory` opens it) of TFRecord
shards, one tf.train.Example a clip, with one JPEG a stored frame. Beside the shards of each split
lies an index, so that one record can be read without the ones before it:

    NAME-SPLIT.tfrecord-00000-of-00008   the shards
    SPLIT.index.npz                      a row a record: where it is and what shape it has
    labels.txt                           a label a line; the class is the line's position
    features.json, dataset_info.json     TFDS's; the second is written last

Data sets of other projects are opened by external.py.
"""

import errno
import io
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from timesformer_jax.data.layout import INDEX_DTYPES, INFO_FILE, LABELS_FILE, index_path
from timesformer_jax.data.records.split import Split
from timesformer_jax.data.records.wire import RECORD_OVERHEAD_BYTES
from timesformer_jax.errors import InputError

# TensorFlow reads and decodes; left alone it would take the GPU's whole memory from JAX.
tf.config.set_visible_devices([], "GPU")


def features(label_names: Sequence[str]) -> tfds.features.FeaturesDict:
    """The one definition of a record.

    video: the stored frames, each a JPEG; stored frame i is source frame i * stride of the clip,
      so there are ceil(num_frames / stride).
    label: the class. id: Clip.id.
    fps: frames a second of the source. num_frames: frames of the clip in the source.
    """
    return tfds.features.FeaturesDict(
        {
            "video": tfds.features.Video(shape=(None, None, None, 3), encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=list(label_names)),
            "id": tfds.features.Text(),
            "fps": np.float32,
            "stride": np.int64,
            "num_frames": np.int64,
        }
    )


# How a record is parsed does not depend on the labels.
_EXAMPLE_SPEC = features(()).tf_example_spec


def serialize(definition: tfds.features.FeaturesDict, example: Mapping) -> bytes:
    """A record's bytes, the same in every process (a protobuf map has no order of its own).

    Args:
      definition: of `features`.
      example: a value a feature; `video` as a list of JPEG byte strings, `label` as a name.
    """
    proto = tf.train.Example.FromString(definition.serialize_example(example))
    return proto.SerializeToString(deterministic=True)


def parse(serialized: tf.Tensor) -> dict[str, tf.Tensor]:
    """Parses one record, inside tf.data too; the frames stay JPEGs.

    Args:
      serialized: () string.

    Returns:
      video: (stored frames,) string, a JPEG each; label, stride, num_frames: () int64;
      fps: () float32; id: () string.
    """
    return tf.io.parse_single_example(serialized, _EXAMPLE_SPEC)


def open_prepared(directory: str, split: str) -> Split:
    if not tf.io.gfile.exists(os.path.join(directory, INFO_FILE)):
        raise InputError(
            f"{directory} is not a prepared data set (no {INFO_FILE}, which is written last);"
            " run `timesformer prepare` on it, again if it was interrupted"
        )
    names = split_names(directory)
    if split not in names:
        there = ", ".join(names) or "none"
        raise InputError(f"{directory} has no split '{split}'; there: {there}")
    with tf.io.gfile.GFile(index_path(directory, split), "rb") as file:
        index = np.load(io.BytesIO(file.read()))
    if absent := [column for column in ("ids", *INDEX_DTYPES) if column not in index]:
        raise InputError(
            f"the index of {directory} has no column '{absent[0]}': another version made it;"
            " prepare it again, to another folder"
        )
    if not len(index["ids"]):
        raise InputError(f"the split '{split}' of {directory} holds no clip; prepare it with some")
    return Split(
        name=split,
        files=tuple(os.path.join(directory, name) for name in index["files"].tolist()),
        label_names=read_label_map(directory),
        ids=index["ids"],
        **{column: index[column] for column in INDEX_DTYPES},
    )


def split_names(directory: str) -> list[str]:
    """The splits that a prepared directory has an index of, sorted."""
    suffix = index_path("", "")
    return sorted(
        name.removesuffix(suffix)
        for name in tf.io.gfile.listdir(directory)
        if name.endswith(suffix)
    )


def read_label_map(directory: str) -> tuple[str, ...]:
    """The label names of a prepared directory, by class."""
    with tf.io.gfile.GFile(os.path.join(directory, LABELS_FILE)) as file:
        return tuple(file.read().splitlines())


class ShardWriter:
    """Writes records to a TFRecord file, knowing where each begins; a context manager."""

    def __init__(self, path: str):
        with _os_errors():
            self._writer = tf.io.TFRecordWriter(path)
        self._position = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with _os_errors():
            self._writer.close()

    def write(self, record: bytes) -> dict[str, int]:
        """Appends a record; returns the index columns that say where it is."""
        place = {"offset": self._position, "size": len(record)}
        with _os_errors():
            self._writer.write(record)
        self._position += len(record) + RECORD_OVERHEAD_BYTES
        return place


def write_index(directory: str, split: str, files: Sequence[str], rows: Sequence[Mapping]) -> None:
    """Writes a split's index.

    Args:
      files: names of the shards, in order.
      rows: for each record `id` and the columns of INDEX_DTYPES.
    """
    columns = {
        column: np.array([row[column] for row in rows], dtype)
        for column, dtype in INDEX_DTYPES.items()
    }
    ids = np.array([row["id"] for row in rows], np.str_)
    buffer = io.BytesIO()
    np.savez(buffer, files=np.array(files, np.str_), ids=ids, **columns)
    with _os_errors(), tf.io.gfile.GFile(index_path(directory, split), "wb") as file:
        file.write(buffer.getvalue())


def write_metadata(
    directory: str,
    name: str,
    label_names: Sequence[str],
    shard_lengths: Mapping[str, Sequence[int]],
    num_bytes: Mapping[str, int],
) -> None:
    """Writes the label map and TFDS's description; of all files, dataset_info.json comes last.

    Args:
      shard_lengths: for each split the number of records of each shard.
      num_bytes: for each split the size of its shards.
    """
    with _os_errors(), tf.io.gfile.GFile(os.path.join(directory, LABELS_FILE), "w") as file:
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
    with _os_errors(), _quiet_tfds():
        tfds.folder_dataset.write_metadata(
            data_dir=directory,
            features=features(label_names),
            split_infos=splits,
            filename_template=None,
            # It would decode a record with TensorFlow, and print that it does.
            check_data=False,
            description="Clips of video, a JPEG a frame, prepared by timesformer_jax.",
        )


@contextmanager
def _os_errors() -> Iterator[None]:
    """TensorFlow's errors of writing, as the OSError that Python raises for the same."""
    try:
        yield
    except tf.errors.ResourceExhaustedError as error:
        raise OSError(errno.ENOSPC, error.message) from error
    except tf.errors.OpError as error:
        raise OSError(errno.EIO, error.message) from error


@contextmanager
def _quiet_tfds() -> Iterator[None]:
    """Keeps back TFDS's warning that it uses a deprecated name of its own."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
