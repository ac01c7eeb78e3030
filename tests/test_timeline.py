"""Classes along a video: smoothing, the files that say them, and the page in a browser."""

import base64
import csv
import dataclasses
import io
import itertools
import json

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from videos import damage, numbers, write_video

from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.data.decode import Gap, decode
from timesformer_jax.errors import InputError
from timesformer_jax.inference.timeline import Segment, VideoTimeline, page
from timesformer_jax.inference.timeline.find import find_timeline
from timesformer_jax.inference.timeline.smoothing import best_path, find_segments


@given(
    st.integers(1, 6).flatmap(
        lambda n: st.tuples(
            st.lists(st.lists(st.floats(-5, 0), min_size=3, max_size=3), min_size=n, max_size=n),
            st.lists(st.floats(0.1, 1), min_size=n, max_size=n),
        )
    ),
    st.floats(0, 4),
)
def test_the_path_is_the_best_of_all_paths(draws, cost):
    evidence, weights = map(np.array, draws)

    def value(path):
        changes = sum(a != b for a, b in itertools.pairwise(path))
        return sum(w * e[y] for w, e, y in zip(weights, evidence, path)) - cost * changes

    best = max(map(value, itertools.product(range(3), repeat=len(evidence))))
    assert value(best_path(evidence, weights, cost)) == pytest.approx(best)


def curves(stride, *parts, low=0.05):
    """Middles of clips, and the probabilities of a, b and c. parts: (seconds, class)."""
    length = sum(seconds for seconds, _ in parts)
    times = np.arange(stride / 2, length, stride)
    ends = np.cumsum([seconds for seconds, _ in parts])
    classes = np.array([c for _, c in parts])[np.searchsorted(ends, times)]
    probabilities = np.full((len(times), 3), low, np.float32)
    probabilities[np.arange(len(times)), classes] = 1 - 2 * low
    return times, probabilities, length


@pytest.mark.parametrize("stride", [0.1, 0.25, 0.5])
def test_a_short_interruption_is_no_segment_and_a_long_one_is_at_any_stride(stride):
    # Of clips of 2 s: a segment gains log(0.9 / 0.05) = 2.9 nats by every 2 s, and costs twice 1.1.
    times, probabilities, length = curves(stride, (8, 0), (1, 1), (8, 0), (2, 2), (4, 0))
    found = find_segments(times, probabilities, "abc", (0, length), 2.0, 1.1)
    assert [s.label for s in found] == ["a", "c", "a"]
    assert [(s.start, s.end) for s in found] == [
        pytest.approx(bounds, abs=stride) for bounds in [(0, 17), (17, 19), (19, 23)]
    ]
    assert found[1].score == pytest.approx(0.9, abs=0.06)
    # The clips of the interruption count against the segment that it lies in.
    assert found[0].score == pytest.approx((16 * 0.9 + 0.05) / 17, abs=0.02)
    each = find_segments(times, probabilities, "abc", (0, length), 2.0, 0)
    assert [s.label for s in each] == ["a", "b", "a", "c", "a"]


def test_a_probability_of_zero_in_one_clip_does_not_make_a_segment():
    times, probabilities, length = curves(0.5, (5, 0), (0.5, 1), (5, 0), low=0.0)
    [only] = find_segments(times, probabilities, "abc", (0, length), 2.0, 1.1)
    assert (only.start, only.end, only.label) == (0, 10.5, "a")


@pytest.fixture
def timeline():
    times, probabilities, _ = curves(0.5, (5, 0), (3, 1))
    return VideoTimeline(
        times=times,
        probabilities=probabilities,
        labels=("cut & <b>", 'say "hi",\nall', "c"),
        segments=(
            Segment(0.0, 5.0, "cut & <b>", 0.9),
            Segment(5.0, 3671.25, 'say "hi",\nall', 0.875),
        ),
        gaps=(Gap(1.0, 2.5, True),),
        start=0.0,
        end=3671.25,
        window=2.0,
        stride=0.5,
        switch_cost=1.1,
    )


def test_json_and_csv_say_all(timeline):
    found = json.loads(timeline.to_json(video="a.mp4"))
    assert found["video"] == "a.mp4"
    assert found["segments"][1]["label"] == 'say "hi",\nall'
    assert found["gaps"] == [{"start": 1.0, "end": 2.5, "damaged": True}]
    np.testing.assert_allclose(found["probabilities"], timeline.probabilities, atol=1e-5)
    np.testing.assert_allclose(found["times"], timeline.times)
    rows = list(csv.DictReader(io.StringIO(timeline.to_csv())))
    assert [(float(r["start"]), float(r["end"]), r["label"]) for r in rows] == [
        (s.start, s.end, s.label) for s in timeline.segments
    ]
    assert float(rows[1]["score"]) == 0.875


def test_ffmpeg_reads_the_subtitles(timeline, tmp_path):
    (tmp_path / "a.vtt").write_text(timeline.to_vtt())
    with av.open(str(tmp_path / "a.vtt")) as subtitles:
        cues = [p for p in subtitles.demux() if p.size]
        text = [bytes(cue).decode() for cue in cues]
        shown = [(cue.pts * cue.time_base, cue.duration * cue.time_base) for cue in cues]
    assert text == ["cut &amp; &lt;b&gt; 90%", 'say "hi", all 88%']
    assert shown == [(0, 5), (5, pytest.approx(3666.25))]


# ---- sliding, with a classifier that knows the number of every frame ----------------------------


CLIP = ClipSpec(frames=4, frame_stride=8, crop=16, short_side=24)


def late(clips):
    """Probabilities of "early" and "late": the share of a clip's frames before and after 30."""
    after = np.array([np.mean(np.array(numbers(frames)) >= 30) for frames, _ in clips])
    return np.stack([1 - after, after], axis=1).astype(np.float32)


def find(path, **options):
    return find_timeline(path, late, CLIP, ("early", "late"), **options)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_times_are_the_middles_of_the_clips(tmp_path, batch_size):
    path = write_video(tmp_path / "a.mp4", fps=10)
    done = []
    timeline = find(path, stride=0.5, batch_size=batch_size, progress=lambda *at: done.append(at))
    # Clips of 32 / 30 s every half second; the last one ends with the video.
    span = 32 / 30
    np.testing.assert_allclose(timeline.times, [*(np.arange(0, 4.6, 0.5) + span / 2), 6 - span / 2])
    assert done[-1] == (11, 11)
    assert len(done) == -(-11 // batch_size)
    assert timeline.segments == (
        Segment(0, pytest.approx(3, abs=0.5), "early", pytest.approx(0.95, abs=0.1)),
        Segment(pytest.approx(3, abs=0.5), 6, "late", pytest.approx(0.95, abs=0.1)),
    )
    part = find(path, stride=0.5, start=2.0, end=4.0, switch_cost=0)
    assert (part.start, part.end) == (2, 4)
    assert part.times[0] == pytest.approx(2 + span / 2)
    assert [s.end for s in part.segments] == [pytest.approx(3, abs=0.5), 4]


def test_a_video_shorter_than_a_clip_is_one_segment(tmp_path):
    timeline = find(write_video(tmp_path / "a.mp4", fps=10, frames=5))
    assert timeline.times == [0.25]
    assert timeline.segments == (Segment(0, 0.5, "early", 1.0),)


def test_nothing_is_said_of_a_damaged_part(tmp_path):
    path = write_video(tmp_path / "a.mov", fps=10, codec="mjpeg", pixels="yuvj420p")
    damage(path, 1.0, 2.5)
    timeline = find(path, stride=0.2)
    assert timeline.gaps == (Gap(pytest.approx(1), pytest.approx(2.5), damaged=True),)
    first, second, third = timeline.segments
    assert (first.label, second.label, third.label) == ("early", "early", "late")
    # Clips at the edges have half of their frames; these are 0.36 s apart.
    assert [first.end, second.start] == pytest.approx([1, 2.5], abs=0.36 / 2 + 0.1)
    assert third.start == pytest.approx(3, abs=0.2)
    assert not ((timeline.times > first.end) & (timeline.times < second.start)).any()


def test_a_checkpoint_of_whole_videos_needs_a_window(tmp_path):
    path = write_video(tmp_path / "a.mp4", fps=10)
    clip = dataclasses.replace(CLIP, sampling="segments")
    with pytest.raises(InputError, match="--window=SECONDS"):
        find_timeline(path, late, clip, ("early", "late"))
    timeline = find_timeline(path, late, clip, ("early", "late"), window=1.0)
    assert timeline.stride == 0.25
    assert timeline.segments[1].start == pytest.approx(3, abs=0.25)


def test_frames_in_memory_need_their_rate(tmp_path):
    frames, fps = decode(write_video(tmp_path / "a.mp4", fps=10))
    with pytest.raises(InputError, match="need their rate"):
        find(frames)
    assert find(frames, fps=fps).segments == find(tmp_path / "a.mp4").segments


def test_videos_that_browsers_do_not_play_are_encoded_for_the_page(tmp_path):
    path = write_video(tmp_path / "a.avi", fps=10, codec="mpeg4", options={"qscale": "2"})
    address, embedded, _ = page.find_source(path, tmp_path)
    assert embedded
    mp4 = base64.b64decode(address.removeprefix("data:video/mp4;base64,"))
    frames, fps = decode(io.BytesIO(mp4))
    assert fps == 10
    np.testing.assert_allclose(numbers(frames), np.arange(60), atol=1)


def test_labels_and_names_are_no_markup(timeline):
    html = page.render(timeline, "<script>.mp4")
    assert "<script>.mp4" not in html
    assert "<b>" not in html
    assert "&lt;b&gt;" in html
