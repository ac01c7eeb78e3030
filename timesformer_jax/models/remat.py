"""What the forward pass of a block keeps for the backward pass, which computes the rest again."""

from __future__ import annotations

from collections.abc import Callable

import jax

# The names that the model gives to arrays. A block's input is the clip's state before it; outputs
# are those of every linear layer and of attention itself.
BLOCK_INPUT, OUTPUT = "block_input", "output"

_POLICIES = {
    "block": jax.checkpoint_policies.nothing_saveable,
    "outputs": jax.checkpoint_policies.save_only_these_names(OUTPUT),
    # Its input only: moving an array over the bus takes longer than computing an output again.
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[BLOCK_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
REMATS = ("none", *_POLICIES)


def checkpointed(remat: str, block: Callable, *, scanned: bool) -> Callable:
    """`block` under one of `REMATS`, as `TimeSformerConfig.remat` describes them.

    Args:
      remat: which.
      block: a function of arrays.
      scanned: whether it is the body of a `jax.lax.scan`, where nothing needs to stop the compiler
        from merging what is computed twice.
    """
    if remat == "none":
        return block
    return jax.checkpoint(block, policy=_POLICIES[remat], prevent_cse=not scanned)
