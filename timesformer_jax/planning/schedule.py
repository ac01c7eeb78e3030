"""The cycles of a kernel, from the schedule that the TPU compiler writes for it.

A schedule is a list of bundles, the very long instruction words of a TPU: one a cycle, if nothing
stalls. The text says where loops begin and end, and how often most of them run.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

# A line `  0x4e LB: >> { ...` is a bundle; LB if the body of a loop begins with it.
_BUNDLE = re.compile(r"\s*(?:0x)?[0-9a-f]+\s+(LB)?[A-Z ]*: *>* *\{")
# It ends with a branch back to the body, unless `%p2 = scmp.ge.s32.totalorder %s19, 4` holds.
_EXIT = re.compile(r"(%p\w+) = scmp\.ge\.s32\.totalorder (?:\([^)]*\), )?(%\w+), (\d+)\b")
_BRANCH = re.compile(r"sbr\.rel \((!?)(%p\w+)\) target = \$region(\d+)")
_START = re.compile(r"Start(?:/End)? (?:empty )?region (\d+)")
_DELAY_SLOTS = 4  # after a branch, of v5e, v5p and v6e
# What is compared: `%s19 = sadd.s32 1, %s28`, the next of a number that counts from 0.
_STEP = re.compile(r"(%s\w+) = sadd\.s32 (?:\([^)]*\), )?(\d+), %")
# The loop over a grid is a pipeline: it runs longer than the grid has steps, to fill and to drain.
_STAGE = re.compile(r"iteration index, stage = (\d+)")


class Schedule(NamedTuple):
    """What one call of a kernel takes.

    Attributes:
      bundles: those of the text, in which every loop is written once.
      cycles: bundles times the iterations of the loops around them. The loop over the grid runs
        once a step; on a chip with two cores, once a step of one of them. Every branch counts.
      known: False if the text does not say how often some loop runs; it counts as one.
    """

    bundles: int
    cycles: int
    known: bool


def read_schedule(text: str) -> Schedule:
    """Reads a `*-final_bundles.txt` of the compiler's dump of a kernel.

    Raises:
      ValueError: if there are no bundles in the text.
    """
    around: list[tuple[int, ...]] = []  # the loops around each bundle
    steps: dict[str, int] = {}
    exits: dict[str, int] = {}
    iterations: list[int | None] = []  # of each loop
    started: set[str] = set()
    stages = 0
    open_loops: tuple[int, ...] = ()
    delay = 0
    for line in text.splitlines():
        if bundle := _BUNDLE.match(line):
            if delay == 1:
                open_loops = open_loops[:-1]
            delay = max(delay - 1, 0)
            if bundle[1]:
                open_loops = (*open_loops, len(iterations))
                iterations.append(None)
            around.append(open_loops)
        steps |= {name: int(step) for name, step in _STEP.findall(line)}
        for name, tested, bound in _EXIT.findall(line):
            exits[name] = -(-int(bound) // steps.get(tested, 1))
        stages = max(stages, *map(int, _STAGE.findall(line)), 0)
        started.update(_START.findall(line))
        branch = _BRANCH.search(line)
        if branch and branch[3] in started and open_loops:
            iterations[open_loops[-1]] = exits.get(branch[2]) if branch[1] else None
            delay = _DELAY_SLOTS + 1
    if not around:
        raise ValueError("no bundles in the text")
    if stages and iterations and iterations[0]:
        iterations[0] = max(iterations[0] - stages, 1)
    cycles = sum(math.prod(iterations[loop] or 1 for loop in loops) for loops in around)
    return Schedule(len(around), cycles, None not in iterations)
