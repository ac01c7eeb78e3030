"""The plan of a recipe on a topology."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from typing import TYPE_CHECKING, NamedTuple

import jax
from absl import logging

from timesformer_jax.distributed.hardware import GIB, Chip, Torus
from timesformer_jax.distributed.mesh import BATCH_SPEC
from timesformer_jax.errors import InputError
from timesformer_jax.models.costs import macs
from timesformer_jax.planning.collectives import Collective, collectives
from timesformer_jax.planning.largest_batch import largest_batch
from timesformer_jax.planning.memory import Memory, compiled_memory, counted_memory, exceeded
from timesformer_jax.planning.program import Program, build
from timesformer_jax.planning.roofline import Roofline, roofline
from timesformer_jax.planning.topology import Topology, open_topology
from timesformer_jax.training.optimizer import trained

if TYPE_CHECKING:
    from ml_collections import ConfigDict

# Of the TPU compiler: a fifth of its time for the divided model, the same FLOPs.
_QUICK = {"exec_time_optimization_effort": -1.0}


class Estimate(NamedTuple):
    """What one step costs, by one way of knowing it.

    Attributes:
      memory: of a chip.
      flops: on a chip. Compiled: what the program executes, None where it loops, since compilers
        count a loop as one turn; counted: the model's, two for each multiply-accumulate, three
        times the forward pass.
      moved: bytes to and from a chip's memory, as the compiler counts them: every operand and
        result of every fused operation. None where nothing was compiled, or it loops.
      collectives: what is exchanged; None where the program loops on a TPU, whose compiler does not
        tell how often.
      roofline: of what is known, the counted costs in place of what is not; None for the host's
        CPU.
    """

    memory: Memory
    flops: float | None
    moved: float | None
    collectives: list[Collective] | None
    roofline: Roofline | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a recipe needs of a topology.

    Attributes:
      topology, program: what was planned for what.
      limit: bytes of memory that a program can use on a chip; None where that is not known.
      needed: bytes that the program needs on a chip: compiled, or else counted; inf where the
        compiler only says that it is too much.
      counted: the costs counted from the config.
      compiled: those of the compiled program; None where there is no compiler for the chip here,
        or the program does not fit.
      compile_seconds: how long the compiler took; None where it did not run.
      quick: whether it was told to optimise less.
      largest_batch: clips a step of all devices together; None where it was not asked for.
    """

    topology: Topology
    program: Program
    limit: float | None
    needed: float
    counted: Estimate
    compiled: Estimate | None
    compile_seconds: float | None
    quick: bool
    largest_batch: int | None

    @property
    def best(self) -> Estimate:
        """The compiled costs, or without them the counted."""
        return self.compiled or self.counted

    @property
    def fits(self) -> bool | None:
        return None if self.limit is None else self.needed <= self.limit

    @property
    def step_seconds(self) -> float | None:
        """At the roofline, nothing waiting for anything."""
        return self.best.roofline and self.best.roofline.overlapped

    @property
    def mfu(self) -> float | None:
        """The model's FLOPs over what the chip could do in that time.

        None where that time does not know of the memory, and so says nothing of it.
        """
        best, counted = self.best, self.counted.roofline
        if best.roofline is None or counted is None or best.moved is None:
            return None
        return counted.compute / best.roofline.overlapped


def make_plan(
    config: ConfigDict,
    topology: str,
    *,
    find_batch: bool = False,
    quick: bool = False,
    memory: float | None = None,
) -> Plan:
    """Compiles the training step of a recipe for a topology, or counts what it costs.

    Args:
      config: a recipe of `recipes`.
      topology: "v5e:4x4", "h100:8", "cpu:8".
      find_batch: whether to search for the largest batch that fits, by more compilations.
      quick: whether the TPU compiler shall optimise less: much sooner done, memory a little higher.
      memory: GiB that a program can use on a chip; by default as the table of chips says, on GPUs
        the part that JAX takes.

    Raises:
      InputError: for a topology that is not known, a config that does not fit it, or a field of
        the config that is wrong.
    """
    places = open_topology(topology)
    limit = _limit(places.chip, memory)
    if find_batch and limit is None:
        raise InputError(f"--topology={topology} has no memory limit; give one, --memory=16 (GiB)")
    options = _QUICK if quick and places.devices[0].platform == "tpu" else {}
    program = build(config, places.devices, config.batch_size)
    counted, compiled, seconds = _counted(places.chip, program), None, None
    needed: float = counted.memory.total
    if places.compiles:
        logging.info("compiling the training step for %s", topology)
        start = time.perf_counter()
        compiled, needed = _compile(places.chip, program, options)
        seconds = time.perf_counter() - start

    def bytes_of(batch: int) -> float:
        if batch == config.batch_size:
            return needed
        other = build(config, places.devices, batch)
        if not places.compiles:
            return counted_memory(other).total
        logging.info("compiling with a batch of %d", batch)
        return _compile(places.chip, other, options)[1]

    largest = None
    if find_batch and limit is not None:
        empty = counted.memory.parameters + counted.memory.optimizer
        largest = largest_batch(bytes_of, limit, program.unit, config.batch_size, empty)
    return Plan(places, program, limit, needed, counted, compiled, seconds, bool(options), largest)


def _limit(chip: Chip | None, memory: float | None) -> float | None:
    given = math.inf if memory is None else memory * GIB
    if chip is None:
        return None if memory is None else given
    if isinstance(chip.links, Torus):  # of more its compiler would not hear
        return min(given, chip.memory)
    # Of a GPU JAX takes a part when it starts.
    part = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", 0.75))
    return chip.memory * part if memory is None else given


def _compile(chip: Chip | None, program: Program, options: dict) -> tuple[Estimate | None, float]:
    """The costs of the compiled program, if it fits, and the bytes of memory that it needs."""
    try:
        compiled = program.lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as e:
        if (needed := exceeded(e)) is None:
            raise
        return None, needed
    costs = {} if program.loops else compiled.cost_analysis() or {}
    memory = compiled_memory(program, compiled)
    flops, moved = costs.get("flops"), costs.get("bytes accessed")
    hidden = program.loops and program.mesh.devices.flat[0].platform == "tpu"
    exchanged = None if hidden else collectives(compiled, program.mesh)
    return _estimate(chip, program, memory, flops, moved, exchanged), memory.total


def _counted(chip: Chip | None, program: Program) -> Estimate:
    memory, exchanged = counted_memory(program), counted_collectives(program)
    return _estimate(chip, program, memory, model_flops(program), None, exchanged)


def model_flops(program: Program) -> float:
    """FLOPs of one step on one chip, as the model is written."""
    forward = macs(program.model, program.clip.frames, program.clip.crop, program.clip.crop)
    passes = 3 if program.train == "all" else 1  # of the head's own backward pass nothing is seen
    return passes * 2 * forward * program.batch_size / program.mesh.devices.size


def _estimate(
    chip: Chip | None,
    program: Program,
    memory: Memory,
    flops: float | None,
    moved: float | None,
    exchanged: list[Collective] | None,
) -> Estimate:
    roof = None
    if chip is not None:
        products = model_flops(program) if flops is None else flops
        sends = counted_collectives(program) if exchanged is None else exchanged
        roof = roofline(chip, program.mesh, program.model.dtype, products, moved, sends)
    return Estimate(memory, flops, moved, exchanged, roof)


def counted_collectives(program: Program) -> list[Collective]:
    """What training exchanges for its parameters, counted from how they lie.

    A gradient is summed over the axes that share the batch: where its parameter is split over one
    of them, by a reduce-scatter, and the parameter is gathered for the forward and the backward
    pass; over the others by an all-reduce. What the tensor and sequence axes exchange is not
    counted.
    """
    mesh = program.mesh
    batch = [axis for axis in _names(BATCH_SPEC[0]) if mesh.shape[axis] > 1]
    sizes: dict[tuple[str, tuple[str, ...]], int] = {}
    for leaf in jax.tree.leaves(trained(program.state.params, program.train)):
        split = [axis for part in leaf.sharding.spec for axis in _names(part) if axis in batch]
        others = tuple(axis for axis in batch if axis not in split)
        part = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        whole = part * math.prod(mesh.shape[axis] for axis in split)
        if split:
            along = tuple(split)
            sizes["all-gather", along] = sizes.get(("all-gather", along), 0) + 2 * whole
            sizes["reduce-scatter", along] = sizes.get(("reduce-scatter", along), 0) + whole
        if others:
            sizes["all-reduce", others] = sizes.get(("all-reduce", others), 0) + part
    return [Collective(kind, size, axes, 1) for (kind, axes), size in sizes.items()]


def _names(part) -> tuple[str, ...]:
    """The axes that a part of a PartitionSpec names."""
    return () if part is None else (part,) if isinstance(part, str) else tuple(part)
