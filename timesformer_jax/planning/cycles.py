"""The time of a step by the TPU compiler's own figures, by part of the model.

XLA estimates the cycles of its operations and writes them into the program. It estimates none for
Pallas kernels; they are compiled once more, for their schedule (`planning.kernels`). The scopes in
the model (`jax.named_scope`) say which part an operation belongs to.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from timesformer_jax.distributed.hardware import Chip
from timesformer_jax.planning.collectives import KINDS
from timesformer_jax.planning.hlo import Instruction, Module, called_computations, executed, parse
from timesformer_jax.planning.kernels import Kernel, compile_kernels, kernel_of
from timesformer_jax.planning.schedule import Schedule

COLLECTIVES, OTHER = "collectives", "other"
# By scope; an attention layer's own name is a scope too.
PARTS = {
    "linear": "linear layers, GELU",
    "mlp": "linear layers, GELU",
    "norm": "norms, residuals",
    "residual": "norms, residuals",
    "embedding": "embedding, preprocessing",
    "preprocessing": "embedding, preprocessing",
    "optimizer": "optimizer",
}
FORWARD, RECOMPUTED, BACKWARD = PASSES = ("forward", "recomputed", "backward")

# Operations that move data, or change its type. A fusion of nothing else is a copy.
_MOVES = {
    "bitcast", "broadcast", "concatenate", "constant", "convert", "copy", "copy-done", "copy-start",
    "dynamic-slice", "dynamic-update-slice", "get-tuple-element", "pad", "parameter", "reshape",
    "slice", "slice-done", "slice-start", "transpose", "tuple",
}  # fmt: skip


class Share(NamedTuple):
    """The cycles of a part of the model in one pass.

    Attributes:
      part: one of `Cycles.parts`.
      direction: one of `PASSES`; the optimizer and what has no part count as forward.
      kind: "kernel", "copy" (moves data, or changes its type) or "operation".
      cycles: of one step.
    """

    part: str
    direction: str
    kind: str
    cycles: int


class KernelCall(NamedTuple):
    """A Pallas kernel in a part of a program.

    Attributes:
      name: the name that it was given.
      part, direction: where it is called, as in `Share`.
      calls: how often a step runs it there.
      schedule: None if it could not be compiled alone.
      cycles: of one call: those of the schedule, or the bytes of operands and results over the
        memory's rate, whichever is more.
      bound_by: "schedule" or "memory".
    """

    name: str
    part: str
    direction: str
    calls: int
    schedule: Schedule | None
    cycles: int
    bound_by: str


class Cycles(NamedTuple):
    """What the compiler says of a step.

    Attributes:
      parts: the parts of the model, in the order of a report.
      shares: the cycles, by part, pass and kind.
      kernels: the Pallas kernels, those that take most first.
      clock: cycles a second.
      known: False if the program does not say how often some loop runs; it counts as one.
    """

    parts: list[str]
    shares: list[Share]
    kernels: list[KernelCall]
    clock: float
    known: bool

    @property
    def total(self) -> int:
        return self.of()

    @property
    def seconds(self) -> float:
        """Of a step, if operations run one after another."""
        return self.total / self.clock

    def of(self, **fields: str) -> int:
        """The sum of the shares whose fields have these values."""
        wanted = fields.items()
        return sum(s.cycles for s in self.shares if wanted <= s._asdict().items())


def count_cycles(text: str, chip: Chip, chip_name: str, layers: Sequence[str]) -> Cycles:
    """The cycles of a program compiled for TPUs, by part of the model.

    Args:
      text: the compiled program, as `as_text()` gives it.
      chip, chip_name: its chip, and the chip's name in `hardware.CHIPS`.
      layers: the names of the model's attention layers.
    """
    assert chip.clock is not None  # all TPUs have one
    module = parse(text)
    shares: Counter[tuple[str, str, str]] = Counter()
    calls: Counter[tuple[Kernel, tuple[str, str, str]]] = Counter()
    everything_known = True
    for instruction, times, known in executed(module):
        part, direction = place(instruction, layers)
        if kernel := kernel_of(instruction):
            calls[kernel, (kernel_name(instruction), part, direction)] += times
        elif cycles := re.search(r'"estimated_cycles":"(\d+)"', instruction.rest):
            kind = "copy" if _moves(instruction, module) else "operation"
            estimate = int(cycles[1])
            # Near 2^64 it is a negative number, written as an unsigned one: no estimate.
            shares[part, direction, kind] += times * (estimate if estimate < 2**63 else 0)
            everything_known &= known
    distinct = list(dict.fromkeys(kernel for kernel, _ in calls))
    schedules = dict(zip(distinct, compile_kernels(distinct, chip_name)))
    kernels = []
    for (kernel, where), times in calls.items():
        cycles, bound_by = _cycles_of(kernel, schedules[kernel], chip)
        kernels.append(KernelCall(*where, times, schedules[kernel], cycles, bound_by))
        shares[(*where[1:], "kernel")] += times * cycles
    found = [Share(*key, cycles) for key, cycles in shares.items()]
    parts = [f"{layer} attention" for layer in layers]
    parts += [*dict.fromkeys(PARTS.values()), COLLECTIVES, OTHER]
    kernels.sort(key=lambda k: -k.calls * k.cycles)
    return Cycles(parts, found, kernels, chip.clock, everything_known)


def place(instruction: Instruction, layers: Sequence[str]) -> tuple[str, str]:
    """The part of the model that an instruction belongs to, and the pass.

    Both follow from its name in the traced program, `jit(step)/transpose(jvp(mlp))/linear/add`:
    the innermost scope that is known. A fusion has the name of one of its operations.
    """
    path = _path(instruction)
    direction = FORWARD
    if "rematted_computation" in path:
        direction = RECOMPUTED
    elif "transpose" in path[:-1]:  # of a gradient; the last is the operation
        direction = BACKWARD
    if instruction.opcode.removesuffix("-start").removesuffix("-done") in KINDS:
        return COLLECTIVES, direction
    for scope in reversed(path[:-1]):
        if scope in layers:
            return f"{scope} attention", direction
        if scope in PARTS:
            return PARTS[scope], direction
    return OTHER, direction


def _path(instruction: Instruction) -> list[str]:
    """The scopes and transformations around an operation, and its own name, from the outermost."""
    name = re.search(r'op_name="([^"]*)"', instruction.rest)
    first = name[1].partition(";")[0] if name else ""  # of operations that are now one
    return [part for part in re.split(r"[/()]+", first) if part]


def kernel_name(instruction: Instruction) -> str:
    """The name that a kernel was given, `temporal_forward`: of the scope around its call."""
    scopes = _path(instruction)[:-1]
    return scopes[-1] if scopes else instruction.name


def _cycles_of(kernel: Kernel, schedule: Schedule | None, chip: Chip) -> tuple[int, str]:
    """The cycles of a call, and what bounds it."""
    assert chip.clock is not None
    moving = round(kernel.num_bytes / chip.memory_rate * chip.clock)
    running = schedule.cycles if schedule else 0
    return max(running, moving), "schedule" if running >= moving else "memory"


def _moves(instruction: Instruction, module: Module) -> bool:
    """Whether an instruction only moves data, or changes its type."""
    if instruction.opcode != "fusion":
        return instruction.opcode in _MOVES
    inside = (module.computations[name] for name in called_computations(instruction))
    return all(_moves(one, module) for computation in inside for one in computation)
