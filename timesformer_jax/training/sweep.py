"""`timesformer sweep`: one run after another, each with other values of some fields."""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging
from etils import epath
from ml_collections import ConfigDict
from tensorboard.compat.proto import event_pb2
from tensorboard.plugins.hparams import api as hparams
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from timesformer_jax import storage
from timesformer_jax.data.check.report import format_table
from timesformer_jax.distributed import hosts
from timesformer_jax.errors import InputError, first_line
from timesformer_jax.recipes import fit
from timesformer_jax.training.loop import Preempted, train

TABLE = "sweep.csv"  # in the workdir


def sweep(configs: Mapping[str, ConfigDict], workdir: str | os.PathLike, **processes: Any) -> None:
    """Trains each config in a folder of its own, then prints a table of the results, best first.

    A run that fails does not stop the others. Stopped and started again, finished runs are not
    repeated, and the one that was interrupted goes on.

    Args:
      configs: by the name of the run, which becomes its folder in the workdir.
      workdir: also gets sweep.csv, and what TensorBoard needs to compare the runs.
      processes: the arguments of `hosts.processes`.

    Raises:
      InputError: after all runs, naming those that failed.
    """
    workdir = storage.absolute(workdir)
    results: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    with hosts.processes(**processes):
        for i, (name, config) in enumerate(configs.items(), 1):
            if jax.process_index() == 0:
                logging.info("run %d of %d: %s", i, len(configs), name)
            try:
                results[name] = train(config, workdir / name)
            # The second is what an accelerator's lack of memory raises, among others.
            except (InputError, jax.errors.JaxRuntimeError) as e:
                failed[name] = first_line(e)
                logging.error("%s failed: %s", name, e)
            except Preempted as e:
                if jax.process_index() == 0:
                    print(e, file=sys.stderr)
                sys.exit(128 + e.signal)
            jax.clear_caches()  # the programs of one run are no use to the next
        if jax.process_index() == 0 and results:
            values = swept_values(configs)
            _write(workdir, values, results)
            print(_table(values, results))
            print(f"\ntable        {workdir / TABLE}\nTensorBoard  tensorboard --logdir {workdir}")
    if failed:
        said = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        raise InputError(f"{len(failed)} of {len(configs)} runs failed: {said}")


def swept_values(configs: Mapping[str, ConfigDict]) -> dict[str, dict[str, Any]]:
    """For each run the fields that are not the same in all, by dotted name."""
    fields = {name: fit.flatten(config) for name, config in configs.items()}
    first = next(iter(fields.values()))
    swept = [
        field
        for field, value in first.items()
        if not field.startswith("defaults.") and any(f[field] != value for f in fields.values())
    ]
    return {name: {field: found[field] for field in swept} for name, found in fields.items()}


def _columns(values: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    best, score = results["best"] or {}, _score(results)
    return values | {
        score: results[score],
        "loss": results["loss"],
        f"best_validation_{score}": best.get(score),
        "best_step": best.get("step"),
        "step": results["step"],
    }


def _score(results: dict[str, Any]) -> str:
    """The measure that ranks runs; of multi-label data the mean average precision."""
    return "mAP" if "mAP" in results else "top1"


def _table(values: dict[str, dict[str, Any]], results: dict[str, dict[str, Any]]) -> str:
    ranked = sorted(
        results, key=lambda name: (-results[name][_score(results[name])], results[name]["loss"])
    )
    rows = [_columns(values[name], results[name]) for name in ranked]
    return format_table([list(rows[0]), *([_text(v) for v in row.values()] for row in rows)])


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _write(
    workdir: epath.Path, values: dict[str, dict[str, Any]], results: dict[str, dict[str, Any]]
) -> None:
    """Writes sweep.csv in the order of the runs, and TensorBoard's list of hyperparameters."""
    rows = [{"run": name} | _columns(values[name], found) for name, found in results.items()]
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    storage.write_atomically(workdir / TABLE, text.getvalue().encode())
    tags = (f"final/{_score(next(iter(results.values())))}", "final/loss", "validation/loss")
    # Without it TensorBoard compares the runs by all fields of their configs.
    summary = hparams.hparams_config_pb(
        hparams=[hparams.HParam(field) for field in next(iter(values.values()))],
        metrics=[hparams.Metric(tag) for tag in tags],
    )
    writer = EventFileWriter(os.fspath(workdir))
    writer.add_event(event_pb2.Event(summary=summary))
    writer.close()
