"""Batches against the records they come from, and the promises of the iterator."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.data.input import pipeline, sampling
from timesformer_jax.data.records.open import open_split
from timesformer_jax.errors import InputError

pytestmark = pytest.mark.decodes

SPEC = ClipSpec(frames=8, frame_stride=2, crop=32, short_side=40)
OPTIONS = {"batch_size": 16, "short_side_range": (32, 40), "flip": True, "seed": 3}


@pytest.fixture(scope="module")
def train(demo_data):
    return open_split(demo_data, "train")


@pytest.fixture(scope="module")
def validation(demo_data):
    return open_split(demo_data, "validation")


@pytest.fixture(scope="module")
def videos(demo_data):
    """Every video of the validation split as TFDS decodes it, by id."""
    data = tfds.builder_from_directory(str(demo_data)).as_dataset(split="validation")
    return {example["id"]: example for example in tfds.as_numpy(data)}


def take(batches, n):
    return list(itertools.islice(batches, n))


def equal(a, b):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def test_evaluation_shows_every_video_once_and_exactly(validation, videos):
    seen = []
    for batch in pipeline.eval_batches(validation, SPEC, batch_size=8, views=2, crops=3):
        assert batch["frames"].shape == (8, 6, 8, 40, 40, 3)
        assert batch["frames"].dtype == np.uint8
        for row in np.flatnonzero(batch["valid"]):
            example = videos[validation.ids[batch["record"][row]].encode()]
            seen.append(example["id"])
            assert example["label"] == batch["label"][row]
            for view, position in enumerate([0.25, 0.75]):
                indices = sampling.clip_indices(len(example["video"]), 30.0, 8, 2, position)
                for crop, left in enumerate([0, 4, 8]):
                    expected = example["video"][indices][:, :, left : left + 40]
                    assert np.array_equal(batch["frames"][row, 3 * view + crop], expected)
        assert (batch["crop_boxes"] == [0, 0, 40]).all()
    assert sorted(seen) == sorted(videos)


def test_clips_that_cover_a_record_come_in_order_on_any_number_of_hosts(validation):
    spec = dataclasses.replace(SPEC, frames=3)  # of 0.2 s
    options = {"batch_size": 8, "views": "cover", "crops": 3}
    whole = list(pipeline.eval_batches(validation, spec, **options))
    rows = pipeline.eval_rows(validation, spec, "cover")
    assert len(whole) == -(-rows // 8)
    assert whole[0]["frames"].shape == (8, 3, 3, 40, 40, 3)
    record = np.concatenate([batch["record"][batch["valid"]] for batch in whole])
    assert len(record) == rows
    pieces = np.bincount(record, minlength=len(validation))
    np.testing.assert_array_equal(record, np.repeat(np.arange(len(validation)), pieces))
    np.testing.assert_array_equal(pieces, np.rint(validation.num_frames / 30 / 0.2))
    parts = [
        list(pipeline.eval_batches(validation, spec, rows=np.array(rows), **options))
        for rows in ([0, 1, 6, 7], [2, 3, 4, 5])
    ]
    for batch, one, other in zip(whole, *parts, strict=True):
        for rows, part in (([0, 1, 6, 7], one), ([2, 3, 4, 5], other)):
            assert equal({name: value[rows] for name, value in batch.items()}, part)


def test_training_crop_boxes_are_the_drawn_squares(train, demo_data):
    data = tfds.builder_from_directory(str(demo_data)).as_dataset(split="train")
    videos = {example["id"]: example for example in tfds.as_numpy(data)}
    # Less than the whole frame is decoded.
    spec = dataclasses.replace(SPEC, crop=16)
    options = OPTIONS | {"short_side_range": (32, 40)}
    batch, _ = next(pipeline.train_batches(train, spec, **options))
    side = batch["frames"].shape[2]
    assert side == sampling.decoded_side(40, 16, 32) < 40
    for row in range(16):
        record = batch["record"][row]
        video = videos[train.ids[record].encode()]["video"]
        draws = pipeline.random_generator(3, 0, record).random(5)
        indices = sampling.clip_indices(len(video), 30.0, 8, 2, draws[0])
        crop_box = sampling.random_crop_box(*video.shape[1:3], 16, (32, 40), draws[1:4])
        corner = np.rint(crop_box[:2] - batch["crop_boxes"][row, :2]).astype(int)
        top, left = corner
        expected = video[indices][:, top : top + side, left : left + side]
        # A partly decoded JPEG interpolates chroma otherwise at its borders.
        difference = np.abs(batch["frames"][row].astype(int) - expected)[:, 2:-2, 2:-2]
        assert difference.max() <= 1
        assert (batch["crop_boxes"][row, :2] >= 0).all()
        assert (batch["crop_boxes"][row, :2] + crop_box[2] <= side + 1e-3).all()
        assert batch["flip"][row] == (draws[4] < 0.5)


def test_segments_are_drawn_in_training_and_their_midpoints_shown_in_tests(validation, videos):
    """Crop boxes and mirroring are drawn as without segments."""
    by_stride = dataclasses.replace(SPEC, crop=40)
    spec = dataclasses.replace(by_stride, sampling="segments")
    options = OPTIONS | {"short_side_range": (40, 40)}
    batch, _ = next(pipeline.train_batches(validation, spec, **options))
    other, _ = next(pipeline.train_batches(validation, by_stride, **options))
    for key in ("crop_boxes", "flip", "augment_seed", "record"):
        assert np.array_equal(batch[key], other[key])
    for row, record in enumerate(batch["record"]):
        video = videos[validation.ids[record].encode()]["video"]
        random = pipeline.random_generator(3, 0, record)
        crop_box = sampling.random_crop_box(40, 48, 40, (40, 40), random.random(5)[1:4])
        random.integers(2**32)
        indices = sampling.segment_indices(len(video), 8, random.random(8))
        left = round(crop_box[1] - batch["crop_boxes"][row, 1])
        expected = video[indices][:, :, left : left + 40]
        difference = np.abs(batch["frames"][row].astype(int) - expected)[:, :, 2:-2]  # as above
        assert difference.max() <= 1
    shown = next(pipeline.eval_batches(validation, spec, batch_size=4, crops=3))
    for row, record in enumerate(shown["record"]):
        video = videos[validation.ids[record].encode()]["video"]
        borders = np.rint((len(video) - 1) / 8 * np.arange(9)).astype(int)
        middle = (borders[:-1] + borders[1:]) // 2
        assert np.array_equal(shown["frames"][row, 0], video[middle][:, :, :40])


def test_an_epoch_is_every_record_once_in_another_order_each_time(train):
    batches = [b["record"] for b, _ in take(pipeline.train_batches(train, SPEC, **OPTIONS), 8)]
    first, second = np.concatenate(batches[:4]), np.concatenate(batches[4:])
    assert sorted(first) == sorted(second) == list(range(64))
    assert first.tolist() != second.tolist()
    assert first.tolist() != list(range(64))


def test_same_seed_same_batches_and_another_seed_others(train):
    once = take(pipeline.train_batches(train, SPEC, **OPTIONS), 3)
    again = take(pipeline.train_batches(train, SPEC, **OPTIONS), 3)
    other = take(pipeline.train_batches(train, SPEC, **OPTIONS | {"seed": 4}), 3)
    assert equal([b for b, _ in once], [b for b, _ in again])
    assert not equal(once[0][0]["frames"], other[0][0]["frames"])


@pytest.mark.parametrize("consumed", [1, 3, 4, 6])
def test_a_state_continues_with_the_next_batch(train, consumed):
    whole = take(pipeline.train_batches(train, SPEC, **OPTIONS), 9)
    state = whole[consumed - 1][1]
    rest = take(pipeline.train_batches(train, SPEC, state=state, **OPTIONS), 2)
    assert equal([b for b, _ in rest], [b for b, _ in whole[consumed : consumed + 2]])
    assert [s for _, s in rest] == [s for _, s in whole[consumed : consumed + 2]]


def test_hosts_share_every_global_batch(train, validation):
    whole = [b for b, _ in take(pipeline.train_batches(train, SPEC, **OPTIONS), 2)]
    parts = [
        [b for b, _ in take(pipeline.train_batches(train, SPEC, rows=rows, **OPTIONS), 2)]
        for rows in np.split(np.arange(OPTIONS["batch_size"]), 4)
    ]
    together = [
        jax.tree.map(lambda *x: np.concatenate(x), *(part[step] for part in parts))
        for step in range(2)
    ]
    assert equal(together, whole)

    counted = np.concatenate(
        [
            batch["record"][batch["valid"]]
            for rows in ([0, 3, 4, 7], [1, 2, 5, 6])
            for batch in pipeline.eval_batches(validation, SPEC, batch_size=8, rows=rows)
        ]
    )
    assert sorted(counted) == list(range(21))


def test_too_large_a_batch_and_too_small_a_short_side_give_one_line_errors(train):
    with pytest.raises(InputError, match="64 clips, fewer than a batch of 65"):
        next(pipeline.train_batches(train, SPEC, **OPTIONS | {"batch_size": 65}))
    with pytest.raises(InputError, match="short_side_range"):
        next(pipeline.train_batches(train, SPEC, **OPTIONS | {"short_side_range": (20, 40)}))
