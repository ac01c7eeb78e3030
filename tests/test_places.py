"""Clips read their frames alone: which bytes, what is said of damage, and data of old versions."""

import collections
import dataclasses
import logging
import os
import shutil
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.data.check.prepared import check_prepared
from timesformer_jax.data.input import pipeline
from timesformer_jax.data.records import access, places, prepared, wire
from timesformer_jax.data.records.open import open_split
from timesformer_jax.errors import InputError

SPEC = ClipSpec(frames=4, frame_stride=2, crop=32, short_side=40)
OPTIONS = {"batch_size": 4, "short_side_range": (32, 40), "flip": False, "seed": 0}
STORED = (900, 1, 40)  # frames of the records


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The user's cache, so that no test writes to the real one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def frame(record, i):
    """The bytes of a stored frame, no JPEG, of a length of its own."""
    return np.random.default_rng([record, i]).bytes(200 + 37 * (record + i) % 500)


@pytest.fixture
def directory(tmp_path):
    """As an earlier version prepared it, without places: three records in two shards."""
    folder = tmp_path / "data"
    folder.mkdir()
    files = [f"x-train.tfrecord-0000{i}-of-00002" for i in range(2)]
    rows = []
    for shard, numbers in enumerate(([0, 1], [2])):
        with wire.ShardWriter(folder / files[shard]) as writer:
            for i in numbers:
                frames = [frame(i, j) for j in range(STORED[i])]
                row = {"id": str(i), "label": 0, "fps": 30.0, "stride": 1, "num_frames": STORED[i]}
                place = writer.write(wire.serialize({"video": frames, **row}))
                more = {"shard": shard, "height": 9, "width": 9, "video": i}
                rows.append({**row, **place, **more})
    prepared.write_index(os.fspath(folder), "train", files, rows)
    sizes = {"train": sum((folder / file).stat().st_size for file in files)}
    prepared.write_metadata(os.fspath(folder), "x", ["a"], {"train": [2, 1]}, sizes)
    return folder


@pytest.fixture
def reads(monkeypatch):
    """The parts of files that are read, counted where the system is asked: {name: [(at, size)]}."""
    seen = collections.defaultdict(list)
    pread = os.pread

    def count(descriptor, size, at):
        content = pread(descriptor, size, at)
        name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
        seen[name].append((at, len(content)))
        return content

    monkeypatch.setattr(os, "pread", count)
    return seen


def num_read(reads):
    return sum(size for parts in reads.values() for _, size in parts)


linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")


# ---- which bytes are read -----------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 30)), min_size=1, max_size=30))
def test_ranges_hold_all_frames_and_less_than_twice_their_bytes(gaps_and_sizes):
    gaps, sizes = np.array(gaps_and_sizes).T
    last = np.cumsum(gaps + sizes)
    first = last - sizes
    begin, end = access.byte_ranges(first, last)
    read = {at for low, high in zip(begin, end) for at in range(low, high)}
    frames = {at for low, high in zip(first, last) for at in range(low, high)}
    assert frames <= read
    assert len(read) == (end - begin).sum() <= 2 * len(frames)
    # What is read beside frames are gaps no longer than the frame behind; every such gap is.
    gap_bytes = {
        at
        for gap, size, low in list(zip(gaps, sizes, first))[1:]
        if gap <= size
        for at in range(low - gap, low)
    }
    assert read - frames == gap_bytes


@linux
@pytest.mark.parametrize(
    "indices",
    [
        list(range(5, 900, 9)),
        [899, 0, 450, 450, 3],
        [7],
        [*range(100, 160), *range(300, 310)],
        list(range(0, 900, 2)),
    ],
)
def test_a_clip_reads_its_frames_and_no_more_than_as_much_again(directory, reads, indices):
    split = open_split(directory, "train")
    expected = [frame(0, i) for i in indices]
    frame_bytes = sum(len(frame(0, i)) for i in set(indices))
    reads.clear()
    found, told = access.read_frames(split, 0, indices)
    assert found == expected
    assert num_read(reads) == told
    of_places = sum(size for _, size in reads["train.places"])
    assert of_places == 12 * (max(indices) - min(indices) + 1)
    assert told - of_places <= 2 * frame_bytes
    if len(indices) > 1:
        assert told - of_places < split.size[0] / 2 or len(indices) == 450


@linux
def test_where_half_of_the_bytes_are_wanted_the_record_is_read_whole(directory, reads):
    split = open_split(directory, "train")
    for row, indices in ((0, range(0, 900)), (1, [0]), (2, range(0, 40, 1))):
        reads.clear()
        found, told = access.read_frames(split, row, list(indices))
        assert found == [frame(row, i) for i in indices]
        file = os.path.basename(split.files[split.shard[row]])
        at, size = split.offset[row], split.size[row]
        assert reads[file] == [(at, 12), (at + 12, size), (at + 12 + size, 4)]
        assert told == num_read(reads)


def test_batches_are_the_same_with_places_and_without(demo_data):
    split = open_split(demo_data, "train")
    without = dataclasses.replace(split, places=())
    assert access.read_frames(split, 0, [0])[1] < split.size[0] / 2

    def batches(of):
        training = pipeline.train_batches(of, SPEC, **OPTIONS)
        yield from (next(training)[0] for _ in range(3))
        yield from pipeline.eval_batches(of, SPEC, batch_size=16, views=2, crops=3)

    for batch, expected in zip(batches(split), batches(without), strict=True):
        assert batch.keys() == expected.keys()
        assert all(np.array_equal(batch[key], expected[key]) for key in batch)


# ---- damage -------------------------------------------------------------------------------------


def edit(path, at, bit=0):
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


@given(st.data())
def test_a_flipped_bit_in_a_frame_is_that_of_a_damaged_record(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("flip")
    file, row = folder / "x.tfrecord", {"id": "0", "stride": 1, "num_frames": 20}
    with wire.ShardWriter(file) as writer:
        writer.write(b"before")
        frames = [frame(0, i) for i in range(20)]
        place = writer.write(serialized := wire.serialize({"video": frames, **row}))
    split = split_of(file, place, 20)
    places.write(split.places[0], b"0" * 32, [wire.frame_places(serialized).tobytes()])
    slices = wire.bytes_list(serialized, "video")
    begin = place["offset"] + wire.RECORD_HEADER_BYTES
    wanted = [2, 9, 15]
    i = data.draw(st.integers(0, 19))
    at = begin + data.draw(st.integers(slices[i].start, slices[i].stop - 1))
    edit(file, at, data.draw(st.integers(0, 7)))
    if i not in wanted:
        assert access.read_frames(split, 0, wanted)[0] == [frame(0, i) for i in wanted]
        return
    said = f"x.tfrecord is damaged in the record at byte {place['offset']}; `timesformer check "
    with pytest.raises(InputError) as error:
        access.read_frames(split, 0, wanted)
    assert said in str(error.value)


def split_of(file, place, count):
    """A split of one record."""
    columns = {"num_frames": count, "stride": 1, **place, "shard": 0}
    zeros = dict.fromkeys(("fps", "height", "width", "label", "video"), 0)
    return prepared.Split(
        name="train", files=(str(file),), label_names=("a",), ids=np.array(["0"]),
        **{name: np.array([value]) for name, value in {**zeros, **columns}.items()},
        places=(f"{file}.places",), first_place=np.array([0]),
    )  # fmt: skip


def test_a_cut_or_missing_shard_is_named(directory):
    split = open_split(directory, "train")
    shard = directory / os.path.basename(split.files[1])
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(InputError, match="00001-of-00002 ends within the record at byte 0; `times"):
        access.read_frames(split, 2, [1, 39])
    shard.unlink()
    with pytest.raises(InputError, match=r"cannot read .*00001-of-00002: No such file or dir"):
        access.read_frames(split, 2, [1, 39])


@pytest.mark.parametrize("byte", [0, 1, 3, 4, 7, 8, 11])
def test_damaged_places_are_named_by_reading_and_by_check(directory, byte):
    split = open_split(directory, "train")
    path = directory / "train.places"
    edit(path, 32 + 12 * 450 + byte, 6)
    for _ in range(2):
        with pytest.raises(InputError, match=r"train.places is damaged; delete it: it is made ag"):
            access.read_frames(split, 0, [3, 450])
        split = open_split(directory, "train")
    _, found = check_prepared(directory, 0.0, 1)
    assert [p.text for p in found if "places" in p.text] == [
        "train.places is damaged; delete it: it is made again from the records"
    ]
    path.unlink()
    split = open_split(directory, "train")
    assert access.read_frames(split, 0, [3, 450])[0] == [frame(0, 3), frame(0, 450)]
    _, found = check_prepared(directory, 0.0, 1)
    assert not [p.text for p in found if "places" in p.text]


def test_a_damaged_record_is_named_when_places_are_made(directory):
    edit(directory / "x-train.tfrecord-00000-of-00002", 5000)
    with pytest.raises(InputError, match="00000-of-00002 is damaged in the record at byte 0"):
        open_split(directory, "train")
    assert not list(directory.glob("*places*"))


# ---- data of earlier versions -------------------------------------------------------------------


def test_places_of_older_data_are_those_that_prepare_writes(demo_data, tmp_path, caplog):
    older = shutil.copytree(demo_data, tmp_path / "older")
    for path in [*older.glob("*.places"), *older.glob("manifests/*.places")]:
        path.unlink()
    stored = {path: path.stat().st_mtime_ns for path in older.rglob("*") if path.is_file()}
    with caplog.at_level(logging.INFO):
        open_split(older, "validation")
    kept = older / "validation.places"
    assert [r.message for r in caplog.records if "places" in r.message] == [
        f"clips of validation read their frames alone, by {kept}"
    ]
    assert kept.read_bytes() == (demo_data / "validation.places").read_bytes()
    assert stored == {path: path.stat().st_mtime_ns for path in stored}
    assert {p for p in older.rglob("*") if p.is_file()} == {*stored, kept}
    # Nothing is read again: there is nothing left to read.
    for shard in older.glob("*.tfrecord-*"):
        shard.write_bytes(b"")
    open_split(older, "validation")


def test_where_the_data_cannot_be_written_places_are_in_the_cache(directory, cache, caplog):
    # In the way of the file, for any user: root may write to a folder that is read-only.
    (directory / "train.places").mkdir()
    (directory / "train.places" / "full").touch()
    with caplog.at_level(logging.INFO):
        split = open_split(directory, "train")
    (kept,) = cache.glob("timesformer_jax/*/train.places")
    assert f"clips of train read their frames alone, by {kept}" in caplog.text
    found, told = access.read_frames(split, 0, [4, 800])
    assert found == [frame(0, 4), frame(0, 800)]
    assert told < split.size[0] / 2


def test_places_that_cannot_be_kept_leave_records_to_be_read_whole(directory, cache, caplog):
    (directory / "train.places").mkdir()
    (directory / "train.places" / "full").touch()
    cache.write_text("a file where the folder should be")
    split = open_split(directory, "train")
    assert "clips of train read their records whole" in caplog.text
    found, told = access.read_frames(split, 0, [4, 800])
    assert found == [frame(0, 4), frame(0, 800)]
    assert told == split.size[0] + wire.RECORD_OVERHEAD_BYTES


def test_places_of_other_records_or_half_written_are_made_again(directory, monkeypatch):
    split = open_split(directory, "train")
    path = directory / "train.places"
    whole = path.read_bytes()
    for other in (b"", whole[:-1], whole[: 32 + 12 * 100], b"1" * 32 + whole[32:]):
        path.write_bytes(other)
        open_split(directory, "train")
        assert path.read_bytes() == whole
    path.unlink()
    (directory / f"train.places.{os.getpid()}.part").write_bytes(whole[:100])  # of a killed run

    def killed(*_):
        yield whole[32:100]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(places, "of_records", killed)
        with pytest.raises(KeyboardInterrupt):
            open_split(directory, "train")
    assert not path.exists()
    again = open_split(directory, "train")
    assert path.read_bytes() == whole
    assert np.array_equal(again.first_place, split.first_place)


def test_another_process_that_makes_them_at_once_does_no_harm(directory, monkeypatch):
    of_records, path = places.of_records, directory / "train.places"

    def meanwhile(records):
        monkeypatch.setattr(places, "of_records", of_records)
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: 1)
            open_split(directory, "train")
        found.append(path.read_bytes())
        yield from of_records(records)

    found = []
    monkeypatch.setattr(places, "of_records", meanwhile)
    open_split(directory, "train")
    assert found == [path.read_bytes()]
    assert not list(directory.glob("*.part"))


def test_an_index_with_another_number_of_frames_is_one_line(directory):
    with np.load(directory / "train.index.npz") as index:
        columns = dict(index)
    columns["num_frames"][2] = 41
    np.savez(directory / "train.index.npz", **columns)
    with pytest.raises(InputError, match="40 frames in the record at byte 0, where the index"):
        open_split(directory, "train")
