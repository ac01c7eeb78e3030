"""Lists the videos in a folder, which may be on gs://."""

import os
import posixpath
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from etils import epath

from timesformer_jax.data.annotations.files import Location, read_errors
from timesformer_jax.errors import InputError
from timesformer_jax.storage import as_text, is_remote

VIDEO_EXTENSIONS = (
    *(".3gp", ".avi", ".flv", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg"),
    *(".mts", ".ogv", ".ts", ".webm", ".wmv"),
)
IMAGE_EXTENSIONS = (".jpeg", ".jpg", ".png")


# How often the links of a folder may lead to the same folder. Links among a few folders can make
# more paths than can be listed.
MAX_VISITS = 100


@dataclass(frozen=True)
class VideoFolder:
    """The content of a folder of videos. Paths are relative to it, with forward slashes.

    files: all files except images. frame_folders: the folders that hold images. outside: symbolic
    links that lead out of the folder, and what they lead to. `walk` does not enter them.
    unreadable: the folders that may not be read; what they hold is not listed.
    """

    root: epath.Path
    files: frozenset[str]
    frame_folders: frozenset[str]
    outside: Mapping[str, str] = field(default_factory=dict)
    unreadable: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks on the folder for the user, one line each."""
        if not self.unreadable:
            return ()
        return (
            f"folders of {self.root} that cannot be read, and whose videos are left out:"
            f" {', '.join(map(as_text, self.unreadable))}; make them readable",
        )

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
        return not self._is_walked(path) and (self.root / path).is_file()

    def leads_to(self, path: str) -> str | None:
        """Where a clip's path leads to, if it leads out of the folder; None: it does not.

        Not for a folder that was walked with `follow`.
        """
        if path.startswith(("/", "../")) or path == ".." or "://" in path:
            return path
        parts = path.split("/")
        for count in range(1, len(parts) + 1):
            if (target := self.outside.get("/".join(parts[:count]))) is not None:
                return target
        if self._is_walked(path) or is_remote(self.root):
            return None
        target = os.path.realpath(self.root / path)
        return None if _is_inside(target, os.path.realpath(self.root)) else target

    def _is_walked(self, path: str) -> bool:
        return not path.startswith(("/", "../")) and "/." not in f"/{path}"


def walk(videos: Location, follow: bool = False) -> VideoFolder:
    """Lists a folder of videos, and ignores what is hidden. It enters links to folders.

    Args:
      videos: the folder.
      follow: enter links that lead out of the folder, too.

    Raises:
      InputError: there is no such folder; its links are tangled.
    """
    root = epath.Path(videos)
    found = _Found()
    with read_errors(root):
        if not root.is_dir():
            raise InputError(f"there is no folder {videos}; give the folder that holds the videos")
        if is_remote(root):
            for folder, subfolders, names in root.walk():
                subfolders[:] = [name for name in subfolders if not name.startswith(".")]
                inside = os.fspath(folder)[len(os.fspath(root)) :].replace(os.sep, "/").strip("/")
                for name in names:
                    found.add(inside, name)
        else:
            _walk_disk(os.fspath(root), follow, found)
    frame_folders = frozenset(found.frame_folders - {""})
    return VideoFolder(
        root, frozenset(found.files), frame_folders, found.outside, tuple(sorted(found.unreadable))
    )


class _Found:
    """What `walk` has found so far."""

    def __init__(self):
        self.files: set[str] = set()
        self.frame_folders: set[str] = set()
        self.outside: dict[str, str] = {}
        self.unreadable: list[str] = []

    def add(self, inside: str, name: str, outside: str | None = None) -> None:
        """Notes a file of the folder `inside`; outside: where it leads to, if that is elsewhere."""
        if name.startswith("."):
            return
        if name.lower().endswith(IMAGE_EXTENSIONS):
            path = inside
            self.frame_folders.add(inside)
        else:
            path = _join(inside, name)
            self.files.add(path)
        if outside is not None:
            self.outside[path] = outside


def _walk_disk(root: str, follow: bool, found: _Found) -> None:
    real_root = os.path.realpath(root)
    visits: Counter[str] = Counter()
    # Folders, and the real paths of those above and of themselves.
    waiting: list[tuple[str, tuple[str, ...]]] = [("", (real_root,))]
    while waiting:
        inside, above = waiting.pop()
        try:
            with os.scandir(os.path.join(root, inside)) as listed:
                entries = sorted(listed, key=lambda entry: entry.name)
        except PermissionError:
            if not inside:
                raise
            if posixpath.basename(inside) != "lost+found":  # which each disk has
                found.unreadable.append(inside)
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path, target, is_outside = _join(inside, entry.name), None, False
            if entry.is_symlink():
                target = os.path.realpath(entry.path)
                is_outside = not follow and not _is_inside(target, real_root)
            if not _is_folder(entry):
                found.add(inside, entry.name, target if is_outside else None)
            elif is_outside:
                found.outside[path] = str(target)
            else:
                real = target or os.path.join(above[-1], entry.name)
                visits[real] += 1
                if visits[real] > MAX_VISITS:
                    raise InputError(f"links in {root} lead to {real} again and again; remove them")
                if real not in above:
                    waiting.append((path, (*above, real)))


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _join(inside: str, name: str) -> str:
    return f"{inside}/{name}" if inside else name


def _is_inside(real_path: str, real_root: str) -> bool:
    return os.path.commonpath([real_path, real_root]) == real_root


def is_video(path: str) -> bool:
    return path.lower().endswith(VIDEO_EXTENSIONS)


def stem(path: str) -> str:
    """A video's file name without its extension: `a/-x.mp4` and `-x` are `-x`."""
    name = posixpath.basename(path)
    return posixpath.splitext(name)[0] if is_video(name) else name
