"""One table that says how every parameter, and its optimizer state, lies on the mesh."""

from __future__ import annotations

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# (end of a parameter's path, how its axes are split). The first match counts; what matches none
# (norms, biases, embeddings) is small and lies whole on every device.
RULES: tuple[tuple[str, P], ...] = (
    (r"(qkv|proj|fc|fc1|fc2)/kernel$", P("fsdp", None)),
    (r"(patch|head)/kernel$", P("fsdp", None)),
)


def shardings(mesh: Mesh, tree: Any) -> Any:
    """The NamedSharding of every leaf of a state: parameters and what mirrors them.

    An axis that the mesh does not divide evenly is not split.

    Args:
      mesh: the devices.
      tree: a pytree of arrays or shapes whose paths end in parameter paths.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, _spec(mesh, path, leaf.shape)), tree
    )


def _spec(mesh: Mesh, path: tuple, shape: tuple[int, ...]) -> P:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    for pattern, spec in RULES:
        if re.search(pattern, name) and len(spec) == len(shape):
            fits = (axis and size % mesh.shape[axis] == 0 for axis, size in zip(spec, shape))
            return P(*(axis if ok else None for axis, ok in zip(spec, fits)))
    return P()
