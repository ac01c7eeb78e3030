"""GELU, the activation of the MLP."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from timesformer_jax.models.ops.reference import with_reference


def reference(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x * Phi(x), where Phi is the standard normal distribution function."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)


@with_reference(reference)
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x * Phi(x), the exact GELU, computed in float32 and returned in the dtype of `x`.

    Phi is computed by erf, as PyTorch does. `jax.nn.gelu` uses erfc, which is more exact where the
    value is close to zero, but which XLA compiles to a separate pass on a GPU.
    """
    wide = x.astype(jnp.float32)
    return (wide * 0.5 * (1 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)
