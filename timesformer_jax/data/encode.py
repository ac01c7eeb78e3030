"""RGB frames to files that browsers and players show."""

from __future__ import annotations

import io
from collections.abc import Iterable
from fractions import Fraction

import av
import numpy as np


def encode_mp4(
    images: Iterable[np.ndarray], fps: Fraction | float, crf: int = 20, **options: str
) -> bytes:
    """Encodes frames as H.264 in MP4, 4:2:0, which every browser plays.

    x264 is not deterministic: the decoded frames may differ slightly from one call to the next.

    Args:
      images: (H, W, 3) uint8 RGB, all of one size. 4:2:0 has colour for pairs of rows and columns:
        the last row or column of an odd side is left out.
      fps: frames per second.
      crf: quality, from 0 (exact) to 51; 18 looks like the original.
      options: further ones of FFmpeg's encoder, such as preset="veryfast".

    Raises:
      ValueError: if there is no image, or one is smaller than 2 x 2.
    """
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = None
        for image in images:
            height, width = (side // 2 * 2 for side in image.shape[:2])
            if stream is None:
                if not height or not width:
                    raise ValueError(f"an image of {image.shape} is too small for a video")
                rate = Fraction(fps).limit_denominator(1001)
                stream = container.add_stream("libx264", rate, options={"crf": str(crf)} | options)
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            even = np.ascontiguousarray(image[:height, :width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
        if stream is None:
            raise ValueError("a video needs at least one image")
        container.mux(stream.encode(None))
    return buffer.getvalue()


def encode_jpeg(image: np.ndarray, quality: int = 4) -> bytes:
    """Encodes an (H, W, 3) uint8 RGB image as JPEG.

    Args:
      quality: FFmpeg's scale of the quantiser, from 2 (best) to 31.
    """
    codec = av.CodecContext.create("mjpeg", "w")
    codec.height, codec.width = image.shape[:2]
    codec.pix_fmt, codec.time_base = "yuvj444p", Fraction(1)
    codec.qmin = codec.qmax = quality
    codec.flags |= av.codec.context.Flags.qscale
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
    packets = [*codec.encode(frame), *codec.encode(None)]
    return b"".join(bytes(packet) for packet in packets)
