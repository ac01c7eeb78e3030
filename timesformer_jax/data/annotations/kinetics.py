"""Kinetics-400 and -600: the publisher's csv, or lists of `path label` that other projects use.

Videos are found by name, in any subfolder and with any extension: `ID_000012_000022.mp4` is the
clip from 12 s to 22 s; `ID.mp4` is the whole video, which is trimmed to the times in the csv.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

from etils import epath

from timesformer_jax.data.annotations.clips import (
    SPLIT_NAMES,
    Clip,
    ParsedAnnotations,
    Row,
    name_classes,
)
from timesformer_jax.data.annotations.files import (
    AnnotationFiles,
    lines,
    nonblank_lines,
    parse_integer,
    parse_split,
    read_rows,
    read_table,
)
from timesformer_jax.data.annotations.videos import VIDEO_EXTENSIONS, VideoFolder, is_video, stem
from timesformer_jax.errors import InputError

_COLUMNS = ("youtube_id", "time_start", "time_end")
_TRIMMED = re.compile(r"(.+)_\d{6}_\d{6}")

# Paths and labels may contain spaces. The path ends with a known extension, or before a label that
# is a whole number, or at the first space.
_EXTENSIONS = "|".join(map(re.escape, VIDEO_EXTENSIONS))
_PATH_AND_LABEL = re.compile(
    rf"(.*?(?:{_EXTENSIONS})|.+(?=\s-?\d+$)|\S+)(?:\s+(.*))?", re.IGNORECASE
)


def read(
    folder: VideoFolder, annotations: AnnotationFiles, labels: Sequence[str] | None
) -> ParsedAnnotations:
    """Reads train.csv, val.csv (validate.csv) and test.csv, if they exist.

    They have the header label, youtube_id, time_start, time_end[, split], or no header and on each
    line a path and a label, separated by a space or a comma. If all labels are numbers, they are
    classes, and `labels` are their names. Test clips without a label are left out.
    """
    rows, held_out = [], 0
    for path in annotations.given or _split_files(annotations):
        for where, clip in _rows(folder, path):
            if clip.label:
                rows.append((where, clip))
            elif clip.split == "test":
                held_out += 1
            else:
                raise InputError(f"{where} has no label; add it or remove the line")
    notes = (f"test clips without a label, left out: {held_out:,}",) if held_out else ()
    if not all(clip.label.isdecimal() for _, clip in rows):
        return ParsedAnnotations(rows, None, notes)
    return ParsedAnnotations(*name_classes(rows, labels), notes)


def _split_files(annotations: AnnotationFiles) -> list[epath.Path]:
    names = [name for name in annotations.by_name if name.endswith(".csv")]
    files = [annotations.by_name[name] for name in sorted(names) if _split_of(name)]
    if not files:
        raise annotations.missing_error("train.csv", "val.csv", "validate.csv", "test.csv")
    return files


def _split_of(name: str) -> str:
    """The split in a file's name (`kinetics-400_train.csv`); empty if there is none."""
    words = re.split("[^a-z]+", name.lower())
    splits = {SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES}
    return splits.pop() if len(splits) == 1 else ""


def _rows(folder: VideoFolder, path: epath.Path) -> Iterator[Row]:
    split = _split_of(path.name)
    first = next(lines(path), "")
    columns = [column.strip() for column in first.split(",")]
    if set(_COLUMNS) & set(columns):
        yield from _published(folder, path, split)
        return
    if not split:
        raise InputError(f"{path} has no split in its name; name it train.csv, val.csv or test.csv")
    if columns[:2] == ["path", "label"]:
        raise InputError(
            f"{path} has the header of a custom csv; remove the header, or give no dataset"
        )
    find = _VideoFinder(folder)
    for where, text, label in _with_commas(path) if "," in first else _with_spaces(path):
        name = stem(text)
        file = find(text) or (text if is_video(text) else f"{text}.mp4").lstrip("/")
        yield where, Clip(file, label, None, None, split, name=name)


def _published(folder: VideoFolder, path: epath.Path, split: str) -> Iterator[Row]:
    for where, row in read_table(
        path, _COLUMNS, "give the publisher's csv, or lines of path and label"
    ):
        start, end = (parse_integer(where, name, row[name]) for name in _COLUMNS[1:])
        if end <= start:
            raise InputError(f"{where}: time_end {end} is not after time_start {start}; correct it")
        of_row = parse_split(where, row["split"]) if row.get("split") else split
        if not of_row:
            raise InputError(f"{where} has no split; name the file train.csv, val.csv or test.csv")
        name = f"{row['youtube_id']}_{start:06d}_{end:06d}"
        file = folder.find(name)
        times: tuple[float | None, float | None] = (None, None)
        if file is None and (whole := folder.find(row["youtube_id"])):
            file, times = whole, (float(start), float(end))
        yield where, Clip(file or f"{name}.mp4", row.get("label", ""), *times, of_row, name=name)


def _with_commas(path: epath.Path) -> Iterator[tuple[str, str, str]]:
    for where, row in read_rows(path):
        if len(row) > 2:
            raise InputError(f"{where} has {len(row)} fields; give a path and a label, quoted")
        yield where, row[0], row[1] if len(row) == 2 else ""


def _with_spaces(path: epath.Path) -> Iterator[tuple[str, str, str]]:
    for where, line in nonblank_lines(path):
        match = _PATH_AND_LABEL.fullmatch(line)
        assert match is not None  # the pattern takes any line
        text, label = match.groups(default="")
        if re.fullmatch(r"-\d+|-?\d+(\s+-?\d+)+", label):
            raise InputError(f"{where}: '{label}' is not one class; give a path and a label a line")
        yield where, text, label


class _VideoFinder:
    """Finds the video of a line: by its path, by its file name, or by the id of a trimmed clip."""

    def __init__(self, folder: VideoFolder):
        self._folder = folder
        self._by_id = defaultdict(list)
        for name in folder.by_stem:
            if match := _TRIMMED.fullmatch(name):
                self._by_id[match[1]].append(name)

    def __call__(self, path: str) -> str | None:
        if path in self._folder.files:
            return path
        names = [stem(path)]
        if names[0] not in self._folder.by_stem:
            names = self._by_id[names[0]]
        if len(names) > 1:
            raise InputError(
                f"{path} may be {names[0]} or {names[1]}; list one of them by its full name"
            )
        return self._folder.find(names[0]) if names else None
