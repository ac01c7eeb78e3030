"""Optimizers and learning-rate schedules of the recipes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import optax
from absl import logging

from timesformer_jax.errors import InputError

if TYPE_CHECKING:  # the step runs where ml_collections is not installed
    from ml_collections import ConfigDict

TRAINS = ("all", "head")


def learning_rate(config: ConfigDict, batch_size: int, steps_per_epoch: int) -> optax.Schedule:
    """Learning rate as a function of the step, scaled to the batch.

    Args:
      config: the optimizer's: learning_rate at `reference_batch_size`, and schedule, either
        "step", which multiplies it by decay_factors[i] from epoch decay_epochs[i] on, or "cosine",
        which rises linearly over warmup_epochs and falls to zero at the end of `epochs`.
      batch_size: of all devices together.
      steps_per_epoch: to turn epochs into steps.
    """
    peak = config.learning_rate * batch_size / config.reference_batch_size
    if batch_size != config.reference_batch_size:
        logging.info(
            "learning rate %g for a batch of %d is scaled to %g for %d",
            config.learning_rate, config.reference_batch_size, peak, batch_size,
        )  # fmt: skip
    if config.schedule == "step":
        if len(config.decay_epochs) != len(config.decay_factors):
            raise InputError("optimizer.decay_epochs and decay_factors must be equally many")
        # optax multiplies by the ratio to the factor before.
        factors = (1.0, *config.decay_factors)
        ratios = {
            round(epoch * steps_per_epoch): factors[i + 1] / factors[i]
            for i, epoch in enumerate(config.decay_epochs)
        }
        return optax.piecewise_constant_schedule(peak, ratios)
    if config.schedule == "cosine":
        if not 0 <= config.warmup_epochs < config.epochs:
            raise InputError(
                f"optimizer.warmup_epochs is {config.warmup_epochs:g} and must be less than the "
                f"{config.epochs} epochs; pass --config.optimizer.warmup_epochs=0 for none"
            )
        warmup, total = (
            round(epochs * steps_per_epoch) for epochs in (config.warmup_epochs, config.epochs)
        )
        if not warmup:  # optax warns of one that takes no step
            return optax.cosine_decay_schedule(peak, total)
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, total)
    raise InputError(f"optimizer.schedule must be step or cosine, not {config.schedule!r}")


def make_optimizer(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """SGD with Nesterov momentum as PyTorch defines it, or AdamW, and what goes before and after.

    Both decay every parameter, as the release does; SGD adds the decay to the gradient before
    momentum, AdamW after its scaling.

    Args:
      config: name, "sgd" or "adamw", with weight_decay and momentum (of SGD); clip_norm, to which
        a gradient of a larger global norm is scaled down, 0 for none; layer_decay, as
        `scale_by_layer` uses it, 1 for none; train, the parameters that are `trained`.
      schedule: the learning rate.

    Returns:
      Its state is of the trained parameters alone. `init` takes all parameters; `update` takes all
      parameters and the gradients of the trained ones, and gives those ones' updates.

    Raises:
      InputError: if a name is not known or a number impossible.
    """
    if config.train not in TRAINS:
        raise InputError(f"optimizer.train must be all or head, not {config.train!r}")
    if not 0 < config.layer_decay <= 1:
        raise InputError(
            f"optimizer.layer_decay must be above 0 and at most 1, not {config.layer_decay}"
        )
    # The state has the same form with and without them, so that a run can go on with another value.
    clip, decay = optax.identity(), optax.identity()
    if config.clip_norm:
        clip = optax.clip_by_global_norm(config.clip_norm)
    if config.layer_decay < 1:
        decay = scale_by_layer(config.layer_decay)
    optimizer = optax.chain(clip, _rule(config, schedule), decay)
    return optax.GradientTransformation(
        lambda params: optimizer.init(trained(params, config.train)),
        lambda grads, state, params: optimizer.update(grads, state, trained(params, config.train)),
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


def trained(params: dict, train: str) -> dict:
    """The parameters that training changes: "all", or those of the "head"."""
    return params if train == "all" else {train: params[train]}


def scale_by_layer(decay: float) -> optax.GradientTransformation:
    """Smaller steps the further from the head, as BEiT (arXiv 2106.08254) and MAE fine-tune.

    Of L blocks, the updates of block i, from 0, are scaled by decay ** (L - i), those of the
    embeddings by decay ** (L + 1), and those of the final norm and the head by 1. Weight decay,
    which is part of the update, scales with it.
    """

    def update(updates: dict, params: Any = None) -> dict:
        blocks = len(updates.get("blocks", ()))
        return jax.tree.map_with_path(
            lambda path, x: decay ** _layers_above([key.key for key in path], blocks) * x, updates
        )

    return optax.stateless(update)


def _layers_above(path: list[str], blocks: int) -> int:
    """How many layers lie between a parameter and the head."""
    if path[0] == "blocks":
        return blocks - int(path[1])
    return {"embedding": blocks + 1, "norm": 0, "head": 0}[path[0]]
