"""From frames to tokens: the patch embedding and the position embeddings (equation 1)."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from timesformer_jax.distributed.pieces import in_pieces, is_long
from timesformer_jax.models.attention import Grid, Tokens
from timesformer_jax.models.config import TimeSformerConfig
from timesformer_jax.models.ops.linear import Linear
from timesformer_jax.models.ops.patch_embedding import patch_embedding

Video = Float[Array | np.ndarray, "b t h w 3"]


class Embedding(nnx.Module):
    """Frames to tokens: P x P patches through a linear layer, plus positions.

    Parameters: patch.kernel (P * P * 3, D), rows ordered by (y, x, channel); cls (D,);
    space (1 + N, D), whose row 0 belongs to the classification token; time (T, D).
    """

    def __init__(self, config: TimeSformerConfig, rngs: nnx.Rngs):
        self.config = config
        width, inputs = config.hidden_size, 3 * config.patch_size**2

        def conv2d_default(key, shape, dtype=jnp.float32):
            # The release leaves its patch convolution at PyTorch's default, +-1 / sqrt(inputs).
            bound = inputs**-0.5
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        self.patch = Linear(
            inputs, width, kernel_init=conv2d_default, bias_init=conv2d_default,
            dtype=jnp.dtype(config.dtype), rule="patch", rngs=rngs,
        )  # fmt: skip
        released = config.init == "release"
        normal = nnx.initializers.normal(0.02 if released else width**-0.5)
        self.cls = nnx.Param(normal(rngs.params(), (width,)))
        has_space = config.position_embedding != "none"
        has_time = config.position_embedding == "space_time" and config.scheme.time_embedding
        positions = 1 + math.prod(config.grid)
        self.space = nnx.Param(normal(rngs.params(), (positions, width))) if has_space else None
        # In the release's init every moment looks the same: the video model starts as the image
        # model it is made from.
        time = nnx.initializers.zeros if released else normal
        shape = config.num_frames, width
        self.time = nnx.Param(time(rngs.params(), shape)) if has_time else None

    @jax.named_scope("embedding")
    def __call__(self, video: Video) -> Tokens:
        """(B, T, H, W, 3) to cls (B, D), or (B, T, D) for space only, and patches (B, T, N, D)."""
        config = self.config
        b, t = video.shape[:2]
        p, grid, dtype = config.patch_size, patch_grid(config, video), jnp.dtype(config.dtype)
        kernel, bias, rule = self.patch.kernel[...], self.patch.bias[...], self.patch.rule
        cls, space, time = self.cls[...], None, None
        if self.space is not None:
            space = resize_space(self.space[...], config.grid, grid, config.position_resize)
            cls = cls + space[0]
        if self.time is not None:
            time = resize_time(self.time[...], t, config.position_resize)

        def embed(video: Any, time: jax.Array | None) -> jax.Array:
            patches = patch_embedding(jnp.asarray(video, dtype), kernel, bias, p, rule)
            # Positions are added in float32, and so are their gradients, sums over clips.
            if space is not None:
                patches = patches + space[1:]
            if time is not None:
                patches = patches + time[:, None]
            return patches.astype(dtype)

        if is_long(t, math.prod(grid)):
            clip = video, None if time is None else time[None]
            patches = in_pieces(
                lambda x: embed(x[0], None if x[1] is None else x[1][0]), clip, math.prod(grid)
            )
        else:
            patches = embed(video, time)
        one_a_frame = (t,) if config.scheme.token_per_frame else ()
        cls = jnp.broadcast_to(cls, (b, *one_a_frame, cls.shape[-1]))
        return Tokens(cls.astype(dtype), patches)


def patch_grid(config: TimeSformerConfig, video: Video) -> Grid:
    """Patches down and across."""
    return video.shape[2] // config.patch_size, video.shape[3] // config.patch_size


def resize_space(
    table: Float[Array | np.ndarray, "n d"], old: Grid, new: Grid, method: str = "nearest"
) -> Float[Array | np.ndarray, "m d"]:
    """Spatial positions (1 + N, D) of the grid `old` for the grid `new`, (1 + N', D).

    The row of the classification token stays as it is.

    Args:
      method: "nearest", as in the release, or "bicubic", antialiased where the grid shrinks.
    """
    if new == old:
        return table
    patches = table[1:].reshape(*old, -1)
    if method == "nearest":
        patches = _nearest(_nearest(patches, 0, new[0]), 1, new[1])
    else:
        patches = jax.image.resize(patches, (*new, patches.shape[-1]), "bicubic")
    return jnp.concatenate([table[:1], patches.reshape(math.prod(new), -1)])


def resize_time(
    table: Float[Array | np.ndarray, "t d"], new: int, method: str = "nearest"
) -> Float[Array, "s d"]:
    """Temporal positions (T, D) for another number of frames.

    Args:
      method: "nearest", as in the release, or "bicubic", which is linear in time.
    """
    if method == "nearest" or new == len(table):
        return _nearest(table, 0, new)
    return jax.image.resize(table, (new, table.shape[1]), "linear", antialias=False)


def _nearest(table: jax.Array | np.ndarray, axis: int, size: int) -> jax.Array:
    """Resizes one axis to `size` by nearest neighbour, index floor(i * old / new)."""
    old = table.shape[axis]
    # In float32 as PyTorch computes it, which at a few sizes (26 to 22) is one off the exact rule.
    index = np.floor(np.arange(size, dtype=np.float32) * (np.float32(old) / np.float32(size)))
    return jnp.take(table, np.minimum(index.astype(np.int32), old - 1), axis=axis)
