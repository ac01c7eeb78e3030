import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from videos import numbers, write_audio, write_video

from timesformer_jax.data.decode import Timeline, VideoError, VideoFile, decode_clip
from timesformer_jax.data.decode import container as container_lib
from timesformer_jax.errors import InputError

B_FRAMES = {"g": "12", "bf": "3"}

CONTAINERS = [
    ("a.mp4", "libx264", "yuv420p", B_FRAMES),
    ("b.mp4", "libx264", "yuv420p10le", {}),
    ("a.mov", "mjpeg", "yuvj420p", {}),
    ("a.mkv", "libx264", "yuv420p", B_FRAMES),
    ("a.webm", "libvpx-vp9", "yuv420p", {"deadline": "realtime", "cpu-used": "8"}),
    ("a.avi", "mpeg4", "yuv420p", {}),
    ("a.ts", "libx264", "yuv420p", B_FRAMES),
    ("a.gif", "gif", "rgb8", {}),
    ("h264.avi", "libx264", "yuv420p", B_FRAMES),
    ("b.avi", "mpeg4", "yuv420p", {"bf": "2", "qscale": "2"}),
    ("rgb.avi", "rawvideo", "bgr24", {}),
    ("vp8.webm", "libvpx", "yuv420p", {"auto-alt-ref": "1", "lag-in-frames": "16"}),
    ("av1.mkv", "libsvtav1", "yuv420p10le", {"svtav1-params": "preset=12"}),
    ("grey16.mkv", "ffv1", "gray16le", {}),
    ("444.mp4", "libx264", "yuv444p10le", {}),
    ("a.mpg", "mpeg2video", "yuv420p", {"bf": "2", "qscale": "2"}),
    ("a.flv", "flv", "yuv420p", {}),
    ("a.wmv", "wmv2", "yuv420p", {"qscale": "2"}),
    ("a.mts", "libx264", "yuv420p", B_FRAMES),
]


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("videos") / "a.mp4", options=B_FRAMES)


@pytest.mark.parametrize(("name", "codec", "pixels", "options"), CONTAINERS)
def test_every_container_gives_all_frames_and_the_right_piece(
    tmp_path, name, codec, pixels, options
):
    # GIF counts time in hundredths: 25 a second is exact there.
    path = write_video(tmp_path / name, fps=25, codec=codec, pixels=pixels, options=options)
    whole = decode_clip(path)
    assert whole.fps == 25
    assert whole.num_frames == 60
    np.testing.assert_allclose(numbers(whole.frames), np.arange(60), atol=1)
    piece = decode_clip(path, 1.0, 2.0)
    assert piece.num_frames == 25
    np.testing.assert_allclose(numbers(piece.frames), np.arange(25, 50), atol=1)
    picked = decode_clip(path, 1.0, 2.0, sample=lambda n, fps: np.array([n - 1, 0, 3, 3]))
    np.testing.assert_allclose(numbers(picked.frames), [49, 25, 28, 28], atol=1)


@pytest.mark.parametrize("first", range(0, 60, 5))
def test_trimming_is_exact_wherever_the_start_lies_among_the_keyframes(video, first):
    trimmed = decode_clip(video, first / 30, (first + 4) / 30)
    assert numbers(trimmed.frames) == list(range(first, min(first + 4, 60)))
    # Between two frames: the next one is the first.
    assert numbers(decode_clip(video, (first - 0.5) / 30, (first + 0.5) / 30).frames) == [first]


def test_trimming_seeks_to_the_start(tmp_path):
    path = write_video(tmp_path / "long.mp4", frames=60, fps=5, options=B_FRAMES)
    with VideoFile(path) as opened:
        assert len(list(opened.packets(10.0))) <= 24


def test_sampling_is_given_the_count_and_the_frame_rate(video):
    given = []
    strided = decode_clip(
        video, 0.5, 1.5, sample=lambda n, fps: given.append((n, fps)) or np.arange(0, n, 7)
    )
    assert given == [(30, 30.0)]
    assert numbers(strided.frames) == [15, 22, 29, 36, 43]
    assert strided.num_frames == 30
    assert strided.frames.dtype == np.uint8


@pytest.mark.parametrize("indices", [[-1], [60], []])
def test_an_index_outside_the_clip_is_refused(video, indices):
    with pytest.raises(ValueError, match="outside"):
        decode_clip(video, sample=lambda n, fps: np.array(indices, int))


@pytest.mark.parametrize(
    ("width", "height", "short_side", "shape"),
    [(64, 48, 24, (24, 32)), (48, 64, 24, (32, 24)), (64, 48, 96, (96, 128)),
     (98, 54, 20, (20, 36)), (64, 64, 7, (7, 7))],
)  # fmt: skip
def test_the_short_side_is_exact_and_the_other_in_proportion(
    tmp_path, width, height, short_side, shape
):
    path = write_video(tmp_path / "a.mp4", frames=3, width=width, height=height)
    assert decode_clip(path, short_side=short_side).frames.shape == (3, *shape, 3)
    assert decode_clip(path).frames.shape == (3, height, width, 3)


def test_shrinking_does_not_alias(tmp_path):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(stripes, format="rgb24")))
        container.mux(stream.encode(None))
    small = decode_clip(tmp_path / "a.mp4", short_side=16).frames
    inner = small[:, :, 2:-2].astype(float)  # the border is mirrored stripes, brighter or darker
    np.testing.assert_allclose(inner, 127.5, atol=6)


@pytest.mark.parametrize(("rotation", "corner"), [(90, (-1, 0)), (180, (-1, -1)), (-90, (0, -1))])
def test_rotated_videos_stand_upright(tmp_path, rotation, corner):
    path = write_video(tmp_path / "a.mp4", frames=2, rotation=rotation)
    frame = decode_clip(path, short_side=24).frames[0]
    assert frame.shape == ((24, 32, 3) if rotation == 180 else (32, 24, 3))
    assert frame[corner].mean() > 200
    assert frame[0, 0].mean() < 50


def test_pixels_that_are_not_square_are_made_so(tmp_path):
    path = write_video(tmp_path / "a.mp4", frames=3, width=48, height=48, aspect=Fraction(4, 3))
    assert decode_clip(path, short_side=24).frames.shape == (3, 24, 32, 3)


@pytest.mark.parametrize("pixels", ["gray", "gray10le"])
def test_grey_video_keeps_its_levels(tmp_path, pixels):
    path = write_video(tmp_path / "a.mp4", pixels=pixels, full_range=True)
    frames = decode_clip(path).frames
    np.testing.assert_allclose(numbers(frames), np.arange(60), atol=1)
    assert np.ptp(frames.astype(int), axis=-1).max() <= 1


# ---- variable frame rates, and frame rates asked for --------------------------------------------


def test_a_variable_frame_rate_is_evened_out(tmp_path):
    """20 frames in the first second, 10 in each of the next two."""
    times = [*range(0, 1000, 50), *range(1000, 3000, 100)]
    path = write_video(tmp_path / "a.mkv", frames=40, times=times)
    video = decode_clip(path)
    assert video.num_frames == 40
    assert video.fps == pytest.approx(39 / 2.9)
    # Of a tick, the number of the frame that a player would show then.
    instants = np.arange(40) / video.fps * 1000
    shown = [max(i for i, time in enumerate(times) if time <= t + 25) for t in instants]
    np.testing.assert_allclose(numbers(video.frames), shown, atol=1)
    second = decode_clip(path, 1.0, 2.0)
    assert (second.num_frames, second.fps) == (10, pytest.approx(10))
    np.testing.assert_allclose(numbers(second.frames), np.arange(20, 30), atol=1)


def test_times_that_a_container_rounds_are_a_constant_rate(tmp_path):
    times = [round(1000 * i / 30) for i in range(60)]
    video = decode_clip(write_video(tmp_path / "a.mkv", times=times))
    assert video.num_frames == 60
    assert video.fps == pytest.approx(30, rel=1e-3)
    np.testing.assert_allclose(numbers(video.frames), np.arange(60), atol=1)


@given(
    gaps=st.lists(st.floats(0.004, 0.4), min_size=0, max_size=60),
    nominal_fps=st.floats(5, 60),
    fps=st.none() | st.floats(1, 90),
)
def test_a_tick_shows_the_frame_of_its_time(gaps, nominal_fps, fps):
    times = np.cumsum([0.3, *gaps])
    timeline = Timeline.from_times(times, nominal_fps, fps)
    frames = timeline.frame_indices
    assert (np.diff(frames) >= 0).all()
    assert frames[0] >= 0
    assert frames[-1] < len(times)
    if fps is None:
        assert len(frames) == len(times)
    mean = len(gaps) / sum(gaps) if gaps else nominal_fps
    # The ticks cover the clip to within half a tick, and there is at least one.
    length = pytest.approx(len(times) / mean * timeline.fps, rel=0.01, abs=0.5)
    assert len(timeline) == length or len(timeline) == 1
    # The frame shown started before the tick, to within the rounding, and no later one did.
    tick_times = times[0] + np.arange(len(frames)) / timeline.fps
    tolerance = 0.51 / min(mean, timeline.fps) + 0.01 * tick_times
    assert (times[frames] <= tick_times + tolerance).all()
    later = np.append(times, np.inf)[frames + 1]
    assert (later >= tick_times - tolerance).all()


@pytest.mark.parametrize(("fps", "shown"), [(10, [0, 3, 6, 9]), (60, [0, 0, 1, 1, 2, 2])])
def test_a_frame_rate_can_be_asked_for(video, fps, shown):
    with VideoFile(video) as opened:
        timeline = opened.timeline(fps=fps)
        assert timeline.fps == fps
        assert len(timeline) == 2 * fps
        frames = opened.frames_at(timeline, np.arange(len(shown)))
        assert numbers([opened.to_rgb(frame) for frame in frames]) == shown


def test_a_clip_may_be_given_by_frame_numbers(video):
    with VideoFile(video) as opened:
        timeline = opened.timeline(frame_range=(7, 12))
        frames = opened.frames_at(timeline, np.arange(5))
        assert numbers([opened.to_rgb(frame) for frame in frames]) == [7, 8, 9, 10, 11]
        assert len(opened.timeline(frame_range=(50, 61))) == 10
        with pytest.raises(VideoError, match="truncated: 10 frames of 14"):
            opened.timeline(frame_range=(50, 64))
        with pytest.raises(VideoError, match="truncated: 0 frames of 10"):
            opened.timeline(frame_range=(70, 80))


def test_a_folder_of_images_is_a_video(tmp_path, video):
    for number, frame in enumerate(decode_clip(video).frames[:20], start=1):
        Image.fromarray(frame).save(tmp_path / f"frame%d_{number:05d}.png")
    (tmp_path / "notes.txt").touch()
    images = decode_clip(tmp_path)
    assert images.num_frames == 20
    np.testing.assert_array_equal(images.frames, decode_clip(video).frames[:20])
    assert numbers(decode_clip(tmp_path, 0.2, 0.3).frames) == [6, 7, 8]
    (tmp_path / "frame_7.png").write_bytes((tmp_path / "frame%d_00007.png").read_bytes())
    with pytest.raises(VideoError, match="pad their numbers"):
        decode_clip(tmp_path)


def test_a_folder_without_images_is_no_video(tmp_path):
    with pytest.raises(VideoError, match="no folder of images"):
        decode_clip(tmp_path)


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mkv", "libx264"), ("a.webm", "libvpx-vp9"), ("a.avi", "mpeg4"), ("a.mp4", "libx264"),
     ("a.flv", "flv"), ("a.mpg", "mpeg2video")],
)  # fmt: skip
def test_a_file_cut_short_is_no_shorter_video(tmp_path, name, codec):
    whole = write_video(tmp_path / name, codec=codec).read_bytes()
    for share in (0.3, 0.6, 0.8):
        (tmp_path / name).write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(VideoError):
            decode_clip(tmp_path / name)


def test_the_part_of_a_cut_file_that_is_there_is_a_clip(tmp_path):
    whole = write_video(tmp_path / "a.mkv").read_bytes()
    (tmp_path / "a.mkv").write_bytes(whole[: int(0.7 * len(whole))])
    assert numbers(decode_clip(tmp_path / "a.mkv", 0.1, 0.5).frames) == list(range(3, 15))
    with pytest.raises(VideoError, match=r"truncated: .* s of 2"):
        decode_clip(tmp_path / "a.mkv")


def test_the_header_is_read(video):
    with VideoFile(video) as opened:
        info = opened.info
    assert (info.fps, info.width, info.height) == (30.0, 64, 48)
    assert (info.codec, "mp4" in info.container) == ("h264", True)
    assert info.duration == pytest.approx(2.0)


def test_threads_do_not_change_the_frames(video):
    with VideoFile(video, threads=1) as one, VideoFile(video, threads=4) as four:
        timeline = one.timeline()
        ticks = range(len(timeline))
        for a, b in zip(
            one.frames_at(timeline, ticks), four.frames_at(timeline, ticks), strict=True
        ):
            np.testing.assert_array_equal(one.to_rgb(a), four.to_rgb(b))


def broken_files(folder, video):
    """Files that are no good video, by what is wrong with them."""
    whole = video.read_bytes()
    files = {
        "missing": None,
        "empty": b"",
        "text": b"this is not a video\n" * 100,
        "cut": whole[: len(whole) * 2 // 3],
        "cut header": whole[:200],
    }
    for name, content in files.items():
        path = folder / f"{name}.mp4"
        if content is not None:
            path.write_bytes(content)
        yield path
    yield write_audio(folder / "audio.mp4")


def test_a_broken_file_raises_a_video_error_of_one_line(tmp_path, video):
    for path in broken_files(tmp_path, video):
        with pytest.raises(VideoError) as error:
            decode_clip(path)
        assert len(str(error.value).splitlines()) == 1, path


@pytest.mark.parametrize(("start", "end"), [(100.0, None), (3.0, 4.0), (0.501, 0.502)])
def test_a_clip_without_a_frame_is_a_video_error(video, start, end):
    with pytest.raises(VideoError, match="no frame from"):
        decode_clip(video, start, end)


def test_storage_that_fails_is_no_damage_of_a_video(monkeypatch):
    """From the first question on, whether the file exists."""

    def fail(path):
        raise RuntimeError("503 from the bucket\nand more")

    monkeypatch.setattr(container_lib.epath, "Path", fail)
    message = "^cannot read gs://bucket/a.mp4: 503 from the bucket; run the same command again.*"
    with pytest.raises(InputError, match=message):
        decode_clip("gs://bucket/a.mp4")


@pytest.mark.parametrize("container", ["mp4", "mkv", "avi", "ts"])
def test_damage_never_gets_past_video_error(tmp_path, container):
    codec = "mpeg4" if container == "avi" else "libx264"
    whole = write_video(tmp_path / f"whole.{container}", frames=20, codec=codec).read_bytes()
    path = tmp_path / f"damaged.{container}"
    rng = np.random.default_rng(0)
    for _ in range(30):
        damaged = np.frombuffer(whole, np.uint8).copy()
        damaged[rng.integers(len(whole), size=rng.integers(1, 30))] = rng.integers(256)
        path.write_bytes(damaged[: rng.integers(len(whole) // 4, len(whole) + 1)].tobytes())
        try:
            video = decode_clip(path, sample=lambda n, fps: np.array([0, n // 2, n - 1]))
        except VideoError:
            continue
        assert len(video.frames) == 3


def test_decoding_imports_no_tensorflow():
    code = (
        "import sys; from timesformer_jax.data import annotations, decode;"
        "from timesformer_jax.data.demo import make;"
        "sys.exit('tensorflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
