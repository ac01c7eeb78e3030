"""Files that are whole or not there, on a disk or on gs://."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

from etils import epath

from timesformer_jax.errors import InputError


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is on gs:// or the like. An object there appears whole, or it does not."""
    return "://" in os.fspath(path)


def absolute(path: str | os.PathLike) -> epath.Path:
    return epath.Path(path) if is_remote(path) else epath.Path(os.path.abspath(path))


@contextmanager
def appearing(path: epath.Path) -> Iterator[epath.Path]:
    """Yields where to write a file, such that `path` is there whole or not, even if the power goes.

    On a disk that is a temporary file beside it, renamed at the end.
    """
    if is_remote(path):
        yield path
        return
    # Named by process, so that a straggler of a run before cannot spoil what is written here.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: epath.Path, content: bytes) -> None:
    """Writes a file such that it is there whole or not at all."""
    with appearing(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def locked(directory: epath.Path) -> Iterator[None]:
    """Keeps a second run out of a directory; the system drops the lock with the process.

    On gs:// there are no locks: two runs there do the same work twice, and write the same bytes.
    """
    if is_remote(directory):
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"another run is preparing {directory}; wait for it, or end it"
            ) from error
        yield
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(output: str | os.PathLike) -> Iterator[None]:
    """Turns what goes wrong with writing into one line; what is finished stays."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(
                f"disk full at {output}; free space and run the same command again: finished"
                " shards are kept"
            ) from error
        raise InputError(f"cannot write {output}: {error.strerror or error}") from error
