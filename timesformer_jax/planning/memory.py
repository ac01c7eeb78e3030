"""The memory that a step needs on a chip: compiled, or counted from the config."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Var
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from timesformer_jax.distributed.hardware import Chip, Torus
from timesformer_jax.distributed.pieces import is_long, tokens_of
from timesformer_jax.models.timesformer import (
    TimeSformerConfig,
    abstract,
    parameters,
    with_parameters,
)
from timesformer_jax.planning.program import Program, bytes_a_chip
from timesformer_jax.training.optimizer import trained


class Memory(NamedTuple):
    """Bytes on one chip, by kind; the step needs their sum.

    Attributes:
      parameters: the parameters of the model.
      optimizer: the optimizer's state, the moving average of the parameters and the step number.
      inputs: one batch.
      activations: arrays that exist during the step: activations, gradients, temporaries.
      program: machine code and its constants; 0 if unknown.
      padding: the padding of the arguments, and results that do not reuse an argument's memory.
    """

    parameters: int
    optimizer: int
    inputs: int
    activations: int
    program: int = 0
    padding: int = 0

    @property
    def total(self) -> int:
        return sum(self)


def compiled_memory(program: Program, compiled: jax.stages.Compiled) -> Memory:
    """The memory of a compiled program."""
    stats: Any = compiled.memory_analysis()
    params, optimizer, inputs = _arguments(program)
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return Memory(
        params,
        optimizer,
        inputs,
        stats.temp_size_in_bytes,
        stats.generated_code_size_in_bytes,
        stats.argument_size_in_bytes - params - optimizer - inputs + results,
    )


def counted_memory(program: Program, chip: Chip | None = None) -> Memory:
    """Memory counted from the config, without a compiler.

    Activations are the gradients, the clips after preprocessing and all residuals that the forward
    pass saves for the backward pass; of inference, which has no gradients, those of one block at a
    time. A compiler recomputes some of them and pads others. They are divided by the sequence axis;
    division by the tensor axis is not counted. Attention is that of XLA on GPUs: a kernel, which a
    GPU that is there may choose, saves less.

    Args:
      program: what is counted.
      chip: that it is for; None: that of the program's devices.
    """
    params, optimizer, inputs = _arguments(program)
    frames, side = program.clip.frames, program.clip.crop
    clips = program.clips // program.batch_multiple
    # A long clip is rounded to the dtype of the model, and counted with what the embedding saves.
    long = is_long(frames, tokens_of(side))
    video = 0 if long else clips * program.parts * frames * side * side * 3 * 4
    gradients = 0
    if program.work == "training":
        gradients = bytes_a_chip(trained(program.state.params, program.train))
        gradients *= 2 if program.parts > 1 else 1  # the sum so far, and that of one part
    with _traced_for(chip):
        kept = kept_for_backward(program.model, frames, side, clips, program.train)
    kept //= dict(program.mesh.shape).get("sequence", 1)
    return Memory(params, optimizer, inputs, gradients + video + kept)


def _traced_for(chip: Chip | None) -> contextlib.AbstractContextManager:
    """Tracing takes the operations of this chip, which need not be there."""
    if chip is None:
        return contextlib.nullcontext()
    platform = "tpu" if isinstance(chip.links, Torus) else "gpu"
    device = AbstractDevice(device_kind=chip.kind, num_cores=None, platform=platform)
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def _arguments(program: Program) -> tuple[int, int, int]:
    state = program.state
    others = bytes_a_chip(state._replace(params=None))
    return bytes_a_chip(state.params), others, bytes_a_chip(program.batch)


def kept_for_backward(
    model: TimeSformerConfig, frames: int, side: int, clips: int, train: str = "all"
) -> int:
    """Bytes that the forward pass of `clips` clips saves for the backward pass.

    With rematerialisation: what all blocks save, and everything inside one of them. If all blocks
    have the same attentions, two are traced and the others counted: all save the same but the
    first, which has no drop path. If only the head is trained, or nothing is, there is no backward
    pass, and the arrays inside one block exist at a time.
    """

    def kept(depth: int, remat: str = model.remat) -> int:
        return _residuals(dataclasses.replace(model, depth=depth, remat=remat), frames, side, clips)

    if train != "all":
        return kept(1, "none")
    if any(layer.every > 1 for layer in model.scheme.layers):
        return kept(model.depth) + (0 if model.remat == "none" else kept(1, "none"))
    total = kept(1)
    if model.depth > 1:
        total += (model.depth - 1) * (kept(2) - total)
    return total if model.remat == "none" else total + kept(1, "none")


def _residuals(model: TimeSformerConfig, frames: int, side: int, clips: int) -> int:
    params = parameters(abstract(model))
    long = is_long(frames, (side // model.patch_size) ** 2)
    dtype = jnp.dtype(model.dtype if long else jnp.float32)
    video = jax.ShapeDtypeStruct((clips, frames, side, side, 3), dtype)

    def forward(params: Any, video: jax.Array) -> Any:
        key = jax.random.key(0)
        return jax.vjp(lambda p: with_parameters(model, p)(video, key=key), params)

    jaxpr = jax.make_jaxpr(forward)(params, video).jaxpr
    given = {id(variable) for variable in jaxpr.invars}
    kept: dict[int, Any] = {
        id(variable): variable.aval
        for variable in jaxpr.outvars
        if isinstance(variable, Var) and id(variable) not in given
    }
    here = [aval for aval in kept.values() if aval.memory_space != jax.memory.Space.Host]
    return sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in here)
