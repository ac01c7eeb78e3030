"""Frames to videos and images, read back by the decoder and by Pillow."""

import io

import av
import numpy as np
import PIL.Image
import pytest

from timesformer_jax.data.encode import encode_jpeg, encode_mp4


def image(height, width, shift=0):
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 2 + shift, y * 4, 128 + 0 * x], axis=-1).astype(np.uint8)


def test_an_encoded_video_has_the_frames_and_their_rate():
    sent = [image(61, 91, 5 * i) for i in range(7)]
    content = encode_mp4(iter(sent), 30000 / 1001, crf=4)
    with av.open(io.BytesIO(content)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert float(stream.average_rate) == pytest.approx(30000 / 1001)
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(frames) == 7
    for frame, original in zip(frames, sent):
        assert frame.shape == (60, 90, 3)  # even sides, for 4:2:0
        assert np.abs(frame.astype(int) - original[:60, :90]).mean() < 2


@pytest.mark.parametrize("images", [[], [image(1, 8)]], ids=["none", "too small"])
def test_what_is_no_video_is_refused(images):
    with pytest.raises(ValueError, match="image"):
        encode_mp4(images, 30)


def test_an_encoded_image_is_the_image():
    original = image(33, 47)
    content = encode_jpeg(original, quality=2)
    decoded = np.asarray(PIL.Image.open(io.BytesIO(content)).convert("RGB"))
    assert decoded.shape == original.shape
    assert np.abs(decoded.astype(int) - original).mean() < 2
    assert len(encode_jpeg(original, quality=20)) < len(content)
