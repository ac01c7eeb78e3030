"""Decoding in processes of their own: a crash or a hang costs one video, all else is the same."""

import contextlib
import gc
import gzip
import io
import multiprocessing
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from videos import damage, numbers, write_video

from timesformer_jax.data import decode
from timesformer_jax.data.decode import VideoError, decode_clip, isolated
from timesformer_jax.data.decode import clip as clip_lib
from timesformer_jax.workers import HANG_SIGNAL

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("videos") / "a.mp4")


def children():
    """Processes that decode for this one, without those of predictors of other tests."""
    found = []
    for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        with contextlib.suppress(OSError):
            if b"decode.child" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(int(pid))
    return [pid for pid in found if pid not in OTHERS]


OTHERS: list[int] = []


@pytest.fixture(autouse=True)
def _others():
    OTHERS[:] = []
    OTHERS[:] = children()


def test_a_child_gives_the_same_and_a_crash_costs_one_video(video, tmp_path):
    def third(count, fps):
        return np.arange(0, count, 3)

    def kill(count, fps):
        os.kill(children()[0], signal.SIGSEGV)
        return third(count, fps)

    here = decode_clip(video, 0.2, 1.5, sample=third, short_side=24)
    with isolated():
        there = decode_clip(video, 0.2, 1.5, sample=third, short_side=24)
        assert np.array_equal(here.frames, there.frames)
        assert np.array_equal(here.times, there.times)
        assert (here.fps, here.num_frames) == (there.fps, there.num_frames)
        with pytest.raises(VideoError, match="the decoder crashes: SIGSEGV"):
            decode_clip(video, sample=kill)
        with pytest.raises(VideoError, match="missing file"):
            decode_clip(tmp_path / "none.mp4")
        with pytest.raises(ValueError, match="outside"):
            decode_clip(video, sample=lambda count, fps: np.array([count]))
        with pytest.raises(ZeroDivisionError):
            decode_clip(video, sample=lambda count, fps: 1 // 0)
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(decode_clip, [video] * 4))
        assert all(numbers(clip.frames) == list(range(60)) for clip in found)
        assert 1 <= len(children()) <= 2
    assert children() == []


def test_ctrl_c_and_the_death_of_a_waiting_child_cost_no_video(video):
    """Ctrl-C in a notebook is a SIGINT to the children too."""
    with isolated():
        decode_clip(video)
        [child] = children()
        os.kill(child, signal.SIGINT)
        assert numbers(decode_clip(video).frames) == list(range(60))
        assert children() == [child]
        os.kill(child, signal.SIGKILL)
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        assert numbers(decode_clip(video).frames) == list(range(60))
        assert child not in children()


@pytest.mark.parametrize("kind", ["file", "unbuffered", "memory", "gzip", "pipe"])
def test_an_open_file_is_decoded_by_a_child_too(kind, video, tmp_path, monkeypatch):
    """From its beginning, wherever it is read; and it stays open."""

    def kill(count, fps):
        os.kill(children()[0], signal.SIGSEGV)
        return np.arange(count)

    monkeypatch.setattr(clip_lib, "decode_clip", None)  # which would decode here
    with opened(kind, video, tmp_path) as file, isolated():
        if kind == "pipe":  # which is read once
            assert numbers(decode_clip(file).frames) == list(range(60))
            return
        file.seek(100)
        with decode.open_stream(file, every_tick) as stream:
            assert not isinstance(stream, decode.ClipStream)
            assert len(list(stream)) == 60
        with pytest.raises(VideoError, match="the decoder crashes: SIGSEGV"):
            decode_clip(file, sample=kill)
        assert numbers(decode_clip(file).frames) == list(range(60))
        assert not file.closed


@contextlib.contextmanager
def opened(kind, video, folder):
    """The video as an open file of a kind."""
    content = video.read_bytes()
    if kind == "memory":
        yield io.BytesIO(content)
    elif kind == "gzip":
        with gzip.open(folder / "a.gz", "wb") as file:
            file.write(content)
        with gzip.open(folder / "a.gz") as file:
            yield file
    elif kind == "pipe":
        os.mkfifo(folder / "pipe")
        writer = threading.Thread(target=(folder / "pipe").write_bytes, args=[content])
        writer.start()
        with open(folder / "pipe", "rb") as file:
            yield file
        writer.join()
    else:
        with open(video, "rb", buffering=0 if kind == "unbuffered" else -1) as file:
            yield file


def test_a_relative_path_is_found_after_a_change_of_the_working_directory(video, monkeypatch):
    with isolated():
        decode_clip(video)  # starts a child
        monkeypatch.chdir(video.parent)
        assert len(decode_clip(video.name).frames) == 60


def test_a_decoder_that_hangs_is_ended(video):
    """The time in which it must give something is made shorter than any decoder needs."""
    with isolated(stall_seconds=1e-4):
        for _ in range(2):
            with pytest.raises(VideoError, match="the decoder hangs"):
                decode_clip(video)
    assert children() == []


def every_tick(timeline):
    """Clips of two frames, which overlap."""
    ticks = np.arange(len(timeline))
    return np.stack([ticks, np.minimum(ticks + 1, len(ticks) - 1)], axis=1)


def test_a_stream_from_a_child_is_the_same(tmp_path):
    """With the damage that it passes over; a stream that is left in the middle ends its child."""
    path = write_video(tmp_path / "a.mov", fps=10, codec="mjpeg", pixels="yuvj420p")
    damage(path, 2, 3)

    def read(stream):
        return [(c.ticks.tolist(), c.frames.tolist(), c.damaged) for c in stream], stream.gaps

    arguments = (path, every_tick, 0.5, 4.5)
    gc.collect()  # a Predictor of another test isolates the decoding of its whole process
    with decode.open_stream(*arguments, short_side=24) as stream:
        assert isinstance(stream, decode.ClipStream)
        here = read(stream)
    assert here[1]
    assert any(damaged for *_, damaged in here[0])
    with isolated():
        for _ in range(2):
            with decode.open_stream(*arguments, short_side=24) as stream:
                assert not isinstance(stream, decode.ClipStream)
                assert read(stream) == here
        with decode.open_stream(path, every_tick) as stream:
            assert len(next(iter(stream)).frames) == 2
        assert children() == []
        assert decode.read_info(path).codec == "mjpeg"
        with pytest.raises(VideoError, match="missing file"):
            decode.open_stream(tmp_path / "none.mp4", every_tick).__enter__()
        assert len(children()) == 1
    assert children() == []


@pytest.mark.parametrize("when", ["opened", "decoded"])
def test_a_stream_whose_decoder_hangs_or_crashes_is_ended(video, when):
    if when == "opened":
        with isolated(stall_seconds=1e-4), pytest.raises(VideoError, match="the decoder hangs"):
            decode.open_stream(video, every_tick).__enter__()
    else:
        with isolated(), decode.open_stream(video, every_tick) as stream:
            clips = iter(stream)
            next(clips)
            os.kill(children()[0], HANG_SIGNAL)  # as the watchdog does
            with pytest.raises(VideoError, match="the decoder hangs"):
                list(clips)
    assert children() == []


def test_isolation_lasts_as_long_as_its_owner(video):
    class Owner:
        pass

    first, second = Owner(), Owner()
    decode.isolated_for(first)
    decode_clip(video)
    [child] = children()
    decode.isolated_for(second)
    decode_clip(video)
    assert len(children()) == 2
    del second
    gc.collect()
    assert children() == [child]
    del first
    gc.collect()
    assert children() == []


def test_waiting_for_the_parent_is_no_hang(video):
    def slow(count, fps):
        threading.Event().wait(3)
        return np.arange(2)

    with isolated(stall_seconds=2):
        assert len(decode_clip(video, sample=slow).frames) == 2


def test_the_parent_is_not_watched_and_keeps_a_timer_of_its_own(video):
    """That of pytest-timeout, where it is installed."""
    before, _ = signal.getitimer(signal.ITIMER_REAL)
    decode.decode_clip(video)
    after, _ = signal.getitimer(signal.ITIMER_REAL)
    assert before - 300 < after <= before
    assert (after > 0) == (before > 0)
    assert multiprocessing.active_children() == []
