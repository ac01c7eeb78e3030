"""Clips of different lengths in one batch: frames fill up the shorter ones, and are masked.

Padding is at the end. The mask is made once, by `mask`, and travels with the tokens. Norms, MLPs
and attention within frames compute padding as they compute everything; attention across frames
leaves its keys out (`over_valid`), and averages over frames leave it out (`present`). So a clip has
the numbers that it has alone.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from timesformer_jax.distributed.sharding import mesh_size, target_device
from timesformer_jax.errors import InputError
from timesformer_jax.models import attention
from timesformer_jax.models.attention import Partition, sequences_by_length
from timesformer_jax.models.ops import long_attention
from timesformer_jax.models.ops.kernels import select
from timesformer_jax.models.ops.reference import use_references
from timesformer_jax.models.tokens import Grid, Tokens

# Frames and grid on which partitions are tried: odd and even sides, and a few periods of most.
_TRIED = 8, (4, 3)


def mask(valid_frames: Any, shape: tuple[int, ...]) -> Bool[Array, "b t"]:
    """The valid frames of a batch of clips, (B, T).

    Args:
      valid_frames: (B,) ints from 1 to T: so many frames from the first one are valid.
      shape: of the batch, (B, T, ...).

    Raises:
      InputError: they are of another shape, no integers, or out of range where they are known
        while the program is traced.
    """
    b, t = shape[:2]
    is_known = not isinstance(valid_frames, jax.core.Tracer)
    numbers = np.asarray(valid_frames) if is_known else valid_frames
    if numbers.shape != (b,) or not jnp.issubdtype(numbers.dtype, jnp.integer):
        raise InputError(
            f"valid_frames must be {b} integers, one for each clip, not {numbers.dtype} of shape "
            f"{tuple(numbers.shape)}"
        )
    if is_known and b and (numbers.min() < 1 or numbers.max() > t):
        raise InputError(
            f"valid_frames must be from 1 to the {t} frames of the clips, not {numbers.min()} to "
            f"{numbers.max()}"
        )
    return jnp.arange(t) < jnp.asarray(numbers)[:, None]


@functools.cache
def check_partition(name: str, partition: Partition) -> None:
    """Raises InputError unless shorter clips have the sequences of longer ones, cut off.

    A partition into, say, thirds of the clip puts other frames together if the clip is shorter: a
    clip with padding could not have the numbers of the clip alone.

    Args:
      name: of the layer.
      partition: of the layer.
    """
    t, grid = _TRIED
    whole = np.asarray(partition(t, grid))
    for k in range(1, t):
        alone = np.asarray(partition(k, grid))
        pairs = set(zip(whole[:k].ravel().tolist(), alone.ravel().tolist()))
        if not len(pairs) == len(np.unique(whole[:k])) == len(np.unique(alone)):
            raise InputError(
                f"attention layer {name!r} puts other frames together in a clip of {k} frames than "
                f"in the first {k} of {t}, so that a clip cannot be filled up: use "
                "clip.short=repeat, and no valid_frames"
            )


def present(valid: Bool[Array, "b t"], sequences: Int[np.ndarray, "t n"]) -> Bool[Array, "b s"]:
    """The sequences that have a valid patch; it is enough to look at the first frame of each."""
    first = np.full(sequences.max() + 1, len(sequences))
    np.minimum.at(first, sequences, np.arange(len(sequences))[:, None])
    return valid[:, first]


def attend(qkv: Tokens, grid: Grid, partition: Partition, within: str) -> Tokens:
    """`over_valid` of a layer of `schemes`, on each device of the mesh.

    Raises:
      InputError: devices share a clip whose patches of different frames and positions attend to
        each other: they exchange heads, for which there is no masked form.
    """
    if within == "clip" and mesh_size("sequence") > 1:
        raise InputError(
            "devices cannot share clips that are filled up (clip.short=mask) in a scheme that "
            "compares patches of different frames and positions; set --config.mesh.sequence=1"
        )
    kind = "temporal" if within == "position" else "joint"
    run = functools.partial(over_valid, partition=partition)
    return select.on_each_device(kind, qkv, grid, run)


def over_valid(qkv: Tokens, grid: Grid, partition: Partition) -> Tokens:
    """Attention within the sequences of any partition, to the tokens of valid frames.

    Every device has this form, and no kernel is faster yet.

    Args:
      qkv, grid: as for `attention.over_time`; `qkv.valid` is not None.
      partition: the layer's.

    Returns:
      As `attention.over_time`. The results of padding are finite and have no meaning.
    """
    b, t, n, *_ = qkv.patches.shape
    number = partition(t, grid)
    if number.shape[1] != n:  # devices share the positions, or positions were added for them
        number = np.tile(np.arange(n), (t, 1))
    assert qkv.valid is not None
    flat = qkv.patches.reshape(b, t * n, *qkv.patches.shape[3:])
    groups, tokens, patches = sequences_by_length(number), [], []
    for numbers, index in groups:
        x, valid = _take(flat, index, (t, n)), qkv.valid[:, index // n]
        if qkv.cls is not None:
            own = qkv.cls if len(groups) == 1 else qkv.cls[:, numbers]
            x = jnp.concatenate([own[:, :, None], x], axis=2)
            valid = jnp.pad(valid, ((0, 0), (0, 0), (1, 0)), constant_values=True)
        out = _attend(x, valid)
        if qkv.cls is not None:
            tokens.append(out[:, :, 0])
            out = out[:, :, 1:]
        patches.append(out.reshape(b, -1, out.shape[-1]))
    cls = _together(tokens, [numbers for numbers, _ in groups]) if tokens else None
    order = np.concatenate([index.ravel() for _, index in groups])
    back = np.argsort(order).reshape(t, n)
    return Tokens(cls, _take(jnp.concatenate(patches, axis=1), back, (n, t)))


def _attend(qkv: jax.Array, valid: jax.Array) -> jax.Array:
    """Attention along L of (B, S, L, 3, h, d) to the tokens of (B, S, L) that are valid."""
    b, s, length, _, heads, _ = qkv.shape
    platform = target_device().platform
    if use_references.value or not long_attention.is_long(length, s * heads, platform):
        return jax.vmap(jax.vmap(attention.attend))(qkv, valid)
    rows = qkv.reshape(b * s, length, 1, *qkv.shape[3:])
    out = long_attention.attention(rows, platform, valid.reshape(b * s, length))
    return out.reshape(b, s, length, -1)


def _take(flat: jax.Array, index: np.ndarray, shape: tuple[int, int]) -> jax.Array:
    """(B, T * N, ...) at (S, L) indices; a view or a transposed copy where it is one."""
    numbers = np.arange(flat.shape[1])
    if np.array_equal(index.ravel(), numbers):
        return flat.reshape(len(flat), *index.shape, *flat.shape[2:])
    if np.array_equal(index, numbers.reshape(shape).T):
        return flat.reshape(len(flat), *shape, *flat.shape[2:]).swapaxes(1, 2)
    # No index comes twice, so that the gradient needs no atomic additions.
    return flat.at[:, index].get(unique_indices=True, mode="promise_in_bounds")


def _together(parts: list[jax.Array], numbers: list[np.ndarray]) -> jax.Array:
    """The tokens of all sequences, (B, S, hd), in the order of the sequences' numbers."""
    order = np.argsort(np.concatenate(numbers))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)[:, order]
