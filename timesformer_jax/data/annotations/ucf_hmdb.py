"""UCF101 and HMDB51: one folder per class, and three numbered splits as text files."""

import posixpath
import re
from collections.abc import Sequence

from etils import epath

from timesformer_jax.data.annotations.clips import Clip, ParsedAnnotations
from timesformer_jax.data.annotations.files import AnnotationFiles, nonblank_lines, parse_integer
from timesformer_jax.data.annotations.videos import VideoFolder, stem
from timesformer_jax.errors import InputError


def read_ucf101(
    folder: VideoFolder, annotations: AnnotationFiles, labels: Sequence[str] | None
) -> ParsedAnnotations:
    """Reads classInd.txt, trainlist01.txt and testlist01.txt.

    To use split 02 or 03, give one of its files instead of the folder.
    """
    number = _number(annotations, r"(?:train|test)list(\d\d)\.txt", "01")
    names = _class_names(annotations.require("classInd.txt"))
    # The lists have v_HandStandPushups, the files v_HandstandPushups.
    videos = {name.lower(): paths[0] for name, paths in sorted(folder.by_stem.items())}
    rows = []
    for split in ("train", "test"):
        path = annotations.require(f"{split}list{number}.txt")
        for where, line in nonblank_lines(path):
            listed, _, index = line.partition(" ")
            label = posixpath.dirname(listed)
            if label not in names:
                raise InputError(f"{where}: class '{label}' is not in classInd.txt; check both")
            if index and parse_integer(where, "class", index) != names.index(label) + 1:
                raise InputError(f"{where}: {label} is not class {index} of classInd.txt")
            name = stem(listed)
            file = videos.get(name.lower(), listed)
            rows.append((where, Clip(file, label, None, None, split, name=name)))
    # The published counts are those of split 01.
    return ParsedAnnotations(rows, names, published_counts=None if number == "01" else {})


def read_hmdb51(
    folder: VideoFolder, annotations: AnnotationFiles, labels: Sequence[str] | None
) -> ParsedAnnotations:
    """Reads LABEL_test_split1.txt of every label: 1 means training, 2 test, 0 neither.

    To use split 2 or 3, give one of its files instead of the folder.
    """
    number = _number(annotations, r".+_test_split(\d)\.txt", "1")
    ending = f"_test_split{number}.txt"
    lists = {
        name.removesuffix(ending): path
        for name, path in sorted(annotations.by_name.items())
        if name.endswith(ending)
    }
    if not lists:
        raise annotations.missing_error(f"brush_hair{ending}")
    splits = {"1": "train", "2": "test"}
    rows, neither = [], 0
    for label, path in lists.items():
        for where, line in nonblank_lines(path):
            listed, _, part = line.rpartition(" ")
            if not listed or part not in ("0", *splits):
                raise InputError(f"{where} is not a file and 0, 1 or 2; download it again")
            if part == "0":
                neither += 1
                continue
            name = f"{label}/{stem(listed)}"
            file = _in_class(folder, stem(listed), label, lists) or f"{label}/{listed}"
            rows.append((where, Clip(file, label, None, None, splits[part], name=name)))
    notes = (f"videos in neither part of split {number}: {neither:,}",) if neither else ()
    return ParsedAnnotations(rows, notes=notes)


def _number(annotations: AnnotationFiles, pattern: str, default: str) -> str:
    """The number of the split in the name of a given file; the default if a folder was given."""
    for path in annotations.given:
        if match := re.fullmatch(pattern, path.name):
            return match[1]
    return default


def _class_names(path: epath.Path) -> tuple[str, ...]:
    names: list[str] = []
    for where, line in nonblank_lines(path):
        index, _, name = line.partition(" ")
        if not name or parse_integer(where, "class", index) != len(names) + 1:
            raise InputError(
                f"{where} is not class {len(names) + 1} and its name; download it again"
            )
        names.append(name)
    return tuple(names)


def _in_class(folder: VideoFolder, name: str, label: str, labels) -> str | None:
    """The video of this name in its class's folder or in no class folder.

    Videos of two classes may have the same name.
    """
    paths = folder.by_stem.get(name, ())
    parents = {path: posixpath.basename(posixpath.dirname(path)) for path in paths}
    in_class = [path for path in paths if parents[path] == label]
    in_none = [path for path in paths if parents[path] not in labels]
    return next(iter(in_class + in_none), None)
