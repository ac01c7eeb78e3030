"""Published peaks of accelerators, and the bandwidth of a mesh's links.

Rates are theoretical peaks, dense, without sparsity. GB is 1e9 bytes, GiB 2**30.

TPUs: docs.cloud.google.com/tpu/docs/ v5e, v5p and v6e, "Key chip specifications": peak bf16
compute, HBM bandwidth, ICI ports and bidirectional ICI bandwidth of a chip, which is shared here
among the ports and both directions (v5e 400 GB/s / 4 / 2). Memory is what the compiler (libtpu
0.0.42.1) names as the chip's when a program exceeds it, a little less than the page's.

A TPU's clock follows from its peak: two FLOPs a cycle and cell of its matrix units (MXU), which the
same pages count: v5e 4 and v5p 2 x 4 of 128 x 128 cells. For v6e the page's versions say two or
four MXUs, and 256 x 256 cells. Four give 1.75 GHz, at which the compiler's estimate for a copy is
the same multiple of what the memory's rate allows as on v5e, 1.24.

GPUs: NVIDIA's data sheets of the A100 80GB SXM, H100 SXM and H200 SXM; figures "with sparsity" are
halved. NVLink's bandwidth is given for both directions together (900 GB/s) and halved here. The
network is that of the DGX of each (user guides): 8 adapters of 200 Gb/s with the A100, of 400 Gb/s
with the others, one a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from timesformer_jax.timing import time_runs

GIB = 2**30


class Torus(NamedTuple):
    """TPU links: a torus, with links to the neighbours in each direction.

    Attributes:
      link: bytes/s over one link, one way.
      wraps: a side with a multiple of this many chips has wraparound links (is a ring).
      cubes: whether a slice has wraparound links only if all its sides are such multiples.
    """

    link: float
    wraps: int
    cubes: bool = False


class Hosts(NamedTuple):
    """GPU links: a switch within a host, a network between hosts.

    Attributes:
      within: bytes/s that a GPU can send to the others of its host, one way.
      between: bytes/s that a GPU can send to other hosts, one way.
      size: GPUs a host.
    """

    within: float
    between: float
    size: int = 8


class Chip(NamedTuple):
    """Device peaks: the limits of one chip.

    Attributes:
      kind: a part of `jax.Device.device_kind`.
      memory: bytes that programs can use.
      bfloat16: FLOP/s of bfloat16 matrix products, summed in float32.
      float32: FLOP/s of float32 ones at JAX's default precision: on TPUs one bfloat16 pass, on
        GPUs TensorFloat-32.
      memory_rate: bytes/s to and from the memory.
      links: to the other chips.
      clock: cycles/s; None for GPUs, whose compiler estimates no cycles.
    """

    kind: str
    memory: float
    bfloat16: float
    float32: float
    memory_rate: float
    links: Torus | Hosts
    clock: float | None = None


CHIPS = {
    "v5e": Chip("TPU v5 lite", 15.75 * GIB, 197e12, 197e12, 819e9, Torus(50e9, 16), 1.503e9),
    "v5p": Chip(
        "TPU v5", 95.74 * GIB, 459e12, 459e12, 2765e9, Torus(100e9, 4, cubes=True), 1.751e9
    ),
    "v6e": Chip("TPU v6 lite", 31.25 * GIB, 918e12, 918e12, 1638e9, Torus(100e9, 16), 1.751e9),
    "a100": Chip("A100-SXM4-80GB", 80e9, 312e12, 156e12, 2039e9, Hosts(300e9, 25e9)),
    "h100": Chip("H100 80GB HBM3", 80e9, 989.4e12, 494.7e12, 3350e9, Hosts(450e9, 50e9)),
    "h200": Chip("H200", 141e9, 989.4e12, 494.7e12, 4800e9, Hosts(450e9, 50e9)),
}


def chip_of(device: jax.Device) -> Chip | None:
    """The entry of a device in `CHIPS`, or None."""
    # "TPU v5", a v5p, is a part of "TPU v5 lite", a v5e: the longest match counts.
    matching = [chip for chip in CHIPS.values() if chip.kind in device.device_kind]
    return max(matching, key=lambda chip: len(chip.kind), default=None)


def link_rate(chip: Chip, mesh: Mesh, axes: tuple[str, ...]) -> float:
    """Bytes/s that a chip can send, one way, to the chips of its group along `axes`.

    On a torus, each spanned direction counts both links of a ring and one link of an open side,
    where data must return by the same links. On GPUs it is NVLink, or the network if the group
    spans several hosts.

    Args:
      chip: the kind of all devices.
      mesh: on a torus its devices have `coords`; GPU hosts are filled in the order of the mesh.
      axes: mesh axes along which the chips communicate.
    """
    among = tuple(slice(None) if axis in axes else 0 for axis in mesh.axis_names)
    if isinstance(chip.links, Hosts):
        numbers = np.arange(mesh.devices.size).reshape(mesh.devices.shape)[among]
        one_host = len(np.unique(numbers // chip.links.size)) == 1
        return chip.links.within if one_host else chip.links.between
    sides = _sides(mesh.devices)
    whole = [side % chip.links.wraps == 0 for side in sides]
    links = 0
    for spanned, side, closed in zip(_sides(mesh.devices[among]), sides, whole):
        if spanned > 1:
            ring = spanned == side and closed and (all(whole) or not chip.links.cubes)
            links += 2 if ring else 1
    return links * chip.links.link


def _sides(devices: np.ndarray) -> list[int]:
    """Chips along each direction of the torus."""
    return [len(set(places)) for places in zip(*(d.coords for d in np.ravel(devices)))]


def measured_host_rate(dtype: str = "float32", seconds: float = 0.2) -> float:
    """FLOP/s of matrix products on this machine's CPU, all cores together, measured.

    Args:
      dtype: "float32" or "bfloat16", summed in float32.
      seconds: how long to measure.
    """
    side = 1024
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        x = jnp.ones((side, side), dtype)
        product = jax.jit(lambda x: jnp.dot(x, x, preferred_element_type=jnp.float32))
        timing = time_runs(lambda _: product(x), jax.block_until_ready, seconds)
    return 2 * side**3 / timing.wall["min"]
