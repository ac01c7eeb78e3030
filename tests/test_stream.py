"""Clips of long videos, decoded in one pass, against `decode_clip`, which knows no stream."""

import weakref
from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from videos import damage, numbers, write_video

from timesformer_jax.data.decode import ClipStream, Gap, VideoError, VideoFile, decode_clip
from timesformer_jax.data.decode.stream import _union

pytestmark = pytest.mark.decodes


def sliding(frames, distance, step):
    """Clips of `frames` ticks, `distance` apart, of which one starts every `step` ticks."""

    def sample(timeline):
        offsets = distance * np.arange(frames)
        for start in range(0, len(timeline) - offsets[-1], step):
            yield start + offsets

    return sample


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.mp4", {"options": {"g": "12", "bf": "3"}, "rotation": 90}),
        ("a.mkv", {"times": [*range(0, 1000, 50), *range(1000, 5000, 100)]}),
        ("h264.avi", {"options": {"g": "12", "bf": "3"}}),
        ("a.ts", {"options": {"g": "12"}}),
    ],
)
@pytest.mark.parametrize("part", [(None, None), (0.5, 1.4)])
def test_clips_have_the_frames_of_a_clip_decoded_alone(tmp_path, name, options, part):
    path = write_video(tmp_path / name, **options)
    whole = decode_clip(path, *part, short_side=24)
    with ClipStream(path, sliding(3, 4, 5), *part, short_side=24) as stream:
        clips = list(stream)
        assert (len(stream.timeline), stream.timeline.fps) == (whole.num_frames, whole.fps)
        assert stream.gaps == ()
    assert [clip.ticks.tolist() for clip in clips] == [
        [start, start + 4, start + 8] for start in range(0, whole.num_frames - 8, 5)
    ]
    for clip in clips:
        np.testing.assert_array_equal(clip.frames, whole.frames[clip.ticks])
        assert clip.damaged == 0


def write_long_video(path, minutes, fps=2):
    """Repeats an encoded minute, without encoding it again."""
    minute = path.with_name("minute.mp4")
    write_video(minute, frames=60, fps=1, width=32, height=32, options={"g": "60"})
    with av.open(str(minute)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        for number in range(minutes * fps):
            for packet in packets:
                copy = av.Packet(bytes(packet))
                copy.stream, copy.time_base = stream, Fraction(1, fps)
                copy.pts = 60 * number + round(packet.pts * packet.time_base)
                copy.dts = 60 * number + round(packet.dts * packet.time_base)
                copy.is_keyframe = packet.is_keyframe
                target.mux(copy)
    return path


def test_an_hour_holds_no_more_frames_than_minutes(tmp_path, monkeypatch):
    """The frames that are alive are counted, not those that the stream says it holds."""
    alive, most = 0, 0
    to_rgb = VideoFile.to_rgb

    def counted(self, frame, short_side):
        nonlocal alive, most
        array = to_rgb(self, frame, short_side)
        alive += 1
        most = max(most, alive)
        weakref.finalize(array, freed)
        return array

    def freed():
        nonlocal alive
        alive -= 1

    monkeypatch.setattr(VideoFile, "to_rgb", counted)
    found = []
    for minutes in (3, 60):
        path = write_long_video(tmp_path / f"{minutes}.mp4", minutes)
        alive = most = total = 0
        with ClipStream(path, sliding(8, 16, 40), threads=1) as stream:
            assert len(stream.timeline) == minutes * 120
            for clip in stream:
                total += 1
                shown = clip.ticks % 60
                np.testing.assert_allclose(numbers(clip.frames), shown, atol=1)
        assert total == -(-(minutes * 120 - 7 * 16) // 40)
        found.append(most)
    # 3 clips overlap, of 8 frames each, and one frame is converted ahead of its clip.
    assert found[0] == found[1] <= 3 * 8 + 1


@given(st.lists(st.tuples(st.integers(0, 9), st.lists(st.integers(0, 20), min_size=1, max_size=6))))
def test_every_tick_of_overlapping_clips_is_due_once_in_order(draws):
    rows, first, last = [], 0, 0
    for step, offsets in draws:
        first += step
        last = max(last, first + max(offsets))
        rows.append(np.array(sorted({first, *(first + offset for offset in offsets), last})))
    assert list(_union(rows)) == sorted({int(tick) for row in rows for tick in row})


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mov", "mjpeg", {"pixels": "yuvj420p"}),
        ("a.mp4", "libx264", {"options": {"g": "5", "bf": "0"}}),
    ],
)
def test_a_damaged_part_is_passed_over_and_told(tmp_path, name, codec, options):
    path = write_video(tmp_path / name, fps=10, codec=codec, **options)
    damage(path, 2.0, 3.5)
    with pytest.raises(VideoError):
        decode_clip(path)
    with ClipStream(path, sliding(1, 1, 1)) as stream:
        clips = list(stream)
        [gap] = stream.gaps
    assert gap == Gap(pytest.approx(2), pytest.approx(3.5), damaged=True)
    shown = [*range(20), *[19] * 15, *range(35, 60)]
    np.testing.assert_allclose(
        [number for c in clips for number in numbers(c.frames)], shown, atol=1
    )
    assert [tick for tick, clip in enumerate(clips) if clip.damaged] == [*range(20, 35)]
    assert not any(clip.is_usable for clip in clips[20:35])


def test_frames_that_the_file_does_not_have_are_told(tmp_path):
    """As where a part of a Matroska file is lost; or as in a video of slides."""
    times = [1000 * i // 10 for i in range(60) if not 20 <= i < 45]
    path = write_video(tmp_path / "a.mkv", frames=35, fps=10, times=times)
    with ClipStream(path, sliding(1, 1, 1)) as stream:
        clips = list(stream)
        [gap] = stream.gaps
        shown = stream.timeline.frame_indices
    assert gap == Gap(pytest.approx(2), pytest.approx(4.5), damaged=False)
    np.testing.assert_allclose([*map(numbers, [c.frames for c in clips])], shown[:, None], atol=1)
    assert not any(clip.damaged for clip in clips)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_a_file_cut_short_is_an_error_here_too(tmp_path, name):
    whole = write_video(tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(0.7 * len(whole))])
    with (
        pytest.raises(VideoError, match=r"truncated|Invalid data"),
        ClipStream(tmp_path / name, sliding(1, 1, 1)),
    ):
        pass


def test_a_video_of_which_nothing_can_be_decoded_is_an_error(tmp_path):
    path = write_video(tmp_path / "a.mov", codec="mjpeg", pixels="yuvj420p", frames=20)
    damage(path, 0, 10)
    with (
        ClipStream(path, sliding(1, 1, 1)) as stream,
        pytest.raises(VideoError, match="no frame can be decoded"),
    ):
        list(stream)
