"""failures.csv: the clips that are missing or cannot be decoded, and the reasons."""

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict

from etils import epath

from timesformer_jax.data.annotations import Clip
from timesformer_jax.storage import write_atomically

COLUMNS = ("id", "path", "label", "start", "end", "split", "frame_range", "reason")


def failure(clip: Clip, reason: str) -> dict:
    """A row of the csv, of values that JSON keeps."""
    row = {"id": clip.id, **asdict(clip), "reason": reason}
    row["frame_range"] = None if clip.frame_range is None else list(clip.frame_range)
    return {column: row[column] for column in COLUMNS}


def write_failures(path: epath.Path, failures: Iterable[Mapping]) -> None:
    """Writes the csv, sorted by id; of each row the COLUMNS.

    Raises:
      OSError: it cannot be written.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(failures, key=lambda row: row["id"]))
    write_atomically(path, text.getvalue().encode())


def count_failures(path: epath.Path) -> Counter[str] | None:
    """The number of failures of each split; None if there is no such file."""
    if not path.exists():
        return None
    return Counter(row["split"] for row in csv.DictReader(path.read_text().splitlines()))
