"""A tiny divided space-time TimeSformer on the embedded data set of moving patches.

    timesformer train --config=configs/demo.py --workdir=runs/demo

Two CPU cores, a few minutes. Expect more than 90% top-1 of 8 directions;
`--config.model.attention=space` sees no motion and stays near 50%.
"""

from timesformer_jax import recipes


def get_config():
    return recipes.demo()
