"""The attention schemes, the paper's and others: which attentions a block applies, in which order.

A scheme is a line of `SCHEMES`. An `AttentionLayer` states its partition of the clip's patches into
sequences; what attends to what, drop path, costs and sharding follow from it. A scheme of your own
is registered with `register_scheme`, from any module. `docs/attention.md` gives the reasons for
what the paper leaves open.
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from timesformer_jax.distributed import sequence
from timesformer_jax.errors import InputError
from timesformer_jax.models import attention, padding
from timesformer_jax.models.attention import Partition
from timesformer_jax.models.tokens import Grid, Numbers, Tokens

# Partitions: the number of every patch's sequence, (T, N) integers from 0, without gaps.


def by_position(t: int, grid: Grid) -> Numbers:
    """A sequence for every position, through time."""
    _, y, x = np.indices((t, *grid))
    return (y * grid[1] + x).reshape(t, -1)


def by_frame(t: int, grid: Grid) -> Numbers:
    """A sequence for every frame."""
    return np.indices((t, *grid))[0].reshape(t, -1)


def by_clip(t: int, grid: Grid) -> Numbers:
    """One sequence of all patches."""
    return np.zeros((t, grid[0] * grid[1]), int)


def by_row(t: int, grid: Grid) -> Numbers:
    """A sequence for every row of every frame."""
    frame, y, _ = np.indices((t, *grid))
    return (frame * grid[0] + y).reshape(t, -1)


def by_column(t: int, grid: Grid) -> Numbers:
    """A sequence for every column of every frame."""
    frame, _, x = np.indices((t, *grid))
    return (frame * grid[1] + x).reshape(t, -1)


def by_quarter(t: int, grid: Grid) -> Numbers:
    """The clip cut in F x H/2 x W/2: four sequences, fewer where the grid is one patch wide.

    The first half of an odd side has the extra row.
    """
    _, y, x = np.indices((t, *grid))
    return _without_gaps(2 * (2 * y // grid[0]) + 2 * x // grid[1])


def by_stride(t: int, grid: Grid) -> Numbers:
    """Every second patch in time, height and width: eight sequences, each across the whole clip."""
    frame, y, x = np.indices((t, *grid))
    return _without_gaps(4 * (frame % 2) + 2 * (y % 2) + x % 2)


def _without_gaps(label: np.ndarray) -> np.ndarray:
    """(T, H, W) labels to (T, N) numbers: an axis of length one leaves some labels unused."""
    return np.unique(label, return_inverse=True)[1].reshape(len(label), -1)


class AttentionLayer(NamedTuple):
    """One attention of a block, with its projections and its residual.

    Attributes:
      name: the name of its parameters.
      partition: which patches share a sequence. Drop path draws once for each sequence.
      attention_fn: attention within these sequences, from projections to attended values (see
        `attention.over_time`). By default `attention.over_partition` with the partition; a function
        of its own only makes it faster.
      joins_cls: whether the classification token takes part. It is copied to every sequence,
        attends and is attended to there, and its update is the mean over the sequences.
      has_temporal_fc: whether a further linear layer follows the projection, called `temporal_fc`
        as in the release, which has it after temporal attention. Every layer of a block but one has
        it. It starts at zero in the release's init, so that a video model starts as the image model
        it is made from.
      within: "frame" if each of its sequences lies in one frame, "position" if the partition is
        `by_position`, else "clip". Devices that share a clip compute it by frames, by positions, or
        by heads.
      every: the distance between the blocks that have the layer: 1 for all, 2 for the first, the
        third and so on.
      width: of its queries, keys and values, and its number of heads, over those of the model.
    """

    name: str
    partition: Partition
    attention_fn: Callable[[Tokens, Grid], Tokens] | None = None
    joins_cls: bool = True
    has_temporal_fc: bool = False
    within: str = "clip"
    every: int = 1
    width: float = 1.0

    def attend(self, qkv: Tokens, grid: Grid) -> Tokens:
        """The attended values: see `attention.over_time` for the shapes.

        A frame that is not valid has its sequences to itself where they lie within frames: what
        comes out there is used by no valid one.
        """
        if qkv.valid is not None and self.within != "frame":
            return padding.attend(qkv, grid, self.partition, self.within)

        def attend(*qkv: Any) -> Any:
            if self.attention_fn is not None:
                return self.attention_fn(Tokens(*qkv), grid)[:2]
            if self.within == "position":  # to which devices that share a clip may have added some
                return attention.over_time(Tokens(*qkv), grid)[:2]
            return attention.over_partition(Tokens(*qkv), grid, self.partition)[:2]

        qkv = qkv[:2]
        return Tokens(*(sequence.by_heads(attend, *qkv) if self.within == "clip" else attend(*qkv)))


class Scheme(NamedTuple):
    """The attentions of a block, and what the model sees of time outside them.

    Attributes:
      layers: the attentions, in the order in which they are applied.
      parallel: whether every attention reads the block's input, not the output of the one before.
      time_embedding: whether the patches get a temporal position embedding.
      token_per_frame: whether each frame keeps its own classification token, averaged at the end.
    """

    layers: tuple[AttentionLayer, ...]
    parallel: bool = False
    time_embedding: bool = True
    token_per_frame: bool = False

    def layers_of(self, block: int) -> tuple[AttentionLayer, ...]:
        """The attentions of a block, which is numbered from 0."""
        return tuple(layer for layer in self.layers if block % layer.every == 0)


# In the released models the classification token takes no part in temporal attention.
TEMPORAL = AttentionLayer(
    "temporal", by_position, attention.over_time,
    joins_cls=False, has_temporal_fc=True, within="position",
)  # fmt: skip
SPATIAL = AttentionLayer("spatial", by_frame, attention.over_space, within="frame")
JOINT = AttentionLayer("joint", by_clip, attention.over_space_time)
LOCAL = AttentionLayer("local", by_quarter, has_temporal_fc=True)
GLOBAL = AttentionLayer("global", by_stride)
WIDTH = AttentionLayer("width", by_row, attention.over_width, has_temporal_fc=True, within="frame")
HEIGHT = AttentionLayer("height", by_column, attention.over_height, within="frame")
# Where it is the only attention, the token must join, or it would never see the video.
TIME = TEMPORAL._replace(joins_cls=True, has_temporal_fc=False)

SCHEMES = {
    "divided": Scheme((TEMPORAL, SPATIAL)),
    "space": Scheme((SPATIAL,), time_embedding=False, token_per_frame=True),
    "joint": Scheme((JOINT,)),
    "local_global": Scheme((LOCAL, GLOBAL)),
    "axial": Scheme((TEMPORAL, WIDTH, HEIGHT)),
    "time": Scheme((TIME,)),
    "space_then_time": Scheme((SPATIAL, TEMPORAL)),
    "parallel": Scheme((TEMPORAL, SPATIAL), parallel=True),
}


# The modules, or files, that registered the schemes that are not ours. Checkpoints tell them.
MODULES: dict[str, str] = {}
IMPORT_VARIABLE = "TIMESFORMER_IMPORT"


def register_scheme(name: str, scheme: Scheme) -> Scheme:
    """Adds a scheme: `TimeSformerConfig(attention=name)` has it from then on.

    Call it when the module that defines the scheme is imported, before a config or checkpoint that
    names it is read. Commands import the modules, or .py files, that the environment variable
    TIMESFORMER_IMPORT lists with commas.

    Raises:
      InputError: if the name is taken, a layer's name is used twice, no layer joins the
        classification token, a partition does not number the patches from 0 without gaps, or its
        sequences do not lie within what the layer states.
    """
    if SCHEMES.get(name, scheme) != scheme:
        raise InputError(f"there is an attention scheme {name!r} already; choose another name")
    names = [layer.name for layer in scheme.layers]
    if len(set(names)) < len(names):
        raise InputError(f"scheme {name!r} has two layers of one name ({', '.join(names)})")
    if not any(layer.joins_cls for layer in scheme.layers):
        raise InputError(
            f"no layer of scheme {name!r} joins the classification token, which would never see "
            "the video; set joins_cls=True in one"
        )
    for layer in scheme.layers:
        _check_partition(name, layer)
    SCHEMES[name] = scheme
    MODULES[name] = _calling_module()
    return scheme


def _calling_module() -> str:
    """The module, or the script's file, that called a function of this one."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        module = str(frame.f_globals.get("__name__", ""))
        # Decorators of the tests, which check shapes, lie between.
        if module != __name__ and module.partition(".")[0] not in ("jaxtyping", "beartype"):
            break
    is_script = module == "__main__" or module.startswith("<")
    return str(frame.f_globals.get("__file__", "") if is_script else module)


def import_asked_for(name: str) -> None:
    """Imports what TIMESFORMER_IMPORT lists, if no scheme of this name is registered yet.

    Raises:
      InputError: if one of the modules cannot be imported.
    """
    for module in filter(None, os.environ.get(IMPORT_VARIABLE, "").split(",")):
        if name in SCHEMES:
            return
        try:
            if module.endswith(".py"):
                runpy.run_path(module)
            else:
                importlib.import_module(module)
        except Exception as e:  # a user's file can raise anything
            reason = " ".join(f"{type(e).__name__}: {e}".split())
            raise InputError(
                f"{IMPORT_VARIABLE}={module} cannot be imported ({reason}); give a module that "
                "Python finds, or the path of a .py file"
            ) from e


def _check_partition(scheme: str, layer: AttentionLayer) -> None:
    t, grid = 5, (4, 3)
    number = np.asarray(layer.partition(t, grid))
    used = np.unique(number)
    if number.shape != (t, grid[0] * grid[1]) or not np.array_equal(used, np.arange(len(used))):
        raise InputError(
            f"the partition of layer {layer.name!r} of scheme {scheme!r} must return (frames, "
            f"patches) integers from 0 without gaps, not shape {number.shape} of {used[:5]}..."
        )
    frames = by_frame(t, grid)
    holds = {
        "clip": True,
        "frame": all(len(np.unique(frames[number == which])) == 1 for which in used),
        "position": np.array_equal(number, by_position(t, grid)),
    }
    if not holds.get(layer.within, False):
        raise InputError(
            f"layer {layer.name!r} of scheme {scheme!r} has within={layer.within!r}; set 'frame' "
            "if each of its sequences lies in one frame, 'position' if its partition is "
            "by_position, else 'clip'"
        )
