"""Runs that start from a checkpoint of another kind (`config.pretrained`)."""

import csv
import json
import os
import re
import signal

import forked
import jax
import numpy as np
import pytest
import torch
from conftest import environment, scalars, tiny_run
from PIL import Image
from tensorboard.backend.event_processing import event_file_loader

from timesformer_jax.checkpoints import convert
from timesformer_jax.checkpoints import store as checkpoints
from timesformer_jax.checkpoints.metadata import CheckpointMetadata
from timesformer_jax.data.demo import motion
from timesformer_jax.data.input import pipeline
from timesformer_jax.data.records.open import open_split
from timesformer_jax.errors import InputError
from timesformer_jax.models.timesformer import TimeSformerConfig, with_parameters
from timesformer_jax.recipes import fit, load
from timesformer_jax.training import resume
from timesformer_jax.transforms.preprocess import preprocess

pytestmark = [pytest.mark.processes, pytest.mark.training]


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """An image ViT in timm's names: 24 wide, 2 blocks, patches of 8 on 16 x 16, 5 classes."""
    rng = np.random.default_rng(0)
    shapes = {"cls_token": (1, 1, 24), "pos_embed": (1, 5, 24), "patch_embed.proj.bias": (24,)}
    shapes |= {"patch_embed.proj.weight": (24, 3, 8, 8)}
    linear = {"attn.qkv": (72, 24), "attn.proj": (24, 24), "mlp.fc1": (96, 24), "mlp.fc2": (24, 96)}
    modules = {f"blocks.{i}.{name}": shape for i in range(2) for name, shape in linear.items()}
    modules |= {f"blocks.{i}.norm{j}": (24,) for i in range(2) for j in (1, 2)}
    modules |= {"norm": (24,), "head": (5, 24)}
    for name, shape in modules.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    state = {
        name: torch.tensor(rng.normal(0, 0.1, shape) + ("norm" in name and "weight" in name))
        for name, shape in shapes.items()
    }
    path = tmp_path_factory.mktemp("vit") / "vit.pth"
    torch.save({name: value.float() for name, value in state.items()}, path)
    return path


@pytest.fixture
def arguments(demo_data, vit, tmp_path):
    changes = {
        "pretrained": vit, "model.hidden_size": 24, "model.drop_path": 0.0, "epochs": 2,
        "log_every_steps": 1, "eval.every_epochs": 0, "optimizer.warmup_epochs": 0,
        "checkpoint.every_steps": 7, "checkpoint.keep_newest": 100,
    }  # fmt: skip
    return lambda **more: tiny_run(demo_data, tmp_path / "run", **changes | more)


def test_a_video_run_starts_at_the_image_models_features(
    arguments, demo_data, vit, tmp_path, timesformer
):
    done = timesformer(*arguments())
    assert f"starting from {vit}" in done.stderr
    assert "new one" in done.stderr  # the head of 8 classes
    assert "space embedding resized (bicubic), (2, 2) to (4, 4)" in done.stderr

    # The first loss is that of the image model's features under the new head, on still frames'
    # grounds: temporal attention adds nothing yet.
    fields = {"num_heads": 2, "image_size": 32, "num_frames": 8, "num_classes": 8}
    fields["init"] = "width_scaled"  # of the new head
    video = convert.read(vit, attention="divided", **fields)
    image = convert.read(vit, attention="space", **fields)
    frame = jax.random.normal(jax.random.key(0), (2, 1, 32, 32, 3))
    still = np.repeat(frame, 8, axis=1)
    model, image_model = (with_parameters(found.config, found.load()) for found in (video, image))
    features = jax.jit(model.features)(still)
    expected = jax.jit(image_model.features)(frame)
    np.testing.assert_allclose(features, expected, atol=1e-5)

    metadata = checkpoints.load_parameters(tmp_path / "run")[0]
    split = open_split(demo_data, "train")
    options = {"batch_size": 8, "short_side_range": (32, 40), "flip": False, "seed": 0}
    batch, _ = next(pipeline.train_batches(split, metadata.clip, **options))
    clips = preprocess(batch["frames"], batch["crop_boxes"], metadata.clip)
    logits = jax.jit(model.__call__)(clips)
    losses = -jax.nn.log_softmax(logits)[np.arange(8), batch["label"]]
    assert scalars(tmp_path / "run", "train/loss")[1][0] == pytest.approx(
        float(losses.mean()), rel=1e-4
    )


def finetuning(data, vit, workdir):
    """The guide's command line: nothing is said of the model or of its clips."""
    return [
        "train", "--config=finetune", f"--workdir={workdir}", f"--config.pretrained={vit}",
        f"--config.data.directory={data}", "--config.epochs=2", "--config.eval.every_epochs=1",
        "--config.optimizer.learning_rate=2e-3", "--config.optimizer.warmup_epochs=0",
        "--config.checkpoint.every_steps=7", "--config.checkpoint.keep_newest=9",
    ]  # fmt: skip


def test_the_recipe_fits_itself_and_resumes_without_the_file_it_started_from(
    demo_data, tmp_path, timesformer, vit
):
    arguments = finetuning(demo_data, vit, tmp_path / "run")
    said = timesformer(*arguments).stderr
    assert re.search(r"as the checkpoint .*: model\.patch_size 8, model\.hidden_size 24, ", said)
    assert "of 64 videos are shorter than a clip of 8.5 s: clip.frame_stride " in said
    assert "classes tell left from right (down-left, down-right, left, ...): clips are not" in said
    assert "log_every_steps 1" in said
    assert "64 clips of 8 classes, 21 for evaluation: 2 epochs, 16 steps of 8 clips" in said
    assert re.search(r"s a step, measured: \d+ s left", said)
    metadata, _ = checkpoints.load_parameters(tmp_path / "run")
    assert (metadata.model.hidden_size, metadata.model.depth, metadata.clip.crop) == (24, 2, 16)
    assert metadata.clip.frame_stride == (motion.FRAMES + 1) * 30 // (motion.FPS * 8)
    assert not metadata.config["data"]["flip"]
    check_what_repeats_it(tmp_path / "run", metadata)

    _, whole = checkpoints.load_parameters(tmp_path / "run")
    curves = rows_without_speeds(tmp_path / "run")
    for step in (8, 14, 16):
        done = tmp_path / "run" / "checkpoints" / str(step)
        os.rename(done, tmp_path / f"moved{step}")
    hidden = vit.rename(vit.with_suffix(".away"))
    try:
        again = timesformer(*arguments)
    finally:
        hidden.rename(vit)
    assert "going on from step 7" in again.stderr
    _, resumed = checkpoints.load_parameters(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    assert "goes on with another" not in again.stderr
    assert rows_without_speeds(tmp_path / "run") == curves


def check_what_repeats_it(workdir, metadata):
    """recipe.json is the config with all that was decided; curves.csv has the scalars."""
    repeated = load(str(workdir / "recipe.json"))
    assert not fit.automatic(repeated)
    fields = json.loads(repeated.to_json())
    assert {k: v for k, v in fields.items() if k in metadata.config} == metadata.config
    assert set(fields) - set(metadata.config) == {"attention_kernels", "defaults"}
    repeated.clip.frames = 4
    assert repeated.model.num_frames == 4
    rows = rows_without_speeds(workdir)
    assert [int(row["step"]) for row in rows] == list(range(1, 17))
    assert {step: [float(rows[step - 1]["train/loss"])] for step in range(1, 17)} == {
        step: [pytest.approx(loss)] for step, [loss] in scalars(workdir, "train/loss").items()
    }
    assert [int(row["step"]) for row in rows if row["validation/loss"]] == [8, 16]
    with Image.open(workdir / "curves.png") as picture:
        assert min(picture.size) > 300
    assert any(
        value.metadata.plugin_data.plugin_name == "hparams"
        for path in (workdir / "tensorboard").glob("events*")
        for event in event_file_loader.EventFileLoader(str(path)).Load()
        for value in event.summary.value
    )


def rows_without_speeds(workdir):
    speeds = ("seconds", "per_second", "data_wait")
    with open(workdir / "curves.csv") as table:
        return [
            {name: value for name, value in row.items() if not any(s in name for s in speeds)}
            for row in csv.DictReader(table)
        ]


def test_a_license_stays_with_what_is_trained_from_it(
    arguments, demo_data, tmp_path, timesformer, vit
):
    convert.convert(vit, tmp_path / "r.pyth", to="release", attention="divided", num_heads=2)
    source = torch.load(tmp_path / "r.pyth", weights_only=True)
    torch.save(source | {"license": "CC-BY-NC-4.0"}, tmp_path / "r.pyth")
    run = arguments(pretrained=tmp_path / "r.pyth")
    folder = os.fspath(tmp_path / "run" / "checkpoints")
    ended = forked.run(
        forked.run_command_that_ends, signal.SIGTERM, (folder, 7), *run, environment=environment()
    )
    assert ended.returncode == 128 + signal.SIGTERM
    assert checkpoints.load_parameters(tmp_path / "run")[0].license == "CC-BY-NC-4.0"
    assert "going on from step 8" in timesformer(*run).stderr
    assert checkpoints.load_parameters(tmp_path / "run")[0].license == "CC-BY-NC-4.0"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pretrained": "/nowhere.pth"}, "/nowhere.pth"),
        (
            {"model.hidden_size": 32, "model.depth": 3},
            "pass --config.model.hidden_size=24 --config.model.depth=2",
        ),
        (  # 24 is not divisible by 5
            {"model.hidden_size": 30, "model.num_heads": 5},
            "hidden_size is 24, not 30, which cannot be changed; ask for the checkpoint's own: ",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(arguments, refusal, change, said):
    assert said in refusal(*arguments(**change))


def test_heads_that_a_checkpoint_tells_are_those_of_the_run(vit, tmp_path):
    convert.convert(vit, tmp_path / "ours", num_heads=2, attention="divided")
    config = load("finetune")
    config.pretrained = str(tmp_path / "ours")
    source = resume.open_pretrained(config)
    fit.apply(config, fit.to_checkpoint(config, "", source.config, source.clip, False))
    assert config.model.num_heads == 2
    config.model.num_heads = 3  # somebody sets it
    model = TimeSformerConfig(**config.model.to_dict() | {"num_classes": 5})
    metadata = CheckpointMetadata(model, source.clip, (), {})
    with pytest.raises(InputError, match=r"num_heads is 2, not 3, .*: pass --config.model.num_h"):
        resume.initial_parameters(config, metadata, resume.open_pretrained(config))


def test_predicting_and_evaluating_converted_weights(
    vit, demo_data, tmp_path, timesformer, refusal
):
    options = {"attention": "divided", "num_heads": 2, "num_classes": 8, "num_frames": 4}
    convert.convert(vit, tmp_path / "ours", **options, image_size=32)
    video = demo_data / "videos" / "train" / "00000.mp4"
    out = timesformer("predict", video, f"--checkpoint={tmp_path / 'ours'}", "--top=8").stdout
    assert out.count("class ") == 8
    lost = refusal("evaluate", f"--checkpoint={tmp_path / 'ours'}")
    assert "say with --data what to evaluate on" in lost
    timesformer(
        "evaluate", f"--checkpoint={tmp_path / 'ours'}", f"--data={demo_data}",
        f"--output={tmp_path / 'r.json'}",
    )  # fmt: skip
    assert json.loads((tmp_path / "r.json").read_text())["videos"] == 21
