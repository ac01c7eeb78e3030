"""Dot-product attention of one sequence, all heads together."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from timesformer_jax.models.ops.layer_norm import row_sums
from timesformer_jax.models.ops.reference import with_reference

# Up to this many tokens XLA's CPU compiler multiplies faster by a transposed copy (2.2 times with 8
# tokens of 64 channels, 4.7 with 16). For longer sequences its own product uses all cores.
_SHORT = 64

Heads = Float[Array | np.ndarray, "l h d"]
Valid = Bool[Array | np.ndarray, " l"] | None  # the keys that are attended to; None: all

# In place of the logits of keys that no query attends to. It is finite, so that a sequence of such
# keys alone has finite values.
LEAST = -1e30


def reference(
    q: Float[Array, "l h d"],
    k: Float[Array, "l h d"],
    v: Float[Array, "l h d"],
    valid: Valid = None,
) -> Float[Array, "l h d"]:
    """softmax(q k^T) v, for each head."""
    logits = jnp.einsum("qhd,khd->hqk", q, k, preferred_element_type=_accumulator(q))
    if valid is not None:
        logits = jnp.where(valid, logits, LEAST)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("hqk,khd->qhd", weights, v)


@with_reference(reference)
def dot_product_attention(
    q: Float[Array, "l h d"],
    k: Float[Array, "l h d"],
    v: Float[Array, "l h d"],
    valid: Valid = None,
) -> Float[Array, "l h d"]:
    """softmax(q k^T) v, for each head (equations 5 and 6; the caller scales q).

    The sums of the softmax divide the result, not the weights: the result has d channels, the
    weights have one number for each key.

    Args:
      q, k, v: (length, h, d) each.
      valid: (length,) bool, the keys that are attended to; None: all.

    Returns:
      (length, h, d) of the dtype of v. The softmax and all sums are float32 at least.
    """
    return _attention(q, k, v, valid)


def _accumulator(x: Any) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


@jax.custom_vjp
def _attention(q: Heads, k: Heads, v: Heads, valid: Valid = None) -> Float[Array, "l h d"]:
    return _forward(q, k, v, valid)[0]


def _forward(q: Heads, k: Heads, v: Heads, valid: Valid = None) -> tuple:
    """The result and, for the backward pass, q, k, v and the weights before they are divided.

    The weights are (h, queries, keys), in the dtype of v.
    """
    wide = _accumulator(q)
    logits = jnp.einsum("qhd,khd->hqk", q, k, preferred_element_type=wide)
    if valid is not None:  # their weights are zero, and so are the gradients of their logits
        logits = jnp.where(valid, logits, LEAST)
    weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True)).astype(v.dtype)
    # Heads come first, as in the product: otherwise XLA transposes the weights and not the result.
    out = jnp.einsum("hqk,khd->hqd", weights, v)
    out = (out / weights.sum(axis=-1, keepdims=True, dtype=wide)).swapaxes(0, 1)
    return out.astype(v.dtype), (q, k, v, weights)


def _backward(saved: tuple, g: Float[Array, "l h d"]) -> tuple[Heads, Heads, Heads, None]:
    q, k, v, weights = saved
    wide = _accumulator(q)
    # XLA's CPU compiler runs a batch of products on one core, but on all cores if a reduction is
    # fused with it and nothing else uses its result. So the sum is computed again, in another form,
    # and the weights are multiplied by their gradients here.
    total = row_sums(weights.astype(wide), jnp.ones(weights.shape[-1], wide))
    g = (g / total.T[..., None]).astype(v.dtype)
    weights_bar = jnp.einsum("qhd,khd->hqk", g, v, preferred_element_type=wide)
    along = (weights * weights_bar).sum(axis=-1) / total
    logits_bar = (weights * (weights_bar - along[..., None])).astype(q.dtype)
    q_bar = jnp.einsum("hqk,khd->hqd", logits_bar, k).swapaxes(0, 1)
    return q_bar, _sum_over_queries(logits_bar, q), _sum_over_queries(weights, g), None


_attention.defvjp(_forward, _backward)


def _sum_over_queries(
    weights: Float[Array, "h q k"], x: Float[Array | np.ndarray, "q h d"]
) -> Float[Array, "k h d"]:
    """For each key and head, the sum of x over the queries with these weights."""
    if len(x) <= _SHORT:
        out = jax.lax.dot_general(x, weights, (([0], [1]), ([1], [0])))
    else:
        out = jnp.einsum("hqk,hqd->hdk", weights, x.swapaxes(0, 1))
    return out.transpose(2, 0, 1)  # h d k -> k h d
