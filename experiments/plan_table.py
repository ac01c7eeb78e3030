"""The memory and time of the paper's three models on TPU slices of 4 to 256 chips, without a TPU.

    .venv/bin/python experiments/plan_table.py [--plans=runs/plan]

Runs `timesformer plan` for every row, which compiles the training step for the slice. After each
row it writes docs/plan.json and the tables of docs/plan.md with the rows so far. Rows in the folder
of plans are not compiled again, so an interrupted run resumes. A compilation takes one to two
minutes of one core, and 1 to 3 GB.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from typing import NamedTuple

from absl import app, flags
from docs_tables import DOCS, markdown_table, replace_table

from timesformer_jax.distributed.hardware import GIB

ROOT = pathlib.Path(__file__).parents[1]
PAGE = DOCS / "plan.md"

PLANS = flags.DEFINE_string("plans", "runs/plan", "folder for the plans")


class Recipe(NamedTuple):
    """A model as it is planned: its config, what is changed in it, and clips a chip."""

    config: str
    clips: int
    changes: tuple[str, ...] = ()


RECIPES = {
    "base": Recipe("k400_base", 4),
    "HR": Recipe("k400_hr", 1, ("model.remat=block",)),
    "L": Recipe("k400_l", 1, ("model.remat=block",)),
}
V5E = {"v5e:2x2": 4, "v5e:4x4": 16, "v5e:8x8": 64, "v5e:16x16": 256}
TOPOLOGIES = V5E | {"v5p:2x2x4": 16, "v6e:4x4": 16}
SEARCHED = "v5e:2x2"  # for the largest batch, which a chip is that of the larger slices

# (model, topology, whether the largest batch is searched), in the order of compilation.
ROWS = [
    *((model, topology, False) for topology in TOPOLOGIES for model in RECIPES),
    *((model, SEARCHED, True) for model in RECIPES),
]


def main(_) -> None:
    plans = {key: plan for key in ROWS if (plan := kept(*key))}
    for key in ROWS:
        if key not in plans:
            plans[key] = planned(*key)
            tabulate(plans)
    tabulate(plans)
    print(needs(plans), scaling(plans), sep="\n\n")


def tabulate(plans: dict) -> None:
    """Writes the rows that there are, in the order of the tables."""
    rows = [plans[key] | {"model": key[0]} for key in sorted(plans, key=ROWS.index) if not key[2]]
    (DOCS / "plan.json").write_text(json.dumps(rows, indent=1) + "\n")
    write("needs", needs(plans))
    write("scaling", scaling(plans))


def file_of(model: str, topology: str, search: bool) -> pathlib.Path:
    name = f"{model}_{topology.replace(':', '_')}" + "_searched" * search
    return pathlib.Path(PLANS.value) / f"{name}.json"


def kept(model: str, topology: str, search: bool) -> dict | None:
    """The plan of a row that was compiled earlier."""
    file = file_of(model, topology, search)
    return json.loads(file.read_text()) if file.exists() else None


def planned(model: str, topology: str, search: bool) -> dict:
    """The plan of a row, compiled in a process of its own."""
    recipe, file = RECIPES[model], file_of(model, topology, search)
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = file.with_suffix(".new")
    changes = (f"batch_size={recipe.clips * TOPOLOGIES[topology]}", *recipe.changes)
    subprocess.run(
        [
            sys.executable, "-m", "timesformer_jax.cli", "plan", "--quick",
            f"--config={ROOT}/configs/{recipe.config}.py", f"--topology={topology}",
            f"--json={whole}", *(f"--config.{change}" for change in changes),
            *(["--find_batch"] if search else []),
        ],
        check=True,
    )  # fmt: skip
    whole.rename(file)
    return json.loads(file.read_text())


def needs(plans: dict) -> str:
    """Memory, time and largest batch of every row."""
    head = [
        "model", "slice", "chips", "clips a step", "fits", "parameters", "optimizer", "inputs",
        "activations, temporaries", "program, padding", "total, GiB", "ms a step", "clips/s", "MFU",
        "largest batch",
    ]  # fmt: skip
    lines = []
    for model in RECIPES:
        for topology in TOPOLOGIES:
            if (plan := plans.get((model, topology, False))) is None:
                continue
            memory = plan["compiled"]["memory_bytes"]
            kinds = [memory[k] for k in ("parameters", "optimizer", "inputs", "activations")]
            kinds += [memory["program"] + memory["padding"], memory["total"]]
            lines.append([
                model, topology, plan["chips"], plan["batch_size"],
                "yes" if plan["fits"] else "no", *(f"{kind / GIB:.2f}" for kind in kinds),
                f"{plan['step_seconds'] * 1e3:.0f}", f"{plan['clips_per_second']:.0f}",
                f"{plan['mfu']:.0%}", largest(plans, model, topology),
            ])  # fmt: skip
    return markdown_table(head, lines, words=2)


def largest(plans: dict, model: str, topology: str) -> str:
    """The largest batch: of v5e slices as many clips a chip as on the searched one."""
    searched = plans.get((model, SEARCHED, True))
    if topology not in V5E or searched is None:
        return ""
    return str(searched["largest_batch"] // searched["chips"] * TOPOLOGIES[topology])


def scaling(plans: dict) -> str:
    """What a chip sends as the v5e slice grows, its batch with it."""
    head = ["model", "slice", "collectives", "MB a chip sends", "communication, ms",
            "the rest, ms", "efficiency, overlapped", "efficiency, one after another"]  # fmt: skip
    lines = []
    for model in RECIPES:
        for topology in V5E:
            plan, first = (plans.get((model, t, False)) for t in (topology, next(iter(V5E))))
            if plan is None or first is None:
                continue
            sends: dict[str, float] = {}
            for c in plan["compiled"]["collectives"]:
                name = f"{c['kind']} over {', '.join(c['axes'])}"
                sends[name] = sends.get(name, 0) + c["sent_bytes"]
            lines.append([
                model, topology, ", ".join(sends), f"{sum(sends.values()) / 1e6:.0f}",
                f"{times(plan)[0] * 1e3:.1f}", f"{times(plan)[1] * 1e3:.1f}",
                f"{max(times(first)) / max(times(plan)):.1%}",
                f"{sum(times(first)) / sum(times(plan)):.1%}",
            ])  # fmt: skip
    return markdown_table(head, lines, words=3)


def times(plan: dict) -> tuple[float, float]:
    """Seconds of communication, and of the rest."""
    roof = plan["compiled"]["roofline_seconds"]
    return roof["communication"], max(roof["compute"], roof["memory"])


def write(name: str, table: str) -> None:
    """Puts a table between its marks on the page."""
    PAGE.write_text(replace_table(PAGE.read_text(), "plan_table.py", name, table))


if __name__ == "__main__":
    app.run(main)
