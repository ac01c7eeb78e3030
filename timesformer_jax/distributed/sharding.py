"""One table that says how every array of a step lies on the mesh."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
from jax.extend.backend import get_default_device
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

BATCH_AXES = ("data", "fsdp")  # the axes that share the clips of a batch
BATCH_SPEC = P(BATCH_AXES)

# (the end of an array's path, the mesh axes that split its axes). The first counts that matches and
# has no more axes than the array; what none matches lies whole on every device.
RULES: tuple[tuple[str, P], ...] = (
    # Parameters, and the optimizer's state, which mirrors them. "tensor" splits attentions by heads
    # and MLPs by hidden units: one layer by its outputs and the next by its inputs, so that one sum
    # over the devices ends both. `temporal_fc` is multiplied into `proj` first, and whole, since its
    # inputs are the outputs of `proj`. "fsdp" splits another axis, for memory alone: a layer
    # gathers it before use. The others are small: norms, biases, embeddings.
    (r"qkv/kernel$", P("fsdp", None, "tensor")),
    (r"qkv/bias$", P(None, "tensor")),
    (r"fc1/kernel$", P("fsdp", "tensor")),
    (r"fc1/bias$", P("tensor")),
    (r"(proj|fc2)/kernel$", P("tensor", "fsdp")),
    (r"(temporal_fc|patch|head)/kernel$", P("fsdp", None)),
    # A batch: frames (B, T, H, W, 3), in evaluation (B, V, T, H, W, 3), and what else a clip has.
    (r"batch/frames$", P(BATCH_AXES, None, "sequence", None, None, None)),
    (r"batch/frames$", P(BATCH_AXES, "sequence", None, None, None)),
    (r"batch/\w+$", BATCH_SPEC),
    # Between layers, patches (B, T, N, D) lie on the device of their frame, but while they attend
    # through time on that of their position. A token (B, S, D) lies with its sequence.
    (r"activations/frames$", P(BATCH_AXES, "sequence", None, None)),
    (r"activations/positions$", P(BATCH_AXES, None, "sequence", None)),
    (r"activations/token$", P(BATCH_AXES, "sequence", None)),
    (r"activations/token$", P(BATCH_AXES, None)),
)


def spec(path: str, ndim: int) -> P:
    """What the table says of an array with `ndim` axes."""
    found = (spec for pattern, spec in RULES if re.search(pattern, path) and len(spec) <= ndim)
    return next(found, P())


def shardings(mesh: Mesh, tree: Any) -> Any:
    """The NamedSharding of every leaf of a state: parameters and what mirrors them.

    An axis that the mesh does not divide evenly is not split.

    Args:
      mesh: the devices.
      tree: a pytree of arrays or shapes whose paths end in parameter paths.
    """

    def of(path: tuple, leaf: Any) -> NamedSharding:
        axes = spec(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.ndim)
        return NamedSharding(mesh, without_uneven_axes(axes, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(of, tree)


def without_uneven_axes(axes: P, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
    """`axes` for an array of `shape`, without those that the mesh does not divide evenly."""
    fit = (size % axis_size(axis, mesh) == 0 for axis, size in zip(axes, shape))
    return P(*(axis if ok else None for axis, ok in zip(axes, fit)))


def axis_size(axis: str | tuple[str, ...] | None, mesh: Mesh | AbstractMesh) -> int:
    """How many devices an entry of a PartitionSpec splits an array among."""
    names = axis if isinstance(axis, tuple) else (axis,) * (axis is not None)
    return math.prod(mesh.shape.get(name, 1) for name in names)


def batch_sharding(mesh: Mesh, name: str, ndim: int) -> NamedSharding:
    """How the array `name` of a batch lies, which has `ndim` axes."""
    return NamedSharding(mesh, spec(f"batch/{name}", ndim))


# Within a program, on the mesh that is set; where none is, nothing is done.


def constrain(x: jax.Array, name: str) -> jax.Array:
    """An activation, laid as the table says."""
    return _constrain(x, spec(f"activations/{name}", x.ndim))


def gathered(kernel: jax.Array, path: str) -> jax.Array:
    """A parameter as a layer uses it, whole along "fsdp".

    Left to itself the partitioner at times sends activations to the parts of a small kernel, or
    gathers them by way of other axes.
    """
    axes = spec(path, kernel.ndim)
    return _constrain(kernel, P(*(None if axis == "fsdp" else axis for axis in axes)))


def mesh_size(axis: str) -> int:
    """Devices along an axis of the mesh that is set; 1 where there is none."""
    return axis_size(axis, jax.sharding.get_abstract_mesh())


def is_on_mesh() -> bool:
    """Whether a mesh with the table's axes is set."""
    return "sequence" in jax.sharding.get_abstract_mesh().axis_names


def target_device() -> Any:
    """What the program that is being traced is for: a device of the mesh, or else the default."""
    return jax.sharding.get_abstract_mesh().abstract_device or get_default_device()


def _constrain(x: jax.Array, axes: P) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, axes) if is_on_mesh() else x
