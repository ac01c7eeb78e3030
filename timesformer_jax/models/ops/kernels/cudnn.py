"""Attention of whole sequences by cuDNN's fused kernels, mainly for spatial attention (equation 9).

Its sequences of 197 tokens are too long for one tile of `hopper`, and too short to be worth keeping
the logits in memory: cuDNN loops over the keys with a running softmax. It takes queries, keys and
values as three arrays, so XLA splits qkv: 6 passes over an array of (B, S, length, h * d), beside
the 4 of the attention.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Older versions read outside their arrays when XLA runs them from a command buffer.
MINIMUM_VERSION = (9, 15, 1)


def cudnn_version() -> tuple[int, ...] | None:
    """The version of cuDNN that is installed with JAX; None if none is."""
    for name in ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12"):
        try:
            return tuple(int(part) for part in importlib.metadata.version(name).split(".")[:3])
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def unsupported(
    shape: tuple[int, ...], dtype: Any, version: tuple[int, ...] | None = None
) -> str | None:
    """Why cuDNN does not support qkv (..., length, 3, h, d) of a dtype; None if it does.

    Called while a program is traced, since the compiler's own error would end the training.

    Args:
      version: of cuDNN; by default the installed one.
    """
    version = version or cudnn_version()
    *_, length, _, _, d = shape
    if version is None:
        return "cuDNN is not installed: pip install nvidia-cudnn-cu13, as jax[cuda13] does"
    if version < MINIMUM_VERSION:
        needed, found = (".".join(map(str, numbers)) for numbers in (MINIMUM_VERSION, version))
        return f"cuDNN {found} is older than {needed}, the first without a known illegal access"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN does not fuse attention in {jnp.dtype(dtype).name}"
    if length < 2:
        return "cuDNN has no gradient of sequences of one token"
    if d % 8 or d > 128:
        return f"heads have {d} channels; cuDNN takes multiples of 8 up to 128"
    return None


def attention(qkv: Float[Array, "*b l 3 h d"]) -> Float[Array, "*b l hd"]:
    """Attention within each sequence.

    JAX differentiates cuDNN's attention for even lengths only (its check takes an absent bias for a
    bias). A sequence of odd length is padded by one token. As no mask is supported here, the
    kernel is given the lengths of the sequences, and ignores the padding.

    Args:
      qkv: (..., length, 3, h, d), of a shape and dtype for which `unsupported` returns None.

    Returns:
      (..., length, h * d), the heads side by side. The softmax is float32.
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
