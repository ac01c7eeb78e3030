"""Where a run starts: at its newest checkpoint, at pretrained or at random parameters."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from etils import epath
from flax import nnx
from ml_collections import ConfigDict

from timesformer_jax.checkpoints import convert, store
from timesformer_jax.checkpoints.convert.checkpoint import Checkpoint
from timesformer_jax.checkpoints.metadata import CheckpointMetadata, flatten_config
from timesformer_jax.checkpoints.sources import locate
from timesformer_jax.checkpoints.store import Checkpoints
from timesformer_jax.data.input import pipeline
from timesformer_jax.errors import InputError
from timesformer_jax.models.timesformer import TimeSformer, parameters
from timesformer_jax.recipes import fit
from timesformer_jax.training.step import TrainState

# The fields of a config that differ, by name: the new and the saved value.
Changes = dict[str, tuple[Any, Any]]


class Restored(NamedTuple):
    """Where an interrupted run goes on.

    Attributes:
      state, position: the training state and the data iterator's position.
      metadata: of the run, with the license of the checkpoint.
      changes: what is not as it was saved.
    """

    state: TrainState
    position: pipeline.IteratorState
    metadata: CheckpointMetadata
    changes: Changes


def saved_config(workdir: epath.Path) -> dict[str, Any] | None:
    """The config of the newest checkpoint of a run: {} if none is readable, None if none exists."""
    folder = workdir / store.FOLDER
    if not folder.is_dir():
        return None
    with contextlib.closing(Checkpoints(folder, read_only=True)) as checkpoints:
        for step in reversed(checkpoints.steps()):
            with contextlib.suppress(store.DamagedCheckpoint):
                return checkpoints.metadata(step).config
        return {} if checkpoints.steps() else None


def restore(
    checkpoints: Checkpoints, target: TrainState, metadata: CheckpointMetadata
) -> Restored | None:
    """The newest readable checkpoint of this run, None if no checkpoint was saved yet.

    Raises:
      InputError: if the checkpoints belong to another run, or none of them can be read.
    """

    def read(step: int) -> tuple[CheckpointMetadata, TrainState, dict[str, Any]]:
        saved = checkpoints.metadata(step)
        _check_same_run(checkpoints, metadata, saved)
        return saved, *checkpoints.restore(step, target)

    found = checkpoints.read_newest(read)
    if found is None:
        return None
    step, (saved, state, saved_progress) = found
    checkpoints.set_aside_after(step)
    state = state._replace(step=jax.device_put(np.int32(step), target.step.sharding))
    return Restored(
        state,
        pipeline.IteratorState(**saved_progress["position"]),
        dataclasses.replace(metadata, license=saved.license, license_note=saved.license_note),
        _changes(metadata, saved),
    )


def _check_same_run(
    checkpoints: Checkpoints, metadata: CheckpointMetadata, saved: CheckpointMetadata
) -> None:
    # Remat and scanned layers change how the model runs, not what it computes.
    ours, theirs = (
        dataclasses.asdict(dataclasses.replace(c.model, remat="none", scan_layers=False))
        for c in (metadata, saved)
    )
    changed = [f"{k} is {ours[k]}, saved was {theirs[k]}" for k in ours if ours[k] != theirs[k]]
    changed += [] if saved.labels == metadata.labels else ["the labels are others"]
    fixed = (
        "batch_size", "seed", "ema_decay", "optimizer.name", "optimizer.trainable",
        "data.train_fraction",
    )  # fmt: skip
    others = _changes(metadata, saved)
    changed += [f"{k} is {v[0]}, saved was {v[1]}" for k, v in others.items() if k in fixed]
    if changed:
        raise InputError(
            f"{checkpoints.directory} belongs to another run ({'; '.join(changed)}); "
            "choose another --workdir, or that run's config"
        )


def _changes(metadata: CheckpointMetadata, saved: CheckpointMetadata) -> Changes:
    ours, theirs = flatten_config(metadata.config), flatten_config(saved.config)
    # A run that goes on no longer needs what it started from.
    return {
        name: (value, theirs.get(name))
        for name, value in ours.items()
        if value != theirs.get(name) and name != "pretrained"
    }


def progress(position: pipeline.IteratorState) -> dict[str, Any]:
    """The JSON values that a checkpoint holds beside the arrays."""
    return {"position": dataclasses.asdict(position)}


def open_pretrained(config: ConfigDict) -> Checkpoint | None:
    """The checkpoint in config.pretrained as it is; None if a run starts at random parameters.

    Raises:
      InputError: if it is missing or cannot be read.
    """
    if not config.pretrained:
        return None
    try:
        found = locate(config.pretrained)
    except InputError as e:
        raise InputError(
            f"{e}; --config.pretrained=PATH takes a file or folder instead, --config.pretrained= "
            "starts from none"
        ) from None
    source, heads = convert.open_checkpoint(found), config.model.num_heads
    decided = "model.num_heads" not in fit.automatic(config)
    same_width = source.config.hidden_size == config.model.hidden_size
    if decided and same_width and source.config.num_heads != heads:  # unless the file tells its own
        source = convert.open_checkpoint(found, heads)
    return source


def initial_parameters(
    config: ConfigDict, metadata: CheckpointMetadata, source: Checkpoint | None
) -> tuple[Any, CheckpointMetadata]:
    """The first parameters, or a function that draws them; and the metadata with their license.

    Args:
      config: of the run.
      metadata: of the run.
      source: of `open_pretrained`.

    Raises:
      InputError: if the checkpoint does not fit the model.
    """
    if source is None:
        model = metadata.model
        return lambda: parameters(TimeSformer(model, rngs=nnx.Rngs(config.seed))), metadata
    # The config of the run overrides that of the checkpoint.
    try:
        source = convert.adapted(source, **dataclasses.asdict(metadata.model))
    except convert.SizeMismatch as e:
        flags = " ".join(f"--config.model.{name}={value}" for name, value in e.found.items())
        raise InputError(f"{config.pretrained}: {e}: pass {flags}") from None
    except InputError as e:
        raise InputError(f"{config.pretrained}: {e}") from None
    logging.info("starting from %s", config.pretrained)
    return source.load(), dataclasses.replace(
        metadata, license=source.license, license_note=source.license_note
    )
