"""Finds the file or directory of a checkpoint that is given by path or by name."""

from __future__ import annotations

import os
from typing import NamedTuple

from timesformer_jax import storage
from timesformer_jax.checkpoints import store
from timesformer_jax.checkpoints.files import is_weights_directory
from timesformer_jax.errors import InputError


class NoCheckpoint(InputError):
    """There is no checkpoint of a path or name."""


class Located(NamedTuple):
    """Where a checkpoint is.

    Attributes:
      source: as it was given, for messages.
      path: of the file or directory.
      is_native: whether it is of our own format.
    """

    source: str
    path: str
    is_native: bool


def locate(source: str | os.PathLike, revision: str | None = None) -> Located:
    """Finds a checkpoint. A path that exists goes before a name.

    Args:
      source: a path, or a name.
      revision: of a name.

    Raises:
      NoCheckpoint: if there is none; it says what was looked for.
    """
    source = os.fspath(source)
    path = storage.absolute(source)
    if path.is_file():
        return Located(source, source, False)
    if store.is_native(source):
        return Located(source, source, not is_weights_directory(source))
    raise NoCheckpoint(
        f"{source}: no checkpoint there: neither a file nor a folder of this name exists"
    )
