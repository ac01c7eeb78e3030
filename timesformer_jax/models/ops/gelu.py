"""GELU, the activation of the MLP."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from timesformer_jax.models.ops.reference import with_reference


def reference(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x * Phi(x), where Phi is the standard normal distribution function."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)


@with_reference(reference)
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x * Phi(x), the exact GELU, computed in float32 and returned in the dtype of `x`.

    Phi is computed by erf, as PyTorch does. `jax.nn.gelu` uses erfc, which is more exact where the
    value is close to zero, but which XLA compiles to a separate pass on a GPU. The backward pass
    saves `x` alone; derived automatically it would save two arrays.
    """
    return _gelu(x)


@jax.custom_vjp
def _gelu(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return (wide * _normal_cdf(wide)).astype(x.dtype)


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def _forward(x: Any) -> tuple:
    return _gelu(x.value), x.value


def _backward(x: jax.Array, g: jax.Array | SymbolicZero) -> tuple:
    if isinstance(g, SymbolicZero):  # the loss does not depend on the last block's patches
        return (None,)
    wide = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * jnp.square(wide)) * math.sqrt(0.5 / math.pi)
    return ((g * (_normal_cdf(wide) + wide * density)).astype(x.dtype),)


_gelu.defvjp(_forward, _backward, symbolic_zeros=True)
