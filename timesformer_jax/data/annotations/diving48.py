"""Diving-48: JSON lists of clips with frame ranges."""

from collections.abc import Sequence

from etils import epath

from timesformer_jax.data.annotations.clips import Clip, ParsedAnnotations, name_classes
from timesformer_jax.data.annotations.files import (
    AnnotationFiles,
    parse_integer,
    read_json,
    text_field,
)
from timesformer_jax.data.annotations.videos import VideoFolder
from timesformer_jax.errors import InputError


def read(
    folder: VideoFolder, annotations: AnnotationFiles, labels: Sequence[str] | None
) -> ParsedAnnotations:
    """Reads Diving48_V2_{train,test}.json, or the lists of version 1 if there are no others.

    The class names are `labels`, those of Diving48_vocab.json (the four parts of a dive, joined) or
    the class numbers. `end_frame` is taken as exclusive.
    """
    vocabulary = annotations.find("Diving48_vocab.json", "vocab.json")
    if labels is None and vocabulary:
        labels = _class_names(vocabulary)
    rows = []
    for split in ("train", "test"):
        path = annotations.find(*_list_names(split))
        for number, entry in enumerate(read_json(path, list, "a list of clips") if path else ()):
            where = f"{path} entry {number}"
            name = text_field(where, entry, "vid_name")
            label, first, last = (
                parse_integer(where, key, text_field(where, entry, key))
                for key in ("label", "start_frame", "end_frame")
            )
            if last <= first:
                raise InputError(f"{where}: end_frame {last} is not after start_frame {first}")
            file = folder.find(name) or f"{name}.mp4"
            rows.append((where, Clip(file, str(label), None, None, split, (first, last), name)))
    if not rows:
        raise annotations.missing_error(*_list_names("train"), *_list_names("test"))
    return ParsedAnnotations(*name_classes(rows, labels))


def _list_names(split: str) -> tuple[str, ...]:
    return f"Diving48_V2_{split}.json", f"{split}.json", f"Diving48_{split}.json"


def _class_names(path: epath.Path) -> tuple[str, ...]:
    """Names such as `Back 15som 05Twis FREE`."""
    entries = read_json(path, list, "a list of classes")
    for number, parts in enumerate(entries):
        if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
            raise InputError(f"{path} entry {number} is not a list of words; download it again")
    return tuple(" ".join(parts) for parts in entries)
