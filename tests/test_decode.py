import subprocess
import sys

import av
import numpy as np
import pytest
from videos import numbers, write_audio, write_video

from timesformer_jax.data.decode import VideoError, VideoFile, decode, probe

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
    whole = decode(path)
    assert whole.fps == 25
    assert whole.num_frames == 60
    np.testing.assert_allclose(numbers(whole.frames), np.arange(60), atol=1)
    piece = decode(path, 1.0, 2.0)
    assert piece.num_frames == 25
    np.testing.assert_allclose(numbers(piece.frames), np.arange(25, 50), atol=1)
    picked = decode(path, 1.0, 2.0, pick=lambda n, fps: np.array([n - 1, 0, 3, 3]))
    np.testing.assert_allclose(numbers(picked.frames), [49, 25, 28, 28], atol=1)


@pytest.mark.parametrize("first", range(0, 60, 5))
def test_trimming_is_exact_wherever_the_start_lies_among_the_keyframes(video, first):
    trimmed = decode(video, first / 30, (first + 4) / 30)
    assert numbers(trimmed.frames) == list(range(first, min(first + 4, 60)))
    # Between two frames: the next one is the first.
    assert numbers(decode(video, (first - 0.5) / 30, (first + 0.5) / 30).frames) == [first]


def test_trimming_seeks(tmp_path):
    path = write_video(tmp_path / "long.mp4", frames=60, fps=5, options=B_FRAMES)
    with VideoFile(path) as opened:
        assert len(list(opened._packets(10.0))) <= 24


def test_pick_is_told_the_count_and_the_rate_and_stride_is_a_pick(video):
    told = []
    strided = decode(
        video, 0.5, 1.5, pick=lambda n, fps: told.append((n, fps)) or np.arange(0, n, 7)
    )
    assert told == [(30, 30.0)]
    assert numbers(strided.frames) == [15, 22, 29, 36, 43]
    assert strided.num_frames == 30
    assert strided.frames.dtype == np.uint8


@pytest.mark.parametrize("indices", [[-1], [60], []])
def test_an_index_outside_the_clip_is_refused(video, indices):
    with pytest.raises(ValueError, match="outside"):
        decode(video, pick=lambda n, fps: np.array(indices, int))


@pytest.mark.parametrize(
    ("width", "height", "short_side", "shape"),
    [(64, 48, 24, (24, 32)), (48, 64, 24, (32, 24)), (64, 48, 96, (96, 128)),
     (98, 54, 20, (20, 36)), (64, 64, 7, (7, 7))],
)  # fmt: skip
def test_the_short_side_is_exact_and_the_other_in_proportion(
    tmp_path, width, height, short_side, shape
):
    path = write_video(tmp_path / "a.mp4", frames=3, width=width, height=height)
    assert decode(path, short_side=short_side).frames.shape == (3, *shape, 3)
    assert decode(path).frames.shape == (3, height, width, 3)


def test_shrinking_does_not_alias(tmp_path):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(stripes, format="rgb24")))
        container.mux(stream.encode(None))
    small = decode(tmp_path / "a.mp4", short_side=16).frames
    inner = small[:, :, 2:-2].astype(float)  # the border is mirrored stripes, brighter or darker
    np.testing.assert_allclose(inner, 127.5, atol=6)


@pytest.mark.parametrize(("rotation", "corner"), [(90, (-1, 0)), (180, (-1, -1)), (-90, (0, -1))])
def test_rotated_videos_stand_upright(tmp_path, rotation, corner):
    path = write_video(tmp_path / "a.mp4", frames=2, rotation=rotation)
    frame = decode(path, short_side=24).frames[0]
    assert frame.shape == ((24, 32, 3) if rotation == 180 else (32, 24, 3))
    assert frame[corner].mean() > 200
    assert frame[0, 0].mean() < 50


def test_probe_reads_the_header(video):
    info = probe(video)
    assert (info.fps, info.width, info.height) == (30.0, 64, 48)
    assert info.duration == pytest.approx(2.0)


def test_threads_do_not_change_the_frames(video):
    with VideoFile(video, threads=1) as one, VideoFile(video, threads=4) as four:
        timeline = one.timeline()
        ticks = range(len(timeline))
        for a, b in zip(one.shown(timeline, ticks), four.shown(timeline, ticks), strict=True):
            np.testing.assert_array_equal(one.rgb(a), four.rgb(b))


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


def test_what_is_no_video_is_a_video_error_with_a_reason_in_a_line(tmp_path, video):
    for path in broken_files(tmp_path, video):
        with pytest.raises(VideoError) as error:
            decode(path)
        assert len(str(error.value).splitlines()) == 1, path


@pytest.mark.parametrize(("start", "end"), [(100.0, None), (3.0, 4.0), (0.501, 0.502)])
def test_a_clip_without_a_frame_is_a_video_error(video, start, end):
    with pytest.raises(VideoError, match="no frame from"):
        decode(video, start, end)


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
            video = decode(path, pick=lambda n, fps: np.array([0, n // 2, n - 1]))
        except VideoError:
            continue
        assert len(video.frames) == 3


def test_decoding_imports_no_tensorflow():
    code = (
        "import sys; from timesformer_jax.data import annotations, decode, demo, prepare;"
        "sys.exit('tensorflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
