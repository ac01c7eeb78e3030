"""Opens a split of any data set: prepared here, built by TFDS, or TFRecords of other projects."""

import os

import numpy as np
import tensorflow as tf

from timesformer_jax.data.layout import OPTIONS_FILE
from timesformer_jax.data.records import external, prepared
from timesformer_jax.data.records.split import Split
from timesformer_jax.errors import InputError, first_line
from timesformer_jax.storage import is_remote


def open_split(source: str | os.PathLike, split: str, fps: float | None = None) -> Split:
    """Opens a split: reads its index, and no records.

    Records that `prepare` did not write have no index. When they are first opened, all records are
    read once to make the index, which is then kept.

    Args:
      source: a directory, which may be on gs://: a prepared one, one of TFDS, or one of TFRecord
        tables as DMVR and Scenic write them. Or `tfds:NAME[/CONFIG][:VERSION][@DATA_DIR]`, a data
        set that TFDS has built.
      split: its name. For a table, a word of its name is enough if no other table has it.
      fps: frame rate of the records that do not state theirs; None or 0 if all do.

    Raises:
      InputError: there is no such source or split, or it is incomplete or empty; or its records
        cannot be used or do not state their frame rate.
    """
    if fps and not 0 < fps < np.inf:
        raise InputError(f"a frame rate (fps) must be above 0, not {fps}")
    source = absolute_source(source)
    try:
        is_external = _is_external(source)
    except tf.errors.OpError as error:
        raise InputError(f"cannot read {source}: {first_line(error)}; make it readable") from error
    if is_external:
        return external.open_external(source, split, fps or None)
    return prepared.open_prepared(source, split)


def absolute_source(source: str | os.PathLike) -> str:
    """A source of `open_split` that does not depend on the working directory."""
    source = os.fspath(source)
    if source.startswith(external.TFDS_SCHEME):
        name, at, data_dir = source.partition("@")
        return f"{name}{at}{absolute_source(data_dir)}" if at else source
    return source if is_remote(source) else os.path.abspath(source)


def _is_external(source: str) -> bool:
    if source.startswith(external.TFDS_SCHEME):
        return True
    if not tf.io.gfile.isdir(source):
        raise InputError(f"there is no folder {source}; make it with `timesformer prepare`")
    return not (
        prepared.split_names(source) or tf.io.gfile.exists(os.path.join(source, OPTIONS_FILE))
    )
