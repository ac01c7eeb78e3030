"""Lists the collectives of a compiled program, parsed from its HLO text."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from timesformer_jax.planning.hlo import executed, num_bytes, parse, split_tuple

KINDS = (
    "all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute",
    "ragged-all-to-all", "reduce-scatter",
)  # fmt: skip


class Collective(NamedTuple):
    """A collective operation, and how often a program runs it.

    Attributes:
      kind: one of `KINDS`.
      num_bytes: bytes on one device: of the output of an all-gather, of the input of a
        reduce-scatter, of the input or the (equally large) output of the others.
      axes: the mesh axes along which the devices of a group differ.
      count: how often one run of the program executes it.
    """

    kind: str
    num_bytes: int
    axes: tuple[str, ...]
    count: int  # type: ignore[assignment]  # hides tuple.count, which is not needed


def collectives(compiled: jax.stages.Compiled | str, mesh: Mesh) -> list[Collective]:
    """The collectives of a compiled program, sorted by total bytes, largest first.

    A collective in a loop counts once per iteration if the program says their number, else once.
    Every branch of a conditional counts. An asynchronous collective counts where it starts.

    Args:
      compiled: `jax.jit(f).lower(...).compile()`, or its `as_text()`.
      mesh: the mesh of the program.

    Raises:
      ValueError: if the text is not a compiled program, or its device groups cannot be parsed.
    """
    found: Counter = Counter()
    for (_, shape, opcode, attributes), times, _ in executed(parse(compiled)):
        kind = opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        groups = _device_groups(kind, attributes, mesh.devices.size)
        if axes := _axes(groups, mesh):
            found[kind, _num_bytes(kind, opcode, shape, len(groups[0])), axes] += times
    listed = [Collective(*what, count) for what, count in found.items()]  # type: ignore[call-arg]
    return sorted(listed, key=lambda c: (-c.num_bytes * c.count, c))


def _num_bytes(kind: str, opcode: str, shape: str, group: int) -> int:
    # The shape of a "-start" instruction has the operands, the results, and data of the runtime;
    # that of an all-reduce has the results only.
    if opcode.endswith("-start") and kind != "all-reduce":
        shape = split_tuple(shape)[2]
    return num_bytes(shape) * (group if kind == "reduce-scatter" else 1)


# Device groups. Devices are numbered by their position in the mesh.


def _axes(groups: list[list[int]], mesh: Mesh) -> tuple[str, ...]:
    """The axes along which the members of a group differ."""
    differs = np.zeros(mesh.devices.ndim, bool)
    for group in groups:
        place = np.stack(np.unravel_index(group, mesh.devices.shape))
        differs |= (place != place[:, :1]).any(axis=1)
    return tuple(name for name, one in zip(mesh.axis_names, differs) if one)


def _device_groups(kind: str, attributes: str, devices: int) -> list[list[int]]:
    """The groups of devices that communicate; (source, target) pairs for a collective-permute."""
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(.*?\})?\}", attributes)
        assert pairs is not None  # XLA prints them always
        return _lists(pairs[0])
    everyone = [list(range(devices))]
    flagged = kind in ("all-gather", "all-reduce", "reduce-scatter")
    if flagged and "use_global_device_ids=true" not in attributes:
        # The groups list replicas, and a sharded program has one. With a channel all of its devices
        # take part, without one only the device itself.
        return everyone if "channel_id=" in attributes else [[0]]
    written = re.search(r"replica_groups=(.*)", attributes)
    if written is None or written[1].startswith("{}"):
        return everyone
    if written[1].startswith("{{"):
        return _lists(written[1].partition("}}")[0])
    iota = re.match(r"(\[[\d,]+\])<=(\[[\d,]+\](?:T\([\d,]+\))?)", written[1])
    if iota:
        return _iota(iota[2]).reshape(_numbers(iota[1])).tolist()
    named = re.match(r"mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}", written[1])
    if named is None:
        raise ValueError(f"devices in an unknown notation: {written[1][:80]}")
    return _along_named_axes(*named.groups())


def _along_named_axes(axes: str, order: str | None, along: str) -> list[list[int]]:
    """Groups in the notation of named mesh axes.

    Args:
      axes: the mesh, `'a'=4,'b'=2`.
      order: its devices, as `_iota` parses them; by default in order.
      along: the axes along which the devices of a group differ. `'a':(2)2` is the second factor of
        axis a reshaped to (2, 2, ...).
    """
    sizes = {name: int(size) for name, size in re.findall(r"'?([\w.-]+)'?=(\d+)", axes)}
    shape: list[int] = []
    chosen = []
    parts: dict[str, list[tuple[int, int]]] = {name: [] for name in sizes}
    for name, before, size in re.findall(r"'?([\w.-]+)'?(?::\((\d+)\)(\d+))?", along):
        parts[name].append((int(before or 1), int(size or sizes[name])))
    for name, size in sizes.items():
        done = 1
        for before, part in sorted(parts[name]):
            chosen.append(len(shape) + 1)
            shape += [before // done, part]
            done = before * part
        shape.append(size // done)
    devices = _iota(order or str([math.prod(shape)])).reshape(shape)
    others = [axis for axis in range(len(shape)) if axis not in chosen]
    members = math.prod(shape[axis] for axis in chosen)
    return devices.transpose(*others, *chosen).reshape(-1, members).tolist()


def _iota(text: str) -> np.ndarray:
    """Parses `[2,4]T(1,0)`, numbers from 0 reshaped, transposed and flattened, or `0,2,1,3`."""
    if not text.startswith("["):
        return np.array(_numbers(text))
    shape, _, order = text.partition("T")
    counted = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return counted.transpose(_numbers(order) if order else None).reshape(-1)


def _lists(text: str) -> list[list[int]]:
    return [_numbers(one) for one in re.findall(r"\{([\d,]+)", text)]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]
