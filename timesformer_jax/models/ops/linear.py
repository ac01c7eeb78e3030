"""The linear layer, on one device or many, and GELU, the activation between two of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from timesformer_jax.distributed.sharding import gather_fsdp, mesh_size, target_device
from timesformer_jax.models.ops.reference import with_reference
from timesformer_jax.models.remat import OUTPUT

Kernel = Float[Array | np.ndarray, "i *o"]
Bias = Float[Array | np.ndarray, "*o"]


def reference(
    x: Any,
    kernel: Kernel,
    bias: Bias,
    rule: str,
) -> Any:
    """x W + b, for every array of a tree."""
    return jax.tree.map(
        lambda x: jnp.tensordot(x, kernel.astype(x.dtype), 1) + bias.astype(x.dtype), x
    )


@with_reference(reference)
def linear(
    x: Any,
    kernel: Kernel,
    bias: Bias,
    rule: str,
) -> Any:
    """x W + b, for every array of a tree.

    The arrays share one copy of the kernel on its way to the device, and their gradients are added
    before devices exchange them. In bfloat16 the gradients of kernel and bias are sums over all
    tokens of all devices. Rounding the parameters first, as Flax does, would round each device's
    sum and take the sum over devices in bfloat16, which has 8 bits. Here they stay float32.

    Args:
      x: a tree of (..., inputs).
      kernel: (inputs, *outputs) float32; rounded to the dtype of `x`.
      bias: (*outputs) float32; rounded to the dtype of `x` too.
      rule: the path of the kernel in the sharding rules (`distributed.sharding`).

    Returns:
      The tree with (..., *outputs) in the dtype of `x`.
    """
    with jax.named_scope("linear"):
        return _linear(rule, x, kernel, bias)


class Linear(nnx.LinearGeneral):
    """`nnx.LinearGeneral` over the last axis, with parameters that devices may share.

    `rule` is the path of the kernel in the sharding rules (`distributed.sharding`).
    """

    bias: nnx.Param

    def __init__(self, *args, rule: str, **kwargs):
        super().__init__(*args, **kwargs)
        self.rule = f"{rule}/kernel"

    def __call__(self, x: Any) -> Any:  # type: ignore[override]  # no out_sharding
        """A tree of (..., inputs) to (..., *outputs) of the layer's dtype."""
        return self.apply(x, self.kernel[...], self.bias[...])

    def apply(
        self,
        x: Any,
        kernel: Kernel,
        bias: Bias,
    ) -> Any:
        """As the layer itself, with another kernel and bias."""
        y = linear(jax.tree.map(lambda t: t.astype(self.dtype), x), kernel, bias, self.rule)
        return jax.tree.map(lambda t: checkpoint_name(t, OUTPUT), y)


@jax.named_scope("linear")
def fused(first: Linear, second: Linear) -> tuple[Float[Array, "i o"], Float[Array, " o"]]:
    """W W' and b W', where x W + b is `first` and W' the kernel of `second`.

    The product is float32, so that it is rounded once, when it is used.
    """
    precision = "highest" if first.dtype == jnp.float32 else "high"
    kernel = gather_fsdp(second.kernel[...], second.rule)
    return (
        jnp.matmul(gather_fsdp(first.kernel[...], first.rule), kernel, precision=precision),
        jnp.matmul(first.bias[...], kernel, precision=precision),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(rule: str, x: Any, kernel: Kernel, bias: Bias) -> Any:
    matrix = _gathered_matrix(rule, x, kernel)
    outputs = jnp.shape(bias)
    row = _merge_features(jnp.asarray(bias, matrix.dtype), len(outputs))

    def apply(x):
        y = jnp.tensordot(_merge_tokens(x), matrix, 1).reshape(*x.shape[:-1], -1)
        return _split_features(y + row, outputs)

    return jax.tree.map(apply, x)


def _forward(rule: str, *arguments: Any) -> tuple:
    x, kernel, bias = jax.tree.map(lambda argument: argument.value, arguments)
    return _linear(rule, x, kernel, bias), (x, kernel)


def _backward(rule: str, saved: tuple, g: Any) -> tuple:
    # The loss does not depend on the last block's patches: None avoids products with zeros.
    if all(isinstance(leaf, SymbolicZero) for leaf in jax.tree.leaves(g)):
        return None, None, None
    x, kernel = saved
    matrix = _gathered_matrix(rule, x, kernel)
    outputs, dtype = kernel.shape[1:], kernel.dtype

    def unless_zero(gradient):
        def run(g, x):
            if isinstance(g, SymbolicZero):
                return None
            return gradient(_merge_features(g, len(outputs)), x)

        return run

    @unless_zero
    def x_bar(g, x):
        return jnp.tensordot(_merge_tokens(g), matrix, (-1, 1)).reshape(x.shape)

    @unless_zero
    def kernel_bar(g, x):
        g, x = _merge_tokens(g), _merge_tokens(x)
        tokens = tuple(range(x.ndim - 1))
        return jnp.tensordot(x, g, (tokens, tokens), preferred_element_type=dtype)

    @unless_zero
    def bias_bar(g, x):
        return token_sums(g, dtype)

    def total(gradient):
        return _split_features(jax.tree.reduce(jnp.add, jax.tree.map(gradient, g, x)), outputs)

    return jax.tree.map(x_bar, g, x), gather_fsdp(total(kernel_bar), rule), total(bias_bar)


_linear.defvjp(_forward, _backward, symbolic_zeros=True)


def _gathered_matrix(rule: str, x: Any, kernel: Kernel) -> Float[Array, "i o"]:
    """The kernel in the dtype of `x`; rounded before devices gather it, which halves the bytes."""
    kernel = jnp.asarray(kernel, jax.tree.leaves(x)[0].dtype)
    return _merge_features(gather_fsdp(kernel, rule), kernel.ndim - 1)


def token_sums(g: Float[Array, "*t d"], dtype: Any) -> Float[Array, " d"]:
    """The sum over all axes but the last, in `dtype`."""
    axes = tuple(range(g.ndim - 1))
    if target_device().platform != "tpu":
        return g.sum(axes, dtype=dtype)
    # The matrix unit sums a bfloat16 array exactly, and in a fraction of the vector unit's time. Of
    # one row of ones, not eight, the compiler would make a reduction again.
    ones = jnp.ones((8, *g.shape[:-1]), g.dtype)
    precision = "highest" if g.dtype == dtype else None
    contracted = tuple(range(1, g.ndim)), axes
    return jnp.tensordot(ones, g, contracted, precision=precision, preferred_element_type=dtype)[0]


# Several output axes (queries, keys and values; channels) are one while the layer computes. A TPU
# lays the last two axes out in tiles of 8 or 16 x 128: an axis of 3 among them would cost a copy of
# the array before and after. Where "tensor" splits the last axis, each device merges its own part.


def _merge_features(x: Float[Array, "*a"], features: int) -> Float[Array, "*t o"]:
    """(..., *features) to (..., product of the features)."""
    ndim = x.ndim - features + 1
    return _by_shard(lambda x: x.reshape(*x.shape[: ndim - 1], -1), x, ndim) if features > 1 else x


def _split_features(x: Float[Array, "*t o"], features: tuple[int, ...]) -> Float[Array, "*a"]:
    """Undoes `_merge_features`."""
    if len(features) == 1:
        return x
    ndim = x.ndim - 1 + len(features)
    return _by_shard(lambda x: x.reshape(*x.shape[:-1], *features[:-1], -1), x, ndim)


def _by_shard(reshape: Callable, x: Float[Array, "*a"], ndim: int) -> Float[Array, "*b"]:
    """`reshape`, which gives `ndim` axes, on the parts into which "tensor" splits the last axis."""
    if mesh_size("tensor") == 1:
        return reshape(x)
    inputs, outputs = (P(*[None] * (n - 1), "tensor") for n in (x.ndim, ndim))
    return jax.shard_map(
        reshape, in_specs=inputs, out_specs=outputs, axis_names={"tensor"}, check_vma=False
    )(x)


def _merge_tokens(x: Float[Array, "*t d"]) -> Float[Array, "*m d"]:
    """(*tokens, features) to (product of tokens, features) on a single CPU or GPU.

    XLA makes a matrix of an operand with more axes itself, on a CPU by a transposed copy, into
    which it recomputes all that the operand is made of. A TPU's compiler does not, and would copy
    the array, whose rows of patches are padded to whole tiles. On several devices merged axes could
    not keep their sharding.
    """
    if jax.sharding.get_abstract_mesh().size > 1 or target_device().platform == "tpu":
        return x
    return x.reshape(-1, x.shape[-1])


# ---- GELU --------------------------------------------------------------------------------------


def _gelu_reference(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x * Phi(x), where Phi is the standard normal distribution function."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)


@with_reference(_gelu_reference)
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x * Phi(x), the exact GELU, computed in float32 and returned in the dtype of `x`.

    Phi is computed by erf, as PyTorch does. `jax.nn.gelu` uses erfc, which is more exact where the
    value is close to zero, but which XLA compiles to a separate pass on a GPU.
    """
    wide = x.astype(jnp.float32)
    return (wide * 0.5 * (1 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)
