"""Attention of long sequences in memory that is linear in their length, on any device.

`dot_product_attention` holds the weights of all pairs of tokens. Here queries and keys come in
blocks with a running softmax (arXiv 2205.14135, 2112.05682), and a few sequences at a time. The
backward pass is written out: it computes the weights again, from the queries, the keys and the
logarithms of the sums, which are all that is saved beside the result.

Shapes: A x S sequences of L tokens, h heads of d channels. Within a group of sequences: R rows
(sequences times heads), blocks of W tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from timesformer_jax.models.ops.dot_product_attention import LEAST

# Tokens of a block, and logits that are computed at a time: on a CPU they should stay in its
# caches, on other devices the products should be large.
BLOCK = 512
LOGITS = {"cpu": 2**22}
LOGITS_ELSEWHERE = 2**26

QKV = Float[Array, "a l s 3 h d"]
Result = Float[Array, "a l s hd"]
# A group of sequences, (A', L, S', ...) of (A, L, S, ...). In blocks: (blocks, R, W, d), of which
# one is (R, W, d), and a number for each token.
OfAll = Float[Array, "a l s *x"]
OfGroup = Float[Array, "ga l gs *x"]
InBlocks = Float[Array, "blocks r w d"]
Rows = Float[Array, "r w d"]
Statistics = Float[Array, "blocks r w"]
# The tokens that are attended to; None: all.
Valid = Bool[Array, "a l"] | None
ValidInBlocks = Bool[Array, "blocks r w"] | None


# Where the short form is used. On a CPU the blocks take as long as it with 256 tokens, and less
# with more. On other devices they have not been measured: there they are for clips whose logits
# take much memory (0.5 GB, float32).
SHORT = 256  # tokens
FEW = {"cpu": 0}
FEW_ELSEWHERE = 2**27  # logits of a clip


def is_long(length: int, rows: int, platform: str) -> bool:
    """Whether sequences of `length` tokens should be computed by blocks.

    Args:
      rows: sequences of a clip times heads.
      platform: of the device, "cpu", "gpu" or "tpu".
    """
    return length > SHORT and rows * length**2 > FEW.get(platform, FEW_ELSEWHERE)


class Plan(NamedTuple):
    """How the sequences are cut.

    Attributes:
      group: sequences at a time along A and along S; they divide A and S.
      block: tokens of a block, W.
      blocks: their number.
    """

    group: tuple[int, int]
    block: int
    blocks: int


def plan(shape: tuple[int, ...], platform: str) -> Plan:
    """The plan for qkv (A, L, S, 3, h, d) on "cpu", "gpu" or "tpu"."""
    a, length, s, _, heads, _ = shape
    blocks = math.ceil(length / BLOCK)
    block = 8 * math.ceil(length / blocks / 8)
    most = max(1, LOGITS.get(platform, LOGITS_ELSEWHERE) // (heads * block**2))
    along_s = _largest_divisor(s, most)
    return Plan((_largest_divisor(a, most // s) if along_s == s else 1, along_s), block, blocks)


def _largest_divisor(number: int, most: int) -> int:
    return next(n for n in range(max(1, min(number, most)), 0, -1) if number % n == 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(cut: Plan, qkv: QKV, valid: Valid = None) -> Result:
    return _forward(cut, qkv, valid)[0]


def _forward(cut: Plan, qkv: QKV, valid: Valid = None) -> tuple:
    """The result and, for the backward pass, qkv, valid, result and log-sums (A, S, h, L)."""
    a, length, s, _, heads, d = qkv.shape
    out = jnp.zeros((a, length, s, heads * d), qkv.dtype)
    logs = jnp.zeros((a, s, heads, length), _wide(qkv))

    def group(i: Any, j: Any, results: tuple) -> tuple:
        q, k, v = _blocks(cut, _slice(cut, qkv, i, j))
        o, log = _forward_group(cut, length, q, k, v, _valid_keys(cut, valid, heads, i))
        o = _unblocked(cut, o, length).astype(qkv.dtype)
        log = jnp.moveaxis(log, 0, -2).reshape(*cut.group, heads, -1)[..., :length]
        return _put(cut, results[0], o, i, j), _put_logs(cut, results[1], log, i, j)

    out, logs = _each_group(cut, (a, s), group, (out, logs))
    return out, (qkv, valid, out, logs)


def _backward(cut: Plan, saved: tuple, g: Result) -> tuple[QKV, None]:
    qkv, valid, out, logs = saved
    a, length, s, _, heads, d = qkv.shape
    # The weights of the queries that fill up the last block are zero: exp(0 - infinity).
    fill = ((0, 0),) * 3 + ((0, cut.blocks * cut.block - length),)

    def group(i: Any, j: Any, qkv_bar: QKV) -> QKV:
        q, k, v = _blocks(cut, _slice(cut, qkv, i, j))
        o, do = (
            _blocks(cut, _slice(cut, x, i, j).reshape(*_group_shape(cut, length), 1, heads, d))[0]
            for x in (out, g)
        )
        log = jax.lax.dynamic_slice(logs, (i, j, 0, 0), (*cut.group, heads, length))
        log = jnp.pad(log, fill, constant_values=jnp.inf)
        log = jnp.moveaxis(log.reshape(-1, cut.blocks, cut.block), 1, 0)
        along = (o.astype(log.dtype) * do).sum(-1)
        keys = _valid_keys(cut, valid, heads, i)
        bars = _backward_group(cut, length, q, k, v, do, log, along, keys)
        bars = [_unblocked(cut, x, length).astype(qkv.dtype) for x in bars]
        bars = [x.reshape(*x.shape[:-1], 1, heads, d) for x in bars]
        return _put(cut, qkv_bar, jnp.concatenate(bars, axis=3), i, j)

    return _each_group(cut, (a, s), group, jnp.zeros_like(qkv)), None


_attention.defvjp(_forward, _backward)


def attention(qkv: QKV, platform: str, valid: Valid = None) -> Result:
    """softmax(q k^T / sqrt(d)) v along L, for every sequence and head (equations 5 to 7).

    Args:
      qkv: (A, L, S, 3, h, d), queries, keys and values.
      platform: of the device that computes it: "cpu", "gpu" or "tpu".
      valid: (A, L), the tokens that are attended to; None: all.

    Returns:
      (A, L, S, h * d) of the dtype of qkv. Logits, softmax and sums are float32 at least.
    """
    return _attention(plan(qkv.shape, platform), qkv, valid)


def _wide(x: Any) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)


# ---- One group: q, k, v and the like are (blocks, R, W, d) -------------------------------------


def _logits(
    cut: Plan, length: int, q: Rows, k: Rows, key_block: Any, valid: Bool[Array, "r w"] | None
) -> Float[Array, "r q k"]:
    """The logits of two blocks: -inf for keys that fill up the block, `LEAST` for invalid ones."""
    s = _product("rqd,rkd->rqk", q, k) * q.shape[-1] ** -0.5
    if valid is not None:
        return jnp.where(valid[:, None], s, LEAST)
    if cut.block * cut.blocks == length:
        return s
    there = key_block * cut.block + jnp.arange(cut.block) < length
    return jnp.where(there, s, -jnp.inf)


def _product(
    equation: str, x: Float[Array, "r _ _"], y: Float[Array, "r _ _"]
) -> Float[Array, "r _ _"]:
    return jnp.einsum(equation, x, y, preferred_element_type=_wide(x))


def _forward_group(
    cut: Plan, length: int, q: InBlocks, k: InBlocks, v: InBlocks, valid: ValidInBlocks
) -> tuple[InBlocks, Statistics]:
    """The result, and the logarithms of the sums of exponentials."""
    wide, rows, d = _wide(q), q.shape[1], q.shape[-1]

    def queries(q: Rows) -> tuple[Rows, Float[Array, "r w"]]:
        def keys(state: tuple, block: tuple) -> tuple[tuple, None]:
            largest, total, out = state
            k, v, number, valid = block
            s = _logits(cut, length, q, k, number, valid)
            new = jnp.maximum(largest, s.max(-1))
            weights = jnp.exp(s - new[..., None])
            kept = jnp.exp(largest - new)
            total = total * kept + weights.sum(-1)
            out = out * kept[..., None] + _product("rqk,rkd->rqd", weights.astype(v.dtype), v)
            return (new, total, out), None

        start = (
            jnp.full((rows, cut.block), -jnp.inf, wide),
            jnp.zeros((rows, cut.block), wide),
            jnp.zeros((rows, cut.block, d), wide),
        )
        (largest, total, out), _ = jax.lax.scan(keys, start, (k, v, jnp.arange(cut.blocks), valid))
        return out / total[..., None], largest + jnp.log(total)

    return jax.lax.map(queries, q)


def _backward_group(
    cut: Plan, length: int, q: InBlocks, k: InBlocks, v: InBlocks, do: InBlocks,
    log: Statistics, along: Statistics, valid: ValidInBlocks,
) -> tuple[InBlocks, InBlocks, InBlocks]:  # fmt: skip
    """The gradients of q, k and v.

    With P the weights, g the gradient of the result and D the sum over channels of g times the
    result (`along`): the gradient of the logits is P * (g v^T - D).
    """
    wide, scale = _wide(q), q.shape[-1] ** -0.5

    def keys(q_bar: InBlocks, block: tuple) -> tuple[InBlocks, tuple[Rows, Rows]]:
        k, v, number, valid = block

        def queries(sums: tuple[Rows, Rows], block: tuple) -> tuple[tuple[Rows, Rows], Rows]:
            k_bar, v_bar = sums
            q, do, log, along, q_bar = block
            weights = jnp.exp(_logits(cut, length, q, k, number, valid) - log[..., None])
            bar = weights * (_product("rqd,rkd->rqk", do, v) - along[..., None])
            bar = (bar * scale).astype(q.dtype)
            k_bar += _product("rqk,rqd->rkd", bar, q)
            v_bar += _product("rqk,rqd->rkd", weights.astype(v.dtype), do)
            return (k_bar, v_bar), q_bar + _product("rqk,rkd->rqd", bar, k)

        zeros = jnp.zeros(k.shape, wide)
        sums, q_bar = jax.lax.scan(queries, (zeros, zeros), (q, do, log, along, q_bar))
        return q_bar, sums

    blocks = k, v, jnp.arange(cut.blocks), valid
    q_bar, (k_bar, v_bar) = jax.lax.scan(keys, jnp.zeros(q.shape, wide), blocks)
    return q_bar, k_bar, v_bar


# ---- Groups of sequences, and their blocks -----------------------------------------------------


def _each_group(cut: Plan, sizes: tuple[int, int], run: Callable, results: Any) -> Any:
    """`run(i, j, results)` for the first sequence (i, j) of every group."""
    rows, columns = (size // group for size, group in zip(sizes, cut.group))

    def step(n: Any, results: Any) -> Any:
        return run(n // columns * cut.group[0], n % columns * cut.group[1], results)

    return jax.lax.fori_loop(0, rows * columns, step, results)


def _group_shape(cut: Plan, length: int) -> tuple[int, int, int]:
    return cut.group[0], length, cut.group[1]


def _slice(cut: Plan, x: OfAll, i: Any, j: Any) -> OfGroup:
    """The group whose first sequence is (i, j)."""
    rest = x.shape[3:]
    start = (i, 0, j, *(0 for _ in rest))
    return jax.lax.dynamic_slice(x, start, (*_group_shape(cut, x.shape[1]), *rest))


def _put(cut: Plan, x: OfAll, group: OfGroup, i: Any, j: Any) -> OfAll:
    return jax.lax.dynamic_update_slice(x, group, (i, 0, j, *(0 for _ in x.shape[3:])))


def _put_logs(
    cut: Plan, logs: Float[Array, "a s h l"], group: Float[Array, "ga gs h l"], i: Any, j: Any
) -> Float[Array, "a s h l"]:
    return jax.lax.dynamic_update_slice(logs, group, (i, j, 0, 0))


def _valid_keys(cut: Plan, valid: Valid, heads: int, i: Any) -> ValidInBlocks:
    """The valid keys of the group whose first sequence is (i, any)."""
    if valid is None:
        return None
    keys = jax.lax.dynamic_slice_in_dim(valid, i, cut.group[0])
    keys = jnp.pad(keys, ((0, 0), (0, cut.blocks * cut.block - keys.shape[1])))
    keys = jnp.repeat(keys, cut.group[1] * heads, axis=0)
    return jnp.moveaxis(keys.reshape(len(keys), cut.blocks, cut.block), 1, 0)


def _blocks(cut: Plan, group: Float[Array, "ga l gs parts h d"]) -> tuple[InBlocks, ...]:
    """The blocks of each part, such as q, k and v; zeros fill up the last block."""
    parts, d = group.shape[3], group.shape[-1]
    x = group.transpose(3, 0, 2, 4, 1, 5).reshape(parts, -1, group.shape[1], d)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, cut.blocks * cut.block - x.shape[2]), (0, 0)))
    x = x.reshape(parts, -1, cut.blocks, cut.block, d)
    return tuple(part.swapaxes(0, 1) for part in x)


def _unblocked(cut: Plan, x: InBlocks, length: int) -> Float[Array, "ga {length} gs hd"]:
    """Undoes `_blocks`, with the heads side by side."""
    x = x.swapaxes(0, 1).reshape(*cut.group, -1, cut.blocks * cut.block, x.shape[-1])
    x = x[..., :length, :].transpose(0, 3, 1, 2, 4)
    return x.reshape(*x.shape[:3], -1)
