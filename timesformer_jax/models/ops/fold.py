"""A model of fewer products: linear layers with no more than drop path between them, as one.

The further linear layer of an attention (`temporal_fc` of the release) follows its projection, and
drop path between them multiplies whole rows, which is the same after both: of the base model's 196
GMACs a clip 11 are saved, forward and in each of the two products of the backward pass.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from timesformer_jax.distributed.sharding import gathered
from timesformer_jax.models.timesformer import Attention, TimeSformer


def folded(model: TimeSformer) -> TimeSformer:
    """A model of the same logits, features and gradients, drop path's draws included.

    Do not save it: its parameters are not those of its config. Inside `jax.jit` the kernels are
    multiplied at every call, and the gradient goes through that to the parameters of `model`; more
    tokens than the model is wide outweigh it.
    """
    new = nnx.clone(model)
    for block in new.blocks:
        for attention in block.attention.values():
            if attention.fc is not None:
                _fold(attention)
    return new


class Shift(nnx.Module):
    """What is left of a linear layer whose kernel went into the one before."""

    def __init__(self, bias: jax.Array):
        self.bias = nnx.Param(bias)

    def __call__(self, x: Any) -> Any:
        return jax.tree.map(lambda t: t + self.bias[...].astype(t.dtype), x)


def _fold(attention: Attention) -> None:
    """(x W + b) W' + b' as x (W W') + b W' in `proj`, + b' in `fc`."""
    first, second = attention.proj, attention.fc
    # The product is rounded once, to the dtype that it is used in.
    precision = "highest" if first.dtype == jnp.float32 else "high"
    further = gathered(second.kernel[...], second.rule)

    def through(x: jax.Array) -> jax.Array:
        return jnp.matmul(x, further, precision=precision)

    first.bias.set_value(through(first.bias[...]))
    first.kernel.set_value(through(gathered(first.kernel[...], first.rule)))
    attention.fc = Shift(second.bias[...])
