"""Reads and writes files on a disk or on gs://. A written file is complete or does not exist."""

import errno
import fcntl
import functools
import hashlib
import io
import os
import pathlib
import socket
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from etils import epath

from timesformer_jax.errors import InputError, first_line

GCS = "gs://"


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is on remote storage such as gs://."""
    return "://" in os.fspath(path)


class RemoteFile(io.RawIOBase):
    """A file on gs://, opened for reading, with the interface of Python's own binary files.

    Raises:
      InputError: on any access, if the storage fails. It is not an OSError, by which a reader would
        consider the file itself damaged.
    """

    def __init__(self, path: str):
        self.name = path
        self._opened = ExitStack()
        with storage_errors(path):
            self._size = epath.Path(path).stat().length
            self._file = self._opened.enter_context(epath.Path(path).open("rb"))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        with storage_errors(self.name):
            content = self._file.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with storage_errors(self.name):
            origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._file.tell(), os.SEEK_END: self._size}
        if offset + origin[whence] < 0:  # a damaged file may ask for this; the storage did not fail
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        with storage_errors(self.name):
            self._file.seek(offset + origin[whence])
            return self._file.tell()

    def close(self) -> None:
        self._opened.close()
        super().close()


@contextmanager
def storage_errors(path: str) -> Iterator[None]:
    """Raises what the back end of a remote path raises as an InputError."""
    try:
        yield
    # The errors of TensorFlow and of other back ends have no other base class in common.
    except Exception as error:
        raise InputError(
            f"cannot read {path}: {first_line(error)}; run the same command again: finished work is"
            " kept"
        ) from error


def read_ranges(path: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Reads parts of a file, and no other bytes of it.

    Args:
      path: may be on gs://, which is asked for all parts at once.
      ranges: the first byte of each part, and its number of bytes.

    Returns:
      The parts. One that the file does not have in full is shorter.

    Raises:
      OSError: the file cannot be read.
    """
    if path.startswith(GCS):
        return _read_bucket_ranges(path, ranges)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return [_read_range(descriptor, first, size) for first, size in ranges]
    finally:
        os.close(descriptor)


def _read_range(descriptor: int, first: int, size: int) -> bytes:
    content = os.pread(descriptor, size, first)
    # A network's file system may give a part of what there is.
    while rest := size - len(content):
        more = os.pread(descriptor, rest, first + len(content))
        if not more:
            break
        content += more
    return content


def _read_bucket_ranges(path: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Reads by TensorStore, since TensorFlow asks for 64 MB from each place on."""
    bucket, _, name = path.removeprefix(GCS).partition("/")
    store = _bucket(bucket)
    parts = [store.read(name, byte_range=slice(at, at + size)) for at, size in ranges]
    return [_read_part(part) for part in parts]


def _read_part(part: Any) -> bytes:
    try:
        found = part.result()
    except ValueError as error:  # TensorStore has no other
        reason = first_line(error)
        if reason.startswith("OUT_OF_RANGE"):
            return b""
        raise OSError(errno.EIO, reason) from error
    if found.state == "missing":
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    return found.value


@functools.cache
def _bucket(name: str) -> Any:
    import tensorstore

    return tensorstore.KvStore.open({"driver": "gcs", "bucket": name}).result()


def cache_path(directory: str, name: str) -> str:
    """Where a file is kept that belongs into a directory which cannot be written."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = hashlib.sha256(directory.encode()).hexdigest()[:16]
    return os.path.join(cache, "timesformer_jax", folder, name)


def as_text(name: str) -> str:
    """A file's name as one line of text: bytes that are not UTF-8, and line breaks, are escaped."""
    text = name.encode("utf-8", "backslashreplace").decode()
    return text.replace("\n", "\\n").replace("\r", "\\r")


def absolute(path: str | os.PathLike) -> epath.Path:
    """The absolute path of a local path; a remote path as it is."""
    return epath.Path(path) if is_remote(path) else epath.Path(os.path.abspath(path))


def part_name(name: str) -> str:
    """No other process has it: not a worker left over from an earlier run, nor one elsewhere."""
    return f"{name}.{socket.gethostname()}.{os.getpid()}.part"


@contextmanager
def atomic_path(path: epath.Path) -> Iterator[epath.Path]:
    """Yields a temporary path to write to. `path` is then complete or unchanged, at any power loss.

    On a disk a file or a folder is written beside `path`, and renamed at the end; a folder must not
    exist yet. For gs:// it is a local file, and is uploaded at the end.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            temporary = epath.Path(folder) / path.name
            yield temporary
            try:
                temporary.copy(path, overwrite=True)
            except Exception as error:  # of any kind, as in `storage_errors`
                raise OSError(errno.EIO, first_line(error)) from error
        return
    temporary = path.with_name(part_name(path.name))
    try:
        yield temporary
        for written in (temporary, *pathlib.Path(temporary).rglob("*")):
            _sync(written)
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            temporary.rmtree()
        temporary.unlink(missing_ok=True)


def _sync(path: os.PathLike) -> None:
    """Waits until a file or a folder's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: epath.Path, content: bytes) -> None:
    """Writes a file, so that at any moment it is complete or does not exist."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def locked(directory: epath.Path) -> Iterator[None]:
    """Locks a directory against a second run. The lock ends with the process.

    gs:// has no locks: two runs do the same work twice there, and write the same bytes.

    Raises:
      InputError: another process has the lock.
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
                f"another run is preparing {directory}; wait for its end, or stop it"
            ) from error
        yield
    finally:
        os.close(descriptor)


def extension(path: str | os.PathLike) -> str:
    """The extension of a file's name in lower case, such as ".csv"."""
    return os.path.splitext(path)[1].lower()


def check_output(
    flag: str,
    path: str | None,
    extensions: Collection[str] = (),
    source: str | os.PathLike | None = None,
) -> None:
    """Checks before the work that a file can be written after it.

    Args:
      flag: that gave the path, such as "--output".
      path: of the file; None if there is none to write.
      extensions: those that the name may have, such as ".csv"; () for any.
      source: the input, which the file must not replace.

    Raises:
      InputError: the path has another extension, is a folder, is in no folder, or is the input.
    """
    if path is None:
        return
    if extensions and extension(path) not in extensions:
        raise InputError(f"{flag}={path}: the name must end in {', '.join(extensions)}")
    if is_remote(path):
        return
    if os.path.isdir(path):
        raise InputError(f"{flag}={path} is a folder; give the name of a file in it")
    try:
        os.lstat(part_name(path))  # `atomic_path` writes to it
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) or error.errno == errno.ENAMETOOLONG:
            raise InputError(
                f"{flag}={path!r:.60} is too long or has a null byte; give a shorter name"
            ) from error
    there = os.path.exists(path)
    if there and source and os.path.exists(source) and os.path.samefile(path, source):
        raise InputError(f"{flag}={path} is the input itself; give another name")
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise InputError(f"the folder of {flag}={path} does not exist")
    # `atomic_path` makes a new file in the folder; one that is protected is not to be replaced.
    if not os.access(folder, os.W_OK) or (there and not os.access(path, os.W_OK)):
        raise InputError(f"{flag}={path} may not be written; give another path")


@contextmanager
def disk_errors(output: str | os.PathLike) -> Iterator[None]:
    """Raises an OSError of writing as an InputError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(
                f"disk full at {output}; free space and run the same command again: finished"
                " work is kept"
            ) from error
        raise InputError(f"cannot write {output}: {error.strerror or error}") from error
