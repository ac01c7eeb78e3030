"""Finds and reads annotation files, local or on gs://. Errors name the file and the line."""

import contextlib
import csv
import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from etils import epath

from timesformer_jax.data.annotations.clips import SPLIT_NAMES
from timesformer_jax.errors import InputError, first_line
from timesformer_jax.ranges import RANGES
from timesformer_jax.storage import is_remote

# Bytes of a line; those of annotations have hundreds.
MAX_LINE = 1 << 20

Location = str | os.PathLike


@dataclass(frozen=True)
class AnnotationFiles:
    """The location of annotations.

    where: as given by the user, for messages. given: the files, if files were given instead of a
    folder. folders: the folder, or the folders of the files.
    """

    where: str
    given: tuple[epath.Path, ...]
    folders: tuple[epath.Path, ...]

    @cached_property
    def by_name(self) -> dict[str, epath.Path]:
        """All files in the folders."""
        found: dict[str, epath.Path] = {}
        for folder in self.folders:
            with read_errors(folder):
                found |= {path.name: path for path in folder.iterdir()}
        return found

    def find(self, *names: str) -> epath.Path | None:
        """The file of the first of these names that exists."""
        return next((self.by_name[name] for name in names if name in self.by_name), None)

    def require(self, *names: str) -> epath.Path:
        """As `find`, but raises an InputError if none exists."""
        path = self.find(*names)
        if path is None:
            raise self.missing_error(*names)
        return path

    def missing_error(self, *names: str) -> InputError:
        return InputError(
            f"{self.where} has no {' or '.join(names)}; give the folder of the annotation files"
            " as their publisher provides them"
        )


def annotation_files(annotations: Location | Sequence[Location]) -> AnnotationFiles:
    """Finds annotation files: those of a folder, or given files and the others in their folders.

    Raises:
      InputError: there is no such file or folder.
    """
    if isinstance(annotations, str) or not isinstance(annotations, Sequence):
        annotations = [annotations]
    paths = [epath.Path(path) for path in annotations]
    given, folders = [], []
    for path in paths:
        with read_errors(path):
            if path.is_dir():
                folders.append(path)
            else:
                path.stat()  # raises if the file is missing
                given.append(path)
                folders.append(path.parent)
    return AnnotationFiles(", ".join(map(os.fspath, paths)), tuple(given), tuple(folders))


def lines(path: epath.Path) -> Iterator[str]:
    """Yields the lines of a UTF-8 file. It is not read whole: frame lists have 10^7 lines."""
    encoding = "utf-8-sig"
    require_no_device(path)
    with read_errors(path), path.open("rb") as file:
        # Files on gs:// read whole lines only.
        local = not is_remote(path)
        read = (lambda: file.readline(MAX_LINE)) if local else file.readline
        for number, line in enumerate(iter(read, b""), start=1):
            if len(line) >= MAX_LINE:
                raise InputError(f"{path} line {number} has over {MAX_LINE} bytes: it is no text")
            try:
                yield line.decode(encoding)
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{path} line {number} is not text in UTF-8; save it as UTF-8"
                ) from error
            encoding = "utf-8"


def nonblank_lines(path: epath.Path) -> Iterator[tuple[str, str]]:
    """Yields the place of each nonblank line (`a.txt line 3`), and the line, stripped."""
    for number, line in enumerate(lines(path), start=1):
        if line.strip():
            yield f"{path} line {number}", line.strip()


def read_labels(path: Location) -> tuple[str, ...]:
    """Reads a label map: one name per line. The class is the position of the line, from 0."""
    names = [name for _, name in nonblank_lines(epath.Path(path))]
    if not names:
        raise InputError(f"{path} holds no label; give a file with one label name per line")
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise InputError(f"{path} names the label '{repeated[0]}' twice; remove one")
    return tuple(names)


def read_table(
    path: epath.Path, needed: Sequence[str], hint: str, delimiter: str = ","
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields the rows of a csv with a header: the place of each, and its fields, stripped.

    Args:
      needed: columns that must exist, in any order; there may be others.
      hint: what to do if one is missing, for the message.

    Raises:
      InputError: a column is missing, a row has more fields than the header, unclosed quotes.
    """
    reader = csv.reader(lines(path), delimiter=delimiter, strict=True)
    rows = _parse_rows(path, reader)
    _, header = next(rows, ("", []))
    for column in needed:
        if column not in header:
            found = ", ".join(header) or "none"
            raise InputError(
                f"{path} has no column '{column}' in its header (found: {found}); {hint}"
            )
    for where, row in rows:
        if len(row) > len(header):
            raise InputError(f"{where} has more fields than the header; quote a field with a comma")
        yield where, dict(zip(header, row + [""] * (len(header) - len(row))))


def read_rows(path: epath.Path, delimiter: str = ",") -> Iterator[tuple[str, list[str]]]:
    """Yields the rows of a csv without a header; see `read_table`."""
    return _parse_rows(path, csv.reader(lines(path), delimiter=delimiter, strict=True))


def _parse_rows(path: epath.Path, reader) -> Iterator[tuple[str, list[str]]]:
    last_line = 0
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # An unclosed quote extends to the end of the file; only the row before it is known.
            where = f"{path} after line {last_line}"
            raise InputError(f"{where}: {error}; correct the quotes there") from error
        last_line = reader.line_num
        if any(row):
            yield f"{path} line {last_line}", [field.strip() for field in row]


def read_json(path: epath.Path, kind: type, content: str) -> Any:
    """Reads a JSON file whose outermost value has type `kind` (list or dict).

    Args:
      content: what the file holds, for the message.
    """
    try:
        require_no_device(path)
        with read_errors(path):
            value = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path} line {error.lineno} is not JSON ({error.msg}); download it again"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not text in UTF-8; save it as UTF-8") from error
    if not isinstance(value, kind):
        raise InputError(f"{path} is not {content}; download it again")
    return value


def require_no_device(path: epath.Path) -> None:
    """Raises an InputError for a device, which may have no end. A pipe is as good as a file."""
    mode = 0
    with contextlib.suppress(OSError, ValueError):  # it is told when it is opened
        mode = 0 if is_remote(path) else os.stat(path).st_mode
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        raise InputError(f"{path} is a device; give a file")


def text_field(where: str, entry: Any, name: str) -> str:
    """A field of a JSON object as text; it may be text or a whole number.

    Raises:
      InputError: `entry` is no object, or has no such field.
    """
    value = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(value, str | int):
        raise InputError(f"{where} has no '{name}'; download the file again")
    return str(value)


def parse_integer(where: str, name: str, text: str) -> int:
    """Parses a whole number, 0 or more."""
    if not text.isdecimal():
        raise InputError(f"{where}: {name} '{text}' is not a whole number, 0 or more; correct it")
    return int(text)


def parse_seconds(where: str, name: str, text: str) -> float | None:
    """Parses a time in seconds; None for an empty text."""
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if value not in RANGES["start"]:
        raise InputError(
            f"{where}: {name} '{text:.40}' is not a number of seconds, {RANGES['start']}"
        )
    return value


def parse_split(where: str, text: str) -> str:
    """The split of one of SPLIT_NAMES."""
    if text.lower() not in SPLIT_NAMES:
        raise InputError(f"{where}: split '{text}' is not one of {', '.join(SPLIT_NAMES)}")
    return SPLIT_NAMES[text.lower()]


@contextmanager
def read_errors(path: epath.Path) -> Iterator[None]:
    """Raises errors of reading a file or folder as an InputError."""
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"cannot read {path}: {first_line(error)}; check the path") from error
    except Exception as error:
        # The back ends of gs:// raise errors of their own kinds.
        if "://" not in os.fspath(path):
            raise
        raise InputError(f"cannot read {path}: {first_line(error)}; check the path") from error
