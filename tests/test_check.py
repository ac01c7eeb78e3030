"""`timesformer check` on data with known damage."""

import collections
import contextlib
import csv
import dataclasses
import hashlib
import json
import os
import re
import shutil
from logging import WARNING, Handler

import jax
import numpy as np
import pytest
import tensorflow as tf
from absl import logging
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from videos import write_audio, write_video

from timesformer_jax import recipes
from timesformer_jax.data import problems
from timesformer_jax.data.annotations import Clip
from timesformer_jax.data.check.check import check
from timesformer_jax.data.check.prepared import check_prepared
from timesformer_jax.data.check.prepared_summary import class_histogram
from timesformer_jax.data.check.report import is_decoded
from timesformer_jax.data.check.videos import check_clips
from timesformer_jax.data.prepare.prepare import prepare
from timesformer_jax.data.records import prepared as records
from timesformer_jax.data.records import wire
from timesformer_jax.data.records.open import open_split
from timesformer_jax.distributed.mesh import make_mesh
from timesformer_jax.errors import InputError
from timesformer_jax.training.fitting import fitted

pytestmark = pytest.mark.processes

SHARD = "tiny-train.tfrecord-00001-of-00003"
REWRITE_SHARD = (
    "; delete it and run `timesformer prepare` again .*: it writes only this shard again"
)
REWRITE_INDEX = "; delete dataset_info.json and run `timesformer prepare` again .*, and no shard"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """11 videos of 2 labels, 8 of them for training, and 2 clips that cannot be decoded."""
    folder = tmp_path_factory.mktemp("source")
    rows = [("path", "label", "split")]
    for i in range(11):
        path = write_video(folder / f"{i}.mp4", frames=10 + i, fps=25 if i else 30)
        rows.append((path.name, "ab"[i % 3 > 0], "train" if i < 8 else "validation"))
    (folder / "text.mp4").write_text("no video " * 50)
    rows += [("text.mp4", "a", "train"), ("missing.mp4", "b", "validation")]
    with open(folder / "clips.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    (folder / "labels.txt").write_text("a\nb\nunseen\n")
    return folder


@pytest.fixture(scope="module")
def source_of_all_kinds(source, tmp_path_factory):
    """The same, a clip of each other kind that cannot be used, and a video that is not listed."""
    folder = shutil.copytree(source, tmp_path_factory.mktemp("kinds") / "videos")
    whole = (folder / "7.mp4").read_bytes()
    (folder / "empty.mp4").touch()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    write_audio(folder / "audio.mp4")
    write_video(folder / "vp9.webm", frames=30, width=96, fps=15, codec="libvpx-vp9")
    # Overwrites the first bytes of the frames; all packets still exist.
    begin = whole.index(b"mdat") + 4
    (folder / "noise.mp4").write_bytes(whole[:begin] + bytes(200) + whole[begin + 200 :])
    shutil.copy(folder / "7.mp4", folder / "unlisted.mp4")
    with open(folder / "clips.csv", "a", newline="") as file:
        rows = [(f"{name}.mp4", "a", "train") for name in ("empty", "cut", "audio", "noise")]
        csv.writer(file).writerows([*rows, ("vp9.webm", "b", "validation")])
    return folder


def prepare_from(source, output):
    prepare(
        source, output, annotations=source / "clips.csv", labels=source / "labels.txt",
        short_side=24, store_stride=3, clips_per_shard=3, workers=1, name="tiny",
    )  # fmt: skip


@pytest.fixture(scope="module")
def prepared(source, tmp_path_factory):
    output = tmp_path_factory.mktemp("prepared") / "tiny"
    prepare_from(source, output)
    return output


@pytest.fixture
def damaged(prepared, tmp_path):
    """A copy that tests damage."""
    return shutil.copytree(prepared, tmp_path / "copy")


def problems_of(capsys, directory, **options):
    """The printed errors, whose number must be the one in the exception, and the warnings.

    Without the warning of the class `unseen`, which all of these directories have.
    """
    capsys.readouterr()
    count = 0
    try:
        check([directory], workers=1, **options)
    except InputError as error:
        count = int(re.fullmatch(rf"(\d+) errors? in {re.escape(str(directory))}", str(error))[1])
    found = re.findall(r"^(error|warning): (.*)$", capsys.readouterr().out, re.MULTILINE)
    errors = [text for kind, text in found if kind == "error"]
    assert len(errors) == count
    return [text for _, text in found if "(unseen)" not in text]


# ---- a prepared directory -----------------------------------------------------------------------


def test_a_good_directory(prepared, capsys):
    check([prepared], decode_fraction=1.0, workers=2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{prepared}: every record is read, and the frames of 11 are decoded"
    megabytes = {
        split: f"{sum(path.stat().st_size for path in prepared.glob(f'*-{split}.*')) / 1e6:.1f}"
        for split in ("train", "validation")
    }
    frames = [-(-(10 + i) // 3) for i in range(11)]
    assert [line.split() for line in lines[2:4]] == [
        ["train", "8", "8", "3", megabytes["train"], str(sum(frames[:8])), "24", "25-30", "1"],
        [
            "validation",
            "3",
            "3",
            "2",
            megabytes["validation"],
            str(sum(frames[8:])),
            "24",
            "25",
            "1",
        ],
    ]
    assert lines[4:] == [
        *("train: 2 of 3 classes have clips", "  no clip of: unseen", "       5 b", "       3 a"),
        *("validation: 2 of 3 classes have clips", "  no clip of: unseen"),
        *("       2 b", "       1 a"),
        "warning: 1 class (unseen) with no training clip: it cannot be learned",
    ]


def rewrite(directory, change):
    """Changes record 1 of a shard, and writes it with correct checksums."""
    path = directory / SHARD
    contents = [record.numpy() for record in tf.data.TFRecordDataset(os.fspath(path))]
    changed = change(contents[1])
    assert len(changed) == len(contents[1])
    with wire.ShardWriter(path) as writer:
        for content in (contents[0], changed, contents[2]):
            writer.write(content)


def without_the_last_jpeg(content):
    jpeg = records.parse(content)["video"][-1].numpy()
    return content.replace(jpeg, bytes(len(jpeg)))


def flip(path, position, bit=0):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def reindex(directory, **changes):
    """Changes values in the index of train."""
    path = directory / "train.index.npz"
    with np.load(path) as index:
        columns = dict(index)
    for column, (row, value) in changes.items():
        columns[column][row] = value
    np.savez(path, **columns)


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def cut(directory):
    os.truncate(directory / SHARD, (directory / SHARD).stat().st_size - 1)


def cut_between_records(directory):
    split = open_split(directory, "train")
    os.truncate(directory / SHARD, split.offset[split.shard == 1][2])


def append(directory):
    with open(directory / SHARD, "ab") as file:
        file.write(b"more")


def set_length(directory, change):
    def edit(info):
        train = next(split for split in info["splits"] if split["name"] == "train")
        change(train)

    edit_json(directory / "dataset_info.json", edit)


ID = r"\d\.mp4"
DAMAGE = {
    "a cut shard": (cut, rf"{SHARD} record 2 \({ID}\) is truncated, .* not read{REWRITE_SHARD}"),
    "a record less": (
        cut_between_records,
        rf"{SHARD} ends before record 2 \({ID}\): it has 2 of 3 records{REWRITE_SHARD}",
    ),
    "an empty shard": (
        lambda d: (d / SHARD).write_bytes(b""),
        rf"{SHARD} ends before record 0 \({ID}\): it has 0 of 3 records{REWRITE_SHARD}",
    ),
    "bytes at the end": (append, f"{SHARD} has 4 bytes after its 3 records{REWRITE_SHARD}"),
    "no shard": (lambda d: (d / SHARD).unlink(), f"{SHARD} is missing; run .* only this shard"),
    "a temporary file": (
        lambda d: (d / f"{SHARD}.7.part").touch(),
        f"{SHARD}.7.part is a temporary file of a killed run; delete it",
    ),
    "a shard of no index": (
        lambda d: (d / "tiny-train.tfrecord-00000-of-00009").touch(),
        "tiny-train.tfrecord-00000-of-00009 is in no index; delete it",
    ),
    "a record of another name": (
        lambda d: rewrite(d, lambda content: content.replace(b".mp4", b".avi")),
        rf"{SHARD} record 1 \({ID}\): id \d.avi where the index has {ID}{REWRITE_SHARD}",
    ),
    "no record": (
        lambda d: rewrite(d, lambda content: b"\xff" * len(content)),
        rf"{SHARD} record 1 \({ID}\): it has not the format that `timesformer prepare` writes"
        rf"{REWRITE_SHARD}",
    ),
    "a frame that is no JPEG": (
        lambda d: rewrite(d, without_the_last_jpeg),
        rf"{SHARD} record 1 \({ID}\): frame \d cannot be decoded{REWRITE_SHARD}",
    ),
    "frames of another size": (
        lambda d: reindex(d, height=(0, 30)),
        rf".* record 0 \({ID}\): frame 0 has shape \(24, 32, 3\) where the index has"
        rf" \(30, 32, 3\){REWRITE_SHARD}",
    ),
    "another label in the index": (
        lambda d: reindex(d, label=(0, 2)),
        rf".* record 0 \({ID}\): label [01] where the index has 2{REWRITE_SHARD}",
    ),
    "other numbers in the index": (
        lambda d: reindex(d, num_frames=(0, 90), fps=(0, 12.5), stride=(0, 2), offset=(0, 5)),
        rf".* record 0 \({ID}\): offset 0 where the index has 5, num_frames \d+ where the index has"
        rf" 90, fps \d+.0 where the index has 12.5, stride 3 where the index has 2, stored frames"
        rf" \d+ where the index has 45{REWRITE_SHARD}",
    ),
    "an unknown class": (
        lambda d: reindex(d, label=(0, 3)),
        rf"the index of train has {ID} with label 3 of 3{REWRITE_INDEX}",
        rf".* record 0 .* label [01] where the index has 3{REWRITE_SHARD}",
    ),
    "a cut index": (
        lambda d: os.truncate(d / "train.index.npz", 400),
        rf"cannot read the index of train or the labels of .* \(.*\){REWRITE_INDEX}",
    ),
    "no index": (
        lambda d: (d / "train.index.npz").unlink(),
        f"the split train has no index, only its dataset_info.json{REWRITE_INDEX}",
    ),
    "no label map": (
        lambda d: (d / "labels.txt").unlink(),
        rf"cannot read the index of train or the labels of .* \(.*labels.txt.*\){REWRITE_INDEX}",
        rf"cannot read the index of validation or the labels of .* \(.*\){REWRITE_INDEX}",
    ),
    "another label map": (
        lambda d: (d / "labels.txt").write_text("a\nc\nunseen\n"),
        f"TFDS has other label names than labels.txt{REWRITE_INDEX}",
    ),
    "a cut description": (
        lambda d: os.truncate(d / "dataset_info.json", 100),
        rf"TFDS cannot open .* \(.*\){REWRITE_INDEX}",
    ),
    "another count": (
        lambda d: set_length(d, lambda train: train.update(shardLengths=["2", "2", "3"])),
        f"dataset_info.json has 2 records in {SHARD} where the index has 3{REWRITE_INDEX}",
    ),
    "fewer shards": (
        lambda d: set_length(d, lambda train: train.update(shardLengths=["3", "3"])),
        f"dataset_info.json has 2 shards of train where the index has 3{REWRITE_INDEX}",
    ),
    "other bytes": (
        lambda d: set_length(d, lambda train: train.update(numBytes="5")),
        rf"dataset_info.json has 5 bytes of train where the shards have \d+{REWRITE_INDEX}",
    ),
    "no manifest": (
        lambda d: (d / "manifests" / f"{SHARD}.json").unlink(),
        rf"{SHARD} has no readable manifest \(.*\){REWRITE_SHARD}",
    ),
    "a manifest of another size": (
        lambda d: edit_json(d / "manifests" / f"{SHARD}.json", lambda m: m.update(bytes=5)),
        rf"{SHARD} has \d+ bytes where its manifest has 5{REWRITE_SHARD}",
    ),
    "a manifest of fewer records": (
        lambda d: edit_json(d / "manifests" / f"{SHARD}.json", lambda m: m["records"].pop()),
        rf"{SHARD} has other records than its manifest \(3 records, and 2 in the manifest\)"
        rf"{REWRITE_SHARD}",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_with_what_to_do(damaged, capsys, name):
    damage, *expected = DAMAGE[name]
    damage(damaged)
    problems = problems_of(capsys, damaged, decode_fraction=1.0)
    assert len(problems) == len(expected), problems
    for problem, pattern in zip(problems, expected):
        assert re.fullmatch(pattern, problem)


def test_a_fraction_of_the_frames_is_decoded(damaged):
    rewrite(damaged, without_the_last_jpeg)
    check([damaged], decode_fraction=0.0)
    with pytest.raises(InputError, match="1 error in"):
        check([damaged], decode_fraction=1.0)


@given(fraction=st.floats(0, 1), more=st.floats(0, 1))
def test_a_larger_fraction_contains_a_smaller_one(fraction, more):
    fraction, more = sorted((fraction, more))
    ids = [f"{i}.mp4" for i in range(400)]
    chosen = {clip for clip in ids if is_decoded(clip, fraction)}
    assert chosen <= {clip for clip in ids if is_decoded(clip, more)}
    assert abs(len(chosen) - 400 * fraction) <= 5 * 10  # 5 standard deviations, at most 10 each
    assert not any(is_decoded(clip, 0.0) for clip in ids)
    assert all(is_decoded(clip, 1.0) for clip in ids)


@pytest.fixture(scope="module")
def flippable(prepared, tmp_path_factory):
    return shutil.copytree(prepared, tmp_path_factory.mktemp("flippable") / "copy")


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_is_found_in_its_record(flippable, data):
    split = open_split(flippable, "train")
    ids, ends = (of[split.shard == 1] for of in (split.ids, split.offset + split.size + 16))
    position = data.draw(st.integers(0, int(ends[-1]) - 1))
    record = int(np.searchsorted(ends, position, side="right"))
    bit = data.draw(st.integers(0, 7))
    flip(flippable / SHARD, position, bit)
    try:
        _, problems = check_prepared(flippable, 0.0, workers=1)
    finally:
        flip(flippable / SHARD, position, bit)
    assert [p.is_error for p in problems] == [True, False]  # the class unseen
    where = f"{SHARD} record {record} ({ids[record]}) "
    assert problems[0].text.startswith((f"{where}has a wrong checksum", f"{where}is truncated"))


def digests(directory):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.iterdir())
        if path.is_file()
    }


def test_following_the_messages_repairs_the_data(source, prepared, damaged, capsys):
    """Deletes what the problems name and prepares again: all files are as before."""
    shards = sorted(damaged.glob("tiny-*"))
    flip(shards[0], 100)
    cut(damaged)
    shards[2].unlink()
    (damaged / "tiny-train.tfrecord-00000-of-00009").touch()
    sound = {path: path.stat().st_mtime_ns for path in shards[3:]}
    assert follow(problems_of(capsys, damaged), damaged) == 4
    prepare_from(source, damaged)
    check([damaged])
    assert digests(damaged) == digests(prepared)
    assert sound == {path: path.stat().st_mtime_ns for path in sound}

    sound = {path: path.stat().st_mtime_ns for path in damaged.glob("tiny-*")}
    (damaged / "train.index.npz").unlink()
    (damaged / "labels.txt").write_text("a\nc\nunseen\n")
    assert follow(problems_of(capsys, damaged), damaged) == 2
    prepare_from(source, damaged)
    check([damaged])
    assert digests(damaged) == digests(prepared)
    assert sound == {path: path.stat().st_mtime_ns for path in sound}


def follow(problems, directory):
    for problem in problems:
        what, advice = problem.split("; ")
        if advice.startswith("delete it"):
            (directory / what.split()[0]).unlink()
        elif named := re.match(r"delete ([\w.]+) and run", advice):
            (directory / named[1]).unlink(missing_ok=True)
        else:
            assert advice.startswith("run `timesformer prepare` again")
    return len(problems)


def test_an_incomplete_directory_gives_a_one_line_error(damaged, tmp_path):
    (damaged / "dataset_info.json").unlink()
    with pytest.raises(InputError, match=r"is incomplete: 5 shards are done, .* run `timesformer"):
        check([damaged])
    (tmp_path / "dataset_info.json").touch()
    with pytest.raises(InputError, match="was not written by `timesformer prepare`"):
        check([tmp_path])


def test_without_the_files_that_only_prepare_reads(damaged, capsys):
    """A copy with only what training reads is valid; the unknown count of failures is '?'."""
    shutil.rmtree(damaged / "manifests")
    (damaged / "failures.csv").unlink()
    check([damaged])
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()[2:4]] == ["?", "?"]


def test_segments_of_a_video_are_one_clip(damaged, capsys):
    reindex(damaged, video=(1, 0))
    check([damaged])
    assert capsys.readouterr().out.splitlines()[2].split()[:3] == ["train", "7", "8"]


def test_the_largest_and_smallest_of_many_classes_are_shown(prepared, tmp_path, capsys):
    """60 classes, of which class i has 1 + i // 2 clips, and one class without clips."""
    counts = collections.Counter({f"class {i}": 1 + i // 2 for i in range(60)})
    labels = [*counts.elements()]
    split = open_split(prepared, "train")
    many = dataclasses.replace(
        split,
        label_names=(*counts, "unseen"),
        label=np.array([[*counts].index(label) for label in labels]),
    )
    lines = class_histogram(many).splitlines()
    assert lines[:2] == ["train: 60 of 61 classes have clips", "  no clip of: unseen"]
    assert [line.split(maxsplit=1) for line in lines[2:7]] == [
        ["30", "class 58"], ["30", "class 59"], ["29", "class 56"], ["29", "class 57"],
        ["28", "class 54"],
    ]  # fmt: skip
    assert lines[7].strip() == "..."
    assert [line.split(maxsplit=1) for line in lines[8:]] == [
        ["3", "class 5"], ["2", "class 2"], ["2", "class 3"], ["1", "class 0"], ["1", "class 1"],
    ]  # fmt: skip


def test_on_a_bucket_from_the_command_line(prepared, gcs, timesformer, monkeypatch):
    for name, value in gcs.environment.items():
        monkeypatch.setenv(name, value)
    shutil.copytree(prepared, gcs.root / "bucket" / "bad")
    flip(gcs.root / "bucket" / "bad" / SHARD, 100)
    done = timesformer("check", "gs://bucket/bad", check=False, fresh=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: 1 error in gs://bucket/bad"
    assert "Traceback" not in done.stderr
    assert done.stdout.startswith("gs://bucket/bad: every record is read, and the frames of ")
    assert re.search(rf"\nerror: {SHARD} record 0 \({ID}\) has a wrong checksum", done.stdout)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "give prepared directories to check, or the folder of --videos"),
        ({"directories": ["a"], "videos": "b"}, "give prepared directories to check, or"),
        ({"directories": ["a"], "output": "b.csv"}, "go with --videos only"),
        (
            {"directories": ["a"], "decode_fraction": 1.5},
            "decode_fraction must be a number from 0 to 1, not 1.5",
        ),
        ({"directories": ["a"], "workers": -1}, "workers must be a whole number from 0"),
        ({"videos": "/nowhere"}, "there is no folder /nowhere"),
        ({"directories": ["/nowhere"]}, "there is no folder /nowhere"),
    ],
)
def test_arguments_that_check_refuses(arguments, said):
    with pytest.raises(InputError, match=said):
        check(**arguments)


# ---- raw videos ---------------------------------------------------------------------------------


def test_check_and_prepare_find_the_same_failures(source_of_all_kinds, tmp_path, capsys):
    source = source_of_all_kinds
    prepare_from(source, tmp_path / "prepared")
    capsys.readouterr()
    listed = {"annotations": source / "clips.csv", "labels": source / "labels.txt"}
    check(videos=source, **listed, decode_fraction=1.0, workers=2, output=tmp_path / "bad.csv")
    assert (tmp_path / "bad.csv").read_text() == (tmp_path / "prepared/failures.csv").read_text()

    lines = capsys.readouterr().out.splitlines()
    assert "train: 13 of 13 listed are here (100.0%)" in lines
    assert "1 listed clips have no file: missing.mp4" in lines
    assert "1 video files are in no list: unlisted.mp4" in lines
    assert "the packets of 17 clips are read, and 17 of them are decoded" in lines
    hours = {"train": 10 / 30 / 3600 + sum(range(11, 18)) / 25 / 3600}
    hours["validation"] = (18 + 19 + 20) / 25 / 3600 + 30 / 15 / 3600
    words = [line.split() for line in lines]
    assert ["train", "13", f"{hours['train']:.2f}", "5"] in words
    assert ["validation", "4", f"{hours['validation']:.2f}", "0"] in words
    for row in (
        ["codec", "h264", "11"], ["codec", "vp9", "1"], ["container", "matroska,webm", "1"],
        ["size", "64x48", "11"], ["size", "96x48", "1"],
        ["fps", "25", "10"], ["fps", "30", "1"], ["fps", "15", "1"],
    ):  # fmt: skip
        assert row in words
    assert lines[-7] == "warning: 1 class (unseen) with no training clip: it cannot be learned"
    problems = [line.removeprefix("warning: ").split(": ")[0] for line in lines[-6:]]
    assert problems == [
        *("audio.mp4", "cut.mp4", "empty.mp4", "noise.mp4", "text.mp4", "missing.mp4")
    ]


VIDEOS = [f"{i}.mp4" for i in range(11)]
# Rows of path, label and split, and the problems of the data set that they give.
JUDGED = {
    "good": ([(path, "ab"[i % 2], "") for i, path in enumerate(VIDEOS)], []),
    "one clip of a class": (
        [(path, "ab"[i > 9], "") for i, path in enumerate(VIDEOS)],
        [
            "warning: 1 class (b) with one training clip",
            "warning: 1 class (b) without a clip in validation",
        ],
    ),
    "one clip of each": (
        [(path, path, "train") for path in VIDEOS[:3]] + [(VIDEOS[3], VIDEOS[0], "validation")],
        [
            "warning: 3 classes (0.mp4, 1.mp4, 2.mp4) with one training clip",
            "warning: 2 classes (1.mp4, 2.mp4) without a clip in validation",
        ],
    ),
    "no clip but one of each": (
        [(path, path, "") for path in VIDEOS[:3]],
        [
            f"error: {problems.NO_VALIDATION}",
            "warning: 3 classes (0.mp4, 1.mp4, 2.mp4) with one training clip",
        ],
    ),
    "fewer clips than classes": (
        [(VIDEOS[0], "a", "train"), (VIDEOS[1], "a", "validation")],
        [
            "warning: 1 training clips are fewer than the 3 classes",
            "warning: 2 classes (b, unseen) with no training clip: it cannot be learned",
            "warning: 1 class (a) with one training clip",
        ],
    ),
    "no clip for training": (
        [(VIDEOS[0], "a", "validation")],
        [f"error: {problems.NO_TRAINING}"],
    ),
}


def test_prepare_check_and_training_say_the_same(prepared, source, tmp_path, monkeypatch, capsys):
    """Of videos and of what is prepared, with one judgement; by splits that are drawn again."""
    monkeypatch.setattr("timesformer_jax.data.check.videos.run_tasks", in_this_process)
    for number, (name, (clips, expected)) in enumerate(JUDGED.items()):
        directory = shutil.copytree(prepared, tmp_path / str(number))
        table = tmp_path / f"{number}.csv"
        table.write_text("\n".join(["path,label,split", *map(",".join, clips)]))
        labels = source / "labels.txt" if "fewer" in name or "no clip for" in name else None
        listed = {"annotations": table, "labels": labels}
        capsys.readouterr()
        prepare(source, directory, **listed, name="tiny", **PREPARED, resplit=True)
        said = {"prepare": said_problems(capsys)}
        for key, options in {
            "check DIR": {"directories": [directory]},
            "check --videos": {"videos": source, **listed},
        }.items():
            try:
                check(**options, decode_fraction=0.0, workers=1)
                failed = False
            except InputError:
                failed = True
            said[key] = said_problems(capsys)
            assert failed == any(line.startswith("error") for line in expected), name
        said["train"] = training_problems(directory)
        assert said == dict.fromkeys(said, expected), name


PREPARED = {"short_side": 24, "store_stride": 3, "clips_per_shard": 3, "workers": 1}


def in_this_process(function, tasks, *_):
    return {name: function(*arguments, {}) for name, arguments in tasks.items()}


def said_problems(capsys):
    """The lines of problems, without those of single videos."""
    lines = capsys.readouterr().out.splitlines()
    return [s for s in lines if s.startswith(("error: ", "warning: ")) and ".mp4: " not in s]


def training_problems(directory):
    """What training says when it opens the data: the error that ends it, and the warnings."""
    config = recipes.from_scratch_small()
    config.data.directory = os.fspath(directory)
    said = []
    try:
        train, held_out = (open_split(directory, name) for name in ("train", "validation"))
    except InputError as error:
        said = [f"error: {str(error).removeprefix(f'{directory}: ')}"]
        if problems.NO_VALIDATION not in said[0]:
            return said
        # The way out that the error names.
        train = held_out = open_split(directory, "train")
    with warnings_of_absl() as warned:
        fitted(config, epath.Path(directory / "run"), one_device(), train, held_out)
    other = ("batch_size", "measured with the training clips")
    return said + [f"warning: {text}" for text in warned if not any(o in text for o in other)]


@contextlib.contextmanager
def warnings_of_absl():
    found = []
    logging.get_absl_logger().addHandler(handler := Collecting(found))
    try:
        yield found
    finally:
        logging.get_absl_logger().removeHandler(handler)


class Collecting(Handler):
    def __init__(self, found):
        super().__init__(WARNING)
        self._found = found

    def emit(self, record):
        self._found.append(record.getMessage())


def one_device():
    return make_mesh(devices=jax.devices()[:1])


def test_a_folder_of_videos_is_checked_without_the_flag(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("timesformer_jax.data.check.videos.run_tasks", in_this_process)
    monkeypatch.setattr("timesformer_jax.data.check.check.import_prepared", None)  # no TensorFlow
    for name in "ab":
        (tmp_path / "videos" / name).mkdir(parents=True)
        shutil.copy(source / "1.mp4", tmp_path / "videos" / name)
    with pytest.raises(InputError, match=f"1 error in {tmp_path / 'videos'}"):
        check([tmp_path / "videos"])
    assert "the packets of 2 clips are read" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"not written by .*; to check videos give --videos=DIR"):
        check([tmp_path / "empty"])


def test_an_output_that_cannot_be_written_fails_first(source, tmp_path, monkeypatch):
    monkeypatch.setattr("timesformer_jax.data.check.videos.check_clips", None)
    arguments = {"annotations": source / "clips.csv", "labels": source / "labels.txt"}
    with pytest.raises(InputError, match=r"cannot write .*bad.csv"):
        check(videos=source, **arguments, output=tmp_path / "nowhere" / "bad.csv")


def test_good_videos_from_the_command_line(source, timesformer, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for number in range(2):
            shutil.copy(source / f"{number}.mp4", tmp_path / name)
    done = timesformer("check", f"--videos={tmp_path}", f"--output={tmp_path / 'bad.csv'}")
    assert done.stdout.splitlines()[-1] == "warning: 2 classes (a, b) with one training clip"
    with open(tmp_path / "bad.csv", newline="") as file:
        assert list(csv.DictReader(file)) == []


def test_a_video_that_crashes_the_decoder(source_of_all_kinds, tmp_path, monkeypatch):
    # A clip that crashes the process that opens its file.
    (tmp_path / "crashing.py").write_text(
        "import multiprocessing, os, signal\n"
        "from timesformer_jax.data.annotations import Clip\n"
        "class Crashing(Clip):\n"
        "    def __getattribute__(self, name):\n"
        "        if name == 'path' and multiprocessing.parent_process():\n"
        "            os.kill(os.getpid(), signal.SIGSEGV)\n"
        "        return super().__getattribute__(name)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import crashing

    # Nothing is decoded, so the noise in one file is not found.
    names = ["0.mp4", "noise.mp4", "text.mp4"]
    clips = [Clip(name, "a", None, None, "train") for name in names]
    clips[1:1] = [crashing.Crashing("0.mp4", "a", None, None, "train", name="bad")]
    found = check_clips(str(source_of_all_kinds), clips, decode_fraction=0.0, processes=1)
    reasons = {clip: of_clip.reason for clip, of_clip in found.items()}
    assert reasons.pop("bad") == "the decoder crashes: SIGSEGV"
    assert [name for name in names if reasons[name]] == ["text.mp4"]
