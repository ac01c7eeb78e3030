"""Finds the file or directory of a checkpoint that is given by path or by name."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from absl import logging

from timesformer_jax import storage
from timesformer_jax.checkpoints import bucket, catalogue, hub, store
from timesformer_jax.checkpoints.catalogue import Pretrained
from timesformer_jax.checkpoints.files import is_weights_directory
from timesformer_jax.errors import InputError, did_you_mean

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_FILE_ENDS = (".pyth", ".pth", ".pt", ".bin", ".npz", ".safetensors", ".ckpt", ".h5")


class Located(NamedTuple):
    """Where a checkpoint is.

    Attributes:
      source: as it was given, for messages.
      path: of the file or directory.
      is_native: whether it is of our own format.
      known: what is known of it by its name.
    """

    source: str
    path: str
    is_native: bool = False
    known: Pretrained | None = None


def locate(source: str | os.PathLike, revision: str | None = None) -> Located:
    """Finds a checkpoint. A path that exists goes before a name.

    Args:
      source: a path, or a name as in `list_pretrained`; `NAME@REVISION` names a revision too.
      revision: of a name on the Hugging Face Hub.

    Raises:
      InputError: if there is none, with what was looked for, or a name cannot be downloaded.
    """
    source = os.fspath(source)
    if not source or "\0" in source:
        raise InputError("no checkpoint given: give a path or a name")
    in_bucket = bucket.full_name(source)
    if not source.startswith("gs://vit_models/") and (found := _by_path(source)):
        _no_revision(source, revision)
        return found
    if in_bucket:
        _no_revision(source, revision)
        known = catalogue.by_name(f"gs://vit_models/{in_bucket}")
        return Located(source, bucket.download(in_bucket), known=known)
    name, _, at = source.partition("@")
    if _is_hub_name(name):
        logging.info("%s: no file or folder here: taken as a name on the Hugging Face Hub", name)
        path = hub.download(name, revision or at or None)
        return Located(source, path, known=catalogue.by_name(name))
    raise InputError(_not_found(source))


def _no_revision(source: str, revision: str | None) -> None:
    if revision is not None:
        raise InputError(
            f"revision={revision!r} is of a name on the Hugging Face Hub, and {source} is none:"
            " leave it out"
        )


def full_name(source: str | os.PathLike) -> str:
    """A checkpoint's absolute path, or its name as it was given, to be written to a result."""
    source = os.fspath(source)
    return str(storage.absolute(source)) if _by_path(source) else source


def _by_path(source: str) -> Located | None:
    try:
        if storage.absolute(source).is_file():
            return Located(source, source)
        if store.is_native(source):
            return Located(source, source, is_native=not is_weights_directory(source))
    except OSError as e:  # for example a name that is too long
        raise InputError(f"{source}: cannot be opened: {e.strerror or e}") from None
    return None


def _is_hub_name(name: str) -> bool:
    """Whether a path that does not exist may be asked for on the network.

    A misspelt path is not: one with the ending of a file, or in a folder that exists here.
    """
    return (
        bool(_HUB_NAME.fullmatch(name))
        and not name.endswith(_FILE_ENDS)
        and not os.path.isdir(name.partition("/")[0])
    )


def _not_found(source: str) -> str:
    message = f"{source}: no checkpoint there: neither a file nor a folder of this name exists"
    if place := catalogue.where_to_get(os.path.basename(source)):
        return f"{message}; {place}"
    names = [known.name for known in catalogue.list_pretrained() if known.downloads]
    hint = did_you_mean(source, names, cutoff=0.8)
    return message + (hint or "; names that are downloaded: timesformer checkpoints")
