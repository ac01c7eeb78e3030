"""Custom data sets: one folder per class, or a csv."""

import posixpath
from collections import defaultdict

from timesformer_jax.data.annotations.clips import SPLIT_NAMES, Clip, ParsedAnnotations
from timesformer_jax.data.annotations.files import (
    AnnotationFiles,
    parse_seconds,
    parse_split,
    read_table,
)
from timesformer_jax.data.annotations.videos import VideoFolder
from timesformer_jax.errors import InputError

# Labels that hold one of these are probably several.
SEPARATORS = (";", "|")
ONE_LABEL = "none"

# Of a csv.
COLUMNS = ("path", "label", "start", "end", "split")


def read_folders(folder: VideoFolder) -> ParsedAnnotations:
    """Reads the labels, and splits if there are any, from the paths of the videos.

    The paths are `label/x.mp4` or `{train,validation,test}/label/x.mp4`.
    """
    if not folder.videos:
        raise InputError(
            f"{folder.root} holds no video file; give a folder with one folder per class"
        )
    if loose := [path for path in folder.videos if "/" not in path]:
        raise InputError(
            f"{loose[0]} is in {folder.root} itself, in no class folder;"
            " move it into one, or give a csv of annotations"
        )
    if not _holds_splits(folder):
        clips = [_folder_clip(path, path.split("/")[0], "") for path in folder.videos]
    else:
        clips = []
        for path in folder.videos:
            split, label = path.split("/")[:2]
            clips.append(_folder_clip(path, label, SPLIT_NAMES[split.lower()]))
    return ParsedAnnotations([(clip.path, clip) for clip in clips])


def read_csv(annotations: AnnotationFiles, multilabel: str | None = None) -> ParsedAnnotations:
    """Reads a csv with a header and the columns path, label[, start, end (seconds)][, split].

    Args:
      annotations: the csv.
      multilabel: what separates the labels of a clip; ONE_LABEL: a clip has one, whatever its name
        holds; None: a clip has one, and a name that looks like several is an error.
    """
    if len(annotations.given) != 1:
        raise InputError(
            f"{annotations.where} is not one csv of clips; give one, or name the published data"
            " set of these annotations with dataset"
        )
    (path,) = annotations.given
    hint = "it needs path and label, and may have start, end and split"
    table = list(read_table(path, ("path", "label"), hint))
    if not table:
        raise InputError(f"{path} lists no clip below its header; add one row per clip")
    notes = ()
    if ignored := [column for column in table[0][1] if column not in COLUMNS]:
        notes = (f"columns of {path} that are not read: {', '.join(ignored)}",)
    return ParsedAnnotations(
        [(where, _csv_clip(where, row, multilabel)) for where, row in table], notes=notes
    )


def _folder_clip(path: str, label: str, split: str) -> Clip:
    return Clip(path, label.strip(), None, None, split)


def _holds_splits(folder: VideoFolder) -> bool:
    """Whether the top folders are splits: they have such names, and videos only in subfolders."""
    depths = defaultdict(set)
    for path in folder.videos:
        depths[path.split("/")[0]].add(path.count("/"))
    splits = [name for name in depths if name.lower() in SPLIT_NAMES and min(depths[name]) > 1]
    others = [name for name in depths if name not in splits]
    if splits and others:
        raise InputError(
            f"{folder.root} mixes split folders ({splits[0]}) and class folders ({others[0]});"
            " use DIR/label/video or DIR/split/label/video throughout"
        )
    return bool(splits)


def _csv_clip(where: str, row: dict[str, str], multilabel: str | None) -> Clip:
    separator = None if multilabel == ONE_LABEL else multilabel
    for needed in ("path",) if separator else ("path", "label"):
        if not row[needed]:
            raise InputError(f"{where} has no {needed}; fill it in or remove the line")
    if multilabel is None and (found := [x for x in SEPARATORS if x in row["label"].strip(x)]):
        raise InputError(
            f"{where}: is '{row['label']}' one label or several? add --multilabel='{found[0]}' for"
            f" several, or --multilabel={ONE_LABEL} for one"
        )
    start, end = (parse_seconds(where, name, row.get(name, "")) for name in ("start", "end"))
    if end is not None and end <= (start or 0):
        raise InputError(f"{where}: the end, {end:g} s, is not after the start, {start or 0:g} s")
    split = row.get("split", "")
    path = posixpath.normpath(row["path"].replace("\\", "/"))
    labels = _split_labels(row["label"], separator) if separator else None
    label = row["label"] if labels is None else (separator or "").join(labels)
    split = parse_split(where, split) if split else ""
    return Clip(path, label, start, end, split, labels=labels)


def _split_labels(text: str, separator: str) -> tuple[str, ...]:
    return tuple(sorted({name.strip() for name in text.split(separator)} - {""}))
