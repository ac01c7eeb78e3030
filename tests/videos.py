"""Encodes videos whose every frame tells its own number."""

from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import ColorRange

from timesformer_jax.data.decode import VideoFile

STEP = 4  # levels of brightness from one frame to the next


def write_video(
    path,
    frames=60,
    width=64,
    height=48,
    fps=30,
    codec="libx264",
    pixels="yuv420p",
    options=None,
    rotation=None,
    times=None,
    full_range=False,
    aspect=None,
):
    """Frame i has the brightness STEP * i, and a white square at the upper left.

    times: of each frame, in 1000ths of a second; by default they come at `fps`. full_range: says
    so, of pixels that `reformat` makes such (grey). aspect: of a pixel, a Fraction.
    """
    container_options = {"movflags": "faststart"} if str(path).endswith((".mp4", ".mov")) else {}
    with av.open(str(path), "w", options=container_options) as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        if rotation is not None:
            stream.set_display_rotation(rotation)
        if full_range:
            stream.codec_context.color_range = ColorRange.JPEG
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(frames):
            image = np.full((height, width, 3), STEP * number, np.uint8)
            image[: height // 4, : height // 4] = 255
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pixels)
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def numbers(frames):
    """The number of each frame, read off its lower right quarter."""
    return [
        round(float(frame[frame.shape[0] // 2 :, frame.shape[1] // 2 :].mean()) / STEP)
        for frame in frames
    ]


def damage(path, start, end):
    """Overwrites the packets of [start, end) seconds by zeros."""
    with VideoFile(path) as opened:
        packets = list(opened.packets())
    first = packets[0]
    at = [float((packet.pts - first.pts) * packet.time_base) for packet in packets]
    lost = [packet.pos for packet, time in zip(packets, at) if start <= time < end]
    content = bytearray(path.read_bytes())
    stop = lost[-1] + packets[at.index(max(t for t in at if t < end))].size
    content[lost[0] : stop] = bytes(stop - lost[0])
    path.write_bytes(content)


def write_audio(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        silence = av.AudioFrame.from_ndarray(
            np.zeros((1, 16000), np.float32), format="fltp", layout="mono"
        )
        silence.sample_rate = 16000
        container.mux(stream.encode(silence))
        container.mux(stream.encode(None))
    return path
