"""Which implementation of attention a program gets: the one that was measured to be the fastest.

`measured.json` holds what was timed, by kind of device. Where it has nothing of a device, a dtype
and a size, the answer is "xla", the formulation of `models.attention`, and a line says so if there
is a kernel that could be faster. The choice is made while the program is traced, for the devices
that it is for, not those of the machine that compiles it.

    name = choose("temporal", qkv.shape, qkv.dtype)
    out = through_time(qkv) if name == "xla" else temporal(qkv, name)
"""

from __future__ import annotations

import functools
import json
import pathlib
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import PartitionSpec as P

from timesformer_jax.distributed.sharding import (
    axis_size,
    is_on_mesh,
    spec,
    target_device,
    without_uneven_axes,
)
from timesformer_jax.models.ops.kernels import cudnn as fused
from timesformer_jax.models.ops.kernels import hopper as tiles
from timesformer_jax.models.ops.reference import use_references

TABLE = pathlib.Path(__file__).with_name("measured.json")
TOLERANCE = 0.02  # of the largest value: what bfloat16 leaves of a gradient, and no error does
_HOPPER = re.compile(r"\bG?H(20|100|200|800)\b")


def _through_time(qkv: jax.Array) -> jax.Array:
    """cuDNN on temporal sequences, which are laid anew for it: b t n ... -> b n t ... and back."""
    return jnp.swapaxes(fused.attention(jnp.swapaxes(qkv, 1, 2)), 1, 2)


def _through_time_unsupported(shape: tuple[int, ...], dtype: Any) -> str | None:
    b, t, n, *rest = shape
    return fused.unsupported((b, n, t, *rest), dtype)


# Of temporal and spatial attention, by name: the function, and what says why it cannot be had.
# pallas_2 is `temporal` with two heads together.
KERNELS: dict[str, dict[str, tuple[Any, Callable]]] = {
    "temporal": {
        "pallas": (tiles.attention, tiles.unsupported),
        "cudnn": (_through_time, _through_time_unsupported),
    }
    | {
        f"pallas_{together}": (
            functools.partial(tiles.attention, together=together),
            functools.partial(tiles.unsupported, together=together),
        )
        for together in (2, 3)
    },
    "spatial": {"cudnn": (fused.attention, fused.unsupported)},
}


def attention(kind: str, qkv: jax.Array, xla: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Temporal or spatial attention by the implementation that `choose` gives.

    Args:
      kind: "temporal" or "spatial".
      qkv: (B, T, N, 3, h, d), or (B, S, length, 3, h, d).
      xla: the implementation for every device.
    """
    name = "xla" if use_references.value else choose(kind, qkv.shape, qkv.dtype)
    return xla(qkv) if name == "xla" else _per_device(kind, qkv, name)


def temporal(qkv: jax.Array, implementation: str) -> jax.Array:
    """Temporal attention of (B, T, N, 3, h, d) by a name that `choose` gave: (B, T, N, h * d)."""
    return _per_device("temporal", qkv, implementation)


def spatial(qkv: jax.Array, implementation: str) -> jax.Array:
    """Spatial attention of (B, S, length, 3, h, d), likewise: (B, S, length, h * d)."""
    return _per_device("spatial", qkv, implementation)


def _per_device(kind: str, qkv: jax.Array, implementation: str) -> jax.Array:
    attention, _ = KERNELS[kind][implementation]
    if not is_on_mesh():
        return attention(qkv)
    # To the partitioner a kernel is opaque: it would gather the whole batch on every device.
    inputs = _layout(kind, qkv.shape)
    outputs = P(*inputs[:3], inputs[4])
    return jax.shard_map(attention, in_specs=inputs, out_specs=outputs, check_vma=False)(qkv)


def _layout(kind: str, shape: tuple[int, ...]) -> P:
    """How qkv lies on the mesh that is set; an axis that it does not divide is not split."""
    lies = spec(f"activations/{'positions' if kind == 'temporal' else 'frames'}", 4)
    axes = P(*lies[:3], None, "tensor", None)
    return without_uneven_axes(axes, shape, jax.sharding.get_abstract_mesh())


def choose(kind: str, shape: tuple[int, ...], dtype: Any, table: pathlib.Path = TABLE) -> str:
    """The implementation for a program that is being traced: "xla" unless another was measured.

    Args:
      kind: "temporal" or "spatial".
      shape: of qkv on all devices together, (B, T, N, 3, h, d) or (B, S, length, 3, h, d).
    """
    row = _row(kind, _local(kind, shape), dtype)
    known = [each for each in json.loads(table.read_text()) if _key(each) == _key(row)]
    able = {name for name in KERNELS[kind] if not unsupported(kind, shape, dtype, name)}
    if able and not known:
        _tell_unmeasured(*_key(row))
    able.add("xla")
    timed = [row for row in known if "seconds" in row and row["implementation"] in able]
    fastest = min(timed, key=lambda row: row["seconds"]["gradient"], default=None)
    return fastest["implementation"] if fastest else "xla"


@functools.cache  # a program asks once a layer
def _tell_unmeasured(kind: str, device: str, dtype: str, length: int, *_: int) -> None:
    logging.warning(
        "no %s attention of %d tokens in %s was measured on %s, so XLA's is used; `timesformer "
        "benchmark attention --choose` with your frames, size and scheme finds the fastest",
        kind, length, dtype, device,
    )  # fmt: skip


def unsupported(kind: str, shape: tuple[int, ...], dtype: Any, implementation: str) -> str | None:
    """Why an implementation cannot run in the program that is being traced; None if it can."""
    if implementation == "xla":
        return None
    kind_of_device = target_device().device_kind
    if not _HOPPER.search(kind_of_device):
        return f"it is for an H100 or H200, and the program for {kind_of_device!r}; use 'xla'"
    return KERNELS[kind][implementation][1](_local(kind, shape), dtype)


def _local(kind: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of qkv on one device of the mesh that is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(size // axis_size(axis, mesh) for axis, size in zip(_layout(kind, shape), shape))


def _row(kind: str, shape: tuple[int, ...], dtype: Any) -> dict[str, Any]:
    """What is known of a case before it is timed; the shape is of one device."""
    length = shape[1] if kind == "temporal" else shape[2]
    cudnn = fused.cudnn_version()
    return {
        "kind": kind,
        "device": target_device().device_kind,
        "dtype": jnp.dtype(dtype).name,
        "length": length,
        "heads": shape[-2],
        "channels": shape[-1],
        "sequences": shape[0] * shape[1] * shape[2] // length,
        "jax": jax.__version__,
        "cudnn": cudnn and ".".join(map(str, cudnn)),
    }


def _key(row: dict[str, Any]) -> tuple:
    """What rows must share to be about the same attention. The number of sequences is not in it."""
    return tuple(row[name] for name in ("kind", "device", "dtype", "length", "heads", "channels"))


def measure(
    kind: str,
    shape: tuple[int, ...],
    dtype: Any,
    xla: Callable[[jax.Array], jax.Array],
    seconds: Callable[[Callable, jax.Array], float],
) -> list[dict[str, Any]]:
    """Times every implementation on the default device: a row each, JSON throughout.

    A row that has "error" instead of "seconds" could not run, or gave other numbers than `xla`,
    which are computed a head at a time: the logits of all heads need not fit the device.

    Args:
      shape: of qkv, on this one device.
      xla: the formulation that it would replace, of qkv as `temporal` or `spatial` takes it.
      seconds: times a compiled function of qkv.
    """
    qkv = jax.random.normal(jax.random.key(0), shape, dtype)
    attentions = {"xla": xla} | {name: f for name, (f, _) in KERNELS[kind].items()}
    rows, reference = [], None
    for name, attention in attentions.items():
        row = _row(kind, shape, dtype) | {"implementation": name}
        reason = unsupported(kind, shape, dtype, name)
        functions = jax.jit(attention), jax.jit(jax.grad(_loss(attention)))
        try:
            if name == "xla":
                reference = _numbers_by_head(functions, qkv)
            elif reason is None and reference is None:
                reason = "xla has no values to compare it with"
            elif reason is None and reference is not None:
                reason = _difference(reference, _numbers(functions, qkv))
            if reason is None:
                forward, gradient = (seconds(function, qkv) for function in functions)
                row["seconds"] = {"forward": forward, "gradient": gradient}
        except Exception as failed:  # of a compiler: the others are timed all the same
            reason = f"{type(failed).__name__}: {failed}".splitlines()[0]
        rows.append(row if reason is None else row | {"error": reason})
    return rows


def _loss(attention: Callable) -> Callable:
    return lambda qkv: jnp.square(attention(qkv).astype(jnp.float32)).sum()


def _numbers(functions: Iterable[Callable], qkv: jax.Array) -> list[np.ndarray]:
    return [np.asarray(function(qkv), np.float32) for function in functions]


def _numbers_by_head(functions: Iterable[Callable], qkv: jax.Array) -> list[np.ndarray]:
    heads = [_numbers(functions, qkv[..., i : i + 1, :]) for i in range(qkv.shape[-2])]
    values, gradients = zip(*heads)
    return [np.concatenate(values, axis=-1), np.concatenate(gradients, axis=-2)]


def _difference(expected: list[np.ndarray], found: list[np.ndarray]) -> str | None:
    for what, a, b in zip(("values", "gradients"), expected, found):
        worst = np.abs(a - b).max() / np.abs(a).max()
        if not worst <= TOLERANCE:  # NaN too
            return f"its {what} differ from xla's by {worst:.2g} of the largest"
    return None


def merged(rows: list[dict[str, Any]], table: pathlib.Path) -> list[dict[str, Any]]:
    """The table's rows with these, in place of what it has of the same attentions."""
    new = {_key(row) for row in rows}
    return [row for row in json.loads(table.read_text()) if _key(row) not in new] + rows
