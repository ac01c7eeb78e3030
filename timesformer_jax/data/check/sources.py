"""What a folder holds that is to be checked, seen from its files' names, without TensorFlow."""

import os

from etils import epath

from timesformer_jax.data.annotations.videos import walk
from timesformer_jax.data.layout import INFO_FILE, MANIFESTS, OPTIONS_FILE, index_path
from timesformer_jax.data.problems import RUN_AGAIN
from timesformer_jax.errors import InputError
from timesformer_jax.storage import is_remote


def holds_videos(folder: str | os.PathLike) -> bool:
    """Whether a local folder holds videos to be prepared, and `prepare` did not write it."""
    if is_remote(folder) or not os.path.isdir(folder) or _is_written(epath.Path(folder)):
        return False
    found = walk(folder, follow=True)
    return bool(found.videos or found.frame_folders)


def require_prepared(folder: str | os.PathLike) -> None:
    """Raises InputError unless `prepare` wrote and completed a folder."""
    root = epath.Path(folder)
    if not root.is_dir():
        raise InputError(f"there is no folder {root}; give one that `timesformer prepare` wrote")
    if not _is_written(root):
        raise InputError(
            f"{root} was not written by `timesformer prepare`; to check videos give --videos=DIR"
        )
    if not (root / INFO_FILE).exists():
        manifests = root / MANIFESTS
        done = len(list(manifests.glob("*.json"))) if manifests.is_dir() else 0
        raise InputError(
            f"{root} is incomplete: {done} shards are done, and {INFO_FILE}, which is written"
            f" last, is missing; {RUN_AGAIN}: it continues where it stopped"
        )


def _is_written(root: epath.Path) -> bool:
    return (root / OPTIONS_FILE).exists() or any(root.glob(index_path("", "*")))
