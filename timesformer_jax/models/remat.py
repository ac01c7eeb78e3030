"""Rematerialisation: which activations of a block are saved for the backward pass."""

from __future__ import annotations

from collections.abc import Callable

import jax

# Names that the model gives to arrays: the input of each block, and the output of every linear
# layer and every attention.
BLOCK_INPUT, OUTPUT = "block_input", "output"

_POLICIES = {
    "block": jax.checkpoint_policies.nothing_saveable,
    "outputs": jax.checkpoint_policies.save_only_these_names(OUTPUT),
    # Only the input of the block: moving another array to the host and back takes longer than
    # computing it again.
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[BLOCK_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
REMATS = ("none", *_POLICIES)


def checkpointed(remat: str, block: Callable, *, scanned: bool) -> Callable:
    """`block` with one of the `REMATS`, which `TimeSformerConfig.remat` describes.

    Args:
      remat: one of `REMATS`.
      block: a function of arrays.
      scanned: whether it is the body of a `jax.lax.scan`. Elsewhere the compiler has to be kept
        from merging the two computations of the same array.
    """
    if remat == "none":
        return block
    return jax.checkpoint(block, policy=_POLICIES[remat], prevent_cse=not scanned)
