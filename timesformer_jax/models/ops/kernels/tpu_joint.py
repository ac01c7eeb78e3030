"""Attention of sequences too long for one step, such as all patches of a clip, for TPUs, in Pallas.

One step of the grid has a block of queries and a block of keys of one slab of heads. A block is
whole frames, or some rows of a large one. Its patches are packed in VMEM without gaps, and the
classification token follows those of the last block. Memory is linear in the length, and what a
step needs of VMEM does not depend on it, but for the gradient of the queries up to `RESIDENT`.

Forward, the softmax runs over the blocks of keys with running maxima m and sums l (in units of
log 2, transposed as in `tpu_frame`), and saves L = m + log l:

    S = K Q^T / sqrt(d) log2 e     P = exp2(S - m)     O^T = (O^T exp2(m before - m) + V^T P) / l

Backward, for all queries while a block of keys stays, with D = sum over channels of G O:

    P = exp2(S - L)                dP = V G^T               dS = P (dP - D)
    dV^T += G^T P^T                dQ^T += K^T dS / sqrt(d) dK^T += Q^T dS^T / sqrt(d)

dQ of the whole sequence waits in VMEM for its last block of keys. Where it is longer than
`RESIDENT`, a first kernel computes dQ, block of queries by block, and a second one the rest.

G sequences of F frames with N patches each, h heads of d channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from timesformer_jax.models.ops.kernels import tpu_blocks, tpu_heads
from timesformer_jax.models.ops.kernels.tpu_blocks import Block, Sequence, Specs
from timesformer_jax.models.ops.kernels.tpu_heads import LOG2_E, MASKED, NN, NT, Head, dot

# The projections of sequences of frames, and of the token of each sequence; a gradient has the same
# shape. The attended values, or their gradients.
Patches = Float[Array, "g f n qkv"]
Token = Float[Array, "g 1 qkv"] | None
Result = Float[Array, "g f n qkv//3"]
TokenResult = Float[Array, "g 1 qkv//3"] | None
# Logits, weights and their gradients, of some keys and queries.
Logits = Float[Array, "k q"]

RESIDENT = 16 * 2**20  # bytes of the queries' gradient that may wait in VMEM


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def attention(
    patches: Patches, cls: Token, heads: int, interpret: Any = False
) -> tuple[Result, TokenResult]:
    """Attention of all tokens of every sequence.

    Args:
      patches: (G, F, N, 3 * h * d).
      cls: (G, 1, 3 * h * d), a token for each sequence; None without tokens.
      interpret: as `pallas_call` takes it.

    Returns:
      (G, F, N, h * d), and (G, 1, h * d) or None.
    """
    return _run_forward(patches, cls, heads, interpret)[:2]


def _forward(patches: Patches, cls: Token, heads: int, interpret: Any) -> tuple:
    out, cls_out, log_sums = _run_forward(patches, cls, heads, interpret)
    return (out, cls_out), (patches, cls, out, cls_out, log_sums)


def _backward(heads: int, interpret: Any, saved: tuple, gradients: tuple) -> tuple:
    patches, cls, out, cls_out, log_sums = saved
    g, cls_g = gradients
    sequence = Sequence.of(patches, cls, heads)
    inputs = (patches, cls, g, cls_g, out, cls_out, log_sums)
    if sequence.resident_bytes <= RESIDENT:
        d_patches, parts = _run_backward(sequence, inputs, None, True, True, interpret)
    else:
        d_patches, (d_q, _, _) = _run_backward(sequence, inputs, None, True, False, interpret)
        d_patches, parts = _run_backward(sequence, inputs, d_patches, False, True, interpret)
        parts = (d_q, *parts[1:])
    return d_patches, None if cls is None else jnp.concatenate(parts, -1)


attention.defvjp(_forward, _backward)


def _run_forward(patches: Patches, cls: Token, heads: int, interpret: Any) -> tuple:
    """The results (G, F, N, h * d) and (G, 1, h * d) or None, and the log-sums of the queries.

    The log-sums are (G, slabs, blocks, heads of a slab, queries of a block) float32.
    """
    sequence = Sequence.of(patches, cls, heads)
    q, k = sequence.blocks
    group, f, n, width = patches.shape
    lanes, rows, slab = sequence.query_lanes(q), sequence.key_rows(k), sequence.slab
    count = len(sequence.per_slab)
    specs = Specs(sequence, lambda i, j: i, lambda i, j: j)
    out_shape = [
        jax.ShapeDtypeStruct((group, f, n, width // 3), patches.dtype),
        None if cls is None else jax.ShapeDtypeStruct((group, 1, width // 3), patches.dtype),
        jax.ShapeDtypeStruct((group, sequence.slabs, q.total, count, lanes), jnp.float32),
    ]
    return tpu_blocks.call(
        functools.partial(_forward_kernel, sequence),
        "joint_attention_forward",
        sequence,
        grid=(group, sequence.slabs, q.total, k.total),
        inputs=[*(patches,) * 3, *(cls,) * 3],
        in_specs=[*specs.patches(), *specs.tokens()],
        outputs=out_shape,
        out_specs=[specs.of_queries(0), specs.token(0), specs.log_sums()],
        scratch=[
            pltpu.VMEM((lanes, slab), patches.dtype),
            pltpu.VMEM((rows, slab), patches.dtype),
            pltpu.VMEM((rows, slab), patches.dtype),
            pltpu.VMEM((slab, lanes), jnp.float32),
            pltpu.VMEM((count, lanes), jnp.float32),
            pltpu.VMEM((count, lanes), jnp.float32),
        ],
        products=2,
        interpret=interpret,
    )


def _forward_kernel(
    sequence, q_ref, k_ref, v_ref, cls_q, cls_k, cls_v, out, cls_out, log_sums,
    q, k, v, result, top, total,
) -> None:  # fmt: skip
    """Takes one block of keys for one block of queries; writes the result after the last keys.

    Refs of a block: q_ref, k_ref, v_ref and out (frames, rows, slab); cls_q, cls_k, cls_v and
    cls_out (1, slab) or None; log_sums (heads, queries).
    Refs of VMEM: q (queries, slab); k, v (keys, slab); result (slab, queries), top and total
    (heads, queries) float32, the O^T, m and l of above.
    """
    q_block, k_block = sequence.blocks
    iq, ik = pl.program_id(2), pl.program_id(3)
    scale = sequence.d**-0.5 * LOG2_E

    @pl.when(ik == 0)
    def _() -> None:
        tpu_blocks.pack(q_block, iq, q_ref, cls_q, q)
        result[...] = jnp.zeros(result.shape, jnp.float32)
        top[...] = jnp.full(top.shape, MASKED, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)

    tpu_blocks.pack(k_block, ik, k_ref, cls_k, k)
    tpu_blocks.pack(k_block, ik, v_ref, cls_v, v)
    keys, v_t = k[...], v[...].T

    def logits(item: tuple[Head, slice]) -> Logits:
        head, queries = item
        return head.logits(keys, q[queries, :])

    def weights(item: tuple[Head, slice], s: Logits) -> tuple[Logits, Float[Array, "1 q"]]:
        head, queries = item
        at = pl.ds(head.number, 1), queries
        s, before = tpu_blocks.mask(k_block, ik, s), top[at]
        after = jnp.maximum(before, s.max(0, keepdims=True) * scale)
        p, shrink = jnp.exp2(s * scale - after), jnp.exp2(before - after)
        top[at] = after
        total[at] = total[at] * shrink + p.sum(0, keepdims=True)
        return p.astype(sequence.dtype), shrink

    def values(item: tuple[Head, slice], weights: tuple[Logits, Float[Array, "1 q"]]) -> None:
        head, queries = item
        p, shrink = weights
        at = head.channels, queries
        result[at] = result[at] * shrink + dot(v_t[head.channels], p, NN)

    tpu_heads.pipeline(sequence.items(), logits, weights, values, lead=2)

    @pl.when(ik == k_block.total - 1)
    def _() -> None:
        log_sums[...] = top[...] + jnp.log2(total[...])
        x = tpu_heads.stack(
            result[head.channels, :] / total[pl.ds(head.number, 1), :] for head in sequence.per_slab
        ).T
        for frame in range(q_block.frames):
            rows = x[frame * q_block.rows : (frame + 1) * q_block.rows]
            out[frame] = rows.astype(out.dtype)
        _write_token(q_block, iq, x, cls_out)


def _run_backward(
    sequence: Sequence, inputs: tuple, before: Any, wants_q: bool, wants_k: bool, interpret: Any
) -> tuple:
    """The gradient of the projection, or of its queries, or of its keys and values.

    Args:
      inputs: patches, cls, the gradients of the results, the results, the log-sums, with the shapes
        of `_run_forward`.
      before: the gradient so far, which is completed; None to make a new one.

    Returns:
      The gradient of patches, and those of the token's query, key and value.
    """
    patches, cls, g, cls_g, out, cls_out, log_sums = inputs
    q, k = sequence.blocks
    lanes, rows, slab = sequence.query_lanes(q), sequence.key_rows(k), sequence.slab
    # Whose gradient is complete after the inner loop stays in the outer one.
    if wants_k:
        loops, specs = (k.total, q.total), Specs(sequence, lambda i, j: j, lambda i, j: i)
    else:
        loops, specs = (q.total, k.total), Specs(sequence, lambda i, j: i, lambda i, j: j)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    token = None if cls is None else jax.ShapeDtypeStruct(cls_g.shape, cls_g.dtype)
    dtype = patches.dtype
    d_patches, *d_cls = tpu_blocks.call(
        functools.partial(_backward_kernel, sequence, wants_q, wants_k),
        "joint_attention_backward",
        sequence,
        grid=(len(patches), sequence.slabs, *loops),
        inputs=[*(patches,) * 3, *(cls,) * 3, g, cls_g, out, cls_out, log_sums, before],
        in_specs=[
            *specs.patches(), *specs.tokens(), specs.of_queries(0), specs.token(0),
            specs.of_queries(0), specs.token(0), specs.log_sums(), anywhere,
        ],
        outputs=[jax.ShapeDtypeStruct(patches.shape, dtype), *(token,) * 3],
        out_specs=[anywhere, *(specs.token(0),) * 3],
        scratch=[
            *(pltpu.VMEM((lanes, slab), dtype) for _ in range(3)),
            *(pltpu.VMEM((rows, slab), dtype) for _ in range(2)),
            pltpu.VMEM((q.total if wants_q and wants_k else 1, slab, lanes), jnp.float32),
            *(pltpu.VMEM((slab, rows), jnp.float32) for _ in range(2)),
            pltpu.VMEM((q.frames, q.rows, slab), dtype),
            pltpu.VMEM((k.frames, k.rows, slab), dtype),
            pltpu.SemaphoreType.DMA,
        ],
        products=5 if wants_q and wants_k else 3 if wants_q else 4,
        interpret=interpret,
        completes=before is not None,
    )  # fmt: skip
    return d_patches, d_cls


def _backward_kernel(
    sequence, wants_q, wants_k, q_ref, k_ref, v_ref, cls_q, cls_k, cls_v, g_ref, cls_g, o_ref,
    cls_o, log_sums, _, d_patches, d_cls_q, d_cls_k, d_cls_v,
    q, g, o, k, v, d_q, d_k, d_v, written_q, written_k, semaphore,
) -> None:  # fmt: skip
    """Adds what one block of queries and one of keys give to the gradients; writes complete ones.

    Refs of a block: q_ref, k_ref, v_ref, g_ref and o_ref (frames, rows, slab); those of the token,
    cls_*, d_cls_*, (1, slab) or None; log_sums (heads, queries). d_patches is the whole gradient,
    (G, F, N, 3 * h * d) in HBM.
    Refs of VMEM: q, g, o (queries, slab); k, v (keys, slab); d_q (blocks or 1, slab, queries), d_k
    and d_v (slab, keys) float32; written_q and written_k (frames, rows, slab), copied to d_patches.
    """
    q_block, k_block = sequence.blocks
    iq, ik = (pl.program_id(axis) for axis in ((3, 2) if wants_k else (2, 3)))
    group, slab = pl.program_id(0), pl.program_id(1)
    slot = iq if wants_q and wants_k else 0
    scale = sequence.d**-0.5

    def pack_queries() -> None:
        tpu_blocks.pack(q_block, iq, q_ref, cls_q, q)
        tpu_blocks.pack(q_block, iq, g_ref, cls_g, g)
        tpu_blocks.pack(q_block, iq, o_ref, cls_o, o)

    def pack_keys() -> None:
        tpu_blocks.pack(k_block, ik, k_ref, cls_k, k)
        tpu_blocks.pack(k_block, ik, v_ref, cls_v, v)

    if wants_k:
        pl.when(iq == 0)(pack_keys)
        pack_queries()
    else:
        pl.when(ik == 0)(pack_queries)
        pack_keys()

    def add_to_q(at: tuple[slice, slice], of_block: Float[Array, "d q"]) -> None:
        d_q[slot, *at] = jnp.where(ik == 0, 0.0, d_q[slot, *at]) + of_block

    of_keys = _multiply(
        sequence, ik, (q, g, o), (k, v), log_sums, add_to_q if wants_q else None, wants_k
    )
    write = functools.partial(_write_gradient, sequence, d_patches.at[group], slab, semaphore)
    if wants_q:

        @pl.when(ik == k_block.total - 1)
        def _() -> None:
            write(q_block, iq, 0, (d_q[slot] * scale).T, written_q, d_cls_q)

    if wants_k:
        for total, x in zip((d_k, d_v), of_keys):
            total[...] = jnp.where(iq == 0, 0.0, total[...]) + x

        @pl.when(iq == q_block.total - 1)
        def _() -> None:
            write(k_block, ik, 1, (d_k[...] * scale).T, written_k, d_cls_k)
            write(k_block, ik, 2, d_v[...].T, written_k, d_cls_v)


def _multiply(
    sequence: Sequence, ik: Any, of_queries: tuple, of_keys: tuple, log_sums: Any,
    add_to_q: Callable | None, wants_k: bool,
) -> Iterator[Float[Array, "slab k"]]:  # fmt: skip
    """The products of a block of queries and block `ik` of keys.

    Args:
      of_queries: queries, the result's gradient and the result, (tokens, slab) in VMEM.
      of_keys: keys and values.
      add_to_q: takes (channels, queries), and the gradient of these queries from these keys.

    Returns:
      The gradients of keys and of values from these queries, (slab, keys). Use them only if
      `wants_k`.
    """
    q, g, o = of_queries
    scale = sequence.d**-0.5 * LOG2_E
    keys, values = (x[...] for x in of_keys)
    q_t, g_t, o_t, k_t = q[...].T, g[...].T, o[...].T, keys.T
    sums_k: dict[Head, list] = {}
    sums_v: dict[Head, list] = {}

    def logits(item: tuple[Head, slice]) -> tuple[Logits, Logits]:
        head, queries = item
        return head.logits(keys, q[queries, :]), head.logits(values, g[queries, :])

    def weights(item: tuple[Head, slice], products: tuple[Logits, Logits]) -> tuple[Logits, Logits]:
        head, queries = item
        s, d_p = products
        along = g_t[head.channels, queries].astype(jnp.float32) * o_t[head.channels, queries]
        log_sum = log_sums[pl.ds(head.number, 1), queries]
        p = jnp.exp2(tpu_blocks.mask(sequence.blocks[1], ik, s) * scale - log_sum)
        d_s = p * (d_p - along.sum(0, keepdims=True))
        return p.astype(sequence.dtype), d_s.astype(sequence.dtype)

    def gradients(item: tuple[Head, slice], weights: tuple[Logits, Logits]) -> None:
        (head, queries), (p, d_s) = item, weights
        at = head.channels, queries
        if add_to_q is not None:
            add_to_q(at, dot(k_t[head.channels], d_s, NN))
        if wants_k:
            sums_k.setdefault(head, []).append(dot(q_t[at], d_s, NT))
            sums_v.setdefault(head, []).append(dot(g_t[at], p, NT))

    tpu_heads.pipeline(sequence.items(), logits, weights, gradients)
    # One after the other, as they are asked for: both at once are more than the registers hold.
    return (
        tpu_heads.stack(functools.reduce(jnp.add, parts) for parts in of_heads.values())
        for of_heads in (sums_k, sums_v)
    )


def _write_token(block: Block, i: Any, x: Float[Array, "tokens slab"], to: Any) -> None:
    """Writes the token's row of x, which the last block has, to a ref (1, slab)."""
    if to is not None:

        @pl.when(i == block.total - 1)
        def _() -> None:
            to[...] = x[block.patches : block.tokens].astype(to.dtype)


def _write_gradient(
    sequence: Sequence, d_patches: Any, slab: Any, semaphore: Any, block: Block, i: Any, part: int,
    x: Float[Array, "tokens slab"], written: Any, d_cls: Any,
) -> None:  # fmt: skip
    """Copies the gradient of block i to its place in the gradient of the projection, in HBM.

    Args:
      d_patches: a ref (F, N, 3 * h * d) in HBM.
      part: 0, 1 or 2, for queries, keys or values.
      x: the gradient of the block.
      written: a ref (frames, rows, slab) in VMEM, from which it is copied.
      d_cls: a ref (1, slab) or None.
    """
    _write_token(block, i, x, d_cls)
    lane = pl.multiple_of((part * sequence.slabs + slab) * sequence.slab, sequence.slab)
    lanes = pl.ds(lane, sequence.slab)
    frame, of_frame = block.place(i)
    first_row = of_frame * block.rows
    if block.per_frame > 1:
        first_row = pl.multiple_of(first_row, 16)
    sizes = {block.rows, block.n % block.rows or block.rows}
    copies = []
    for number in range(block.frames):
        rows = x[number * block.rows : (number + 1) * block.rows]
        written[number] = rows.astype(written.dtype)
        at = frame * block.frames + number
        for size in sizes:
            place = d_patches.at[at, pl.ds(first_row, size), lanes]
            copy = pltpu.make_async_copy(written.at[number, pl.ds(0, size)], place, semaphore)
            exists = (at < block.f) & (jnp.minimum(block.rows, block.n - first_row) == size)
            copies.append((copy, exists))
    for copy, exists in copies:
        pl.when(exists)(copy.start)
    for copy, exists in copies:
        pl.when(exists)(copy.wait)
