"""The patch embedding: non-overlapping P x P patches of every frame through one linear layer."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from timesformer_jax.distributed.sharding import gather_fsdp, target_device
from timesformer_jax.models.ops.linear import linear, token_sums
from timesformer_jax.models.ops.reference import with_reference

Video = Float[Array | np.ndarray, "b t h w 3"]
Kernel = Float[Array | np.ndarray, "p2c d"]
Bias = Float[Array | np.ndarray, " d"]


def reference(
    video: Video, kernel: Kernel, bias: Bias, patch_size: int, rule: str
) -> Float[Array, "b t n d"]:
    """Cuts the frames into patches, flattens each by (y, x, channel), and multiplies."""
    b, t, height, width, _ = video.shape
    grid = height // patch_size, width // patch_size
    x = video.reshape(b, t, grid[0], patch_size, grid[1], patch_size, 3)
    x = x.transpose(0, 1, 2, 4, 3, 5, 6)  # b t y p x q c -> b t y x p q c
    return linear(x.reshape(b, t, grid[0] * grid[1], -1), kernel, bias, rule)


@with_reference(reference)
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
        return reference(video, kernel, bias, patch_size, rule)
    b, t = video.shape[:2]
    y = _convolution(patch_size, rule, video.reshape(b * t, *video.shape[2:]), kernel, bias)
    return y.reshape(b, t, -1, y.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _convolution(
    patch_size: int, rule: str, frames: jax.Array, kernel: ArrayLike, bias: ArrayLike
) -> jax.Array:
    """(F, H, W, 3) frames to (F, H / P, W / P, D)."""
    window = gather_fsdp(jnp.asarray(kernel, frames.dtype), rule)
    return _convolve(patch_size, frames, window) + jnp.asarray(bias, frames.dtype)


def _convolve(patch_size: int, frames: jax.Array, kernel: jax.Array) -> jax.Array:
    window = kernel.reshape(patch_size, patch_size, frames.shape[-1], -1)
    return jax.lax.conv_general_dilated(
        frames, window, (patch_size, patch_size), "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip


def _forward(patch_size: int, rule: str, *arguments: Any) -> tuple:
    return _convolution(patch_size, rule, *arguments), arguments[:2]


def _backward(patch_size: int, rule: str, saved: tuple, g: jax.Array) -> tuple:
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


_convolution.defvjp(_forward, _backward)
