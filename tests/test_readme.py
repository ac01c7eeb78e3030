"""What the README says can be done."""

import csv
import dataclasses
import json
import re
import shlex

import numpy as np
import pytest
from conftest import REPOSITORY
from videos import write_video

import timesformer_jax as tsf
from timesformer_jax.checkpoints.metadata import CheckpointMetadata
from timesformer_jax.checkpoints.store import save_parameters
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.models import presets
from timesformer_jax.models.timesformer import parameters

README = (REPOSITORY / "README.md").read_text()
UMASK = 0o027  # not the usual one


@pytest.mark.compiles
def test_the_python_lines_run_as_written(monkeypatch):
    """With one of the twelve blocks of the base model."""
    base = dataclasses.replace(presets.PRESETS["timesformer_base"], depth=1)
    monkeypatch.setitem(presets.PRESETS, "timesformer_base", base)
    section = README.split("The network itself:")[1].split("##")[0]
    code = "\n".join(re.findall(r"^    (.*)$", section, re.MULTILINE))
    exec(code, names := {})
    assert names["logits"].shape == (1, 400)
    assert names["features"].shape == (1, 768)


@pytest.mark.processes
@pytest.mark.training
@pytest.mark.decodes
def test_the_commands_for_own_videos_run_as_written(tmp_path, timesformer):
    """On tiny videos, and from a tiny checkpoint in place of the one that would be downloaded.

    All files have the mode that the person asked for: some libraries write through temporary files,
    which only their owner may read.
    """
    for folder in ("videos/jump", "videos/run", "more_videos"):
        (tmp_path / folder).mkdir(parents=True)
    for i in range(10):
        write_video(tmp_path / "videos" / ("jump", "run")[i % 2] / f"{i}.mp4", frames=12)
    for name in ("new.mp4", "long.mp4", "more_videos/other.mp4"):
        write_video(tmp_path / name, frames=30)
    tiny = tsf.create(
        "timesformer_tiny", num_classes=3, image_size=32, num_frames=2, hidden_size=16, depth=1,
        num_heads=2,
    )  # fmt: skip
    clip = ClipSpec(frames=2, frame_stride=4, crop=32, short_side=40)
    metadata = CheckpointMetadata(tiny.config, clip, ("a", "b", "c"), {})
    save_parameters(tmp_path / "tiny", parameters(tiny), metadata)

    section = README.split("## Your own videos")[1].split("\n## ")[0]
    lines = re.findall(r"^    timesformer ((?:.*\\\n)*.*)$", section, re.MULTILINE)
    commands = [shlex.split(line.replace("\\\n", "")) for line in lines]
    assert [words[0] for words in commands] == [
        "check", "prepare", "train", "evaluate", "predict", "explain", "timeline", "features",
        "convert",
    ]  # fmt: skip
    more = {
        "prepare": ["--short_side=40"],
        "train": ["--config.epochs=1", "--config.eval.every_epochs=0"],
    }
    for words in commands:
        words = [re.sub(r"pretrained=.*", f"pretrained={tmp_path / 'tiny'}", x) for x in words]
        timesformer(*words, *more.get(words[0], []), cwd=tmp_path, umask=UMASK)
    written = ["results.json", "videos.csv", "confusion.png", "predictions.csv", "report.html"]
    written += ["timeline.html", "features.npz", "mine_hf/model.safetensors"]
    assert all((tmp_path / name).stat().st_size for name in written)
    for name in (*written, "data", "runs", "mine_hf"):
        for path in (tmp_path / name, *(tmp_path / name).rglob("*")):
            mode = (0o777 if path.is_dir() else 0o666) & ~UMASK
            assert path.stat().st_mode & 0o777 == mode, path
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["labels"] == ["jump", "run"]
    rows = list(csv.DictReader((tmp_path / "predictions.csv").read_text().splitlines()))
    assert {row["label_1"] for row in rows} <= {"jump", "run"}
    assert len(rows) == 2
    with np.load(tmp_path / "features.npz") as features:
        assert len(features["id"]) == 10
