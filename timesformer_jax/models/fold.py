"""A model for inference alone: linear layers that follow one another with nothing between, as one.

In training the further linear layer of an attention (`temporal_fc` of the release) comes after drop
path, which acts between it and the projection. Without drop path both are one product: of the base
model's 196 GMACs a clip 11 are saved.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from timesformer_jax.models.linear import Linear
from timesformer_jax.models.timesformer import TimeSformer


def folded(model: TimeSformer) -> TimeSformer:
    """A model of the same logits and features, its projections multiplied by what follows them.

    It has no drop path, so that a key changes nothing. Do not train or save it: its parameters are
    not those of its config. Inside `jax.jit` the kernels are multiplied at every call, which a
    batch of a few clips outweighs.
    """
    inference = nnx.clone(model)
    inference.config = dataclasses.replace(model.config, drop_path=0.0)
    for block in inference.blocks:
        for attention in block.attention.values():
            if attention.fc is not None:
                _fold(attention.proj, attention.fc)
                attention.fc = None
    return inference


def _fold(first: Linear, second: Linear) -> None:
    """(x W + b) W' + b' as x (W W') + (b W' + b'), in `first`."""

    def through(x: jax.Array) -> jax.Array:
        return jnp.matmul(x, second.kernel[...], precision="highest")

    first.bias.set_value(through(first.bias[...]) + second.bias[...])
    first.kernel.set_value(through(first.kernel[...]))
