"""Whole runs of the command line: killed, asked to end, gone on with, refused."""

import json
import os
import signal
import subprocess
import time

import jax
import numpy as np
import pytest
from conftest import command, environment, interruptible, scalars, tiny_run

from timesformer_jax import checkpoints

LONG = {"epochs": 15, "checkpoint.every_steps": 5, "eval.every_epochs": 0}  # 120 steps
LAST = 120


@pytest.fixture(scope="module")
def whole(demo_data, tmp_path_factory):
    """The workdir of a run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    subprocess.run(command(*tiny_run(demo_data, workdir, **LONG)), env=environment(), check=True)
    return workdir


def interrupted(arguments, workdir, how):
    """Starts a run, sends it a signal once it has a checkpoint; returns how it ended."""
    run = subprocess.Popen(
        interruptible(command(*arguments)), env=environment(), stderr=subprocess.PIPE, text=True
    )
    while not (workdir / "checkpoints" / "10").is_dir():
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.01)
    run.send_signal(how)
    _, errors = run.communicate()
    assert not (workdir / "results.json").exists()
    return run.returncode, errors


def assert_same_run(workdir, whole):
    """Every loss of every step, and the last parameters, bit for bit."""
    expected, found = scalars(whole, "train/loss"), scalars(workdir, "train/loss")
    assert sorted(found) == sorted(expected) == list(range(1, LAST + 1))
    for step, losses in found.items():
        assert set(losses) == set(expected[step]), step
    (_, ours), (_, theirs) = map(checkpoints.load_parameters, (workdir, whole))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    results = [json.loads((w / "results.json").read_text()) for w in (workdir, whole)]
    assert results[0] == results[1]


def test_killed_and_started_again_it_is_the_same_run(demo_data, whole, tmp_path, timesformer):
    arguments = tiny_run(demo_data, tmp_path / "run", **LONG)
    status, _ = interrupted(arguments, tmp_path / "run", signal.SIGKILL)
    assert status == -signal.SIGKILL
    again = timesformer(*arguments)
    assert "going on from step" in again.stderr
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_end_it_saves_and_says_so(how, demo_data, whole, tmp_path, timesformer):
    arguments = tiny_run(demo_data, tmp_path / "run", **LONG | {"checkpoint.every_steps": 10})
    status, errors = interrupted(arguments, tmp_path / "run", how)
    assert status == 128 + how
    assert "run the same command again to go on" in errors
    said = int(errors.split("asked to end: step ")[1].split()[0])
    assert checkpoints.Checkpoints(tmp_path / "run" / "checkpoints").latest_step() == said
    timesformer(*arguments)
    assert_same_run(tmp_path / "run", whole)


def test_a_finished_run_says_it_is_done(demo_data, whole, timesformer):
    before = (whole / "results.json").read_bytes()
    done = timesformer(*tiny_run(demo_data, whole, **LONG))
    assert f"nothing to do: {LAST} of {LAST} steps are done" in done.stderr
    assert "top-1" in done.stdout
    assert (whole / "results.json").read_bytes() == before
    assert sorted(scalars(whole, "train/loss")) == list(range(1, LAST + 1))


def test_what_a_run_leaves(whole, demo_data):
    results = json.loads((whole / "results.json").read_text())
    assert results["videos"] == 21
    assert 0 <= results["top1"] <= results["top5"] <= 1
    assert len(results["classes"]) == 8
    card, _ = checkpoints.load_parameters(whole)
    assert card.labels[0] == "down"
    assert (card.clip.frames, card.clip.rate, card.clip.crop, card.clip.short_side) == (
        8,
        2,
        32,
        40,
    )
    assert card.config["data"]["directory"] == str(demo_data)
    assert sorted(p for p in os.listdir(whole / "checkpoints") if p.isdigit()) == [
        "110", "115", "120",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model.depth": 3}, "depth is 3, saved was 2"),
        ({"batch_size": 16}, "batch_size is 16, saved was 8"),
        ({"optimizer.name": "sgd"}, "optimizer.name is sgd, saved was adamw"),
        ({"epochs": 0}, "--config.epochs must be at least 1"),
        ({"eval.views": 0}, "--config.eval.views must be at least 1"),
        ({"eval.crops": 2}, "crops must be 1 or 3"),
        ({"optimizer.learning_rate": "nan"}, "learning_rate must be above 0"),
        ({"data.jitter": "(40,)"}, "two sizes, ascending"),
        ({"model.num_classes": 5}, "the data in .* has 8 labels, the config's model 5"),
        ({"data.train_split": "trian"}, "trian"),
        ({"mesh.data": 3}, "does not fit 1 devices"),
        ({"batch_size": 100}, "64 clips, fewer than a batch of 100"),
        ({"data.directory": "/nowhere"}, "/nowhere"),
        ({"model.attention": "joined"}, "did you mean 'joint'"),
        ({"pretrained": "/nowhere.pyth", "seed": 0}, None),
    ],
)
def test_a_run_that_cannot_be_is_one_line_and_keeps_what_there_is(
    demo_data, whole, timesformer, change, said
):
    import re

    before = sorted(os.listdir(whole / "checkpoints"))
    done = timesformer(*tiny_run(demo_data, whole, **LONG | change), check=False)
    if said is None:  # a run that is done needs no start
        assert done.returncode == 0
    else:
        assert done.returncode == 2, done.stderr
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("error: ")
        assert re.search(said, last)
        assert "Traceback" not in done.stderr
    assert sorted(os.listdir(whole / "checkpoints")) == before


def test_a_damaged_checkpoint_is_one_line(demo_data, whole, tmp_path, timesformer):
    import shutil

    shutil.copytree(whole, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / str(LAST)
    for path in (newest / "params").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (tmp_path / "run" / "results.json").unlink()
    arguments = tiny_run(demo_data, tmp_path / "run", **LONG)
    done = timesformer(*arguments, check=False)
    assert done.returncode == 2
    assert "remove that folder to go on from the checkpoint before it" in done.stderr
    shutil.rmtree(newest)
    timesformer(*arguments)
    assert_same_parameters(tmp_path / "run", whole)


def assert_same_parameters(workdir, whole):
    (_, ours), (_, theirs) = map(checkpoints.load_parameters, (workdir, whole))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_full_disk_is_one_line_and_keeps_earlier_checkpoints(demo_data, whole, tmp_path):
    # A limit on the size of a file stands for a disk that has no room for the next checkpoint.
    import shutil

    shutil.copytree(whole, tmp_path / "run")
    arguments = tiny_run(demo_data, tmp_path / "run", **LONG | {"epochs": 16})
    run = subprocess.run(
        ["bash", "-c", 'ulimit -f 8; trap "" XFSZ; exec "$@"', "_", *command(*arguments)],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2, run.stderr
    assert "free space and run again: earlier checkpoints are kept" in run.stderr
    assert str(LAST) in os.listdir(tmp_path / "run" / "checkpoints")
    assert_same_parameters(tmp_path / "run", whole)
