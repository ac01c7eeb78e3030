"""Scaled dot-product attention of one sequence, with its gradient written out."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from timesformer_jax.models.ops.layer_norm import row_sums

# Tokens up to which XLA's CPU compiler multiplies faster by a transposed copy (2.2 times with 8 of
# 64 channels, 4.7 with 16); with 197 what it does with an operand as it lies takes two cores.
_SHORT = 64


@jax.custom_vjp
def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q k^T) v, by heads (equations 5 and 6 without their scale).

    The weights are divided by their sum after the product with the values: an array of a head's
    channels, rather than of the sequence's length.

    Args:
      q, k, v: (length, h, d) each.

    Returns:
      (length, h, d) of their dtype. The softmax is taken in float32 at least.
    """
    return _forward(q, k, v)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
    wide = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("qhd,khd->hqk", q, k, preferred_element_type=wide)
    weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True)).astype(v.dtype)
    # By heads first, the order of the product: else XLA transposes the weights, not the result.
    out = jnp.einsum("hqk,khd->hqd", weights, v)
    out = (out / weights.sum(axis=-1, keepdims=True, dtype=wide)).swapaxes(0, 1)
    return out.astype(v.dtype), (q, k, v, weights)


def _backward(saved: tuple, g: jax.Array) -> tuple:
    q, k, v, weights = saved
    wide = jnp.promote_types(q.dtype, jnp.float32)
    # XLA's CPU compiler takes one core for a product of batches, but all for one that is fused with
    # a reduction, of which nothing else may use the result. So the sum is computed anew, in another
    # way, and the weights meet their gradients here.
    total = row_sums(weights.astype(wide), jnp.ones(weights.shape[-1], wide))
    g = (g / total.T[..., None]).astype(v.dtype)
    of_weights = jnp.einsum("qhd,khd->hqk", g, v, preferred_element_type=wide)
    along = (weights * of_weights).sum(axis=-1) / total
    of_logits = (weights * (of_weights - along[..., None])).astype(q.dtype)
    of_q = jnp.einsum("hqk,khd->hqd", of_logits, k).swapaxes(0, 1)
    return of_q, _by_keys(of_logits, q), _by_keys(weights, g)


attention.defvjp(_forward, _backward)


def _by_keys(weights: jax.Array, x: jax.Array) -> jax.Array:
    """(h, queries, keys) and (queries, h, d) to the sums over queries, (keys, h, d)."""
    if len(x) <= _SHORT:
        out = jax.lax.dot_general(x, weights, (([0], [1]), ([1], [0])))
    else:
        out = jnp.einsum("hqk,hqd->hdk", weights, x.swapaxes(0, 1))
    return out.transpose(2, 0, 1)  # h d k -> k h d
