"""Videos with any number of labels: from a csv to training, evaluation and prediction."""

import contextlib
import csv
import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import tiny_run
from flax import nnx
from videos import write_video

from timesformer_jax.checkpoints.load import load
from timesformer_jax.cli.main import load_command
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.data.records.open import open_split
from timesformer_jax.distributed.mesh import make_mesh, put_batch
from timesformer_jax.errors import InputError
from timesformer_jax.evaluation.multi_view import match_labels
from timesformer_jax.inference.predictor import Predictor
from timesformer_jax.models.config import TimeSformerConfig
from timesformer_jax.models.timesformer import TimeSformer, parameters, with_parameters
from timesformer_jax.recipes import recipes
from timesformer_jax.training.optimizer import make_optimizer
from timesformer_jax.training.step import abstract_state, init_state, make_train_step
from timesformer_jax.transforms.augmentation import OFF, Augmentation
from timesformer_jax.transforms.preprocess import preprocess

pytestmark = [pytest.mark.processes, pytest.mark.training]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_the_mean_cross_entropy_of_each_class(smoothing):
    clip = ClipSpec(frames=2, crop=8)
    model = TimeSformerConfig(
        num_classes=3, image_size=8, num_frames=2, patch_size=4, hidden_size=8, depth=1,
        num_heads=2, drop_path=0.0,
    )  # fmt: skip
    params = parameters(TimeSformer(model, rngs=nnx.Rngs(0)))
    random = np.random.default_rng(0)
    params["head"]["kernel"] = random.standard_normal((8, 3)).astype(np.float32)
    labels = np.float32([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
    batch = {
        "frames": random.integers(0, 256, (4, 2, 10, 10, 3), dtype=np.uint8),
        "crop_boxes": np.tile(np.float32([1, 1, 8]), (4, 1)),
        "flip": np.zeros(4, bool),
        "augment_seed": np.zeros(4, np.uint32),
        "label": labels,
    }
    mesh = make_mesh(1, 1, devices=jax.devices()[:1])
    optimizer = make_optimizer(recipes.recipe().optimizer, lambda step: 0.1)
    target = abstract_state(model, optimizer, mesh)
    augmentation = Augmentation(label_smoothing=smoothing) if smoothing else OFF
    step = make_train_step(model, clip, optimizer, lambda step: 0.1, target, mesh, 0, augmentation)
    with jax.set_mesh(mesh):
        _, metrics = step(init_state(params, optimizer, target), put_batch(mesh, batch))

    video = preprocess(batch["frames"], batch["crop_boxes"], clip)
    run = jax.jit(lambda params, video: with_parameters(model, params)(video))
    logits = np.asarray(run(params, video), np.float64)
    targets = (1 - smoothing) * labels + smoothing * 0.5
    p = 1 / (1 + np.exp(-logits))
    losses = -targets * np.log(p) - (1 - targets) * np.log(1 - p)
    assert float(metrics["loss"]) == pytest.approx(losses.mean(), rel=1e-4)
    hits = [labels[row, logits[row].argmax()] for row in range(4)]
    assert float(metrics["accuracy"]) == np.mean(hits)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("multilabel")
    labels = ["up", "up;down", "", "left;up", "down", "down;left"] * 3
    (folder / "videos").mkdir()
    for i in range(len(labels)):
        write_video(folder / "videos" / f"{i}.mp4", frames=12, fps=30)
    rows = [("path", "label"), *((f"{i}.mp4", label) for i, label in enumerate(labels))]
    with open(folder / "clips.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    load_command([
        "prepare", f"--videos={folder / 'videos'}", f"--annotations={folder / 'clips.csv'}",
        f"--output={folder / 'data'}", "--multilabel=;", "--workers=1", "--short_side=40",
        "--validation_fraction=0.3",
    ])()  # fmt: skip
    fields = {"clip.frame_stride": 1, "batch_size": 8, "epochs": 1, "eval.every_epochs": 1}
    load_command(tiny_run(folder / "data", folder / "run", **fields))()
    output = f"--output={folder / 'x.json'},{folder / 'x.csv'}"
    with open(folder / "said", "w") as said, contextlib.redirect_stdout(said):
        load_command(["evaluate", f"--checkpoint={folder / 'run'}", output])()
    return folder


def test_evaluation_is_the_mean_average_precision(trained):
    at_training = json.loads((trained / "run" / "results.json").read_text())
    found = json.loads((trained / "x.json").read_text())
    assert found["mAP"] == at_training["mAP"]
    assert f"mAP {found['mAP']:.2%}  of {found['videos']} videos" in (trained / "said").read_text()
    with open(trained / "x.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    aps = []
    for label in ("down", "left", "up"):
        score = np.array([float(row[f"p({label})"]) for row in rows])
        truth = np.array([label in row["labels"].split("; ") for row in rows])
        aps.append(np.mean([truth[score >= s].mean() for s, t in zip(score, truth) if t]))
    assert found["mAP"] == pytest.approx(np.mean(aps))
    validation = json.loads((trained / "run" / "checkpoints" / "validation.json").read_text())
    assert all(set(v) >= {"mAP"} for v in validation.values())


def test_prediction_gives_each_label_its_own_probability(trained):
    with open(trained / "x.csv", newline="") as file:
        row = next(csv.DictReader(file))
    found = Predictor(trained / "run").probabilities(trained / "videos" / row["id"])
    written = [float(row[f"p({label})"]) for label in ("down", "left", "up")]
    np.testing.assert_allclose(found, written, atol=0.02)  # records went through JPEG
    assert abs(found.sum() - 1) > 0.05


def test_predictions_are_those_above_the_threshold_of_the_evaluation(trained, capsys):
    threshold = json.loads((trained / "x.json").read_text())["threshold"]
    video = trained / "videos" / "0.mp4"
    load_command([
        "predict", f"{video}", f"--checkpoint={trained / 'run'}", f"--threshold={threshold}",
        "--json",
    ])()  # fmt: skip
    found = json.loads(capsys.readouterr().out)["predictions"]
    probabilities = Predictor(trained / "run").probabilities(video)
    expected = {label for label, p in zip(("down", "left", "up"), probabilities) if p >= threshold}
    assert {one["label"] for one in found} == expected


def test_data_of_the_other_kind_is_refused(trained):
    metadata, _ = load(trained / "run")
    single = dataclasses.replace(open_split(trained / "data", "validation"), targets=None)
    with pytest.raises(InputError, match="any number of labels a video and the data is not"):
        match_labels(metadata, single)
