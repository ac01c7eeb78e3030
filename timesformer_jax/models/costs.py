"""What a model costs, computed from its config alone: parameters, comparisons, products.

A number here is for the forward pass of one view of one clip. `macs` are multiply-accumulates: one
is two FLOPs (`flops`). The paper's "TFLOPs" are
multiply-accumulates over three crops, `3 * macs(config) / 1e12`.
"""

from __future__ import annotations

import numpy as np

from timesformer_jax.errors import InputError
from timesformer_jax.models.config import TimeSformerConfig
from timesformer_jax.models.schemes import AttentionLayer
from timesformer_jax.models.tokens import Grid


def parameter_count(config: TimeSformerConfig) -> int:
    """Parameters of the model, head included.

    With D channels, an MLP of M, C classes, A attentions in all L blocks, and W channels of the
    queries, keys and values of an attention (W = D in the paper's schemes):

        embedding   3 P^2 D + D, D for the token, (N + 1) D in space, T D in time
        attention   4 D W + 3 D + 3 W, norm included; D^2 + D more where it has a `temporal_fc`
        MLP         2 D M + M + 3 D
        model       embedding + A attentions + L MLP + 2 D + D C + C
    """
    d, m, c = config.hidden_size, config.mlp_size, config.num_classes
    embedding = 3 * config.patch_size**2 * d + d + d
    if config.position_embedding != "none":
        embedding += (_patches(config.grid) + 1) * d
    if config.position_embedding == "space_time" and config.scheme.time_embedding:
        embedding += config.num_frames * d
    attentions = 0
    for layer in _attentions(config):
        _, w = config.heads_and_width(layer)
        attentions += 4 * d * w + 3 * (d + w) + layer.has_temporal_fc * (d * d + d)
    mlp = 2 * d * m + m + 3 * d
    return embedding + attentions + config.depth * mlp + 2 * d + d * c + c


def comparisons(
    config: TimeSformerConfig,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
) -> float:
    """Query-key comparisons a patch makes in a block, summed over its attentions; the blocks' mean.

    Counted as the paper counts: in each attention, the patches of its sequence (itself included)
    and one classification token; NF + 1 for joint, N + F + 2 for divided. The token counts for
    temporal attention too, where the paper has it and the release leaves it out. Where sequences
    differ in length (local_global on odd sides), the mean over the patches.
    """
    t, grid = _sizes(config, frames, height, width)
    return (
        sum(
            float((_lengths(layer, t, grid) ** 2).sum() / (t * _patches(grid))) + 1
            for layer in _attentions(config)
        )
        / config.depth
    )


def macs(
    config: TimeSformerConfig,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
) -> int:
    """Multiply-accumulates of the forward pass of one clip (one view).

    Counts the matrix products, including QK^T and AV of the attentions, and the patch embedding.
    The products of the last block on the patches are counted, although no output depends on them
    and a compiler may drop them; so is `temporal_fc`, which is usually fused with the projection.
    With W channels of the queries (D in the paper's schemes), a sequence of l tokens costs 2 W l^2,
    a token D W for each of q, k, v and projection, and D^2 for `temporal_fc`. Not counted: norms,
    softmax, GELU, additions, resizing of position embeddings.

    Args:
      frames, height, width: the clip, in frames and pixels; the config's own sizes by default.
    """
    t, grid = _sizes(config, frames, height, width)
    d, patches = config.hidden_size, t * _patches(grid)
    attentions = 0
    for layer in _attentions(config):
        _, w = config.heads_and_width(layer)
        lengths = _lengths(layer, t, grid)
        tokens = patches + layer.joins_cls * len(lengths)  # one copy of the token a sequence
        attentions += tokens * (4 * w + layer.has_temporal_fc * d) * d
        attentions += int(2 * w * ((lengths + layer.joins_cls) ** 2).sum())
    tokens = patches + (t if config.scheme.token_per_frame else 1)
    mlp = tokens * 2 * d * config.mlp_size
    embedding = patches * 3 * config.patch_size**2 * d
    return embedding + attentions + config.depth * mlp + d * config.num_classes


def flops(
    config: TimeSformerConfig,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    *,
    trained: str = "none",
) -> int:
    """FLOPs of one clip (one view): two for each of its `macs`.

    What remat computes again does not count.

    Args:
      frames, height, width: as of `macs`.
      trained: "all" for a training step, whose backward pass costs twice the forward pass; "head",
        whose backward pass is negligible; or "none".
    """
    return (6 if trained == "all" else 2) * macs(config, frames, height, width)


def _attentions(config: TimeSformerConfig) -> list[AttentionLayer]:
    """Those of all blocks."""
    return [layer for i in range(config.depth) for layer in config.scheme.layers_of(i)]


def _sizes(
    config: TimeSformerConfig, frames: int | None, height: int | None, width: int | None
) -> tuple[int, Grid]:
    """Frames, and patches down and across, of a clip."""
    p = config.patch_size
    height, width = height or config.image_size, width or config.image_size
    if height % p or width % p:
        raise InputError(f"{height} x {width} pixels cannot be cut into patches of {p}")
    return frames or config.num_frames, (height // p, width // p)


def _lengths(layer: AttentionLayer, t: int, grid: Grid) -> np.ndarray:
    """Patches in each sequence of an attention layer."""
    return np.bincount(layer.partition(t, grid).reshape(-1)).astype(np.int64)


def _patches(grid: Grid) -> int:
    return grid[0] * grid[1]
