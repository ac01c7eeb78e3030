"""Attention within frames, and across frames, for TPUs (section 3, equation 9, and joint).

B clips, T frames, N patches a frame, S sequences a clip, h heads of d channels.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from timesformer_jax.models.ops.kernels import tpu_frame, tpu_heads, tpu_joint
from timesformer_jax.models.ops.kernels.tpu_blocks import Sequence
from timesformer_jax.models.ops.kernels.tpu_heads import LANES


def unsupported(
    shape: tuple[int, ...], dtype: Any, frames: int = 1, sequences: int = 1
) -> str | None:
    """Why these kernels do not support qkv (B, T, N, 3, h, d) of a dtype; None if they do.

    Args:
      frames: consecutive frames whose patches share a sequence.
      sequences: sequences that each frame has, if several.
    """
    _, t, n, _, h, d = shape
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        return f"it takes bfloat16 and float32, not {jnp.dtype(dtype).name}"
    if d % 8 or d > LANES:
        return f"heads have {d} channels; it takes multiples of 8 up to {LANES}"
    if h * d % LANES:
        return f"{h} heads of {d} channels are not a multiple of {LANES} lanes"
    if t % frames:
        return f"{t} frames are not a multiple of {frames}"
    if sequences > 1 and not tpu_frame.fits(n, sequences, h, d, dtype):
        return f"{sequences} sequences of {n} patches exceed the memory of a core"
    if sequences > 1 or _in_one_step(frames, n, 1, h, d, dtype):
        return None
    sequence = Sequence(frames, n, True, h, d, jnp.dtype(dtype))
    waiting = min(sequence.resident_bytes, tpu_joint.RESIDENT)
    is_small = sequence.logits(*sequence.blocks) <= tpu_heads.STEP_LOGITS
    if not is_small and sequence.vmem + waiting > tpu_heads.VMEM:
        return f"frames of {n} patches exceed the memory of a core; it cuts multiples of 8 only"
    return None


def _in_one_step(frames: int, n: int, c: int, heads: int, d: int, dtype: Any) -> bool:
    """Whether a sequence is one frame, of n patches and c tokens, that a step takes whole."""
    sizes = n, c, heads, d, dtype
    return frames == 1 and tpu_frame.fits(*sizes) and tpu_frame.is_small(*sizes)


def attention(
    patches: Float[Array, "b t n qkv"],
    cls: Float[Array, "b s qkv"] | None,
    heads: int,
    *,
    frames: int = 1,
    sequences: tuple[int, ...] | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "b t n qkv//3"], Float[Array, "b s qkv//3"] | None]:
    """Attention within the sequences of every frame, or of every few frames.

    Args:
      patches: (B, T, N, 3 * h * d), the projection: all queries, all keys, all values, by heads.
        Products take their operands in its dtype; sums and the softmax are float32.
      cls: (B, S, 3 * h * d), a classification token for each sequence, group of frames by group; it
        attends and is attended to within its sequence. None without tokens.
      frames: consecutive frames whose patches share a sequence: 1, or T for joint attention.
      sequences: where `frames` is 1, the number of each patch's sequence within its frame, N
        integers from 0 without gaps; by default a frame is one sequence.
      interpret: as `pallas_call` takes it, to run where there is no TPU.

    Returns:
      The attended values, (B, T, N, h * d) and (B, S, h * d), heads side by side; None for the
      second without tokens.

    Raises:
      ValueError: if `sequences` is not for these frames, patches and tokens.
    """
    b, t, n, width = patches.shape
    count = 1 if sequences is None else max(sequences) + 1
    if sequences is not None and (frames > 1 or len(sequences) != n):
        raise ValueError(f"{len(sequences)} numbers of sequences for {frames} x {n} patches")
    if cls is not None and cls.shape[1] != t // frames * count:
        raise ValueError(f"{cls.shape[1]} tokens for {t // frames} x {count} sequences")
    tokens = 0 if cls is None else count
    in_one_step = _in_one_step(frames, n, tokens, heads, width // 3 // heads, patches.dtype)
    if in_one_step or sequences is not None:
        cls = None if cls is None else cls.reshape(b, t, count, width)
        out, cls_out = tpu_frame.attention(patches, cls, heads, sequences, interpret)
    else:
        groups = patches.reshape(-1, frames, n, width)
        cls = None if cls is None else cls.reshape(-1, 1, width)
        out, cls_out = tpu_joint.attention(groups, cls, heads, interpret)
    out = out.reshape(b, t, n, -1)
    return out, None if cls_out is None else cls_out.reshape(b, -1, out.shape[-1])
