"""Trains the rows of `paper_tables` on the embedded tasks; see experiments/run.py."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable
from typing import Any

import experiments_page
import jax
import numpy as np
from ml_collections import ConfigDict
from paper_tables import ROWS, Row
from tqdm import tqdm

from timesformer_jax import recipes
from timesformer_jax.checkpoints.load import load
from timesformer_jax.data.records.open import open_split
from timesformer_jax.distributed.mesh import make_mesh
from timesformer_jax.evaluation.multi_view import evaluate
from timesformer_jax.models.costs import macs, parameter_count
from timesformer_jax.training.loop import train

# Such that schemes differ. The mean of three seeds of divided attention is 84% on motion, and 83%
# on appearance; on motion with batches of 28 it was 79%.
EPOCHS, BATCH_SIZES = 3, {"motion": 26, "appearance": 28}


def train_rows(wanted: Iterable[tuple[str, Row, int]], folder: str) -> None:
    """Trains what is not in docs/experiments.json yet, and keeps each result there.

    Args:
      wanted: task, row and seed of each run.
      folder: for the runs' own folders and the compiled programs.
    """
    # A row is compiled once for all its seeds and both tasks.
    jax.config.update("jax_compilation_cache_dir", f"{folder}/compiled")
    runs = {f"{task}/{row.name}/{seed}": (task, row, seed) for task, row, seed in wanted}
    results = experiments_page.read()
    left = [key for key in runs if key not in results]
    for key in (bar := tqdm(left, unit="run")):
        bar.set_description(key)
        results[key] = run(*runs[key], folder)
        experiments_page.keep(results)


def run(task: str, row: Row, seed: int, folder: str) -> dict[str, Any]:
    """Trains a row; its accuracy on every validation video, its costs and its time."""
    if row.start:  # does nothing if it is trained already
        train(config_of(task, ROWS[row.start], seed, folder),
              workdir_of(task, row.start, seed, folder))  # fmt: skip
    begin = time.monotonic(), time.process_time()
    config, workdir = config_of(task, row, seed, folder), workdir_of(task, row.name, seed, folder)
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


def config_of(task: str, row: Row, seed: int, folder: str) -> ConfigDict:
    config = recipes.with_arguments(recipes.demo(), row.demo)
    config.data.directory = f"data/{task}"
    config.data.demo = task
    config.epochs, config.batch_size = EPOCHS, BATCH_SIZES[task]
    config.eval.views = config.eval.crops = 1
    config.seed = seed
    config.update_from_flattened_dict(row.fields)
    config.eval.every_epochs = config.epochs + 1  # at the end alone
    if row.start:
        config.pretrained = workdir_of(task, row.start, seed, folder)
    return config


def workdir_of(task: str, name: str, seed: int, folder: str) -> str:
    return f"{folder}/{task}/{name.replace(' ', '_')}/{seed}"
