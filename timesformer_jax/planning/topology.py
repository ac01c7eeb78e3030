"""A topology's name, `v5e:4x4`, `h100:8` or `cpu:8`, to the devices a program is compiled for."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
from typing import NamedTuple

import jax

from timesformer_jax.distributed.hardware import CHIPS, Chip, Torus
from timesformer_jax.errors import InputError, did_you_mean

# Chips that are told to the TPU compiler as one host's, where the slice is smaller than a host.
_HOST = (2, 2, 1)

# The TPU compiler takes the machine for a TPU's: it would ask the network who it is, complain of
# the answer, and let one process at a time compile.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # of no consequence: the topology is given
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Topology(NamedTuple):
    """Devices to plan for.

    Attributes:
      name: as it was asked for.
      chip: of the table; None for the host's CPU, of which no peaks are known.
      devices: to put into a mesh. Those of a TPU are for compiling only.
      compiles: whether a program compiled for `devices` is the program of `chip`. False for GPUs
        that are not here: their devices are the host's, and stand for the shape of the mesh.
    """

    name: str
    chip: Chip | None
    devices: list[jax.Device]
    compiles: bool


def open_topology(name: str) -> Topology:
    """The devices that `name` says.

    Args:
      name: chip and number: a TPU's with the sides of the slice (v5e:4x4, v5p:2x2x4), others with
        the number (h100:8, cpu:8).

    Raises:
      InputError: for a chip that is not in the table, sides that no slice has, a TPU where libtpu
        is not installed, or more host devices than this process can have.
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
        shape = "the sides of the slice, 4x4" if torus else "their number, 8"
        raise InputError(f"--topology={name}: after {kind}: comes {shape} for one")
    if torus:
        return Topology(name, CHIPS[kind], _tpus(name, size), compiles=True)
    _ask_for_hosts(int(size))  # before any device is made
    if kind == "cpu":
        return Topology(name, None, _hosts(name, int(size)), compiles=True)
    here = [d for d in _gpus() if CHIPS[kind].kind in d.device_kind]
    if len(here) >= int(size):
        return Topology(name, CHIPS[kind], here[: int(size)], compiles=True)
    return Topology(name, CHIPS[kind], _hosts(name, int(size)), compiles=False)


def _tpus(name: str, size: str) -> list[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"--topology={name} needs the TPU compiler, which needs no TPU: pip install '.[tpu]' "
            "in the project's folder"
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
        said = str(e).splitlines()[0]
        raise InputError(
            f"the TPU compiler knows no --topology={name} ({said}); sides are even, "
            f"{name.partition(':')[0]}:{'2x2x1' if len(sides) == 3 else '2x2'} for one"
        ) from e
    return list(topology.devices)


def _ask_for_hosts(count: int) -> None:
    """Has the CPU show as many devices, unless those of this process are made already."""
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
