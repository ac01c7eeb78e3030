"""Opens a split of any data set: prepared here, of TFDS, or another project's TFRecords."""

import os

import numpy as np
import tensorflow as tf

from timesformer_jax.data.layout import OPTIONS_FILE
from timesformer_jax.data.records import external, prepared
from timesformer_jax.data.records.split import Split
from timesformer_jax.errors import InputError


def open_split(source: str | os.PathLike, split: str, fps: float | None = None) -> Split:
    """Opens a split: reads its index, no record.

    Records that `prepare` did not write have no index: when they are first opened they are read
    once, and the index is kept for the next time.

    Args:
      source: a prepared directory, one of TFDS, one of DMVR's or Scenic's TFRecord tables, all on
        gs:// too; or `tfds:NAME[/CONFIG][:VERSION][@DATA_DIR]`, a data set that TFDS has built.
      split: its name; of a table, a word of its name will do if no other table has it.
      fps: frames a second of the records that do not say theirs; none or 0 if all do.

    Raises:
      InputError: no such source or split, one that is not whole, an empty split, records that
        cannot be used or do not say their frame rate.
    """
    if fps and not 0 < fps < np.inf:
        raise InputError(f"a frame rate (fps) must be above 0, not {fps}")
    source = absolute_source(source)
    if _is_external(source):
        return external.open_split(source, split, fps or None)
    return prepared.open_split(source, split)


def absolute_source(source: str | os.PathLike) -> str:
    """A source as `open_split` takes it, such that it is the same from any working directory."""
    source = os.fspath(source)
    if source.startswith(external.TFDS_SCHEME):
        name, at, data_dir = source.partition("@")
        return f"{name}{at}{absolute_source(data_dir)}" if at else source
    return os.path.abspath(source) if _is_local(source) else source


def _is_external(source: str) -> bool:
    if source.startswith(external.TFDS_SCHEME):
        return True
    if not tf.io.gfile.isdir(source):
        raise InputError(f"there is no folder {source}; make it with `timesformer prepare`")
    return not (
        prepared.split_names(source) or tf.io.gfile.exists(os.path.join(source, OPTIONS_FILE))
    )


def _is_local(directory: str | os.PathLike) -> bool:
    return "://" not in os.fspath(directory)
