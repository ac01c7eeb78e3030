"""Something-Something V2: labels, train, validation and test as JSON; frames by a frame list."""

import posixpath
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from etils import epath

from timesformer_jax.data.annotations.clips import Clip, ParsedAnnotations
from timesformer_jax.data.annotations.files import (
    AnnotationFiles,
    csv_rows,
    field,
    integer,
    lines,
    read_json,
)
from timesformer_jax.data.annotations.videos import VideoFolder
from timesformer_jax.errors import InputError

# The header of the frame lists, as it is spelled there.
_FRAME_LIST = ["original_vido_id", "video_id", "frame_id", "path", "labels"]


def read(
    folder: VideoFolder, annotations: AnnotationFiles, labels: Sequence[str] | None
) -> ParsedAnnotations:
    """Reads labels.json and {train,validation,test}.json, also by their names at publication.

    A video is `ID.webm`, or any other video named so. Where the folder holds frames as images
    instead, `ID/*.jpg`, the frame lists train.csv and val.csv tell how many a clip must have. Test
    clips are left out, unless test-answers.csv is there.
    """
    names = _class_names(annotations.require(*_json_names("labels")))
    files = {split: annotations.first(*_json_names(split)) for split in ("train", "validation")}
    if not any(files.values()):
        raise annotations.lacks(*_json_names("train"), *_json_names("validation"))
    test, notes = annotations.first(*_json_names("test")), ()
    answers = annotations.first("something-something-v2-test-answers.csv", "test-answers.csv")
    if test and answers:
        files["test"] = test
    elif test:
        held_out = len(read_json(test, list, "a list of clips"))
        notes = (f"test clips without a label, left out: {held_out:,}",)
    known = frozenset(names)
    locate = _frames(annotations, folder) or _videos(folder)
    rows = []
    for split, path in files.items():
        templates = _answers(answers) if split == "test" else None
        for where, name, label in _entries(path, templates) if path else ():
            if label not in known:
                raise InputError(f"{where}: '{label}' is not in the labels file; check both files")
            file, frames = locate(name)
            rows.append((where, Clip(file, label, None, None, split, frames, name)))
    return ParsedAnnotations(rows, names, notes)


def _json_names(what: str) -> tuple[str, str]:
    return f"something-something-v2-{what}.json", f"{what}.json"


def _class_names(path: epath.Path) -> tuple[str, ...]:
    classes = read_json(path, dict, "an object of labels and their classes")
    indices = {name: integer(f"{path} '{name}'", "class", str(classes[name])) for name in classes}
    names = tuple(sorted(indices, key=indices.get))
    if not names or [indices[name] for name in names] != list(range(len(names))):
        raise InputError(f"{path} does not number its labels 0, 1, 2, ...; download it again")
    return names


def _entries(
    path: epath.Path, templates: Mapping[str, str] | None
) -> Iterator[tuple[str, str, str]]:
    """Where each clip is listed, its id and its label: the template without the brackets."""
    for number, entry in enumerate(read_json(path, list, "a list of clips")):
        where = f"{path} entry {number}"
        name = field(where, entry, "id")
        if templates is None:
            template = field(where, entry, "template")
        elif name in templates:
            template = templates[name]
        else:
            raise InputError(f"{where}: clip {name} has no answer; download the answers again")
        yield where, name, template.replace("[", "").replace("]", "")


def _answers(path: epath.Path) -> dict[str, str]:
    answers = {}
    for where, row in csv_rows(path, delimiter=";"):
        if len(row) != 2:
            raise InputError(f"{where} is not 'id;template'; download the file again")
        answers[row[0]] = row[1]
    return answers


def _videos(folder: VideoFolder):
    def locate(name: str) -> tuple[str, None]:
        return folder.find(name) or folder.frames_by_name.get(name) or f"{name}.webm", None

    return locate


def _frames(annotations: AnnotationFiles, folder: VideoFolder):
    """How to find a clip's frames, where there are frames and a list of them."""
    paths = [
        path for path in map(annotations.first, ("train.csv", "val.csv", "validation.csv")) if path
    ]
    if not paths or not folder.frame_folders:
        return None
    counts, named = Counter(), {}
    for path in paths:
        for name, frames_folder in _frame_list(path):
            counts[name] += 1
            named[name] = frames_folder

    def locate(name: str) -> tuple[str, tuple[int, int] | None]:
        file = folder.frames_by_name.get(named.get(name, name), name)
        return file, (0, counts[name]) if name in counts else None

    return locate


def _frame_list(path: epath.Path) -> Iterator[tuple[str, str]]:
    """The id of the clip, and the name of the folder, of every frame listed."""
    for number, line in enumerate(lines(path), start=1):
        row = line.split()
        if number == 1 and row != _FRAME_LIST:
            raise InputError(f"{path} has not the header '{' '.join(_FRAME_LIST)}'; write it so")
        if row and len(row) != len(_FRAME_LIST):
            raise InputError(f"{path} line {number} has {len(row)} fields, not 5; write it again")
        if row and number > 1:
            yield row[0], posixpath.basename(posixpath.dirname(row[3]))
