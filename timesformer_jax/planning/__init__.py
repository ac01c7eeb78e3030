"""`timesformer plan`: what a recipe needs of hardware that need not be there.

    timesformer plan --config=configs/k400_l.py --topology=v5e:4x4

The real training step is compiled ahead of time for the devices of a topology: what it needs of
memory, computes, moves and sends is the compiler's, how long it takes a roofline. For GPUs that are
not here everything is counted from the config, and said to be. Needs no TensorFlow.
"""

from __future__ import annotations

import sys
from json import dump
from typing import TYPE_CHECKING

from timesformer_jax.errors import InputError
from timesformer_jax.planning.plan import Plan, make_plan
from timesformer_jax.planning.report import as_json, as_text

if TYPE_CHECKING:
    from ml_collections import ConfigDict

__all__ = ["Plan", "make_plan", "plan"]


def plan(
    config: ConfigDict,
    topology: str,
    find_batch: bool = False,
    quick: bool = False,
    memory: float | None = None,
    json: str | None = None,
) -> None:
    """Prints the plan of a recipe; the arguments are those of `make_plan`.

    Args:
      json: file to write everything to.
    """
    found = make_plan(config, topology, find_batch=find_batch, quick=quick, memory=memory)
    print(as_text(found))
    if json:
        try:
            with open(json, "w") as f:
                dump(as_json(found), f, indent=2)
        except OSError as e:
            raise InputError(f"--json={json} cannot be written: {e.strerror}") from e
        print(f"written: {json}", file=sys.stderr)
