"""The plan of a recipe on a topology."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import time
from typing import TYPE_CHECKING, NamedTuple

import jax
from absl import logging

from timesformer_jax.distributed.device_memory import LEAST_EFFORT, required_bytes
from timesformer_jax.distributed.hardware import GIB, Chip, Torus, measured_host_rate
from timesformer_jax.distributed.mesh import BATCH_SPEC
from timesformer_jax.errors import InputError
from timesformer_jax.models.costs import flops
from timesformer_jax.planning.collectives import Collective, collectives
from timesformer_jax.planning.cycles import Cycles, count_cycles
from timesformer_jax.planning.hlo import parse, repeated
from timesformer_jax.planning.largest import largest
from timesformer_jax.planning.memory import Memory, compiled_memory, counted_memory
from timesformer_jax.planning.program import Program, batch_size_of, build
from timesformer_jax.planning.roofline import Roofline, roofline
from timesformer_jax.planning.topology import Topology, open_topology
from timesformer_jax.ranges import RANGES
from timesformer_jax.training.optimizer import trained

if TYPE_CHECKING:
    from ml_collections import ConfigDict

# An option of the TPU compiler: a fifth of the time for the divided model, the same FLOPs.
_QUICK = {"exec_time_optimization_effort": LEAST_EFFORT}

# Loops that write less are passed over: a CPU draws random numbers in loops.
_RANDOM_NUMBERS = 0.01

FRAMES_STEP = 8  # the longest clip is a multiple of this, on each device that shares it


class Estimate(NamedTuple):
    """What one step costs: compiled, or counted from the config.

    Attributes:
      memory: bytes on one chip.
      flops: FLOPs on one chip. Compiled: those that the program executes; None for a program with
        loops, since compilers count a loop once. Counted: those of the model, two for each
        multiply-accumulate, in training three times the forward pass.
      moved: bytes to and from the memory of one chip, as the compiler counts them: every operand
        and result of every fused operation. None if nothing was compiled, or the program has loops.
      collectives: the collectives of the step.
      roofline: from the costs above; counted costs replace unknown ones. None for the host's CPU.
    """

    memory: Memory
    flops: float | None
    moved: float | None
    collectives: list[Collective]
    roofline: Roofline | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a recipe needs of a topology.

    Attributes:
      topology, program: the devices, and the step of training or inference.
      limit: bytes of memory that a program can use on a chip; None if unknown.
      needed: bytes that the program needs on a chip: compiled, or else counted; inf if the compiler
        only says that it is too much.
      counted: the costs counted from the config.
      compiled: the costs of the compiled program; None if this machine has no compiler for the
        chip, or the program does not fit.
      cycles: what the TPU compiler says of the program's time; None for other chips, or if the
        program does not fit.
      text: the compiled program as HLO text; None if there is none.
      compile_seconds: how long the compiler took; None if it did not run.
      quick: whether the compiler was told to optimise less.
      host_rate: FLOP/s of this machine's matrix products, measured, if the topology is its CPU.
      largest_batch: as `Program.batch_size`, of all devices together; None if it was not searched
        for.
      longest_clip: frames of the longest clip that fits; None if it was not searched for.
    """

    topology: Topology
    program: Program
    limit: float | None
    needed: float
    counted: Estimate
    compiled: Estimate | None
    cycles: Cycles | None
    text: str | None
    compile_seconds: float | None
    quick: bool
    largest_batch: int | None = None
    longest_clip: int | None = None
    host_rate: float | None = None

    @property
    def best(self) -> Estimate:
        """The compiled costs; the counted ones if there are none."""
        return self.compiled or self.counted

    @property
    def fits(self) -> bool | None:
        """Whether the program fits the memory; None if the limit is unknown."""
        return None if self.limit is None else self.needed <= self.limit

    @property
    def step_seconds(self) -> float | None:
        """Seconds of a step at the roofline, if nothing waits for anything else.

        On the host's CPU, whose cores all its devices share: of the model's matrix products, at the
        measured rate.
        """
        if self.host_rate is not None:
            return model_flops(self.program) * self.program.mesh.devices.size / self.host_rate
        return self.best.roofline and self.best.roofline.overlapped

    @property
    def mfu(self) -> float | None:
        """The FLOPs of the model over those that the chip could do in `step_seconds`.

        None if the traffic to memory is unknown, since `step_seconds` is then too small.
        """
        best, counted = self.best, self.counted.roofline
        if best.roofline is None or counted is None or best.moved is None:
            return None
        return counted.compute / best.roofline.overlapped

    @property
    def cycles_mfu(self) -> float | None:
        """The FLOPs of the model over those that the chip could do in the compiler's own time."""
        if self.cycles is None or self.counted.roofline is None:
            return None
        return self.counted.roofline.compute / self.cycles.seconds


def make_plan(
    config: ConfigDict,
    topology: str,
    *,
    work: str = "training",
    find_batch: bool = False,
    find_frames: bool = False,
    quick: bool = False,
    memory: float | None = None,
) -> Plan:
    """Compiles a step of a recipe for a topology, or counts what it costs.

    Args:
      config: a recipe of `recipes`.
      topology: "v5e:4x4", "h100:8", "cpu:8".
      work: "training", a step of it, or "inference", a batch of the evaluation.
      find_batch: whether to search for the largest batch that fits; it takes more compilations.
      find_frames: whether to search for the longest clip that fits, to 8 frames on each device.
      quick: whether the TPU compiler optimises less: it takes much less time, and the program
        needs a little more memory.
      memory: GiB that a program can use on a chip; by default the value in the table of chips, on
        GPUs the share of it that JAX reserves.

    Raises:
      InputError: for an unknown topology, a config that does not fit it, or a wrong field of the
        config.
    """
    target = open_topology(topology)
    limit = _limit(target.chip, memory)
    if (find_batch or find_frames) and limit is None:
        raise InputError(f"--topology={topology} has no memory limit; give one, --memory=16 (GiB)")
    options = _QUICK if quick and target.devices[0].platform == "tpu" else {}
    program = build(config, target.devices, batch_size_of(config, work), work)
    counted, found, seconds = _counted(target.chip, program), None, None
    needed: float = counted.memory.total
    if target.compiles:
        logging.info("compiling a step of %s for %s", work, topology)
        start = time.perf_counter()
        found, needed = _compile(program, options)
        seconds = time.perf_counter() - start
    text = found.as_text() if found else None
    plan = Plan(
        topology=target,
        program=program,
        limit=limit,
        needed=needed,
        counted=counted,
        compiled=_compiled(target.chip, program, found, text) if found and text else None,
        cycles=_cycles(target, program, text) if text else None,
        text=text,
        compile_seconds=seconds,
        quick=bool(options),
        host_rate=None if target.chip else measured_host_rate(program.model.dtype),
    )
    return _searched(plan, config, options, find_batch, find_frames)


def _searched(
    plan: Plan, config: ConfigDict, options: dict, find_batch: bool, find_frames: bool
) -> Plan:
    """The plan with the largest batch and the longest clip that fit, where they are asked for."""
    program, topology, limit = plan.program, plan.topology, plan.limit
    frames, batch_size = config.clip.frames, batch_size_of(config, program.work)

    def needed(frames_tried: int, batch_tried: int) -> float:
        if (frames_tried, batch_tried) == (frames, batch_size):
            return plan.needed
        tried = _with_frames(config, frames_tried)
        other = build(tried, topology.devices, batch_tried, program.work)
        if not topology.compiles:
            return counted_memory(other, topology.chip).total
        logging.info("compiling with a batch of %d clips of %d frames", batch_tried, frames_tried)
        return _compile(other, options)[1]

    batch = longest = None
    empty = plan.counted.memory.parameters + plan.counted.memory.optimizer
    if find_batch and limit is not None:
        of_batch = functools.partial(needed, frames)
        most = int(RANGES["batch_size"].high)
        batch = largest(of_batch, limit, program.batch_multiple, batch_size, empty, most)
    if find_frames and limit is not None:
        of_frames = functools.partial(needed, batch_tried=batch_size)
        multiple = FRAMES_STEP * program.mesh.shape["sequence"]
        most = int(RANGES["frames"].high)
        longest = largest(of_frames, limit, multiple, frames, empty, most)
    return dataclasses.replace(plan, largest_batch=batch, longest_clip=longest)


def _with_frames(config: ConfigDict, frames: int) -> ConfigDict:
    """The config for clips of another length; the model follows if it did before."""
    other = config.copy_and_resolve_references()
    if other.model.num_frames == other.clip.frames:
        other.model.num_frames = frames
    other.clip.frames = frames
    return other


def _limit(chip: Chip | None, memory: float | None) -> float | None:
    given = math.inf if memory is None else memory * GIB
    if chip is None:
        return None if memory is None else given
    if isinstance(chip.links, Torus):  # the TPU compiler accepts no more
        return min(given, chip.memory)
    # JAX reserves a part of a GPU when it starts.
    part = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", 0.75))
    return chip.memory * part if memory is None else given


def _compile(program: Program, options: dict) -> tuple[jax.stages.Compiled | None, float]:
    """The compiled program, if it fits, and the bytes of memory that it needs."""
    try:
        compiled = program.lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as e:
        if (needed := required_bytes(e)) is None:
            raise
        return None, needed
    return compiled, compiled_memory(program, compiled).total


def _compiled(
    chip: Chip | None, program: Program, compiled: jax.stages.Compiled, text: str
) -> Estimate:
    has_loops = repeated(parse(text)) > _RANDOM_NUMBERS
    costs = {} if has_loops else compiled.cost_analysis() or {}
    memory, exchanged = compiled_memory(program, compiled), collectives(compiled, program.mesh)
    flops, moved = costs.get("flops"), costs.get("bytes accessed")
    return _estimate(chip, program, memory, flops, moved, exchanged)


def _cycles(topology: Topology, program: Program, text: str) -> Cycles | None:
    if topology.chip is None or topology.chip.clock is None:
        return None
    layers = [layer.name for layer in program.model.scheme.layers]
    return count_cycles(text, topology.chip, topology.name.partition(":")[0], layers)


def _counted(chip: Chip | None, program: Program) -> Estimate:
    memory, exchanged = counted_memory(program, chip), counted_collectives(program)
    return _estimate(chip, program, memory, model_flops(program), None, exchanged)


def model_flops(program: Program) -> float:
    """FLOPs of the model for one step, on one chip."""
    clip = program.clip
    each = flops(program.model, clip.frames, clip.crop, clip.crop, trained=program.train)
    return each * program.clips / program.mesh.devices.size


def _estimate(
    chip: Chip | None,
    program: Program,
    memory: Memory,
    flops: float | None,
    moved: float | None,
    exchanged: list[Collective],
) -> Estimate:
    bound = None
    if chip is not None:
        products = model_flops(program) if flops is None else flops
        bound = roofline(chip, program.mesh, program.model.dtype, products, moved, exchanged)
    return Estimate(memory, flops, moved, exchanged, bound)


def counted_collectives(program: Program) -> list[Collective]:
    """The collectives of the parameters in one step, counted from their shardings.

    A gradient is summed over the axes that share the batch. If its parameter is split over one of
    them, this is a reduce-scatter, and the parameter is gathered for the forward and the backward
    pass; over the other axes it is an all-reduce. In inference a split parameter is gathered once.
    The exchanges of the tensor and sequence axes are not counted.
    """
    mesh, training = program.mesh, program.work == "training"
    batch = [axis for axis in _names(BATCH_SPEC[0]) if mesh.shape[axis] > 1]
    sizes: dict[tuple[str, tuple[str, ...]], int] = {}
    params = program.state.params
    for leaf in jax.tree.leaves(trained(params, program.train) if training else params):
        split = [axis for part in leaf.sharding.spec for axis in _names(part) if axis in batch]
        others = tuple(axis for axis in batch if axis not in split)
        part = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        whole = part * math.prod(mesh.shape[axis] for axis in split)
        if split:
            along = tuple(split)
            gathered = 2 * whole if training else whole
            sizes["all-gather", along] = sizes.get(("all-gather", along), 0) + gathered
            if training:
                sizes["reduce-scatter", along] = sizes.get(("reduce-scatter", along), 0) + whole
        if others and training:
            sizes["all-reduce", others] = sizes.get(("all-reduce", others), 0) + part
    return [Collective(kind, size, axes, 1) for (kind, axes), size in sizes.items()]


def _names(part) -> tuple[str, ...]:
    """The axes that a part of a PartitionSpec names."""
    return () if part is None else (part,) if isinstance(part, str) else tuple(part)
