"""Lists the videos in a folder, which may be on gs://."""

import os
import posixpath
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property

from etils import epath

from timesformer_jax.data.annotations.files import Location, read_errors
from timesformer_jax.errors import InputError

VIDEO_EXTENSIONS = (
    *(".3gp", ".avi", ".flv", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg"),
    *(".mts", ".ogv", ".ts", ".webm", ".wmv"),
)
IMAGE_EXTENSIONS = (".jpeg", ".jpg", ".png")


@dataclass(frozen=True)
class VideoFolder:
    """The content of a folder of videos. Paths are relative to it, with forward slashes.

    files: all files except images. frame_folders: the folders that hold images.
    """

    root: epath.Path
    files: frozenset[str]
    frame_folders: frozenset[str]

    @cached_property
    def videos(self) -> tuple[str, ...]:
        """The files with one of VIDEO_EXTENSIONS, sorted."""
        return tuple(sorted(path for path in self.files if is_video(path)))

    @cached_property
    def by_stem(self) -> dict[str, list[str]]:
        """The videos in all subfolders by file name without extension; sorted."""
        found = defaultdict(list)
        for path in self.videos:
            found[stem(path)].append(path)
        return found

    @cached_property
    def frames_by_name(self) -> dict[str, str]:
        """The first folder of frames of each name."""
        return {posixpath.basename(path): path for path in sorted(self.frame_folders, reverse=True)}

    def find(self, name: str) -> str | None:
        """The first video file, by path, of this name without extension."""
        return next(iter(self.by_stem.get(name, ())), None)

    def contains(self, path: str) -> bool:
        """Whether a clip's file or folder of frames exists."""
        if path in self.files or path in self.frame_folders:
            return True
        # `walk` does not list hidden files and files outside of the folder.
        walked = not path.startswith(("/", "../")) and "/." not in f"/{path}"
        return not walked and (self.root / path).is_file()


def walk(videos: Location) -> VideoFolder:
    """Lists a folder of videos. It follows links to folders, and ignores what is hidden.

    Raises:
      InputError: there is no such folder.
    """
    root = epath.Path(videos)
    files, frame_folders = set(), set()
    with read_errors(root):
        if not root.is_dir():
            raise InputError(f"there is no folder {videos}; give the folder that holds the videos")
        # epath's own walk does not follow links.
        local = "://" not in os.fspath(root)
        for folder, subfolders, names in os.walk(root, followlinks=True) if local else root.walk():
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            inside = os.fspath(folder)[len(os.fspath(root)) :].replace(os.sep, "/").strip("/")
            prefix = f"{inside}/" if inside else ""
            for name in names:
                if name.startswith("."):
                    continue
                if name.lower().endswith(IMAGE_EXTENSIONS):
                    frame_folders.add(inside)
                else:
                    files.add(prefix + name)
    return VideoFolder(root, frozenset(files), frozenset(frame_folders - {""}))


def is_video(path: str) -> bool:
    return path.lower().endswith(VIDEO_EXTENSIONS)


def stem(path: str) -> str:
    """A video's file name without its extension: `a/-x.mp4` and `-x` are `-x`."""
    name = posixpath.basename(path)
    return posixpath.splitext(name)[0] if is_video(name) else name
