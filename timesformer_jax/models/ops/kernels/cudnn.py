"""Attention of whole sequences by cuDNN's fused kernels, for spatial attention (equation 9).

197 tokens are too many for a tile of `temporal` and too few to pay for keeping logits in memory:
the fused kernel walks over keys with a running softmax. cuDNN takes queries, keys and values as
three arrays, so XLA cuts the projection in three: 6 passes over a part, of the 4 of attention.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

import jax
import jax.numpy as jnp

# Older ones were seen to read outside their arrays when they are recorded in command buffers,
# which is how XLA runs them.
CUDNN = (9, 15, 1)


def cudnn_version() -> tuple[int, ...] | None:
    """The version of the cuDNN that is installed beside JAX; None if there is none."""
    for name in ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12"):
        try:
            return tuple(int(part) for part in importlib.metadata.version(name).split(".")[:3])
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def unsupported(
    shape: tuple[int, ...], dtype: Any, cudnn: tuple[int, ...] | None = None
) -> str | None:
    """Why cuDNN does not take qkv of a shape (..., length, 3, h, d) and dtype; None if it does.

    Asked before a program is traced, so that no training ends in an exception of the compiler's.

    Args:
      cudnn: its version; by default what is installed.
    """
    cudnn = cudnn or cudnn_version()
    *_, length, _, _, d = shape
    if cudnn is None:
        return "cuDNN is not installed: pip install nvidia-cudnn-cu13, as jax[cuda13] does"
    if cudnn < CUDNN:
        needed, found = (".".join(map(str, version)) for version in (CUDNN, cudnn))
        return f"cuDNN {found} is older than {needed}, the first without a known illegal access"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN does not fuse attention in {jnp.dtype(dtype).name}"
    if length < 2:
        return "cuDNN has no gradient of sequences of one token"
    if d % 8 or d > 128:
        return f"heads have {d} channels; cuDNN takes multiples of 8 up to 128"
    return None


def attention(qkv: jax.Array) -> jax.Array:
    """Attention within each sequence.

    JAX takes the gradient of even lengths alone (its check mistakes "no bias" for a bias). An odd
    sequence, of 197 tokens say, gets one more, whose key the kernel is told not to look at: by the
    sequences' lengths, since it takes no mask there.

    Args:
      qkv: (..., length, 3, h, d), of which `unsupported` finds nothing to say.

    Returns:
      (..., length, h * d), the heads side by side. The softmax is taken in float32.
    """
    *leading, length, _, h, d = qkv.shape
    parts = (qkv[..., i, :, :].reshape(-1, length, h, d) for i in range(3))
    if length % 2:
        q, k, v = (jnp.pad(part, ((0, 0), (0, 1), (0, 0), (0, 0))) for part in parts)
        lengths = jnp.full(len(q), length, jnp.int32)
    else:
        (q, k, v), lengths = parts, None
    out = jax.nn.dot_product_attention(
        q, k, v, query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return out[:, :length].reshape(*leading, length, h * d)
