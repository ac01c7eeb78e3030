"""What a run is made of: config, data, model, mesh and step, all checked before it begins."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from absl import logging
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from timesformer_jax import storage
from timesformer_jax.checkpoints.convert.checkpoint import Checkpoint
from timesformer_jax.checkpoints.metadata import CheckpointMetadata
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.data.demo import make as demo
from timesformer_jax.data.input import pipeline
from timesformer_jax.data.records.open import absolute_source, open_split
from timesformer_jax.data.records.split import Split, take_fraction
from timesformer_jax.distributed import hosts
from timesformer_jax.distributed.device_memory import compiled_to_fit
from timesformer_jax.distributed.mesh import check_batch, make_mesh
from timesformer_jax.host_memory import require_memory_for
from timesformer_jax.models import tuning
from timesformer_jax.training.checks import check_config, check_model, model_config
from timesformer_jax.training.fitting import fitted
from timesformer_jax.training.optimizer import learning_rate, make_optimizer
from timesformer_jax.training.step import Metrics, TrainState, abstract_state, make_train_step
from timesformer_jax.transforms.augmentation import Augmentation


class Run(NamedTuple):
    """What a run is made of; it follows from the config and the data.

    Attributes:
      config: a recipe of `recipes`, fitted to the checkpoint and the data.
      train_split, eval_split: the data.
      source: the checkpoint to start from; None if the run starts at random parameters, or goes on.
      metadata: of the checkpoints; has the model and its clips.
      mesh: the devices.
      optimizer: how the parameters change.
      target: shapes, dtypes and shardings of the state.
      train_step: the jitted training step.
      steps_per_epoch, total_steps: the length.
    """

    config: ConfigDict
    train_split: Split
    eval_split: Split
    source: Checkpoint | None
    metadata: CheckpointMetadata
    mesh: Mesh
    optimizer: optax.GradientTransformation
    target: TrainState
    train_step: Callable[..., tuple[TrainState, Metrics]]
    steps_per_epoch: int
    total_steps: int


def make_run(config: ConfigDict, workdir: epath.Path) -> Run:
    """Opens the data, fits the config to it, checks everything, and builds the training step."""
    augmentation = Augmentation(**config.augment)
    train_split, eval_split = _open_data(config)
    mesh = make_mesh(**config.mesh)
    config, source = fitted(config, workdir, mesh, train_split, eval_split)
    check_config(config)
    short_side = int(min(train_split.height[0], train_split.width[0]))
    clip = ClipSpec(**config.clip, short_side=short_side)
    model = model_config(config, train_split.label_names)
    metadata = CheckpointMetadata(
        model, clip, train_split.label_names, _to_json(config),
        multilabel=train_split.targets is not None,
    )  # fmt: skip

    check_model(mesh, model, clip)
    check_batch(mesh, config.batch_size, "--config.batch_size", config.accumulate_steps)
    check_batch(mesh, config.eval.batch_size, "--config.eval.batch_size")
    for flag, clips in (
        ("batch_size", config.batch_size),
        ("eval.batch_size", config.eval.batch_size * config.eval.views),
    ):
        own = clips // jax.process_count()
        require_memory_for(own, clip.frames, clip.crop, f"--config.{flag}")
    steps_per_epoch = pipeline.batches_per_epoch(train_split, config.batch_size)
    schedule = learning_rate(config.optimizer, config.batch_size, steps_per_epoch)
    optimizer = make_optimizer(config.optimizer, schedule)
    target = abstract_state(model, optimizer, mesh, ema=config.ema_decay > 0)
    train_step = make_train_step(
        model, clip, optimizer, schedule, target, mesh, config.seed, augmentation,
        trainable=config.optimizer.trainable, accumulate_steps=config.accumulate_steps,
        ema_decay=config.ema_decay,
    )  # fmt: skip
    return Run(
        config, train_split, eval_split, source, metadata, mesh, optimizer, target,
        compiled_to_fit(train_step),
        steps_per_epoch, config.epochs * steps_per_epoch,
    )  # fmt: skip


def _open_data(config: ConfigDict) -> tuple[Split, Split]:
    """The training and evaluation splits; the demo's data is made where there is none yet."""
    data = config.data
    if data.demo:
        hosts.once("demo", lambda: _make_demo(data.directory, data.demo))
    train_split, eval_split = (
        open_split(data.directory, split, data.fps) for split in (data.train_split, data.eval_split)
    )
    return take_fraction(train_split, data.train_fraction), eval_split


def _make_demo(directory: str, task: str) -> None:
    if demo.is_free(directory):
        demo.prepare_demo(directory, task)
    else:
        logging.info("%s holds other data: the demo's is not made", directory)


def choose_kernels(run: Run) -> None:
    """Tries the attention kernels of the training step on the device."""
    config, clip = run.config, run.metadata.clip
    tuning.choose_kernels(
        run.metadata.model, config.batch_size // config.accumulate_steps, clip.frames, clip.crop,
        gradients=config.optimizer.trainable == "all",  # the head's need no attention's
        masked=clip.short == "mask",
    )  # fmt: skip


def _to_json(config: ConfigDict) -> dict[str, Any]:
    """The config as JSON values, with the absolute paths of its data and of a pretrained file.

    The kernels are no part of it: they are chosen for the device that a program runs on. Neither
    are the `defaults`: all is decided.
    """
    fields = json.loads(config.to_json())
    del fields["attention_kernels"], fields["defaults"]
    fields["data"]["directory"] = absolute_source(config.data.directory)
    if config.pretrained and (path := storage.absolute(config.pretrained)).exists():
        fields["pretrained"] = os.fspath(path)
    return fields
