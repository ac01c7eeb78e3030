"""Selects the implementation of attention that a program uses: the fastest one measured.

`measured.json` holds the timings of `timesformer benchmark attention --autotune`, by kind of
device. For a device, dtype and size without timings the implementation is "xla", the formulation of
`models.attention`; a warning is logged if a kernel exists that may be faster. The selection happens
while a program is traced. It depends on the devices of the program's mesh, not on the machine that
compiles it.
"""

from __future__ import annotations

import functools
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import PartitionSpec as P

from timesformer_jax.distributed.sharding import (
    axis_size,
    is_on_mesh,
    spec,
    target_device,
    without_uneven_axes,
)
from timesformer_jax.models.ops.kernels import cudnn, hopper
from timesformer_jax.models.ops.reference import use_references

TABLE = pathlib.Path(__file__).with_name("measured.json")
HOPPER = re.compile(r"\bG?H(20|100|200|800)\b")  # in `jax.Device.device_kind`


class Kernel(NamedTuple):
    """An implementation of attention for some devices.

    Attributes:
      attention: from qkv (B, T, N, 3, h, d) or (B, S, length, 3, h, d) to (..., h * d).
      unsupported: from the shape and dtype of qkv to the reason why `attention` does not support
        them, or None.
    """

    attention: Callable[[jax.Array], jax.Array]
    unsupported: Callable[[tuple[int, ...], Any], str | None]


def _cudnn_temporal(qkv: jax.Array) -> jax.Array:
    """cuDNN's attention along the frames; both ways a transposed copy: b t n ... <-> b n t ..."""
    return jnp.swapaxes(cudnn.attention(jnp.swapaxes(qkv, 1, 2)), 1, 2)


def _cudnn_temporal_unsupported(shape: tuple[int, ...], dtype: Any) -> str | None:
    b, t, n, *heads = shape
    return cudnn.unsupported((b, n, t, *heads), dtype)


def _hopper_kernel(heads_per_block: int) -> Kernel:
    return Kernel(
        functools.partial(hopper.attention, heads_per_block=heads_per_block),
        functools.partial(hopper.unsupported, heads_per_block=heads_per_block),
    )


# By kind of attention and name. The number in pallas_2 is of heads per block of threads.
KERNELS: dict[str, dict[str, Kernel]] = {
    "temporal": {
        "pallas": _hopper_kernel(1),
        "cudnn": Kernel(_cudnn_temporal, _cudnn_temporal_unsupported),
        "pallas_2": _hopper_kernel(2),
        "pallas_3": _hopper_kernel(3),
    },
    "spatial": {"cudnn": Kernel(cudnn.attention, cudnn.unsupported)},
}


def attention(kind: str, qkv: jax.Array, xla: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Temporal or spatial attention by the implementation that `select_implementation` returns.

    Args:
      kind: "temporal" or "spatial".
      qkv: (B, T, N, 3, h, d), or (B, S, length, 3, h, d).
      xla: the implementation for every device.
    """
    if use_references.value:
        return xla(qkv)
    name = select_implementation(kind, qkv.shape, qkv.dtype)
    return xla(qkv) if name == "xla" else run_kernel(kind, qkv, name)


def run_kernel(kind: str, qkv: jax.Array, name: str) -> jax.Array:
    """Attention by a kernel of `KERNELS`. On a mesh each device runs it on its own shard."""
    kernel = KERNELS[kind][name].attention
    if not is_on_mesh():
        return kernel(qkv)
    # The partitioner cannot split a kernel: without shard_map every device gathers the whole batch.
    inputs = _partition_spec(kind, qkv.shape)
    outputs = P(*inputs[:3], inputs[4])
    return jax.shard_map(kernel, in_specs=inputs, out_specs=outputs, check_vma=False)(qkv)


def _partition_spec(kind: str, shape: tuple[int, ...]) -> P:
    """The sharding of qkv on the current mesh; sizes that a mesh axis does not divide are whole."""
    activations = spec(f"activations/{'positions' if kind == 'temporal' else 'frames'}", 4)
    axes = P(*activations[:3], None, "tensor", None)
    return without_uneven_axes(axes, shape, jax.sharding.get_abstract_mesh())


def select_implementation(
    kind: str, shape: tuple[int, ...], dtype: Any, table: pathlib.Path = TABLE
) -> str:
    """The name of the fastest measured implementation for the program that is being traced.

    Args:
      kind: "temporal" or "spatial".
      shape: the global shape of qkv, (B, T, N, 3, h, d) or (B, S, length, 3, h, d).

    Returns:
      A name of `KERNELS[kind]`, or "xla".
    """
    key = case_key(describe_case(kind, shape, dtype))
    rows = [row for row in json.loads(table.read_text()) if case_key(row) == key]
    supported = {name for name in KERNELS[kind] if not unsupported(kind, shape, dtype, name)}
    if supported and not rows:
        _warn_not_measured(*key)
    supported.add("xla")
    timed = [row for row in rows if "seconds" in row and row["implementation"] in supported]
    fastest = min(timed, key=lambda row: row["seconds"]["gradient"], default=None)
    return fastest["implementation"] if fastest else "xla"


@functools.cache  # warns once, not for every layer
def _warn_not_measured(kind: str, device: str, dtype: str, length: int, *_: int) -> None:
    logging.warning(
        "no %s attention of %d tokens in %s was measured on %s, so XLA's is used; `timesformer "
        "benchmark attention --autotune` with your frames, size and scheme finds the fastest",
        kind, length, dtype, device,
    )  # fmt: skip


def unsupported(kind: str, shape: tuple[int, ...], dtype: Any, implementation: str) -> str | None:
    """Why an implementation cannot run in the program that is being traced; None if it can."""
    if implementation == "xla":
        return None
    device_kind = target_device().device_kind
    if not HOPPER.search(device_kind):
        return f"it is for an H100 or H200, and the program for {device_kind!r}; use 'xla'"
    return KERNELS[kind][implementation].unsupported(_shard_shape(kind, shape), dtype)


def _shard_shape(kind: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of qkv on one device of the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = _partition_spec(kind, shape)
    return tuple(size // axis_size(axis, mesh) for axis, size in zip(axes, shape))


def describe_case(kind: str, shape: tuple[int, ...], dtype: Any) -> dict[str, Any]:
    """A row of the table without timings: the device, the sizes on one device, the versions.

    Args:
      shape: the global shape of qkv.
    """
    shape = _shard_shape(kind, shape)
    length = shape[1] if kind == "temporal" else shape[2]
    version = cudnn.cudnn_version()
    return {
        "kind": kind,
        "device": target_device().device_kind,
        "dtype": jnp.dtype(dtype).name,
        "length": length,
        "heads": shape[-2],
        "channels": shape[-1],
        "sequences": shape[0] * shape[1] * shape[2] // length,
        "jax": jax.__version__,
        "cudnn": version and ".".join(map(str, version)),
    }


def case_key(row: dict[str, Any]) -> tuple:
    """The fields that rows about the same attention share, which excludes `sequences`."""
    return tuple(row[name] for name in ("kind", "device", "dtype", "length", "heads", "channels"))
