"""Annotation files: found, and read with one line of error that says where.

They may be on gs:// as well, which etils.epath reads.
"""

import csv
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from etils import epath

from timesformer_jax.data.annotations.clips import SPLIT_NAMES
from timesformer_jax.errors import InputError

Location = str | os.PathLike


@dataclass(frozen=True)
class AnnotationFiles:
    """Where annotations were said to be.

    where: as given, for messages. given: the files themselves, if files were given and not a
    folder. folders: the folder, or those that the files are in.
    """

    where: str
    given: tuple[epath.Path, ...]
    folders: tuple[epath.Path, ...]

    @cached_property
    def by_name(self) -> dict[str, epath.Path]:
        """Every file of the folders."""
        found = {}
        for folder in self.folders:
            with reading(folder):
                found |= {path.name: path for path in folder.iterdir()}
        return found

    def first(self, *names: str) -> epath.Path | None:
        """The file of the first of these names that is there."""
        return next((self.by_name[name] for name in names if name in self.by_name), None)

    def require(self, *names: str) -> epath.Path:
        """As `first`; none is an InputError that says what was looked for."""
        path = self.first(*names)
        if path is None:
            raise self.lacks(*names)
        return path

    def lacks(self, *names: str) -> InputError:
        return InputError(
            f"{self.where} has no {' or '.join(names)}; give the folder of the annotation files"
            " as their publisher ships them"
        )


def annotation_files(annotations: Location | Sequence[Location]) -> AnnotationFiles:
    """Finds the annotation files in a folder, or those given themselves and what lies beside them.

    Raises:
      InputError: there is no such file or folder.
    """
    many = isinstance(annotations, Sequence) and not isinstance(annotations, str)
    paths = [epath.Path(path) for path in (annotations if many else [annotations])]
    given, folders = [], []
    for path in paths:
        with reading(path):
            if path.is_dir():
                folders.append(path)
            else:
                path.stat()  # a missing file is told of here
                given.append(path)
                folders.append(path.parent)
    return AnnotationFiles(", ".join(map(os.fspath, paths)), tuple(given), tuple(folders))


def lines(path: epath.Path) -> Iterator[str]:
    """The lines of a text file in UTF-8, one at a time: a list of frames has tens of millions."""
    encoding = "utf-8-sig"
    with reading(path), path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield line.decode(encoding)
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{path} line {number} is not text in UTF-8; save it as UTF-8"
                ) from error
            encoding = "utf-8"


def full_lines(path: epath.Path) -> Iterator[tuple[str, str]]:
    """Where each line that is not blank stands (`a.txt line 3`), and the line, stripped."""
    for number, line in enumerate(lines(path), start=1):
        if line.strip():
            yield f"{path} line {number}", line.strip()


def read_labels(path: Location) -> tuple[str, ...]:
    """Reads a label map: a name a line, the class is the line's position (from 0)."""
    names = [name for _, name in full_lines(epath.Path(path))]
    if not names:
        raise InputError(f"{path} holds no label; give a file with a label name a line")
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise InputError(f"{path} names the label '{repeated[0]}' twice; leave one")
    return tuple(names)


def table(
    path: epath.Path, needed: Sequence[str], says: str, delimiter: str = ","
) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a csv with a header: where each stands, and its fields, stripped.

    Args:
      needed: columns that must be there, in any order and among others.
      says: what to do where one is not, for the message.

    Raises:
      InputError: a column is lacking, a row has more fields than the header, broken quotes.
    """
    reader = csv.reader(lines(path), delimiter=delimiter, strict=True)
    rows = _csv_rows(path, reader)
    _, header = next(rows, ("", []))
    for column in needed:
        if column not in header:
            found = ", ".join(header) or "none"
            raise InputError(
                f"{path} has no column '{column}' in its header (found: {found}); {says}"
            )
    for where, row in rows:
        if len(row) > len(header):
            raise InputError(f"{where} has more fields than the header; quote a field with a comma")
        yield where, dict(zip(header, row + [""] * (len(header) - len(row))))


def csv_rows(path: epath.Path, delimiter: str = ",") -> Iterator[tuple[str, list[str]]]:
    """The rows of a csv without a header, as `table` reads one."""
    return _csv_rows(path, csv.reader(lines(path), delimiter=delimiter, strict=True))


def _csv_rows(path: epath.Path, reader) -> Iterator[tuple[str, list[str]]]:
    whole = 0
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # An open quote runs to the end of the file: the line before it is what is known.
            where = f"{path} after line {whole}"
            raise InputError(f"{where}: {error}; mend the quotes there") from error
        whole = reader.line_num
        if any(row):
            yield f"{path} line {whole}", [field.strip() for field in row]


def read_json(path: epath.Path, kind: type, says: str) -> Any:
    """Reads a JSON file whose outermost value is of a kind (list or dict).

    Args:
      says: what the file holds, for the message.
    """
    try:
        with reading(path):
            value = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path} line {error.lineno} is not JSON ({error.msg}); download it again"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not text in UTF-8; save it as UTF-8") from error
    if not isinstance(value, kind):
        raise InputError(f"{path} is not {says}; download it again")
    return value


def field(where: str, entry: Any, name: str) -> str:
    """A field of a JSON object, text or a number, as text.

    Raises:
      InputError: no object, or no such field.
    """
    value = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(value, str | int):
        raise InputError(f"{where} has no '{name}'; download the file again")
    return str(value)


def integer(where: str, name: str, text: str) -> int:
    """A whole number, 0 or more."""
    if not text.isdecimal():
        raise InputError(f"{where}: {name} '{text}' is not a whole number, 0 or more; correct it")
    return int(text)


def seconds(where: str, name: str, text: str) -> float | None:
    """A time in seconds; None where nothing is written."""
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise InputError(f"{where}: {name} '{text}' is not a number of seconds, 0 or more")
    return value


def named_split(where: str, text: str) -> str:
    """The split that is meant by one of SPLIT_NAMES."""
    if text.lower() not in SPLIT_NAMES:
        raise InputError(f"{where}: split '{text}' is not one of {', '.join(SPLIT_NAMES)}")
    return SPLIT_NAMES[text.lower()]


@contextmanager
def reading(path: epath.Path) -> Iterator[None]:
    """What goes wrong in reading a file or folder, as an InputError."""
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"cannot read {path}: {_reason(error)}; check the path") from error
    except Exception as error:
        # What reads gs:// has errors of its own.
        if "://" not in os.fspath(path):
            raise
        raise InputError(f"cannot read {path}: {_reason(error)}; check the path") from error


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0]
