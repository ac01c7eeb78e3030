"""What a training step needs of a chip's memory: as compiled, or counted from the config."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Var

from timesformer_jax.distributed.hardware import GIB
from timesformer_jax.models.timesformer import (
    TimeSformerConfig,
    abstract,
    parameters,
    with_parameters,
)
from timesformer_jax.planning.program import Program, bytes_a_chip
from timesformer_jax.training.optimizer import trained


class Memory(NamedTuple):
    """Bytes on one chip, by kind; their sum is what the step needs.

    Attributes:
      parameters: of the model.
      optimizer: its state, the moving average of the parameters and the step's number.
      inputs: one batch.
      activations: what lives during the step: activations, gradients, temporaries.
      program: machine code, and what it holds of constants; 0 where it is not known.
      padding: what layouts add to the arguments, and results that take no argument's place.
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
    """Memory as the compiler has laid it out."""
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


def counted_memory(program: Program) -> Memory:
    """Memory counted from the config, without a compiler: analytic.

    Activations are the gradients, the clips after preprocessing and everything that the backward
    pass is given by the forward pass. A compiler makes some of it again where it is used, and pads
    some. The sequence axis shares them; the tensor axis is taken to share none.
    """
    params, optimizer, inputs = _arguments(program)
    frames, side = program.clip.frames, program.clip.crop
    clips = program.batch_size // program.unit
    video = clips * program.parts * frames * side * side * 3 * 4
    gradients = bytes_a_chip(trained(program.state.params, program.train))
    gradients *= 2 if program.parts > 1 else 1  # the sum so far, and a part's
    kept = kept_for_backward(program.model, frames, side, clips, program.train)
    kept //= dict(program.mesh.shape).get("sequence", 1)
    return Memory(params, optimizer, inputs, gradients + video + kept)


def _arguments(program: Program) -> tuple[int, int, int]:
    state = program.state
    others = bytes_a_chip(state._replace(params=None))
    return bytes_a_chip(state.params), others, bytes_a_chip(program.batch)


def kept_for_backward(
    model: TimeSformerConfig, frames: int, side: int, clips: int, train: str = "all"
) -> int:
    """Bytes that the forward pass of `clips` clips keeps for the backward pass.

    With rematerialisation, what the blocks keep and the inside of one of them. Blocks from the
    second on (the first has no drop path) keep the same, so that two are traced and the rest is
    counted. Where only the head is trained there is no backward pass, and the inside of one block
    is what lives at a time.
    """

    def kept(depth: int, remat: str = model.remat) -> int:
        return _residuals(dataclasses.replace(model, depth=depth, remat=remat), frames, side, clips)

    if train == "head":
        return kept(1, "none")
    total = kept(1)
    if model.depth > 1:
        total += (model.depth - 1) * (kept(2) - total)
    return total if model.remat == "none" else total + kept(1, "none")


def _residuals(model: TimeSformerConfig, frames: int, side: int, clips: int) -> int:
    params = parameters(abstract(model))
    video = jax.ShapeDtypeStruct((clips, frames, side, side, 3), jnp.float32)

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


def exceeded(error: jax.errors.JaxRuntimeError) -> float | None:
    """Bytes that a program needs at least of a chip that does not have them.

    inf where the compiler does not tell; None for another error.
    """
    said = str(error)
    if "RESOURCE_EXHAUSTED" not in said:
        return None
    found = re.search(r"Used ([\d.]+)([KMGT]) of|temporaries \(([\d.]+)([KMGT])\)", said)
    if found is None:
        return math.inf
    number, unit = [group for group in found.groups() if group]
    return float(number) * GIB * 1024.0 ** ("KMGT".index(unit) - 2)
