"""Files of places: where each stored frame of a split is, so that clips read their frames alone.

SPLIT.places lies beside SPLIT.index.npz: a digest of what the index says of where the records are,
12 bytes for each stored frame (`layout.PLACE`) in the order of the index, and a digest of all that.
It may have hundreds of megabytes and is not loaded: a clip reads the entries of its frames.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
from absl import logging
from etils import epath
from numpy.typing import ArrayLike
from tqdm import tqdm

from timesformer_jax.data.layout import DIGEST_BYTES, PLACE, places_path
from timesformer_jax.data.records import wire
from timesformer_jax.data.records.access import LONG_RECORD_BYTES, READ_THREADS, advice, read_record
from timesformer_jax.data.records.split import Split
from timesformer_jax.errors import InputError
from timesformer_jax.storage import atomic_path, cache_path, read_ranges

# Of the files; increase it when their content changes.
VERSION = 1

# The columns of the index that the file depends on.
COLUMNS = ("shard", "offset", "size", "num_frames", "stride")

CHUNK = 256  # records whose places are held at a time
CHUNK_BYTES = 1 << 20


def with_places(directory: str, split: Split) -> Split:
    """A split, as its index has it, with the file of its places; made if there is none.

    Data that was prepared by an earlier version has none. Then all records are read once, and the
    file is kept beside the index or, if that cannot be written, in the user's cache. Several
    processes at once do the same work and write the same file, each atomically.

    Args:
      directory: of the index.
      split: as its index has it.

    Raises:
      InputError: a record is damaged.
    """
    stored = split.num_stored.astype(np.int64)
    path = _find_or_make(directory, split)
    return replace(split, places=(path,) * len(split.files), first_place=np.cumsum(stored) - stored)


def _find_or_make(directory: str, split: Split) -> str | None:
    """The path of the file of places; None if it cannot be kept anywhere."""
    name = os.path.basename(places_path(directory, split.name))
    paths = (places_path(directory, split.name), cache_path(directory, name))
    begin = header(split.files, [getattr(split, column) for column in COLUMNS])
    for path in paths:
        if _is_complete(path, begin, int(split.num_stored.sum())):
            return path
    for path in paths:
        try:
            epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
            write(path, begin, _of_split(split))
        except OSError as error:
            logging.warning("cannot keep the places of frames at %s: %s", path, error)
        else:
            logging.info("clips of %s read their frames alone, by %s", split.name, path)
            return path
    logging.warning("clips of %s read their records whole", split.name)
    return None


def _is_complete(path: str, begin: bytes, count: int) -> bool:
    """Whether a file begins in this way and has so many places."""
    end = len(begin) + PLACE.itemsize * count
    try:
        found, digest = read_ranges(path, [(0, len(begin)), (end, DIGEST_BYTES)])
    except OSError:
        return False
    return found == begin and len(digest) == DIGEST_BYTES


def header(files: Sequence[str], columns: Sequence[ArrayLike]) -> bytes:
    """What a file of places begins with: a digest of where the records are.

    Args:
      files: names or paths of the shards.
      columns: (n,) each, those of the index that are in COLUMNS.
    """
    digest = hashlib.sha256(repr((VERSION, [os.path.basename(file) for file in files])).encode())
    for column in columns:
        digest.update(np.asarray(column, np.int64).tobytes())
    return digest.digest()


def write(path: str | os.PathLike, begin: bytes, places: Iterable[bytes]) -> None:
    """Writes a file of places.

    Args:
      path: of the file.
      begin: its `header`.
      places: of the stored frames, in order, in parts of any length.
    """
    digest = hashlib.sha256()
    with atomic_path(epath.Path(path)) as temporary, open(temporary, "wb") as file:
        for part in itertools.chain([begin], places):
            file.write(part)
            digest.update(part)
        file.write(digest.digest())


def is_damaged(path: str | os.PathLike) -> bool:
    """Whether a file of places has other bytes than were written."""
    digest = hashlib.sha256()
    with epath.Path(path).open("rb") as file:
        last = file.read(DIGEST_BYTES)
        while content := file.read(CHUNK_BYTES):
            last += content
            digest.update(last[:-DIGEST_BYTES])
            last = last[-DIGEST_BYTES:]
    return last != digest.digest()


def of_records(records: Iterable[tuple[str, int, int, int]]) -> Iterator[bytes]:
    """Reads records and finds the places of their frames.

    Args:
      records: file, offset, size and number of stored frames of each.

    Raises:
      InputError: a record is damaged, or has another number of frames.
    """

    one_at_a_time = threading.Lock()

    def places(record: tuple[str, int, int, int]) -> bytes:
        file, offset, size, count = record
        with one_at_a_time if size > LONG_RECORD_BYTES else contextlib.nullcontext():
            found = wire.frame_places(read_record(file, offset, size))
        if len(found) != count:
            raise InputError(
                f"{file} has {len(found)} frames in the record at byte {offset}, where the index"
                f" has {count}; {advice(file)}"
            )
        return found.tobytes()

    with ThreadPoolExecutor(READ_THREADS) as pool:
        yield from pool.map(places, records)


def _of_split(split: Split) -> Iterator[bytes]:
    files = (split.files[shard] for shard in split.shard)
    columns = (column.tolist() for column in (split.offset, split.size, split.num_stored))
    records = zip(files, *columns)
    with tqdm(total=len(split), unit="record", desc=f"finding frames of {split.name}") as bar:
        while chunk := list(itertools.islice(records, CHUNK)):
            yield from of_records(chunk)
            bar.update(len(chunk))
