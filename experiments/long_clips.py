"""Memory and time of a training step against the frames of its clip.

    .venv/bin/python experiments/long_clips.py small 96 1024 2048 4096 8192
    .venv/bin/python experiments/long_clips.py base 8 96 128
    .venv/bin/python experiments/long_clips.py plan v5e:1x1 2048 offload
    .venv/bin/python experiments/long_clips.py plan v5e:4x4 16384 block
    .venv/bin/python experiments/long_clips.py draw

"small" and "base" train on random frames on this machine's CPU, each length in its own process,
and keep the peak of that process's memory, the seconds of a step and the first and last loss in
docs/long_clips.json. "plan" compiles a step of the base model, bfloat16, one clip shared by all
devices of a topology (or counts it, where there is no compiler), as `timesformer plan --quick`,
and keeps what it needs in docs/long_clips_planned.json. "draw" writes the tables of
docs/long-clips.md and docs/long_clips.png.
"""

from __future__ import annotations

import json
import pathlib
import resource
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
from docs_tables import DOCS, markdown_table, replace_table
from ml_collections import ConfigDict

from timesformer_jax.distributed.device_memory import LEAST_EFFORT
from timesformer_jax.distributed.hardware import GIB
from timesformer_jax.planning.memory import compiled_memory, counted_memory
from timesformer_jax.planning.program import build
from timesformer_jax.planning.topology import open_topology
from timesformer_jax.recipes import kinetics400

FIGURES, PLANNED, PAGE = (
    DOCS / name for name in ("long_clips.json", "long_clips_planned.json", "long-clips.md")
)
PAPER = 96  # frames of the longest clip in the paper
STEPS = {"small": 10, "base": 1}
NAMES = {
    "small": "small: 32 x 32, width 32, 2 blocks, float32",
    "base": "base: 224 x 224, width 768, 12 blocks, float32",
}


def main(model: str, *frames: str) -> None:
    if model == "draw":
        draw()
    elif model == "plan":
        topology, number, remat = frames
        row = plan(topology, int(number), remat)
        print(row)
        keep(PLANNED, row, "topology")
    elif len(frames) == 1:
        print(json.dumps(measure(model, int(frames[0]))))
    else:
        for number in frames:
            command = [sys.executable, __file__, model, number]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            row = json.loads(done.stdout.splitlines()[-1])
            print(row, flush=True)
            keep(FIGURES, row, "model")


def keep(path: pathlib.Path, row: dict[str, Any], name: str) -> None:
    """Puts a row in the file, in place of the one of the same name, frames and remat."""

    def of(row: dict[str, Any]) -> tuple:
        return row[name], row["frames"], row["remat"]

    rows = json.loads(path.read_text()) if path.exists() else []
    rows = sorted([*(r for r in rows if of(r) != of(row)), row], key=of)
    path.write_text(json.dumps(rows, indent=1) + "\n")


def config_of(model: str, frames: int) -> ConfigDict:
    config = kinetics400("timesformer_base")
    config.batch_size, config.clip.frames, config.model.remat = 1, frames, "block"
    config.model.num_classes = 10
    # XLA for CPUs computes the blocks again early, and then holds all of them, but for a loop.
    config.model.scan_layers = True
    if model == "small":
        config.clip.crop, config.data.short_side_range = 32, (36, 40)
        config.model.update({"hidden_size": 32, "num_heads": 2, "depth": 2, "drop_path": 0.0})
    config.optimizer.learning_rate = 0.005
    return config


def measure(model: str, frames: int) -> dict[str, Any]:
    """Trains on one random clip, again and again."""
    program = build(config_of(model, frames), jax.devices("cpu")[:1], 1)
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), program.state)
    state = state._replace(
        params=jax.tree.map(
            lambda x: rng.normal(0, 0.05, x.shape).astype(np.float32), program.state.params
        )
    )
    batch = {name: np.zeros(x.shape, x.dtype) for name, x in program.batch.items()}
    batch["frames"] = rng.integers(0, 256, batch["frames"].shape, np.uint8)
    batch["crop_boxes"][:] = 0, 0, program.clip.crop
    compiled = program.lower().compile()
    losses, seconds = [], []
    for _ in range(STEPS[model]):
        begin, used = time.perf_counter(), time.process_time()
        state, metrics = compiled(state, batch)
        losses.append(float(metrics["loss"]))
        seconds.append((time.perf_counter() - begin, time.process_time() - used))
    wall, cpu = (sorted(s)[len(s) // 2] for s in zip(*seconds))
    return {
        "model": model,
        "frames": frames,
        "remat": program.model.remat,
        "steps": len(losses),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "compiled_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "seconds": wall,
        "processor_seconds": cpu,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def plan(topology: str, frames: int, remat: str) -> dict[str, Any]:
    """What a step of the base model needs on a chip."""
    target = open_topology(topology)
    config = config_of("base", frames)
    config.model.update({"dtype": "bfloat16", "remat": remat, "num_classes": 400})
    config.mesh.sequence = len(target.devices)
    config.model.scan_layers = len(target.devices) > 1
    program = build(config, target.devices, 1)
    if target.compiles:
        quick = {"exec_time_optimization_effort": LEAST_EFFORT}
        needed = compiled_memory(program, program.lower().compile(compiler_options=quick))
    else:
        needed = counted_memory(program, target.chip)
    return {
        "topology": topology,
        "frames": frames,
        "remat": remat,
        "source": "compiled" if target.compiles else "counted",
        "needed_bytes": needed._asdict(),
        "chip_bytes": target.chip.memory,
    }


def draw() -> None:
    """The tables and the picture of docs/long-clips.md."""
    import matplotlib.pyplot as plt  # the environment with the TPU compiler has none

    rows = json.loads(FIGURES.read_text())
    page = PAGE.read_text()
    lines = [
        [
            NAMES[row["model"]], f"{row['frames']:,}", f"{row['peak_bytes'] / GIB:.2f}",
            f"{row['compiled_bytes'] / GIB:.3f}", f"{row['processor_seconds']:.1f}", row["steps"],
            f"{row['first_loss']:.3f}, {row['last_loss']:.3f}",
        ]
        for row in rows
    ]  # fmt: skip
    head = ["model", "frames", "process, peak GiB", "the step's arrays, GiB",
            "processor seconds a step", "steps", "first and last loss"]  # fmt: skip
    page = replace_table(page, "long_clips.py", "run", markdown_table(head, lines, 1))
    plans = planned(json.loads(PLANNED.read_text()))
    PAGE.write_text(replace_table(page, "long_clips.py", "planned", plans))
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, key, unit, label in (
        (axes[0], "compiled_bytes", GIB, "arrays of a training step, GiB"),
        (axes[1], "processor_seconds", 1, "processor seconds of a training step"),
    ):
        for model, colour in (("small", "tab:blue"), ("base", "tab:orange")):
            points = [(row["frames"], row[key] / unit) for row in rows if row["model"] == model]
            if points:
                axis.plot(*zip(*points), marker="o", color=colour, label=NAMES[model])
        axis.axvline(PAPER, color="grey", linestyle=":")
        axis.annotate(" the paper's longest, 96", (PAPER, 0.5), (2, 0), color="grey", fontsize=8,
                      xycoords=("data", "axes fraction"), textcoords="offset points")  # fmt: skip
        axis.set(xscale="log", yscale="log", xlabel="frames of the clip", ylabel=label)
        ticks = sorted({row["frames"] for row in rows})
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8, rotation=60)
        axis.minorticks_off()
    lines = axes[0].get_legend_handles_labels()
    figure.legend(*lines, frameon=False, fontsize=8, loc="outside upper center", ncols=2)
    figure.savefig(DOCS / "long_clips.png", dpi=110)
    print(f"written: {PAGE} and {DOCS / 'long_clips.png'}")


def planned(plans: list[dict[str, Any]]) -> str:
    head = ["devices", "frames", "remat", "by", "GiB needed on a chip", "GiB of a chip"]
    lines = [
        [
            row["topology"], f"{row['frames']:,}", row["remat"], row["source"],
            f"{sum(row['needed_bytes'].values()) / GIB:.1f}", f"{row['chip_bytes'] / GIB:.1f}",
        ]
        for row in plans
    ]  # fmt: skip
    return markdown_table(head, lines, 1)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
