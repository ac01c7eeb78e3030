"""Files that are whole or not there, on a disk or on gs://."""

import errno
import fcntl
import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from etils import epath

from timesformer_jax.errors import InputError


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is on gs:// or the like."""
    return "://" in os.fspath(path)


class RemoteFile(io.RawIOBase):
    """A file on gs:// to read, as Python's own are, which TensorFlow's are not quite.

    Raises:
      InputError: on reading, the storage does not answer: not the file's fault, who reads it must
        not take it for damaged.
    """

    def __init__(self, path: str):
        self.name = path
        self._opened = ExitStack()
        with _storage_errors(path):
            self._size = epath.Path(path).stat().length
            self._file = self._opened.enter_context(epath.Path(path).open("rb"))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        with _storage_errors(self.name):
            content = self._file.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with _storage_errors(self.name):
            origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._file.tell(), os.SEEK_END: self._size}
        if offset + origin[whence] < 0:  # what a damaged file asks for is its own fault
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        with _storage_errors(self.name):
            self._file.seek(offset + origin[whence])
            return self._file.tell()

    def close(self) -> None:
        self._opened.close()
        super().close()


@contextmanager
def _storage_errors(path: str) -> Iterator[None]:
    try:
        yield
    # TensorFlow's errors and those of other back ends have no base in common but this.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"cannot read {path}: {reason}; run the same command again: what is finished is kept"
        ) from error


def absolute(path: str | os.PathLike) -> epath.Path:
    return epath.Path(path) if is_remote(path) else epath.Path(os.path.abspath(path))


@contextmanager
def atomic_path(path: epath.Path) -> Iterator[epath.Path]:
    """Yields where to write a file, such that `path` is there whole or not, even if the power goes.

    That is a temporary file, beside it on a disk, renamed at the end; or on a disk here, sent.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            temporary = epath.Path(folder) / path.name
            yield temporary
            temporary.copy(path, overwrite=True)
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


def write_atomically(path: epath.Path, content: bytes) -> None:
    """Writes a file such that it is there whole or not at all."""
    with atomic_path(path) as temporary:
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
