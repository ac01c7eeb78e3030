"""Something-Something V2: JSON lists of clips, and lists of frames for copies as images."""

import posixpath
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from etils import epath

from timesformer_jax.data.annotations.clips import Clip, ParsedAnnotations
from timesformer_jax.data.annotations.files import (
    AnnotationFiles,
    lines,
    parse_integer,
    read_json,
    read_rows,
    text_field,
)
from timesformer_jax.data.annotations.videos import VideoFolder
from timesformer_jax.errors import InputError

# The header of the frame lists, with their misspelling.
_FRAME_LIST = ["original_vido_id", "video_id", "frame_id", "path", "labels"]


def read(
    folder: VideoFolder, annotations: AnnotationFiles, labels: Sequence[str] | None
) -> ParsedAnnotations:
    """Reads labels.json and {train,validation,test}.json, or their published names.

    A clip's video is `ID.webm`, or has any other extension. If the folder holds frames as images,
    `ID/*.jpg`, the frame lists train.csv and val.csv give the number of frames of each clip. Test
    clips are left out if there is no test-answers.csv.
    """
    names = _class_names(annotations.require(*_json_names("labels")))
    files = {split: annotations.find(*_json_names(split)) for split in ("train", "validation")}
    if not any(files.values()):
        raise annotations.missing_error(*_json_names("train"), *_json_names("validation"))
    test, notes = annotations.find(*_json_names("test")), ()
    answers = annotations.find("something-something-v2-test-answers.csv", "test-answers.csv")
    if test and answers:
        files["test"] = test
    elif test:
        held_out = len(read_json(test, list, "a list of clips"))
        notes = (f"test clips without a label, left out: {held_out:,}",)
    known = frozenset(names)
    locate = _frame_locator(annotations, folder) or _video_locator(folder)
    rows = []
    for split, path in files.items():
        templates = _answers(answers) if split == "test" else None
        for where, name, label in _entries(path, templates) if path else ():
            if label not in known:
                raise InputError(f"{where}: '{label}' is not in the labels file; check both files")
            file, frame_range = locate(name)
            rows.append((where, Clip(file, label, None, None, split, frame_range, name)))
    return ParsedAnnotations(rows, names, notes)


def _json_names(what: str) -> tuple[str, str]:
    return f"something-something-v2-{what}.json", f"{what}.json"


def _class_names(path: epath.Path) -> tuple[str, ...]:
    classes = read_json(path, dict, "an object of labels and their classes")
    indices = {
        name: parse_integer(f"{path} '{name}'", "class", str(classes[name])) for name in classes
    }
    names = tuple(sorted(indices, key=indices.__getitem__))
    if not names or [indices[name] for name in names] != list(range(len(names))):
        raise InputError(f"{path} does not number its labels 0, 1, 2, ...; download it again")
    return names


def _entries(
    path: epath.Path, templates: Mapping[str, str] | None
) -> Iterator[tuple[str, str, str]]:
    """For each clip: its place in the file, its id, and its label (template without brackets)."""
    for number, entry in enumerate(read_json(path, list, "a list of clips")):
        where = f"{path} entry {number}"
        name = text_field(where, entry, "id")
        if templates is None:
            template = text_field(where, entry, "template")
        elif name in templates:
            template = templates[name]
        else:
            raise InputError(f"{where}: clip {name} has no answer; download the answers again")
        yield where, name, template.replace("[", "").replace("]", "")


def _answers(path: epath.Path) -> dict[str, str]:
    answers = {}
    for where, row in read_rows(path, delimiter=";"):
        if len(row) != 2:
            raise InputError(f"{where} is not 'id;template'; download the file again")
        answers[row[0]] = row[1]
    return answers


def _video_locator(folder: VideoFolder) -> Callable[[str], tuple[str, None]]:
    """A function from a clip's id to its video, and no frame range."""

    def locate(name: str) -> tuple[str, None]:
        return folder.find(name) or folder.frames_by_name.get(name) or f"{name}.webm", None

    return locate


def _frame_locator(
    annotations: AnnotationFiles, folder: VideoFolder
) -> Callable[[str], tuple[str, tuple[int, int] | None]] | None:
    """A function from a clip's id to its folder of frames and their range.

    None if there are no frames or no frame lists.
    """
    paths = [
        path for path in map(annotations.find, ("train.csv", "val.csv", "validation.csv")) if path
    ]
    if not paths or not folder.frame_folders:
        return None
    counts: Counter = Counter()
    named = {}
    for path in paths:
        for name, frames_folder in _frame_list(path):
            counts[name] += 1
            named[name] = frames_folder

    def locate(name: str) -> tuple[str, tuple[int, int] | None]:
        file = folder.frames_by_name.get(named.get(name, name), name)
        return file, (0, counts[name]) if name in counts else None

    return locate


def _frame_list(path: epath.Path) -> Iterator[tuple[str, str]]:
    """For every frame: the id of its clip, and the name of its folder."""
    for number, line in enumerate(lines(path), start=1):
        row = line.split()
        if number == 1 and row != _FRAME_LIST:
            raise InputError(f"{path} has not the header '{' '.join(_FRAME_LIST)}'; add it")
        if row and len(row) != len(_FRAME_LIST):
            raise InputError(f"{path} line {number} has {len(row)} fields, not 5; correct it")
        if row and number > 1:
            yield row[0], posixpath.basename(posixpath.dirname(row[3]))
