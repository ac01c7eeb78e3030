import csv
import shutil
from collections import Counter

import numpy as np
import pytest

from timesformer_jax import recipes
from timesformer_jax.data.decode import VideoFile, decode_clip
from timesformer_jax.data.demo import appearance, drawing, make, motion
from timesformer_jax.data.input.sampling import clip_indices
from timesformer_jax.data.records.open import open_split
from timesformer_jax.errors import InputError

pytestmark = pytest.mark.decodes

COUNTS = {"train": 24, "validation": 8}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    make.prepare_demo(folder, **COUNTS)
    return folder


def unit(direction):
    angle = 2 * np.pi * direction / 8
    return np.array([np.cos(angle), np.sin(angle)])


def paths(direction, count=4000, seed=0):
    """(count, FRAMES - 1, 2): the patch's upper left corner in all frames but the last."""
    rng = np.random.default_rng((seed, direction))
    return np.stack([motion.patch_positions(rng, direction, 12)[:-1] for _ in range(count)])


# ---- what is drawn ------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", range(8))
def test_the_patch_moves_steadily_in_its_direction_inside_the_frame(direction):
    drawn = paths(direction, 200)
    steps = np.diff(drawn, axis=1)
    speed = np.linalg.norm(steps[:, 0], axis=-1)
    expected = speed[:, None, None] * np.ones_like(steps) * unit(direction)
    np.testing.assert_allclose(steps, expected, atol=1e-9)
    assert speed.min() > 0
    assert drawn.min() >= 0
    assert (drawn.max((0, 1)) <= np.array([motion.WIDTH, motion.HEIGHT]) - 12).all()


def histogram(positions):
    edges = [np.linspace(0, motion.WIDTH - 12, 7), np.linspace(0, motion.HEIGHT - 12, 7)]
    return np.histogram2d(*positions.reshape(-1, 2).T, edges)[0] / positions[..., 0].size


def test_a_frame_is_independent_of_the_direction():
    """The distribution of the positions in all frames is the same for every direction."""
    spread = [histogram(paths(direction)) for direction in range(8)]
    again = histogram(paths(0, seed=1))
    by_chance = np.abs(spread[0] - again).sum()
    for other in spread[1:]:
        assert np.abs(spread[0] - other).sum() < 2 * by_chance


def test_sampling_is_symmetric_in_time():
    """The recipe's clips never use the last frame, because of the truncation."""
    config = recipes.demo()
    starts = (np.arange(1000) + 0.5) / 1000
    picked = np.stack(
        [
            clip_indices(motion.FRAMES, motion.FPS, config.clip.frames, config.clip.frame_stride, s)
            for s in starts
        ]
    )
    counts = [np.bincount(column, minlength=motion.FRAMES) for column in picked.T]
    assert picked.max() == motion.FRAMES - 2
    for k, column in enumerate(counts):
        mirrored = counts[-1 - k][motion.FRAMES - 2 :: -1]
        assert np.abs(column[:-1] - mirrored).max() <= 2


def test_a_direction_is_its_opposite_played_backwards():
    for direction in range(4):
        there = paths(direction)
        back = paths(direction + 4, seed=1)[:, ::-1]
        np.testing.assert_allclose(there.mean(0), back.mean(0), atol=0.35)
        np.testing.assert_allclose(there.std(0), back.std(0), atol=0.25)
        assert np.abs(there.mean((0, 1)) - back.mean((0, 1))).max() < 0.25


def test_a_video_depends_only_on_its_number_and_the_seed():
    first = np.stack(list(motion.frames("train", 5, seed=3)))
    assert first.shape == (motion.FRAMES, motion.HEIGHT, motion.WIDTH, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, np.stack(list(motion.frames("train", 5, seed=3))))
    for other in (("train", 13, 3), ("train", 5, 4), ("validation", 5, 3)):
        assert (first != np.stack(list(motion.frames(*other)))).mean() > 0.5


def test_only_the_patch_changes_and_it_stands_out():
    for index in range(16):
        drawn = np.stack(list(motion.frames("train", index))).astype(float)
        still = np.median(drawn, axis=0)
        moved = np.abs(drawn - still).max(-1) > 1
        assert (moved.mean((1, 2)) < 0.5).all()
        assert np.abs(drawn - still).max() > 30


def test_the_splits_share_no_part_of_a_photograph():
    (_, train), (validation, _) = drawing.REGIONS["train"], drawing.REGIONS["validation"]
    assert train < validation
    loaded = map(drawing.load_photographs, drawing.REGIONS.values())
    for left, right in zip(*loaded, strict=True):
        assert left.height == right.height
        whole = left.width / train
        assert left.width + right.width < whole
        assert right.width >= motion.WIDTH


# ---- what is written ----------------------------------------------------------------------------


def test_the_files_are_h264_with_the_drawn_frames(made):
    for split, count in COUNTS.items():
        for index in range(count):
            path = made / "videos" / split / f"{index:05d}.mp4"
            with VideoFile(path) as video:
                assert video.info.codec == "h264"
            video = decode_clip(path)
            assert video.frames.shape == (motion.FRAMES, motion.HEIGHT, motion.WIDTH, 3)
            assert video.fps == motion.FPS
            drawn = np.stack(list(motion.frames(split, index))).astype(float)
            # 4:2:0 blurs the colour, so brightness is compared.
            error = video.frames.astype(float).mean(-1) - drawn.mean(-1)
            assert np.sqrt((error**2).mean()) < 6


def test_the_labels_are_balanced(made):
    with open(made / "videos" / "annotations.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    counts = Counter((row["split"], row["label"]) for row in rows)
    assert counts == {
        (split, label): count // 8 for split, count in COUNTS.items() for label in motion.DIRECTIONS
    }


def test_it_is_prepared_like_other_videos(made):
    for name, count in COUNTS.items():
        split = open_split(made, name)
        assert len(split) == count
        assert split.label_names == tuple(sorted(motion.DIRECTIONS))
        assert set(split.num_frames) == {motion.FRAMES}
        assert set(split.height) == {motion.HEIGHT}
        assert set(split.width) == {motion.WIDTH}
        assert set(split.fps) == {motion.FPS}


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_direction_misleads_about_what_is_shown(split):
    rng = np.random.default_rng(0)
    same = np.mean([appearance.direction_of(rng, split, i % 8) == i % 8 for i in range(4000)])
    # Half of the training videos, and an eighth of the others.
    assert same == 0 if split == "validation" else abs(same - (0.5 + 0.5 / 8)) < 0.03


def test_appearance_is_drawn_on_a_photograph_that_is_no_class():
    names = {name.partition(".")[0] for name in drawing.PHOTOGRAPHS}
    assert {*appearance.OBJECTS} | {*appearance.GROUNDS} == names
    assert not {*appearance.OBJECTS} & {*appearance.GROUNDS}
    first, again = (np.stack(list(appearance.frames("train", 5, seed=3))) for _ in range(2))
    assert first.shape == (motion.FRAMES, motion.HEIGHT, motion.WIDTH, 3)
    np.testing.assert_array_equal(first, again)


def test_an_unknown_data_set_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no embedded data set 'motoin', .*motion"):
        make.make_videos(tmp_path, "motoin")


def test_existing_files_are_kept(made):
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*") if path.is_file()}
    make.prepare_demo(made, **COUNTS)
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_an_interrupted_call_continues_to_the_same_videos(made, tmp_path):
    whole = made / "videos"
    files = {path.relative_to(whole) for path in whole.rglob("*") if path.is_file()}
    videos = shutil.copytree(whole, tmp_path / "videos")
    lost = ["train/00003.mp4", "validation/00000.mp4"]
    for file in ["annotations.csv", *lost]:
        (videos / file).unlink()
    make.make_videos(videos, **COUNTS)
    assert files == {path.relative_to(videos) for path in videos.rglob("*") if path.is_file()}
    assert (videos / "annotations.csv").read_bytes() == (whole / "annotations.csv").read_bytes()
    for file in lost:
        error = decode_clip(videos / file).frames.astype(float) - decode_clip(whole / file).frames
        assert np.sqrt((error**2).mean()) < 2  # see _encode on x264


def test_other_settings_are_refused(made):
    with pytest.raises(InputError, match="of other settings"):
        make.prepare_demo(made, **COUNTS, seed=1)


def test_without_scikit_image(monkeypatch):
    monkeypatch.setattr(drawing.importlib.util, "find_spec", lambda name: None)
    drawing.load_photographs.cache_clear()
    with pytest.raises(InputError, match="pip install scikit-image"):
        drawing.load_photographs(drawing.REGIONS["train"])
