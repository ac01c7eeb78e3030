"""The paper's figure 3: the cost of joint and divided attention for longer and larger clips.

    .venv-tpu/bin/python experiments/attention_cost.py plan v5e:1x1
    .venv/bin/python experiments/attention_cost.py draw [benchmarks/results/DEVICE/attention.json]

"plan" compiles the forward pass of the base model on every clip of the figure, bfloat16, one clip
for one chip, and keeps the compiler's own cycles in docs/attention_cost_planned.json, beside those
that are there. "draw" draws docs/attention_cost.png: what is counted (`models.costs`); what was
planned; and with the figures of `timesformer benchmark attention` the measured time of the forward
pass, with a cross where it does not fit the device.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import TYPE_CHECKING, Any

from docs_tables import DOCS

from timesformer_jax import recipes
from timesformer_jax.errors import InputError
from timesformer_jax.models.costs import macs
from timesformer_jax.models.presets import preset
from timesformer_jax.planning.plan import make_plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLANNED = DOCS / "attention_cost_planned.json"
SCHEMES = {"joint": "tab:orange", "divided": "tab:blue"}
FRAMES, SIDES = (8, 16, 32, 64, 96), (224, 336, 448, 560)
# For each panel: the axis, its values, and the clip (frames, side) of each value.
PANELS = {
    "pixels a side, clips of 8 frames": [(8, side) for side in SIDES],
    "frames, of 224 x 224": [(frames, 224) for frames in FRAMES],
}


def main(command: str, *arguments: str) -> None:
    if command == "plan":
        plan(*arguments)
    else:
        draw(*map(pathlib.Path, arguments))


def plan(topology: str) -> None:
    """Compiles what is not in PLANNED yet; a row says None where a clip does not fit."""
    rows = json.loads(PLANNED.read_text()) if PLANNED.exists() else []
    done = {(row["topology"], row["scheme"], row["frames"], row["side"]) for row in rows}
    clips = sorted({clip for panel in PANELS.values() for clip in panel})
    for scheme in SCHEMES:
        for frames, side in clips:
            if (topology, scheme, frames, side) in done:
                continue
            config = recipes.load(f"k400_base:attention={scheme},frames={frames},crop={side}")
            config.eval.update({"batch_size": 1, "views": 1, "crops": 1})
            config.model.dtype = "bfloat16"
            try:
                cycles = make_plan(config, topology, work="inference").cycles
                seconds = cycles.seconds if cycles else None
            except InputError as error:
                print(f"{scheme}, {frames} x {side}: {error}")
                seconds = None
            rows.append({"topology": topology, "scheme": scheme, "frames": frames, "side": side,
                         "seconds": seconds})  # fmt: skip
            print(rows[-1], flush=True)
            PLANNED.write_text(json.dumps(rows, indent=1) + "\n")


def draw(measured: pathlib.Path | None = None) -> None:
    import matplotlib.pyplot as plt  # the environment of the TPU compiler has none

    costs = {"TMACs forward, one view": counted()}
    planned = json.loads(PLANNED.read_text()) if PLANNED.exists() else []
    for topology in dict.fromkeys(row["topology"] for row in planned):
        found = {at(row): row["seconds"] for row in planned if row["topology"] == topology}
        costs[f"ms forward, by the cycles\nof the compiler, {topology}"] = scaled(found, 1e3)
    if measured:
        report = json.loads(measured.read_text())
        kind = report["device"]["kind"]
        kind = report["machine"]["processor"] if kind == "cpu" else kind
        costs[f"s forward, measured\n{kind}"] = timed(report["rows"])
    figure, axes = plt.subplots(
        len(costs),
        2,
        figsize=(9, 2.9 * len(costs)),
        layout="constrained",
        squeeze=False,
        sharex="col",
    )
    for row, (label, values) in zip(axes, costs.items()):
        for column, (name, clips) in enumerate(PANELS.items()):
            curves(row[column], clips, column, values)
            row[column].set(xlabel=name)
        row[0].set_ylabel(label)
    axes[0, 0].legend(frameon=False)
    path = DOCS / "attention_cost.png"
    figure.savefig(path, dpi=110)
    print(f"written: {path}")


Clip = tuple[str, int, int]  # scheme, frames, side


def at(row: dict[str, Any]) -> Clip:
    return row["scheme"], row["frames"], row["side"]


def scaled(values: dict[Clip, float | None], factor: float) -> dict[Clip, float | None]:
    return {clip: value and value * factor for clip, value in values.items()}


def counted() -> dict[Clip, float | None]:
    configs = {scheme: preset("timesformer_base", attention=scheme) for scheme in SCHEMES}
    return {
        (scheme, frames, side): macs(config, frames, side, side) / 1e12
        for scheme, config in configs.items()
        for clips in PANELS.values()
        for frames, side in clips
    }


def timed(rows: list[dict[str, Any]]) -> dict[Clip, float | None]:
    """Seconds of the forward pass; None of a clip that does not fit the memory."""
    forward = {at(row): row["forward"] for row in rows if row["scheme"] in SCHEMES}
    return {
        clip: found["seconds"]["wall"]["median"] if found["status"] == "measured" else None
        for clip, found in forward.items()
        if found["status"] in ("measured", "does not fit")
    }


def curves(
    axis: Axes, clips: list[tuple[int, int]], column: int, values: dict[Clip, float | None]
) -> None:
    """A curve for each scheme; a clip that does not fit is a cross at the top."""
    for place, (scheme, colour) in enumerate(SCHEMES.items()):
        found = {clip[1 - column]: values[scheme, *clip] for clip in clips
                 if (scheme, *clip) in values}  # fmt: skip
        points = {x: value for x, value in found.items() if value is not None}
        axis.plot(list(points), list(points.values()), marker="o", color=colour,
                  label=f"{scheme} space-time")  # fmt: skip
        beyond = [x for x, value in found.items() if value is None]
        top = [0.95 - 0.08 * place] * len(beyond)
        axis.plot(beyond, top, "x", color=colour, transform=axis.get_xaxis_transform())
    axis.set(xticks=[clip[1 - column] for clip in clips], ylim=(0, None))


if __name__ == "__main__":
    main(*sys.argv[1:])
