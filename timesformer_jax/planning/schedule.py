"""The cycles of a kernel, from the schedule that the TPU compiler writes for it.

A schedule is a list of bundles, the very long instruction words of a TPU: one a cycle, if nothing
stalls. The text says where loops begin and end, and what ends them.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from typing import NamedTuple

# A line `  0x4e LB: >> { ...` is a bundle; LB if the body of a loop begins with it.
_BUNDLE = re.compile(r"\s*(?:0x)?[0-9a-f]+\s+(LB)?[A-Z ]*: *>* *\{")
# The loop ends with a branch back to the body, unless a predicate holds.
_BRANCH = re.compile(r"sbr\.rel \((!?)(%p\w+)\) target = \$region(\d+)")
_START = re.compile(r"Start(?:/End)? (?:empty )?region (\d+)")
_DELAY_SLOTS = 4  # after a branch, of v5e, v5p and v6e
# The loop over a grid is a pipeline: it runs longer than the grid has steps, to fill and to drain.
_STAGE = re.compile(r"iteration index, stage = (\d+)")
# `%s1 = sadd.s32 (%p2), 1, %s3`, done only if %p2 holds; `%s1 = smov (!%p2, %s3), 272` is %s3 where
# it is not done.
_SCALAR = re.compile(
    r"(%[sp]\w+) = ([a-z][\w.]*) (?:\((!?)(%p\w+)(?:, (%?\w+))?\), )?(%?\w+(?:, %?\w+)*)"
)


class Schedule(NamedTuple):
    """What one call of a kernel takes.

    Attributes:
      bundles: those of the text, in which every loop is written once.
      cycles: bundles times the iterations of the loops around them. The loop over the grid runs
        once a step; on a chip with two cores, once a step of one of them. Every branch counts.
      varies: whether the length of some loop depends on the step; it counts as in the first one.
      known: False if the length of some loop does not follow from the text; it counts as one.
    """

    bundles: int
    cycles: int
    varies: bool = False
    known: bool = True


def read_schedule(text: str) -> Schedule:
    """Reads a `*-final_bundles.txt` of the compiler's dump of a kernel.

    Raises:
      ValueError: if there are no bundles in the text.
    """
    scalars = _Scalars(text)
    around: list[tuple[int, ...]] = []  # the loops around each bundle
    iterations: list[int | None] = []  # of each loop
    started: set[str] = set()
    open_loops: tuple[int, ...] = ()
    stages = delay = 0
    for line in text.splitlines():
        if bundle := _BUNDLE.match(line):
            if delay == 1:
                open_loops = open_loops[:-1]
            delay = max(delay - 1, 0)
            if bundle[1]:
                open_loops = (*open_loops, len(iterations))
                iterations.append(None)
            around.append(open_loops)
        stages = max(stages, *map(int, _STAGE.findall(line)), 0)
        started.update(_START.findall(line))
        branch = _BRANCH.search(line)
        if branch and branch[3] in started and open_loops:
            iterations[open_loops[-1]] = scalars.iterations(branch[2]) if branch[1] else None
            delay = _DELAY_SLOTS + 1
    if not around:
        raise ValueError("no bundles in the text")
    if stages and iterations and iterations[0]:
        iterations[0] = max(iterations[0] - stages, 1)
    cycles = sum(math.prod(iterations[loop] or 1 for loop in loops) for loops in around)
    return Schedule(len(around), cycles, scalars.varies, None not in iterations)


_FUNCTIONS: dict[str, Callable[..., int]] = {
    "scmp.lt": operator.lt,
    "scmp.le": operator.le,
    "scmp.gt": operator.gt,
    "scmp.ge": operator.ge,
    "scmp.eq": operator.eq,
    "scmp.ne": operator.ne,
    "sadd": operator.add,
    "ssub": operator.sub,
    "smul": operator.mul,
    "sand": operator.and_,
    "sor": operator.or_,
    "sxor": operator.xor,
    "sshll": operator.lshift,
    "sshrl": operator.rshift,
    "sshra": operator.rshift,
    "smin": min,
    "smax": max,
    "pand": lambda a, b: a and b,
    "por": lambda a, b: a or b,
    "pnand": lambda a, b: not (a and b),
    "pnor": lambda a, b: not (a or b),
    "pneg": operator.not_,
    "scalar_select": lambda condition, a, b: a if condition else b,
}


class _Scalars:
    """The scalar code of a kernel. Each name has one definition."""

    def __init__(self, text: str):
        self.definitions: dict[str, list[str]] = {}
        self.varies = False  # whether a length that was asked for depends on the step of the grid
        for name, *definition in _SCALAR.findall(re.sub(r"/\*.*?\*/", "", text)):
            self.definitions.setdefault(name, definition)

    def iterations(self, leaves: str) -> int | None:
        """How often a loop runs that ends when `leaves` holds; None if that is unknown.

        Such a loop counts a number up from 0 and compares it with another.
        """
        opcode, *_, operands = self.definitions.get(leaves, ("", ""))
        if not opcode.startswith("scmp.ge."):
            return None
        counted, bound = operands.split(", ")
        opcode, *_, operands = self.definitions.get(counted, ("", ""))
        step = operands.split(", ")[0] if opcode.startswith("sadd.") else "1"  # it was spilled
        last = self.value(bound)
        return max(-(-last // int(step)), 1) if step.isdigit() and last is not None else None

    def value(self, name: str) -> int | None:
        """The value of a name in the first step of the grid; None if it is unknown."""
        if name.isdigit():
            return (int(name) + 2**31) % 2**32 - 2**31
        if name not in self.definitions:
            return None
        opcode, negated, predicate, otherwise, written = self.definitions[name]
        operands = written.split(", ")
        if otherwise:
            holds = self.value(predicate)
            if holds is None:
                return None
            if bool(holds) == bool(negated):
                return self.value(otherwise)
        kind, *form = opcode.split(".")
        if kind in ("smov", "sphi", "pmov"):
            self.varies |= kind == "sphi"  # which has its first value in the first step
            return self.value(operands[0])
        values = [self.value(operand) for operand in operands]
        known = [value for value in values if value is not None]
        function = _FUNCTIONS.get(f"{kind}.{form[0]}" if kind == "scmp" else kind)
        return function(*known) if function and len(known) == len(values) else None
