"""The videos that a command line names: files, folders, quoted globs, lists of clips."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import os
from collections.abc import Sequence

from absl import logging
from etils import epath

from timesformer_jax.data import annotations as annotations_lib
from timesformer_jax.data.annotations.custom import ONE_LABEL, read_folders
from timesformer_jax.data.annotations.files import read_errors
from timesformer_jax.data.annotations.videos import (
    IMAGE_EXTENSIONS,
    VIDEO_EXTENSIONS,
    is_video,
    walk,
)
from timesformer_jax.errors import InputError
from timesformer_jax.storage import as_text, is_remote


@dataclasses.dataclass(frozen=True)
class Source:
    """A video, or a part of one.

    Attributes:
      id: its name in the results, one line of text.
      path: of the file, or of a folder of images.
      label, split: its class and split, "" if unknown.
      start, end: seconds; None: no bound.
      frame_range: [first, last) of its frames instead of start and end.
    """

    id: str
    path: str
    label: str = ""
    split: str = ""
    start: float | None = None
    end: float | None = None
    frame_range: tuple[int, int] | None = None


def find(
    given: Sequence[str],
    start: float | None = None,
    end: float | None = None,
    follow: bool = False,
) -> list[Source]:
    """The videos that paths and globs name, each once, in order.

    Args:
      given: files, taken whatever their names; folders, whose video files are found in all
        subfolders; and globs, in which ** is any number of folders. A folder that holds images
        itself is one video; other folders of images count where no video file is found.
      start, end: of every video.
      follow: accept symbolic links that lead out of a folder.

    Returns:
      The videos. Those of a folder with one folder per class (or `train/CLASS` and so on) have its
      name as their label.

    Raises:
      InputError: a folder without videos, a link that leads out of it, or a glob that fits no path.
    """
    found: dict[str, Source] = {}
    for each in given:
        is_glob = not is_remote(each) and not os.path.exists(each) and glob.has_magic(each)
        sources = _expanded(each, follow) if is_glob else _listed(each, follow)
        if not sources:
            kinds = ", ".join(VIDEO_EXTENSIONS)
            hint = "in a glob, ** is any number of folders" if is_glob else "give files or folders"
            raise InputError(f"{each} holds no video ({kinds}); {hint}")
        for source in sources:
            found.setdefault(source.path, dataclasses.replace(source, start=start, end=end))
    return list(found.values())


def of_annotations(
    folder: str,
    annotations: str,
    dataset: str | None = None,
    labels: str | None = None,
    follow: bool = False,
) -> list[Source]:
    """The clips of a data set, as `prepare` lists them, missing files too.

    Args:
      folder: of the videos.
      annotations: the csv file, or the publisher's files; see `annotations.read`.
      dataset: name of a published data set.
      labels: file of class names.
      follow: accept clips that lie outside of the folder.
    """
    names = None if labels is None else annotations_lib.read_labels(labels)
    listing = annotations_lib.read(
        folder,
        annotations,
        names,
        dataset=dataset,
        follow=follow,
        # Here the label is a column of text, of however many labels.
        multilabel=None if dataset else ONE_LABEL,
    )
    for note in listing.notes:
        logging.warning("%s", note)
    return [
        Source(
            as_text(clip.id),
            os.path.join(folder, clip.path),
            clip.label,
            clip.split,
            clip.start,
            clip.end,
            clip.frame_range,
        )
        for clip in listing.clips
    ]


def _expanded(pattern: str, follow: bool) -> list[Source]:
    """The videos that fit a glob, and those in the folders that fit."""
    found = []
    for path in sorted(glob.glob(pattern, recursive=True)):
        if os.path.isdir(path):
            found += _listed(path, follow)
        elif is_video(path):
            found.append(Source(as_text(path), path))
    files = [source for source in found if not os.path.isdir(source.path)]
    return files or found


def _listed(path: str, follow: bool) -> list[Source]:
    """The videos in a folder; of a file, or of a folder that holds images, itself."""
    if is_remote(path):
        is_folder = not is_video(path)
    else:
        is_folder = os.path.isdir(path) and not _is_video_of_images(path)
    if not is_folder:
        return [Source(as_text(path), path)]
    folder = walk(path, follow)
    for note in folder.notes:
        logging.warning("%s", note)
    for link, target in folder.outside.items():
        raise InputError(
            f"{os.path.join(path, link)} leads out of {path}, to {target}; add --follow if that is "
            "meant"
        )
    clips = {}
    if folder.videos:
        with contextlib.suppress(InputError):  # it has no folder per class, and so no labels
            clips = {clip.path: clip for _, clip in read_folders(folder).rows}
    found = []
    for name in folder.videos or sorted(folder.frame_folders):
        inside, clip = os.path.join(path, name), clips.get(name)
        found.append(Source(as_text(inside), inside, *((clip.label, clip.split) if clip else ())))
    return found


def _is_video_of_images(path: str) -> bool:
    """Whether a local folder holds images, and no video file beside them."""
    with read_errors(epath.Path(path)):
        names = [entry.name.lower() for entry in os.scandir(path) if entry.is_file()]
    return any(n.endswith(IMAGE_EXTENSIONS) for n in names) and not any(map(is_video, names))
