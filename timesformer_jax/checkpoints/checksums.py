"""Checksums of what a checkpoint holds. Orbax does not notice a changed byte in an array."""

from __future__ import annotations

import json
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from timesformer_jax.errors import InputError


def array_checksums(tree: Any) -> dict[str, int]:
    """The sum of each array's bits, as unsigned integers modulo 2**32, by the array's path.

    It is the same on any mesh, and differs if one bit of the array differs.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(_sum_bits(tree))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): int(value) for path, value in leaves
    }


def check_finite(file: str, name: str, value: np.ndarray | jax.Array) -> None:
    """Raises an InputError if a parameter is infinite or not a number.

    Args:
      file: that holds it, for the message.
      name: of the parameter.
      value: the parameter, on any mesh; a process looks at what its own devices hold.
    """
    shards = [value] if isinstance(value, np.ndarray) else _one_of_each_shard(value)
    for shard in shards:
        if count := np.size(shard) - np.count_nonzero(np.isfinite(shard)):
            raise InputError(
                f"{file}: {count} of {np.size(shard)} numbers of {name} are infinite or not a "
                "number: the training that wrote them had failed; take an earlier checkpoint (to "
                "look at these, from_pretrained and convert have allow_nonfinite)"
            )


def _one_of_each_shard(value: jax.Array) -> list[np.ndarray]:
    shards = {str(shard.index): shard for shard in value.addressable_shards}
    return [np.asarray(shard.data) for shard in shards.values()]


def json_checksum(value: Any) -> int:
    """The CRC-32 of a JSON value; a tuple counts as a list."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


@jax.jit
def _sum_bits(tree: Any) -> Any:
    def total(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
        return bits.sum(dtype=jnp.uint32)

    return jax.tree.map(total, tree)
