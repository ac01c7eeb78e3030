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
from timesformer_jax.data.records.split import Split
from timesformer_jax.distributed.mesh import BATCH_SPEC
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
      InputError: if the checkpoint cannot be read.
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
    _apply(config, fit.to_data(config, clips, labels, multiple))
    if jax.process_index() == 0:
        for sentence in fit.warnings(config, clips, _clips(evaluation), labels):
            logging.warning("%s", sentence)
    return config, source


def _apply(config: ConfigDict, changes: Iterable[fit.Change]) -> None:
    changes = list(changes)
    fit.apply(config, changes)
    if jax.process_index() == 0:
        for change in changes:
            logging.info("%s", change.reason)


def _clips(split: Split) -> fit.Clips:
    return fit.Clips(split.num_frames, split.fps, split.label, split.targets)
