"""Decoding in processes of their own: a crash or a hang costs one video, all else is the same."""

import contextlib
import multiprocessing
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from videos import numbers, write_video

from timesformer_jax.data import decode
from timesformer_jax.data.decode import VideoError, decode_clip, isolated

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("videos") / "a.mp4")


def children():
    """Processes that decode for this one."""
    found = []
    for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        with contextlib.suppress(OSError):
            if b"decode.isolated" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(int(pid))
    return found


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
        with open(video, "rb") as file:  # read here: a child does not have it
            assert len(decode_clip(file).frames) == 60
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(decode_clip, [video] * 4))
        assert all(numbers(clip.frames) == list(range(60)) for clip in found)
        assert 1 <= len(children()) <= 2
    assert children() == []


def test_a_decoder_that_hangs_is_ended(video):
    """The time in which it must give something is made shorter than any decoder needs."""
    with isolated(stall_seconds=1e-4):
        for _ in range(2):
            with pytest.raises(VideoError, match="the decoder hangs"):
                decode_clip(video)
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
