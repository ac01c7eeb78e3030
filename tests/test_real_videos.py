"""From videos nobody here made to their names: prepare, train, evaluate, predict."""

import json
import pathlib

import numpy as np
import pytest
from conftest import REPOSITORY

from timesformer_jax.inference.predictor import Predictor

pytestmark = [pytest.mark.processes, pytest.mark.training, pytest.mark.decodes]

SECONDS = {"bikes.mp4": 10.0, "bigbuckbunny.mp4": 5.28, "carphone_pristine.mp4": 4.0}
SEGMENT = 0.8


def segments(seconds):
    """[start, end) of the segments of a video; the first 60% of them are for training."""
    starts = np.arange(0, seconds - SEGMENT + 1e-6, SEGMENT)
    cut = round(0.6 * len(starts))
    return [
        (round(s, 2), round(s + SEGMENT, 2), "train" if i < cut else "validation")
        for i, s in enumerate(starts)
    ]


def test_later_segments_are_predicted_to_their_source(real_videos, tmp_path, timesformer):
    rows = [
        (name, pathlib.Path(name).stem, *segment)
        for name, seconds in SECONDS.items()
        for segment in segments(seconds)
    ]
    lines = ["path,label,start,end,split", *(",".join(map(str, row)) for row in rows)]
    (tmp_path / "clips.csv").write_text("\n".join(lines))
    timesformer(
        "prepare", f"--videos={real_videos}", f"--annotations={tmp_path / 'clips.csv'}",
        f"--output={tmp_path / 'data'}", "--short_side=40",
    )  # fmt: skip
    timesformer(
        "train", f"--config={REPOSITORY / 'configs' / 'demo.py'}", f"--workdir={tmp_path / 'run'}",
        f"--config.data.directory={tmp_path / 'data'}", "--config.data.demo=",
        "--config.clip.frame_stride=2", "--config.batch_size=7", "--config.epochs=20",
        "--config.optimizer.reference_batch_size=7", "--config.eval.every_epochs=0",
        "--config.model.depth=1", "--config.model.hidden_size=32", "--config.log_every_steps=20",
    )  # fmt: skip
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    later = [row for row in rows if row[-1] == "validation"]
    assert results["videos"] == len(later) == 9
    assert results["top1"] == 1

    predictor = Predictor(tmp_path / "run")
    for name, label, start, end, _ in later:
        probabilities = predictor.probabilities(real_videos / name, start, end)
        assert predictor.labels[probabilities.argmax()] == label, (name, start)
    name, label, start, end, _ = later[-1]
    out = timesformer(
        "predict", real_videos / name, f"--start={start}", f"--end={end}",
        f"--checkpoint={tmp_path / 'run'}", "--top=1",
    )  # fmt: skip
    assert out.stdout.splitlines()[1].endswith(label)
