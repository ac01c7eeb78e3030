import hashlib
import os
from collections import Counter, defaultdict
from dataclasses import replace

import hypothesis
import pytest
from absl import logging
from hypothesis import strategies as st

from timesformer_jax.data.annotations import Clip, assign_splits, label_names, read, read_labels
from timesformer_jax.data.problems import of_clips
from timesformer_jax.errors import InputError
from timesformer_jax.inference.sources import find, of_annotations


def touch(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def table(root, text):
    touch(root, "a.mp4", "b.mp4", "c.mp4", "d.mp4")
    path = root / "clips.csv"
    path.write_text(text)
    return path


def refused(match, *args, **kwargs):
    with pytest.raises(InputError, match=match) as error:
        read(*args, **kwargs)
    assert len(str(error.value).splitlines()) == 1


# ---- folders ------------------------------------------------------------------------------------


def test_a_folder_a_class(tmp_path):
    touch(tmp_path, "cat/a.mp4", "cat/deep/b.WEBM", "dog/c.avi", "dog/d.mov", "dog/notes.txt")
    touch(tmp_path, "empty/readme.md", ".hidden/e.mp4", "dog/._d.mp4")
    clips = read(tmp_path).clips
    assert [(clip.id, clip.label) for clip in clips] == [
        ("cat/a.mp4", "cat"),
        ("cat/deep/b.WEBM", "cat"),
        ("dog/c.avi", "dog"),
        ("dog/d.mov", "dog"),
    ]
    assert Counter((clip.label, clip.split) for clip in clips) == {
        ("cat", "train"): 1,
        ("cat", "validation"): 1,
        ("dog", "train"): 1,
        ("dog", "validation"): 1,
    }
    assert label_names(clips) == ("cat", "dog")


@pytest.mark.parametrize("validation", ["val", "valid", "validation", "Val"])
def test_split_folders(tmp_path, validation):
    touch(tmp_path, "train/cat/a.mp4", f"{validation}/cat/b.mp4", "test/cat/deep/c.mp4")
    assert [(clip.path, clip.label, clip.split) for clip in read(tmp_path).clips] == sorted(
        [
            ("train/cat/a.mp4", "cat", "train"),
            (f"{validation}/cat/b.mp4", "cat", "validation"),
            ("test/cat/deep/c.mp4", "cat", "test"),
        ]
    )


def test_classes_may_be_named_like_splits(tmp_path):
    touch(tmp_path, "train/a.mp4", "train/b.mp4", "bus/c.mp4", "bus/d.mp4")
    assert read(tmp_path).labels == ("bus", "train")


def test_a_linked_class_folder_is_entered(tmp_path):
    touch(tmp_path, "elsewhere/a.mp4", "videos/dog/b.mp4")
    (tmp_path / "videos/cat").symlink_to(tmp_path / "elsewhere")
    refused("cat leads out of .*videos, to .*elsewhere; add --follow", tmp_path / "videos")
    listing = read(tmp_path / "videos", follow=True)
    assert [clip.path for clip in listing.clips] == ["cat/a.mp4", "dog/b.mp4"]
    (tmp_path / "videos/cat").unlink()
    (tmp_path / "videos/bird").symlink_to(tmp_path / "videos/dog")  # inside: nobody is misled
    listing = read(tmp_path / "videos")
    assert [clip.path for clip in listing.clips] == ["bird/b.mp4", "dog/b.mp4"]


@pytest.mark.parametrize(
    "path",
    ["../../etc/passwd", "/etc/passwd", "a/../../x.mp4", "..", "link.mp4",
     "folder/x.mp4", "frames", ".hidden/x.mp4", "inside/link.mp4"],
)  # fmt: skip
def test_annotations_do_not_lead_out_of_the_videos_folder(tmp_path, path):
    touch(tmp_path, "elsewhere/x.mp4", "elsewhere/0.png", "videos/a.mp4", "videos/frames/1.png")
    (tmp_path / "videos/inside").symlink_to("sub")
    (tmp_path / "videos/sub").mkdir()
    for link, target in {
        "link.mp4": "x.mp4", "folder": ".", "frames/0.png": "0.png", ".hidden": ".",
        "sub/link.mp4": "x.mp4",
    }.items():  # fmt: skip
        (tmp_path / "videos" / link).symlink_to(tmp_path / "elsewhere" / target)
    rows = table(tmp_path, f"path,label\na.mp4,x\n{path},x\n")
    refused(r"clips.csv line 3: .* leads out of .*videos, to .*; add --follow", tmp_path / "videos",
            rows)  # fmt: skip
    assert len(read(tmp_path / "videos", rows, follow=True).clips) == 2
    # A link that no clip uses is nobody's business.
    assert len(read(tmp_path / "videos", table(tmp_path, "path,label\na.mp4,x\n")).clips) == 1


def test_links_in_circles_and_in_great_numbers_end(tmp_path):
    touch(tmp_path, "v/cat/a.mp4", "v/cat/b.mp4")
    for name in ("one", "two"):
        (tmp_path / "v/cat" / name).symlink_to(tmp_path / "v")
    assert [clip.path for clip in read(tmp_path / "v").clips] == ["cat/a.mp4", "cat/b.mp4"]
    (tmp_path / "v/cat/itself.mp4").symlink_to("itself.mp4")
    assert "cat/itself.mp4" in [clip.path for clip in read(tmp_path / "v").clips]
    for level in range(40):  # 2^40 paths
        (tmp_path / f"v/level{level}").mkdir()
        for name in ("one", "two"):
            (tmp_path / f"v/level{level}" / name).symlink_to(tmp_path / f"v/level{level + 1}")
    refused("lead to .* again and again", tmp_path / "v")


def test_folders_that_cannot_be_read(tmp_path):
    refused("there is no folder", tmp_path / "nowhere")
    refused("holds no video file", tmp_path)
    refused("in no class folder", touch(tmp_path / "loose", "a.mp4"))
    refused("mixes split folders", touch(tmp_path / "mixed", "train/cat/a.mp4", "cat/b.mp4"))
    refused(
        "unknown label 'dgo'", touch(tmp_path / "odd", "train/dog/a.mp4", "validation/dgo/b.mp4")
    )


def test_folders_that_may_not_be_read_are_named(tmp_path, monkeypatch):
    """The tests may run as root, who may read any."""
    touch(tmp_path, "cat/a.mp4", "dog/b.mp4", "dog/lost+found/c.mp4", "fox/red/d.mp4")
    scandir, closed = os.scandir, {"dog/lost+found", "fox/red", "cow"}
    (tmp_path / "cow").mkdir()

    def refuse(path):
        if os.path.relpath(path, tmp_path) in closed:
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    listing = read(tmp_path)
    assert [clip.path for clip in listing.clips] == ["cat/a.mp4", "dog/b.mp4"]
    assert listing.notes == (
        f"folders of {tmp_path} that cannot be read, and whose videos are left out: cow, fox/red;"
        " make them readable",
    )
    assert listing.report().endswith(listing.notes[0])
    told = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: told.append(text % values))
    assert len(find([str(tmp_path)])) == 2
    (tmp_path / "clips.csv").write_text("path,label\ncat/a.mp4,x\n")
    assert len(of_annotations(str(tmp_path), str(tmp_path / "clips.csv"))) == 1
    assert told == [*listing.notes] * 2
    closed.add(".")
    with pytest.raises(InputError, match=r"cannot read .*: Permission denied"):
        find([str(tmp_path)])


def test_a_name_that_is_not_utf8_is_one_line(tmp_path):
    touch(tmp_path, "cat/a.mp4")
    odd = os.fsencode(tmp_path) + b"/cat/\xff.mp4"
    open(odd, "w").close()
    refused(r"the video cat/\\udcff.mp4 is not UTF-8; rename it", tmp_path)
    (tmp_path / "clips.csv").write_text("path,label\ncat/a.mp4,x\n")
    listing = read(tmp_path, tmp_path / "clips.csv")
    assert listing.unlisted == ("cat/\\udcff.mp4",)
    assert b"udcff" in listing.report().encode()


# ---- csv ----------------------------------------------------------------------------------------


def test_csv_in_any_column_order_with_a_byte_order_mark_and_quotes(tmp_path):
    text = (
        "\ufeffsplit, label ,path,end,start,note\r\n"
        'train,"jump, high",./a.mp4,2.5,0,x\r\nval,"jump, high",b.mp4,,1.25,\r\n'
        'TEST,"jump, high",a.mp4,,,\r\n'
    )
    assert read(tmp_path, table(tmp_path, text)).clips == (
        Clip("a.mp4", "jump, high", None, None, "test"),
        Clip("a.mp4", "jump, high", 0.0, 2.5, "train"),
        Clip("b.mp4", "jump, high", 1.25, None, "validation"),
    )


def test_ids_name_the_piece():
    assert Clip("a.mp4", "x", None, None, "").id == "a.mp4"
    assert Clip("a.mp4", "x", 2.0, 4.5, "").id == "a.mp4#2-4.5"
    assert Clip("a.mp4", "x", 12345.678, None, "").id == "a.mp4#12345.678-"
    assert Clip("a.mp4", "x", None, 3.0, "").id == "a.mp4#-3"
    assert Clip("a.mp4", "x", None, None, "", (0, 90)).id == "a.mp4#f0-90"
    assert Clip("a.mp4", "x", 2.0, 4.5, "", name="ID_000002_000004").id == "ID_000002_000004"


def test_listed_but_missing_files_are_listed(tmp_path):
    rows = "path,label,split\na.mp4,x,train\ngone.mp4,x,train\n"
    listing = read(tmp_path, table(tmp_path, rows))
    assert [clip.path for clip in listing.clips] == ["a.mp4", "gone.mp4"]
    assert listing.missing == ("gone.mp4",)
    assert listing.unlisted == ("b.mp4", "c.mp4", "d.mp4")


def test_files_that_the_walk_ignores_may_be_listed(tmp_path):
    touch(tmp_path, "elsewhere/a.mp4", "videos/.hidden/b.mp4", "videos/c.vob")
    paths = ("../elsewhere/a.mp4", str(tmp_path / "elsewhere/a.mp4"), ".hidden/b.mp4", "c.vob")
    rows = "".join(f"{path},x,train\n" for path in paths)
    rows = table(tmp_path, f"path,label,split\n{rows}../no.mp4,x,\n")
    listing = read(tmp_path / "videos", rows, follow=True)
    assert listing.missing == ("../no.mp4",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column 'path' in its header .found: none"),
        ("path,start\na.mp4,1\n", "no column 'label' in its header .found: path, start"),
        ("file,label\na.mp4,x\n", "no column 'path' in its header .found: file, label"),
        ("path,label\n", "lists no clip"),
        ("path,label\na.mp4,\n", "line 2 has no label"),
        ("path,label\na.mp4,x\n,x\n", "line 3 has no path"),
        ("path,label\na.mp4,x,y\n", "line 2 has more fields"),
        ("path,label,start\na.mp4,x,one\n", "line 2: start 'one' is not a number"),
        ("path,label,start\na.mp4,x,nan\n", "line 2: start 'nan' is not a number"),
        ("path,label,end\na.mp4,x,-1\n", "line 2: end '-1' is not a number"),
        ("path,label,start,end\na.mp4,x,2,2\n", "line 2: the end, 2 s, is not after the start, 2"),
        ("path,label,end\na.mp4,x,0\n", "line 2: the end, 0 s, is not after"),
        ("path,label,split\na.mp4,x,trian\n", "line 2: split 'trian' is not one of train"),
        ("path,label\na.mp4,x\n./a.mp4,y\n", "line 3: a.mp4 is listed twice .first: .*line 2"),
        ('path,label\na.mp4,"x\n', "after line 1: "),
        ('path,label\na.mp4,"x\ny"\n', "is not one line"),
        ("path,label,split\na.mp4,x,train\nb.mp4,y,val\n", "unknown label 'y': b.mp4 is for val"),
        ("path,label\ngone.mp4,x\ngone2.mp4,x\n", "none of the 2 clips .* gone.mp4"),
    ],
)
def test_rows_that_cannot_be_read(tmp_path, text, message):
    refused(message, tmp_path, table(tmp_path, text))


def test_several_labels_of_which_no_clip_has_one(tmp_path):
    refused(
        "no clip of .*clips.csv has a label",
        tmp_path,
        table(tmp_path, "path,label\na.mp4,;\n"),
        multilabel=";",
    )


def test_features_take_several_labels_as_text(tmp_path):
    rows = table(tmp_path, "path,label\na.mp4,x;y\n")
    assert [source.label for source in of_annotations(str(tmp_path), str(rows))] == ["x;y"]


def test_files_that_cannot_be_read(tmp_path):
    refused("cannot read .*nowhere.csv", tmp_path, tmp_path / "nowhere.csv")
    (tmp_path / "latin.csv").write_bytes("path,label\na.mp4,café\n".encode("latin-1"))
    refused("not text in UTF-8", tmp_path, tmp_path / "latin.csv")
    refused("is not one csv of clips", tmp_path, tmp_path)
    refused("validation_fraction", tmp_path, None, validation_fraction=1.0)


# ---- labels -------------------------------------------------------------------------------------


def test_a_label_file_fixes_the_labels(tmp_path):
    (tmp_path / "labels.txt").write_text("y\nx\n\n")
    labels = read_labels(tmp_path / "labels.txt")
    assert labels == ("y", "x")
    rows = table(tmp_path, "path,label,split\na.mp4,x,train\nb.mp4,y,val\n")
    # y is in no training clip, which is allowed because the labels are given.
    assert len(read(tmp_path, rows, labels).clips) == 2
    rows = table(tmp_path, "path,label\na.mp4,x\nb.mp4,z\n")
    refused("clips.csv line 3: label 'z' is not in the label file", tmp_path, rows, labels)


@pytest.mark.parametrize(("text", "message"), [("\n", "no label"), ("x\ny\nx\n", "'x' twice")])
def test_label_files_that_cannot_be_read(tmp_path, text, message):
    (tmp_path / "labels.txt").write_text(text)
    with pytest.raises(InputError, match=message):
        read_labels(tmp_path / "labels.txt")


# ---- splits -------------------------------------------------------------------------------------


@hypothesis.given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    fraction=st.floats(0, 0.99),
    data=st.data(),
)
def test_the_split_rule(counts, fraction, data):
    clips = [
        Clip(f"{label}/{i}.mp4", str(label), None, None, "")
        for label, count in enumerate(counts)
        for i in range(count)
    ]
    assigned = assign_splits(clips, fraction)
    assert [clip.id for clip in assigned] == [clip.id for clip in clips]
    splits = defaultdict(Counter)
    for clip in assigned:
        splits[clip.label][clip.split] += 1
    for label, count in enumerate(counts):
        share = splits[str(label)]["validation"]
        assert share + splits[str(label)]["train"] == count
        if fraction == 0 or count == 1:
            assert share == 0
        else:
            assert 1 <= share <= count - 1
            assert abs(share - fraction * count) <= 1
    # The result does not depend on the order of the list.
    shuffled = data.draw(st.permutations(clips))
    assert set(assign_splits(shuffled, fraction)) == set(assigned)


def test_clips_of_one_file_stay_together_where_a_label_has_others():
    files = {"long": [f"{i}.mp4" for i in range(8)], "more": ["0.mp4", "more.mp4"]}
    labels = ("long", "more", "one")
    clips = [
        Clip(path, label, 60.0 * labels.index(label) + i, None, "")
        for label, paths in (files | {"one": ["one.mp4"]}).items()
        for path in paths
        for i in range(6)
    ]
    assigned = assign_splits(clips, 0.25)
    assert set(assign_splits(clips[::-1], 0.25)) == set(assigned)
    in_validation = defaultdict(Counter)
    for clip in assigned:
        in_validation[clip.label][clip.path] += clip.split == "validation"

    def first_hash(path):
        return min(hashlib.sha256(clip.id.encode()).digest() for clip in clips if clip.path == path)

    for label, share in (("long", 2), ("more", 1)):
        drawn = sorted(files[label], key=first_hash)[:share]
        assert in_validation[label] == {path: 6 * (path in drawn) for path in files[label]}
    assert in_validation["one"] == {"one.mp4": 2}  # round(0.25 * 6)
    [told] = of_clips(assigned, labels)
    assert told.text.startswith("1 video (one.mp4 of one) with clips in training and in validation")
    split = {"long": "train", "more": "validation", "one": "train"}
    [*_, told] = of_clips([replace(c, split=split[c.label]) for c in assigned], labels)
    assert told.text.startswith("1 video (0.mp4 of long, more) with clips in training and in")
    given = [replace(clip, drawn=False) for clip in assigned]
    assert not of_clips(given, labels)


def test_given_splits_are_kept(tmp_path):
    rows = "path,label,split\na.mp4,x,test\nb.mp4,x,\nc.mp4,x,\nd.mp4,x,train\n"
    splits = {clip.path: clip.split for clip in read(tmp_path, table(tmp_path, rows)).clips}
    assert splits["a.mp4"] == "test"
    assert splits["d.mp4"] == "train"
    assert {splits["b.mp4"], splits["c.mp4"]} == {"train", "validation"}
