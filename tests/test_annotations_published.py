"""Small versions of the published data sets, in the file layout of their publishers."""

import csv
import hashlib
import json
import os
import random
import subprocess
import sys
from collections import Counter
from unittest import mock

import hypothesis
import pytest
from hypothesis import strategies as st
from test_annotations import refused, touch

from timesformer_jax.data.annotations import DATASETS, published_dataset, read


def write(root, files):
    """Writes files by name: text as it is, anything else as JSON."""
    root.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (root / name).write_text(text)
    return root


def clips(listing):
    """(id, path, label, (start, end, frame_range), split) of each clip."""
    return [
        (clip.id, clip.path, clip.label, (clip.start, clip.end, clip.frame_range), clip.split)
        for clip in listing.clips
    ]


WHOLE = (None, None, None)


# ---- small data sets, one of each ---------------------------------------------------------------


def kinetics(root, header="label,youtube_id,time_start,time_end,split,is_cc"):
    touch(
        root / "videos",
        "train/playing_guitar/-3B32lodo2M_000059_000069.mp4",
        "anywhere/_x0000000_a.mkv",
        "val/abseiling/aaaaaaaaaaa_000000_000010.webm",
        "val/abseiling/zzzzzzzzzzz_000001_000011.mp4",
    )
    rows = {
        "train": [
            "playing guitar,-3B32lodo2M,59,69,train,0",
            "abseiling,_x0000000_a,7,17,train,1",
            "abseiling,gonegone111,124,134,train,0",
        ],
        "validate": ["abseiling,aaaaaaaaaaa,0,10,val,0"],
    }
    files = {
        f"kinetics-400_{split}.csv": "\n".join([header, *lines]) + "\n"
        for split, lines in rows.items()
    }
    return root / "videos", write(root / "annotations", files)


SOMETHING = {
    "labels": {
        "Putting something similar to other things that are already on the table": "0",
        "Holding something": "1",
    },
    "train": [
        {
            "id": "78687",
            "label": "holding potato next to vicks vaporub bottle",
            "template": "Holding [something]",
            "placeholders": ["potato"],
        },
        {
            "id": "100218",
            "label": "putting a pen on the table",
            "template": "Putting [something similar to other things that are already on the table]",
            "placeholders": ["a pen"],
        },
    ],
    "validation": [
        {
            "id": "74225",
            "label": "holding a cup",
            "template": "Holding [something]",
            "placeholders": ["a cup"],
        }
    ],
    "test": [{"id": "1420"}, {"id": "3245"}],
}


def something(root, prefix="something-something-v2-", **more):
    touch(root / "videos", "20bn/78687.webm", "20bn/100218.webm", "74225.mp4", "1420.webm")
    files = {f"{prefix}{name}.json": content for name, content in SOMETHING.items()}
    return root / "videos", write(root / "annotations", files | more)


def diving(root):
    touch(root / "videos", "rgb/_8Vy3dlHg2w_00000.mp4", "rgb/2x00lRzlTVQ_00001.mp4")
    clip = {"vid_name": "_8Vy3dlHg2w_00000", "label": 2, "start_frame": 0, "end_frame": 99}
    return root / "videos", write(
        root / "annotations",
        {
            "Diving48_V2_train.json": [
                clip,
                {"vid_name": "2x00lRzlTVQ_00001", "label": 0, "start_frame": 3, "end_frame": 80},
            ],
            "Diving48_V2_test.json": [clip | {"vid_name": "gone_00003", "label": 0}],
            "Diving48_train.json": [clip | {"label": 1}],  # version 1, which must not be read
            "Diving48_vocab.json": [
                ["Back", "15som", "05Twis", "FREE"],
                ["Back", "15som", "15Twis", "FREE"],
                ["Forward", "25som", "NoTwis", "PIKE"],
            ],
        },
    )


def howto100m(root, **more):
    """Task 10 has 100 videos; task 7 has 99, and one more that ranks better for task 10."""
    rows = [(f"tenTEN{i:05d}", "Food", "Drinks", i + 1, 10) for i in range(99)]
    rows += [(f"seven77{i:04d}", "Home and Garden", "Tools, Hand", i + 1, 7) for i in range(99)]
    rows += [("both0000000", "Food", "Drinks", 3, 10), ("both0000000", "Home", "", 5, 7)]
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "HowTo100M_v1.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["video_id", "category_1", "category_2", "rank", "task_id"])
        writer.writerows(rows)
    write(root, {"task_ids.csv": "7\tBuild a Saw\n10\tMake Tea\n"} | more)
    touch(root / "videos", *(f"{row[0]}.webm" for row in rows[5:]), "else0000000.mp4")
    return root / "videos", root


def ucf101(root):
    touch(
        root / "videos",
        "UCF-101/Archery/v_Archery_g08_c01.avi",
        "UCF-101/HandstandPushups/v_HandstandPushups_g01_c01.avi",
    )
    return root / "videos", write(
        root / "ucfTrainTestlist",
        {
            "classInd.txt": "1 Archery\r\n2 HandstandPushups\r\n",
            "trainlist01.txt": "Archery/v_Archery_g08_c01.avi 1\r\n"
            "HandstandPushups/v_HandStandPushups_g08_c02.avi 2\r\n",
            "testlist01.txt": "HandstandPushups/v_HandStandPushups_g01_c01.avi\r\n",
            "trainlist02.txt": "HandstandPushups/v_HandStandPushups_g01_c01.avi 2\r\n",
            "testlist02.txt": "Archery/v_Archery_g08_c01.avi\r\n",
        },
    )


def hmdb51(root):
    touch(
        root / "videos",
        "clap/#20_Rhythm_clap_u_nm_np1_fr_goo_0.avi",
        "clap/same_name.avi",
        "wave/same_name.avi",
        "wave/neither.avi",
    )
    return root / "videos", write(
        root / "testTrainMulti_7030_splits",
        {
            "clap_test_split1.txt": "#20_Rhythm_clap_u_nm_np1_fr_goo_0.avi 1 \nsame_name.avi 2 \n",
            "wave_test_split1.txt": "same_name.avi 1 \nneither.avi 0 \n",
            "clap_test_split2.txt": "same_name.avi 1 \n",
            "wave_test_split2.txt": "neither.avi 1 \nsame_name.avi 2 \n",
        },
    )


SMALL = {
    "kinetics400": kinetics,
    "kinetics600": kinetics,
    "something_v2": something,
    "diving48": diving,
    "howto100m": howto100m,
    "ucf101": ucf101,
    "hmdb51": hmdb51,
}


# ---- all of them --------------------------------------------------------------------------------


def shuffled(name, text, order):
    """A file with its entries in another order; the header stays first."""
    if name.endswith(".json"):
        value = json.loads(text)
        if isinstance(value, dict):
            value = dict(order.sample(list(value.items()), len(value)))
        elif "vocab" not in name:  # the position in a vocabulary is the class
            order.shuffle(value)
        return json.dumps(value)
    lines = text.splitlines()
    head = [] if name.endswith("list01.txt") or "split1" in name else [lines.pop(0)]
    if name != "classInd.txt":
        order.shuffle(lines)
    return "\n".join(head + lines)


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_result_depends_on_no_order_of_files_or_lines(dataset, tmp_path):
    videos, annotations = SMALL[dataset](tmp_path)
    touch(videos, "again/_x0000000_a.mp4", "again/78687.mp4", "again/v_Archery_g08_c01.mp4")
    expected = read(videos, annotations, dataset=dataset)
    assert [clip.id for clip in expected.clips] == sorted({clip.id for clip in expected.clips})
    assert {clip.label for clip in expected.clips} <= set(expected.labels)
    files = {path: path.read_text() for path in annotations.iterdir() if path.is_file()}
    walked = list(os.walk(videos))

    @hypothesis.settings(max_examples=10)
    @hypothesis.given(st.integers(0, 2**32))
    def same(seed):
        order = random.Random(seed)
        for path, text in files.items():
            path.write_text(shuffled(path.name, text, order))
        otherwise = [(folder, list(subs), order.sample(files, len(files)))
                     for folder, subs, files in order.sample(walked, len(walked))]  # fmt: skip
        with mock.patch("os.walk", return_value=otherwise):
            assert read(videos, annotations, dataset=dataset) == expected

    same()


@pytest.mark.parametrize("dataset", DATASETS)
def test_missing_and_unlisted_files(dataset, tmp_path):
    videos, annotations = SMALL[dataset](tmp_path)
    listing = read(videos, annotations, dataset=dataset)
    here = {os.path.relpath(path, videos) for path in videos.rglob("*.*") if path.is_file()}
    assert listing.missing == tuple(c.id for c in listing.clips if c.path not in here)
    assert set(listing.unlisted) == here - {c.path for c in listing.clips}
    assert listing.published_counts == DATASETS[dataset].published_counts
    for split, count in Counter(clip.split for clip in listing.clips).items():
        present = sum(c.split == split and c.path in here for c in listing.clips)
        said = f"{split}: {present} of {count} listed are here ({100 * present / count:.1f}%)"
        assert said in listing.report()


def test_the_options_of_each_data_set():
    assert {name: row.store_stride for name, row in DATASETS.items() if row.store_stride != 1} == {
        "kinetics400": 4,
        "kinetics600": 4,
        "howto100m": 4,
    }
    lengths = {name: row.segment_seconds for name, row in DATASETS.items() if row.segment_seconds}
    assert lengths == {"howto100m": pytest.approx(8.533, abs=1e-3)}
    assert published_dataset(None) is None
    assert published_dataset("hmdb51") is DATASETS["hmdb51"]


@pytest.mark.parametrize(
    ("name", "near"),
    [("kinetics-400", "kinetics400"), ("SSv2", "something_v2"), ("UCF", "ucf101")],
)
def test_the_most_similar_data_set_is_suggested(name, near, tmp_path):
    refused(f"no data set '{name}'.*; did you mean '{near}'", tmp_path, tmp_path, dataset=name)


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_published_data_set_without_its_annotations(dataset, tmp_path):
    refused(f"{dataset} needs its annotations", touch(tmp_path, "a/b.mp4"), dataset=dataset)
    (tmp_path / "notes.txt").touch()
    refused(f"{tmp_path} has no .*; give the folder", tmp_path, tmp_path, dataset=dataset)
    refused("cannot read .*nowhere: No such", tmp_path, tmp_path / "nowhere", dataset=dataset)


def test_the_report(tmp_path):
    videos, annotations = kinetics(tmp_path)
    write(annotations, {"test.csv": "youtube_id,time_start,time_end,split\nq,1,11,test\n"})
    assert read(videos, annotations, dataset="kinetics400").report().splitlines() == [
        "train: 2 of 3 listed are here (66.7%); published 246,245 (0.0%)",
        "validation: 1 of 1 listed are here (100.0%); published 20,000 (0.0%)",
        "1 listed clips have no file: gonegone111_000124_000134",
        "1 video files are in no list: val/abseiling/zzzzzzzzzzz_000001_000011.mp4",
        "test clips without a label, left out: 1",
    ]
    train_only = read(videos, annotations / "kinetics-400_train.csv", dataset="kinetics400")
    assert train_only.report().splitlines()[1] == (
        "validation: none listed; published 20,000 (0.0%)"
    )
    own = read(touch(tmp_path / "own", "x/a.mp4", "x/b.mp4"))
    assert own.report().splitlines() == [
        "train: 1 of 1 listed are here (100.0%)",
        "validation: 1 of 1 listed are here (100.0%)",
    ]


# ---- Kinetics -----------------------------------------------------------------------------------


def test_kinetics_as_published(tmp_path):
    videos, annotations = kinetics(tmp_path)
    touch(videos, "whole/-3B32lodo2M.mp4")  # of which the trimmed clip exists too
    listing = read(videos, annotations, dataset="kinetics600")
    assert clips(listing) == [
        ("-3B32lodo2M_000059_000069", "train/playing_guitar/-3B32lodo2M_000059_000069.mp4",
         "playing guitar", WHOLE, "train"),
        ("_x0000000_a_000007_000017", "anywhere/_x0000000_a.mkv", "abseiling", (7.0, 17.0, None),
         "train"),
        ("aaaaaaaaaaa_000000_000010", "val/abseiling/aaaaaaaaaaa_000000_000010.webm", "abseiling",
         WHOLE, "validation"),
        ("gonegone111_000124_000134", "gonegone111_000124_000134.mp4", "abseiling", WHOLE, "train"),
    ]  # fmt: skip
    assert listing.labels == ("abseiling", "playing guitar")


@pytest.mark.parametrize(
    "text",
    [
        "-3B32lodo2M 1\n_x0000000_a 0\n",  # as the authors of the paper list them
        "train/playing_guitar/-3B32lodo2M_000059_000069.mp4 1\n/data/k400/_x0000000_a.mkv 0\n",
        "playing guitar/-3B32lodo2M_000059_000069.mp4 1\nabseiling/_x0000000_a.mp4 0\n",
        "-3B32lodo2M_000059_000069,1\n_x0000000_a.mp4,0\n",
        '"-3B32lodo2M","1"\n"_x0000000_a.mp4","0"\n',
    ],
)
def test_kinetics_lines_of_path_and_class(text, tmp_path):
    videos, _ = kinetics(tmp_path)
    lists = write(tmp_path / "lists", {"train.csv": text, "val.csv": "aaaaaaaaaaa 0\n"})
    for labels, names in ((None, "01"), (("abseiling", "playing guitar", "zumba"), None)):
        listing = read(videos, lists, labels, dataset="kinetics400")
        names = names or labels
        assert listing.labels == tuple(names)
        assert {(clip.path, clip.label, clip.split) for clip in listing.clips} == {
            ("train/playing_guitar/-3B32lodo2M_000059_000069.mp4", names[1], "train"),
            ("anywhere/_x0000000_a.mkv", names[0], "train"),
            ("val/abseiling/aaaaaaaaaaa_000000_000010.webm", names[0], "validation"),
        }
        assert not listing.missing


def test_kinetics_classes_are_in_the_order_of_numbers(tmp_path):
    lines = [f"video{i:06d} {i}" for i in (10, 9, 2, 0)]
    touch(tmp_path, *(f"{line.split()[0]}.mp4" for line in lines))
    lists = write(tmp_path / "lists", {"train.csv": "\n".join(lines)})
    listing = read(tmp_path, lists, dataset="kinetics400")
    assert listing.labels == tuple(str(i) for i in range(11))
    assert [clip.label for clip in listing.clips] == ["0", "2", "9", "10"]


def test_kinetics_lines_of_path_and_name(tmp_path):
    videos, _ = kinetics(tmp_path)
    one = write(tmp_path / "one", {"my_train_list.csv": "-3B32lodo2M playing guitar\n"})
    two = write(tmp_path / "two", {"val.txt": "aaaaaaaaaaa.mp4 playing guitar\n"})
    listing = read(videos, [one / "my_train_list.csv", two / "val.txt"], dataset="kinetics400")
    assert [(clip.label, clip.split) for clip in listing.clips] == [
        ("playing guitar", "train"),
        ("playing guitar", "validation"),
    ]


HEADER = "label,youtube_id,time_start,time_end,split\n"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("train.csv", "label,youtube_id,time_start\n", "no column 'time_end' in its header"),
        ("train.csv", f"{HEADER}x,aaaaaaaaaaa,ten,20,train\n", "line 2: time_start 'ten' is not"),
        ("train.csv", f"{HEADER}x,aaaaaaaaaaa,10,10,train\n", "line 2: time_end 10 is not after"),
        ("train.csv", f"{HEADER}x,aaaaaaaaaaa,0,10,trian\n", "line 2: split 'trian' is not one"),
        ("train.csv", f"{HEADER},aaaaaaaaaaa,0,10,train\n", "line 2 has no label"),
        ("all.csv", "label,youtube_id,time_start,time_end\nx,a,0,10\n", "line 2 has no split"),
        ("all.csv", "aaaaaaaaaaa 0\n", "has no split in its name; name it train.csv"),
        ("train.csv", f"{HEADER}x,a,0,10,train\ny,a,0,10,train\n", "line 3: .* is listed twice"),
        ("train.csv", "path,label\naaaaaaaaaaa,x\n", "has the header of a custom csv"),
        ("train.csv", "aaaaaaaaaaa,x,y\n", "line 1 has 3 fields"),
        ("train.csv", "aaaaaaaaaaa.mp4 0 -1\n", "line 1: '0 -1' is not one class"),
        ("train.csv", "aaaaaaaaaaa.mp4 -1\n", "line 1: '-1' is not one class"),
        ("train.csv", "aaaaaaaaaaa\n", "line 1 has no label"),
        ("train.csv", "", "lists no clip with a label"),
        ("train.csv", "twice000000 1\n", "twice000000 may be twice000000_00000[03]_0000.*list"),
        ("train.csv", "gonegonegon x\n", "none of the 1 clips .*gonegonegon.mp4.; give the folder"),
    ],
)  # fmt: skip
def test_kinetics_files_that_cannot_be_read(name, text, message, tmp_path):
    videos, _ = kinetics(tmp_path)
    touch(videos, "twice000000_000000_000010.mp4", "twice000000_000003_000013.mp4")
    lists = write(tmp_path / "lists", {name: text})
    refused(message, videos, lists / name, dataset="kinetics400")


def test_a_class_beyond_the_labels(tmp_path):
    videos, _ = kinetics(tmp_path)
    lists = write(tmp_path / "lists", {"train.csv": "aaaaaaaaaaa 1\n-3B32lodo2M 2\n"})
    refused(
        "train.csv line 2: class 2 is beyond the 2 labels",
        *(videos, lists, ("a", "b")),
        dataset="kinetics400",
    )


# ---- Something-Something V2 ---------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["something-something-v2-", ""])
@pytest.mark.parametrize("answers", [True, False])
def test_something_v2(prefix, answers, tmp_path):
    similar, holding = SOMETHING["labels"]
    more = {f"{prefix}test-answers.csv": f"1420;{holding}\n3245;{similar}\n"} if answers else {}
    listing = read(*something(tmp_path, prefix, **more), dataset="something_v2")
    test = [
        ("1420", "1420.webm", holding, WHOLE, "test"),
        ("3245", "3245.webm", similar, WHOLE, "test"),
    ]
    assert clips(listing) == sorted(
        [
            ("100218", "20bn/100218.webm", similar, WHOLE, "train"),
            ("74225", "74225.mp4", holding, WHOLE, "validation"),
            ("78687", "20bn/78687.webm", holding, WHOLE, "train"),
            *(test if answers else ()),
        ]
    )
    assert listing.labels == (similar, holding)  # as numbered, not sorted
    assert listing.missing == (("3245",) if answers else ())
    assert ("without a label, left out: 2" in listing.report()) == (not answers)


def frame_list(counts):
    lines = ["original_vido_id video_id frame_id path labels"]
    for video, (name, count) in enumerate(counts.items()):
        lines += [f'{name} {video} {i} {name}/{name}_{i + 1:06d}.jpg ""' for i in range(count)]
    return "\n".join(lines) + "\n"


def test_something_v2_by_frames(tmp_path):
    videos, annotations = something(
        tmp_path,
        **{"train.csv": frame_list({"78687": 3, "100218": 2}), "val.csv": frame_list({"74225": 4})},
    )
    as_videos = read(videos, annotations, dataset="something_v2")
    assert {clip.frame_range for clip in as_videos.clips} == {None}
    images = tmp_path / "frames"
    touch(images, *(f"ssv2/78687/78687_{i:06d}.jpg" for i in (1, 2)), "ssv2/74225/74225_000001.jpg")
    listing = read(images, annotations, dataset="something_v2")
    assert [(clip.id, clip.path, clip.frame_range) for clip in listing.clips] == [
        ("100218", "100218", (0, 2)),
        ("74225", "ssv2/74225", (0, 4)),
        ("78687", "ssv2/78687", (0, 3)),
    ]
    assert listing.missing == ("100218",)
    (annotations / "train.csv").unlink()
    (annotations / "val.csv").unlink()
    unlisted = read(images, annotations, dataset="something_v2")
    assert [(clip.path, clip.frame_range) for clip in unlisted.clips[1:]] == [
        ("ssv2/74225", None),
        ("ssv2/78687", None),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("labels.json", "{", "labels.json line 1 is not JSON"),
        ("labels.json", ["x"], "labels.json is not an object of labels"),
        ("labels.json", {"Holding something": "one"}, "'Holding something': class 'one' is not"),
        ("labels.json", {"a": "0", "b": "0"}, "does not number its labels 0, 1, 2"),
        ("labels.json", {"a": "1", "b": "2"}, "does not number its labels 0, 1, 2"),
        ("train.json", {"id": "1"}, "train.json is not a list of clips"),
        ("train.json", [{"id": "1"}], "train.json entry 0 has no 'template'"),
        ("train.json", [{"template": "Holding [something]"}], "entry 0 has no 'id'"),
        ("train.json", ["1"], "entry 0 has no 'id'"),
        ("train.json", [{"id": "1", "template": "Eating [it]"}], "entry 0: 'Eating it' is not in"),
        ("validation.json", SOMETHING["train"], "validation.json entry 0: 78687 is listed twice"),
        ("test-answers.csv", "1420;Holding something\n", "entry 1: clip 3245 has no answer"),
        ("test-answers.csv", "1420,Holding something\n", "line 1 is not 'id;template'"),
        ("train.csv", "id path\n", "train.csv has not the header 'original_vido_id"),
        ("train.csv", frame_list({}) + "1 2 3\n", "train.csv line 2 has 3 fields, not 5"),
    ],
)
def test_something_v2_files_that_cannot_be_read(name, content, message, tmp_path):
    videos, annotations = something(tmp_path, prefix="", **{name: content})
    touch(videos, "78687/1.jpg")
    refused(message, videos, annotations, dataset="something_v2")


# ---- Diving-48 ----------------------------------------------------------------------------------


def test_diving48(tmp_path):
    videos, annotations = diving(tmp_path)
    names = ("Back 15som 05Twis FREE", "Back 15som 15Twis FREE", "Forward 25som NoTwis PIKE")

    def expected(names):
        return [
            ("2x00lRzlTVQ_00001", "rgb/2x00lRzlTVQ_00001.mp4", names[0], (None, None, (3, 80)),
             "train"),
            ("_8Vy3dlHg2w_00000", "rgb/_8Vy3dlHg2w_00000.mp4", names[2], (None, None, (0, 99)),
             "train"),
            ("gone_00003", "gone_00003.mp4", names[0], (None, None, (0, 99)), "test"),
        ]  # fmt: skip

    listing = read(videos, annotations, dataset="diving48")
    assert clips(listing) == expected(names)
    assert listing.labels == names
    assert clips(read(videos, annotations, "xyz", dataset="diving48")) == expected("xyz")
    (annotations / "Diving48_vocab.json").unlink()
    listing = read(videos, annotations, dataset="diving48")
    assert clips(listing) == expected("012")
    assert listing.labels == ("0", "1", "2")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"label": 3}, "V2_train.json entry 0: class 3 is beyond the 3 labels"),
        ({"label": "x"}, "entry 0: label 'x' is not a whole number"),
        ({"end_frame": 0}, "entry 0: end_frame 0 is not after start_frame 0"),
        ({"start_frame": -1}, "entry 0: start_frame '-1' is not a whole number, 0 or more"),
        ({"end_frame": None}, "entry 0 has no 'end_frame'"),
        ({"vid_name": "gone_00003"}, "test.json entry 0: gone_00003 is listed twice"),
    ],
)
def test_diving48_files_that_cannot_be_read(entry, message, tmp_path):
    videos, annotations = diving(tmp_path)
    good = json.loads((annotations / "Diving48_V2_train.json").read_text())
    write(annotations, {"Diving48_V2_train.json": [good[0] | entry, good[1]]})
    refused(message, videos, annotations, dataset="diving48")


def test_a_diving48_vocabulary_that_cannot_be_read(tmp_path):
    videos, annotations = diving(tmp_path)
    write(annotations, {"Diving48_vocab.json": [["Back"], "Forward"]})
    refused("vocab.json entry 1 is not a list of words", videos, annotations, dataset="diving48")


# ---- HowTo100M ----------------------------------------------------------------------------------


def test_howto100m_keeps_tasks_of_100_videos(tmp_path):
    videos, annotations = howto100m(tmp_path)
    listing = read(videos, annotations, dataset="howto100m")
    assert {clip.label for clip in listing.clips} == {"Make Tea"}
    assert len(listing.clips) == 100
    assert listing.missing == tuple(f"tenTEN{i:05d}" for i in range(5))
    assert {clip.path for clip in listing.clips} >= {"both0000000.webm", "tenTEN00098.webm"}
    assert "1 of 2 tasks have 100 videos or more" in listing.report()


def test_howto100m_splits_85_to_35(tmp_path):
    rows = "".join(f"video{i:06d},a,b,1,1\n" for i in range(12_000))
    lists = write(
        tmp_path, {"HowTo100M_v1.csv": f"video_id,category_1,category_2,rank,task_id\n{rows}"}
    )
    listing = read(touch(tmp_path, "video000000.mp4"), lists, dataset="howto100m")
    splits = Counter(clip.split for clip in listing.clips)
    assert splits["test"] + splits["train"] == 12_000
    assert abs(splits["test"] - 3_500) < 200  # four standard deviations
    for clip in listing.clips:  # the rule of the docstring, computed differently
        draw = int(hashlib.sha256(clip.id.encode()).hexdigest()[:16], 16) % 120
        assert clip.split == ("test" if draw < 35 else "train")
    assert listing.labels == ("1",)


def test_howto100m_by_a_list_of_the_split(tmp_path):
    split = "split,video_id\ntrain,seven770008\ntest,seven770009\n"
    videos, annotations = howto100m(tmp_path, **{"split.csv": split})
    listing = read(videos, annotations / "HowTo100M_v1.csv", dataset="howto100m")
    assert clips(listing) == [
        ("seven770008", "seven770008.webm", "Build a Saw", WHOLE, "train"),
        ("seven770009", "seven770009.webm", "Build a Saw", WHOLE, "test"),
    ]


def test_howto100m_tasks_of_one_title(tmp_path):
    more = {
        "task_ids.csv": "id\ttask_name\n7\tMake Tea\n10\tMake Tea\n",
        "split.csv": "video_id,split\nseven770008,train\ntenTEN00008,train\n",
    }
    listing = read(*howto100m(tmp_path, **more), dataset="howto100m")
    assert listing.labels == ("Make Tea (10)", "Make Tea (7)")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("HowTo100M_v1.csv", "video_id,task_id\n", "no column 'rank' in its header"),
        ("HowTo100M_v1.csv", "video_id,rank,task_id\na,1,x\n", "line 2: task_id 'x' is not"),
        ("HowTo100M_v1.csv", "video_id,rank,task_id\n,1,1\n", "line 2 has no video_id"),
        ("HowTo100M_v1.csv", "video_id,rank,task_id\na,1,1\n", "lists no clip with a label"),
        ("task_ids.csv", "7 Build a Saw\n10 Make Tea\n", "line 2 is not an id, a tab and a name"),
        ("split.csv", "video_id\na\n", "no column 'split' in its header"),
        ("split.csv", "video_id,split\na,train\n", "line 2: HowTo100M_v1.csv has no video 'a'"),
        ("split.csv", "video_id,split\nboth0000000,dev\n", "line 2: split 'dev' is not one of"),
        ("split.csv", "video_id,split\n" + "both0000000,test\n" * 2, "line 3: both0000000 is list"),
    ],
)
def test_howto100m_files_that_cannot_be_read(name, text, message, tmp_path):
    videos, annotations = howto100m(tmp_path)
    write(annotations, {name: text})
    refused(message, videos, annotations, dataset="howto100m")


# ---- UCF101 and HMDB51 --------------------------------------------------------------------------


def test_ucf101(tmp_path):
    videos, annotations = ucf101(tmp_path)
    listing = read(videos, annotations, dataset="ucf101")
    assert clips(listing) == [
        ("v_Archery_g08_c01", "UCF-101/Archery/v_Archery_g08_c01.avi", "Archery", WHOLE, "train"),
        ("v_HandStandPushups_g01_c01", "UCF-101/HandstandPushups/v_HandstandPushups_g01_c01.avi",
         "HandstandPushups", WHOLE, "test"),
        ("v_HandStandPushups_g08_c02", "HandstandPushups/v_HandStandPushups_g08_c02.avi",
         "HandstandPushups", WHOLE, "train"),
    ]  # fmt: skip
    assert listing.labels == ("Archery", "HandstandPushups")
    second = read(videos, annotations / "testlist02.txt", ("HandstandPushups", "Archery"),
                  dataset="ucf101")  # fmt: skip
    assert [(clip.label, clip.split) for clip in second.clips] == [
        ("Archery", "test"),
        ("HandstandPushups", "train"),
    ]
    assert second.labels == ("HandstandPushups", "Archery")  # as given
    assert second.published_counts == {}


def test_hmdb51(tmp_path):
    videos, annotations = hmdb51(tmp_path)
    listing = read(videos, annotations, dataset="hmdb51")
    assert clips(listing) == [
        ("clap/#20_Rhythm_clap_u_nm_np1_fr_goo_0", "clap/#20_Rhythm_clap_u_nm_np1_fr_goo_0.avi",
         "clap", WHOLE, "train"),
        ("clap/same_name", "clap/same_name.avi", "clap", WHOLE, "test"),
        ("wave/same_name", "wave/same_name.avi", "wave", WHOLE, "train"),
    ]  # fmt: skip
    assert listing.unlisted == ("wave/neither.avi",)
    assert "videos in neither part of split 1: 1" in listing.report()
    second = read(videos, annotations / "wave_test_split2.txt", dataset="hmdb51")
    assert {clip.id: clip.split for clip in second.clips} == {
        "clap/same_name": "train",
        "wave/neither": "train",
        "wave/same_name": "test",
    }


def test_hmdb51_in_one_folder(tmp_path):
    _, annotations = hmdb51(tmp_path)
    videos = touch(tmp_path / "flat", "all/#20_Rhythm_clap_u_nm_np1_fr_goo_0.mp4")
    listing = read(videos, annotations, dataset="hmdb51")
    assert listing.clips[0].path == "all/#20_Rhythm_clap_u_nm_np1_fr_goo_0.mp4"
    assert listing.missing == ("clap/same_name", "wave/same_name")


@pytest.mark.parametrize(
    ("dataset", "name", "text", "message"),
    [
        ("ucf101", "classInd.txt", "1 Archery\n3 Biking\n", "line 2 is not class 2 and its name"),
        ("ucf101", "classInd.txt", "1 Archery\n", "line 2: class 'HandstandPushups' is not in"),
        ("ucf101", "trainlist01.txt", "Archery/v_a.avi 2\n", "line 1: Archery is not class 2"),
        ("ucf101", "testlist01.txt", "Archery/v_Archery_g08_c01.avi\n", "is listed twice"),
        ("hmdb51", "wave_test_split1.txt", "a.avi 3\n", "line 1 is not a file and 0, 1 or 2"),
        ("hmdb51", "wave_test_split1.txt", "a.avi\n", "line 1 is not a file and 0, 1 or 2"),
        ("hmdb51", "wave_test_split1.txt", "a.avi 1\na.avi 1\n", "line 2: wave/a is listed twice"),
    ],
)
def test_numbered_splits_that_cannot_be_read(dataset, name, text, message, tmp_path):
    videos, annotations = SMALL[dataset](tmp_path)
    write(annotations, {name: text})
    refused(message, videos, annotations, dataset=dataset)


# ---- on gs:// -----------------------------------------------------------------------------------


@pytest.mark.processes
def test_on_gs_as_on_a_disk(gcs):
    videos, annotations = kinetics(gcs.root / "bucket" / "k400")
    touch(videos, ".hidden/x_000000_000010.mp4")
    code = (
        "from timesformer_jax.data.annotations import read\n"
        "from timesformer_jax.errors import InputError\n"
        "listing = read('gs://bucket/k400/videos', 'gs://bucket/k400/annotations',"
        " dataset='kinetics400')\n"
        "print(repr(listing))\n"
        "for arguments in [('gs://bucket/gone',), ('gs://bucket/k400/videos', 'gs://bucket/x.csv')]:\n"
        "    try: read(*arguments)\n"
        "    except InputError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | dict(gcs.environment),
    )
    assert done.returncode == 0, done.stderr
    listing, no_folder, no_file = done.stdout.splitlines()
    assert listing == repr(read(videos, annotations, dataset="kinetics400"))
    assert "there is no folder gs://bucket/gone" in no_folder
    assert "cannot read gs://bucket/x.csv" in no_file
