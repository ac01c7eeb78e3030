"""Lists the collectives of a compiled program, parsed from its HLO text."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

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

    A collective in a loop counts once per iteration if the compiler knows their number, else once.
    Every branch of a conditional counts. An asynchronous collective counts where it starts.

    Args:
      compiled: `jax.jit(f).lower(...).compile()`, or its `as_text()`.
      mesh: the mesh of the program.

    Raises:
      ValueError: if the text is not a compiled program, or its device groups cannot be parsed.
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text() or ""
    computations, entry = _computations(text)
    found: Counter = Counter()
    for (shape, opcode, attributes), times in _executed(computations, entry, 1):
        kind = opcode.removesuffix("-start")
        groups = _device_groups(kind, attributes, mesh.devices.size)
        if axes := _axes(groups, mesh):
            found[kind, _num_bytes(kind, opcode, shape, len(groups[0])), axes] += times
    listed = [Collective(*what, count) for what, count in found.items()]  # type: ignore[call-arg]
    return sorted(listed, key=lambda c: (-c.num_bytes * c.count, c))


# HLO text: a computation is a line `%name (...) -> shape {`, its instructions, and `}`. An
# instruction is `%name = shape opcode(operands), attribute=value, ...`.

Instruction = tuple[str, str, str]  # shape, opcode, operands and attributes


def _executed(
    computations: dict[str, list[Instruction]], name: str, times: int
) -> Iterator[tuple[Instruction, int]]:
    """The collective instructions that `times` runs of a computation execute, and how often."""
    for instruction in computations[name]:
        _, opcode, attributes = instruction
        if opcode.removesuffix("-start") in KINDS:
            yield instruction, times
        elif opcode not in ("async-update", "async-done"):
            for called in _called_computations(attributes):
                yield from _executed(computations, called, times * _trip_count(attributes))


def _computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of every computation, by name, and the name of the entry computation."""
    found: dict[str, list[Instruction]] = {}
    entry, current = None, []
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
            current = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif instruction := re.match(r"\s+(?:ROOT )?%?[\w.-]+ = (.*)", line):
            current.append(_instruction(instruction[1]))
    if entry is None:
        raise ValueError("no ENTRY computation in the text; give what compile().as_text() returns")
    return found, entry


def _instruction(text: str) -> Instruction:
    text = re.sub(r"/\*.*?\*/", "", text)
    end = len(_split_tuple(text)[0]) if text.startswith("(") else text.index(" ")
    opcode, _, rest = text[end:].lstrip().partition("(")
    return text[:end], opcode, rest


def _split_tuple(text: str) -> list[str]:
    """The tuple at the beginning of the text, followed by its elements."""
    depth, begin, parts = 0, 1, []
    for i, character in enumerate(text):
        if character in ",)" and depth == 1:
            parts.append(text[begin:i].strip())
            begin = i + 1
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return [text[: i + 1], *parts]
    raise ValueError(f"no end of the tuple in {text!r}")


def _num_bytes(kind: str, opcode: str, shape: str, group: int) -> int:
    # The shape of a "-start" instruction has the operands, the results, and data of the runtime;
    # that of an all-reduce has the results only.
    if opcode.endswith("-start") and kind != "all-reduce":
        shape = _split_tuple(shape)[2]
    bits = 0
    for dtype, sizes in re.findall(r"(\w+)\[([\d,<=]*)\]", shape):
        width = 8 if dtype == "pred" else int((re.search(r"\d+", dtype) or [0])[0])
        bits += width * math.prod(int(s.removeprefix("<=")) for s in sizes.split(",") if s)
    return bits // 8 * (group if kind == "reduce-scatter" else 1)


def _called_computations(attributes: str) -> list[str]:
    one = r"\b(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)"
    many = r"\b(?:branch_computations|called_computations)=\{([^}]*)\}"
    names = re.findall(one, attributes)
    for listed in re.findall(many, attributes):
        names += [name.strip().removeprefix("%") for name in listed.split(",") if name.strip()]
    return names


def _trip_count(attributes: str) -> int:
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', attributes)
    return int(known[1]) if known else 1


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
