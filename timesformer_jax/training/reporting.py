"""What a run writes beside its checkpoints: TensorBoard, recipe.json, results.json, a summary."""

from __future__ import annotations

import json
import os
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from clu import metric_writers
from etils import epath

import timesformer_jax
from timesformer_jax import storage
from timesformer_jax.checkpoints import store
from timesformer_jax.checkpoints.metadata import CheckpointMetadata
from timesformer_jax.checkpoints.store import Checkpoints
from timesformer_jax.errors import InputError
from timesformer_jax.evaluation.metrics import MultiLabelResults, Results, accuracy_line
from timesformer_jax.training.step import Metrics

# In a workdir.
TENSORBOARD, PROFILE, RESULTS, RECIPE = "tensorboard", "profile", "results.json", "recipe.json"


def make_writer(workdir: epath.Path) -> metric_writers.MetricWriter:
    """Writes TensorBoard and the log in process 0, the log alone in the others."""
    return metric_writers.create_default_writer(
        os.fspath(workdir / TENSORBOARD),
        just_logging=jax.process_index() > 0,
        asynchronous=False,
    )


def write_recipe(workdir: epath.Path, metadata: CheckpointMetadata) -> None:
    """Writes the whole config to recipe.json."""
    if jax.process_index() == 0:
        content = json.dumps(metadata.config, indent=2) + "\n"
        storage.write_atomically(workdir / RECIPE, content.encode())


def write_accuracy(
    writer: metric_writers.MetricWriter, step: int, name: str, results: Results | MultiLabelResults
) -> None:
    """Writes the accuracy of an evaluation, "validation" or "final", as scalars."""
    writer.write_scalars(step, {f"{name}/{k}": value for k, value in results.scalars().items()})
    writer.flush()


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


def write_results(workdir: epath.Path, results: dict[str, Any]) -> None:
    """Writes results.json."""
    content = json.dumps(results, indent=2) + "\n"
    storage.write_atomically(workdir / RESULTS, content.encode())


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
        f"TensorBoard  tensorboard --logdir {os.path.join(workdir, TENSORBOARD)}"
    )
