"""The linear layer in bfloat16, whose gradients are summed and kept in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from timesformer_jax.models.remat import OUTPUT


class Linear(nnx.LinearGeneral):
    """`nnx.LinearGeneral` on the last axis; in float32 it is that and nothing else.

    In bfloat16 the parameters' gradients are sums over all tokens of all devices. Flax rounds the
    parameters first, so that each device's sum is rounded, and the sum over devices taken, in
    bfloat16, of which 8 bits are left; here the gradient never leaves float32.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., inputs) to (..., outputs) of the layer's dtype; outputs may be several axes."""
        if self.dtype == jnp.float32:
            y = super().__call__(x)
        else:
            y = _linear(x.astype(self.dtype), self.kernel[...], self.bias[...])
        return checkpoint_name(y, OUTPUT)


@jax.custom_vjp
def _linear(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    return jnp.tensordot(x, kernel.astype(x.dtype), 1) + bias.astype(x.dtype)


def _forward(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> tuple:
    return _linear(x, kernel, bias), (x, kernel)


def _backward(saved: tuple, g: jax.Array) -> tuple:
    x, kernel = saved
    outputs, tokens = kernel.ndim - 1, tuple(range(x.ndim - 1))
    of_x = jnp.tensordot(g, jnp.moveaxis(kernel, 0, -1).astype(x.dtype), outputs)
    of_kernel = jnp.tensordot(x, g, (tokens, tokens), preferred_element_type=kernel.dtype)
    return of_x, of_kernel, g.sum(tokens, dtype=kernel.dtype)


_linear.defvjp(_forward, _backward)
