"""Opens the container of a video with PyAV, and reads its header."""

import errno
import glob
import io
import os
import re
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import av
from av.stream import Disposition
from etils import epath

from timesformer_jax.data.annotations.videos import IMAGE_EXTENSIONS
from timesformer_jax.data.decode.limits import DECODERS, DEMUXERS, SOUND_DECODERS, Limits
from timesformer_jax.errors import InputError, first_line
from timesformer_jax.storage import RemoteFile, is_remote, storage_errors

# The frame rate of a folder of images, which has no header. The public copies of
# Something-Something were extracted at this rate.
IMAGES_FPS = 30

READ_BUFFER_BYTES = 1 << 20

# The message of the VideoError of a file that does not exist.
MISSING_FILE = "missing file"


class VideoError(Exception):
    """A video that cannot be decoded. The message is the reason: one line, without the path."""


@dataclass(frozen=True)
class VideoInfo:
    """The header of a video.

    Attributes:
      fps: mean frame rate.
      width, height: pixels, as stored (before a rotation that the file asks for).
      duration: seconds; None if the header has none.
      codec, container: FFmpeg's names.
    """

    fps: float
    width: int
    height: int
    duration: float | None
    codec: str
    container: str


@contextmanager
def video_errors() -> Iterator[None]:
    """Raises PyAV's errors as a VideoError."""
    try:
        yield
    except (av.error.FFmpegError, OSError) as error:
        raise VideoError(first_line(error)) from error


def video_source(video: str | os.PathLike | BinaryIO) -> str | BinaryIO:
    """What `open_container` opens: a path as text, or an open file that can be read twice.

    Raises:
      InputError: of a file that is open as text.
    """
    if isinstance(video, str | os.PathLike):
        return os.fspath(video)
    if isinstance(video, io.TextIOBase):
        raise InputError("the video is open as text; open it with open(path, 'rb')")
    # A pipe or a download is kept in memory: the frames are counted before they are decoded.
    return video if video.seekable() else io.BytesIO(video.read())


def open_container(
    path: str | BinaryIO, opened: ExitStack, limits: Limits
) -> av.container.InputContainer:
    """Opens a file, which may be on gs:// or open already, or a folder of images.

    FFmpeg opens no file itself: it reads through Python's file objects, and is refused when it asks
    for another file. So a file that names others, on the disk or in the network, gets nothing.

    Args:
      path: of the file or folder; or a file that is open, which is read from its beginning.
      opened: closes the container, and the file unless it was open.
      limits: `pixels` holds for every frame of the stream, also where it changes its size.

    Raises:
      VideoError: it is missing, empty, no regular file, or in a format that is not read.
    """
    options: dict[str, Any] = {
        "metadata_errors": "replace",  # a title in an unknown encoding must not matter
        "options": {"max_pixels": str(limits.pixels)},
        "container_options": {
            "format_whitelist": ",".join(DEMUXERS),
            "codec_whitelist": ",".join((*DECODERS, *SOUND_DECODERS)),
            "protocol_whitelist": "none",
        },
        "io_open": _refuse,
    }
    if not isinstance(path, str):
        path.seek(0)
        return _open_source(path, opened, options)
    if not is_remote(path) and os.path.isdir(path):
        pattern, images = _image_pattern(path)
        options["container_options"] |= {"format_whitelist": "image2", "pattern_type": "glob"}
        options["container_options"]["framerate"] = str(IMAGES_FPS)
        options |= {"format": "image2", "io_open": lambda url, flags, _: _read_image(url, images)}
        return opened.enter_context(av.open(pattern, **options))
    file = opened.enter_context(_open_remote(path) if is_remote(path) else _open_local(path))
    return _open_source(file, opened, options)


def _open_source(
    file: Any, opened: ExitStack, options: dict[str, Any]
) -> av.container.InputContainer:
    try:
        return opened.enter_context(av.open(_Source(file), **options))
    except av.error.ArgumentError as error:
        raise VideoError("no video, or in a format that is not read") from error


class _Source:
    """A file as PyAV reads it. A damaged one may ask for an impossible place: a code, no error.

    PyAV writes errors of a seek that FFmpeg then makes no error of to the standard error.
    """

    def __init__(self, file: Any):
        self._file = file
        self.read, self.tell = file.read, file.tell

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        try:
            return self._file.seek(offset, whence)
        except OSError as error:
            return -(error.errno or errno.EINVAL)


def _open_remote(path: str) -> io.BufferedReader:
    with storage_errors(path):
        file = epath.Path(path)
        length = file.stat().length if file.exists() else None
    if length is None:
        raise VideoError(MISSING_FILE)
    if length == 0:
        raise VideoError("empty file")
    # FFmpeg makes small reads at scattered places, and a request takes as long as 1 MiB does.
    return io.BufferedReader(RemoteFile(path), READ_BUFFER_BYTES)


def _open_local(path: str) -> io.FileIO:
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        raise VideoError(MISSING_FILE) from error
    except ValueError as error:
        raise VideoError("a null byte in its name") from error
    # To open a FIFO waits for its other end, and to open a device may change its state.
    if not stat.S_ISREG(status.st_mode):
        raise VideoError("no regular file: a FIFO, a device or a socket")
    if status.st_size == 0:
        raise VideoError("empty file")
    return io.FileIO(path)


def _refuse(url: str, flags: int, options: dict) -> None:
    raise VideoError("it names other files to open, which is refused")


def _read_image(url: str, images: frozenset[str]) -> io.FileIO:
    if url not in images:
        raise VideoError("it names other files to open, which is refused")
    return _open_local(url)


def _image_pattern(folder: str) -> tuple[str, frozenset[str]]:
    """The glob pattern of a folder's images, and their paths.

    Sorted by name, they must be in order of number.
    """
    names = [name for name in os.listdir(folder) if name.lower().endswith(IMAGE_EXTENSIONS)]
    if not names:
        raise VideoError("no video file, and no folder of images")
    stems, extensions = zip(*map(os.path.splitext, names))
    if len(set(extensions)) > 1 or len({len(stem) for stem in stems}) > 1:
        raise VideoError("images of names that differ in length or extension: pad their numbers")
    images = frozenset(os.path.join(folder, name) for name in names)
    return os.path.join(glob.escape(folder), f"*{extensions[0]}"), images


def find_video_stream(container: av.container.InputContainer) -> av.VideoStream:
    """The first video stream that is not the cover picture of a song."""
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            if stream.codec_context is None:
                raise VideoError("a codec that FFmpeg does not know")
            if (decoder := stream.codec_context.codec.name) not in DECODERS:
                raise VideoError(f"codec {decoder}, which is not read")
            return stream
    raise VideoError("no video stream")


def read_info(
    container: av.container.InputContainer, stream: av.VideoStream, limits: Limits
) -> VideoInfo:
    """The header as a VideoInfo."""
    fps = stream.average_rate or stream.guessed_rate
    if not fps:
        raise VideoError("no frame rate")
    if not stream.width or not stream.height:
        raise VideoError("no frame size")
    check_pixels(stream.width, stream.height, limits)
    duration = None if container.duration is None else container.duration / av.time_base
    codec, name = stream.codec_context.name, container.format.name
    return VideoInfo(float(fps), stream.width, stream.height, duration, codec, name)


def check_pixels(width: int, height: int, limits: Limits) -> None:
    """Raises a VideoError for frames beyond the limit."""
    if width * height > limits.pixels:
        raise VideoError(f"frames of {width} x {height}; at most {limits.pixels:,} pixels are read")


def read_stream_duration(
    container: av.container.InputContainer, stream: av.VideoStream
) -> float | None:
    """The duration of the video stream in seconds, for formats whose truncated files keep it.

    None for the other formats. MP4 needs no duration: it has a table of its packets, and an entry
    beyond the end of the file is an error. MPEG-TS and WMV files have none once they are truncated,
    so a truncated one cannot be told from a shorter video.
    """
    if container.format.name == "avi":
        if not stream.duration or stream.time_base is None:
            return None
        return float(stream.duration * stream.time_base)
    if container.format.name != "matroska,webm":
        return None
    tag = re.fullmatch(r"(\d+):(\d\d):(\d\d\.?\d*)", stream.metadata.get("DURATION", ""))
    if tag is not None:
        return sum(60**i * float(part) for i, part in enumerate(reversed(tag.groups())))
    # The container's duration is that of its longest stream, which may be the sound.
    if len(container.streams) > 1 or container.duration is None:
        return None
    return container.duration / av.time_base
