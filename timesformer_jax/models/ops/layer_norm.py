"""Layer normalisation, with its gradient written out."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.custom_derivatives import SymbolicZero

EPSILON = 1e-6


class LayerNorm(nnx.LayerNorm):
    """`nnx.LayerNorm` of the last axis, computed and returned in float32 always."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        super().__init__(width, epsilon=EPSILON, dtype=jnp.float32, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., D) of any float dtype to (..., D) float32."""
        return layer_norm(x, self.scale[...], self.bias[...])


@jax.custom_vjp
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """Each row less its mean, over its standard deviation, times `scale` and plus `bias`.

    Derived term by term, the gradient passes over the tokens several times more, and XLA's CPU
    compiler computes that of every later layer anew wherever the residual stream's is needed: it
    was half the time of a training step.

    Args:
      x: (..., D), of any float dtype; the result and the parameters' gradients are float32.
      scale, bias: (D,) float32.
    """
    return _normalised(x, scale, bias)[0]


def _normalised(x: jax.Array, scale: jax.Array, bias: jax.Array) -> tuple:
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(wide - mean).mean(-1, keepdims=True) + EPSILON)
    return (wide - mean) * inverse * scale + bias, (x, mean, inverse, scale)


def _forward(*arguments: Any) -> tuple:
    out, (x, *statistics, scale) = _normalised(*(argument.value for argument in arguments))
    # Opaque: XLA's GPU compiler would take these means together with the gradient's sums, and write
    # float32 arrays of all tokens between them.
    return out, (x, *jax.lax.optimization_barrier(statistics), scale)


def _backward(saved: tuple, g: jax.Array | SymbolicZero) -> tuple:
    if isinstance(g, SymbolicZero):  # of the last block's patches, on which no loss depends
        return None, None, None
    x, mean, inverse, scale = saved
    normal = (x.astype(jnp.float32) - mean) * inverse
    along = normal * (row_sums(g * normal, scale) / scale.size)[..., None]
    x_bar = (g * scale - (row_sums(g, scale) / scale.size)[..., None] - along) * inverse
    tokens = tuple(range(g.ndim - 1))
    return x_bar.astype(x.dtype), (g * normal).sum(tokens), g.sum(tokens)


layer_norm.defvjp(_forward, _backward, symbolic_zeros=True)


def row_sums(x: jax.Array, scale: jax.Array) -> jax.Array:
    """The sum of each row of `x * scale`: (..., D) and (D,) to (...)."""
    return jax.lax.platform_dependent(
        x, scale,
        # XLA's CPU compiler takes five times as long for the reduction as for the product.
        cpu=lambda x, scale: x @ scale,
        default=lambda x, scale: (x * scale).sum(-1),
    )  # fmt: skip
