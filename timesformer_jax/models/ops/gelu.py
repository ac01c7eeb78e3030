"""The MLP's activation, with its gradient written out."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """x times the normal distribution's share below x: the exact GELU, by erf as PyTorch's.

    `jax.nn.gelu` takes erfc instead, more exact where the value is next to zero, of which XLA makes
    a pass of its own on a GPU, and keeps two arrays for the gradient; here it is made from x.

    Args:
      x: of any float dtype, which the result has too; computed in float32.
    """
    wide = x.astype(jnp.float32)
    return (wide * _below(wide)).astype(x.dtype)


def _below(x: jax.Array) -> jax.Array:
    return 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def _forward(x: Any) -> tuple:
    return gelu(x.value), x.value


def _backward(x: jax.Array, g: jax.Array | SymbolicZero) -> tuple:
    if isinstance(g, SymbolicZero):  # of the last block's patches, on which no loss depends
        return (None,)
    wide = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * jnp.square(wide)) * math.sqrt(0.5 / math.pi)
    return ((g * (_below(wide) + wide * density)).astype(x.dtype),)


gelu.defvjp(_forward, _backward, symbolic_zeros=True)
