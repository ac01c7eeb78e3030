"""Decoding opens nothing but the file it was given, and ends with frames or with a reason."""

import csv
import os

import av
import pytest
from fuzz import commands
from fuzz import videos as hostile
from fuzz.canary import Canary
from videos import write_video

from timesformer_jax.data.decode import VideoError, VideoFile, decode_clip
from timesformer_jax.data.decode.limits import Limits


@pytest.fixture(scope="module")
def mp4(tmp_path_factory):
    return hostile.write_seeds(tmp_path_factory.mktemp("seeds"), ("mp4",))["mp4"]


@pytest.fixture
def canary(tmp_path, mp4):
    (tmp_path / "canary").mkdir()
    canary = Canary(tmp_path / "canary", mp4)
    yield canary
    canary.close()


def test_playlists_are_refused_and_nothing_they_name_is_opened(tmp_path, canary):
    playlists = hostile.playlists(tmp_path, canary)
    for playlist in playlists:
        with pytest.raises(VideoError) as raised:
            decode_clip(playlist.path)
        assert "\n" not in str(raised.value)
    assert canary.opened == []


def test_the_playlists_of_this_test_are_followed_where_nobody_forbids_it(tmp_path, canary):
    """Otherwise the test above could not fail."""
    hostile.playlists(tmp_path, canary)
    anything = {"safe": "0", "protocol_whitelist": "file,http,tcp"}
    with av.open(str(tmp_path / "concat_file.mp4"), container_options=anything) as container:
        assert container.streams.video
    assert "canary.mp4" in canary.opened
    with pytest.raises(av.error.FFmpegError):
        av.open(str(tmp_path / "concat_http.mp4"), container_options=anything)
    assert "the port" in canary.opened


def test_what_is_no_file_is_no_video_and_is_not_opened(tmp_path, canary):
    for path, _ in hostile.no_files(tmp_path, canary):
        with pytest.raises(VideoError):
            decode_clip(path)
    for name in ("fifo.mp4", "socket.mp4", "zero.mp4", "link_to_fifo.mp4"):
        with pytest.raises(VideoError, match="no regular file: a FIFO, a device or a socket"):
            decode_clip(tmp_path / name)


def test_an_mp4_gets_no_file_that_it_refers_to(tmp_path, canary, mp4):
    for path, _ in hostile.liars(tmp_path, canary, mp4):
        if "reference" in os.path.basename(path):
            with pytest.raises(VideoError):
                decode_clip(path)
    assert canary.opened == []


def test_ffmpeg_opens_no_file_itself(tmp_path, mp4, monkeypatch):
    """It reads what Python opens: a name with a protocol in it cannot mislead it."""
    monkeypatch.chdir(tmp_path)
    for name in ("concat:a.mp4|b.mp4", "http:x.mp4", "file:a.mp4", "-", "pipe:0", "%03d.mp4"):
        (tmp_path / name).write_bytes(mp4)
        assert decode_clip(name).num_frames == 24


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        (Limits(pixels=64 * 48 - 1), "frames of 64 x 48; at most 3,071 pixels are read"),
        (Limits(frames=59), "more than 59 frames"),
        (Limits(hours=1.9 / 3600), r"lasts 0.000546 hours; at most 0.000527778 are read"),
        (Limits(minutes=0), "not decoded in 0 minutes"),
    ],
)
def test_a_video_beyond_a_limit_is_refused_with_the_limit(tmp_path, limits, said):
    path = write_video(tmp_path / "a.mp4")
    with pytest.raises(VideoError, match=said), VideoFile(path, limits=limits) as video:
        video.timeline()
    at_the_limit = Limits(pixels=64 * 48, frames=60, hours=2 / 3600, minutes=1)
    with VideoFile(path, limits=at_the_limit) as video:
        assert len(video.timeline()) == 60
        with pytest.raises(VideoError, match="120 frames at 60 a second; at most 60 are read"):
            video.timeline(fps=60)


def test_frames_that_grow_midway_or_are_shown_larger_are_held_to_the_limit(tmp_path):
    (tmp_path / "a.avi").write_bytes(hostile.growing_stream(tmp_path))
    with VideoFile(tmp_path / "a.avi") as video:
        sizes = [frame.width for frame in video.frames_at(video.timeline(), range(5))]
        assert sizes == [32, 32, 32, 1024, 1024]
    with VideoFile(tmp_path / "a.avi", limits=Limits(pixels=100 * 100)) as video:
        timeline = video.timeline()
        with pytest.raises(VideoError):
            list(video.frames_at(timeline, range(5)))
    with VideoFile(write_video(tmp_path / "b.mp4", width=512, height=2)) as video:
        (frame,) = video.frames_at(video.timeline(), [0])
        with pytest.raises(VideoError, match="at most 67,108,864 pixels"):
            video.to_rgb(frame, short_side=1024)


def test_other_codecs_are_named(tmp_path):
    with av.open(str(tmp_path / "a.avi"), "w") as container:
        stream = container.add_stream("zmbv", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "bgr0"
        frame = av.VideoFrame(32, 32, "bgr0")
        container.mux([*stream.encode(frame), *stream.encode(None)])
    with pytest.raises(VideoError, match="codec zmbv, which is not read"):
        decode_clip(tmp_path / "a.avi")


@pytest.mark.decodes
def test_damaged_videos_end_with_frames_or_a_reason(tmp_path, canary, capfd):
    videos = hostile.write_all(tmp_path, canary, 130)
    capfd.readouterr()
    for path, may_succeed in videos:
        reason = hostile.decode(path)
        assert may_succeed or reason
        assert "\n" not in reason
    assert canary.opened == []
    said = capfd.readouterr()
    assert "Traceback" not in said.out + said.err


@pytest.mark.processes
def test_check_names_each_with_its_reason(tmp_path, canary):
    label = tmp_path / "videos" / "label"
    label.mkdir(parents=True)
    listed = [*hostile.playlists(label, canary), *hostile.no_files(label, canary)]
    write_video(label / "good.mp4")
    words = ["check", f"--videos={tmp_path / 'videos'}", f"--output={tmp_path / 'bad.csv'}"]
    status, _, errors = commands.run([*words, "--workers=1"])
    assert status == 2
    assert "memory.mp4 leads out of" in errors  # a link
    status, _, errors = commands.run([*words, "--workers=1", "--follow"])
    assert status == 2
    with open(tmp_path / "bad.csv", newline="") as file:
        reasons = {row["path"]: row["reason"] for row in csv.DictReader(file)}
    named = {path.removeprefix(f"{tmp_path / 'videos'}/") for path, _ in listed}
    assert set(reasons) == {path for path in named if path.endswith((".mp4", ".avi", ".mkv", ".ts",
            ".mov", ".gif"))} - NOT_LISTED  # fmt: skip
    assert all(reasons.values())
    assert reasons["label/fifo.mp4"] == "no regular file: a FIFO, a device or a socket"
    assert canary.opened == []


# No file has such a name, or a folder has it.
NOT_LISTED = {"label/missing.mp4", "label/null\0byte.mp4", "label/empty_folder.mp4"}
