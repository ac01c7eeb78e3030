"""A text file that grows by whole lines, also where a run is killed and the next one goes on."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

from timesformer_jax.errors import InputError
from timesformer_jax.storage import is_remote


class AppendedFile:
    """A file to which whole lines are appended: a context manager.

    Args:
      path: a new file, or one that an earlier run has written.
      beginning: of its text. A file that begins otherwise is refused and not changed; a file that
        was killed within its first line is begun again.

    Attributes:
      lines: those that the file has when it is opened, without their ends.

    Raises:
      InputError: on entering, if the file is another's, cannot be written or is being written.
    """

    def __init__(self, path: str | os.PathLike, beginning: str):
        self._path, self._beginning = os.fspath(path), os.fsencode(beginning)
        if is_remote(self._path):
            raise InputError(f"{self._path} cannot grow line by line; write to a disk and copy it")
        self.lines: list[str] = []

    def __enter__(self) -> AppendedFile:
        with self._errors():
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            self._begin()
        except BaseException:
            os.close(self._file)
            raise
        return self

    def __exit__(self, *_) -> None:
        os.close(self._file)

    def append(self, line: str) -> None:
        """Appends a line; it is in the file when this returns.

        Raises:
          InputError: if it cannot be written, for example on a full disk.
        """
        rest = memoryview(os.fsencode(f"{line}\n"))
        with self._errors():
            while rest:
                rest = rest[os.write(self._file, rest) :]

    def keep(self, count: int) -> None:
        """Cuts the file off after its first `count` lines."""
        self.lines = self.lines[:count]
        with self._errors():
            os.ftruncate(self._file, sum(len(os.fsencode(line)) + 1 for line in self.lines))

    def _begin(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"another run is writing {self._path}; wait for its end, or give another --output"
            ) from error
        with self._errors(), open(self._path, "rb") as file:
            content = file.read()
        known = min(len(content), len(self._beginning))
        if content[:known] != self._beginning[:known]:
            raise InputError(
                f"{self._path} holds something else, or results of other settings; give another "
                "--output, or remove it"
            )
        whole = content[: content.rfind(b"\n") + 1]
        with self._errors():
            os.ftruncate(self._file, len(whole))
        self.lines = os.fsdecode(whole).split("\n")[:-1]

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"cannot write {self._path}: {error.strerror}; what it holds stays: run the same "
                "command again to go on"
            ) from error
