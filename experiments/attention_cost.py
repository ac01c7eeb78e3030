"""The paper's figure 3: the cost of joint and divided attention for longer and larger clips.

    .venv/bin/python experiments/attention_cost.py [benchmarks/results/DEVICE/attention.json]

Draws docs/attention_cost.png. The upper row is counted (`models.costs`). With the figures of
`timesformer benchmark attention` a lower row has the measured time of the training pass, and a
cross where it does not fit the device.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import matplotlib.pyplot as plt
from docs_tables import DOCS
from matplotlib.axes import Axes

from timesformer_jax.models.costs import macs
from timesformer_jax.models.presets import preset

SCHEMES = {"joint": "tab:orange", "divided": "tab:blue"}
FRAMES, SIDES = (8, 16, 32, 64, 96), (224, 336, 448, 560)
# For each panel: the axis, its values, and the clip (frames, side) of each value.
PANELS = {
    "pixels a side, clips of 8 frames": [(8, side) for side in SIDES],
    "frames, of 224 x 224": [(frames, 224) for frames in FRAMES],
}


def main(paths: list[str]) -> None:
    measured = json.loads(pathlib.Path(paths[0]).read_text()) if paths else None
    rows = 2 if measured else 1
    figure, axes = plt.subplots(
        rows, 2, figsize=(9, 3.4 * rows), layout="constrained", squeeze=False
    )
    for column, (name, clips) in enumerate(PANELS.items()):
        x = [clip[1 - column] for clip in clips]
        counted(axes[0, column], x, clips)
        if measured:
            timed(axes[1, column], x, clips, measured["rows"])
        for axis in axes[:, column]:
            axis.set(xlabel=name, xticks=x, ylim=(0, None))
    axes[0, 0].set_ylabel("TMACs forward, one view")
    axes[0, 0].legend(frameon=False)
    if measured:
        kind = measured["device"]["kind"]
        kind = measured["machine"]["processor"] if kind == "cpu" else kind
        axes[1, 0].set_ylabel(f"s, forward and backward\n{kind}")
    path = DOCS / "attention_cost.png"
    figure.savefig(path, dpi=110)
    print(f"written: {path}")


def counted(axis: Axes, x: list[int], clips: list[tuple[int, int]]) -> None:
    for scheme, colour in SCHEMES.items():
        config = preset("timesformer_base", attention=scheme)
        costs = [macs(config, frames, side, side) / 1e12 for frames, side in clips]
        axis.plot(x, costs, marker="o", color=colour, label=f"{scheme} space-time")


def timed(
    axis: Axes, x: list[int], clips: list[tuple[int, int]], rows: list[dict[str, Any]]
) -> None:
    """Draws the measurements; a clip that does not fit the memory is a cross at the top."""
    for place, (scheme, colour) in enumerate(SCHEMES.items()):
        found = {
            (row["frames"], row["side"]): row["training"] for row in rows if row["scheme"] == scheme
        }
        points = [
            (at, found[clip]["seconds"]["wall"]["median"])
            for at, clip in zip(x, clips)
            if found.get(clip, {}).get("status") == "measured"
        ]
        if points:
            axis.plot(*zip(*points), marker="o", color=colour)
        beyond = [
            at for at, clip in zip(x, clips) if found.get(clip, {}).get("status") == "does not fit"
        ]
        top = [0.95 - 0.08 * place] * len(beyond)
        axis.plot(beyond, top, "x", color=colour, transform=axis.get_xaxis_transform(),
                  label=f"{scheme} does not fit" if beyond else None)  # fmt: skip
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False)


if __name__ == "__main__":
    main(sys.argv[1:])
