"""Where a run starts: at its newest checkpoint, at pretrained or at random parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from absl import logging
from flax import nnx
from ml_collections import ConfigDict

from timesformer_jax.checkpoints import convert
from timesformer_jax.checkpoints.metadata import CheckpointMetadata, flatten_config
from timesformer_jax.checkpoints.sources import NoCheckpoint, locate
from timesformer_jax.checkpoints.store import Checkpoints
from timesformer_jax.data.input import pipeline
from timesformer_jax.errors import InputError
from timesformer_jax.models.timesformer import TimeSformer, parameters
from timesformer_jax.training.step import TrainState


def restore(
    checkpoints: Checkpoints, target: TrainState, metadata: CheckpointMetadata
) -> tuple[TrainState | None, pipeline.IteratorState | None, CheckpointMetadata]:
    """The newest readable checkpoint of this run.

    Returns:
      The state and the data iterator's position, both None if no checkpoint was saved yet; and the
      metadata, with the license of the checkpoint.

    Raises:
      InputError: if the checkpoints belong to another run, or none of them can be read.
    """

    def read(step: int) -> tuple[CheckpointMetadata, TrainState, dict[str, Any]]:
        saved = checkpoints.metadata(step)
        _check_same_run(checkpoints, metadata, saved)
        return saved, *checkpoints.restore(step, target)

    found = checkpoints.read_newest(read)
    if found is None:
        return None, None, metadata
    step, (saved, state, saved_progress) = found
    checkpoints.set_aside_after(step)
    logging.info("going on from step %d of %s", step, checkpoints.directory)
    for name, (now, before) in _changes(metadata, saved).items():
        logging.warning("this run goes on with another %s: %s, it was %s", name, now, before)
    state = state._replace(step=jax.device_put(np.int32(step), target.step.sharding))
    metadata = dataclasses.replace(metadata, license=saved.license, license_note=saved.license_note)
    return state, pipeline.IteratorState(**saved_progress["position"]), metadata


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


def _changes(metadata: CheckpointMetadata, saved: CheckpointMetadata) -> dict[str, tuple[Any, Any]]:
    """The fields of the config that differ, by name: the new and the saved value."""
    ours, theirs = flatten_config(metadata.config), flatten_config(saved.config)
    return {k: (ours[k], theirs.get(k)) for k in ours if ours[k] != theirs.get(k)}


def progress(position: pipeline.IteratorState) -> dict[str, Any]:
    """The JSON values that a checkpoint holds beside the arrays."""
    return {"position": dataclasses.asdict(position)}


def initial_parameters(
    config: ConfigDict, metadata: CheckpointMetadata
) -> tuple[Any, CheckpointMetadata]:
    """The first parameters, or a function that draws them; and the metadata with their license.

    Raises:
      InputError: if the checkpoint in config.pretrained is missing or does not fit the model.
    """
    if not config.pretrained:
        model = metadata.model
        return lambda: parameters(TimeSformer(model, rngs=nnx.Rngs(config.seed))), metadata
    try:
        found = locate(config.pretrained)
    except NoCheckpoint as e:
        raise InputError(
            f"{e}; say with --config.pretrained=FILE where it is, or with --config.pretrained= "
            "to start from none"
        ) from None
    # The config of the run overrides that of the checkpoint.
    fields = dataclasses.asdict(metadata.model)
    try:
        source = convert.read(found, **fields)
    except convert.SizeMismatch as e:
        flags = " ".join(f"--config.model.{name}={value}" for name, value in e.found.items())
        raise InputError(f"{e}: pass {flags}") from None
    logging.info("starting from %s", config.pretrained)
    return source.load(), dataclasses.replace(
        metadata, license=source.license, license_note=source.license_note
    )
