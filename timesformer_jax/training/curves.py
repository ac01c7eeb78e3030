"""The scalars of a run: in TensorBoard and the log, in curves.csv, and drawn in curves.png."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging
from clu import metric_writers
from etils import epath

from timesformer_jax import storage
from timesformer_jax.checkpoints.run_files import CURVES as PICTURE
from timesformer_jax.errors import InputError

# Of scalars, before the slash of their names; in the order of the columns.
GROUPS = ("train", "validation", "final")

# In a workdir.
TENSORBOARD, TABLE = "tensorboard", "curves.csv"


class Scalars:
    """Writes scalars in process 0; the others only log.

    TensorBoard gets them at once. The table is written by `save`, which is called with every
    checkpoint: a run that was killed and goes on from a checkpoint finds the rows up to it, and
    makes the others again.

    Args:
      workdir: of the run.
    """

    def __init__(self, workdir: epath.Path):
        self._workdir = workdir
        self._writes = jax.process_index() == 0
        self._writer = metric_writers.create_default_writer(
            os.fspath(workdir / TENSORBOARD), just_logging=not self._writes, asynchronous=False
        )
        self._rows: dict[int, dict[str, Any]] = {}

    def begin(self, step: int, hparams: Mapping[str, Any]) -> None:
        """To be called before the first scalar.

        Args:
          step: finished steps; the rows after them are dropped.
          hparams: the config by dotted name, for TensorBoard's table of hyperparameters.
        """
        if not self._writes:
            return
        if step:
            self._rows = {s: row for s, row in _read(self._workdir / TABLE).items() if s <= step}
            return
        # Not by the writer above, which would log all fields.
        writer = metric_writers.SummaryWriter(os.fspath(self._workdir / TENSORBOARD))
        writer.write_hparams(
            {k: v if isinstance(v, (bool, int, float)) else str(v) for k, v in hparams.items()}
        )
        writer.close()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds scalars with names such as "train/loss"."""
        self._writer.write_scalars(step, values)
        self._rows.setdefault(step, {}).update(values)

    def save(self) -> None:
        """Writes curves.csv: a row for each step with scalars, a column for each of their names."""
        self._writer.flush()
        if not self._writes or not self._rows:
            return
        names = {name for row in self._rows.values() for name in row}
        names = sorted(names, key=lambda name: (GROUPS.index(name.partition("/")[0]), name))
        text = io.StringIO()
        table = csv.DictWriter(text, ["step", *names], lineterminator="\n")
        table.writeheader()
        for step in sorted(self._rows):
            table.writerow({"step": step} | self._rows[step])
        self._write_file(TABLE, text.getvalue().encode())

    def draw(self) -> None:
        """Draws curves.png, if matplotlib is installed: loss and accuracy by step."""
        if not self._writes:
            return
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError:
            logging.info("%s is not drawn: pip install matplotlib", PICTURE)
            return
        figure = Figure(figsize=(10, 4), layout="constrained")
        loss, accuracy = figure.subplots(1, 2)
        self._lines(loss, {"training": "train/loss", "validation": "validation/loss"})
        loss.set(ylabel="loss", ylim=(0, None))
        lines = {
            "top-1": "validation/top1", "top-5": "validation/top5", "mAP": "validation/mAP",
        }  # fmt: skip
        self._lines(accuracy, lines)
        accuracy.set(ylabel="validation accuracy", ylim=(0, 1.02))
        picture = io.BytesIO()
        FigureCanvasAgg(figure).print_png(picture)
        self._write_file(PICTURE, picture.getvalue())

    def _lines(self, axes: Any, names: Mapping[str, str]) -> None:
        """One line for each label and scalar name; few points are marked."""
        for label, name in names.items():
            points = [(step, row[name]) for step, row in sorted(self._rows.items()) if name in row]
            marker = "o" if len(points) < 30 else None
            axes.plot(*zip(*points), label=label, marker=marker, markersize=4) if points else None
        axes.set(xlabel="step", xlim=(0, None))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()

    def _write_file(self, name: str, content: bytes) -> None:
        try:
            storage.write_atomically(self._workdir / name, content)
        except OSError as e:
            raise InputError(
                f"cannot write {self._workdir / name} ({e.strerror}); free space and run again: "
                "earlier checkpoints are kept"
            ) from e

    def close(self) -> None:
        self._writer.close()


def _read(path: epath.Path) -> dict[int, dict[str, float]]:
    """The rows of a table by step; none if there is no table, or somebody else wrote it."""
    if not path.exists():
        return {}
    try:
        return {
            int(row.pop("step")): {
                name: float(value)
                for name, value in row.items()
                if value and name.partition("/")[0] in GROUPS
            }
            for row in csv.DictReader(path.read_text().splitlines())
        }
    except (ValueError, KeyError, TypeError):
        logging.warning("%s cannot be read: its earlier rows are lost", path)
        return {}
