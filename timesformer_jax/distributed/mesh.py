"""The device mesh, its named axes, and the placement of batches on it."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from timesformer_jax.distributed.sharding import BATCH_AXES, BATCH_SPEC, batch_sharding
from timesformer_jax.errors import InputError

AXES = (*BATCH_AXES, "tensor", "sequence")


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    sequence: int = 1,
    *,
    devices: list | None = None,
) -> Mesh:
    """A mesh of data x fsdp x tensor x sequence devices.

    A batch is split over data x fsdp; tensor x sequence devices compute each part together. One
    axis may be -1, for the remaining devices.

    Args:
      data: replicas of the parameters.
      fsdp: devices that split the parameters of a replica, and gather each layer before its use.
      tensor: devices that split the heads of an attention and the hidden units of an MLP.
      sequence: devices that split the frames of a clip.
      devices: by default all devices of the run.

    Raises:
      InputError: if the product of the axes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dict(zip(AXES, (data, fsdp, tensor, sequence)))
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if (
        len(free) > 1
        or any(size < 1 and size != -1 for size in sizes.values())
        or len(devices) % fixed
        or (not free and fixed != len(devices))
    ):
        asked = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise InputError(
            f"mesh {asked} does not fit {len(devices)} devices: the product must be that number, "
            "and one axis may be -1 for the rest"
        )
    for axis in free:
        sizes[axis] = len(devices) // fixed
    shape = tuple(sizes.values())
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def check_batch(mesh: Mesh, batch_size: int, flag: str, accumulate_steps: int = 1) -> None:
    """Raises InputError, naming the flag to change, unless the batch divides evenly.

    The devices split it, and each splits its share into `accumulate_steps` microbatches.
    """
    devices = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    parts = devices * accumulate_steps
    if batch_size % parts:
        near = max(parts, batch_size // parts * parts)
        each = f", {accumulate_steps} parts each" if accumulate_steps > 1 else ""
        raise InputError(
            f"a batch of {batch_size} cannot be divided among data x fsdp = {devices} devices"
            f"{each}; set {flag} to a multiple of {parts}, {near} for one"
        )


def batch_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of a global batch that this process loads, (b,) int, ascending.

    They are the rows on its devices. Processes whose devices hold the same clips load the same
    rows.
    """
    parts = NamedSharding(mesh, BATCH_SPEC).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in parts.values()]))


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Makes global arrays from this process's `batch_rows`, sharded by the rules of `sharding`."""
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    size = len(next(iter(batch.values()))) // len(batch_rows(mesh, parts)) * parts
    rows = batch_rows(mesh, size)

    def put(name: str, value: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            here = np.searchsorted(rows, np.arange(size)[index[0]])
            if here[-1] - here[0] + 1 == len(here):  # a view, where numbers would make a copy
                here = slice(here[0], here[-1] + 1)
            return value[here, *index[1:]]

        sharding = batch_sharding(mesh, name, value.ndim)
        return jax.make_array_from_callback((size, *value.shape[1:]), sharding, part)

    return {name: put(name, value) for name, value in batch.items()}
