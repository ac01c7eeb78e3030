"""Selects the implementation of attention that a program uses.

Every attention of the model is called here, by its kind, with the formulation of
`models.attention` that runs on every device, "xla". The selection happens while a program is
traced. It depends on the devices of the program's mesh, not on the machine that compiles it: it is
the fastest one measured where `models.tuning` has tried them, else it follows from the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from timesformer_jax.distributed.sharding import (
    axis_size,
    current_mesh,
    is_on_mesh,
    spec,
    target_device,
    without_uneven_axes,
)
from timesformer_jax.errors import InputError, did_you_mean
from timesformer_jax.models.ops import long_attention
from timesformer_jax.models.ops.kernels import registry
from timesformer_jax.models.ops.kernels.registry import KERNELS, Case
from timesformer_jax.models.ops.reference import use_references
from timesformer_jax.models.tokens import Grid, Tokens

# Which rule of the table of shardings holds for the patches during an attention. Devices that share
# a clip call joint attention for one device (`sequence.by_heads`).
_RULES = {"temporal": "positions", "joint": "clip"}


# `with attention_kernels(NAME):` chooses for all programs that are traced inside: "auto" for the
# fastest, "xla", or the name of a kernel, for every kind of attention that it has. `jax.jit` traces
# a function again when it changes; so it does for the recorder.
attention_kernels = jax.make_user_context(default_value="auto")
recorder = jax.make_user_context(default_value=None)


class Recorder:
    """`with recorder(Recorder()):` notes every attention of a program that is traced inside.

    Attributes:
      found: the formulation "xla" of each case. An attention comes after those inside of it.
    """

    def __init__(self) -> None:
        self.found: dict[Case, Callable[[Tokens, Grid], Tokens]] = {}


class Choice(NamedTuple):
    """What was measured to be the fastest; with `gradients`, in a program that needs them."""

    name: str
    gradients: bool


_choices: dict[tuple[str, Case], Choice] = {}  # by kind of device


def choose(case: Case, choice: Choice) -> None:
    """Makes programs for the device that is traced for use this implementation from now on.

    The choice for a program with gradients stands for those without: its gradients were compared.
    """
    key = target_device().device_kind, case
    if choice.gradients or key not in _choices or not _choices[key].gradients:
        _choices[key] = choice


def attention(kind: str, qkv: Tokens, grid: Grid, xla: Callable[[Tokens, Grid], Tokens]) -> Tokens:
    """One attention of the model, by the implementation that is selected for it.

    Args:
      kind: "temporal", "spatial", "joint", "rows" or "columns": a key of `KERNELS`.
      qkv: the projections: patches (B, T, N, 3, h, d), and cls (B, S, 3, h, d), a token for each
        sequence, or None.
      grid: patches of a frame, down and across.
      xla: the implementation for every device.

    Returns:
      The attended values, patches (B, T, N, h * d) and cls (B, S, h * d) or None.

    Raises:
      InputError: if the kernel that `attention_kernels` names cannot run.
    """
    if use_references.value:
        return xla(qkv, grid)
    case = local_case(kind, qkv, grid)
    if recorder.value is not None:
        out = xla(qkv, grid)
        recorder.value.found[case] = xla
        return out
    name = select_implementation(case)
    return xla(qkv, grid) if name == "xla" else run_kernel(kind, qkv, grid, name)


def select_implementation(case: Case) -> str:
    """The implementation for the program that is being traced: a name of `KERNELS`, or "xla".

    Raises:
      InputError: if the kernel that `attention_kernels` names cannot run.
    """
    name = attention_kernels.value
    if name == "auto":
        choice = _choices.get((target_device().device_kind, case))
        return choice.name if choice else unmeasured_choice(case)
    if name not in KERNELS[case.kind]:
        return "xla"
    if reason := unsupported(case, name):
        raise InputError(
            f"attention_kernels={name} cannot compute the {case.kind} attention of this model: "
            f"{reason}; use auto, which takes the fastest that can"
        )
    return name


def unmeasured_choice(case: Case) -> str:
    """The implementation where nothing was measured, as for devices that are not there.

    A kernel for TPUs is selected wherever it supports the case: by the cycles of the TPU's own
    compiler it is the faster one for every clip of the recipes (docs/kernels.md). Of GPUs no such
    figures are known.
    """
    return "pallas" if unsupported(case, "pallas") is None else "xla"


def check_name(name: str) -> None:
    """Raises InputError unless it is a value for `attention_kernels`."""
    known = ["auto", "xla", *registry.names()]
    if name not in known:
        raise InputError(
            f"attention_kernels must be one of {', '.join(known)}, not {name!r}"
            f"{did_you_mean(str(name), known)}"
        )


def unsupported(case: Case, name: str) -> str | None:
    """Why an implementation cannot run in the program that is being traced; None if it can."""
    if name == "xla":
        return None
    kernel = KERNELS[case.kind].get(name)
    if kernel is None:
        return f"it has no {case.kind} attention"
    device = target_device()
    if not kernel.runs_on(device):
        return f"it is not for {device.device_kind!r}"
    return kernel.unsupported(case)


def run_kernel(kind: str, qkv: Tokens, grid: Grid, name: str) -> Tokens:
    """Attention by a kernel of `KERNELS`. On a mesh each device runs it on its own shard."""
    return on_each_device(kind, qkv, grid, KERNELS[kind][name].attention)


def on_each_device(
    kind: str, qkv: Tokens, grid: Grid, attention: Callable[[Tokens, Grid], Tokens]
) -> Tokens:
    """`attention(qkv, grid)`, by every device of the current mesh on its own shard."""
    if not is_on_mesh():
        return attention(qkv, grid)

    def local(*qkv: Any) -> tuple:
        return tuple(attention(Tokens(*qkv), grid))

    # The partitioner cannot split a kernel: without shard_map every device gathers the whole batch.
    cls, patches = _partition_specs(kind, qkv)
    inputs = cls, patches, P(patches[0])
    outputs = *(P(*axes[:-3], *axes[-2:-1]) for axes in (cls, patches)), P()
    run = jax.shard_map(local, in_specs=inputs, out_specs=outputs, check_vma=False)
    return Tokens(*run(*qkv))


def is_long(case: Case) -> bool:
    """Whether the formulation "xla" computes a case by `long_attention`."""
    _, t, n, _, heads, _ = case.shape
    sizes = {"temporal": (t, n), "spatial": (n, t), "joint": (t * n, 1)}
    if use_references.value or case.kind not in sizes:
        return False
    length, sequences = sizes[case.kind]
    platform = target_device().platform
    return long_attention.is_long(length + case.cls, sequences * heads, platform)


def local_case(kind: str, qkv: Tokens, grid: Grid) -> Case:
    """The case of one device of the current mesh.

    Args:
      qkv: the whole projections, as `attention` takes them.
    """
    (_, axes), shape = _partition_specs(kind, qkv), qkv.patches.shape
    local = tuple(size // axis_size(axis, current_mesh()) for axis, size in zip(axes, shape))
    return Case(kind, local, jnp.dtype(qkv.patches.dtype).name, qkv.cls is not None, grid)


def _partition_specs(kind: str, qkv: Tokens) -> tuple[P, P]:
    """The shardings of cls and patches on the current mesh; what it does not divide is whole.

    The token of a sequence lies where the sequence lies.
    """
    activations = spec(f"activations/{_RULES.get(kind, 'frames')}", 4)
    axes = P(*activations[:3], None, "tensor", None)
    axes = without_uneven_axes(axes, qkv.patches.shape, current_mesh())
    if qkv.cls is None:
        return P(), axes
    sequences = "sequence" if "sequence" in axes else None
    return P(axes[0], sequences, *axes[3:]), axes
