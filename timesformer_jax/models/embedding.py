"""From frames to tokens: the patch embedding and the position embeddings (equation 1)."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from timesformer_jax.distributed.pieces import in_pieces, is_long
from timesformer_jax.distributed.sharding import gather_fsdp, target_device
from timesformer_jax.models.config import TimeSformerConfig
from timesformer_jax.models.ops.linear import Linear, linear, token_sums
from timesformer_jax.models.ops.reference import with_reference
from timesformer_jax.models.tokens import Grid, Tokens

Video = Float[Array | np.ndarray, "b t h w 3"]
Kernel = Float[Array | np.ndarray, "p2c d"]
Bias = Float[Array | np.ndarray, " d"]


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


def cut_off(
    config: TimeSformerConfig, params: dict, clip_frames: int, frames: int
) -> tuple[TimeSformerConfig, dict]:
    """The model, and its parameters, for the first `frames` frames of clips of `clip_frames`.

    Its time embedding has the first rows of the one for whole clips: it gives the numbers that the
    model gives for whole clips of which only `frames` frames are valid.
    """
    params = dict(params, embedding=dict(params["embedding"]))
    if (table := params["embedding"].get("time")) is not None:
        table = resize_time(table, clip_frames, config.position_resize)
        params["embedding"]["time"] = table[:frames]
    return dataclasses.replace(config, num_frames=frames), params


def _nearest(table: Float[Array | np.ndarray, "..."], axis: int, size: int) -> Float[Array, "..."]:
    """Resizes one axis to `size` by nearest neighbour, index floor(i * old / new)."""
    old = table.shape[axis]
    # In float32 as PyTorch computes it, which at a few sizes (26 to 22) is one off the exact rule.
    index = np.floor(np.arange(size, dtype=np.float32) * (np.float32(old) / np.float32(size)))
    return jnp.take(table, np.minimum(index.astype(np.int32), old - 1), axis=axis)


# ---- The patch embedding ------------------------------------------------------------------------


def _patch_embedding_reference(
    video: Video, kernel: Kernel, bias: Bias, patch_size: int, rule: str
) -> Float[Array, "b t n d"]:
    """Cuts the frames into patches, flattens each by (y, x, channel), and multiplies."""
    b, t, height, width, _ = video.shape
    grid = height // patch_size, width // patch_size
    x = video.reshape(b, t, grid[0], patch_size, grid[1], patch_size, 3)
    x = x.transpose(0, 1, 2, 4, 3, 5, 6)  # b t y p x q c -> b t y x p q c
    return linear(x.reshape(b, t, grid[0] * grid[1], -1), kernel, bias, rule)


@with_reference(_patch_embedding_reference)
def patch_embedding(
    video: Video, kernel: Kernel, bias: Bias, patch_size: int, rule: str
) -> Float[Array, "b t n d"]:
    """Equation 1 without the positions: every patch of every frame through x W + b.

    On a TPU it is a convolution with a stride of the patch size. A tile of a TPU has 128 numbers
    along the last axis: patches laid side by side would first be copied with 3 of 128 in use.

    Args:
      video: (B, T, H, W, 3), H and W multiples of the patch size.
      kernel: (P * P * 3, D) float32, its rows ordered by (y, x, channel); rounded to the dtype of
        `video`. The gradients of kernel and bias are float32.
      bias: (D,) float32.
      patch_size: P.
      rule: the path of the kernel in the sharding rules (`distributed.sharding`).

    Returns:
      (B, T, N, D) in the dtype of `video`, the patches in rows from the top left.
    """
    if target_device().platform != "tpu":
        return _patch_embedding_reference(video, kernel, bias, patch_size, rule)
    b, t = video.shape[:2]
    y = _convolution(patch_size, rule, video.reshape(b * t, *video.shape[2:]), kernel, bias)
    return y.reshape(b, t, -1, y.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _convolution(
    patch_size: int, rule: str, frames: Float[Array, "f h w 3"], kernel: Kernel, bias: Bias
) -> Float[Array, "f y x d"]:
    """Every patch of every frame through x W + b, as a grid of H / P x W / P patches."""
    window = gather_fsdp(jnp.asarray(kernel, frames.dtype), rule)
    return _convolve(patch_size, frames, window) + jnp.asarray(bias, frames.dtype)


def _convolve(
    patch_size: int, frames: Float[Array, "f h w 3"], kernel: Float[Array, "p2c d"]
) -> Float[Array, "f y x d"]:
    window = kernel.reshape(patch_size, patch_size, frames.shape[-1], -1)
    return jax.lax.conv_general_dilated(
        frames, window, (patch_size, patch_size), "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip


def _convolution_forward(patch_size: int, rule: str, *arguments: Any) -> tuple:
    return _convolution(patch_size, rule, *arguments), arguments[:2]


def _convolution_backward(
    patch_size: int, rule: str, saved: tuple, g: Float[Array, "f y x d"]
) -> tuple:
    frames, kernel = saved
    rounded = gather_fsdp(jnp.asarray(kernel, frames.dtype), rule)
    (frames_bar,) = jax.linear_transpose(
        lambda frames: _convolve(patch_size, frames, rounded), frames
    )(g)
    # Every number of a patch with the gradient of its patch: a convolution over frames as channels,
    # by the gradients, which lie P apart. Its sums are float32.
    window_bar = jax.lax.conv_general_dilated(
        frames, g, (1, 1), "VALID", rhs_dilation=(patch_size, patch_size),
        dimension_numbers=("CHWN", "IHWO", "HWNC"), preferred_element_type=kernel.dtype,
    )  # fmt: skip
    kernel_bar = gather_fsdp(window_bar.reshape(kernel.shape), rule)
    return frames_bar, kernel_bar, token_sums(g, kernel.dtype)


_convolution.defvjp(_convolution_forward, _convolution_backward)
