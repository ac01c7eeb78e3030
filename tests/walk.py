"""Saves at every step; test_checkpoints.py kills it: python walk.py FOLDER."""

import contextlib
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from timesformer_jax.checkpoints.metadata import CheckpointMetadata
from timesformer_jax.checkpoints.store import Checkpoints
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.models.timesformer import TimeSformerConfig

STEPS = 24
METADATA = CheckpointMetadata(TimeSformerConfig(), ClipSpec(), (), {})


class State(NamedTuple):
    params: Any
    opt_state: Any
    ema: Any = None


def start():
    return State({"a": jnp.full((300_000,), 0.3)}, {"b": jnp.full((7,), 0.4)})


@jax.jit
def go_on(state):
    return jax.tree.map(lambda x: 3.9 * x * (1 - x), state)  # chaotic: no step may be lost


def target(state):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), state)


def main(directory):
    with contextlib.closing(Checkpoints(directory, keep_newest=2)) as found:
        step, state = 0, start()
        if last := found.read_newest(lambda step: found.restore(step, target(state))):
            step, (state, _) = last
        print("from", step, flush=True)
        while step < STEPS:
            step, state = step + 1, go_on(state)
            found.save(step, state, {}, METADATA)
    print("end")


if __name__ == "__main__":
    main(sys.argv[1])
