"""The paper's attention schemes (section 3, figures 1 and 2) as pure functions.

There is one attention, `attend`, of one sequence. A scheme says which sequences it is applied to:
`jax.vmap` runs over the axes that a token does not attend along, over space for temporal attention
and over time for spatial attention. A new scheme is a new function here and its line in `SCHEMES`;
the model, its parameters and drop path follow from that line.

Shapes: B clips, T frames, N patches a frame, h heads of d channels, D = h * d.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Tokens(NamedTuple):
    """The state of a clip between layers: the classification token and, beside it, the patches.

    Attributes:
      cls: (B, ...), (B, T, ...) where every frame has a token of its own, or None.
      patches: (B, T, N, ...).
    """

    cls: jax.Array | None
    patches: jax.Array


def attend(qkv: jax.Array) -> jax.Array:
    """Multi-head self-attention of one sequence (equations 5 to 7).

    Args:
      qkv: (length, 3, h, d), the queries, keys and values of the sequence's tokens.

    Returns:
      (length, h * d), the heads side by side. The softmax is taken in float32.
    """
    q, k, v = qkv[:, 0], qkv[:, 1], qkv[:, 2]
    scale = q.shape[-1] ** -0.5
    logits = jnp.einsum("qhd,khd->hqk", q * scale, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("hqk,khd->qhd", weights, v).reshape(len(qkv), -1)


def attend_with_token(cls: jax.Array, patches: jax.Array) -> Tokens:
    """`attend` on [cls; patches]: (3, h, d) and (length, 3, h, d) to (D,) and (length, D)."""
    out = attend(jnp.concatenate([cls[None], patches]))
    return Tokens(out[0], out[1:])


def over_time(qkv: Tokens) -> Tokens:
    """Temporal attention (equation 8): a patch attends to its own position in every frame.

    The classification token takes no part (a property of the released models, SPEC section 2.5).
    """
    over_positions = jax.vmap(attend, in_axes=1, out_axes=1)
    return Tokens(None, jax.vmap(over_positions)(qkv.patches))


def over_space(qkv: Tokens) -> Tokens:
    """Spatial attention (equation 9): [cls; patches] of each frame attend to one another.

    One token a clip is copied to every frame and gives one output a frame, (B, T, D).
    """
    b, t = qkv.patches.shape[:2]
    one_a_frame = qkv.cls.ndim == qkv.patches.ndim - 1
    cls = qkv.cls if one_a_frame else jnp.broadcast_to(qkv.cls[:, None], (b, t, *qkv.cls.shape[1:]))
    return jax.vmap(jax.vmap(attend_with_token))(cls, qkv.patches)


def over_space_time(qkv: Tokens) -> Tokens:
    """Joint space-time attention: [cls; every patch of the clip] attend to one another."""
    b, t, n = qkv.patches.shape[:3]
    patches = qkv.patches.reshape(b, t * n, *qkv.patches.shape[3:])  # b t n ... -> b (t n) ...
    cls, patches = jax.vmap(attend_with_token)(qkv.cls, patches)
    return Tokens(cls, patches.reshape(b, t, n, -1))


class Step(NamedTuple):
    """One residual attention of a block.

    Attributes:
      name: what its parameters are called.
      mix: from the projections (..., 3, h, d) to the attended values (..., D). Where one
        classification token takes part in several sequences, it returns one output for each,
        and the block adds their mean.
      sequences: the axes of (B, T, N) that number the sequences; drop path draws once for each.
    """

    name: str
    mix: Callable[[Tokens], Tokens]
    sequences: tuple[int, ...]


class Scheme(NamedTuple):
    """The attentions of a block, in order, and what of time the model sees outside them.

    Attributes:
      steps: every step but the last ends in a further linear layer that starts at zero
        (`temporal_fc` in the release), so that a video model starts as the image model it is
        initialised from.
      time_embedding: whether the patches get a temporal position embedding.
      token_per_frame: whether each frame keeps its own classification token, averaged at the end.
    """

    steps: tuple[Step, ...]
    time_embedding: bool = True
    token_per_frame: bool = False


TEMPORAL = Step("temporal", over_time, sequences=(0, 2))
SPATIAL = Step("spatial", over_space, sequences=(0, 1))
JOINT = Step("joint", over_space_time, sequences=(0,))

SCHEMES = {
    "divided": Scheme((TEMPORAL, SPATIAL)),
    "space": Scheme((SPATIAL,), time_embedding=False, token_per_frame=True),
    "joint": Scheme((JOINT,)),
}
