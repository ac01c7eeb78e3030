"""The tokens of a clip, as the layers of the model pass them on, and operations on all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

Grid = tuple[int, int]  # patches of a frame: down and across
# The number of each patch's sequence, (T, N), from 0 without gaps.
Numbers = Int[np.ndarray, "t n"]
Rate = float | Float[Array, ""]
MaybeKey = Key[Array, ""] | None


class Tokens(NamedTuple):
    """The tokens of a clip: the classification token and, beside it, the patches.

    Attributes:
      cls: (B, ...), (B, S, ...) where every sequence has a token of its own, or None.
      patches: (B, T, N, ...).
      valid: (B, T), the frames that a clip has: the others fill it up to the length of the longest
        (`models.padding`). None: all clips have all frames.
    """

    cls: Float[Array, "b *s"] | None
    patches: Float[Array, "b t n *d"]
    valid: Bool[Array, "b t"] | None = None


def joined(qkv: Tokens, attention: Callable[[jax.Array], jax.Array], axis: int) -> Tokens:
    """Attention of [cls; patches] along an axis of the patches, which cls (B, S, ...) lacks."""
    if qkv.cls is None:
        return Tokens(None, attention(qkv.patches))
    cls = jnp.expand_dims(qkv.cls, axis)
    out = attention(jnp.concatenate([cls, qkv.patches], axis=axis))
    cls, patches = jnp.split(out, [1], axis=axis)
    return Tokens(cls.squeeze(axis), patches)


@jax.named_scope("residual")
def drop_path(x: Tokens, rate: Rate, sequences: Numbers, key: MaybeKey) -> Tokens:
    """Stochastic depth: zeroes a sequence's residual with probability `rate`, scales up the others.

    Args:
      x: the residuals, (B, T, N, D) patches and, where it takes part, one token a sequence,
        (B, S, D).
      rate: probability of dropping, a number or (). For the number 0 nothing is computed.
      sequences: (T, N), the number of each patch's sequence; there is one draw for each. `x` may
        have tokens of more sequences, which are set to zero.
      key: None outside training: nothing is dropped.
    """
    if key is None or (isinstance(rate, float) and rate == 0):
        return x
    draws = jax.random.bernoulli(key, 1 - rate, (len(x.patches), sequences.max() + 1))
    factor = (draws / (1 - rate)).astype(x.patches.dtype)
    patches = x.patches * factor[:, sequences, None]
    if x.cls is None:
        return Tokens(None, patches)
    if x.cls.ndim == 3 and x.cls.shape[1] > factor.shape[1]:
        factor = jnp.pad(factor, ((0, 0), (0, x.cls.shape[1] - factor.shape[1])))
    return Tokens(x.cls * factor.reshape(*x.cls.shape[:-1], 1), patches)


def fold_in(key: MaybeKey, data: int | jax.Array) -> MaybeKey:
    """A key of its own for each number; None stays None."""
    return None if key is None else jax.random.fold_in(key, data)


# `with tape(Tape()):` notes the attentions that are traced inside. Without one, nothing is traced
# but the model.
tape = jax.make_user_context(default_value=None)


class Tape:
    """The attentions of a program, in the order in which they are traced.

    Args:
      added: to be added to the attended values of each attention. The gradient with respect to
        zeros, added here, is the gradient with respect to the attended values.

    Attributes:
      qkv: the projections of each attention: patches (B, T, N, 3, h, d), and cls (B, S, 3, h, d) or
        None.
    """

    def __init__(self, added: Sequence[Tokens] = ()):
        self.qkv: list[Tokens] = []
        self._added = added

    def note(self, qkv: Tokens, attended: Tokens) -> Tokens:
        """Notes an attention; returns the attended values that the model is to use."""
        self.qkv.append(qkv)
        if not self._added:
            return attended
        return jax.tree.map(lambda a, b: a + b, attended, self._added[len(self.qkv) - 1])
