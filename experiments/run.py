"""The paper's tables and figures, and ablations that it lacks, on the embedded data or the paper's.

    .venv/bin/python experiments/run.py all
    .venv/bin/python experiments/run.py table1 --only=divided,joint --seeds=1
    .venv/bin/python experiments/run.py table1 --scale=paper --topology=v5e:4x4

At the demo's scale it trains every row of a table (`paper_tables.TABLES`) with every seed on two
embedded tasks. After each run it writes docs/experiments.json, which says what is done: killed and
started again it goes on, in the middle of a run too. At the end it writes docs/experiments.md and
its pictures. A run takes about a minute of two CPU cores, all of them three hours.

At the paper's scale it prints the command of each row's training, with what `timesformer plan` says
of its time on --topology, and writes them to experiments.sh in --workdir.
"""

from __future__ import annotations

import pathlib
import platform
import time
from typing import Any

import experiments_page
import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict
from paper_tables import TABLES, Row, Table, register_ablated
from tqdm import tqdm

from timesformer_jax import recipes, storage
from timesformer_jax.checkpoints.load import load
from timesformer_jax.data.records.open import open_split
from timesformer_jax.distributed.mesh import make_mesh
from timesformer_jax.errors import InputError
from timesformer_jax.evaluation.multi_view import evaluate
from timesformer_jax.models.costs import macs, parameter_count
from timesformer_jax.planning.plan import make_plan
from timesformer_jax.training.loop import train

# Such that schemes differ: divided attention reached 93% on motion and 86% on appearance. With
# batches of 32, 300 steps, it reached 70% on motion; with 400, 98%.
EPOCHS, BATCH_SIZE = 3, 28
TASKS = ("motion", "appearance")
# Training videos, for the length of a run.
VIDEOS = {"k400": 240_000, "ssv2": 168_913}

SCALE = flags.DEFINE_enum("scale", "demo", ["demo", "paper"], "the embedded data or the paper's")
SEEDS = flags.DEFINE_integer("seeds", 3, "runs of each row", lower_bound=1)
ONLY = flags.DEFINE_list("only", [], "names of rows, or of tasks; by default all")
WORKDIR = flags.DEFINE_string("workdir", "runs/experiments", "folder for the runs")
TOPOLOGY = flags.DEFINE_string("topology", "v5e:4x4", "hardware of the paper's scale")


def main(arguments: list[str]) -> None:
    register_ablated()
    names = arguments[1:] or ["all"]
    if unknown := set(names) - {*TABLES, "all"}:
        raise InputError(f"no table {unknown.pop()!r}, there are: all, {', '.join(TABLES)}")
    tables = TABLES if "all" in names else {name: TABLES[name] for name in names}
    if SCALE.value == "paper":
        write_commands(tables)
    else:
        # A row is compiled once for all its seeds and both tasks.
        jax.config.update("jax_compilation_cache_dir", f"{WORKDIR.value}/compiled")
        run_tables(tables)
        experiments_page.write()


def wanted(row: Row, task: str) -> bool:
    tasks, names = (set(ONLY.value) & set(TASKS)), (set(ONLY.value) - set(TASKS))
    return (not tasks or task in tasks) and (not names or row.name in names)


# ---- at the demo's scale -------------------------------------------------------------------------


def run_tables(tables: dict[str, Table]) -> None:
    """Trains what is not in docs/experiments.json yet, all rows with a seed before the next one."""
    runs = {
        (task, row.name, seed): row
        for seed in range(SEEDS.value)
        for table in tables.values()
        for task in table.tasks
        for row in table.rows
        if row.demo is not None and wanted(row, task)
    }
    results = experiments_page.read()
    left = {key: row for key, row in runs.items() if "/".join(map(str, key)) not in results}
    for (task, name, seed), row in (bar := tqdm(left.items(), unit="run")):
        bar.set_description(f"{task}, {name}, seed {seed}")
        results["/".join([task, name, str(seed)])] = run(row, task, seed)
        experiments_page.keep(results)


def run(row: Row, task: str, seed: int) -> dict[str, Any]:
    """Trains a row; its accuracy on every validation video, its costs and its time."""
    begin = time.monotonic(), time.process_time()
    config = config_of(row, task, seed)
    workdir = workdir_of(row.name, task, seed)
    train(config, workdir)
    metadata, params = load(workdir)
    split = open_split(config.data.directory, config.data.eval_split)
    found = evaluate(
        params, metadata.model, metadata.clip, split, make_mesh(),
        batch_size=config.eval.batch_size, views=1, crops=1,
    )  # fmt: skip
    right = found.predicted == found.truth
    return {
        "top1": float(right.mean()),
        "right": np.packbits(right).tobytes().hex(),  # a bit for each video, in order
        "videos": len(right),
        "parameters": parameter_count(metadata.model),
        "macs": macs(metadata.model),  # of one view
        "seconds": round(time.monotonic() - begin[0]),
        "processor_seconds": round(time.process_time() - begin[1]),
        "versions": f"{jax.devices()[0].device_kind}, {platform.machine()}, JAX {jax.__version__}",
    }


def config_of(row: Row, task: str, seed: int) -> ConfigDict:
    config = recipes.with_arguments(recipes.demo(), row.demo)
    config.data.directory = f"data/{task}"
    config.data.demo = task
    config.epochs, config.batch_size = EPOCHS, BATCH_SIZE
    config.eval.every_epochs = EPOCHS + 1  # at the end alone
    config.eval.views = config.eval.crops = 1
    config.seed = seed
    config.update_from_flattened_dict(row.fields)
    if row.start:
        config.pretrained = workdir_of(row.start, task, seed)
    return config


def workdir_of(name: str, task: str, seed: int) -> str:
    return f"{WORKDIR.value}/{task}/{name.replace(' ', '_')}/{seed}"


# ---- at the paper's scale ------------------------------------------------------------------------


def write_commands(tables: dict[str, Table]) -> None:
    lines = ["#!/bin/sh", f"# On {TOPOLOGY.value}; hours as `timesformer plan` says, at best."]
    for name, table in tables.items():
        lines += ["", f"# {name}: {table.title}"]
        for recipe in table.recipes:
            for row in table.rows:
                if row.arguments is not None and wanted(row, recipe):
                    lines += [planned(row, recipe), command(row, recipe)]
                    print(*lines[-2:], sep="\n")
    path = pathlib.Path(WORKDIR.value) / "experiments.sh"
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.write_atomically(path, ("\n".join(lines) + "\n").encode())
    print(f"written to {path}")


def named(recipe: str, row: Row) -> str:
    return f"{recipe}:{row.arguments}" if row.arguments else recipe


def command(row: Row, recipe: str) -> str:
    changes = " ".join(f"--config.{field}={value}" for field, value in row.fields.items())
    workdir = f"runs/{recipe}/{row.name.replace(' ', '_')}"
    return f"timesformer train --config={named(recipe, row)} --workdir={workdir} {changes}".rstrip()


def planned(row: Row, recipe: str) -> str:
    """A comment with the time of the row."""
    config = recipes.load(named(recipe, row))
    config.update_from_flattened_dict(row.fields)
    try:
        plan = make_plan(config, TOPOLOGY.value, quick=True)
    except InputError as e:
        return f"# {row.name}: {e}"
    videos = VIDEOS[recipe.partition("_")[0]] * config.data.train_fraction
    steps = config.epochs * (videos // config.batch_size)
    seconds = plan.cycles.seconds if plan.cycles else plan.step_seconds
    hours = f"{seconds * steps / 3600:.1f} h" if seconds else "time unknown"
    memory = "" if plan.fits is None else ", fits" if plan.fits else ", does not fit"
    return (
        f"# {row.name}: {steps:,.0f} steps, {hours}, {plan.needed / 2**30:.1f} GiB a chip{memory}"
    )


if __name__ == "__main__":
    app.run(main)
