"""Which clips a data set has: a folder a class, or a csv, read to one list of clips.

Every reader gives the same list on every machine: sorted by id, with splits that depend on
nothing but the ids.
"""

import csv
import hashlib
import math
import os
import posixpath
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from timesformer_jax.errors import InputError

VIDEO_EXTENSIONS = (
    *(".3gp", ".avi", ".flv", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg"),
    *(".mts", ".ogv", ".ts", ".webm", ".wmv"),
)

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True)
class Clip:
    """A piece of a video file, and what it shows.

    path: of the video file, relative to the videos folder, with forward slashes.
    start, end: seconds from the beginning of the video, [start, end); None: no bound.
    split: `train`, `validation` or `test`; empty until `read` has assigned one.
    """

    path: str
    label: str
    start: float | None
    end: float | None
    split: str

    @property
    def id(self) -> str:
        """The path, with `#start-end` when trimmed: `cats/a.mp4`, `b.mp4#2-4.5`, `b.mp4#7-`."""
        if self.start is None and self.end is None:
            return self.path
        return f"{self.path}#{_seconds(self.start)}-{_seconds(self.end)}"


def read(
    videos: str | os.PathLike,
    annotations: str | os.PathLike | None = None,
    labels: Sequence[str] | None = None,
    validation_fraction: float = 0.1,
) -> list[Clip]:
    """Lists the clips of a data set, sorted by id.

    Args:
      videos: the folder that holds the video files.
      annotations: a csv with a header and the columns path (relative to `videos`) and label, and
        optionally start, end (seconds) and split. None: a folder a class, `VIDEOS/label/x.mp4`,
        or `VIDEOS/{train,validation,test}/label/x.mp4`; files of other extensions than
        VIDEO_EXTENSIONS are passed over.
      labels: the only labels allowed. None: any, but one that training never sees is refused.
      validation_fraction: share of the clips without a split that goes to validation, label by
        label; the rest goes to train.

    Listed files that are missing are still listed: preparing them records the failure.

    Raises:
      InputError: nothing there, a row that cannot be read, a label not allowed, a clip twice.
    """
    if not 0 <= validation_fraction < 1:
        raise InputError(
            f"the validation fraction is {validation_fraction}; give one from 0 to below 1"
        )
    if not os.path.isdir(videos):
        raise InputError(f"there is no folder {videos}; give the folder that holds the videos")
    rows = _read_folders(Path(videos)) if annotations is None else _read_csv(Path(annotations))
    clips = _checked(rows, labels)
    if annotations is not None:
        _require_a_file(clips, videos, annotations)
    clips = assign_splits(sorted(clips, key=lambda clip: clip.id), validation_fraction)
    if labels is None:
        _require_trained_labels(clips)
    return clips


def label_names(clips: Sequence[Clip]) -> tuple[str, ...]:
    """The label map when none is given: the distinct labels, sorted; the class is the position."""
    return tuple(sorted({clip.label for clip in clips}))


def read_labels(path: str | os.PathLike) -> tuple[str, ...]:
    """Reads a label map: a name a line, the class is the line's position (from 0)."""
    names = [line.strip() for line in _read_text(Path(path)).splitlines()]
    names = [name for name in names if name]
    if not names:
        raise InputError(f"{path} holds no label; give a file with a label name a line")
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise InputError(f"{path} names the label '{repeated[0]}' twice; leave one")
    return tuple(names)


def assign_splits(clips: Sequence[Clip], validation_fraction: float) -> list[Clip]:
    """Gives clips without a split one: train, or for a fixed share of each label validation.

    Each label's clips are put in the order of a hash of their id, and the first
    round(fraction * n) are for validation: at least one and not all, if there are two or more.
    So the choice is the same on every machine and does not follow the order of the names.
    """
    unassigned = defaultdict(list)
    for clip in clips:
        if not clip.split:
            unassigned[clip.label].append(clip.id)
    validation = set()
    for ids in unassigned.values():
        share = round(validation_fraction * len(ids))
        if validation_fraction > 0:
            share = min(max(share, 1), len(ids) - 1)
        validation.update(sorted(ids, key=hash_of)[:share])
    return [
        clip
        if clip.split
        else replace(clip, split="validation" if clip.id in validation else "train")
        for clip in clips
    ]


def hash_of(clip_id: str) -> bytes:
    """An order for clips that is the same everywhere and has nothing to do with their names."""
    return hashlib.sha256(clip_id.encode()).digest()


# A row is where it was read from, for messages (`clips.csv line 7`), and the clip.
_Row = tuple[str, Clip]


def _read_folders(videos: Path) -> list[_Row]:
    found = _video_files(videos)
    if not found:
        raise InputError(f"{videos} holds no video file; give a folder with a folder a class")
    if loose := [path for path in found if "/" not in path]:
        raise InputError(
            f"{loose[0]} lies in {videos} itself, in no class folder;"
            " move it into one, or give a csv of annotations"
        )
    if not _holds_splits(videos, found):
        clips = [_folder_clip(path, path.split("/")[0], "") for path in found]
    else:
        clips = []
        for path in found:
            split, label = path.split("/")[:2]
            clips.append(_folder_clip(path, label, SPLIT_NAMES[split.lower()]))
    return [(clip.path, clip) for clip in clips]


def _folder_clip(path: str, label: str, split: str) -> Clip:
    return Clip(path, label.strip(), None, None, split)


def _video_files(videos: Path) -> list[str]:
    """Every video file below a folder, relative to it; linked folders are entered."""
    found = []
    for folder, subfolders, files in os.walk(videos, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [
            (Path(folder) / name).relative_to(videos).as_posix()
            for name in files
            if Path(name).suffix.lower() in VIDEO_EXTENSIONS and not name.startswith(".")
        ]
    return sorted(found)


def _holds_splits(videos: Path, found: Sequence[str]) -> bool:
    """Whether the first folders are splits: named so, and holding their videos in subfolders."""
    depths = defaultdict(set)
    for path in found:
        depths[path.split("/")[0]].add(path.count("/"))
    splits = [name for name in depths if name.lower() in SPLIT_NAMES and min(depths[name]) > 1]
    others = [name for name in depths if name not in splits]
    if splits and others:
        raise InputError(
            f"{videos} mixes split folders ({splits[0]}) and class folders ({others[0]});"
            " use DIR/label/video or DIR/split/label/video throughout"
        )
    return bool(splits)


def _read_csv(annotations: Path) -> list[_Row]:
    reader = csv.DictReader(_read_text(annotations).splitlines(keepends=True), strict=True)
    columns = [(name or "").strip() for name in _next_row(annotations, reader) or ()]
    for needed in ("path", "label"):
        if needed not in columns:
            found = ", ".join(columns) or "none"
            raise InputError(
                f"{annotations} has no column '{needed}' in its header (found: {found});"
                " it needs path and label, and may have start, end and split"
            )
    reader.fieldnames = columns
    rows = []
    for where, row in _numbered_rows(annotations, reader):
        rows.append((where, _csv_clip(where, row)))
    if not rows:
        raise InputError(f"{annotations} lists no clip below its header; add a row a clip")
    return rows


def _next_row(annotations: Path, reader: csv.DictReader):
    try:
        return reader.fieldnames
    except csv.Error as error:
        raise InputError(f"{annotations} is not a csv: {error}; write it again as one") from error


def _numbered_rows(annotations: Path, reader: csv.DictReader) -> Iterator[tuple[str, dict]]:
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            where = f"{annotations} after line {reader.line_num}"
            raise InputError(f"{where}: {error}; mend the quotes there") from error
        yield f"{annotations} line {reader.line_num}", row


def _csv_clip(where: str, row: dict) -> Clip:
    if None in row:
        raise InputError(f"{where} has more fields than the header; quote a field with a comma")
    row = {name: (value or "").strip() for name, value in row.items()}
    for needed in ("path", "label"):
        if not row[needed]:
            raise InputError(f"{where} has no {needed}; fill it in or remove the line")
    start, end = (_time(where, name, row.get(name, "")) for name in ("start", "end"))
    if end is not None and end <= (start or 0):
        raise InputError(f"{where}: the end, {end:g} s, is not after the start, {start or 0:g} s")
    split = row.get("split", "")
    if split and split.lower() not in SPLIT_NAMES:
        raise InputError(f"{where}: split '{split}' is not one of {', '.join(SPLIT_NAMES)}")
    path = posixpath.normpath(row["path"].replace("\\", "/"))
    return Clip(path, row["label"], start, end, SPLIT_NAMES[split.lower()] if split else "")


def _time(where: str, name: str, text: str) -> float | None:
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise InputError(f"{where}: {name} '{text}' is not a number of seconds, 0 or more")
    return seconds


def _checked(rows: Sequence[_Row], labels: Sequence[str] | None) -> list[Clip]:
    allowed = None if labels is None else frozenset(labels)
    seen = {}
    for where, clip in rows:
        if len(clip.label.splitlines()) != 1:
            raise InputError(f"{where}: the label {clip.label!r} is not one line; rename it")
        if allowed is not None and clip.label not in allowed:
            raise InputError(
                f"{where}: label '{clip.label}' is not in the label file; add it there"
            )
        if clip.id in seen:
            raise InputError(f"{where}: {clip.id} is listed twice (first: {seen[clip.id]})")
        seen[clip.id] = where
    return [clip for _, clip in rows]


def _require_a_file(clips: Sequence[Clip], videos, annotations) -> None:
    if not any(os.path.isfile(os.path.join(videos, clip.path)) for clip in clips):
        raise InputError(
            f"none of the {len(clips)} clips of {annotations} is in {videos} (first:"
            f" {clips[0].path}); give the folder that the paths are relative to"
        )


def _require_trained_labels(clips: Sequence[Clip]) -> None:
    """A label met only in validation is a typing error far more often than it is meant."""
    trained = {clip.label for clip in clips if clip.split == "train"}
    for clip in clips:
        if trained and clip.label not in trained:
            raise InputError(
                f"unknown label '{clip.label}': {clip.id} is for {clip.split}, and no clip of"
                " train has it; correct it, or name all labels in a label file"
            )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not text in UTF-8; save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def _seconds(value: float | None) -> str:
    return "" if value is None else str(value).removesuffix(".0")
