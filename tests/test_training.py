"""Whole runs of the command line: killed, asked to end, gone on with, refused."""

import json
import os
import re
import shutil
import signal

import forked
import jax
import numpy as np
import pytest
from conftest import environment, scalars, tiny_run
from forked import run_command

from timesformer_jax.checkpoints import store as checkpoints

pytestmark = [pytest.mark.processes, pytest.mark.training]

# 48 steps, evaluated after 16, 32 and 48.
LONG = {"epochs": 6, "checkpoint.every_steps": 4, "eval.every_epochs": 2, "eval.crops": 1}
LAST = 48


@pytest.fixture(scope="module")
def whole(demo_data, tmp_path_factory):
    """The workdir of a run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    arguments = tiny_run(demo_data, workdir, **LONG, **{"profile.steps": 2})
    done = forked.run(run_command, *arguments, environment=environment())
    assert done.returncode == 0, done.stderr
    (workdir.parent / "stderr").write_text(done.stderr)
    return workdir


def interrupted(arguments, workdir, how, when):
    """A run that gets a signal in an evaluation or after that step; returns how it ended."""
    if isinstance(when, int):
        when = workdir / "checkpoints", when
    run = forked.run(forked.run_command_that_ends, how, when, *arguments, environment=environment())
    assert not (workdir / "results.json").exists()
    return run.returncode, run.stderr


def assert_same_run(workdir, whole):
    """Every loss of every step, and the last parameters, bit for bit."""
    expected, found = scalars(whole, "train/loss"), scalars(workdir, "train/loss")
    assert sorted(found) == sorted(expected) == list(range(1, LAST + 1))
    for step, losses in found.items():
        assert set(losses) == set(expected[step]), step
    (_, ours), (_, theirs) = map(checkpoints.load_parameters, (workdir, whole))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    results = [json.loads((w / "results.json").read_text()) for w in (workdir, whole)]
    speeds = [r.pop("clips_per_second") for r in results]
    assert results[0] == results[1]
    assert all(speed > 0 for speed in speeds)
    validation = [(w / "checkpoints" / "validation.json").read_text() for w in (workdir, whole)]
    assert validation[0] == validation[1]


def test_killed_and_started_again_it_is_the_same_run(demo_data, whole, tmp_path, timesformer):
    arguments = tiny_run(demo_data, tmp_path / "run", **LONG)
    status, _ = interrupted(arguments, tmp_path / "run", signal.SIGKILL, 8)
    assert status == -signal.SIGKILL
    again = timesformer(*arguments)
    assert "going on from step 8" in again.stderr
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize(("how", "when"), [(signal.SIGTERM, "evaluation"), (signal.SIGINT, 8)])
def test_asked_to_end_it_saves_and_says_so(how, when, demo_data, whole, tmp_path, timesformer):
    arguments = tiny_run(demo_data, tmp_path / "run", **LONG | {"checkpoint.every_steps": 8})
    status, errors = interrupted(arguments, tmp_path / "run", how, when)
    assert status == 128 + how
    assert "run the same command again to go on" in errors
    said = int(errors.split("asked to end: step ")[1].split()[0])
    ended = checkpoints.Checkpoints(tmp_path / "run" / "checkpoints")
    assert ended.latest_step() == said
    # Within the step: an evaluation is left, and comes first when the run goes on.
    assert said == (16 if how == signal.SIGTERM else 9)
    assert not ended.validation
    timesformer(*arguments)
    assert_same_run(tmp_path / "run", whole)


def test_a_finished_run_says_it_is_done(demo_data, whole, timesformer):
    kept = ("results.json", "recipe.json", "curves.csv")
    before = [(whole / name).read_bytes() for name in kept]
    # It needs no start.
    changes = {"pretrained": "/nowhere.pyth", "optimizer.learning_rate": 0.5}
    done = timesformer(*tiny_run(demo_data, whole, **LONG, **changes))
    assert f"nothing to do: {LAST} of {LAST} steps are done" in done.stderr
    assert "top-1" in done.stdout
    told = next(line for line in done.stderr.splitlines() if "nothing was done with" in line)
    assert "optimizer.learning_rate 0.5 (it was 0.002)" in told
    assert told.endswith("start in another --workdir")
    assert "goes on" not in done.stderr
    assert [(whole / name).read_bytes() for name in kept] == before
    assert sorted(scalars(whole, "train/loss")) == list(range(1, LAST + 1))


def test_files_have_the_mode_that_the_person_asked_for(whole):
    """Libraries that write through temporary files make them readable for their owner only."""
    os.umask(mask := os.umask(0))
    for path in whole.rglob("*"):
        wanted = (0o777 if path.is_dir() else 0o666) & ~mask
        assert path.stat().st_mode & 0o777 == wanted, path


def test_what_a_run_leaves(whole, demo_data):
    results = json.loads((whole / "results.json").read_text())
    assert results["videos"] == 21
    assert results["step"] == LAST
    assert results["config"] == "demo"
    assert results["versions"]["jax"] == jax.__version__
    assert results["devices"] == {"kind": "cpu", "count": 1}
    assert 0 <= results["top1"] <= results["top5"] <= 1
    assert len(results["classes"]) == 8
    metadata, _ = checkpoints.load_parameters(whole)
    assert metadata.labels[0] == "down"
    assert (
        metadata.clip.frames,
        metadata.clip.frame_stride,
        metadata.clip.crop,
        metadata.clip.short_side,
    ) == (
        8,
        2,
        32,
        40,
    )
    assert metadata.config["data"]["directory"] == str(demo_data)
    assert list((whole / "profile").rglob("*.xplane.pb"))

    validation = {step: top1 for step, [top1] in scalars(whole, "validation/top1").items()}
    best = max(validation, key=lambda step: (validation[step], step))
    assert sorted(validation) == [16, 32, LAST]
    assert results["best"]["step"] == best
    assert results["best"]["top1"] == pytest.approx(validation[best])
    # What goes, goes when the next one is saved: the last one's validation is not in it yet.
    before = max((16, 32), key=lambda step: (validation[step], step))
    kept = {int(p) for p in os.listdir(whole / "checkpoints") if p.isdigit()}
    assert kept == {before, 40, 44, 48}


def test_what_is_logged_of_speed(whole):
    # The first step of a process compiles and is not counted.
    seconds = scalars(whole, "train/step_seconds")
    assert sorted(seconds) == list(range(2, LAST + 1))
    rates, waits = (scalars(whole, f"train/{name}") for name in ("clips_per_second", "data_wait"))
    for step, [taken] in seconds.items():
        assert rates[step][0] == pytest.approx(8 / taken, rel=1e-4)
        assert 0 <= waits[step][0] <= 1
    assert not scalars(whole, "train/mfu")  # nobody states the peak of this CPU
    # Log lines have lines of their own beside the progress bars.
    for line in re.split(r"[\r\n]", (whole.parent / "stderr").read_text()):
        if "logging_writer" in line:
            assert re.match(r"(\x1b\[A)?I\d{4} ", line), line


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model.depth": 3}, "depth is 3, saved was 2"),
        ({"batch_size": 16}, "batch_size is 16, saved was 8"),
        ({"optimizer.name": "sgd"}, "optimizer.name is sgd, saved was adamw"),
        ({"epochs": 0}, "--config.epochs must be a whole number from 1"),
        ({"eval.views": 0}, "--config.eval.views must be a whole number from 1"),
        ({"eval.crops": 2}, "eval.crops must be 1 or 3, not 2"),
        ({"optimizer.learning_rate": "nan"}, "learning_rate must be a number above 0"),
        ({"data.short_side_range": "(40,)"}, "two sizes, ascending"),
        ({"model.num_classes": 5}, "the data in .* has 8 labels, the config's model 5"),
        ({"data.train_split": "trian"}, "trian"),
        ({"mesh.data": 3}, "does not fit 8 devices"),
        ({"batch_size": 104}, "64 clips, fewer than a batch of 104"),
        ({"data.directory": "/nowhere"}, "/nowhere"),
        ({"model.attention": "joined"}, "did you mean 'joint'"),
    ],
)
def test_a_refused_run_changes_no_checkpoint(demo_data, whole, refusal, change, said):
    before = sorted(os.listdir(whole / "checkpoints"))
    assert re.search(said, refusal(*tiny_run(demo_data, whole, **LONG | change)))
    assert sorted(os.listdir(whole / "checkpoints")) == before


def test_a_damaged_checkpoint_gives_a_one_line_error(demo_data, whole, tmp_path, timesformer):
    shutil.copytree(whole, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / str(LAST)
    for path in (newest / "params").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (tmp_path / "run" / "results.json").unlink()
    arguments = tiny_run(demo_data, tmp_path / "run", **LONG)
    done = timesformer(*arguments)
    told = [line for line in done.stderr.splitlines() if "cannot be restored" in line]
    assert len(told) == 1
    assert told[0].endswith("the earlier step 44 is taken")
    assert "Traceback" not in done.stderr
    assert "going on from step 44" in done.stderr
    assert_same_parameters(tmp_path / "run", whole)


def assert_same_parameters(workdir, whole):
    (_, ours), (_, theirs) = map(checkpoints.load_parameters, (workdir, whole))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_full_disk_gives_a_one_line_error_and_keeps_earlier_checkpoints(
    demo_data, whole, tmp_path
):
    # A limit on the size of a file stands for a disk that has no room for the next checkpoint.
    shutil.copytree(whole, tmp_path / "run")
    arguments = tiny_run(demo_data, tmp_path / "run", **LONG | {"epochs": 7})
    run = forked.run(
        forked.run_command_with_small_files, 8192, *arguments, environment=environment()
    )
    assert run.returncode == 2, run.stderr
    assert "free space and run again: earlier checkpoints are kept" in run.stderr
    assert str(LAST) in os.listdir(tmp_path / "run" / "checkpoints")
    assert_same_parameters(tmp_path / "run", whole)
