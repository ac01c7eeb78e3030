"""From the name of a topology, `v5e:4x4`, `h100:8` or `cpu:8`, to its devices."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
from typing import NamedTuple

import jax

from timesformer_jax.distributed.hardware import CHIPS, Chip, Torus
from timesformer_jax.errors import InputError, did_you_mean, first_line, install

# Beyond the largest slices; each virtual device of a CPU takes threads of its own.
MAX_DEVICES = 16_384

# The chips of a TPU host. For a smaller slice the compiler is told that the host has fewer.
_HOST = (2, 2, 1)

# The TPU compiler assumes that it runs on a TPU host. Without these it would ask the network for
# the host's metadata, complain about the answer, and allow one process at a time.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # has no effect: the topology is given
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Topology(NamedTuple):
    """Devices to plan for.

    Attributes:
      name: as given.
      chip: its entry in the table; None for the host's CPU, whose peaks are unknown.
      devices: for a mesh. Those of a TPU can only be compiled for.
      compiles: whether a program compiled for `devices` is a program for `chip`. False for GPUs
        that this machine does not have: their devices are CPU devices, which give the mesh its
        shape.
    """

    name: str
    chip: Chip | None
    devices: list[jax.Device]
    compiles: bool


def open_topology(name: str) -> Topology:
    """The devices of a topology.

    Args:
      name: chip and size: the sides of a TPU slice (v5e:4x4, v5p:2x2x4), the number of other chips
        (h100:8, cpu:8).

    Raises:
      InputError: for an unknown chip, sides that no slice has, a TPU if libtpu is not installed, or
        more CPU devices than this process can have.
    """
    kind, _, size = name.partition(":")
    known = [*CHIPS, "cpu"]
    if kind not in known:
        raise InputError(
            f"no chip {kind!r} in --topology={name}, there are {', '.join(known)}: "
            f"give v5e:4x4, h100:8 or cpu:8, for example{did_you_mean(kind, known)}"
        )
    torus = kind != "cpu" and isinstance(CHIPS[kind].links, Torus)
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}" if torus else r"[1-9]\d*", size):
        shape = (
            "the sides of the slice, for example 4x4" if torus else "their number, for example 8"
        )
        raise InputError(f"--topology={name}: after {kind}: give {shape}")
    if math.prod(int(side[:9]) for side in size.split("x")) > MAX_DEVICES:
        raise InputError(f"--topology={name:.60}: at most {MAX_DEVICES:,} devices are planned")
    if torus:
        return Topology(name, CHIPS[kind], _tpus(name, size), compiles=True)
    _ask_for_hosts(int(size))  # before any device is created
    if kind == "cpu":
        return Topology(name, None, _hosts(name, int(size)), compiles=True)
    here = [d for d in _gpus() if CHIPS[kind].kind in d.device_kind]
    if len(here) >= int(size):
        return Topology(name, CHIPS[kind], here[: int(size)], compiles=True)
    return Topology(name, CHIPS[kind], _hosts(name, int(size)), compiles=False)


def _tpus(name: str, size: str) -> list[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"--topology={name} needs the TPU compiler, which needs no TPU: {install('tpu')}"
        )
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    sides = [int(side) for side in size.split("x")]
    part = {}
    if math.prod(sides) < math.prod(_HOST):
        part = {"chips_per_host_bounds": [*sides, *[1] * (3 - len(sides))]}
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **part)
    except (jax.errors.JaxRuntimeError, ValueError) as e:
        said = first_line(e)
        raise InputError(
            f"the TPU compiler knows no --topology={name} ({said}); sides are even, "
            f"{name.partition(':')[0]}:{'2x2x1' if len(sides) == 3 else '2x2'} for one"
        ) from e
    return list(topology.devices)


def _ask_for_hosts(count: int) -> None:
    """Sets the number of CPU devices, unless this process has created its devices already."""
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)


def _hosts(name: str, count: int) -> list[jax.Device]:
    """Virtual devices of this machine's CPU."""
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise InputError(
            f"--topology={name} needs {count} devices and this process has {len(devices)}: plan it "
            "in a process of its own"
        )
    return devices[:count]


def _gpus() -> list[jax.Device]:
    try:
        return jax.devices("gpu")
    except RuntimeError:  # no GPU, or no JAX for it
        return []
