"""The optimizers and learning-rate schedules of the recipes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from timesformer_jax import ranges
from timesformer_jax.errors import InputError

if TYPE_CHECKING:  # the step also runs without ml_collections
    from ml_collections import ConfigDict

TRAINABLE = ("all", "head")


def learning_rate(config: ConfigDict, batch_size: int, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate as a function of the step, scaled linearly to the batch size.

    Args:
      config: config.optimizer. Its learning_rate is for `reference_batch_size`. Its schedule is
        "step", multiplied by decay_factors[i] from epoch decay_epochs[i] on, or "cosine", rising
        linearly over warmup_epochs and falling to zero at the end of `epochs`.
      batch_size: of all devices together.
      steps_per_epoch: converts epochs to steps.

    Raises:
      InputError: if the schedule is unknown or impossible.
    """
    peak = config.learning_rate * batch_size / config.reference_batch_size
    if batch_size != config.reference_batch_size:
        logging.info(
            "learning rate %g for a batch of %d is scaled to %g for %d",
            config.learning_rate, config.reference_batch_size, peak, batch_size,
        )  # fmt: skip
    if config.schedule == "step":
        return _steps(config, peak, steps_per_epoch)
    if config.schedule == "cosine":
        warmup, total = (
            round(epochs * steps_per_epoch) for epochs in (config.warmup_epochs, config.epochs)
        )
        if not 0 <= warmup < total:
            raise InputError(
                f"optimizer.warmup_epochs={config.warmup_epochs:g} is {warmup} steps and must be "
                f"less than optimizer.epochs={config.epochs:g}, which is {total}; pass "
                "--config.optimizer.warmup_epochs=0 for none, or more epochs"
            )
        if not warmup:  # optax warns of a warm-up of no steps
            return optax.cosine_decay_schedule(peak, total)
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, total)
    raise InputError(f"optimizer.schedule must be step or cosine, not {config.schedule!r}")


def _steps(config: ConfigDict, peak: float, steps_per_epoch: int) -> optax.Schedule:
    """The schedule "step" of `learning_rate`."""
    epochs, factors = tuple(config.decay_epochs), (1.0, *config.decay_factors)
    if len(factors) != 1 + len(epochs) or list(epochs) != sorted(epochs):
        raise InputError(
            "optimizer.decay_epochs and decay_factors must be equally many, and the epochs "
            f"ascending, not {epochs} and {factors[1:]}"
        )
    # optax multiplies by ratios of factors, which cannot fall to zero.
    first, *rates = (np.float32(peak * factor) for factor in factors)
    starts = [round(epoch * steps_per_epoch) for epoch in epochs]

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        rate = jnp.asarray(first)
        for start, after in zip(starts, rates):
            rate = jnp.where(step >= start, after, rate)
        return rate

    return schedule


def make_optimizer(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """SGD with Nesterov momentum as in PyTorch, or AdamW, with clipping and layer-wise decay.

    Weight decay applies to every parameter, as in the release. SGD adds it to the gradient before
    momentum, AdamW to the scaled update.

    Args:
      config: config.optimizer. name is "sgd" or "adamw", with weight_decay and, for SGD, momentum;
        clip_norm is the largest global norm of the gradient, 0 for no clipping; layer_decay is for
        `scale_by_layer`, 1 for none; trainable is for `trained`.
      schedule: the learning rate.

    Returns:
      An optimizer whose state covers the trained parameters only. `init` takes all parameters.
      `update` takes the gradients of the trained parameters, and all parameters; it returns the
      updates of the trained ones.

    Raises:
      InputError: if a name is unknown or a number out of range.
    """
    if config.trainable not in TRAINABLE:
        raise InputError(f"optimizer.trainable must be all or head, not {config.trainable!r}")
    for name in ("momentum", "weight_decay", "clip_norm", "layer_decay"):
        ranges.check(f"optimizer.{name}", getattr(config, name))
    # identity keeps the structure of the state, so that a run can resume with another value.
    clip, decay = optax.identity(), optax.identity()
    if config.clip_norm:
        clip = optax.clip_by_global_norm(config.clip_norm)
    if config.layer_decay < 1:
        decay = scale_by_layer(config.layer_decay)
    optimizer = optax.chain(clip, _rule(config, schedule), decay)
    return optax.GradientTransformation(
        lambda params: optimizer.init(trained(params, config.trainable)),
        lambda grads, state, params: optimizer.update(
            grads, state, trained(params, config.trainable)
        ),
    )


def _rule(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    if config.name == "sgd":
        return optax.chain(
            optax.add_decayed_weights(config.weight_decay),
            optax.trace(config.momentum, nesterov=True),
            optax.scale_by_learning_rate(schedule),
        )
    if config.name == "adamw":
        return optax.adamw(schedule, weight_decay=config.weight_decay)
    raise InputError(f"optimizer.name must be sgd or adamw, not {config.name!r}")


def trained(params: dict, trainable: str) -> dict:
    """The parameters that training changes: "all", or only the "head"."""
    return params if trainable == "all" else {trainable: params[trainable]}


def scale_by_layer(decay: float) -> optax.GradientTransformation:
    """Layer-wise learning-rate decay, as in the fine-tuning of BEiT (arXiv 2106.08254) and MAE.

    With L blocks, the update of block i, from 0, is scaled by decay ** (L - i), that of the
    embeddings by decay ** (L + 1), that of the final norm and the head by 1. Weight decay is part
    of the update and scales with it.
    """

    def update(updates: dict, params: Any = None) -> dict:
        blocks = len(updates.get("blocks", ()))
        return jax.tree.map_with_path(
            lambda path, x: decay ** _layers_above([key.key for key in path], blocks) * x, updates
        )

    return optax.stateless(update)


def _layers_above(path: list[str], blocks: int) -> int:
    """The number of layers between a parameter and the head."""
    if path[0] == "blocks":
        return blocks - int(path[1])
    return {"embedding": blocks + 1, "norm": 0, "head": 0}[path[0]]
