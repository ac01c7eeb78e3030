"""Which patches the classification token got its information from: attention rollout.

Rollout (arXiv 2005.00928) reads every attention as a matrix that mixes tokens, takes the residual
beside it as the identity, leaves out the MLPs, and multiplies the layers. Only the row of the
classification token is needed. So the row vector of its relevance is multiplied by one layer after
the other, from the last to the first, and within a layer by the matrix of one sequence after the
other. The gradient-weighted form (arXiv 2103.15679) weighs each attention by its gradient.
docs/explain.md has the derivation.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from timesformer_jax.errors import InputError
from timesformer_jax.models.attention import sequences_by_length
from timesformer_jax.models.block import Attention, Block
from timesformer_jax.models.embedding import Video, patch_grid
from timesformer_jax.models.schemes import AttentionLayer
from timesformer_jax.models.timesformer import TimeSformer
from timesformer_jax.models.tokens import Grid, Tape, Tokens, tape

# Attention weights that are in memory at a time: 64 MiB in float32. Queries are taken in chunks.
_WEIGHTS = 2**24


class Relevance(NamedTuple):
    """What the prediction of each clip is traced back to.

    Attributes:
      logits: (B, C) float32, of the same forward pass.
      patches: (B, T, N) float32, the relevance of every patch of the clip, at least 0. By rollout,
        patches and token together sum to 1. Weighted by the gradient, the scale is arbitrary.
      cls: (B,), what stays at the classification token's own embedding.
    """

    logits: Float[Array, "b c"]
    patches: Float[Array, "b t n"]
    cls: Float[Array, " b"]


def attention_rollout(
    model: TimeSformer, video: Video, target: Int[Array | np.ndarray, " b"] | None = None
) -> Relevance:
    """The relevance of every patch to the classification token after the last block.

    Works for every scheme, registered ones too: what attends to what follows from the partitions.
    The blocks run one by one. In memory are the input of each block, (B, T, N, D), and no more
    attention weights than 2^24 or those of one query of every sequence. No matrix of all pairs of
    patches is made, not even for joint attention. Takes about 1.5 forward passes; with `target`,
    about three.

    Args:
      model: any TimeSformer; `remat` and `scan_layers` make no difference.
      video: (B, T, H, W, 3) float, normalised RGB, as for the model.
      target: (B,) classes. None: rollout, which is the same for all classes. Else each attention is
        weighted by the positive part of its gradient for the logit of the clip's class.

    Raises:
      InputError: if the video is not of the shape that the model takes.
    """
    whole = nnx.split(model)
    x, inputs = _embed(*whole, video), []
    grid = patch_grid(model.config, video)
    for block in model.blocks:
        inputs.append(x)
        x = _forward(*nnx.split(block), x, grid)
    logits, x_bar = _read(*whole, x, target)
    # One token, or one for each frame; the prediction uses their mean.
    assert x.cls is not None
    share = 1 / x.cls.shape[1] if x.cls.ndim == 3 else 1.0
    wide = jnp.promote_types(x.patches.dtype, jnp.float32)
    row = Tokens(jnp.full(x.cls.shape[:-1], share, wide), jnp.zeros(x.patches.shape[:-1], wide))
    for block in reversed(model.blocks):
        row, x_bar = _backward(*nnx.split(block), inputs.pop(), x_bar, row, grid)
    assert row.cls is not None
    return Relevance(logits, row.patches, row.cls.reshape(len(row.cls), -1).sum(axis=1))


def layer_attention(
    model: TimeSformer, video: Video, block: int = -1, layer: str | None = None
) -> Float[Array, "b heads t n"]:
    """The attention of one layer as it is: what the classification token attends to.

    The token has a copy in every sequence of the layer, and its update is the mean over them: so
    are the weights here. With those of the token for itself they sum to 1. In a layer that the
    token takes no part in, such as temporal attention in divided blocks: what a patch attends to,
    averaged over all patches as queries.

    Args:
      model, video: as for `attention_rollout`.
      block: from 0; -1 is the last.
      layer: a layer of the scheme, such as "temporal"; None for the last of the block that the
        token takes part in.

    Returns:
      (B, heads, T, N) float32.

    Raises:
      InputError: if there is no such block or layer.
    """
    if not -len(model.blocks) <= block < len(model.blocks):
        raise InputError(f"there is no block {block}; the model has {len(model.blocks)}")
    block %= len(model.blocks)
    layers = model.config.scheme.layers_of(block)
    joined = [found for found in layers if found.joins_cls]
    chosen = [found for found in layers if found.name == layer] if layer else joined[-1:]
    if not chosen:
        names = ", ".join(found.name for found in layers)
        wanted = f"layer {layer!r}" if layer else "layer that the classification token joins"
        raise InputError(
            f"block {block} of a {model.config.attention} model has no {wanted}; it has {names}"
        )
    x = _embed(*nnx.split(model), video)
    grid = patch_grid(model.config, video)
    for before in model.blocks[:block]:
        x = _forward(*nnx.split(before), x, grid)
    return _raw(*nnx.split(model.blocks[block]), x, chosen[0].name, grid)


# Programs. Those of a block are compiled once for all blocks of a model.


@functools.partial(jax.jit, static_argnames="graph")
def _embed(graph: Any, state: Any, video: Any) -> Tokens:
    return nnx.merge(graph, state).embedded(video)


@functools.partial(jax.jit, static_argnames="graph")
def _read(
    graph: Any, state: Any, x: Tokens, target: jax.Array | None
) -> tuple[jax.Array, Tokens | None]:
    """Logits, and the gradients of those of `target` with respect to the tokens."""
    model = nnx.merge(graph, state)
    logits, vjp = jax.vjp(lambda x: model.head(model.norm(model.with_one_token(x).cls)), x)
    if target is None:
        return logits, None
    return logits, vjp(jax.nn.one_hot(target, logits.shape[-1], dtype=logits.dtype))[0]


@functools.partial(jax.jit, static_argnames=("graph", "grid"))
def _forward(graph: Any, state: Any, x: Tokens, grid: Grid) -> Tokens:
    return nnx.merge(graph, state)(x, grid)


@functools.partial(jax.jit, static_argnames=("graph", "grid"))
def _backward(
    graph: Any, state: Any, x: Tokens, x_bar: Tokens | None, row: Tokens, grid: Grid
) -> tuple[Tokens, Tokens | None]:
    """The row after the block to the row before it, and the gradients likewise, if there are any.

    The block is computed again from its input.
    """
    block = nnx.merge(graph, state)
    if x_bar is None:
        _, qkv = _taped(block, x, grid)
        return _relevance_before(block, qkv, None, row, grid), None
    zeros = [_zeros(block.attention[name], x, grid) for name in block.order]
    run = functools.partial(_taped, block, grid=grid)
    _, vjp, qkv = jax.vjp(lambda x, added: run(x, added=added), x, zeros, has_aux=True)
    x_bar, attended_bar = vjp(x_bar)
    return _relevance_before(block, qkv, attended_bar, row, grid), x_bar


@functools.partial(jax.jit, static_argnames=("graph", "name", "grid"))
def _raw(graph: Any, state: Any, x: Tokens, name: str, grid: Grid) -> Float[Array, "b heads t n"]:
    block = nnx.merge(graph, state)
    _, qkv = _taped(block, x, grid)
    index = block.order.index(name)
    layer = block.attention[name].layer
    assert x.cls is not None
    joins, size = layer.joins_cls, x.patches.shape[1] * x.patches.shape[2]
    cls = jnp.full(x.cls.shape[:-1], 1 / x.cls.shape[1] if x.cls.ndim == 3 else 1.0)
    row = Tokens(cls if joins else None, jnp.full(x.patches.shape[:3], 0.0 if joins else 1 / size))
    return _times_attention(layer, qkv[index], None, row, grid).patches


def _taped(
    block: Block, x: Tokens, grid: Grid, added: list[Tokens] | None = None
) -> tuple[Tokens, list[Tokens]]:
    """The tokens after the block, and the projections of its attentions in order."""
    with tape(found := Tape(added or ())):
        out = block(x, grid)
    return out, found.qkv


def _zeros(attention: Attention, x: Tokens, grid: Grid) -> Tokens:
    """Zeros of the shape of the attended values."""
    layer, width = attention.layer, attention.proj.kernel.shape[0]
    b, t, n, _ = x.patches.shape
    sequences = int(layer.partition(t, grid).max()) + 1
    cls = jnp.zeros((b, sequences, width), x.patches.dtype) if layer.joins_cls else None
    return Tokens(cls, jnp.zeros((b, t, n, width), x.patches.dtype))


# Within a block.


def _relevance_before(
    block: Block, qkv: list[Tokens], attended_bar: list[Tokens] | None, row: Tokens, grid: Grid
) -> Tokens:
    """The row before the block. Layers that read one and the same input are added."""
    layers = [block.attention[name].layer for name in block.order]
    bars: Sequence[Tokens | None] = attended_bar or [None] * len(layers)
    attentions = list(zip(layers, qkv, bars))
    steps = [attentions] if block.parallel else [[one] for one in reversed(attentions)]
    for step in steps:
        row = _step(step, row, grid)
    return row


def _step(attentions: list[tuple], row: Tokens, grid: Grid) -> Tokens:
    """row (I + A) by gradients, else row (I + A) / 2, for the attentions that read one input.

    Of the residual and K updates, each has the share 1 / (1 + K). A token that a layer does not
    update keeps what it has.
    """
    weighted = attentions[0][2] is not None
    joined = sum(layer.joins_cls for layer, *_ in attentions)
    shares = (1, 1) if weighted else (1 / (1 + joined), 1 / (1 + len(attentions)))
    assert row.cls is not None  # the residual stream always has the token
    total = row = Tokens(row.cls * shares[0], row.patches * shares[1])
    for layer, qkv, bar in attentions:
        read = row if layer.joins_cls else row._replace(cls=None)
        moved = jax.tree.map(
            lambda x: x.mean(axis=1), _times_attention(layer, qkv, bar, read, grid)
        )
        cls = total.cls if moved.cls is None else total.cls + moved.cls
        total = Tokens(cls, total.patches + moved.patches)
    return total


def _times_attention(
    layer: AttentionLayer, qkv: Tokens, bar: Tokens | None, row: Tokens, grid: Grid
) -> Tokens:
    """A row vector over the tokens times the attention matrix of a layer, for each head.

    Args:
      qkv: the layer's projections, as `AttentionLayer.attend` takes them.
      bar: the gradient with respect to its attended values: the weights are then multiplied by
        their own gradients where those are positive.
      row: cls (B,), (B, S) where every sequence keeps its own, or None where the token takes no
        part; patches (B, T, N).

    Returns:
      cls (B, h), (B, h, S) or None; patches (B, h, T, N).
    """
    number = layer.partition(row.patches.shape[1], grid)
    sequences = int(number.max()) + 1
    own = row.cls is not None and row.cls.ndim == 2
    if row.cls is not None and not own:
        # The update is the mean over the copies. The gradients have the factor already.
        share = 1 if bar is not None else 1 / sequences
        row = row._replace(cls=jnp.repeat(row.cls[:, None] * share, sequences, axis=1))
    of_cls, of_patches, groups = [], [], sequences_by_length(number)
    for group in groups:
        q, k, v = jnp.moveaxis(_gather(qkv, *group), 3, 0)
        g = None if bar is None else _gather(bar, *group).reshape(v.shape)
        out = _times_softmax(_gather(row, *group), q, k, v, g).swapaxes(1, 2)  # b h s tokens
        if row.cls is not None:
            of_cls.append(out[..., 0])
            out = out[..., 1:]
        of_patches.append(out.reshape(*out.shape[:2], -1))
    patches = _put_back(of_patches, [index.reshape(-1) for _, index in groups])
    patches = patches.reshape(*patches.shape[:2], *row.patches.shape[1:])
    if row.cls is None:
        return Tokens(None, patches)
    cls = _put_back(of_cls, [numbers for numbers, _ in groups])
    return Tokens(cls if own else cls.sum(axis=-1), patches)


def _gather(x: Tokens, numbers: np.ndarray, index: np.ndarray) -> jax.Array:
    """[cls; patches] of s sequences of l patches, (B, s, 1 + l, ...); without cls (B, s, l, ...).

    Args:
      numbers: (s,), of the sequences.
      index: (s, l), their patches.
    """
    patches = x.patches.reshape(len(x.patches), -1, *x.patches.shape[3:])[:, index]
    if x.cls is None:
        return patches
    return jnp.concatenate([x.cls[:, numbers, None], patches], axis=2)


def _put_back(taken: list[jax.Array], index: list[np.ndarray]) -> jax.Array:
    """Parts that were taken along the last axis, as one array in the old order."""
    return jnp.concatenate(taken, axis=-1)[..., np.argsort(np.concatenate(index))]


def _times_softmax(
    row: Float[Array, "b s l"],
    q: Float[Array, "b s l h d"],
    k: Float[Array, "b s l h d"],
    v: Float[Array, "b s l h d"],
    bar: Float[Array, "b s l h d"] | None,
) -> Float[Array, "b s h l"]:
    """Each row vector times the attention matrix of its sequence, a chunk of queries at a time."""
    b, s, length, heads, channels = q.shape
    chunks = -(-length // max(_WEIGHTS // (b * s * heads * length), 1))
    size = -(-length // chunks)
    wide = jnp.promote_types(q.dtype, jnp.float32)

    def chunked(x: jax.Array) -> jax.Array:  # (b, s, l, ...) to (chunks, b, s, size, ...)
        rest = [(0, 0)] * (x.ndim - 3)
        x = jnp.pad(x, [(0, 0), (0, 0), (0, chunks * size - length), *rest])
        return jnp.moveaxis(x.reshape(b, s, chunks, size, *x.shape[3:]), 2, 0)

    def add(total: jax.Array, part: tuple) -> tuple:
        row, q, bar = part
        logits = jnp.einsum("bsqhd,bskhd->bshqk", q, k, preferred_element_type=wide)
        weights = jax.nn.softmax(logits, axis=-1)
        if bar is not None:
            weights_bar = jnp.einsum("bsqhd,bskhd->bshqk", bar, v, preferred_element_type=wide)
            weights = weights * jax.nn.relu(weights_bar)
        return total + jnp.einsum("bsq,bshqk->bshk", row, weights), None

    parts = jax.tree.map(chunked, (row, q * channels**-0.5, bar))
    return jax.lax.scan(add, jnp.zeros((b, s, heads, length), row.dtype), parts)[0]
