"""The least time of a step, from its FLOPs, its traffic to memory and its collectives."""

from __future__ import annotations

import math
from typing import NamedTuple

from jax.sharding import Mesh

from timesformer_jax.distributed.hardware import Chip, link_rate
from timesformer_jax.planning.collectives import Collective


class Roofline(NamedTuple):
    """Seconds of a step on every chip, each part at its peak rate.

    Attributes:
      compute: the FLOPs.
      memory: the bytes to and from memory; None if no compiler counted them.
      communication: the bytes of the collectives, one after another.
    """

    compute: float
    memory: float | None
    communication: float

    @property
    def overlapped(self) -> float:
        """The longest of the three, if they overlap completely."""
        return max(self.compute, self.memory or 0.0, self.communication)

    @property
    def one_by_one(self) -> float:
        """If communication starts when everything else is done."""
        return max(self.compute, self.memory or 0.0) + self.communication

    @property
    def bound_by(self) -> str:
        """The name of the longest of the three."""
        parts = self._asdict()
        return max(parts, key=lambda name: parts[name] or 0.0)


def roofline(
    chip: Chip,
    mesh: Mesh,
    dtype: str,
    flops: float,
    moved: float | None,
    collectives: list[Collective],
) -> Roofline:
    """The roofline of one step.

    Args:
      chip: the peaks.
      mesh: the devices.
      dtype: dtype of the matrix products, "float32" or "bfloat16".
      flops: FLOPs on one chip.
      moved: bytes to and from one chip's memory.
      collectives: the collectives of one step.
    """
    peak = chip.bfloat16 if dtype == "bfloat16" else chip.float32
    sending = sum(sent(c, mesh) / link_rate(chip, mesh, c.axes) for c in collectives)
    return Roofline(flops / peak, None if moved is None else moved / chip.memory_rate, sending)


def sent(collective: Collective, mesh: Mesh) -> float:
    """Bytes that one of the n chips along the axes of a collective sends.

    Counted as in a ring: an all-gather, reduce-scatter or all-to-all of S bytes sends
    (n - 1) / n S; an all-reduce, which consists of the first two, twice that; the others S.
    """
    n = math.prod(mesh.shape[axis] for axis in collective.axes)
    share = {
        "all-gather": (n - 1) / n,
        "reduce-scatter": (n - 1) / n,
        "all-to-all": (n - 1) / n,
        "ragged-all-to-all": (n - 1) / n,
        "all-reduce": 2 * (n - 1) / n,
    }
    return share.get(collective.kind, 1.0) * collective.num_bytes * collective.count
