"""On-device resampling against Pillow's, and the order of its parts."""

import numpy as np
import pytest
import skimage.data
from PIL import Image

from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.errors import InputError
from timesformer_jax.transforms.preprocess import preprocess

PLAIN = {"mean": (0, 0, 0), "std": (1 / 255,) * 3}  # values come out as they went in


@pytest.fixture
def frames():
    """Smooth and noisy content, (2, 3, 60, 60, 3) uint8."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (2, 3, 60, 60, 3))
    ramp = np.arange(60)[:, None, None] * 4 + np.zeros((60, 60, 3))
    return np.stack([noise[0], np.broadcast_to(ramp, (3, 60, 60, 3))]).astype(np.uint8)


@pytest.mark.parametrize("side", [60, 45, 33.5, 20])
def test_resampling_is_pillows_antialiased_one(frames, side):
    top, left = 60 - side, (60 - side) / 3
    spec = ClipSpec(frames=3, crop=24, **PLAIN)
    ours = preprocess(frames, np.array([[top, left, side]] * 2, np.float32), spec)
    for clip in range(2):
        for t in range(3):
            box = (left, top, left + side, top + side)
            theirs = Image.fromarray(frames[clip, t]).resize(
                (24, 24), Image.Resampling.BILINEAR, box
            )
            inner = np.s_[1:-1, 1:-1]  # Pillow cuts its kernel at the box, ours reads beyond it
            difference = np.abs(np.asarray(ours[clip, t]) - np.asarray(theirs, np.float32))[inner]
            assert difference.max() <= 2


@pytest.mark.parametrize("shrink", [1.0, 1.15, 1.6, 2.0, 2.5])
@pytest.mark.parametrize("crop", [64, 63])
def test_a_photograph_is_resized_as_pillow_does_to_the_border(shrink, crop):
    # The corner, where the kernel is cut, and an odd place within the frame.
    photograph = skimage.data.astronaut()[60:237, 160:347]
    side = np.float32(crop * shrink)
    spec = ClipSpec(frames=1, crop=crop, **PLAIN)
    for top, left in ((0.0, 0.0), (11.0, 7.5)):
        crop_box = np.array([[top, left, side]], np.float32)
        ours = np.asarray(preprocess(photograph[None, None], crop_box, spec))[0, 0]
        box = (left, top, float(left + side), float(top + side))
        theirs = Image.fromarray(photograph).resize((crop, crop), Image.Resampling.BILINEAR, box)
        assert np.abs(ours - np.asarray(theirs, np.float32)).max() < 1.5  # Pillow rounds twice


def test_a_window_of_the_crops_size_is_cut_exactly(frames):
    spec = ClipSpec(frames=3, crop=24, **PLAIN)
    ours = np.asarray(preprocess(frames, np.array([[5, 9, 24]] * 2, np.float32), spec))
    assert np.abs(ours - frames[:, :, 5:29, 9:33]).max() < 1e-2


def test_flip_normalisation_and_channel_order(frames):
    crop_box = np.array([[0, 0, 60]] * 2, np.float32)
    plain = np.asarray(preprocess(frames, crop_box, ClipSpec(frames=3, crop=60, **PLAIN)))
    flip = np.array([True, False])
    flipped = np.asarray(preprocess(frames, crop_box, ClipSpec(frames=3, crop=60, **PLAIN), flip))
    assert np.array_equal(flipped[0], plain[0][:, :, ::-1])
    assert np.array_equal(flipped[1], plain[1])
    spec = ClipSpec(frames=3, crop=60, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    expected = (plain / 255 - np.array([0.1, 0.2, 0.3])) / np.array([0.5, 0.6, 0.7])
    assert np.allclose(preprocess(frames, crop_box, spec), expected, atol=1e-5)
    bgr = ClipSpec(frames=3, crop=60, channel_order="bgr", **PLAIN)
    assert np.array_equal(preprocess(frames, crop_box, bgr), plain[..., ::-1])


@pytest.mark.parametrize(
    "bad",
    [
        {"channel_order": "rbg"},
        {"sampling": "even"},
        {"start": "end"},
        {"frames": 0},
        {"std": (0, 1, 1)},
    ],
)
def test_impossible_specs_are_refused(bad):
    with pytest.raises(InputError):
        ClipSpec(**bad)
