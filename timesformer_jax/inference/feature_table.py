"""A table of features, a row a video: Parquet or .npz, which grows on a disk until it is complete.

Columns:
  id: the video's path as it was found, or the clip's id in the annotations.
  path, label, split: text; "" if unknown.
  start, end: seconds, NaN where there is no bound.
  features: (D,) float32, the class token after the final norm, the mean over clips and crops.
  clips: (V, C, D) float32, of V clips with C crops.
  frames: (V, C, T, D) float32, the mean of the patches of every frame; if asked for.
  positions: (V, C, N, D) float32, the mean of the patches of every position; if asked for.

In Parquet the arrays are nested lists of fixed sizes. Both formats hold what the features were
made with: a JSON text, in the array `settings` or the metadata "timesformer_jax" of the schema.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, BinaryIO

import numpy as np
from etils import epath

from timesformer_jax import storage
from timesformer_jax.errors import InputError, install
from timesformer_jax.inference.appended import AppendedFile
from timesformer_jax.inference.sources import Source
from timesformer_jax.storage import absolute, as_text, atomic_path, disk_errors, is_remote

TEXTS = ("id", "path", "label", "split")
NUMBERS = ("start", "end")
METADATA = b"timesformer_jax"

# Rows of a row group of Parquet, which is held in memory while it is written.
ROWS_AT_A_TIME = 256

Shapes = dict[str, tuple[int, ...]]


def check_output(output: str) -> None:
    """Raises InputError if a table cannot be written there, before anything is computed."""
    if is_remote(output):
        raise InputError(f"--output={output} must be on a disk; copy the table when it is complete")
    storage.check_output("--output", output, (".parquet", ".npz"))
    if _is_parquet(output):
        _parquet(output)


def _is_parquet(output: str) -> bool:
    return storage.extension(output) == ".parquet"


class GrowingTable:
    """A table that rows are appended to: a context manager.

    Rows are kept in the folder OUTPUT.part, in which a killed run can go on. A row is there once
    its line in rows.jsonl is; its arrays were written before.

    Args:
      output: the table, .parquet or .npz.
      settings: what the features depend on beside the video: JSON values.
      shapes: of a row's arrays, by column.

    Attributes:
      ids: of the rows that are there already.

    Raises:
      InputError: on entering, if the output has other settings, or is not a table of ours.
    """

    def __init__(self, output: str, settings: Mapping[str, Any], shapes: Shapes):
        self.output, self.part = output, f"{output}.part"
        self._about = json.dumps({"settings": settings, "shapes": shapes})
        self._shapes = shapes
        self._rows: AppendedFile | None = None
        self._arrays: dict[str, BinaryIO] = {}
        self.ids: set[str] = set()

    def __enter__(self) -> GrowingTable:
        self._opened = ExitStack()
        self._remove_old()
        if os.path.isdir(self.part) or not os.path.exists(self.output):
            self._open()
        else:
            self.ids = {row["id"] for row in self._complete_rows()}
        return self

    def __exit__(self, *_) -> None:
        self._opened.close()

    def append(self, source: Source, arrays: Mapping[str, np.ndarray]) -> None:
        """Appends a row.

        Args:
          source: what the features are of.
          arrays: float32, of `shapes`.
        """
        if self._rows is None:
            self._copy_output()
            self._open()
        assert self._rows is not None
        with disk_errors(self.part):
            for name, shape in self._shapes.items():
                assert arrays[name].shape == shape, (name, arrays[name].shape, shape)
                self._arrays[name].write(np.ascontiguousarray(arrays[name], "<f4").tobytes())
                self._arrays[name].flush()
        row = {name: as_text(getattr(source, name)) for name in TEXTS}
        row |= {name: getattr(source, name) for name in NUMBERS}
        self._rows.append(json.dumps(row))

    def finish(self) -> int:
        """Writes the table, whole or not at all, and removes the folder. Returns its rows."""
        if self._rows is None:
            return len(self.ids)
        with open(os.path.join(self.part, "rows.jsonl"), encoding="utf-8") as file:
            rows = [json.loads(line) for line in file.readlines()[1:]]
        if rows:
            write = _write_parquet if _is_parquet(self.output) else _write_npz
            with disk_errors(self.output), atomic_path(absolute(self.output)) as temporary:
                write(temporary, self.part, rows, self._shapes, self._about)
        # Renamed first: of a folder that is removed in part, the next run would take no row and
        # replace the table by its own videos. The lock lasts until there is nothing to take.
        with disk_errors(self.part):
            os.rename(self.part, f"{self.part}.old")
        self._remove_old()
        self._opened.close()
        return len(rows)

    def _remove_old(self) -> None:
        shutil.rmtree(f"{self.part}.old", ignore_errors=True)

    def _open(self) -> None:
        """Opens the folder, and cuts off what a killed run left of a row."""
        with disk_errors(self.part):
            os.makedirs(self.part, exist_ok=True)
        rows = AppendedFile(os.path.join(self.part, "rows.jsonl"), f"{self._about}\n")
        self._rows = self._opened.enter_context(rows)
        if not rows.lines:
            rows.append(self._about)
        count = len(rows.lines[1:])
        for name, shape in self._shapes.items():
            path, size = os.path.join(self.part, f"{name}.f32"), 4 * math.prod(shape)
            with disk_errors(path):
                file = self._opened.enter_context(open(path, "ab"))  # noqa: SIM115
            self._arrays[name] = file
            count = min(count, os.path.getsize(path) // size)
        for name, shape in self._shapes.items():
            self._arrays[name].truncate(count * 4 * math.prod(shape))
        if rows.lines:
            rows.keep(count + 1)
        self.ids = {json.loads(line)["id"] for line in rows.lines[1:]}

    def _complete_rows(self) -> list[dict[str, Any]]:
        about, rows = _read_rows(self.output)
        if about != self._about:
            raise InputError(
                f"{self.output} has features of other settings ({about}); give another --output, "
                "or remove it"
            )
        return rows

    def _copy_output(self) -> None:
        """Makes the folder from the complete table."""
        new = f"{self.part}.new"
        with disk_errors(new):
            shutil.rmtree(new, ignore_errors=True)
            os.makedirs(new)
            copy = _copy_parquet if _is_parquet(self.output) else _copy_npz
            for name in self._shapes:
                with open(os.path.join(new, f"{name}.f32"), "wb") as file:
                    copy(self.output, name, file)
            lines = [self._about, *map(json.dumps, self._complete_rows())]
            with open(os.path.join(new, "rows.jsonl"), "w", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in lines)
            os.rename(new, self.part)


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    texts = {name: np.array([row[name] for row in rows], str) for name in TEXTS}
    return texts | {
        name: np.array([math.nan if row[name] is None else row[name] for row in rows])
        for name in NUMBERS
    }


def _read_rows(output: str) -> tuple[str, list[dict[str, Any]]]:
    """The settings and the rows of a complete table, without its arrays."""
    try:
        if _is_parquet(output):
            table = _parquet(output).read_table(output, columns=[*TEXTS, *NUMBERS])
            about = table.schema.metadata[METADATA].decode()
            columns = {name: table[name].to_pylist() for name in table.column_names}
        else:
            with np.load(output) as arrays:
                about = str(arrays["settings"])
                columns = {name: arrays[name].tolist() for name in (*TEXTS, *NUMBERS)}
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{output} is no table of features; give another --output, or remove it"
        ) from error
    rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
    for row in rows:
        row.update({name: None for name in NUMBERS if math.isnan(row[name])})
    return about, rows


# ---- .npz ---------------------------------------------------------------------------------------


def _write_npz(
    path: epath.Path, part: str, rows: list[dict[str, Any]], shapes: Shapes, about: str
) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, column in (_columns(rows) | {"settings": np.array(about)}).items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, column, allow_pickle=False)
        for name, shape in shapes.items():
            header = {"descr": "<f4", "fortran_order": False, "shape": (len(rows), *shape)}
            with (
                archive.open(f"{name}.npy", "w", force_zip64=True) as file,
                open(os.path.join(part, f"{name}.f32"), "rb") as raw,
            ):
                np.lib.format.write_array_header_1_0(file, header)
                shutil.copyfileobj(raw, file)


def _copy_npz(output: str, name: str, raw: BinaryIO) -> None:
    with zipfile.ZipFile(output) as archive, archive.open(f"{name}.npy") as file:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        shutil.copyfileobj(file, raw)


# ---- Parquet ------------------------------------------------------------------------------------


def _parquet(output: str) -> Any:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise InputError(
            f"{output} needs the package pyarrow: {install('parquet')}; or write .npz"
        ) from error
    return pyarrow.parquet


def _write_parquet(
    path: epath.Path, part: str, rows: list[dict[str, Any]], shapes: Shapes, about: str
) -> None:
    import pyarrow as pa

    columns = _columns(rows)
    types = {name: pa.string() for name in TEXTS} | {name: pa.float64() for name in NUMBERS}
    types |= {name: _list_type(shape) for name, shape in shapes.items()}
    schema = pa.schema(types, {METADATA: about.encode()})
    arrays = {
        name: np.memmap(os.path.join(part, f"{name}.f32"), "<f4", "r", shape=(len(rows), *shape))
        for name, shape in shapes.items()
    }
    with _parquet(str(path)).ParquetWriter(str(path), schema) as writer:
        for first in range(0, len(rows), ROWS_AT_A_TIME):
            own = slice(first, first + ROWS_AT_A_TIME)
            batch = [pa.array(x[own].tolist(), types[name]) for name, x in columns.items()]
            batch += [_nested(x[own]) for x in arrays.values()]
            writer.write_table(pa.Table.from_arrays(batch, schema=schema))


def _list_type(shape: tuple[int, ...]) -> Any:
    import pyarrow as pa

    kind = pa.float32()
    for size in reversed(shape):
        kind = pa.list_(kind, size)
    return kind


def _nested(arrays: np.ndarray) -> Any:
    """(n, ...) float32 as n nested lists of fixed sizes."""
    import pyarrow as pa

    found = pa.array(arrays.reshape(-1))
    for size in reversed(arrays.shape[1:]):
        found = pa.FixedSizeListArray.from_arrays(found, size)
    return found


def _copy_parquet(output: str, name: str, raw: BinaryIO) -> None:
    for column in _batches(output, name):
        while hasattr(column, "flatten") and column.type.num_fields:
            column = column.flatten()
        raw.write(np.asarray(column, "<f4").tobytes())


def _batches(output: str, name: str) -> Iterator[Any]:
    file = _parquet(output).ParquetFile(output)
    for batch in file.iter_batches(ROWS_AT_A_TIME, columns=[name]):
        yield batch.column(0)
