"""One table with the sharding of every array of a step, and the functions that apply it."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
from jax.extend.backend import get_default_device
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

BATCH_AXES = ("data", "fsdp")  # the mesh axes that split a batch
BATCH_SPEC = P(BATCH_AXES)

# (pattern of the end of an array's path, PartitionSpec). The first rule counts that matches and has
# no more axes than the array. An array without a rule is replicated.
RULES: tuple[tuple[str, P], ...] = (
    # Parameters, and the optimizer's state, which mirrors them. "tensor" splits attentions by heads
    # and MLPs by hidden units: the first layer by outputs, the second by inputs, so that one
    # all-reduce follows both. `temporal_fc` is not split, as it is multiplied into `proj` and its
    # inputs are the outputs of `proj`. "fsdp" splits another axis, to save memory: a layer
    # gathers it before use. The others are small: norms, biases, embeddings.
    (r"qkv/kernel$", P("fsdp", None, "tensor")),
    (r"qkv/bias$", P(None, "tensor")),
    (r"fc1/kernel$", P("fsdp", "tensor")),
    (r"fc1/bias$", P("tensor")),
    (r"(proj|fc2)/kernel$", P("tensor", "fsdp")),
    (r"(temporal_fc|patch|head)/kernel$", P("fsdp", None)),
    # A batch: frames (B, T, H, W, 3), in evaluation (B, V, T, H, W, 3), and arrays (B, ...).
    (r"batch/frames$", P(BATCH_AXES, None, "sequence", None, None, None)),
    (r"batch/frames$", P(BATCH_AXES, "sequence", None, None, None)),
    (r"batch/\w+$", BATCH_SPEC),
    # Between layers, "sequence" splits patches (B, T, N, D) by frames; during temporal attention,
    # by positions; joint attention by itself has all of a clip. It splits classification tokens
    # (B, S, D) by their sequences, if each of these lies within a frame or a position.
    (r"activations/frames$", P(BATCH_AXES, "sequence", None, None)),
    (r"activations/positions$", P(BATCH_AXES, None, "sequence", None)),
    (r"activations/clip$", P(BATCH_AXES, None, None, None)),
    (r"activations/token$", P(BATCH_AXES, "sequence", None)),
    (r"activations/(clip_)?token$", P(BATCH_AXES, None)),
)


def spec(path: str, ndim: int) -> P:
    """The PartitionSpec of an array with `ndim` axes, by the first matching rule."""
    found = (spec for pattern, spec in RULES if re.search(pattern, path) and len(spec) <= ndim)
    return next(found, P())


def shardings(mesh: Mesh, tree: Any) -> Any:
    """The NamedSharding of every leaf: parameters, or a state that mirrors them.

    An axis that the mesh does not divide evenly is not split.

    Args:
      mesh: the devices.
      tree: a pytree of arrays or shapes. The paths of its leaves end in parameter paths.
    """

    def of(path: tuple, leaf: Any) -> NamedSharding:
        axes = spec(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.ndim)
        return NamedSharding(mesh, without_uneven_axes(axes, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(of, tree)


def without_uneven_axes(axes: P, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
    """`axes` for an array of `shape`, with None for axes that do not divide evenly."""
    fit = (size % axis_size(axis, mesh) == 0 for axis, size in zip(axes, shape))
    return P(*(axis if ok else None for axis, ok in zip(axes, fit)))


def axis_size(axis: str | tuple[str, ...] | None, mesh: Mesh | AbstractMesh) -> int:
    """The number of parts into which an entry of a PartitionSpec splits an axis."""
    names = axis if isinstance(axis, tuple) else (axis,) * (axis is not None)
    return math.prod(mesh.shape.get(name, 1) for name in names)


def batch_sharding(mesh: Mesh, name: str, ndim: int) -> NamedSharding:
    """The sharding of the array `name` of a batch, with `ndim` axes."""
    return NamedSharding(mesh, spec(f"batch/{name}", ndim))


# In a traced program, for the mesh set by `jax.set_mesh`. Without a mesh they do nothing.


def constrain(x: jax.Array, name: str) -> jax.Array:
    """Constrains the sharding of an activation to its rule."""
    return _constrain(x, spec(f"activations/{name}", x.ndim))


def gather_fsdp(kernel: jax.Array, path: str) -> jax.Array:
    """All-gathers a kernel along "fsdp", for its use in a layer.

    Without this constraint the partitioner sometimes moves activations to the shards of a small
    kernel, or gathers the kernel along other axes.
    """
    axes = spec(path, kernel.ndim)
    return _constrain(kernel, P(*(None if axis == "fsdp" else axis for axis in axes)))


def current_mesh() -> AbstractMesh:
    """The axes of the mesh that split what is traced.

    None without a mesh; inside `jax.shard_map`, where the program is that of one device, those that
    it leaves alone.
    """
    mesh = jax.sharding.get_abstract_mesh()
    left = {name: size for name, size in mesh.shape.items() if name not in mesh.manual_axes}
    return AbstractMesh(tuple(left.values()), tuple(left))


def mesh_size(axis: str) -> int:
    """The size of an axis of the current mesh; 1 without a mesh."""
    return axis_size(axis, current_mesh())


def is_on_mesh() -> bool:
    """Whether a mesh with the table's axes is set."""
    return "sequence" in current_mesh().axis_names


def target_device() -> Any:
    """The device kind that the program is traced for: the mesh's, or else the default device."""
    return jax.sharding.get_abstract_mesh().abstract_device or get_default_device()


def _constrain(x: jax.Array, axes: P) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, axes) if is_on_mesh() else x
