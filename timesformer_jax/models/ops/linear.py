"""The linear layer: on one device or many, its gradients summed and kept in float32."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

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
        x = jax.tree.map(lambda t: t.astype(self.dtype), x)
        y = _linear(self.rule, x, self.kernel[...], self.bias[...])
        return jax.tree.map(lambda t: checkpoint_name(t, OUTPUT), y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(rule: str, x: Any, kernel: jax.Array, bias: jax.Array) -> Any:
    matrix = _gathered_matrix(rule, x, kernel)
    bias = bias.astype(matrix.dtype)

    def of(x: jax.Array) -> jax.Array:
        y = jnp.tensordot(_as_matrix(x, 1), matrix, 1)
        return y.reshape(*x.shape[:-1], *bias.shape) + bias

    return jax.tree.map(of, x)


def _forward(rule: str, *arguments: Any) -> tuple:
    x, kernel, bias = jax.tree.map(lambda argument: argument.value, arguments)
    return _linear(rule, x, kernel, bias), (x, kernel)


def _backward(rule: str, saved: tuple, g: Any) -> tuple:
    # The loss does not depend on the last block's patches: None, rather than products of zeros.
    if all(isinstance(leaf, SymbolicZero) for leaf in jax.tree.leaves(g)):
        return None, None, None
    x, kernel = saved
    matrix = _gathered_matrix(rule, x, kernel)
    outputs = kernel.ndim - 1

    def needed(gradient):
        return lambda g, *x: None if isinstance(g, SymbolicZero) else gradient(g, *x)

    @needed
    def of_x(g: jax.Array, x: jax.Array) -> jax.Array:
        g = _as_matrix(g, outputs)
        features = tuple(range(1 - matrix.ndim, 0)), tuple(range(1, matrix.ndim))
        return jnp.tensordot(g, matrix, features).reshape(x.shape)

    @needed
    def of_kernel(g: jax.Array, x: jax.Array) -> jax.Array:
        g, x = _as_matrix(g, outputs), _as_matrix(x, 1)
        tokens = tuple(range(x.ndim - 1))
        product = jnp.tensordot(x, g, (tokens, tokens), preferred_element_type=kernel.dtype)
        return product.reshape(kernel.shape)

    @needed
    def of_bias(g: jax.Array) -> jax.Array:
        return g.sum(tuple(range(g.ndim - outputs)), dtype=kernel.dtype)

    return (
        jax.tree.map(of_x, g, x),
        gathered(jax.tree.reduce(jnp.add, jax.tree.map(of_kernel, g, x)), rule),
        jax.tree.reduce(jnp.add, jax.tree.map(of_bias, g)),
    )


_linear.defvjp(_forward, _backward, symbolic_zeros=True)


def _gathered_matrix(rule: str, x: Any, kernel: jax.Array) -> jax.Array:
    """The kernel in the dtype of `x`, rounded before it is gathered, which halves what is sent."""
    kernel = kernel.astype(jax.tree.leaves(x)[0].dtype)
    return _as_matrix(gathered(kernel, rule), kernel.ndim - 1)


def _as_matrix(x: jax.Array, features: int) -> jax.Array:
    """Merges the last `features` axes, and all before them, on a single device.

    Of operands with more axes XLA makes matrices itself, on a CPU by a transposed copy, into which
    it computes anew all that the operand is made of. On several devices merged axes could not be
    split as they were.
    """
    if jax.sharding.get_abstract_mesh().size > 1:
        return x
    return x.reshape(math.prod(x.shape[: x.ndim - features]), -1)
