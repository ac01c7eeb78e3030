"""Opens the container of a video with PyAV, and reads its header."""

import glob
import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import av
from av.stream import Disposition
from etils import epath

from timesformer_jax.data.annotations.videos import IMAGE_EXTENSIONS
from timesformer_jax.storage import RemoteFile, is_remote

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
        raise VideoError((error.strerror or str(error)).splitlines()[0]) from error


def open_container(path: str) -> av.container.InputContainer:
    """Opens a file, which may be on gs://, or a folder of images."""
    # A title in an unknown encoding must not make the video unusable.
    options: dict[str, Any] = {"metadata_errors": "replace"}
    if is_remote(path):
        if not (file := epath.Path(path)).exists():
            raise VideoError(MISSING_FILE)
        if file.stat().length == 0:
            raise VideoError("empty file")
        # FFmpeg makes small reads at scattered places, and a request takes as long as 1 MiB does.
        return av.open(io.BufferedReader(RemoteFile(path), READ_BUFFER_BYTES), **options)
    if os.path.isdir(path):
        images = {"pattern_type": "glob", "framerate": str(IMAGES_FPS)}
        return av.open(_image_pattern(path), format="image2", container_options=images, **options)
    if not os.path.isfile(path):
        raise VideoError(MISSING_FILE)
    if os.path.getsize(path) == 0:
        raise VideoError("empty file")
    return av.open(path, **options)


def _image_pattern(folder: str) -> str:
    """The glob pattern of a folder's images. Sorted by name, they must be in order of number."""
    names = [name for name in os.listdir(folder) if name.lower().endswith(IMAGE_EXTENSIONS)]
    if not names:
        raise VideoError("no video file, and no folder of images")
    stems, extensions = zip(*map(os.path.splitext, names))
    if len(set(extensions)) > 1 or len({len(stem) for stem in stems}) > 1:
        raise VideoError("images of names that differ in length or extension: pad their numbers")
    return os.path.join(glob.escape(folder), f"*{extensions[0]}")


def find_video_stream(container: av.container.InputContainer) -> av.VideoStream:
    """The first video stream that is not the cover picture of a song."""
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            if stream.codec_context is None:
                raise VideoError("a codec that FFmpeg does not know")
            return stream
    raise VideoError("no video stream")


def read_info(container: av.container.InputContainer, stream: av.VideoStream) -> VideoInfo:
    """The header as a VideoInfo."""
    fps = stream.average_rate or stream.guessed_rate
    if not fps:
        raise VideoError("no frame rate")
    if not stream.width or not stream.height:
        raise VideoError("no frame size")
    duration = None if container.duration is None else container.duration / av.time_base
    codec, name = stream.codec_context.name, container.format.name
    return VideoInfo(float(fps), stream.width, stream.height, duration, codec, name)


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
