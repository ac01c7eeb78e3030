"""Parses the text of a compiled program: its instructions, and how often a run executes each."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax


class Instruction(NamedTuple):
    """An instruction of HLO text, `%name = shape opcode(operands), attribute=value, ...`.

    Attributes:
      name: without the percent sign.
      shape: of the result, with its layout.
      opcode: what it does.
      rest: the operands and attributes.
    """

    name: str
    shape: str
    opcode: str
    rest: str


class Execution(NamedTuple):
    """An instruction that a run of a program executes.

    Attributes:
      instruction: what is executed.
      times: how often.
      known: False in a loop whose number of iterations the text does not say; it counts as one.
    """

    instruction: Instruction
    times: int
    known: bool = True


class Module(NamedTuple):
    """A compiled program: the instructions of every computation by name, and its entry's name."""

    computations: dict[str, list[Instruction]]
    entry: str


def parse(compiled: jax.stages.Compiled | str) -> Module:
    """Parses a compiled program.

    Args:
      compiled: `jax.jit(f).lower(...).compile()`, or its `as_text()`.

    Raises:
      ValueError: if the text is not a compiled program.
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text() or ""
    # A computation is a line `%name (...) -> shape {`, its instructions, and `}`.
    computations: dict[str, list[Instruction]] = {}
    entry, current = None, []
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif instruction := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = (.*)", line):
            current.append(_instruction(*instruction.groups()))
    if entry is None:
        raise ValueError("no ENTRY computation in the text; give what compile().as_text() returns")
    return Module(computations, entry)


def executed(module: Module) -> Iterator[Execution]:
    """The instructions that one run of a compiled program executes.

    Those of a called computation (a fusion, the body of a loop, every branch of a conditional)
    follow their caller; those of an asynchronous one only where it starts. What a reduction or a
    sort applies to its elements is left out.
    """
    return _executed(module, module.entry, 1, True)


def _executed(module: Module, name: str, times: int, known: bool) -> Iterator[Execution]:
    for instruction in module.computations[name]:
        yield Execution(instruction, times, known)
        if instruction.opcode in ("async-update", "async-done"):
            continue
        inside, of_known = times, known
        if instruction.opcode == "while":
            count = _trip_count(instruction.rest, module)
            inside, of_known = times * (count or 1), known and count is not None
        for called in called_computations(instruction):
            yield from _executed(module, called, inside, of_known)


def _instruction(name: str, text: str) -> Instruction:
    text = re.sub(r"/\*.*?\*/", "", text)
    end = len(split_tuple(text)[0]) if text.startswith("(") else text.index(" ")
    opcode, _, rest = text[end:].lstrip().partition("(")
    return Instruction(name, text[:end], opcode, rest)


def called_computations(instruction: Instruction) -> list[str]:
    """The names of the computations that an instruction runs."""
    one = r"\b(?:body|condition|calls|true_computation|false_computation)=%?([\w.-]+)"
    if instruction.opcode == "call":
        one = one.replace("calls", "to_apply")  # elsewhere it is what a reduction applies
    many = r"\b(?:branch_computations|called_computations)=\{([^}]*)\}"
    names = re.findall(one, instruction.rest)
    for listed in re.findall(many, instruction.rest):
        names += [name.strip().removeprefix("%") for name in listed.split(",") if name.strip()]
    return names


def _trip_count(attributes: str, module: Module) -> int | None:
    """How often a loop runs; None if the text does not say.

    The compilers for CPUs and GPUs write the number. That for TPUs leaves the condition, which for
    JAX's loops of a fixed length is `i < number`, where i counts from 0.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', attributes):
        return int(known[1])
    condition = re.search(r"\bcondition=%?([\w.-]+)", attributes)
    inside = module.computations[condition[1]] if condition else []
    compared = [one.rest for one in inside if one.opcode == "compare"]
    if len(compared) != 1 or "direction=LT" not in compared[0]:
        return None
    bound = re.findall(r"%([\w.-]+)", compared[0].partition(")")[0])[-1]
    for one in inside:
        if one.name == bound and one.opcode == "constant":
            return int(one.rest.partition(")")[0])
    return None


# What these do writes nothing, or is written by what they call.
_WRITE_NOTHING = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast"),
    *("while", "call", "conditional"),
)


def repeated(module: Module) -> float:
    """The bytes that loops write after their first iteration, over all others.

    Returns:
      0 without loops; inf if the text does not say how often one of them runs.
    """
    once = again = 0.0
    for instruction, times, known in executed(module):
        if not known:
            return math.inf
        if instruction.opcode not in _WRITE_NOTHING:
            written = num_bytes(instruction.shape)
            once, again = once + written, again + (times - 1) * written
    return again / once if once else 0.0


# Shapes: `f32[16,768]{1,0:T(8,128)}`, or a tuple of them in parentheses.


def split_tuple(text: str) -> list[str]:
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


def arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """The dtype, as HLO writes it, and the sizes of every array of a shape."""
    found = re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\]", shape)
    return [
        (dtype, tuple(int(s.removeprefix("<=")) for s in sizes.split(",") if s))
        for dtype, sizes in found
    ]


def num_bytes(shape: str) -> int:
    """The bytes of all arrays of a shape, without padding."""
    bits = 0
    for dtype, sizes in arrays(shape):
        width = 8 if dtype == "pred" else int((re.search(r"\d+", dtype) or [0])[0])
        bits += width * math.prod(sizes)
    return bits // 8
