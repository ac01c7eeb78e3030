"""Evaluation counts every video once, however many records and views it has."""

import csv
import dataclasses
import io
import itertools
import json

import jax
import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.metrics import f1_score

from timesformer_jax.checkpoints.metadata import CheckpointMetadata
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.data.input.pipeline import eval_batches
from timesformer_jax.data.records.open import open_split
from timesformer_jax.distributed.mesh import make_mesh
from timesformer_jax.errors import InputError
from timesformer_jax.evaluation.metrics import (
    MultiLabelResults,
    Results,
    VideoMeans,
    average_precision,
    best_threshold,
)
from timesformer_jax.evaluation.multi_view import evaluate, match_labels
from timesformer_jax.evaluation.output import check_outputs, write
from timesformer_jax.evaluation.step import make_probabilities
from timesformer_jax.models.timesformer import TimeSformer, TimeSformerConfig, parameters

pytestmark = pytest.mark.decodes


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(0, 99))
def test_pieces_are_averaged_whatever_their_order(video, seed):
    """Each record has one to three clips, which come in any order, a few at a time."""
    video, random = np.array(video), np.random.default_rng(seed)
    record = random.permutation(np.repeat(np.arange(len(video)), random.integers(1, 4, len(video))))
    probabilities = random.random((len(record), 3)).astype(np.float32)
    found = VideoMeans(video, 3)
    for own in np.array_split(np.arange(len(record)), 1 + seed % 4):
        found.add(probabilities[own], record[own])
    assert video[found.first].tolist() == sorted(set(video.tolist()))
    for row, number in zip(found.means(), video[found.first]):
        clips = [p.astype(np.float64) for p, r in zip(probabilities, record) if video[r] == number]
        assert np.allclose(row, sum(clips) / len(clips), rtol=0, atol=1e-12)


def small_model():
    """A model of the demo's eight classes, and its parameters."""
    model = TimeSformerConfig(
        num_classes=8, image_size=32, num_frames=2, hidden_size=16, depth=1, num_heads=2
    )
    params = parameters(TimeSformer(model, rngs=nnx.Rngs(0)))
    # A new head is too even for a clear order of classes.
    params["head"] = jax.tree.map(lambda x: x + np.linspace(-1, 1, 8) + 9 * x, params["head"])
    return model, params


def test_a_video_in_pieces_counts_once(demo_data):
    """21 records as 6 videos of 1 to 6 pieces, against the same done by hand without batches."""
    split = open_split(demo_data, "validation")
    video = np.repeat(np.arange(6), [1, 2, 3, 4, 5, 6]).astype(np.int32)
    video = np.random.default_rng(0).permutation(video)
    label = video % 8  # pieces share their video's label
    split = dataclasses.replace(split, video=video, label=label)
    clip = ClipSpec(frames=2, frame_stride=8, crop=32, short_side=40)
    model, params = small_model()

    mesh = make_mesh()
    found = evaluate(
        jax.device_put(params, NamedSharding(mesh, P())),
        model, clip, split, mesh, batch_size=8, views=2, crops=3,
    )  # fmt: skip

    probabilities = jax.jit(make_probabilities(model, clip))
    by_video = {number: [] for number in range(6)}
    for batch in eval_batches(split, clip, batch_size=1, views=2, crops=3):
        p = probabilities(params, batch["frames"], batch["crop_boxes"])[0]
        by_video[video[batch["record"][0]]].append(np.asarray(p, np.float64))
    assert sorted(map(len, by_video.values())) == [1, 2, 3, 4, 5, 6]
    ranks = {
        number: np.argsort(-np.mean(pieces, axis=0)).tolist().index(number % 8)
        for number, pieces in by_video.items()
    }
    assert found.videos.tolist() == [1] * 6 + [0] * 2
    assert found.top1.tolist() == [int(ranks.get(i, 9) < 1) for i in range(8)]
    assert found.top5.tolist() == [int(ranks.get(i, 9) < 5) for i in range(8)]
    assert 0 < found.top5.sum() < 6  # neither answer would come out of no model at all


def test_clips_that_cover_a_video_are_averaged(demo_data):
    """Against the frames that TFDS decodes, cut by hand into pieces of a clip each."""
    split = open_split(demo_data, "validation")
    video = (np.arange(21) // 2).astype(np.int32)  # two records a video, the last has one
    split = dataclasses.replace(split, video=video)
    clip = ClipSpec(frames=2, frame_stride=3, crop=32, short_side=40)  # 0.2 s
    model, params = small_model()
    mesh = make_mesh()
    found = evaluate(
        jax.device_put(params, NamedSharding(mesh, P())),
        model, clip, split, mesh, batch_size=8, views="cover", crops=3,
    )  # fmt: skip

    probabilities = jax.jit(make_probabilities(model, clip))
    data = tfds.builder_from_directory(str(demo_data)).as_dataset(split="validation")
    frames_of = {example["id"].decode(): example["video"] for example in tfds.as_numpy(data)}
    boxes = np.tile(np.array([0, 0, 40], np.float32), (1, 3, 1))
    clips: list = [[] for _ in range(11)]
    for number, name in zip(video, split.ids):
        frames = frames_of[name]
        pieces = round(len(frames) / 30 / 0.2)
        assert pieces > 2
        bounds = [i * len(frames) // pieces for i in range(pieces + 1)]
        for first, last in itertools.pairwise(bounds):
            start = first + max(last - first - 6, 0) / 2  # 6 frames in the middle of the piece
            shown = frames[[int(start), min(int(start + 5), last - 1)]]
            squares = np.stack([shown[:, :, left : left + 40] for left in (0, 4, 8)])
            clips[number].append(probabilities(params, squares[None], boxes)[0])
    expected = np.array([np.mean(each, axis=0) for each in clips])
    np.testing.assert_allclose(found.probabilities, expected, atol=1e-5)
    assert (found.views, found.crops) == ("cover", 3)
    assert "11 videos, cover x 3 views" in found.summary()


def some_results(classes=7, videos=40):
    random = np.random.default_rng(0)
    probabilities = random.dirichlet(np.ones(classes), videos)
    labels = tuple(f"class, {i}" for i in range(classes))
    ids = np.array([f"{i}.mp4" for i in range(videos)])
    return Results(labels, ids, random.integers(0, classes - 1, videos), probabilities)


def test_outputs_hold_every_prediction(tmp_path):
    results = some_results()
    paths = [str(tmp_path / name) for name in ("x.json", "x.csv", "x.png")]
    check_outputs(paths)
    for path in paths:
        write(results, path, {"split": "validation"})

    found = json.loads((tmp_path / "x.json").read_text())
    rows = list(csv.DictReader(io.StringIO((tmp_path / "x.csv").read_text())))
    assert len(rows) == len(found["predictions"]) == 40
    assert found["split"] == "validation"
    confusion = np.zeros((7, 7), int)
    for row, also, p in zip(rows, found["predictions"], results.probabilities):
        written = np.array([float(row[f"p({label})"]) for label in results.labels])
        assert np.allclose(written, p, rtol=1e-5, atol=0)
        assert np.allclose(also["probabilities"], p, rtol=1e-5, atol=0)
        assert row["prediction"] == also["prediction"] == results.labels[written.argmax()]
        truth = results.labels.index(row["label"])
        assert int(row["rank"]) == 1 + sum(written > written[truth])
        confusion[truth, written.argmax()] += 1
    assert found["confusion"] == confusion.tolist()
    assert found["top1"] == np.trace(confusion) / 40
    assert found["top5"] == sum(int(row["rank"]) <= 5 for row in rows) / 40
    with PIL.Image.open(tmp_path / "x.png") as picture:
        assert min(picture.size) > 300


@pytest.mark.parametrize(("classes", "has_top5"), [(5, False), (6, True)])
def test_there_is_a_top5_of_six_classes_or_more(classes, has_top5):
    """In what is printed, written to JSON and logged as scalars alike."""
    results = some_results(classes)
    found = results.to_json()
    told = ["top-5" in results.table(), "top-5" in results.summary()]
    told += ["top5" in fields for fields in (results.scalars(), found, *found["classes"].values())]
    assert set(told) == {has_top5}
    assert all("top1" in fields for fields in (results.scalars(), found["classes"]["class, 0"]))


def test_the_table_names_the_worst_videos():
    results = some_results(classes=5)
    table = results.table(worst=2)
    wrong = [i for i, p in enumerate(results.probabilities) if p.argmax() != results.truth[i]]
    worst = sorted(wrong, key=lambda i: results.probabilities[i, results.truth[i]])
    lines = table.splitlines()
    start = 1 + next(i for i, line in enumerate(lines) if line.startswith("worst"))
    assert [line.split(":")[0].strip() for line in lines[start : start + 2]] == [
        f"{i}.mp4" for i in worst[:2]
    ]


def test_outputs_are_checked_before_the_work(tmp_path):
    for path, message in {
        "x.txt": "must end in .json, .csv, .png",
        "nowhere/x.csv": "does not exist",
        "folder.csv": "is a folder",
    }.items():
        (tmp_path / "folder.csv").mkdir(exist_ok=True)
        with pytest.raises(InputError, match=message):
            check_outputs([str(tmp_path / path)])


def test_an_output_in_a_folder_that_may_not_be_written(tmp_path, monkeypatch):
    """A file is written beside the one that it replaces. The tests may run as root."""
    (tmp_path / "x.csv").touch()
    closed = str(tmp_path)
    monkeypatch.setattr("os.access", lambda path, mode: path != closed)
    with pytest.raises(InputError, match=r"x\.csv may not be written"):
        check_outputs([str(tmp_path / "x.csv")])
    closed = str(tmp_path / "x.csv")
    with pytest.raises(InputError, match=r"x\.csv may not be written"):
        check_outputs([str(tmp_path / "x.csv")])
    check_outputs([str(tmp_path / "y.csv")])


def test_labels_are_matched_by_name(demo_data):
    split = open_split(demo_data, "validation")
    model = TimeSformerConfig(num_classes=9, hidden_size=16, num_heads=2)
    labels = ("something else", *reversed(split.label_names))
    metadata = CheckpointMetadata(model, ClipSpec(), labels, {})
    matched = match_labels(metadata, split)
    assert matched.label_names == labels
    assert [labels[i] for i in matched.label] == [split.label_names[i] for i in split.label]
    with pytest.raises(InputError, match="must have all of them"):
        match_labels(dataclasses.replace(metadata, labels=labels[:-1]), split)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4)), min_size=1, max_size=12))
def test_average_precision_is_the_mean_precision_at_each_positive(rows):
    """By its definition, with ties: of equal scores all count as found."""
    truth, scores = np.array([t for t, _ in rows]), np.array([s / 4 for _, s in rows])
    found = average_precision(truth, scores)
    precisions = [truth[scores >= s].mean() for t, s in zip(truth, scores) if t]
    assert found == pytest.approx(np.mean(precisions)) if precisions else np.isnan(found)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4)), min_size=1, max_size=12))
def test_the_best_threshold_is_that_of_all_which_gives_the_best_f1(rows):
    truth, scores = np.array([t for t, _ in rows]), np.array([s / 4 for _, s in rows])
    threshold, f1 = best_threshold(truth, scores)
    if not truth.any():
        assert np.isnan(threshold)
        assert np.isnan(f1)
        return
    by_threshold = {s: f1_score(truth, scores >= s) for s in sorted({0.0, *scores}, reverse=True)}
    assert f1 == pytest.approx(max(by_threshold.values()))
    assert by_threshold[threshold] == pytest.approx(f1)
    assert all(found < f1 for s, found in by_threshold.items() if s > threshold)


def test_multi_label_outputs(tmp_path):
    random = np.random.default_rng(0)
    truth = random.random((30, 4)) < 0.3
    truth[:, 3] = False  # no video has it
    labels, ids = ("a", "b", "c", "d"), np.array([f"{i}.mp4" for i in range(30)])
    results = MultiLabelResults(labels, ids, truth, random.random((30, 4)))
    for name in ("x.json", "x.csv", "x.png"):
        write(results, str(tmp_path / name), {})
    found = json.loads((tmp_path / "x.json").read_text())
    aps = [found["classes"][label]["AP"] for label in "abc"]
    assert found["mAP"] == pytest.approx(np.mean(aps))
    assert found["classes"]["d"] == {"AP": None, "F1": None, "threshold": None, "videos": 0}
    assert found["classes"]["a"]["threshold"] in results.probabilities[truth[:, 0], 0]
    assert found["threshold"] in results.probabilities[truth]
    lines = [line.split() for line in results.table().splitlines()]
    printed = {line[0]: float(line[4]) for line in lines[1:4]}
    [(*_, printed["all"], _, _)] = [line for line in lines if "--threshold)" in line]
    for name, threshold in printed.items():
        row = found if name == "all" else found["classes"][name]
        # As --threshold, what is printed keeps the video whose score it is.
        assert 0 <= row["threshold"] - float(threshold) < 0.001
    rows = list(csv.DictReader(io.StringIO((tmp_path / "x.csv").read_text())))
    for row, also, true in zip(rows, found["predictions"], truth):
        assert row["labels"] == "; ".join(also["labels"])
        assert also["labels"] == [label for label, here in zip(labels, true) if here]
    with PIL.Image.open(tmp_path / "x.png") as picture:
        assert min(picture.size) > 300
    assert f"mAP {found['mAP']:.2%}" in results.table().splitlines()[-1]
