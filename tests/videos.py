"""Encodes videos whose every frame tells its own number."""

import av
import numpy as np

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
):
    """Frame i has the brightness STEP * i, and a white square at the upper left."""
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for number in range(frames):
            image = np.full((height, width, 3), STEP * number, np.uint8)
            image[: height // 4, : height // 4] = 255
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pixels)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def numbers(frames):
    """The number of each frame, read off its lower right quarter."""
    return [
        round(float(frame[frame.shape[0] // 2 :, frame.shape[1] // 2 :].mean()) / STEP)
        for frame in frames
    ]


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
