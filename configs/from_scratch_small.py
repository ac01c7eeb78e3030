"""A small divided space-time TimeSformer on your own videos, from random parameters.

    timesformer train --config=from_scratch_small --workdir=runs/small \\
        --config.data.directory=data/mine

For a first try without a GPU and without a pretrained file: 8 frames of 64 pixels, 0.7M parameters.
Hardware: two CPU cores, minutes for a few dozen clips.
"""

from timesformer_jax.recipes import from_scratch_small, with_arguments


def get_config(arguments=""):
    return with_arguments(from_scratch_small(), arguments)
