"""What a run writes beside its checkpoints: TensorBoard, recipe.json, results.json, a summary."""

from __future__ import annotations

import json
import os
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

import timesformer_jax
from timesformer_jax import storage
from timesformer_jax.checkpoints import card, run_files, store
from timesformer_jax.checkpoints.metadata import CheckpointMetadata
from timesformer_jax.checkpoints.run_files import CARD, RECIPE, RESULTS
from timesformer_jax.checkpoints.store import Checkpoints
from timesformer_jax.errors import InputError
from timesformer_jax.evaluation.metrics import MultiLabelResults, Results, accuracy_line
from timesformer_jax.training.curves import PICTURE, TABLE, TENSORBOARD, Scalars
from timesformer_jax.training.resume import Changes
from timesformer_jax.training.step import Metrics

PROFILE = "profile"  # in a workdir


def write_recipe(workdir: epath.Path, metadata: CheckpointMetadata) -> None:
    """Writes the whole config to recipe.json."""
    if jax.process_index() == 0:
        content = json.dumps(metadata.config, indent=2) + "\n"
        storage.write_atomically(workdir / RECIPE, content.encode())


def write_accuracy(
    scalars: Scalars, step: int, name: str, results: Results | MultiLabelResults
) -> None:
    """Writes the accuracy and loss of an evaluation, "validation" or "final", as scalars."""
    scalars.write(step, {f"{name}/{k}": value for k, value in results.scalars().items()})
    scalars.save()


def tell_changes(step: int, checkpoints: Checkpoints, changes: Changes) -> None:
    """Logs that a run goes on, and what in its config is not as it was saved."""
    if step:
        logging.info("going on from step %d of %s", step, checkpoints.directory)
    for name, (now, before) in changes.items():
        logging.warning("this run goes on with another %s: %s, it was %s", name, now, before)


def tell_finished(step: int, total: int, changes: Changes) -> None:
    """Logs that a run was finished before, and that a config with other values did nothing."""
    logging.info("nothing to do: %d of %d steps are done and evaluated", step, total)
    if changes:
        values = ", ".join(f"{k} {now} (it was {was})" for k, (now, was) in changes.items())
        logging.warning("nothing was done with %s: start in another --workdir", values)


def mean_metrics(metrics: list[Metrics]) -> dict[str, float]:
    """The means over steps."""
    values = jax.device_get(metrics)
    return {name: float(np.mean([v[name] for v in values])) for name in values[0]}


def check_finite(metrics: list[Metrics], params: Any, done: int, checkpoints: Checkpoints) -> None:
    """Checks the metrics of the last steps, up to step `done`, and the parameters after it.

    Raises:
      InputError: naming the first value that is not finite, and the last good checkpoint.
    """
    found = (
        f"{name.replace('_', ' ')} is {values[name]} at step {step}, at learning rate "
        f"{values['learning_rate']:g}"
        for step, values in enumerate(jax.device_get(metrics), done - len(metrics) + 1)
        for name in ("loss", "gradient_norm")
        if not np.isfinite(values[name])
    )
    what = next(found, None)
    if what is None and not _finite(params):
        what = f"parameters are not finite after step {done}"
    if what is None:
        return
    last = checkpoints.latest_step()
    kept = "no checkpoint was saved before"
    if last is not None:
        kept = f"the last good checkpoint is {checkpoints.directory / str(last)}"
    raise InputError(
        f"the {what}: lower --config.optimizer.learning_rate or set --config.optimizer.clip_norm; "
        f"{kept}"
    )


@jax.jit
def _finite(params: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(params)]).all()


def provenance(
    step: int, name: str, checkpoints: Checkpoints, clips_per_second: float | None
) -> dict[str, Any]:
    """What results.json says beside the accuracy: steps, versions, devices, throughput."""
    best = checkpoints.best_step()
    return {
        "step": step,
        "best": None if best is None else {"step": best} | checkpoints.validation[best],
        "config": name,
        "versions": {m.__name__: m.__version__ for m in (timesformer_jax, jax, flax)},
        "devices": {"kind": jax.devices()[0].device_kind, "count": jax.device_count()},
        "clips_per_second": clips_per_second,
    }


def write_results(
    workdir: epath.Path, results: dict[str, Any], metadata: CheckpointMetadata
) -> None:
    """Writes results.json, and a model card of the last step, README.md."""
    content = json.dumps(results, indent=2) + "\n"
    storage.write_atomically(workdir / RESULTS, content.encode())
    about = run_files.read(workdir / store.FOLDER / str(results["step"]), metadata)
    card.write_card(workdir, metadata, workdir.name, about, for_transformers=False)


def finished_results(workdir: epath.Path, step: int) -> dict[str, Any] | None:
    """The content of results.json if it is that of `step`, else None."""
    path = workdir / RESULTS
    if not path.exists():
        return None
    results = json.loads(path.read_text())
    return results if results["step"] == step else None


def print_summary(results: dict[str, Any], workdir: str) -> None:
    """Prints the accuracy and where the files are."""
    best = ""
    if results["best"]:
        best = (
            f", the best in validation {results['best']['step']} "
            f"(--checkpoint={os.path.join(workdir, store.BEST)})"
        )
    print(
        f"{accuracy_line(results)}\n"
        f"results      {os.path.join(workdir, RESULTS)}\n"
        f"checkpoint   {os.path.join(workdir, store.FOLDER, str(results['step']))}{best}\n"
        f"model card   {os.path.join(workdir, CARD)}\n"
        f"curves       {os.path.join(workdir, PICTURE)}, {TABLE}\n"
        f"TensorBoard  tensorboard --logdir {os.path.join(workdir, TENSORBOARD)}"
    )
