"""The paper's attention schemes (section 3, figures 1 and 2) as pure functions.

There is one attention, `attend`, of one sequence. A scheme says into which sequences it cuts the
clip: `jax.vmap` runs over the axes that a token does not attend along, over space for temporal
attention and over time for spatial attention. A new scheme is its line in `SCHEMES`, and where
the cut is new, a function here that numbers the sequences and one that attends within them; the
model, its parameters, drop path and costs follow. `docs/attention.md` gives the reasons for what
the paper leaves open.

Shapes: B clips, T frames, N = H * W patches a frame (H down, W across: the grid), S sequences,
h heads of d channels, D = h * d.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from timesformer_jax.models.ops import dot_product_attention as dot_product
from timesformer_jax.models.ops.kernels import select as choice

Grid = tuple[int, int]


class Tokens(NamedTuple):
    """The state of a clip between layers: the classification token and, beside it, the patches.

    Attributes:
      cls: (B, ...), (B, S, ...) where every sequence has a token of its own, or None.
      patches: (B, T, N, ...).
    """

    cls: jax.Array | None
    patches: jax.Array


def attend(qkv: jax.Array) -> jax.Array:
    """Multi-head self-attention of one sequence (equations 5 to 7).

    Args:
      qkv: (length, 3, h, d), the queries, keys and values of the sequence's tokens.

    Returns:
      (length, h * d), the heads side by side. The softmax is taken in float32 at least.
    """
    # Split, whose gradient is put together in one go: those of slices would be padded and added.
    q, k, v = (part.squeeze(1) for part in jnp.split(qkv, 3, axis=1))
    return dot_product.attention(q * q.shape[-1] ** -0.5, k, v).reshape(len(qkv), -1)


def attend_tokens(qkv: Tokens) -> Tokens:
    """`attend` on [cls; patches]: (3, h, d) and (length, 3, h, d) to (D,) and (length, D)."""
    if qkv.cls is None:
        return Tokens(None, attend(qkv.patches))
    out = attend(jnp.concatenate([qkv.cls[None], qkv.patches]))
    return Tokens(out[0], out[1:])


# How attention runs: each function takes the projections, cls (B, S, 3, h, d) or None and patches
# (B, T, N, 3, h, d), and gives the attended values, (B, S, D) or None and (B, T, N, D).


def over_time(qkv: Tokens, grid: Grid) -> Tokens:
    """Temporal attention (equation 8): a patch attends to its own position in every frame."""
    if qkv.cls is None:
        kernel = choice.choose("temporal", qkv.patches.shape, qkv.patches.dtype)
        if kernel != "xla":
            return Tokens(None, choice.temporal(qkv.patches, kernel))
    return through_time(qkv)


def over_space(qkv: Tokens, grid: Grid) -> Tokens:
    """Spatial attention (equation 9): the patches of a frame attend to one another."""
    b, s, n, *heads = qkv.patches.shape
    length = n if qkv.cls is None else n + 1
    kernel = choice.choose("spatial", (b, s, length, *heads), qkv.patches.dtype)
    if kernel == "xla":
        return within_sequences(qkv)
    if qkv.cls is None:
        return Tokens(None, choice.spatial(qkv.patches, kernel))
    out = choice.spatial(jnp.concatenate([qkv.cls[:, :, None], qkv.patches], axis=2), kernel)
    return Tokens(out[:, :, 0], out[:, :, 1:])


# The formulations that any device runs, and that its kernels are compared with.


def through_time(qkv: Tokens) -> Tokens:
    """Attention of (B, T, N, ...) over T."""
    axes = Tokens(0, 1)  # positions are axis 0 of cls (N, ...), axis 1 of the patches (T, N, ...)
    return jax.vmap(jax.vmap(attend_tokens, in_axes=(axes,), out_axes=axes))(qkv)


def within_sequences(qkv: Tokens) -> Tokens:
    """Attention of (B, S, length, ...) over the length."""
    return jax.vmap(jax.vmap(attend_tokens))(qkv)


def over_space_time(qkv: Tokens, grid: Grid) -> Tokens:
    """Joint space-time attention: every patch of the clip attends to every other."""
    one = Tokens(qkv.cls, _reshape(qkv.patches, 1, -1))  # b t n ... -> b 1 (t n) ...
    out = over_space(one, grid)
    return Tokens(out.cls, out.patches.reshape(*qkv.patches.shape[:3], -1))


def over_width(qkv: Tokens, grid: Grid) -> Tokens:
    """Axial attention over width: a patch attends to its own row of its frame."""
    rows = Tokens(qkv.cls, _reshape(qkv.patches, -1, grid[1]))  # b t (y x) ... -> b (t y) x ...
    out = over_space(rows, grid)
    return Tokens(out.cls, out.patches.reshape(*qkv.patches.shape[:3], -1))


def over_height(qkv: Tokens, grid: Grid) -> Tokens:
    """Axial attention over height: a patch attends to its own column of its frame."""
    t = qkv.patches.shape[1]
    cls = None if qkv.cls is None else qkv.cls.reshape(-1, t, grid[1], *qkv.cls.shape[2:])
    frames = Tokens(cls, _reshape(qkv.patches, t, *grid))  # b t (y x) ... -> b t y x ...
    out = jax.vmap(through_time, in_axes=1, out_axes=1)(frames)  # in each frame, at every x
    cls = None if out.cls is None else out.cls.reshape(-1, t * grid[1], out.cls.shape[-1])
    return Tokens(cls, out.patches.reshape(*qkv.patches.shape[:3], -1))


def over_parts(qkv: Tokens, grid: Grid, *, sequences: Callable) -> Tokens:
    """Attention within the parts of any partition of the clip's patches.

    The patches are gathered part by part and put back, parts of one length at once (halves of an
    odd axis differ in length). There is no mask, and no product that a mask would throw away.
    """
    number = sequences(qkv.patches.shape[1], grid).reshape(-1)
    lengths = np.bincount(number)
    members = np.split(np.argsort(number, kind="stable"), np.cumsum(lengths)[:-1])
    alike = [np.flatnonzero(lengths == length) for length in np.unique(lengths)]
    index = [np.stack([members[s] for s in numbers]) for numbers in alike]

    flat = _reshape(qkv.patches, -1)  # b t n ... -> b (t n) ...
    parts = [
        over_space(Tokens(_take(qkv.cls, s), _take(flat, i)), grid) for s, i in zip(alike, index)
    ]
    cls = _put_back([part.cls for part in parts], alike)
    patches = _put_back([_reshape(part.patches, -1) for part in parts], index)
    return Tokens(cls, patches.reshape(*qkv.patches.shape[:3], -1))


def _reshape(x: jax.Array, *sizes: int) -> jax.Array:
    """(B, T, N, ...) to (B, *sizes, ...)."""
    return x.reshape(len(x), *sizes, *x.shape[3:])


def _take(x: jax.Array, index: np.ndarray) -> jax.Array:
    """x[:, index], where no index comes twice: its gradient needs no atomic additions."""
    return x.at[:, index].get(unique_indices=True, mode="promise_in_bounds")


def _put_back(taken: list[jax.Array], index: list[np.ndarray]) -> jax.Array:
    """Undoes `_take` with each of `index`, which together name every entry once."""
    order = np.concatenate([i.reshape(-1) for i in index])
    return _take(jnp.concatenate(taken, axis=1), np.argsort(order))


# Which patches share a sequence: each function gives the number of every patch's sequence, as
# (T, N) integers that count from 0. Patches of one number attend to one another.


def by_position(t: int, grid: Grid) -> np.ndarray:
    """A sequence for every position, through time."""
    _, y, x = np.indices((t, *grid))
    return (y * grid[1] + x).reshape(t, -1)


def by_frame(t: int, grid: Grid) -> np.ndarray:
    """A sequence for every frame."""
    return np.indices((t, *grid))[0].reshape(t, -1)


def by_clip(t: int, grid: Grid) -> np.ndarray:
    """One sequence of all patches."""
    return np.zeros((t, grid[0] * grid[1]), int)


def by_row(t: int, grid: Grid) -> np.ndarray:
    """A sequence for every row of every frame."""
    frame, y, _ = np.indices((t, *grid))
    return (frame * grid[0] + y).reshape(t, -1)


def by_column(t: int, grid: Grid) -> np.ndarray:
    """A sequence for every column of every frame."""
    frame, _, x = np.indices((t, *grid))
    return (frame * grid[1] + x).reshape(t, -1)


def by_quarter(t: int, grid: Grid) -> np.ndarray:
    """The clip cut in F x H/2 x W/2: four sequences, fewer where the grid is one patch wide.

    Of an odd side the first half has the extra row.
    """
    _, y, x = np.indices((t, *grid))
    return _count_from_0(2 * (2 * y // grid[0]) + 2 * x // grid[1])


def by_stride(t: int, grid: Grid) -> np.ndarray:
    """Every second patch in time, height and width: eight sequences, each across the whole clip."""
    frame, y, x = np.indices((t, *grid))
    return _count_from_0(4 * (frame % 2) + 2 * (y % 2) + x % 2)


def _count_from_0(label: np.ndarray) -> np.ndarray:
    """(T, H, W) labels to (T, N) numbers without gaps: an axis of one leaves some labels unused."""
    return np.unique(label, return_inverse=True)[1].reshape(len(label), -1)


class Step(NamedTuple):
    """One residual attention of a block.

    Attributes:
      name: what its parameters are called.
      mix: the attention within its sequences, one of the `over_` functions.
      sequences: which patches share a sequence, one of the `by_` functions. Drop path draws once
        for each sequence.
      token: whether the classification token joins: it is copied to every sequence, attends and is
        attended to there, and its update is the mean over the sequences.
      within: what each of its sequences lies within, "frame" or "position"; "clip" if in neither.
        Devices that share a clip by frames, or by positions, then need nothing of each other.
    """

    name: str
    mix: Callable[[Tokens, Grid], Tokens]
    sequences: Callable[[int, Grid], np.ndarray]
    token: bool = True
    within: str = "clip"


class Scheme(NamedTuple):
    """The attentions of a block, and what of time the model sees outside them.

    Attributes:
      steps: the attentions, in the order in which they are applied.
      plain: index of the one that ends in its projection, as the image model's attention does.
        Every other ends in a further linear layer (`temporal_fc` in the release) that starts at
        zero in the release's init, so that a video model starts as the image model it is made from.
      parallel: whether every step reads the block's input, rather than what the step before left.
      time_embedding: whether the patches get a temporal position embedding.
      token_per_frame: whether each frame keeps its own classification token, averaged at the end.
    """

    steps: tuple[Step, ...]
    plain: int = -1
    parallel: bool = False
    time_embedding: bool = True
    token_per_frame: bool = False


# In the released models the classification token takes no part in temporal attention.
TEMPORAL = Step("temporal", over_time, by_position, token=False, within="position")
SPATIAL = Step("spatial", over_space, by_frame, within="frame")
JOINT = Step("joint", over_space_time, by_clip)
WIDTH = Step("width", over_width, by_row, within="frame")
HEIGHT = Step("height", over_height, by_column, within="frame")
LOCAL = Step("local", functools.partial(over_parts, sequences=by_quarter), by_quarter)
GLOBAL = Step("global", functools.partial(over_parts, sequences=by_stride), by_stride)

SCHEMES = {
    "divided": Scheme((TEMPORAL, SPATIAL)),
    "space": Scheme((SPATIAL,), time_embedding=False, token_per_frame=True),
    "joint": Scheme((JOINT,)),
    "local_global": Scheme((LOCAL, GLOBAL)),
    "axial": Scheme((TEMPORAL, WIDTH, HEIGHT)),
    # The token must join here, or it would never see the video.
    "time": Scheme((TEMPORAL._replace(token=True),)),
    "space_then_time": Scheme((SPATIAL, TEMPORAL), plain=0),
    "parallel": Scheme((TEMPORAL, SPATIAL), parallel=True),
}
