"""Layer normalisation over the last axis."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from timesformer_jax.models.ops.reference import with_reference

EPSILON = 1e-6

Rows = Float[Array | np.ndarray, "... d"]
Vector = Float[Array | np.ndarray, " d"]


def reference(x: Rows, scale: Vector, bias: Vector) -> Float[Array, "... d"]:
    """(x - mean) / standard deviation * scale + bias, in float32."""
    x = jnp.asarray(x, jnp.float32)
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(variance + EPSILON) * scale + bias


@with_reference(reference)
def layer_norm(x: Rows, scale: Vector, bias: Vector) -> Float[Array, "... d"]:
    """(x - mean) / standard deviation * scale + bias; the result and all sums are float32.

    The gradient is written out. Derived automatically, it passes over the tokens several times
    more, and XLA's CPU compiler recomputes the gradient of every later norm wherever it needs the
    gradient of the residual stream: that was half the time of a training step.

    Args:
      x: (..., D) of any float dtype; its gradient has this dtype.
      scale, bias: (D,) float32; their gradients are float32.
    """
    with jax.named_scope("norm"):
        return _layer_norm(x, scale, bias)


class LayerNorm(nnx.LayerNorm):
    """`nnx.LayerNorm` of the last axis, computed and returned in float32 always."""

    scale: nnx.Param
    bias: nnx.Param

    def __init__(self, width: int, rngs: nnx.Rngs):
        super().__init__(width, epsilon=EPSILON, dtype=jnp.float32, rngs=rngs)

    def __call__(self, x: Rows) -> Float[Array, "... d"]:  # type: ignore[override]  # no mask
        """(..., D) of any float dtype to (..., D) float32."""
        return layer_norm(x, self.scale[...], self.bias[...])


@jax.custom_vjp
def _layer_norm(x: Rows, scale: Vector, bias: Vector) -> Float[Array, "... d"]:
    return _normalised(x, scale, bias)[0]


def _normalised(x: Rows, scale: Vector, bias: Vector) -> tuple:
    """The result, and for the backward pass x, mean and 1 / deviation (..., 1), and scale."""
    wide = jnp.asarray(x, jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    if jnp.result_type(x) == jnp.bfloat16:
        # One pass, which a compiler fuses with what computes x. The difference of squares is off by
        # (mean / deviation)^2 2^-24 of the variance, the rounding of x to 8 bits by
        # (mean / deviation) 2^-8: the first is the smaller as long as x has a variance at all.
        variance = jnp.maximum(jnp.square(wide).mean(-1, keepdims=True) - jnp.square(mean), 0)
    else:
        variance = jnp.square(wide - mean).mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(variance + EPSILON)
    return (wide - mean) * inverse * scale + bias, (x, mean, inverse, scale)


def _forward(*arguments: Any) -> tuple:
    out, (x, *statistics, scale) = _normalised(*(argument.value for argument in arguments))
    # Without the barrier XLA's GPU compiler computes these means together with the sums of the
    # gradient, and writes float32 arrays of all tokens between the two.
    return out, (x, *jax.lax.optimization_barrier(statistics), scale)


def _backward(saved: tuple, g: Float[Array, "... d"] | SymbolicZero) -> tuple:
    if isinstance(g, SymbolicZero):  # the loss does not depend on the last block's patches
        return None, None, None
    x, mean, inverse, scale = saved
    normal = (x.astype(jnp.float32) - mean) * inverse
    along = normal * (row_sums(g * normal, scale) / scale.size)[..., None]
    x_bar = (g * scale - (row_sums(g, scale) / scale.size)[..., None] - along) * inverse
    tokens = tuple(range(g.ndim - 1))
    return x_bar.astype(x.dtype), (g * normal).sum(tokens), g.sum(tokens)


_layer_norm.defvjp(_forward, _backward, symbolic_zeros=True)


def row_sums(x: Rows, scale: Vector) -> Float[Array, "..."]:
    """The sum of each row of `x * scale`."""
    return jax.lax.platform_dependent(
        x, scale,
        # XLA's CPU compiler takes five times as long for the reduction as for the product.
        cpu=lambda x, scale: x @ scale,
        default=lambda x, scale: (x * scale).sum(-1),
    )  # fmt: skip
