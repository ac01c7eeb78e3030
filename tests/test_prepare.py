import csv
import errno
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from conftest import command as cli_command
from conftest import environment, interruptible
from videos import numbers, write_audio, write_video

from timesformer_jax.data.annotations import Clip
from timesformer_jax.data.check.prepared import check_prepared
from timesformer_jax.data.decode import decode_clip
from timesformer_jax.data.layout import INDEX_DTYPES
from timesformer_jax.data.prepare import shards
from timesformer_jax.data.prepare.prepare import prepare
from timesformer_jax.data.records import prepared as records
from timesformer_jax.data.records.open import open_split
from timesformer_jax.data.records.split import read_reassigned
from timesformer_jax.data.records.wire import RECORD_HEADER_BYTES
from timesformer_jax.errors import InputError
from timesformer_jax.storage import part_name

pytestmark = pytest.mark.processes

SPLITS = {"train": 14, "validation": 6}
OPTIONS = {"short_side": 24, "clips_per_shard": 3, "workers": 1, "name": "tiny"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """20 good clips of 2 labels, one of them trimmed, and 6 bad ones."""
    folder = tmp_path_factory.mktemp("source")
    rows = [("path", "label", "split", "start", "end")]
    for split, count in SPLITS.items():
        for i in range(count):
            path = write_video(folder / f"{split}{i}.mp4", frames=20 + i, fps=25)
            rows.append((path.name, "ab"[i % 2], split, "", ""))
    rows[1] = (*rows[1][:3], 0.2, 0.52)  # frames 5 to 12
    whole = (folder / "train1.mp4").read_bytes()
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("no video " * 50)
    (folder / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    write_audio(folder / "audio.mp4")
    rows += [(f"{name}.mp4", "a", "train", "", "") for name in ("empty", "text", "cut", "audio")]
    rows += [("missing.mp4", "b", "validation", "", ""), ("train2.mp4", "a", "train", 9, 10)]
    with open(folder / "clips.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


@pytest.fixture(scope="module")
def prepared(source, tmp_path_factory):
    output = tmp_path_factory.mktemp("prepared") / "tiny"
    summary = prepare(**arguments(source, output, workers=2))
    assert summary.clips == SPLITS
    assert summary.failures == 6
    assert summary.classes == 2
    return output


def arguments(source, output, **options):
    options = {"annotations": source / "clips.csv", "store_stride": 3, **OPTIONS, **options}
    return {"videos": source, "output": output, **options}


def digests(output):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(output.glob("*.tfrecord-*"))
    }


def command(**kwargs):
    """The command of a process that prepares. An InputError is one line and exit status 2."""
    kwargs = {key: os.fspath(v) if isinstance(v, Path) else v for key, v in kwargs.items()}
    code = (
        "import sys\n"
        "from timesformer_jax.data.prepare.prepare import prepare\n"
        "from timesformer_jax.errors import InputError\n"
        f"try: prepare(**{kwargs!r})\n"
        "except InputError as error: sys.exit(print(error, file=sys.stderr) or 2)\n"
        "except KeyboardInterrupt: sys.exit(130)\n"
    )
    return [sys.executable, "-c", code]


# ---- what is prepared ---------------------------------------------------------------------------


def test_bad_clips_are_listed_with_the_reason(prepared):
    with open(prepared / "failures.csv", newline="") as file:
        failures = {row["path"]: row for row in csv.DictReader(file)}
    assert set(failures) == {
        *(f"{name}.mp4" for name in ("empty", "text", "cut", "audio", "missing", "train2")),
    }
    assert failures["missing.mp4"]["reason"] == "missing file"
    assert failures["missing.mp4"]["split"] == "validation"
    assert failures["empty.mp4"]["reason"] == "empty file"
    assert failures["audio.mp4"]["reason"] == "no video stream"
    assert failures["train2.mp4"]["reason"] == "no frame from 9 s to 10 s"
    assert all(failures[name]["reason"] for name in ("text.mp4", "cut.mp4"))


def test_tfds_opens_and_decodes_it(prepared):
    builder = tfds.builder_from_directory(prepared)
    assert builder.info.features["label"].names == ["a", "b"]
    seen = set()
    for split, count in SPLITS.items():
        assert builder.info.splits[split].num_examples == count
        for example in builder.as_dataset(split=split).as_numpy_iterator():
            identity = example["id"].decode()
            seen.add(identity)
            first, total = 0, example["num_frames"]
            if identity == "train0.mp4#0.2-0.52":
                first = 5
                assert total == 8
            else:
                assert total == 20 + int(identity.removesuffix(".mp4").removeprefix(split))
            assert example["fps"] == 25
            assert example["stride"] == 3
            assert example["video"].shape == (-(-total // 3), 24, 32, 3)
            stored = np.arange(first, first + total, 3)
            np.testing.assert_allclose(numbers(example["video"]), stored, atol=1)
    assert len(seen) == sum(SPLITS.values())


def test_the_index_finds_every_record(prepared):
    for name, count in SPLITS.items():
        split = open_split(prepared, name)
        assert len(split) == count == len(set(split.ids))
        assert split.label_names == ("a", "b")
        assert all(os.path.isabs(file) for file in split.files)
        for column, dtype in INDEX_DTYPES.items():
            assert getattr(split, column).dtype == dtype
        for i in range(count):
            with open(split.files[split.shard[i]], "rb") as file:
                file.seek(split.offset[i])
                header = file.read(RECORD_HEADER_BYTES)
                assert int.from_bytes(header[:8], "little") == split.size[i]
                record = records.parse(file.read(split.size[i]))
            assert record["id"].numpy().decode() == split.ids[i]
            assert record["label"] == split.label[i]
            assert record["num_frames"] == split.num_frames[i]
            assert record["stride"] == split.stride[i]
            assert record["fps"] == split.fps[i]
            assert len(record["video"]) == -(-split.num_frames[i] // split.stride[i])
            shape = tf.io.decode_jpeg(record["video"][0]).shape
            assert shape == (split.height[i], split.width[i], 3)


def test_records_are_parsed_within_tf_data(prepared):
    split = open_split(prepared, "train")
    dataset = tf.data.TFRecordDataset(split.files).map(records.parse)
    assert [record["id"].decode() for record in dataset.as_numpy_iterator()] == list(split.ids)


def test_shards_mix_the_classes(prepared):
    split = open_split(prepared, "train")
    assert len({tuple(split.label[split.shard == i]) for i in range(len(split.files))}) > 2


def test_a_second_run_reports_that_all_is_done(source, prepared, capsys):
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*") if path.is_file()}
    summary = prepare(**arguments(source, prepared))
    assert "already prepared" in capsys.readouterr().out
    assert summary.clips == SPLITS
    assert summary.failures == 6
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_damaged_shard_is_written_again(source, prepared, tmp_path):
    output = shutil.copytree(prepared, tmp_path / "copy")
    shard = next(output.glob("*train.tfrecord-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    # What an earlier version wrote has no places; of these shards they are found in the records.
    for path in [*output.glob("*.places"), *output.glob("manifests/*.places")]:
        path.unlink()
    prepare(**arguments(source, output))
    assert digests(output) == digests(prepared)
    for split in SPLITS:
        found = (output / f"{split}.places").read_bytes()
        assert found == (prepared / f"{split}.places").read_bytes()


# ---- interrupted --------------------------------------------------------------------------------


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def interrupt(arguments, manifests, how):
    """Runs prepare until this number of shards is done, then stops it; all its workers must end.

    Again, where the machine was so busy that all were done before it could be stopped.
    """
    output = arguments["output"]
    before = output.with_name("before")
    if output.exists():
        shutil.copytree(output, before)
    status = started_and_stopped(arguments, manifests, how)
    while (output / "dataset_info.json").exists():
        shutil.rmtree(output)
        if before.exists():
            shutil.copytree(before, output)
        status = started_and_stopped(arguments, manifests, how)
    for shard in output.glob("*.tfrecord-*-of-?????"):  # none half written
        list(tf.data.TFRecordDataset(os.fspath(shard)))
    return status


def shards_done(arguments):
    return len(list(arguments["output"].glob("manifests/*.json")))


def started_and_stopped(arguments, manifests, how):
    # At least one more than there are: the signal is not for a process that still imports.
    awaited = max(manifests, shards_done(arguments) + 1)
    process = subprocess.Popen(
        interruptible(command(**arguments)), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        text=True, start_new_session=True,
    )  # fmt: skip
    while process.poll() is None and shards_done(arguments) < awaited:
        time.sleep(0.005)
    workers = children(process.pid)
    how(process.pid)
    _, errors = process.communicate()
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        time.sleep(0.05)  # for ever, if a worker outlives its parent
    assert "Traceback" not in errors
    return process.returncode


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_a_killed_run_continues_to_the_same_bytes(source, prepared, tmp_path):
    again = arguments(source, tmp_path / "killed", workers=2)
    assert interrupt(again, 1, lambda pid: os.kill(pid, signal.SIGKILL)) == -signal.SIGKILL
    assert interrupt(again, 3, lambda pid: os.killpg(pid, signal.SIGINT)) == 130
    leftover = tmp_path / "killed" / "tiny-train.tfrecord-00000-of-00007.1.part"
    leftover.write_bytes(b"half")
    prepare(**again)
    assert not list(tmp_path.glob("killed/**/*.part"))
    assert digests(tmp_path / "killed") == digests(prepared)
    for split in SPLITS:
        mine, theirs = (
            (p / f"{split}.places").read_bytes() for p in (tmp_path / "killed", prepared)
        )
        assert mine == theirs
        mine, theirs = (open_split(p, split) for p in (tmp_path / "killed", prepared))
        np.testing.assert_array_equal(mine.ids, theirs.ids)
        np.testing.assert_array_equal(mine.offset, theirs.offset)


def test_a_killed_worker_is_one_clear_error(source, tmp_path):
    def kill_one():
        while not active_children():
            time.sleep(0.01)
        os.kill(active_children()[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(InputError, match=r"worker process was killed.*run the same command again"):
        prepare(**arguments(source, tmp_path / "out"))
    killer.join()
    assert not active_children()


def test_a_second_run_on_the_same_output_is_refused(source, prepared):
    descriptor = os.open(prepared, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(InputError, match="another run is preparing"):
            prepare(**arguments(source, prepared))
    finally:
        os.close(descriptor)


# ---- a full disk --------------------------------------------------------------------------------


def test_a_full_disk_in_a_shard(source, tmp_path):
    clip = Clip("train1.mp4", "a", None, None, "train")
    shard = shards.Shard(os.fspath(tmp_path / "shard"), "train", (clip,))
    temporary = tmp_path / part_name("shard")
    temporary.symlink_to("/dev/full")
    options = shards.ShardOptions("tiny", 24, 90, 1, None, None, 3)
    with pytest.raises(OSError, match="No space left") as error:
        shards.write_shard(shard, os.fspath(source), ("a",), options)
    assert error.value.errno == errno.ENOSPC
    assert not (tmp_path / "shard").exists()
    assert not os.path.lexists(temporary)
    assert not shard.is_done(os.fspath(source))


def may_mount():
    probe = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs none /mnt"]
    return shutil.which("unshare") and subprocess.run(probe, capture_output=True).returncode == 0


@pytest.mark.skipif(not may_mount(), reason="may not mount a small disk")
def test_a_full_disk_loses_nothing(source, prepared, tmp_path):
    """A full disk is an error of one line; with more space the same command finishes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(path.stat().st_size for path in prepared.glob("*.tfrecord-*"))
    script = f"""
        mount -t tmpfs -o size={size // 2} none {disk}
        {shlex.join(command(**arguments(source, disk / "out")))}; echo status $?
        cp -r {disk}/out {tmp_path}/out
    """
    result = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "status 2", result.stderr
    assert result.stderr.splitlines()[-1].startswith("disk full at")
    assert "Traceback" not in result.stderr
    assert 1 <= len(list(tmp_path.glob("out/manifests/*.json"))) < 7
    prepare(**arguments(source, tmp_path / "out"))
    assert digests(tmp_path / "out") == digests(prepared)


# ---- damaged videos, and decoders that crash -----------------------------------------------------


def damaged(whole, rng):
    """A file cut anywhere, or with bits flipped, or both."""
    bits = np.unpackbits(np.frombuffer(whole, np.uint8))
    if rng.random() < 0.7:
        bits[rng.integers(len(bits), size=rng.integers(1, 60))] ^= 1
    content = np.packbits(bits).tobytes()
    return content[: rng.integers(len(content))] if rng.random() < 0.5 else content


def test_among_hundreds_of_damaged_videos_every_good_clip_is_prepared(tmp_path):
    videos, rng = tmp_path / "videos", np.random.default_rng(0)
    made = [("mp4", "libx264"), ("mkv", "libx264"), ("webm", "libvpx-vp9"), ("avi", "mpeg4")]
    for label in ("good", "damaged"):
        (videos / "train" / label).mkdir(parents=True)
    for ending, codec in made:
        whole = write_video(videos / f"train/good/whole.{ending}", frames=8, codec=codec)
        for i in range(100):
            path = videos / f"train/damaged/{i}.{ending}"
            path.write_bytes(damaged(whole.read_bytes(), rng))
    summary = prepare(videos, tmp_path / "out", short_side=24, clips_per_shard=101, workers=2)
    with open(tmp_path / "out" / "failures.csv", newline="") as file:
        failures = {row["id"]: row["reason"] for row in csv.DictReader(file)}
    assert summary.failures == len(failures) > 100
    assert all(len(reason.splitlines()) == 1 for reason in failures.values())
    split = open_split(tmp_path / "out", "train")
    assert len(split) + len(failures) == 404
    assert not set(split.ids) & set(failures)
    for ending, _ in made:
        (place,) = np.flatnonzero(split.ids == f"train/good/whole.{ending}")
        frames = decode_clip(videos / split.ids[place], short_side=24).frames
        with open(split.files[split.shard[place]], "rb") as file:
            file.seek(split.offset[place] + RECORD_HEADER_BYTES)
            jpegs = records.parse(file.read(split.size[place]))["video"]
        stored = np.stack([tf.io.decode_jpeg(jpeg) for jpeg in jpegs])
        assert stored.shape == frames.shape
        assert np.abs(stored.astype(int) - frames).mean() < 3


def test_a_clip_that_crashes_the_decoder_is_left_out(source, prepared, tmp_path, capsys):
    """A segmentation fault ends a worker: only the clip that it decoded is left out."""

    def crash_one():
        while not (workers := active_children()) or not list((tmp_path / "out").glob("*.part")):
            time.sleep(0.01)
        os.kill(workers[0].pid, signal.SIGSEGV)

    crasher = threading.Thread(target=crash_one)
    crasher.start()
    summary = prepare(**arguments(source, tmp_path / "out", max_failures=6))
    crasher.join()
    with open(tmp_path / "out" / "failures.csv", newline="") as file:
        failures = {row["id"]: row["reason"] for row in csv.DictReader(file)}
    crashed = {id for id, reason in failures.items() if "crash" in reason}
    assert len(crashed) == 1
    assert failures[next(iter(crashed))] == "the decoder crashes: SIGSEGV"
    assert sum(summary.clips.values()) == sum(SPLITS.values()) - len(crashed - bad(prepared))
    assert "crashed a worker process (SIGSEGV); continuing without it" in capsys.readouterr().err


def bad(prepared):
    with open(prepared / "failures.csv", newline="") as file:
        return {row["id"] for row in csv.DictReader(file)}


def test_too_many_failures_end_the_run(source, prepared, tmp_path):
    """A missing file does not count as undecodable: 5 of the 6 do."""
    out = tmp_path / "out"
    with pytest.raises(InputError, match="more than --max_failures=4"):
        prepare(**arguments(source, out, max_failures=4))
    assert not (out / "dataset_info.json").exists()
    assert "reason" in (out / "failures.csv").read_text()
    prepare(**arguments(source, out, max_failures=5))
    assert digests(out) == digests(prepared)


def test_missing_videos_that_are_added_later_are_prepared(source, tmp_path, capsys):
    videos = shutil.copytree(source, tmp_path / "videos")
    (videos / "train3.mp4").rename(tmp_path / "later.mp4")
    out = tmp_path / "out"
    assert prepare(**arguments(videos, out)).clips == {"train": 13, "validation": 6}
    before = digests(out)
    assert "2 listed clips have no file" in capsys.readouterr().out
    (tmp_path / "later.mp4").rename(videos / "train3.mp4")
    assert prepare(**arguments(videos, out)).clips == SPLITS
    prepare(**arguments(videos, tmp_path / "at once"))
    assert digests(out) == digests(tmp_path / "at once")
    assert sum(before[name] != now for name, now in digests(out).items()) == 1


def test_broken_videos_that_are_repaired_later_are_prepared(unsplit, tmp_path, capsys):
    """Of manifests that do not tell which file was broken, none is asked for."""
    folder, broken, _ = unsplit
    videos = shutil.copytree(folder / "videos", tmp_path / "videos")
    output = shutil.copytree(folder / "out", tmp_path / "out")
    old = shutil.copytree(output, tmp_path / "old")
    for path in old.glob("manifests/*.json"):
        manifest = json.loads(path.read_text())
        for row in manifest["failures"]:
            del row["file"]
        path.write_text(json.dumps(manifest))
    before = digests(output)
    prepare(videos, output, **OPTIONS)
    assert "already prepared" in capsys.readouterr().out
    write_video(videos / broken, frames=3, fps=25)
    summary = prepare(videos, output, **OPTIONS)
    assert (summary.failures, summary.clips) == (0, {"train": 8, "validation": 2})
    assert sum(before[name] != now for name, now in digests(output).items()) == 1
    assert (output / "failures.csv").read_text().count("\n") == 1
    capsys.readouterr()
    prepare(videos, old, **OPTIONS)
    assert "already prepared" in capsys.readouterr().out


# ---- options ------------------------------------------------------------------------------------


def test_long_videos_are_cut_into_equal_segments(tmp_path):
    """At 25 fps and about 0.7 s, 60 frames give 3 segments of 20, and 20 frames give 1."""
    (tmp_path / "v" / "train" / "a").mkdir(parents=True)
    write_video(tmp_path / "v/train/a/long.mp4", frames=60, fps=25)
    write_video(tmp_path / "v/train/a/short.mp4", frames=20, fps=25)
    summary = prepare(
        tmp_path / "v", tmp_path / "out", short_side=24, segment_seconds=0.7, store_stride=3,
        workers=1,
    )  # fmt: skip
    assert (summary.clips, summary.records) == ({"train": 2}, {"train": 4})
    assert "train: 2 clips in 4 records" in str(summary)
    split = open_split(tmp_path / "out", "train")
    assert sorted(split.ids) == [
        "train/a/long.mp4#0.00-0.80",
        "train/a/long.mp4#0.80-1.60",
        "train/a/long.mp4#1.60-2.40",
        "train/a/short.mp4",
    ]
    long = np.array([name.startswith("train/a/long") for name in split.ids])
    assert len(set(split.video[long])) == 1
    assert set(split.video[~long]).isdisjoint(split.video[long])
    assert set(split.num_frames) == {20}
    for row in tfds.builder_from_directory(tmp_path / "out").as_dataset("train"):
        first = round(25 * float(str(row["id"].numpy().decode()).partition("#")[2][:4] or 0))
        np.testing.assert_allclose(
            numbers(row["video"].numpy()), np.arange(first, first + 20, 3), atol=1
        )


def test_frames_are_resampled_to_fps(tmp_path):
    (tmp_path / "v" / "train" / "a").mkdir(parents=True)
    write_video(tmp_path / "v/train/a/x.mp4", frames=60, fps=30)
    prepare(tmp_path / "v", tmp_path / "out", short_side=24, fps=10, workers=1)
    split = open_split(tmp_path / "out", "train")
    assert (split.num_frames.tolist(), split.fps.tolist()) == ([20], [10])
    (row,) = tfds.builder_from_directory(tmp_path / "out").as_dataset("train")
    np.testing.assert_allclose(numbers(row["video"].numpy()), np.arange(0, 60, 3), atol=1)


# ---- elsewhere ----------------------------------------------------------------------------------


def test_apache_beam_writes_the_same_bytes(source, prepared, tmp_path):
    out = tmp_path / "out"
    beam = {"runner": "beam", "beam_options": "--runner=DirectRunner --direct_num_workers=1"}
    summary = prepare(**arguments(source, out, **beam))
    assert (summary.clips, summary.failures) == (SPLITS, 6)
    assert digests(out) == digests(prepared)
    assert (out / "failures.csv").read_bytes() == (prepared / "failures.csv").read_bytes()
    next(out.glob("*-train.*")).unlink()
    prepare(**arguments(source, out, **beam))  # Beam writes a lost shard again, too
    assert digests(out) == digests(prepared)


def test_on_gs_it_writes_the_same_bytes(source, prepared, gcs, timesformer_on):
    bucket = gcs.root / "bucket"
    shutil.copytree(source, bucket / "videos")
    options = {**OPTIONS, "store_stride": 3, "annotations": "gs://bucket/videos/clips.csv"}
    flags = [f"--{name}={value}" for name, value in options.items()]
    command = ("prepare", "--videos=gs://bucket/videos", "--output=gs://bucket/out", *flags)
    done = timesformer_on(gcs, *command)
    assert done.returncode == 0, done.stderr
    assert digests(bucket / "out") == digests(prepared)
    assert (bucket / "out/failures.csv").read_bytes() == (prepared / "failures.csv").read_bytes()
    assert "already prepared" in timesformer_on(gcs, *command).stdout


@pytest.fixture
def timesformer_on():
    """Runs the command line in a process that uses the fake Google Cloud Storage."""

    def run(gcs, *arguments):
        return subprocess.run(
            cli_command(*arguments),
            capture_output=True, text=True, env=environment() | dict(gcs.environment),
        )  # fmt: skip

    return run


# ---- refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"short_side": 32}, "short_side 24 there, 32 now"),
        ({"store_stride": 1, "quality": 80}, "quality 90 there, 80 now; store_stride 3 there, 1"),
        ({"name": "other"}, "name tiny there, other now"),
    ],
)
def test_an_output_of_other_options_is_refused(source, prepared, changed, message):
    with pytest.raises(InputError, match=message + ".*choose another output"):
        prepare(**arguments(source, prepared, **changed))


def test_an_output_of_other_clips_is_refused(source, prepared, tmp_path):
    rows = (source / "clips.csv").read_text().splitlines()
    (tmp_path / "fewer.csv").write_text("\n".join(rows[:-1]))
    with pytest.raises(
        InputError, match=r"another list of clips.*add --resplit.*choose another output"
    ):
        prepare(**arguments(source, prepared, annotations=tmp_path / "fewer.csv"))


def test_another_data_set_is_not_written_over(source, tmp_path):
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(InputError, match="did not write"):
        prepare(**arguments(source, tmp_path))


@pytest.mark.parametrize(
    ("option", "value"),
    [("short_side", 0), ("quality", 0), ("quality", 101), ("store_stride", 0),
     ("clips_per_shard", 0), ("workers", -1), ("name", "My videos"), ("fps", -1.0),
     ("segment_seconds", float("inf")), ("max_failures", -1), ("runner", "spark"),
     ("beam_options", "--runner=FlinkRunner"), ("dataset", "kinetic400")],
)  # fmt: skip
def test_options_out_of_range(source, tmp_path, option, value):
    with pytest.raises(InputError, match=option.replace("dataset", "data set")):
        prepare(**arguments(source, tmp_path, **{option: value}))


def test_an_output_that_cannot_be_written(source, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write .*file"):
        prepare(**arguments(source, tmp_path / "file"))


def test_a_split_without_a_decodable_clip(source, tmp_path):
    (tmp_path / "clips.csv").write_text(
        "path,label,split\ntrain1.mp4,a,train\nempty.mp4,a,validation\ntext.mp4,a,validation\n"
    )
    out = tmp_path / "out"
    with pytest.raises(InputError, match="none of the clips of validation could be decoded"):
        prepare(**arguments(source, out, annotations=tmp_path / "clips.csv"))
    assert "empty.mp4" in (out / "failures.csv").read_text()
    assert len(list((out / "manifests").glob("*.json"))) == 2  # finished shards are kept
    assert not (out / "dataset_info.json").exists()


def test_a_label_file_fixes_the_classes(source, tmp_path):
    (tmp_path / "labels.txt").write_text("b\nunused\na\n")
    (tmp_path / "clips.csv").write_text("path,label,split\ntrain1.mp4,b,test\ntrain2.mp4,a,test\n")
    options = {"annotations": tmp_path / "clips.csv", "labels": tmp_path / "labels.txt"}
    prepare(**arguments(source, tmp_path / "out", **options))
    split = open_split(tmp_path / "out", "test")
    assert split.label_names == ("b", "unused", "a")
    assert dict(zip(split.ids, split.label)) == {"train1.mp4": 0, "train2.mp4": 2}


def test_directories_that_cannot_be_opened(prepared, tmp_path):
    with pytest.raises(InputError, match="there is no folder"):
        open_split(tmp_path / "nowhere", "train")
    with pytest.raises(InputError, match="not a prepared data set"):
        open_split(tmp_path, "train")
    with pytest.raises(InputError, match="no split 'trian'; there: train, validation"):
        open_split(prepared, "trian")
    shutil.copytree(prepared, tmp_path / "copy")
    records.write_index(os.fspath(tmp_path / "copy"), "empty", [], [])
    with pytest.raises(InputError, match=r"the split 'empty' .* holds no clip"):
        open_split(tmp_path / "copy", "empty")


@pytest.mark.parametrize("how", ["half an index", "no labels", "a folder", "no permission"])
def test_an_index_that_cannot_be_read_is_one_line(prepared, tmp_path, monkeypatch, how):
    output = shutil.copytree(prepared, tmp_path / "copy")
    index, advice = output / "train.index.npz", "delete dataset_info.json and run `timesformer"
    if how == "half an index":
        os.truncate(index, 400)
    elif how == "no labels":
        (output / "labels.txt").unlink()
    elif how == "a folder":
        index.unlink()
        index.mkdir()
    else:  # the tests may run as root, who may read anything
        error = tf.errors.PermissionDeniedError(None, None, f"{index}; Permission denied")
        monkeypatch.setattr(records, "_read_index", lambda *_: (_ for _ in ()).throw(error))
        advice = "Permission denied\\); make it readable"
    message = f"cannot read the index of train or the labels of {output} \\(.*{advice}"
    with pytest.raises(InputError, match=message) as raised:
        open_split(output, "train")
    assert "\n" not in str(raised.value)


def test_options_file_is_readable(prepared):
    claim = json.loads((prepared / "prepare.json").read_text())
    assert claim["short_side"] == 24


# ---- splits -------------------------------------------------------------------------------------


def clips_by_class(output):
    """{split: {label: ids}} as training reads them."""
    found = {}
    for name in ("train", "validation"):
        split = open_split(output, name)
        labels = np.array(split.label_names)[split.label]
        found[name] = {
            label: set(split.ids[labels == label].tolist()) for label in np.unique(labels).tolist()
        }
    return found


@pytest.fixture(scope="module")
def unsplit(tmp_path_factory):
    """10 videos in 2 class folders, prepared; the one that would be b's validation is no video."""
    folder = tmp_path_factory.mktemp("unsplit")
    for i in range(10):
        (folder / "videos" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        write_video(folder / "videos" / "ab"[i % 2] / f"{i}.mp4", frames=3, fps=25)
    ids = [f"b/{i}.mp4" for i in range(1, 10, 2)]
    first = min(ids, key=lambda name: hashlib.sha256(name.encode()).digest())
    (folder / "videos" / first).write_text("no video " * 50)
    summary = prepare(folder / "videos", folder / "out", **OPTIONS)
    return folder, first, summary


def test_no_class_loses_its_validation_to_a_broken_file(unsplit):
    folder, broken, summary = unsplit
    found = clips_by_class(folder / "out")
    assert {k: len(v) for k, v in found["validation"].items()} == {"a": 1, "b": 1}
    assert {k: len(v) for k, v in found["train"].items()} == {"a": 4, "b": 3}
    assert broken not in found["train"]["b"] | found["validation"]["b"]
    assert summary.clips == {"train": 7, "validation": 2}
    assert ["b", "3", "1"] in [line.split() for line in str(summary).splitlines()]
    assert not check_prepared(folder / "out", 1.0, 1)[1]


def test_a_resplit_decodes_nothing_and_reads_the_right_records(unsplit, tmp_path, monkeypatch):
    folder, _, _ = unsplit
    output = shutil.copytree(folder / "out", tmp_path / "out")
    before, shards_before = clips_by_class(output), digests(output)
    monkeypatch.setattr(shards, "encode_clip", None)
    summary = prepare(folder / "videos", output, validation_fraction=0.5, resplit=True, **OPTIONS)
    found = clips_by_class(output)
    assert summary.clips == {"train": 5, "validation": 4}
    assert digests(output) == shards_before
    for label in "ab":
        assert before["validation"][label] <= found["validation"][label]
        assert (
            found["train"][label] | found["validation"][label]
            == before["train"][label] | before["validation"][label]
        )
    for name in ("train", "validation"):
        split = open_split(output, name)
        for row in range(len(split)):
            with open(split.files[split.shard[row]], "rb") as file:
                file.seek(split.offset[row] + RECORD_HEADER_BYTES)
                record = records.parse(file.read(split.size[row]))
            assert record["id"].numpy().decode() == split.ids[row]
    with pytest.raises(InputError, match="were changed by --resplit"):
        prepare(folder / "videos", output, **OPTIONS)
    prepare(folder / "videos", output, resplit=True, **OPTIONS)
    assert clips_by_class(output) == before


def test_a_repair_keeps_the_labels_and_splits_of_a_resplit(unsplit, tmp_path, capsys):
    """Whatever `check` says to delete; and --resplit waits for the repair."""
    folder, _, _ = unsplit
    output = shutil.copytree(folder / "out", tmp_path / "out")
    (tmp_path / "clips.csv").write_text(
        "path,label,split\na/0.mp4,x,train\na/2.mp4,y,validation\nb/1.mp4,y,train\n"
    )
    again = {"annotations": tmp_path / "clips.csv", "resplit": True, **OPTIONS}
    prepare(folder / "videos", output, **again)
    expected, shards_before = clips_by_class(output), digests(output)
    shard = next(output.glob("*.tfrecord-*"))
    shard.unlink()
    with pytest.raises(InputError, match=rf"shards .* \(first: {shard.name}\); run .* without"):
        prepare(folder / "videos", output, **again)
    for _ in range(2):
        capsys.readouterr()
        summary = prepare(folder / "videos", output, **OPTIONS)
        assert "are kept (splits.json); run it with --resplit" in capsys.readouterr().out
        assert clips_by_class(output) == expected
        assert summary.clips == {"train": 2, "validation": 1}
        assert [line.split() for line in summary.table.splitlines()[1:]] == [
            ["x", "1", "0"], ["y", "1", "1"]
        ]  # fmt: skip
        (output / "dataset_info.json").unlink()
    assert digests(output) == shards_before


def test_a_resplit_takes_other_labels_and_fewer_clips(unsplit, tmp_path):
    folder, _, _ = unsplit
    output = shutil.copytree(folder / "out", tmp_path / "out")
    rows = [("path", "label", "split", "who"), ("a/0.mp4", "x", "train", "me")]
    rows += [("a/2.mp4", "y", "train", "you"), ("b/1.mp4", "x", "validation", "me")]
    with open(tmp_path / "clips.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    labels = tmp_path / "labels.txt"
    labels.write_text("y\nx\nz\n")
    prepare(
        folder / "videos", output, tmp_path / "clips.csv", labels=labels, resplit=True, **OPTIONS
    )
    assert clips_by_class(output) == {
        "train": {"x": {"a/0.mp4"}, "y": {"a/2.mp4"}}, "validation": {"x": {"b/1.mp4"}}
    }  # fmt: skip
    assert open_split(output, "train").label_names == ("y", "x", "z")
    assert not [p for p in check_prepared(output, 0.0, 1)[1] if p.is_error]


def test_a_resplit_of_clips_that_are_not_prepared(unsplit, tmp_path):
    folder, _, _ = unsplit
    videos = shutil.copytree(folder / "videos", tmp_path / "videos")
    write_video(videos / "a" / "new.mp4", frames=3, fps=25)
    with pytest.raises(InputError, match=r"1 of 11 clips .* \(first: a/new.mp4\)"):
        prepare(videos, folder / "out", resplit=True, **OPTIONS)
    with pytest.raises(InputError, match="is not prepared yet"):
        prepare(folder / "videos", tmp_path / "none", resplit=True, **OPTIONS)
    (tmp_path / "splits.json").write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        read_reassigned(tmp_path)


def test_several_labels_of_a_clip(unsplit, tmp_path):
    folder, broken, _ = unsplit
    names = [f"{label}/{i}.mp4" for i, label in enumerate("ababababab")]
    labels = dict(zip(names, ["x", "", "x; y", "y;x", "z", "x", "z;x", "y", "", "y"]))
    rows = [(path, label) for path, label in labels.items()]
    annotations = tmp_path / "clips.csv"
    with open(annotations, "w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *rows])
    output, videos = tmp_path / "out", folder / "videos"
    with pytest.raises(InputError, match=r"has no label"):
        prepare(videos, output, annotations, **OPTIONS)
    prepare(videos, output, annotations, multilabel=";", validation_fraction=0.3, **OPTIONS)
    found = {}
    for name in ("train", "validation"):
        split = open_split(output, name)
        assert split.label_names == ("x", "y", "z")
        for clip, row in zip(split.ids.tolist(), split.targets):
            found[clip] = {"xyz"[i] for i in np.flatnonzero(row)}
        assert {"xyz"[i] for i in np.flatnonzero(split.targets.any(axis=0))} == set("xyz")
    assert found == {
        path: {x.strip() for x in label.split(";")} - {""}
        for path, label in labels.items()
        if path != broken
    }
    (told,) = check_prepared(output, 1.0, 1)[1]
    assert told.text == "1 class (z) with one training clip"
    assert not told.is_error
    builder = tfds.builder_from_directory(output)
    stored = {
        example["id"].decode(): {"xyz"[i] for i in example["label"]}
        for split in builder.info.splits
        for example in builder.as_dataset(split=split).as_numpy_iterator()
    }
    assert stored == found

    annotations.write_text(
        annotations.read_text().replace("x; y", "w").replace("/0.mp4,x", "/0.mp4,w;z")
    )
    prepare(videos, output, annotations, multilabel=";", resplit=True, **OPTIONS)
    splits = [open_split(output, name) for name in ("train", "validation")]
    relabelled = {
        clip: {split.label_names[i] for i in np.flatnonzero(row)}
        for split in splits
        for clip, row in zip(split.ids.tolist(), split.targets)
    }
    assert relabelled == found | {"a/0.mp4": {"w", "z"}, "a/2.mp4": {"w"}}


def test_several_labels_where_no_drawn_clip_can_be_decoded(unsplit, tmp_path):
    """The index of validation has no record then, and `splits.json` has other splits."""
    folder, broken, _ = unsplit
    good = sorted({f"b/{i}.mp4" for i in range(1, 10, 2)} - {broken})[:2]
    rows = "".join(f"{path},x;y\n" for path in (broken, *good))
    (tmp_path / "clips.csv").write_text(f"path,label\n{rows}")
    output = tmp_path / "out"
    prepare(folder / "videos", output, tmp_path / "clips.csv", multilabel=";", **OPTIONS)
    splits = [open_split(output, name) for name in ("train", "validation")]
    assert sorted(clip for split in splits for clip in split.ids.tolist()) == good
    assert all(split.targets.tolist() == [[True, True]] for split in splits)
    summary, found = check_prepared(output, 1.0, 1)
    assert not [problem for problem in found if problem.is_error]
    assert [line.split()[2] for line in summary.splitlines()[2:4]] == ["2", "0"]
    records.write_index(os.fspath(output), "validation", [], [])  # as an earlier version wrote it
    assert open_split(output, "train").targets.tolist() == [[True, True]]


def test_a_label_that_may_be_several_is_asked_about(unsplit, tmp_path):
    folder, _, _ = unsplit
    (tmp_path / "clips.csv").write_text("path,label\na/0.mp4,x;y\na/2.mp4,z\n")
    arguments = folder / "videos", tmp_path / "out", tmp_path / "clips.csv"
    with pytest.raises(InputError, match=r"one label or several.*--multilabel=';'"):
        prepare(*arguments, **OPTIONS)
    summary = prepare(*arguments, multilabel="none", **OPTIONS)
    assert summary.classes == 2
    with pytest.raises(InputError, match="without --multilabel"):
        prepare(*arguments, multilabel=";", resplit=True, **OPTIONS)
