"""The input's benchmark on a data set that it makes itself: what it counts, and what it refuses."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from timesformer_jax import recipes
from timesformer_jax.benchmark import input as benchmark
from timesformer_jax.benchmark import input_reference, input_videos
from timesformer_jax.cli.main import load_command
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.data.input import pipeline
from timesformer_jax.data.records.open import open_split
from timesformer_jax.errors import InputError

pytestmark = [pytest.mark.processes, pytest.mark.decodes]

OPTIONS = {"batch_size": 2, "short_side_range": (256, 320), "flip": True, "seed": 0}


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    directory = tmp_path_factory.mktemp("synthetic")
    input_videos.make(directory, videos=2)
    return directory


def test_synthetic_videos_are_as_kinetics_would_be(synthetic):
    split = open_split(synthetic, "train")
    assert split.num_frames.tolist() == [300, 300]
    assert split.stride.tolist() == [4, 4]
    assert split.fps.tolist() == [30, 30]
    assert (split.height[0], split.width[0]) == (256, 340)
    assert 8e3 < split.size.mean() / 75 < 30e3
    moves = list(itertools.islice(input_videos.frames(0), 2))
    assert np.abs(moves[0].astype(int) - moves[1]).mean() > 0.1


def test_what_is_measured_is_what_the_clips_are(synthetic, tmp_path, capsys):
    path = tmp_path / "input.json"
    benchmark.benchmark_input(data=synthetic, batch_size=2, batches=10, reference=True, json=path)
    figures = json.loads(path.read_text())
    split = open_split(synthetic, "train")
    data = figures["data"]
    assert data["bytes_a_record"] == split.size.mean()
    assert data["stored_frames_a_record"] == 75
    assert data["decoded_bytes_a_clip"] == 8 * 227 * 227 * 3
    # 8 frames of 75, apart from each other, and 12 bytes for each that they span.
    assert 1 < data["read_a_byte_of_frames"]["min"] <= data["read_a_byte_of_frames"]["max"] < 1.02
    assert 0.07 < data["read_bytes_a_clip"] / split.size.mean() < 0.15
    assert figures["settings"]["batches"] == 10
    for name in ("ours", "reference", "ratio"):
        for kind in ("wall", "cpu"):
            spread = figures[name][kind]
            assert 0 < spread["min"] <= spread["median"] <= spread["max"]
    assert list(figures["memory"]) == ["begin", "10%", "50%", "100%"]
    assert figures["memory"]["begin"] > 50e6
    # A stage alone may take less than the rounds differ by.
    stages = ["whole", "planning", "reading", "decoding", "batching"]
    assert list(figures["stages"]) == stages
    assert all(took["min"] <= took["max"] for took in figures["stages"].values())
    assert figures["stages"]["whole"]["min"] > 0
    assert figures["iterator_state_bytes"] < 1e6
    out = capsys.readouterr().out
    assert f"2 records of {split.size.mean() / 1e3:.0f} kB, 75 frames each" in out
    assert f"{figures['ratio']['cpu']['median']:.2f} (" in out
    assert f"a clip reads {data['read_bytes_a_clip'] / 1e3:.0f} kB, 1.0" in out


def test_the_reference_sees_the_windows_that_are_planned(synthetic):
    split = open_split(synthetic, "train")
    # Of the frame's own size, so that a crop_box is cut and not resized.
    spec, options = ClipSpec(frames=3, crop=224), OPTIONS | {"short_side_range": (256, 256)}
    request = next(pipeline.train_requests(split, spec, **options))
    request = dataclasses.replace(request, crop_boxes=np.rint(request.crop_boxes))
    clips = [input_reference.Clip(*clip) for clip in benchmark.reference_clips(split, request)]
    found = input_reference.decode(clips, 224)
    batch, _ = next(pipeline.train_batches(split, spec, **options))
    for row, (top, left, side) in enumerate(request.crop_boxes[:, 0].astype(int)):
        assert side == 224
        expected = batch["frames"][row, :, top : top + 224, left : left + 224]
        if batch["flip"][row]:
            expected = expected[:, :, ::-1]
        difference = np.abs(found[row].astype(int) - expected)[:, 2:-2, 2:-2]
        assert difference.max() <= 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["benchmark"], "no command 'benchmark'; there are: benchmark input"),
        (["benchmark", "inputs"], "no command 'benchmark inputs'; did you mean 'benchmark input'?"),
        (["benchmark", "input"], "say what to read with --data"),
        (["benchmark", "input", "--data=/nowhere"], "/nowhere"),
        (
            ["benchmark", "input", "--data=x", "--short_side_range=a,b"],
            "--short_side_range=a,b must be two sizes",
        ),
        (
            ["benchmark", "input", "--data=x", "--short_side_range=200,300"],
            "of at least the crop, 224",
        ),
        (["benchmark", "input", "--data=x", "--json=/nowhere/x"], "--json=/nowhere/x"),
        (["benchmark", "input", "--data=x", "--synthetic=y"], "--data or --synthetic, not both"),
    ],
)
def test_impossible_measurements_give_one_line_errors(arguments, said):
    with pytest.raises(InputError) as error:
        load_command(arguments)()
    assert said in str(error.value)


def test_a_recipe_says_what_a_batch_is(tmp_path):
    config = recipes.kinetics400()
    with pytest.raises(InputError, match="leave out --frames"):
        benchmark.benchmark_input(data="x", config=config, frames=4)
    with pytest.raises(InputError, match=r"no folder .*data/k400"):
        benchmark.benchmark_input(config=config)
