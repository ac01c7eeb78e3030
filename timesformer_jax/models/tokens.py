"""The tokens of a clip, as the model and its attentions pass them on."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Grid = tuple[int, int]  # patches of a frame: down and across


class Tokens(NamedTuple):
    """The tokens of a clip: the classification token and, beside it, the patches.

    Attributes:
      cls: (B, ...), (B, S, ...) where every sequence has a token of its own, or None.
      patches: (B, T, N, ...).
    """

    cls: Float[Array, "b *s"] | None
    patches: Float[Array, "b t n *d"]


def joined(qkv: Tokens, attention: Callable[[jax.Array], jax.Array], axis: int) -> Tokens:
    """Attention of [cls; patches] along an axis of the patches, which cls (B, S, ...) lacks."""
    if qkv.cls is None:
        return Tokens(None, attention(qkv.patches))
    cls = jnp.expand_dims(qkv.cls, axis)
    out = attention(jnp.concatenate([cls, qkv.patches], axis=axis))
    cls, patches = jnp.split(out, [1], axis=axis)
    return Tokens(cls.squeeze(axis), patches)
