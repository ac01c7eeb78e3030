"""Long clips and large batches come from pieces: the same frames, in no more memory than told."""

import dataclasses
import itertools
import sys

import forked
import numpy as np
import pytest
from conftest import environment
from hypothesis import given
from hypothesis import strategies as st

from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.data.input import in_flight, pipeline
from timesformer_jax.data.input.in_flight import InFlight
from timesformer_jax.data.records.open import open_split

SPEC = ClipSpec(frames=8, frame_stride=2, crop=32, short_side=40)
TRAIN = {"short_side_range": (32, 40), "flip": True, "seed": 3}
GIB = 2**30


def plan(frames, side=224, rows=8, views=1, crops=1):
    return InFlight(rows, views, crops, frames, side, 3 * 256 * 340, 20_000, 2_000_000)


@given(
    st.integers(1, 20_000), st.integers(1, 448), st.integers(1, 64), st.integers(1, 12),
    st.sampled_from([1, 3]),
)  # fmt: skip
def test_pieces_hold_every_frame_of_a_clip(frames, side, rows, views, crops):
    found = plan(frames, side, rows, views, crops)
    starts, piece = found.starts, found.piece
    assert 1 <= piece <= frames
    assert starts[0] == 0
    assert starts[-1] + piece == frames
    assert (np.diff(starts) > 0).all()
    assert (np.diff(starts) <= piece).all()
    if found.in_pieces:
        assert piece == 1 or piece * views <= in_flight.PIECE_FRAMES
        assert 1 <= found.reads <= rows
    assert found.bytes > found.clips * frames * side**2 * 3


def test_fewer_clips_are_in_memory_the_longer_they_are():
    """Of a batch of 8 four are there at first, then two, and one that is copied to the device."""
    lengths = [8, 32, 96, 256, 512, 1024, 8192]
    clips = [plan(frames).clips for frames in lengths]
    assert clips == sorted(clips, reverse=True)
    assert (clips[0], clips[-1]) == (32, 16)
    batch = 8 * 8192 * 224**2 * 3
    assert 3 * batch < plan(8192).bytes < 3.3 * batch
    assert f"{plan(8192).bytes / GIB:.2g} GiB for 16 clips of 8,192 frames" in str(plan(8192))


@pytest.mark.parametrize("short", ["repeat", "mask"])
def test_batches_from_pieces_are_those_that_are_made_whole(demo_data, monkeypatch, short):
    split, spec = open_split(demo_data, "validation"), dataclasses.replace(SPEC, short=short)

    def batches():
        trained = pipeline.train_batches(split, spec, batch_size=6, **TRAIN)
        for batch, _ in itertools.islice(trained, 5):
            yield batch
        yield from pipeline.eval_batches(split, spec, batch_size=8, views=2, crops=3)
        yield from pipeline.eval_batches(split, spec, batch_size=8, views="cover")

    whole = list(batches())
    for name, value in {"BATCH_BYTES": 0, "PIECE_FRAMES": 6, "ENCODED_BYTES": 60_000}.items():
        monkeypatch.setattr(in_flight, name, value)
    for expected, found in zip(whole, batches(), strict=True):
        assert expected.keys() == found.keys()
        assert all(np.array_equal(expected[name], found[name]) for name in expected)


def test_a_batch_that_nobody_wants_any_more_is_given_up(demo_data, monkeypatch):
    monkeypatch.setattr(in_flight, "BATCH_BYTES", 0)
    split = open_split(demo_data, "train")
    batches = pipeline.train_batches(split, SPEC, batch_size=6, **TRAIN)
    first, _ = next(batches)
    batches.close()
    assert first["frames"].any()
    assert next(batches, None) is None


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="it asks /proc for the peak of memory")
def test_what_is_told_is_not_exceeded(demo_data):
    """Measured by the kernel: the most memory that a process had, after a warm-up."""
    done = forked.run(read_long_clips, str(demo_data), environment=environment())
    assert done.returncode == 0, done.stderr
    used, told = map(int, done.stdout.split())
    assert told / 2 < used < told


def read_long_clips(directory):
    """Prints how the process grows while it reads clips of 2,048 frames, and what was told."""
    split = open_split(directory, "train")
    for frames in (512, 2048):
        spec = dataclasses.replace(SPEC, frames=frames)
        told = pipeline.train_in_flight(split, spec, 8, TRAIN["short_side_range"])
        before = memory("VmRSS")
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # from now on the peak is that of what follows
        batches = pipeline.train_batches(split, spec, batch_size=8, **TRAIN)
        for _ in range(3):
            on_device = next(batches)[0]["frames"].copy()
            del on_device
        batches.close()
    print(memory("VmHWM") - before, told.bytes)


def memory(name):
    """A line of /proc/self/status, in bytes."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(name))
