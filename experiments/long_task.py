"""One long clip against averaged short ones, on videos whose class takes two minutes to see.

    .venv/bin/python experiments/long_task.py data
    .venv/bin/python experiments/long_task.py run long 0 1 2
    .venv/bin/python experiments/long_task.py run half short space no_time 0 1 2
    .venv/bin/python experiments/long_task.py draw

"data" makes the data set of configs/demo_long.py, once for all runs. "run" trains and evaluates
models of `MODELS`, each with each seed, and keeps a row of each in runs/long_task. A run that was
interrupted is continued when it is run again, and a finished one is not repeated. "draw" gathers
the rows in docs/long_task.json, beside those that are there from another machine, and writes the
table of docs/long-clips.md and docs/long_task.png.
"""

from __future__ import annotations

import json
import pathlib
import resource
import sys
import textwrap
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from docs_tables import DOCS, markdown_table, replace_table
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from timesformer_jax import recipes
from timesformer_jax.checkpoints.load import load
from timesformer_jax.data.demo import long
from timesformer_jax.data.demo.drawing import random_of
from timesformer_jax.data.demo.make import prepare_demo
from timesformer_jax.data.records.open import open_split
from timesformer_jax.distributed.mesh import make_mesh
from timesformer_jax.evaluation.multi_view import evaluate
from timesformer_jax.storage import write_atomically
from timesformer_jax.training.loop import train

ROWS = pathlib.Path("runs/long_task")
FIGURES, PAGE, PICTURE = (
    DOCS / name for name in ("long_task.json", "long-clips.md", "long_task.png")
)
CHANCE = 1 / len(long.CLASSES)


class Model(NamedTuple):
    """A model to train: arguments and fields that differ from the recipe, and how it is evaluated.

    Attributes:
      name: in the table.
      arguments: of `recipes.with_arguments`.
      clip: fields of config.clip.
      views: numbers of clips along a video whose predictions are averaged.
    """

    name: str
    arguments: str = ""
    clip: Mapping[str, Any] = MappingProxyType({})
    views: tuple[int, ...] = (1,)


# At 30 frames a second: 8 frames in 16 s, and 42 in 118 s, which is less than 120 s.
SHORT = {"sampling": "stride", "frames": 8, "frame_stride": 60}
HALF = {"sampling": "stride", "frames": 42, "frame_stride": 84}
MODELS = {
    "long": Model("divided"),
    "half": Model("divided", clip=HALF, views=(1, 2, 8)),
    "short": Model("divided", clip=SHORT, views=(1, 4, 12, 48)),
    "space": Model("space only", "attention=space"),
    "no_time": Model("divided without time embedding", "position_embedding=space"),
}


def main(command: str, *words: str) -> None:
    if command == "data":
        prepare_demo(recipes.demo_long().data.directory, "long")
    elif command == "run":
        seeds = [int(word) for word in words if word.isdigit()]
        for model in (word for word in words if not word.isdigit()):
            for seed in seeds:
                print(json.dumps(run(model, seed)), flush=True)
    elif command == "draw":
        draw()
    else:
        sys.exit(__doc__)


def config_of(model: str, seed: int) -> ConfigDict:
    config = recipes.with_arguments(recipes.demo_long(), MODELS[model].arguments)
    config.clip.update(MODELS[model].clip)
    config.seed = seed
    return config


def run(model: str, seed: int) -> dict[str, Any]:
    """Trains a model and evaluates it with each number of views; or reads what came out before."""
    path = ROWS / f"{model}_{seed}.json"
    if path.exists():
        return json.loads(path.read_text())
    workdir = ROWS / f"{model}_{seed}"
    whole = not (workdir / "checkpoints").exists()
    begin, used = time.perf_counter(), processor_seconds()
    config = config_of(model, seed)
    results = train(config, workdir)
    row = {
        "model": model,
        "seed": seed,
        "frames": config.clip.frames,
        # Of the part after an interruption nothing is told: it is not the whole.
        "seconds": time.perf_counter() - begin if whole else None,
        "processor_seconds": processor_seconds() - used if whole else None,
        "steps": results["step"],
        "videos": results["videos"],
        "top1": {str(views): accuracy(workdir, views) for views in MODELS[model].views},
    }
    write_atomically(path, json.dumps(row, indent=1).encode())
    return row


def processor_seconds() -> float:
    """Of this process and of those that it waited for."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def accuracy(workdir: pathlib.Path, views: int) -> float:
    """Top-1 of the validation videos, by the mean prediction of clips along each video."""
    mesh = make_mesh()
    metadata, params = load(str(workdir), sharding=NamedSharding(mesh, P()))
    data = metadata.config["data"]
    split = open_split(data["directory"], data["eval_split"])
    results = evaluate(
        params, metadata.model, metadata.clip, split, mesh,
        batch_size=max(540 // (views * metadata.clip.frames), 4), views=views, crops=1,
    )  # fmt: skip
    return float(results.scalars()["top1"])


# ---- the table and the picture ------------------------------------------------------------------


class Line(NamedTuple):
    """A line of the table: a model with a number of views, and its accuracy with each seed."""

    name: str
    frames: int
    span: float
    views: int
    top1: list[float]
    minutes: float | None

    @property
    def label(self) -> str:
        clips = f"{self.views} clips" if self.views > 1 else "1 clip"
        return f"{textwrap.fill(self.name, 16)}\n{clips} of {self.span:.0f} s"


def lines_of(rows: list[dict[str, Any]]) -> list[Line]:
    lines = []
    for name, model in MODELS.items():
        of_model = [row for row in rows if row["model"] == name]
        if not of_model:
            continue
        clip = config_of(name, 0).clip
        span = long.SECONDS if clip.sampling == "segments" else clip.frames * clip.frame_stride / 30
        used = [row["processor_seconds"] for row in of_model if row["processor_seconds"]]
        minutes = float(np.mean(used)) / 60 if used else None
        lines += [
            Line(model.name, clip.frames, span, views,
                 [row["top1"][str(views)] for row in of_model], minutes)
            for views in model.views
        ]  # fmt: skip
    return lines


def draw() -> None:
    """The figures, the table of docs/long-clips.md and the picture."""
    new = [json.loads(path.read_text()) for path in ROWS.glob("*.json")]
    by_run = {(row["model"], row["seed"]): row for row in [*json.loads(FIGURES.read_text()), *new]}
    rows = [row for _, row in sorted(by_run.items())]
    FIGURES.write_text(json.dumps(rows, indent=1) + "\n")
    lines = lines_of(rows)
    head = ["model", "frames of a clip", "seconds of a clip", "clips averaged",
            "top-1, a figure a seed", "processor minutes of training"]  # fmt: skip
    cells = [
        [
            line.name, line.frames, f"{line.span:.0f}", line.views,
            ", ".join(f"{top1:.1%}" for top1 in line.top1),
            "" if line.minutes is None else f"{line.minutes:.1f}",
        ]
        for line in lines
    ]  # fmt: skip
    page = PAGE.read_text()
    caption = "Frames of three-minute videos, and accuracy by the clips that are averaged"
    table = f"{markdown_table(head, cells, 1)}\n\n![{caption}]({PICTURE.name})"
    PAGE.write_text(replace_table(page, "long_task.py", "accuracy", table))
    picture(lines).savefig(PICTURE, dpi=110)
    print(f"written: {FIGURES}, {PAGE} and {PICTURE}")


def picture(lines: list[Line]) -> Figure:
    figure = plt.figure(figsize=(11, 6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1, 1.5])
    above.suptitle("Frames of two validation videos, one every 9 seconds")
    for axes, index in zip(above.subplots(2, 20), (1, 5), strict=True):
        film_strip(axes, index)
    axis = below.subplots()
    for place, line in enumerate(lines):
        axis.bar(place, np.mean(line.top1), color="tab:blue" if line.span > long.APART else "0.7")
        axis.plot([place] * len(line.top1), line.top1, "k.", markersize=5)
    axis.axhline(CHANCE, color="grey", linestyle=":")
    axis.annotate("chance", (1, CHANCE), (3, -3), color="grey", fontsize=8,
                  xycoords=("axes fraction", "data"), textcoords="offset points")  # fmt: skip
    axis.set_xticks(range(len(lines)), [line.label for line in lines], fontsize=7)
    axis.set(ylabel="validation top-1", ylim=(0, 1.05))
    return figure


def film_strip(axes: np.ndarray[Any, Any], index: int) -> None:
    """A video along a row of axes: its frames at even distances, those of cue and answer named."""
    frames = list(long.frames("validation", index))
    cue, answer, *_ = long.draw_squares(random_of("validation", index, 0), index)
    step = long.SECONDS / len(axes)
    for place, axis in enumerate(axes):
        seconds = (place + 0.5) * step
        axis.imshow(frames[int(seconds * long.FPS)], interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.set_xlabel(f"{seconds:.0f} s", fontsize=7)
        for name, square in (("cue", cue), ("answer", answer)):
            if square.begin <= seconds < square.end:
                axis.set_title(name, fontsize=8)
    axes[0].set_ylabel(long.CLASSES[index % len(long.CLASSES)])


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
