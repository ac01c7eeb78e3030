"""Divided against space-only attention on the embedded data set, whose classes differ in motion.

    .venv/bin/python experiments/demo_motion.py [--seeds=3] [--workdir=runs/demo_motion]

Trains configs/demo.py with each scheme and seed, on the same videos, clips and number of steps,
prints the table of final accuracies, writes it to docs/demo_motion.json, and draws docs/demo.png:
frames of four training videos and validation accuracy by epoch. A single frame does not show the
class, and frames without their order do not distinguish a direction from its opposite, so a model
without temporal attention cannot reach more than half. An interrupted run resumes when it is run
again.
"""

from __future__ import annotations

import json
import pathlib
import platform

import jax
import matplotlib.pyplot as plt
import numpy as np
from absl import app, flags
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from timesformer_jax import recipes
from timesformer_jax.data import decode
from timesformer_jax.data.demo.motion import FPS, FRAMES
from timesformer_jax.data.input import sampling
from timesformer_jax.training.loop import train
from timesformer_jax.training.reporting import TENSORBOARD

SCHEMES = {"divided": "tab:blue", "space": "tab:orange"}
DOCS = pathlib.Path(__file__).parents[1] / "docs"

SEEDS = flags.DEFINE_integer("seeds", 3, "runs of each scheme", lower_bound=1)
WORKDIR = flags.DEFINE_string("workdir", "runs/demo_motion", "folder for the runs")


def main(_):
    runs = {(scheme, seed): run(scheme, seed) for scheme in SCHEMES for seed in range(SEEDS.value)}
    table = {
        scheme: [runs[scheme, seed]["top1"] for seed in range(SEEDS.value)] for scheme in SCHEMES
    }
    print("top-1 of 800 validation videos, 1 x 3 views; a line a scheme, a column a seed")
    for scheme, top1 in table.items():
        print(f"{scheme:>8}", *(f"{value:7.2%}" for value in top1))
    about = {
        "device": f"{jax.devices()[0].device_kind}, {platform.machine()}",
        "jax": jax.__version__,
    }
    (DOCS / "demo_motion.json").write_text(json.dumps({"top1": table} | about, indent=2) + "\n")
    draw().savefig(DOCS / "demo.png", dpi=110)
    print(f"written: {DOCS / 'demo_motion.json'} and {DOCS / 'demo.png'}")


def workdir(scheme: str, seed: int) -> str:
    return f"{WORKDIR.value}/{scheme}_{seed}"


def run(scheme: str, seed: int) -> dict:
    config = recipes.demo()
    config.model.attention = scheme
    config.seed = seed
    return train(config, workdir(scheme, seed))


def curve(scheme: str, seed: int) -> list[float]:
    """Validation top-1 of the centre view after each epoch but the last."""
    events = EventAccumulator(f"{workdir(scheme, seed)}/{TENSORBOARD}", {"tensors": 0})
    events.Reload()
    points = {
        event.step: float(make_ndarray(event.tensor_proto))
        for event in events.Tensors("validation/top1")
    }
    return [points[step] for step in sorted(points)]


def draw() -> Figure:
    config = recipes.demo()
    figure = plt.figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.6, 1])
    indices = sampling.clip_indices(FRAMES, FPS, config.clip.frames, config.clip.frame_stride, 0.5)
    axes = left.subplots(4, len(indices))
    videos = pathlib.Path(config.data.directory) / "videos"
    rows = (videos / "annotations.csv").read_text().splitlines()[1:]
    for row, line in zip(axes, (rows[i] for i in (0, 1, 4, 6)), strict=True):
        path, label, _ = line.split(",")
        frames = decode.decode_clip(videos / path, sample=lambda *_: indices).frames
        for axis, frame in zip(row, frames):
            axis.imshow(frame, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(label)
    left.suptitle("8 frames of four training videos")
    axis = right.subplots()
    for scheme, colour in SCHEMES.items():
        curves = [curve(scheme, seed) for seed in range(SEEDS.value)]
        epochs = np.arange(1, len(curves[0]) + 1)
        for i, values in enumerate(curves):
            axis.plot(epochs, values, color=colour, label=None if i else f"{scheme} attention")
    axis.axhline(0.5, color="grey", linestyle=":", label="best without time")
    axis.set(xlabel="epoch", ylabel="validation top-1", ylim=(0, 1), xticks=epochs)
    axis.legend(loc="center right")
    return figure


if __name__ == "__main__":
    app.run(main)
