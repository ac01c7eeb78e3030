"""`timesformer plan`: prints what a recipe needs of hardware.

timesformer plan --config=configs/k400_l.py --topology=v5e:4x4
"""

from __future__ import annotations

import sys
from json import dump
from typing import TYPE_CHECKING

from timesformer_jax.errors import InputError
from timesformer_jax.planning.plan import make_plan
from timesformer_jax.planning.report import as_json, as_text

if TYPE_CHECKING:
    from ml_collections import ConfigDict


def plan(
    config: ConfigDict,
    topology: str,
    find_batch: bool = False,
    quick: bool = False,
    memory: float | None = None,
    json: str | None = None,
) -> None:
    """Prints the plan of a recipe. The other arguments are those of `make_plan`.

    Args:
      json: file for all figures.

    Raises:
      InputError: as `make_plan`, or if the file cannot be written.
    """
    result = make_plan(config, topology, find_batch=find_batch, quick=quick, memory=memory)
    print(as_text(result))
    if json:
        try:
            with open(json, "w") as f:
                dump(as_json(result), f, indent=2)
        except OSError as e:
            raise InputError(f"--json={json} cannot be written: {e.strerror}") from e
        print(f"written: {json}", file=sys.stderr)
