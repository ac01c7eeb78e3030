"""Attention within the sequences of each frame (section 3, equation 9) for TPUs, in Pallas.

One step of the grid has a frame's projection in VMEM, as the linear layer wrote it, and writes the
result where the next one reads it. The classification tokens come as a second array: the rows of
the frame's last tile that the patches leave empty hold them, so that nothing is joined in memory.

Per head, with logits in units of log 2 so that exp2 serves:

    S = K Q^T / sqrt(d) log2 e     P = exp2(S - max) / sum     O^T = V^T P          (equations 5, 6)

The logits are transposed, keys in rows: maxima and sums over the keys are elementwise over vector
registers, where those along lanes would pass through the cross-lane unit. The result of a head is
d rows of O^T, so its product streams d rows through the unit and not 128 lanes of which half belong
to another head. Backward, from the log-sums L that forward saves:

    P = exp2(S - L)                dP = V G^T               dS = P (dP - sum over keys of P dP)
    dV^T = G^T P^T                 dQ^T = K^T dS / sqrt(d)  dK^T = Q^T dS^T / sqrt(d)

All three are products of a head's d rows. Only inputs and results are transposed, by slabs.

B clips, T frames, N patches a frame, C sequences a frame, h heads of d channels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from timesformer_jax.models.ops.kernels import tpu_blocks, tpu_heads
from timesformer_jax.models.ops.kernels.tpu_blocks import Frame
from timesformer_jax.models.ops.kernels.tpu_heads import LANES, LOG2_E, NN, NT, Head, dot

# The projections of frames, and of the tokens of their sequences; a gradient has the same shape.
# The attended values, or their gradients.
Patches = Float[Array, "b t n qkv"]
Token = Float[Array, "b t c qkv"] | None
Result = Float[Array, "b t n qkv//3"]
TokenResult = Float[Array, "b t c qkv//3"] | None
# Logits, weights and their gradients, of all keys and some queries; tokens of a slab of heads.
Logits = Float[Array, "k q"]
OfSlab = Float[Array, "tokens slab"]


def fits(n: int, c: int, heads: int, d: int, dtype: Any) -> bool:
    """Whether the memory of a core has room for frames of n patches and c tokens."""
    return Frame(n, c, heads, d, jnp.dtype(dtype)).vmem <= tpu_heads.VMEM


def is_small(n: int, c: int, heads: int, d: int, dtype: Any) -> bool:
    """Whether the logits of a slab are few enough for a step, which has them all at once.

    With more the program grows, and the time to compile it.
    """
    return Frame(n, c, heads, d, jnp.dtype(dtype)).slab_logits <= tpu_heads.STEP_LOGITS


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def attention(
    patches: Patches,
    cls: Token,
    heads: int,
    sequences: tuple[int, ...] | None = None,
    interpret: Any = False,
) -> tuple[Result, TokenResult]:
    """Attention within the sequences of every frame.

    Args:
      patches: (B, T, N, 3 * h * d).
      cls: (B, T, C, 3 * h * d), a token for each sequence; None without tokens.
      sequences: the number of each patch's sequence, N integers of 0 to C - 1; None for one.
      interpret: as `pallas_call` takes it.

    Returns:
      (B, T, N, h * d), and (B, T, C, h * d) or None.
    """
    out, cls_out, _ = _run_forward(patches, cls, heads, sequences, interpret, saves=False)
    return out, cls_out


def _forward(
    patches: Patches, cls: Token, heads: int, sequences: tuple[int, ...] | None, interpret: Any
) -> tuple:
    out, cls_out, log_sums = _run_forward(patches, cls, heads, sequences, interpret, saves=True)
    return (out, cls_out), (patches, cls, log_sums)


def _backward(
    heads: int, sequences: tuple[int, ...] | None, interpret: Any, saved: tuple, gradients: tuple
) -> tuple[Patches, Token]:
    patches, cls, log_sums = saved
    frame = Frame.of(patches, cls, heads)
    inputs = [patches, cls, *gradients, log_sums, *tpu_blocks.sequence_numbers(frame, sequences)]
    outputs = [_like(patches), cls if cls is None else _like(cls)]
    return _call(_backward_kernel, frame, inputs, outputs, products=5, interpret=interpret)


attention.defvjp(_forward, _backward)


def _run_forward(
    patches: Patches, cls: Token, heads: int, sequences: tuple[int, ...] | None, interpret: Any,
    saves: bool,
) -> tuple:  # fmt: skip
    """The results (B, T, N, h * d) and (B, T, C, h * d) or None, and the log-sums of the queries.

    With `saves` the log-sums are (B, T, 1, h * queries) float32, else None.
    """
    b, t, n, _ = patches.shape
    frame = Frame.of(patches, cls, heads)
    outputs = [
        _like(patches, (b, t, n, frame.width)),
        None if cls is None else _like(cls, (b, t, frame.c, frame.width)),
        jax.ShapeDtypeStruct((b, t, 1, heads * frame.queries), jnp.float32) if saves else None,
    ]
    inputs = [patches, cls, *tpu_blocks.sequence_numbers(frame, sequences)]
    return _call(_forward_kernel, frame, inputs, outputs, products=2, interpret=interpret)


def _like(x: Float[Array, "..."], shape: tuple[int, ...] | None = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape or x.shape, x.dtype)


def _call(
    kernel: Callable, frame: Frame, inputs: list, outputs: list, products: int, interpret: Any
) -> tuple:
    """Runs a kernel on every frame. Inputs and outputs that are None stay so.

    Blocks are whole frames, of which a step reads and writes its slabs, so that they are copied
    once a frame. Arrays of two axes are the same for all.
    """
    b, t = inputs[0].shape[:2]

    def spec(x: Any) -> pl.BlockSpec:
        if len(x.shape) == 2:
            return pl.BlockSpec(x.shape, lambda i, j, k: (0, 0))
        return pl.BlockSpec((None, None, *x.shape[2:]), lambda i, j, k: (i, j, 0, 0))

    def body(*refs: Any) -> None:
        refs = iter(refs)
        given = [next(refs) if x is not None else None for x in (*inputs, *outputs)]
        kernel(frame, *given, next(refs))

    present = [x for x in inputs if x is not None]
    made = [x for x in outputs if x is not None]
    logits = b * t * frame.heads * frame.tokens**2
    results = pl.pallas_call(
        body,
        name=f"spatial_attention{kernel.__name__.removesuffix('_kernel')}",
        grid=(b, t, frame.steps),
        in_specs=[spec(x) for x in present],
        out_specs=[spec(x) for x in made],
        out_shape=made,
        scratch_shapes=[
            pltpu.VMEM((4, frame.tail or frame.tile, frame.width // frame.steps), frame.dtype)
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=tpu_heads.VMEM,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * logits * frame.d,
            transcendentals=logits,
            bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in present + made),
        ),
        interpret=interpret,
    )(*present)
    results = iter(results)
    return tuple(next(results) if x is not None else None for x in outputs)


def _forward_kernel(
    frame, patches, cls, key_number, query_number, out, cls_out, log_sums, tails
) -> None:
    """Writes the results of some slabs of a frame.

    Refs: patches (N, 3 * h * d), cls (C, 3 * h * d), out (N, h * d), cls_out (C, h * d); log_sums
    (1, h * queries) float32; tails (4, rows after the whole tiles, width of a step) of VMEM;
    key_number (keys, 1) and query_number (1, queries) int32. Those that are not needed are None.
    """
    mask = tpu_blocks.FrameMask(frame, key_number, query_number)
    scale = frame.d**-0.5 * LOG2_E
    for part in range(3):
        _fill_tail(frame, patches, cls, part, tails.at[part])
    results = {}

    def logits(item: _Item) -> Logits:
        if item.is_first:
            slab = item.slab
            slab.q, slab.k, v = _read(frame, patches, tails, slab)
            slab.v_t = v.T
        slab = item.slab
        return item.head.logits(slab.k, slab.q[item.queries])

    def weights(item: _Item, s: Logits) -> tuple[Logits, Float[Array, "1 q"]]:
        s = mask(s, item.queries)
        top = s.max(0, keepdims=True) * scale
        p = jnp.exp2(s * scale - top)
        total = p.sum(0, keepdims=True)
        if log_sums is not None:
            log_sums[:, item.statistics] = top + jnp.log2(total)
        return p.astype(frame.dtype), total

    def values(item: _Item, weights: tuple[Logits, Float[Array, "1 q"]]) -> None:
        p, total = weights
        results[item.key] = dot(item.slab.v_t[item.head.channels], p, NN) / total
        if item.is_last:
            result = _by_tokens(frame, item.slab, results)
            _write(frame, out, cls_out, item.slab.lanes(frame, 0), result)

    tpu_heads.pipeline(_items(frame), logits, weights, values, lead=2)


def _backward_kernel(
    frame, patches, cls, g, cls_g, log_sums, key_number, query_number, d_patches, d_cls, tails
) -> None:
    """Writes the gradients of some slabs of a frame.

    Refs as in `_forward_kernel`; g (N, h * d) and cls_g (C, h * d) are the gradients of its
    results, d_patches (N, 3 * h * d) and d_cls (C, 3 * h * d) those of its inputs.
    """
    mask = tpu_blocks.FrameMask(frame, key_number, query_number)
    scale = frame.d**-0.5
    for part in range(3):
        _fill_tail(frame, patches, cls, part, tails.at[part])
    _fill_tail(frame, g, cls_g, 0, tails.at[3])
    d_q, d_k, d_v = {}, {}, {}

    def logits(item: _Item) -> tuple[Logits, Logits]:
        slab = item.slab
        if item.is_first:
            slab.q, slab.k, slab.v = _read(frame, patches, tails, slab)
            slab.g = _tokens(frame, g, tails.at[3], slab, 0, frame.queries)
            slab.q_t, slab.k_t, slab.g_t = slab.q.T, slab.k.T, slab.g.T
        s = item.head.logits(slab.k, slab.q[item.queries])
        return s, item.head.logits(slab.v, slab.g[item.queries])

    def weights(item: _Item, products: tuple[Logits, Logits]) -> tuple[Logits, Logits]:
        s, d_p = products
        p = jnp.exp2(mask(s, item.queries) * (scale * LOG2_E) - log_sums[:, item.statistics])
        d_s = p * (d_p - (p * d_p).sum(0, keepdims=True))
        return p.astype(frame.dtype), d_s.astype(frame.dtype)

    def gradients(item: _Item, weights: tuple[Logits, Logits]) -> None:
        p, d_s = weights
        slab, at = item.slab, (item.head.channels, item.queries)
        d_q[item.key] = dot(slab.k_t[item.head.channels], d_s, NN)
        d_k[item.key] = dot(slab.q_t[at], d_s, NT)
        d_v[item.key] = dot(slab.g_t[at], p, NT)
        if item.is_last:
            for part, (x, factor) in enumerate(((d_q, scale), (d_k, scale), (d_v, 1.0))):
                result = _by_tokens(frame, slab, x, sums=part > 0) * factor
                _write(frame, d_patches, d_cls, slab.lanes(frame, part), result)

    tpu_heads.pipeline(_items(frame), logits, weights, gradients)


class _Slab:
    """A slab of the step: its number among them, and what is read of it.

    Attributes:
      q, k, v, g: queries, keys, values and the result's gradient, (tokens, slab).
      q_t, k_t, v_t, g_t: the same, (slab, tokens).
    """

    q: OfSlab
    k: OfSlab
    v: OfSlab
    g: OfSlab
    q_t: Float[Array, "slab tokens"]
    k_t: Float[Array, "slab tokens"]
    v_t: Float[Array, "slab tokens"]
    g_t: Float[Array, "slab tokens"]

    def __init__(self, number: int):
        self.number = number

    def lanes(self, frame: Frame, part: int) -> Any:
        """Where it lies among the parts q, k, v of the projection, or in the result as part 0."""
        start = (part * frame.slabs + self.among_all(frame)) * frame.slab
        return pl.ds(tpu_heads.multiple(start, frame.slab), frame.slab)

    def among_all(self, frame: Frame) -> Any:
        """Its number among the slabs of the frame."""
        if frame.steps == 1:
            return self.number
        return pl.program_id(2) * frame.slabs_per_step + self.number


class _Item(NamedTuple):
    """The work on one head of a slab and one chunk of queries, for all keys."""

    frame: Frame
    slab: _Slab
    head: Head
    queries: slice

    @property
    def key(self) -> tuple[int, int, int]:
        return self.slab.number, self.head.number, self.queries.start

    @property
    def statistics(self) -> Any:
        """Where its numbers lie in an array of one for each head and query."""
        heads = len(tpu_heads.slab_heads(self.frame.d))
        head = self.slab.among_all(self.frame) * heads + self.head.number
        start = head * self.frame.queries + self.queries.start
        return pl.ds(tpu_heads.multiple(start, LANES), self.queries.stop - self.queries.start)

    @property
    def is_first(self) -> bool:
        """Of its slab."""
        return self.head.number == self.queries.start == 0

    @property
    def is_last(self) -> bool:
        end = self.head.channels.stop, self.queries.stop
        return end == (self.frame.slab, self.frame.queries)


def _items(frame: Frame) -> list[_Item]:
    return [
        _Item(frame, slab, head, queries)
        for slab in map(_Slab, range(frame.slabs_per_step))
        for queries in tpu_heads.chunks(frame.queries)
        for head in tpu_heads.slab_heads(frame.d)
    ]


def _read(frame: Frame, patches: Any, tails: Any, slab: _Slab) -> list[OfSlab]:
    """Queries (queries, slab), keys and values (keys, slab)."""
    rows = (frame.queries, 0, 0)
    return [_tokens(frame, patches, tails.at[i], slab, i, rows[i]) for i in range(3)]


def _tokens(frame: Frame, patches: Any, tail: Any, slab: _Slab, part: int, rows: int = 0) -> OfSlab:
    """The lanes of a slab for all tokens, (keys or `rows`, slab), with zeros in rows of no token.

    Rows beyond an array's own are undefined in memory, so that whole tiles are read where they lie
    and the last rows from `tails`.
    """
    pieces = []
    if frame.whole:
        pieces.append(patches[: frame.whole, slab.lanes(frame, part)])
    if frame.tail:
        start = slab.number * frame.slab
        pieces.append(tail[:, start : start + frame.slab])
    if rows > frame.keys:
        pieces.append(jnp.zeros((rows - frame.keys, frame.slab), frame.dtype))
    return tpu_heads.stack(pieces)


def _fill_tail(frame: Frame, patches: Any, cls: Any, part: int, tail: Any) -> None:
    """Writes the last patches and the tokens of this step's slabs, and zeros after them."""
    if not frame.tail:
        return
    size = frame.slabs_per_step * frame.slab
    start = part * frame.width + (0 if frame.steps == 1 else pl.program_id(2) * size)
    lanes = pl.ds(tpu_heads.multiple(start, LANES), size)
    rest = frame.n - frame.whole
    tail[...] = jnp.zeros(tail.shape, frame.dtype)
    if rest:
        tail[:rest, :] = patches[frame.whole :, lanes]
    if frame.c:
        tail[rest : rest + frame.c, :] = cls[:, lanes]


def _by_tokens(frame: Frame, slab: _Slab, results: dict, sums: bool = False) -> OfSlab:
    """The results of a slab's items, (d, tokens), as (tokens, slab), with sums over chunks or not.

    Args:
      sums: whether each item has a summand of all tokens, and not the result of its queries.
    """
    parts = [
        [
            results.pop((slab.number, head.number, at.start))
            for head in tpu_heads.slab_heads(frame.d)
        ]
        for at in tpu_heads.chunks(frame.queries)
    ]
    if sums:
        parts = [[functools.reduce(jnp.add, of_head) for of_head in zip(*parts)]]
    return tpu_heads.stack(tpu_heads.stack(of_heads).T for of_heads in parts)


def _write(frame: Frame, patches: Any, cls: Any, lanes: Any, x: OfSlab) -> None:
    """Writes the rows of patches and tokens to `lanes` of refs (N, channels) and (C, channels)."""
    patches[:, lanes] = x[: frame.n].astype(frame.dtype)
    if frame.c:
        cls[:, lanes] = x[frame.n : frame.tokens].astype(frame.dtype)
