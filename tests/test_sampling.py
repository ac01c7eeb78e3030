"""The sampling rules, by worked example and by property."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.data.input import sampling

fractions = st.floats(0, 1, exclude_max=True)
sizes = st.integers(1, 700)


def test_the_released_example_8_x_32_at_30_fps():
    found = sampling.clip_indices(300, 30.0, clip_frames=8, frame_stride=32, position=0.0)
    assert found.tolist() == [0, 36, 72, 109, 145, 182, 218, 255]


def test_other_frame_rates_span_the_same_seconds():
    at_30 = sampling.clip_indices(300, 30.0, 8, 32, 0.0)
    at_60 = sampling.clip_indices(600, 60.0, 8, 32, 0.0)
    assert np.abs(at_60 / 60 - at_30 / 30).max() < 1 / 30


def test_short_videos_repeat_their_last_frame():
    assert sampling.clip_indices(100, 30.0, 8, 32, 0.7).tolist() == [0, 36, 72, 99, 99, 99, 99, 99]


@given(st.integers(1, 5000), st.floats(1, 120), st.integers(1, 96), st.integers(1, 32), fractions)
def test_indices_are_ascending_frames_of_the_video(n, fps, frames, frame_stride, position):
    found = sampling.clip_indices(n, fps, frames, frame_stride, position)
    assert found.shape == (frames,)
    assert found.min() >= 0
    assert found.max() < n
    assert (np.diff(found) >= 0).all()


@given(st.integers(300, 5000), fractions)
def test_the_start_is_proportional_to_the_position(n, position):
    first = sampling.clip_indices(n, 30.0, 8, 32, position)[0]
    assert first == int(position * (n - 256))


# 50 frames in 8 segments of 49/8 = 6.125: the borders 0, 6.125, 12.25, 18.375, 24.5, 30.625, 36.75,
# 42.875, 49 round to these (24.5 to the even one).
BORDERS = [0, 6, 12, 18, 24, 31, 37, 43, 49]


def test_segments_of_50_frames_by_hand():
    spec = ClipSpec(frames=8, sampling="segments")
    least, most = np.zeros(8), np.full(8, np.nextafter(1, 0))
    assert sampling.segment_indices(50, 8, least).tolist() == BORDERS[:-1]
    assert sampling.segment_indices(50, 8, most).tolist() == BORDERS[1:]
    # Midpoints; 27 of 24 to 31, which has two.
    middle = [3, 9, 15, 21, 27, 34, 40, 46]
    assert sampling.test_indices(50, 12.0, spec, views=1).tolist() == [middle]
    # A quarter and three quarters of the way: of 7 frames the 2nd and 6th, of 8 the 2nd and 6th.
    assert sampling.test_indices(50, 12.0, spec, views=2).tolist() == [
        [1, 7, 13, 19, 25, 32, 38, 44],
        [5, 11, 17, 23, 29, 36, 42, 48],
    ]


def test_every_frame_of_a_segment_is_as_likely():
    draws = np.random.default_rng(0).random((20000, 8))
    found = np.stack([sampling.segment_indices(50, 8, d) for d in draws])
    for i in range(8):
        frames, counts = np.unique(found[:, i], return_counts=True)
        assert frames.tolist() == list(range(BORDERS[i], BORDERS[i + 1] + 1))
        share = 20000 / len(frames)
        assert np.abs(counts - share).max() < 5 * share**0.5


@given(st.integers(1, 5000), st.integers(1, 96), st.data())
def test_a_segment_clip_takes_one_frame_of_each_segment(n, frames, data):
    draws = data.draw(st.lists(fractions, min_size=frames, max_size=frames))
    found = sampling.segment_indices(n, frames, np.array(draws))
    segment = (n - 1) / frames
    for i, index in enumerate(found.tolist()):
        assert round(segment * i) <= index <= round(segment * (i + 1))
    assert found.min() >= 0
    assert found.max() < n
    assert (np.diff(found) >= 0).all()


@given(st.integers(1, 5000), st.integers(1, 96), st.integers(1, 10))
def test_segment_views_are_the_midpoint_and_symmetric_about_it(n, frames, views):
    spec = ClipSpec(frames=frames, sampling="segments", start="first")
    segment = (n - 1) / frames
    borders = np.array([round(segment * i) for i in range(frames + 1)])
    low, high = borders[:-1], borders[1:]
    assert (sampling.test_indices(n, 12.0, spec, 1)[0] == (low + high) // 2).all()
    found = sampling.test_indices(n, 12.0, spec, views)
    assert (np.diff(found, axis=0) >= 0).all()
    distances = (found - low) - (high - found[::-1])
    assert distances.min() >= -1  # an even number of frames has no middle one
    assert distances.max() <= 0


@given(st.integers(1, 500), st.floats(1, 120), fractions, st.integers(0, 99))
def test_the_spec_chooses_the_sampling(n, fps, position, seed):
    draws = np.random.default_rng(seed).random(8)
    by_stride, by_segment = ClipSpec(frame_stride=4), ClipSpec(frame_stride=4, sampling="segments")
    found = sampling.train_indices(n, fps, by_stride, position, draws)
    assert (found == sampling.clip_indices(n, fps, 8, 4, position)).all()
    found = sampling.train_indices(n, fps, by_segment, position, draws)
    assert (found == sampling.segment_indices(n, 8, draws)).all()
    for spec, first in [(by_stride, False), (ClipSpec(frame_stride=4, start="first"), True)]:
        places = sampling.view_positions(3, first)
        expected = [sampling.clip_indices(n, fps, 8, 4, place) for place in places]
        assert (sampling.test_indices(n, fps, spec, 3) == expected).all()


@given(st.integers(1, 10))
def test_views_cover_the_video_from_the_middle_or_the_start(views):
    middle, first = sampling.view_positions(views), sampling.view_positions(views, first=True)
    assert first[0] == 0
    assert np.allclose(middle + middle[::-1], 1)  # symmetric
    assert views > 1 or middle[0] == 0.5
    assert np.allclose(np.diff(middle), 1 / views)


@given(st.integers(1, 2000), st.integers(1, 8), st.data())
def test_stored_frame_is_the_nearest_there_is(n, stride, data):
    stored = np.arange(0, n, stride)
    index = data.draw(st.integers(0, n - 1))
    found = sampling.stored_indices(np.array([index]), stride, len(stored))[0]
    assert abs(stored[found] - index) == np.abs(stored - index).min()


@given(sizes, sizes, st.integers(1, 224), st.integers(0, 200), st.tuples(*[fractions] * 3))
def test_a_random_crop_box_is_the_scaled_crop_inside_the_frame(height, width, crop, more, draws):
    short_side_range = crop + more // 2, crop + more
    top, left, side = sampling.random_crop_box(
        height, width, crop, short_side_range, np.array(draws)
    )
    scaled = crop * min(height, width) / side
    assert round(scaled, 6) == round(scaled)
    assert short_side_range[0] - 1e-6 <= scaled <= short_side_range[1] + 1e-6
    assert 0 <= top <= top + side <= height + 1e-6
    assert 0 <= left <= left + side <= width + 1e-6
    # The square that is decoded holds it.
    assert side <= sampling.decoded_side(min(height, width), crop, short_side_range[0]) + 1e-6


def test_every_scale_is_as_likely():
    draws = np.random.default_rng(0).random((20000, 3))
    sides = [sampling.random_crop_box(256, 340, 224, (256, 259), d)[2] for d in draws]
    scaled, counts = np.unique(np.rint(224 * 256 / np.array(sides)), return_counts=True)
    assert scaled.tolist() == [256, 257, 258, 259]
    assert counts.min() > 4700


@pytest.mark.parametrize(
    ("height", "width", "corners"),
    [
        (240, 320, [(0, 0), (0, 40), (0, 80)]),
        (320, 240, [(0, 0), (40, 0), (80, 0)]),
        (240, 240, [(0, 0), (0, 0), (0, 0)]),
    ],
)
def test_three_crops_lie_along_the_long_side(height, width, corners):
    found = sampling.test_crop_boxes(height, width, 3)
    assert found[:, :2].tolist() == [list(c) for c in corners]
    assert (found[:, 2] == 240).all()
    assert sampling.test_crop_boxes(height, width, 1).tolist() == [[*corners[1], 240]]


@given(sizes, sizes)
def test_three_crops_reach_both_ends_and_the_middle(height, width):
    (first, middle, last) = sampling.test_crop_boxes(height, width, 3)
    side = min(height, width)
    assert first.tolist() == [0, 0, side]
    assert last.tolist() == [height - side, width - side, side]
    assert (middle == (first + last) / 2).all()


# ---- clips that slide along a video -------------------------------------------------------------


@given(st.integers(1, 5000), st.floats(1, 120), st.floats(0.1, 20), st.floats(0.001, 10))
def test_sliding_clips_cover_the_video_a_stride_apart(n, fps, window, stride):
    starts = sampling.sliding_starts(n, fps, window, stride)
    step = max(stride * fps, 1)
    assert starts[0] == 0
    np.testing.assert_allclose(np.diff(starts)[:-1], step, rtol=1e-9)
    assert (np.diff(starts) <= step * (1 + 1e-9)).all()
    assert (np.diff(starts) > 0).all()
    assert starts[-1] <= max(n - window * fps, 0) < starts[-1] + 1


# Rates that videos have: of any real number a frame may lie within rounding of another.
@given(
    st.integers(1, 800),
    st.sampled_from([5, 12.5, 15, 24, 25, 29.97, 30, 50, 60]),
    st.sampled_from(["stride", "segments"]),
)
def test_a_sliding_clip_is_sampled_as_a_test_clip_of_its_span_alone(n, fps, kind):
    spec = ClipSpec(frames=4, frame_stride=8, sampling=kind, start="first")
    window = sampling.clip_seconds(spec) or 1.5
    starts = sampling.sliding_starts(n, fps, window, 0.4)
    found = list(sampling.sliding_indices(n, fps, spec, window, starts))
    assert len(found) == len(starts)
    for start, indices in zip(starts, found):
        assert 0 <= indices.min() <= indices.max() < n
        first = int(start)
        if start == first and start + window * fps <= n:
            length = round(window * fps) if kind == "segments" else n - first
            alone = sampling.test_indices(length, fps, spec, views=1)[0]
            assert indices.tolist() == (first + alone).tolist()
