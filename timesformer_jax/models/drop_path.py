"""Stochastic depth (drop path): a sequence's residual is dropped as a whole."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from timesformer_jax.models.schemes import Numbers
from timesformer_jax.models.tokens import Tokens

Rate = float | Float[Array, ""]
MaybeKey = Key[Array, ""] | None


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
