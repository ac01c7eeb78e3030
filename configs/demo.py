"""A tiny divided space-time TimeSformer on the embedded data set of moving patches.

    timesformer train --config=configs/demo.py --workdir=runs/demo

Hardware: two CPU cores, a few minutes.
Expected accuracy: 99% top-1 of 8 directions. With --config.model.attention=space, which sees no
motion: chance, 12.5% (docs/demo_motion.json).
"""

from timesformer_jax.recipes import demo, with_arguments


def get_config(arguments=""):
    return with_arguments(demo(), arguments)
