"""The device mesh, its named axes, and how batches lie on it."""

from __future__ import annotations

import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from timesformer_jax.errors import InputError

AXES = ("data", "fsdp")
BATCH = P(AXES)  # every axis carries a part of the batch


def make_mesh(data: int = -1, fsdp: int = 1, devices: list | None = None) -> Mesh:
    """A mesh of data x fsdp devices.

    Args:
      data: replicas of the parameters; -1 for as many as the devices allow.
      fsdp: devices that share the parameters of one replica; -1 likewise.
      devices: all of the run's by default.

    Raises:
      InputError: if the axes and the number of devices do not fit.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp}
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(free) > 1 or fixed < 1 or len(devices) % fixed or (not free and fixed != len(devices)):
        raise InputError(
            f"mesh data={data} x fsdp={fsdp} does not fit {len(devices)} devices: the product "
            "must be that number, and one axis may be -1 for the rest"
        )
    for axis in free:
        sizes[axis] = len(devices) // fixed
    shape = tuple(sizes[axis] for axis in AXES)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def check_batch(mesh: Mesh, batch_size: int, flag: str, accumulate_steps: int = 1) -> None:
    """Raises InputError, naming the flag to change, unless the devices share a batch evenly.

    Each device's share must divide evenly again into `accumulate_steps`.
    """
    parts = mesh.devices.size * accumulate_steps
    if batch_size % parts:
        near = max(parts, batch_size // parts * parts)
        each = f", {accumulate_steps} parts each" if accumulate_steps > 1 else ""
        raise InputError(
            f"a batch of {batch_size} cannot be divided among the {mesh.devices.size} devices of "
            f"the mesh{each}; "
            f"set {flag} to a multiple of {parts}, {near} for one"
        )


def batch_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of a global batch that this process's devices hold, (b,) int, ascending.

    They follow from how the batch lies on the mesh: processes whose devices hold the same clips
    have the same rows, and each loads them.
    """
    parts = NamedSharding(mesh, BATCH).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in parts.values()]))


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """The `batch_rows` of a batch as global arrays, the leading axis over the whole mesh."""
    sharding = NamedSharding(mesh, BATCH)
    parts = math.prod(mesh.shape[axis] for axis in BATCH[0])
    size = len(next(iter(batch.values()))) // len(batch_rows(mesh, parts)) * parts
    rows = batch_rows(mesh, size)

    def put(value: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            here = np.searchsorted(rows, np.arange(size)[index[0]])
            return value[here, *index[1:]]

        return jax.make_array_from_callback((size, *value.shape[1:]), sharding, part)

    return {name: put(value) for name, value in batch.items()}
