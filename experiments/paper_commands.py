"""The commands of the paper's own runs, and what they cost; see experiments/run.py."""

from __future__ import annotations

import pathlib
import shlex
from collections.abc import Iterable, Iterator

from paper_tables import ABLATED_SCHEMES, Row, Table

from timesformer_jax import recipes, storage
from timesformer_jax.errors import InputError
from timesformer_jax.models.schemes import IMPORT_VARIABLE
from timesformer_jax.planning.plan import make_plan
from timesformer_jax.planning.topology import open_topology

# Training videos, for the length of a run.
VIDEOS = {"k400": 240_000, "ssv2": 168_913}


def write(wanted: Iterable[tuple[Table, str, Row]], topology: str, folder: str) -> None:
    """Prints the commands, and writes them to experiments.sh in the folder.

    Args:
      wanted: table, recipe and row of each command.
      topology: as `timesformer plan` has it; hours and memory are of it.

    Raises:
      InputError: if the topology is unknown, or needs a compiler that is not installed.
    """
    open_topology(topology)  # refused before anything is printed
    lines = []
    for line in script(wanted, topology):
        print(line, flush=True)
        lines.append(line)
    path = pathlib.Path(folder) / "experiments.sh"
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.write_atomically(path, ("\n".join(lines) + "\n").encode())
    print(f"written to {path}")


def script(wanted: Iterable[tuple[Table, str, Row]], topology: str) -> Iterator[str]:
    """A shell script's lines. A row that several tables share is there once."""
    yield "#!/bin/sh"
    yield f"# On {topology}: hours at best, as `timesformer plan` says."
    yield f"export {IMPORT_VARIABLE}={shlex.quote(str(ABLATED_SCHEMES))}"
    table, seen = None, set()
    for of_table, recipe, row in wanted:
        if (key := (recipe, row.name)) in seen:
            continue
        seen.add(key)
        if of_table is not table:
            table = of_table
            yield f"\n# {table.title}"
        yield planned(row, recipe, topology)
        yield command(row, recipe)


def named(recipe: str, row: Row) -> str:
    return f"{recipe}:{row.arguments}" if row.arguments else recipe


def command(row: Row, recipe: str) -> str:
    fields = [f"--config.{field}={value}" for field, value in row.fields.items()]
    workdir = f"--workdir=runs/{recipe}/{row.name.replace(' ', '_')}"
    words = ["timesformer", "train", f"--config={named(recipe, row)}", workdir, *fields]
    return shlex.join(words)


def planned(row: Row, recipe: str, topology: str) -> str:
    """A comment with the time of the row."""
    config = recipes.load(named(recipe, row))
    config.update_from_flattened_dict(row.fields)
    try:
        plan = make_plan(config, topology, quick=True)
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
