"""The linear layer: on one device or many, its gradients summed and kept in float32."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from timesformer_jax.distributed.sharding import gathered
from timesformer_jax.models.remat import OUTPUT


class Linear(nnx.LinearGeneral):
    """`nnx.LinearGeneral` on the last axis, of parameters that devices may share.

    `rule` says how: the name of its parameters in the rules of `distributed.sharding`.

    In bfloat16 the parameters' gradients are sums over all tokens of all devices. Flax rounds the
    parameters first, so that each device's sum is rounded, and the sum over devices taken, in
    bfloat16, of which 8 bits are left; here the gradient never leaves float32.
    """

    def __init__(self, *args, rule: str, **kwargs):
        super().__init__(*args, **kwargs)
        self.rule = f"{rule}/kernel"

    def __call__(self, x: Any) -> Any:
        """Arrays (..., inputs), or a tree of them, to (..., outputs) of the layer's dtype.

        Outputs may be several axes. What goes through as one tree shares one copy of the kernel on
        its way to the device, and its gradients are summed before they are sent.
        """
        if self.dtype == jnp.float32:
            kernel, bias = gathered(self.kernel[...], self.rule), self.bias[...]
            y = jax.tree.map(lambda t: jnp.tensordot(t, kernel, 1) + bias, x)
        else:
            x = jax.tree.map(lambda t: t.astype(self.dtype), x)
            y = _linear(self.rule, x, self.kernel[...], self.bias[...])
        return jax.tree.map(lambda t: checkpoint_name(t, OUTPUT), y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(rule: str, x: Any, kernel: jax.Array, bias: jax.Array) -> Any:
    dtype = jax.tree.leaves(x)[0].dtype
    # Rounded before it is gathered, which halves what is sent.
    rounded, bias = gathered(kernel.astype(dtype), rule), bias.astype(dtype)
    return jax.tree.map(lambda t: jnp.tensordot(t, rounded, 1) + bias, x)


def _forward(rule: str, x: Any, kernel: jax.Array, bias: jax.Array) -> tuple:
    return _linear(rule, x, kernel, bias), (x, kernel)


def _backward(rule: str, saved: tuple, g: Any) -> tuple:
    x, kernel = saved
    outputs = kernel.ndim - 1
    dtype = jax.tree.leaves(x)[0].dtype
    rounded = jnp.moveaxis(gathered(kernel.astype(dtype), rule), 0, -1)

    def of_kernel(x: jax.Array, g: jax.Array) -> jax.Array:
        tokens = tuple(range(x.ndim - 1))
        return jnp.tensordot(x, g, (tokens, tokens), preferred_element_type=kernel.dtype)

    def of_bias(g: jax.Array) -> jax.Array:
        return g.sum(tuple(range(g.ndim - outputs)), dtype=kernel.dtype)

    return (
        jax.tree.map(lambda g: jnp.tensordot(g, rounded, outputs), g),
        gathered(jax.tree.reduce(jnp.add, jax.tree.map(of_kernel, x, g)), rule),
        jax.tree.reduce(jnp.add, jax.tree.map(of_bias, g)),
    )


_linear.defvjp(_forward, _backward)
