"""Optimizers and learning-rate schedules of the recipes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import optax
from absl import logging

from timesformer_jax.errors import InputError

if TYPE_CHECKING:  # the step runs where ml_collections is not installed
    from ml_collections import ConfigDict


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
        return optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=peak,
            warmup_steps=round(config.warmup_epochs * steps_per_epoch),
            decay_steps=round(config.epochs * steps_per_epoch),
        )
    raise InputError(f"optimizer.schedule must be step or cosine, not {config.schedule!r}")


def make_optimizer(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """SGD with Nesterov momentum as PyTorch defines it, or AdamW.

    Both decay every parameter, as the release does; SGD adds the decay to the gradient before
    momentum, AdamW after its scaling.
    """
    if config.name == "sgd":
        return optax.chain(
            optax.add_decayed_weights(config.weight_decay),
            optax.trace(config.momentum, nesterov=True),
            optax.scale_by_learning_rate(schedule),
        )
    if config.name == "adamw":
        return optax.adamw(schedule, weight_decay=config.weight_decay)
    raise InputError(f"optimizer.name must be sgd or adamw, not {config.name!r}")
