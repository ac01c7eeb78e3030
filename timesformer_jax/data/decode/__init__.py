"""Video files to RGB frames. PyAV, and so every codec, is used in this package only."""

from timesformer_jax.data.decode.clip import DecodedClip, DecodedVideo, decode
from timesformer_jax.data.decode.container import MISSING_FILE, VideoError, VideoInfo
from timesformer_jax.data.decode.isolated import (
    Stream,
    crash_reason,
    decode_clip,
    isolated,
    isolated_for,
    open_stream,
    read_info,
)
from timesformer_jax.data.decode.scaling import resize
from timesformer_jax.data.decode.stream import ClipStream, Gap, StreamedClip
from timesformer_jax.data.decode.timeline import Timeline, equal_pieces
from timesformer_jax.data.decode.video import VideoFile, no_frame

__all__ = [
    "MISSING_FILE",
    "ClipStream",
    "DecodedClip",
    "DecodedVideo",
    "Gap",
    "Stream",
    "StreamedClip",
    "Timeline",
    "VideoError",
    "VideoFile",
    "VideoInfo",
    "crash_reason",
    "decode",
    "decode_clip",
    "equal_pieces",
    "isolated",
    "isolated_for",
    "no_frame",
    "open_stream",
    "read_info",
    "resize",
]
