"""The paper's tables and figures, and ablations that it lacks, on the embedded data or the paper's.

    .venv/bin/python experiments/run.py all
    .venv/bin/python experiments/run.py table1 --only=divided,joint --seeds=1
    .venv-tpu/bin/python experiments/run.py table1 --scale=paper --topology=v5e:4x4

At the demo's scale it trains every row of a table (`paper_tables.TABLES`) with every seed on two
embedded tasks. After each run it writes docs/experiments.json, which says what is done: killed and
started again it goes on, in the middle of a run too. At the end it writes docs/experiments.md and
its pictures. A run takes about a minute of one CPU core; all 231 took 3.1 processor hours.

At the paper's scale it prints the command of each row's training, with what `timesformer plan` says
of its time on --topology, and writes them to experiments.sh in --workdir. TPUs need the compiler,
which `make .venv-tpu/installed` installs; a row takes about a minute.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

from absl import app, flags
from paper_tables import ABLATED_SCHEMES, TABLES, TASKS, Row, Table

from timesformer_jax.errors import InputError
from timesformer_jax.models.schemes import IMPORT_VARIABLE

SCALE = flags.DEFINE_enum("scale", "demo", ["demo", "paper"], "the embedded data or the paper's")
SEEDS = flags.DEFINE_integer("seeds", 3, "runs of each row", lower_bound=1)
ONLY = flags.DEFINE_list("only", [], "names of rows, or of tasks or recipes; by default all")
WORKDIR = flags.DEFINE_string("workdir", "runs/experiments", "folder for the runs")
TOPOLOGY = flags.DEFINE_string("topology", "v5e:4x4", "hardware of the paper's scale")


def main(arguments: list[str]) -> None:
    names = arguments[1:] or ["all"]
    if unknown := set(names) - {*TABLES, "all"}:
        sys.exit(f"error: no table {unknown.pop()!r}, there are: all, {', '.join(TABLES)}")
    tables = list(TABLES.values()) if "all" in names else [TABLES[name] for name in names]
    os.environ[IMPORT_VARIABLE] = str(ABLATED_SCHEMES)
    try:
        # Each needs packages that the other does not.
        if SCALE.value == "paper":
            import paper_commands

            paper_commands.write(at_the_papers_scale(tables), TOPOLOGY.value, WORKDIR.value)
        else:
            import demo_runs
            import experiments_page

            demo_runs.train_rows(at_the_demos_scale(tables), WORKDIR.value)
            experiments_page.write()
    except InputError as e:
        sys.exit(f"error: {e}")


def at_the_demos_scale(tables: list[Table]) -> Iterator[tuple[str, Row, int]]:
    """Task, row and seed of each run: all rows with a seed before the next one."""
    for seed in range(SEEDS.value):
        for table in tables:
            for task in table.tasks:
                for row in table.rows:
                    if row.demo is not None and wanted(row, task, TASKS):
                        yield task, row, seed


def at_the_papers_scale(tables: list[Table]) -> Iterator[tuple[Table, str, Row]]:
    """Table, recipe and row of each command."""
    recipes = {recipe for table in TABLES.values() for recipe in table.recipes}
    for table in tables:
        for recipe in table.recipes:
            for row in table.rows:
                if row.arguments is not None and wanted(row, recipe, recipes):
                    yield table, recipe, row


def wanted(row: Row, place: str, places: set[str]) -> bool:
    """Whether --only, of rows and places, leaves the row there."""
    names = set(ONLY.value) - places
    chosen = set(ONLY.value) & places
    return (not chosen or place in chosen) and (not names or row.name in names)


if __name__ == "__main__":
    app.run(main)
