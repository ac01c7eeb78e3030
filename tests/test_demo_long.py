"""The long embedded data set: what tells the class, and what does not."""

import itertools
from collections import Counter, defaultdict

import numpy as np
import pytest

from timesformer_jax import recipes
from timesformer_jax.data import decode
from timesformer_jax.data.demo import long
from timesformer_jax.data.demo.drawing import random_of
from timesformer_jax.data.demo.make import TASKS, prepare_demo
from timesformer_jax.data.records.open import open_split
from timesformer_jax.training.loop import train

TASK = TASKS["long"]
COUNTS = {"train": 9, "validation": 3}
SHORT = 119.5  # seconds of a clip that is shorter than the distance


def videos(split, count):
    """The squares and the class of each video."""
    return [
        (long.draw_squares(random_of(split, i, 0), i), i % len(TASK.labels)) for i in range(count)
    ]


@pytest.fixture(scope="module", params=["train", "validation"])
def drawn(request):
    return videos(request.param, getattr(TASK, request.param))


def posteriors(seen, labels):
    """P(label | what is seen), counted over all videos: (videos, classes)."""
    counts = defaultdict(lambda: np.zeros(len(TASK.labels)))
    for what, label in zip(seen, labels, strict=True):
        counts[what][label] += 1
    return np.stack([counts[what] / counts[what].sum() for what in seen])


def test_the_answer_is_two_minutes_after_the_cue(drawn):
    begins = []
    for (cue, answer, *others), _ in drawn:
        assert answer.begin - cue.end >= 120
        assert cue.begin >= 0
        assert answer.end <= long.SECONDS
        for square in (cue, answer, *others):
            assert 12 <= square.end - square.begin <= 16
        assert {square.colour for square in others} == {"grey"}
        begins.append((cue.begin, answer.begin))
    # At varying times, each with a spread of several seconds.
    assert (np.std(begins, axis=0) > 4).all()


def test_cue_and_answer_together_tell_the_class(drawn):
    labels = [label for _, label in drawn]
    both = posteriors([(s[0].colour, s[1].colour) for s, _ in drawn], labels)
    assert (both.max(1) == 1).all()


@pytest.mark.parametrize("seen", [0, 1], ids=["cue", "answer"])
def test_one_of_the_two_alone_does_not_tell_the_class(drawn, seen):
    labels = [label for _, label in drawn]
    alone = posteriors([squares[seen].colour for squares, _ in drawn], labels)
    np.testing.assert_allclose(alone, 1 / 3)


def test_the_average_of_short_clips_is_at_chance():
    """Of clips at all places, each predicted as well as counting over videos can.

    All nine pairs of colours are shown at the same moments, so that the counts are exact.
    """
    drawn = [
        (long.draw_squares(np.random.default_rng(seed), index), index % 3)
        for seed in range(30)
        for index in range(9)
    ]
    labels = [label for _, label in drawn]
    total = np.zeros((len(drawn), len(TASK.labels)))
    for begin in np.arange(0, long.SECONDS - SHORT, 2.0):
        seen = [
            tuple(
                square.colour
                for square in squares[:2]
                if square.end > begin and square.begin < begin + SHORT
            )
            for squares, _ in drawn
        ]
        assert set(map(len, seen)) <= {0, 1}
        total += posteriors(seen, labels)
    np.testing.assert_allclose(total / total.sum(1, keepdims=True), 1 / 3)


def test_nothing_but_two_colours_depends_on_the_class():
    """With the same random numbers, all else of the videos is the same."""
    times = {
        tuple((s.begin, s.end) for s in long.draw_squares(np.random.default_rng(5), index))
        for index in range(9)
    }
    assert len(times) == 1
    counts = Counter(long.colours(index) for index in range(TASK.train))
    assert set(counts) == set(itertools.product(long.CUES, long.ANSWERS))
    assert set(counts.values()) == {TASK.train // 9}
    assert TASK.validation % 9 == 0


@pytest.mark.parametrize("index", [1, 5])
def test_only_cue_and_answer_have_a_colour(index):
    frames = np.stack(list(long.frames("validation", index))).astype(int)
    assert frames.shape == (long.FRAMES, long.HEIGHT, long.WIDTH, 3)
    coloured = np.ptp(frames, axis=-1) > 0
    cue, answer, *_ = long.draw_squares(random_of("validation", index, 0), index)
    time = np.arange(long.FRAMES) / long.FPS
    for square in (cue, answer):
        shown = (square.begin <= time) & (time < square.end)
        assert 0.25 < coloured[shown].mean() < 0.6
        tint = np.array((long.CUES | long.ANSWERS)[square.colour])
        pixels = frames[shown][coloured[shown]].mean(0)
        np.testing.assert_allclose(pixels / pixels.sum(), tint / tint.sum(), atol=0.05)
        coloured[shown] = False
    assert not coloured.any()
    again = np.stack(list(long.frames("validation", index)))
    np.testing.assert_array_equal(frames, again)
    assert (frames != np.stack(list(long.frames("train", index)))).mean() > 0.5


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo_long")
    prepare_demo(folder, "long", **COUNTS)
    return folder


@pytest.mark.decodes
def test_the_files_show_the_drawn_frames_and_a_frame_a_second_is_stored(made):
    video = decode.decode_clip(made / "videos" / "train" / "00004.mp4")
    assert video.fps == long.FPS
    drawn = np.stack(list(long.frames("train", 4))).astype(float)
    assert video.frames.shape == drawn.shape
    error = video.frames.astype(float).mean(-1) - drawn.mean(-1)
    assert np.sqrt((error**2).mean()) < 6
    for name, count in COUNTS.items():
        split = open_split(made, name)
        assert len(split) == count
        assert set(split.num_frames) == {long.FRAMES}
        assert set(split.num_frames / split.fps) == {180.0}
        assert np.bincount(split.label).tolist() == [count // 3] * 3


@pytest.mark.training
def test_the_recipe_trains(made, tmp_path):
    config = recipes.demo_long()
    config.data.directory = str(made)
    config.data.demo = ""
    config.epochs, config.batch_size, config.eval.batch_size = 2, 8, 8
    config.model.update(depth=1, hidden_size=16, num_heads=2)
    config.eval.update(every_epochs=0, crops=1)
    results = train(config, tmp_path / "run")
    assert results["step"] == 2
    assert results["videos"] == COUNTS["validation"]
    assert np.isfinite(results["loss"])
