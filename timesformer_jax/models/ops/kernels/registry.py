"""The kernels there are, by kind of attention: for which devices, and what each supports.

A kernel takes and returns `Tokens`. The functions here adapt those whose own interface differs:
GPU kernels take one array, in which the class token is one more patch; TPU kernels take queries,
keys and values side by side on one axis, as the linear layer writes them. A kernel's module is
imported when the kernel is first asked for.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

from timesformer_jax.models.tokens import Grid, Tokens, joined

# In `jax.Device.device_kind`.
HOPPER = re.compile(r"\bG?H(20|100|200|800)\b")
AMPERE_OR_NEWER = re.compile(r"\b(A|L|G?H|G?B)\d+\w*\b|\bRTX ([3-5]0\d\d|A\d+|PRO)\b|\bAda\b")


class Case(NamedTuple):
    """What one device has to compute: equal cases run equally fast.

    Attributes:
      kind: "temporal", "spatial", "joint", "rows" or "columns".
      shape: of the patches, (B, T, N, 3, h, d).
      dtype: its name.
      cls: whether a class token joins every sequence.
      grid: patches of a frame, down and across.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: str
    cls: bool
    grid: Grid


class Kernel(NamedTuple):
    """An implementation of one kind of attention for some devices.

    Attributes:
      runs_on: whether it is for a device, a `jax.Device` or `AbstractDevice`.
      unsupported: from the case to the reason why `attention` does not support it, or None.
      attention: from the projections, patches (B, T, N, 3, h, d) and cls (B, S, 3, h, d) or None,
        to the attended values, (B, T, N, h * d) and (B, S, h * d) or None.
    """

    runs_on: Callable[[Any], bool]
    unsupported: Callable[[Case], str | None]
    attention: Callable[[Tokens, Grid], Tokens]


# ---- NVIDIA ------------------------------------------------------------------------------------


def _is_hopper(device: Any) -> bool:
    return HOPPER.search(device.device_kind) is not None


def _has_fused_cudnn(device: Any) -> bool:
    """Whether the compute capability is 8.0 or newer: A100, L4, RTX 30 to 50, H100, B200, ...

    A device that is not there, or the abstract device of a mesh, does not tell its capability.
    """
    if device.platform != "gpu":
        return False
    alike = [d for d in jax.local_devices() if d.device_kind == device.device_kind]
    capability = getattr(next(iter(alike), device), "compute_capability", None)
    if capability is None:
        return AMPERE_OR_NEWER.search(device.device_kind) is not None
    major = str(capability).split(".")[0]
    return major.isdigit() and int(major) >= 8  # other makers' have other names


def _joined_shape(case: Case, axis: int) -> tuple[int, ...]:
    """The shape of [cls; patches], see `joined`."""
    return tuple(size + (case.cls and i == axis) for i, size in enumerate(case.shape))


def _hopper_kernel(heads_per_block: int) -> Kernel:
    def unsupported(case: Case) -> str | None:
        from timesformer_jax.models.ops.kernels import hopper

        return hopper.unsupported(_joined_shape(case, 1), case.dtype, heads_per_block)

    def attention(qkv: Tokens, grid: Grid) -> Tokens:
        from timesformer_jax.models.ops.kernels import hopper

        run = functools.partial(hopper.attention, heads_per_block=heads_per_block)
        return joined(qkv, run, axis=1)

    return Kernel(_is_hopper, unsupported, attention)


def _cudnn_kernel(axis: int) -> Kernel:
    """cuDNN's attention along an axis of (B, T, N, ...): along T, both ways a transposed copy."""

    def unsupported(case: Case) -> str | None:
        from timesformer_jax.models.ops.kernels import cudnn

        length = _joined_shape(case, axis)[axis]
        return cudnn.unsupported((length, *case.shape[3:]), case.dtype)

    def attention(qkv: Tokens, grid: Grid) -> Tokens:
        from timesformer_jax.models.ops.kernels import cudnn

        def run(qkv: Float[Array, "b t n 3 h d"]) -> Float[Array, "b t n hd"]:
            return cudnn.attention(qkv.swapaxes(axis, 2)).swapaxes(axis, 2)

        return joined(qkv, run, axis)

    return Kernel(_has_fused_cudnn, unsupported, attention)


# ---- TPU ---------------------------------------------------------------------------------------


def _is_tpu(device: Any) -> bool:
    return device.platform == "tpu"


def _side_by_side(qkv: Tokens) -> Tokens:
    """(..., 3, h, d) to (..., 3 * h * d)."""
    return jax.tree.map(lambda x: x.reshape(*x.shape[:-3], -1), qkv)


def _tpu_temporal() -> Kernel:
    def unsupported(case: Case) -> str | None:
        from timesformer_jax.models.ops.kernels import tpu_temporal

        return tpu_temporal.unsupported(case.shape, case.dtype, cls=case.cls)

    def attention(qkv: Tokens, grid: Grid) -> Tokens:
        from timesformer_jax.models.ops.kernels import tpu_temporal

        cls, patches, _ = _side_by_side(qkv)
        patches, cls = tpu_temporal.attention(patches, cls, heads=qkv.patches.shape[-2])
        return Tokens(cls, patches)

    return Kernel(_is_tpu, unsupported, attention)


def _tpu_spatial(kind: str) -> Kernel:
    """Attention of the patches of a frame, of all frames together, or of parts of each frame."""

    def frames(t: int) -> int:
        return t if kind == "joint" else 1

    def sequences(n: int, width: int) -> tuple[int, ...] | None:
        """The sequence of each patch of a frame; None if there is one."""
        number = {"rows": lambda i: i // width, "columns": lambda i: i % width}.get(kind)
        return number and tuple(map(number, range(n)))

    def unsupported(case: Case) -> str | None:
        from timesformer_jax.models.ops.kernels import tpu_spatial

        _, t, n, *_ = case.shape
        numbers = sequences(n, case.grid[1])
        return tpu_spatial.unsupported(
            case.shape, case.dtype, frames(t), 1 if numbers is None else max(numbers) + 1
        )

    def attention(qkv: Tokens, grid: Grid) -> Tokens:
        from timesformer_jax.models.ops.kernels import tpu_spatial

        _, t, n, _, heads, _ = qkv.patches.shape
        cls, patches, _ = _side_by_side(qkv)
        patches, cls = tpu_spatial.attention(
            patches, cls, heads, frames=frames(t), sequences=sequences(n, grid[1])
        )
        return Tokens(cls, patches)

    return Kernel(_is_tpu, unsupported, attention)


# By kind of attention and name. The number in hopper_2 is of heads per block of threads.
KERNELS: dict[str, dict[str, Kernel]] = {
    "temporal": {
        "hopper": _hopper_kernel(1),
        "cudnn": _cudnn_kernel(axis=1),
        "hopper_2": _hopper_kernel(2),
        "hopper_3": _hopper_kernel(3),
        "pallas": _tpu_temporal(),
    },
    "spatial": {"cudnn": _cudnn_kernel(axis=2), "pallas": _tpu_spatial("spatial")},
    "joint": {"pallas": _tpu_spatial("joint")},
    "rows": {"pallas": _tpu_spatial("rows")},
    "columns": {"pallas": _tpu_spatial("columns")},
}


def names() -> list[str]:
    """Of all kernels, each once."""
    return sorted({name for kernels in KERNELS.values() for name in kernels})
