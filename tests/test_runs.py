"""What a run writes and says beside its checkpoints: curves, forecasts, sweeps."""

import csv
import json
import logging
import os

import numpy as np
import pytest
from conftest import tiny_run
from PIL import Image
from tensorboard.backend.event_processing import event_file_loader
from test_recipes import split_of

import timesformer_jax as tsf
from timesformer_jax import recipes, storage
from timesformer_jax.cli.main import load_command
from timesformer_jax.data.demo import make as demo
from timesformer_jax.distributed.mesh import make_mesh
from timesformer_jax.errors import InputError
from timesformer_jax.evaluation.metrics import MultiLabelResults, Results
from timesformer_jax.models.timesformer import TimeSformerConfig
from timesformer_jax.training import forecast, loop, run, sweep
from timesformer_jax.training.curves import Scalars


def rows(path):
    with open(path) as table:
        return list(csv.DictReader(table))


def written(workdir, *steps, done=0):
    """A process of a run that had finished `done` steps and reports the others."""
    scalars = Scalars(storage.absolute(workdir))
    scalars.begin(done, {"seed": 0, "clip.mean": (0.5,) * 3})
    for step in steps:
        scalars.write(step, {"train/loss": 1 / step})
        if step % 4 == 0:
            scalars.write(step, {"validation/loss": 2 / step, "validation/top1": 0.5})
    scalars.save()
    scalars.draw()
    scalars.close()


def test_curves_of_a_resumed_run_equal_those_of_an_uninterrupted_one(tmp_path):
    written(tmp_path / "whole", *range(1, 9))
    written(tmp_path / "parts", *range(1, 7))
    written(tmp_path / "parts", *range(5, 9), done=4)  # from the checkpoint of step 4
    texts = [(tmp_path / name / "curves.csv").read_text() for name in ("whole", "parts")]
    assert texts[0] == texts[1]
    found = rows(tmp_path / "whole" / "curves.csv")
    assert [float(row["train/loss"]) for row in found] == [1 / step for step in range(1, 9)]
    assert [row["validation/loss"] for row in found] == ["", "", "", "0.5", "", "", "", "0.25"]
    with Image.open(tmp_path / "parts" / "curves.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 5  # something is drawn


def test_a_table_that_somebody_damaged_is_begun_anew(tmp_path, caplog):
    (tmp_path / "curves.csv").write_text("step,train/loss\nx,1\n")
    written(tmp_path, 5, done=4)
    assert [row["step"] for row in rows(tmp_path / "curves.csv")] == ["5"]
    assert "its earlier rows are lost" in caplog.text


def test_the_loss_of_an_evaluation():
    probabilities = np.array([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125], [1.0, 0.0, 0.0]])
    results = Results(
        ("a", "b", "c"), np.array(["x", "y", "z"]), np.array([0, 2, 0]), probabilities
    )
    assert results.loss == pytest.approx((np.log(2) + np.log(8)) / 3)
    assert results.to_json()["loss"] == results.loss
    # A float32 softmax can give zero.
    wrong = Results(("a", "b", "c"), np.array(["z"]), np.array([1]), probabilities[2:])
    assert 80 < wrong.loss < 100
    truth = np.array([[True, False], [True, True]])
    found = MultiLabelResults(
        ("a", "b"), np.array(["x", "y"]), truth, np.array([[0.5, 0.25], [0.125, 1.0]])
    )
    assert found.scalars()["loss"] == pytest.approx((np.log(2) + np.log(4 / 3) + np.log(8)) / 4)


def announced(caplog, model, epochs=15, **fields):
    config = recipes.finetune()
    config.pretrained = ""
    config.epochs = epochs
    config.update(fields)
    split, steps = split_of([0, 1] * 20), range(0, epochs * 5)
    with caplog.at_level(logging.INFO):
        forecast.announce(config, model, split, split, make_mesh(), steps)
    return caplog.text


def test_base_from_random_parameters_on_a_cpu_is_warned_of(caplog):
    said = announced(caplog, TimeSformerConfig(num_classes=2), epochs=1000)
    assert "finetune: 121.3M parameters, divided attention, clips of 8 x 224, on 8 x cpu" in said
    assert "40 clips of 2 classes, 40 for evaluation: 1000 epochs, 5000 steps of 8 clips" in said
    assert "input pipeline: up to 0.0" in said
    assert "GiB for 32 clips of 8 frames in flight, and 0." in said  # four batches of 8
    assert "--config=from_scratch_small trains a small model in minutes" in said
    caplog.clear()
    said = announced(caplog, TimeSformerConfig(num_classes=2), epochs=1000, pretrained="x.pth")
    assert "--config.optimizer.trainable=head" in said


def test_an_input_that_needs_more_memory_than_there_is_is_warned_of(caplog, monkeypatch):
    monkeypatch.setattr(forecast, "physical_memory", lambda: 2**20)
    announced(caplog, tsf.preset("timesformer_tiny", num_classes=2), clip={"crop": 32})
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith("input pipeline: up to 0.0")
    assert "this machine has 0.00098 GiB: lower --config.batch_size or" in warning


def test_a_small_model_gives_no_warning(caplog):
    said = announced(caplog, tsf.preset("timesformer_tiny", num_classes=2), clip={"crop": 32})
    assert "parameters, divided" in said
    assert "at best" not in said


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (89, "89 s"), (90, "2 min"), (3599, "60 min"), (5400, "1 h 30 min"),
     (12000, "3 h 20 min"), (200_000, "2 days")],
)  # fmt: skip
def test_durations(seconds, text):
    assert forecast.duration(seconds) == text


def test_the_demo_is_made_only_where_nothing_else_is(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(demo, "prepare_demo", lambda directory, task: made.append(directory))
    mine = tmp_path / "mine"
    (mine / "videos").mkdir(parents=True)
    run._make_demo(str(mine), "motion")  # empty folders
    (mine / "videos" / "a.mp4").write_bytes(b"mine")
    run._make_demo(str(mine), "motion")
    run._make_demo(str(tmp_path / "new"), "motion")
    run._make_demo("tfds:ucf101", "motion")
    run._make_demo("gs://bucket/data", "motion")
    (mine / "videos" / demo.SETTINGS).write_text("{}")
    run._make_demo(str(mine), "motion")  # a demo that was interrupted
    assert made == [str(mine), str(tmp_path / "new"), str(mine)]
    assert sorted(os.listdir(tmp_path)) == ["mine"]


def test_train_is_public():
    assert tsf.train is loop.train


@pytest.mark.training
def test_a_sweep_compares_its_runs_and_goes_on_after_one_that_fails(demo_data, tmp_path, capsys):
    arguments = tiny_run(
        demo_data, tmp_path, epochs=1, **{
            "batch_size": "8,104", "model.depth": 1, "eval.every_epochs": 0,
            "eval.crops": 1, "optimizer.warmup_epochs": 0,
        },
    )  # fmt: skip
    with pytest.raises(
        InputError, match=r"1 of 2 runs failed: batch_size=104: .* fewer than a batch of 104"
    ):
        load_command(["sweep", *arguments[1:]])()
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "batch_size=8" / "results.json").read_text())
    [row] = rows(tmp_path / sweep.TABLE)
    assert row["run"] == "batch_size=8"
    assert row["batch_size"] == "8"
    assert float(row["top1"]) == results["top1"]
    assert "batch_size" in printed
    assert f"{results['loss']:.4g}" in printed
    assert plugins(tmp_path) == plugins(tmp_path / "batch_size=8" / "tensorboard") == {
        "hparams"
    }  # fmt: skip


def plugins(folder):
    """The plugins of TensorBoard, other than that of scalars, that a folder has events for."""
    names = {
        value.metadata.plugin_data.plugin_name
        for path in folder.glob("events*")
        for event in event_file_loader.EventFileLoader(str(path)).Load()
        for value in event.summary.value
    }
    return names - {"scalars", ""}
