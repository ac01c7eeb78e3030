"""The memory and time of the paper's three models on TPUs, without a TPU.

    .venv-tpu/bin/python experiments/plan_table.py [--plans=runs/plan] [--only=base,inference]

Runs `timesformer plan` for every row, which compiles the program for the chip or slice. After each
row it writes docs/plan.json and the tables of docs/plan.md with the rows so far. Rows in the folder
of plans or in docs/plan.json are not compiled again, so an interrupted run resumes; delete both to
have all of them anew. A row takes one to ten minutes of one core, and 1 to 5 GB. --only compiles
the rows that have all of these words, and the tables get every row that there is.
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
PAGE, PUBLISHED = DOCS / "plan.md", DOCS / "plan.json"

PLANS = flags.DEFINE_string("plans", "runs/plan", "folder for the plans")
ONLY = flags.DEFINE_list("only", [], "words, such as base,training,v5e:1x1; by default all rows")


class Recipe(NamedTuple):
    """A model as it is planned: its config, clips a chip, and what is changed for training."""

    config: str
    clips: int
    changes: tuple[str, ...] = ()


RECIPES = {
    "base": Recipe("k400_base", 16),
    "HR": Recipe("k400_hr", 1, ("model.remat=block",)),
    "L": Recipe("k400_l", 1, ("model.remat=block",)),
}
CHIPS = ("v5e:1x1", "v5p:1x1x1", "v6e:1x1")
SLICES = {"v5e:2x2": 4, "v5e:4x4": 16, "v5e:8x8": 64, "v5e:16x16": 256}


class Row(NamedTuple):
    """A plan: one chip is compiled as training would be, slices with --quick."""

    model: str
    work: str
    topology: str

    @property
    def name(self) -> str:
        return f"{self.model}_{self.work}_{self.topology.replace(':', '_')}"

    def wanted(self, words: set[str]) -> bool:
        return words <= {self.model, self.work, self.topology}


# In the order of compilation.
ROWS = [
    *(Row(model, "training", chip) for chip in CHIPS for model in RECIPES),
    *(Row(model, "inference", chip) for chip in CHIPS for model in RECIPES),
    *(Row(model, "training", slice_) for slice_ in SLICES for model in RECIPES),
]


def main(_) -> None:
    plans = {row: plan for row in ROWS if (plan := kept(row))}
    for row in ROWS:
        if row not in plans and row.wanted(set(ONLY.value)):
            plans[row] = planned(row)
            tabulate(plans)
    tabulate(plans)


def tabulate(plans: dict[Row, dict]) -> None:
    """Writes the rows that there are, in the order of the tables."""
    rows = [plans[row] | {"model": row.model} for row in ROWS if row in plans]
    PUBLISHED.write_text(json.dumps(rows, indent=1) + "\n")
    for name, table in {"time": time, "parts": parts, "memory": memory, "scaling": scaling}.items():
        page = PAGE.read_text()
        PAGE.write_text(replace_table(page, "plan_table.py", name, table(plans)))


def kept(row: Row) -> dict | None:
    """The plan of a row that was compiled earlier."""
    file = pathlib.Path(PLANS.value) / f"{row.name}.json"
    if file.exists():
        return json.loads(file.read_text())
    published = json.loads(PUBLISHED.read_text()) if PUBLISHED.exists() else []
    return next((plan for plan in published if row_of(plan) == row), None)


def row_of(plan: dict) -> Row:
    """The row of a plan of docs/plan.json."""
    return Row(plan["model"], plan["work"], plan["topology"])


def planned(row: Row) -> dict:
    """The plan of a row, compiled in a process of its own."""
    recipe, file = RECIPES[row.model], pathlib.Path(PLANS.value) / f"{row.name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = file.with_suffix(".new")
    clips = recipe.clips * SLICES.get(row.topology, 1)
    # One view a video: a batch of inference is then of as many clips as one of training.
    changes = ("model.dtype=bfloat16", f"batch_size={clips}", "eval.crops=1")
    changes += recipe.changes if row.work == "training" else ()
    subprocess.run(
        [
            sys.executable, "-m", "timesformer_jax.cli", "plan", f"--work={row.work}",
            f"--config={ROOT}/configs/{recipe.config}.py", f"--topology={row.topology}",
            f"--json={whole}", *(f"--config.{change}" for change in changes),
            *(["--quick"] if row.topology in SLICES else []),
        ],
        check=True,
    )  # fmt: skip
    whole.rename(file)
    return json.loads(file.read_text())


def on_chips(plans: dict[Row, dict]) -> list[tuple[Row, dict]]:
    """The rows of one chip, in the order of the tables."""
    rows = [
        Row(model, work, chip)
        for work in ("training", "inference")
        for model in RECIPES
        for chip in CHIPS
    ]
    return [(row, plans[row]) for row in rows if row in plans]


def label(row: Row, plan: dict) -> list:
    return [row.model, row.work, row.topology.partition(":")[0], plan["clips"]]


def time(plans: dict[Row, dict]) -> str:
    """The bound, and the compiler's cycles."""
    head = ["model", "work", "chip", "clips", "bound, ms", "by", "MFU at the bound", "M cycles",
            "ms", "clips/s", "MFU"]  # fmt: skip
    lines = []
    for row, plan in on_chips(plans):
        roof, cycles = plan["compiled"]["roofline_seconds"], plan["cycles"]
        by = max(("compute", "memory", "communication"), key=lambda part: roof[part] or 0)
        lines.append([
            *label(row, plan), f"{plan['step_seconds'] * 1e3:.1f}", by, f"{plan['mfu']:.0%}",
            f"{cycles['total'] / 1e6:.0f}", f"{cycles['step_seconds'] * 1e3:.1f}",
            f"{cycles['clips_per_second']:.0f}", f"{cycles['mfu']:.0%}",
        ])  # fmt: skip
    return markdown_table(head, lines, words=3)


def parts(plans: dict[Row, dict]) -> str:
    """Where the cycles go."""
    shown = ("linear layers, GELU", "norms, residuals", "embedding, preprocessing", "optimizer")
    head = ["model", "work", "chip", "clips", "attention", *shown, "other", "of all: kernels",
            "of all: copies"]  # fmt: skip
    lines = []
    for row, plan in on_chips(plans):
        sums: dict[str, float] = {}
        for share in plan["cycles"]["parts"]:
            part = "attention" if share["part"].endswith(" attention") else share["part"]
            part = part if part in ("attention", *shown) else "other"
            for key in (part, share["kind"]):
                sums[key] = sums.get(key, 0.0) + share["cycles"] / 1e6
        columns = ["attention", *shown, "other", "kernel", "copy"]
        lines.append([*label(row, plan), *(f"{sums.get(key, 0.0):.1f}" for key in columns)])
    return markdown_table(head, lines, words=3)


def memory(plans: dict[Row, dict]) -> str:
    head = ["model", "work", "chip", "clips", "parameters", "optimizer", "inputs",
            "activations, temporaries", "program, padding", "total, GiB"]  # fmt: skip
    lines = []
    for row, plan in on_chips(plans):
        found = plan["compiled"]["memory_bytes"]
        kinds = [found[k] for k in ("parameters", "optimizer", "inputs", "activations")]
        kinds += [found["program"] + found["padding"], found["total"]]
        lines.append([*label(row, plan), *(f"{kind / GIB:.2f}" for kind in kinds)])
    return markdown_table(head, lines, words=3)


def scaling(plans: dict[Row, dict]) -> str:
    """What a chip sends as the v5e slice grows, its batch with it."""
    head = ["model", "slice", "collectives", "MB a chip sends", "communication, ms",
            "the rest, ms", "efficiency, overlapped", "efficiency, one after another"]  # fmt: skip
    lines = []
    for model in RECIPES:
        for topology in SLICES:
            chip, first, plan = (
                plans.get(Row(model, "training", t)) for t in (CHIPS[0], "v5e:2x2", topology)
            )
            if plan is None or first is None or chip is None:
                continue
            rest = chip["cycles"]["step_seconds"]
            sending, at_first = (
                p["compiled"]["roofline_seconds"]["communication"] for p in (plan, first)
            )
            sends: dict[str, float] = {}
            for c in plan["compiled"]["collectives"]:
                name = f"{c['kind']} over {', '.join(c['axes'])}"
                sends[name] = sends.get(name, 0) + c["sent_bytes"]
            lines.append([
                model, topology, ", ".join(sends), f"{sum(sends.values()) / 1e6:.0f}",
                f"{sending * 1e3:.1f}", f"{rest * 1e3:.1f}",
                f"{max(at_first, rest) / max(sending, rest):.1%}",
                f"{(at_first + rest) / (sending + rest):.1%}",
            ])  # fmt: skip
    return markdown_table(head, lines, words=3)


if __name__ == "__main__":
    app.run(main)
