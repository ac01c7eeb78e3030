"""The device mesh, its named axes, and how batches lie on it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from timesformer_jax.distributed.sharding import BATCH_AXES, BATCH_SPEC, batch_sharding
from timesformer_jax.errors import InputError

if TYPE_CHECKING:
    from timesformer_jax.clip_spec import ClipSpec
    from timesformer_jax.models.config import TimeSformerConfig

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

    A batch is shared among data x fsdp; each of its parts is computed by tensor x sequence devices
    together. One axis may be -1, for as many as the devices allow.

    Args:
      data: replicas of the parameters.
      fsdp: devices that share the parameters of one replica, and gather each layer's to use them.
      tensor: devices that share the heads of an attention and the hidden units of an MLP.
      sequence: devices that share the frames of a clip.
      devices: all of the run's by default.

    Raises:
      InputError: if the axes and the number of devices do not fit.
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


def check_model(mesh: Mesh, model: TimeSformerConfig, clip: ClipSpec) -> None:
    """Raises InputError, naming the flag to change, unless the mesh can split model and clips."""
    tensor, sequence = mesh.shape["tensor"], mesh.shape["sequence"]
    for parts, name in ((model.num_heads, "heads"), (model.mlp_size, "hidden units of an MLP")):
        if parts % tensor:
            raise InputError(
                f"{parts} {name} cannot be divided among {tensor} devices; set "
                f"--config.mesh.tensor to a divisor of {parts}, {math.gcd(parts, tensor)} for one"
            )
    within = {layer.within for layer in model.scheme.layers}
    if sequence > 1 and "clip" in within:
        raise InputError(
            f"attention {model.attention!r} compares patches of different frames and positions, "
            "so that devices cannot share a clip; set --config.mesh.sequence=1"
        )
    shared = {"frames": clip.frames}
    if "position" in within:
        shared["patches a frame"] = (clip.crop // model.patch_size) ** 2
    for name, parts in shared.items():
        if parts % sequence:
            among = " and ".join(f"{count} {what}" for what, count in shared.items())
            raise InputError(
                f"{parts} {name} cannot be divided among {sequence} devices; set "
                f"--config.mesh.sequence to a divisor of {among}, "
                f"{math.gcd(sequence, *shared.values())} for one"
            )


def check_batch(mesh: Mesh, batch_size: int, flag: str, accumulate_steps: int = 1) -> None:
    """Raises InputError, naming the flag to change, unless the devices share a batch evenly.

    Each device's share must divide evenly again into `accumulate_steps`.
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
    """The rows of a global batch that this process's devices hold, (b,) int, ascending.

    They follow from how the batch lies on the mesh: processes whose devices hold the same clips
    have the same rows, and each loads them.
    """
    parts = NamedSharding(mesh, BATCH_SPEC).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in parts.values()]))


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """The `batch_rows` of a batch as global arrays, placed by the rules of `sharding`."""
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    size = len(next(iter(batch.values()))) // len(batch_rows(mesh, parts)) * parts
    rows = batch_rows(mesh, size)

    def put(name: str, value: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            here = np.searchsorted(rows, np.arange(size)[index[0]])
            return value[here, *index[1:]]

        sharding = batch_sharding(mesh, name, value.ndim)
        return jax.make_array_from_callback((size, *value.shape[1:]), sharding, part)

    return {name: put(name, value) for name, value in batch.items()}
