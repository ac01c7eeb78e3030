"""Fits the config of a run to its checkpoint and its data, and says what it changed."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable

import jax
from absl import logging
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from timesformer_jax.checkpoints.convert.checkpoint import Checkpoint
from timesformer_jax.checkpoints.metadata import flatten_config
from timesformer_jax.data import problems
from timesformer_jax.data.problems import Problem
from timesformer_jax.data.records.split import Split
from timesformer_jax.distributed.mesh import BATCH_SPEC
from timesformer_jax.errors import InputError
from timesformer_jax.recipes import fit
from timesformer_jax.training import resume


def fitted(
    config: ConfigDict, workdir: epath.Path, mesh: Mesh, train: Split, evaluation: Split
) -> tuple[ConfigDict, Checkpoint | None]:
    """The config that a run trains with, and the checkpoint that it starts from.

    A run that goes on decides as it did when it began: its own checkpoint says how, so that neither
    the pretrained one nor the data need be as they were.

    Args:
      config: a recipe; it is not changed.
      workdir: of the run.
      mesh: the devices.
      train, evaluation: the data.

    Returns:
      The config, and what `config.pretrained` names: None for a run that goes on or starts at
      random parameters.

    Raises:
      InputError: if the checkpoint cannot be read, or the data cannot be trained with.
    """
    config = copy.deepcopy(config)
    if (saved := resume.saved_config(workdir)) is not None:
        fit.apply(config, fit.to_saved_run(config, flatten_config(saved)))
        return config, None
    source = resume.open_pretrained(config)
    if source is None:
        _apply(config, fit.without_checkpoint(config))
    else:
        is_image = source.is_image_model
        _apply(config, fit.to_checkpoint(config, source.path, source.config, source.clip, is_image))
    clips, labels = _clips(train), train.label_names
    multiple = config.accumulate_steps * math.prod(mesh.shape[axis] for axis in BATCH_SPEC[0])
    if len(clips) < multiple:
        raise InputError(
            f"{len(clips)} training clips cannot be divided among {multiple} parts of a batch"
            f" (devices, and --config.accumulate_steps={config.accumulate_steps}): add videos, or"
            " use fewer of these"
        )
    _apply(config, fit.to_data(config, clips, labels, multiple))
    _tell([*_problems(train, evaluation), *map(Problem, fit.warnings(config, clips, labels))])
    return config, source


def _problems(train: Split, evaluation: Split) -> list[Problem]:
    """What is wrong with the data, as `timesformer check` finds it."""
    counts = {
        name: problems.count_classes(s.label, s.video, s.targets, len(s.label_names))
        for name, s in {evaluation.name: evaluation, "train": train}.items()
    }
    found = problems.of_classes(counts, train.label_names)
    if evaluation.name == "train":  # which somebody asked for
        measured = Problem("accuracy is measured with the training clips, not with others")
        found = [measured if p.text == problems.NO_VALIDATION else p for p in found]
    return found


def _tell(found: Iterable[Problem]) -> None:
    """Logs warnings; raises InputError of an error."""
    for problem in found:
        if problem.is_error:
            raise InputError(problem.text)
        if jax.process_index() == 0:
            logging.warning("%s", problem.text)


def _apply(config: ConfigDict, changes: Iterable[fit.Change]) -> None:
    changes = list(changes)
    fit.apply(config, changes)
    if jax.process_index() == 0:
        for change in changes:
            logging.log(logging.WARNING if change.is_warning else logging.INFO, "%s", change.reason)


def _clips(split: Split) -> fit.Clips:
    return fit.Clips(split.num_frames, split.fps)
